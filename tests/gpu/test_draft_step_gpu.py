"""`draft_step` on a GPU: the compiled kernel against the reference, and its races."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from torch import Tensor

from speckv.kernels import layout as at
from speckv.kernels import reference
from speckv.kernels.layout import StepState
from tests.gpu.repeats import count_differences
from tests.kernels.cases import POLICIES, fixed
from tests.tolerances import assert_close

pytestmark = pytest.mark.gpu


def draft_state(batch: int, device: str) -> StepState:
    state = StepState.allocate(batch, 64, device)
    for b in range(batch):
        state.reset(b, list(range(3 + b % 5)), limit=40, request=b)
    state.rows[:, at.STOP] = 0
    return state


def options_of(kind: str, logits: Tensor) -> dict[str, Any]:
    """Keyword arguments of `draft_step` for a kind of row; tensors on the CPU."""
    batch, vocabulary = logits.shape
    if kind == "greedy":
        return {}
    inv = torch.tensor([1.0, 0.0, 1.4, 0.7]).repeat(-(-batch // 4))[:batch]
    options: dict[str, Any] = {"inv_temperature": inv, "seeds": torch.arange(batch) * 2**33 - 5}
    if kind == "mapped":
        options["id_map"] = torch.arange(vocabulary, dtype=torch.int32).flip(0) * 3
    if kind == "rejection":
        kept = min(40, vocabulary)
        options["cutoffs"] = logits.float().topk(kept).values[:, -1].contiguous()
        options["coupling"] = "rejection"
    return options


def on_device(options: dict[str, Any]) -> dict[str, Any]:
    return {k: v.cuda() if isinstance(v, Tensor) else v for k, v in options.items()}


def logits_of(batch: int, vocabulary: int, dtype: torch.dtype, pad: int) -> Tensor:
    generator = torch.Generator().manual_seed(vocabulary)
    wide = torch.full((batch, vocabulary + pad), math.nan)
    wide[:, :vocabulary] = torch.randn(batch, vocabulary, generator=generator) * 3.0
    return wide.to(dtype)


def check(logits: Tensor, device_logits: Tensor, policy: Tensor, steps: int, kind: str) -> None:
    """The same steps on the GPU and by the reference; the seeds leave no near ties."""
    from speckv.kernels.draft_step import DraftStep

    options = options_of(kind, logits)
    expected = draft_state(logits.shape[0], "cpu")
    state = draft_state(logits.shape[0], "cuda")
    step = DraftStep(device_logits, state, policy.cuda(), **on_device(options))
    for _ in range(steps):
        step(device_logits)
        reference.draft_step(logits, expected, policy, **options)
    assert torch.equal(state.sequence.cpu(), expected.sequence)
    assert torch.equal(state.rows.cpu(), expected.rows)
    assert_close(state.signals.cpu(), expected.signals, torch.float32)
    assert_close(state.running.cpu(), expected.running, torch.float32)


@pytest.mark.parametrize("kind", ["greedy", "sampled", "mapped", "rejection"])
@pytest.mark.parametrize("pad", [0, 1], ids=["aligned", "unaligned"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
@pytest.mark.parametrize("vocabulary", [7, 1031, 32_000, 49_152, 128_256, 262_144])
@pytest.mark.parametrize("batch", [1, 3, 17])
def test_equals_reference(
    batch: int, vocabulary: int, dtype: torch.dtype, pad: int, kind: str
) -> None:
    wide = logits_of(batch, vocabulary, dtype, pad)
    check(wide[:, :vocabulary], wide.cuda()[:, :vocabulary], fixed(), 1, kind)


@pytest.mark.parametrize("policy", POLICIES)
def test_a_whole_step_under_every_policy(policy: str) -> None:
    logits = logits_of(4, 49_152, torch.bfloat16, 0)
    check(logits, logits.cuda(), POLICIES[policy], 6, "sampled")


@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf])
@pytest.mark.parametrize("place", [0, 40_000, 49_151])
def test_rows_without_a_token_end(bad: float, place: int) -> None:
    from speckv.kernels.draft_step import draft_step

    logits = logits_of(2, 49_152, torch.bfloat16, 0).cuda()
    logits[0, place] = bad
    if bad == -math.inf:
        logits[0] = bad
    state = draft_state(2, "cuda")
    draft_step(logits, state, fixed().cuda())
    assert state.rows[:, at.ERROR].tolist() == [at.ERROR_DRAFT, 0]


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["greedy", "sampled"])
def test_a_million_launches_give_the_same_bits(kind: str) -> None:
    """From a second or later token on, whose features fold into those of the tokens before it."""
    from speckv.kernels.draft_step import DraftStep

    logits = logits_of(4, 49_152, torch.bfloat16, 0).cuda()
    state = draft_state(4, "cuda")
    state.rows[:, at.DRAFTED] = torch.tensor([1, 2, 3, 4])
    state.running.copy_(torch.tensor([1.5, 2.5, 0.4, 0.2, 2.5, 0.2, 0.1, 0.6]))
    options = on_device(options_of(kind, logits.cpu()))
    step = DraftStep(logits, state, POLICIES["survival-rate"].cuda(), **options)
    assert count_differences(lambda: step(logits), list(vars(state).values())) == 0
