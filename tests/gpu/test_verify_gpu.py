"""`verify`, `verify_rejection` and `cutoff` on a GPU: against the reference, and their races."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from speckv.kernels import layout as at
from speckv.kernels import reference
from speckv.kernels.layout import StepState
from tests.gpu.grid import logits_cases
from tests.gpu.repeats import count_differences
from tests.kernels.steps import (
    MODES,
    assert_same_state,
    fixed_policy,
    mlp_policy,
    rejection_case,
    verify_case,
)
from tests.tolerances import assert_close

pytestmark = pytest.mark.gpu

DTYPES = [torch.float32, torch.float16, torch.bfloat16]
VOCABULARIES = [7, 1031, 32_000, 49_152, 128_256, 262_144]


def on_device(arguments: dict[str, Any]) -> dict[str, Any]:
    return {k: v.cuda() if isinstance(v, Tensor) else v for k, v in arguments.items()}


def on(state: StepState, device: str) -> StepState:
    return StepState(**{name: t.to(device, copy=True) for name, t in vars(state).items()})


def at_stride(logits: Tensor, pad: int) -> Tensor:
    """The logits on the GPU, ``pad`` words of NaN behind each row."""
    wide = torch.full((*logits.shape[:-1], logits.shape[-1] + pad), torch.nan, dtype=logits.dtype)
    wide[..., : logits.shape[-1]] = logits
    return wide.cuda()[..., : logits.shape[-1]]


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize(("batch", "vocabulary", "dtype", "pad"), logits_cases((1, 5), (1, 3)))
@pytest.mark.parametrize("width", [2, 5])
def test_verify(
    batch: int, width: int, vocabulary: int, dtype: torch.dtype, pad: int, mode: str
) -> None:
    from speckv.kernels.verify import verify

    logits, expected, arguments = verify_case(
        batch, width, vocabulary, dtype, mode, share=0.9, seed=vocabulary + width
    )
    state = on(expected, "cuda")
    policy = rate_policy()
    verify(at_stride(logits, pad), state, policy, **on_device(arguments))
    reference.verify(logits, expected, policy.cpu(), **arguments)
    assert_same_state(on(state, "cpu"), expected)


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("vocabulary", [1031, 128_256])
def test_the_widest_verification(vocabulary: int, mode: str) -> None:
    test_verify(1, 16, vocabulary, torch.bfloat16, 0, mode)


@pytest.mark.parametrize("trimmed", [False, True], ids=["same-ids", "id-map"])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize(
    ("batch", "width", "vocabulary"),
    [(1, 2, 7), (1, 16, 1031), (5, 5, 1031), (1, 5, 49_152), (3, 3, 128_256), (1, 2, 262_144)],
)
def test_verify_rejection(
    batch: int, width: int, vocabulary: int, dtype: torch.dtype, trimmed: bool
) -> None:
    from speckv.kernels.rejection import verify_rejection

    case = rejection_case(
        batch, width, vocabulary, dtype, seed=vocabulary + width, trimmed=trimmed, top_p=0.95
    )
    state, policy = on(case.state, "cuda"), fixed_policy(4)
    logits, arguments = case.logits.cuda(), on_device(case.arguments)
    verify_rejection(logits, state, policy.cuda(), **arguments)
    reference.verify_rejection(case.logits, case.state, policy, **case.arguments)
    assert_same_state(on(state, "cpu"), case.state)


@pytest.mark.parametrize("pad", [0, 1], ids=["aligned", "unaligned"])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("vocabulary", VOCABULARIES)
@pytest.mark.parametrize("scale", [0.01, 3.0])
def test_cutoff(scale: float, vocabulary: int, dtype: torch.dtype, pad: int) -> None:
    from speckv.kernels.cutoff import cutoff

    generator = torch.Generator().manual_seed(vocabulary)
    logits = (scale * torch.randn(8, vocabulary, generator=generator)).to(dtype)
    parameters = (
        torch.tensor([1.0, 0.5, 2.0, 0.0, 1.0, 1.3, 0.8, 1.0]),
        torch.tensor([0, 5, 0, 3, 50, 1, 5000, 7], dtype=torch.int32),
        torch.tensor([1.0, 1.0, 0.9, 0.5, 0.8, 0.3, 0.95, 1e-3]),
    )
    actual, lse = cutoff(at_stride(logits, pad), *(t.cuda() for t in parameters))
    expected, expected_lse = reference.cutoff(logits, *parameters)
    assert_close(lse.cpu(), expected_lse, torch.float32)
    exact = parameters[2] == 1.0
    assert torch.equal(actual.cpu()[exact], expected[exact])
    # Where mass decides, rounding may move the cutoff past tokens that hardly weigh anything.
    for i in torch.nonzero(~exact).flatten().tolist():
        x = logits[i].double() * (float(parameters[0][i]) or 1.0)
        between = (logits[i].float() >= actual[i].cpu()) != (logits[i].float() >= expected[i])
        assert x.softmax(0)[between].sum() < 1e-4


def all_drafting(state: StepState) -> StepState:
    """``state`` on the GPU, no row done or at its end and every row with draft tokens.

    So that every row loads and stores all of its features, and decides by them.
    """
    state = on(state, "cuda")
    state.rows[:, at.DONE], state.rows[:, at.LIMIT] = at.RUNNING, 60
    state.rows[:, at.DRAFTED] = 1 + torch.arange(state.rows.shape[0], device="cuda") % 4
    return state


def rate_policy() -> Tensor:
    generator = torch.Generator().manual_seed(1)
    return mlp_policy(generator, at.LAYOUT_SURVIVAL, at.OBJECTIVE_RATE).cuda()


def counter_of(prepared: Any) -> Tensor:
    """The arrival counters of a prepared verification."""
    found: Tensor = prepared._launch.keywords["scratch"].counter
    return found


@pytest.mark.slow
@pytest.mark.parametrize("mode", ["greedy", "cutoffs"])
def test_a_million_verifications_give_the_same_bits(mode: str) -> None:
    from speckv.kernels.verify import Verify

    logits, state, arguments = verify_case(4, 5, 49_152, torch.bfloat16, mode, 0.9, seed=1)
    logits, state = at_stride(logits, 0), all_drafting(state)
    prepared = Verify(logits, state, rate_policy(), **on_device(arguments))
    mutated = list(vars(state).values())
    assert count_differences(lambda: prepared(logits), mutated, [counter_of(prepared)]) == 0


@pytest.mark.slow
def test_a_million_rejections_give_the_same_bits() -> None:
    from speckv.kernels.rejection import VerifyRejection

    case = rejection_case(4, 5, 49_152, torch.bfloat16, seed=1, trimmed=True)
    logits, state = case.logits.cuda(), all_drafting(case.state)
    prepared = VerifyRejection(logits, state, rate_policy(), **on_device(case.arguments))
    mutated = list(vars(state).values())
    assert count_differences(lambda: prepared(logits), mutated, [counter_of(prepared)]) == 0


@pytest.mark.slow
def test_a_million_cutoffs_give_the_same_bits() -> None:
    """Two launches: the first one's sums, then the search for the cutoff."""
    from speckv.kernels.cutoff import Cutoff

    generator = torch.Generator().manual_seed(2)
    logits = (3.0 * torch.randn(4, 49_152, generator=generator)).bfloat16().cuda()
    top_k = torch.tensor([0, 50, 0, 40], dtype=torch.int32, device="cuda")
    top_p = torch.tensor([1.0, 1.0, 0.9, 0.8], device="cuda")
    prepared = Cutoff(logits, torch.ones(4, device="cuda"), top_k, top_p)
    results = [prepared.cutoffs, prepared.lse]
    assert prepared._scratch is not None
    assert count_differences(lambda: prepared(logits), results, [prepared._scratch.counter]) == 0
