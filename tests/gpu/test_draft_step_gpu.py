"""`draft_step` on a GPU: the compiled kernel against the reference, and its races."""

from __future__ import annotations

import math
from functools import partial
from typing import Any

import pytest
import torch
from torch import Tensor

from speckv.kernels import layout as at
from speckv.kernels import reference
from speckv.kernels.layout import StepState
from tests.gpu.grid import logits_cases
from tests.gpu.repeats import count_alternating, count_differences
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
@pytest.mark.parametrize(("batch", "vocabulary", "dtype", "pad"), logits_cases((3, 17), (1, 3)))
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


def deciding(batch: int) -> StepState:
    """Rows from a second or later token on, whose features fold into those before it."""
    state = draft_state(batch, "cuda")
    state.rows[:, at.DRAFTED] = torch.arange(batch, device="cuda") % 4 + 1
    state.running.copy_(torch.tensor([1.5, 2.5, 0.4, 0.2, 2.5, 0.2, 0.1, 0.6]))
    return state


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["greedy", "sampled", "rejection"])
def test_a_million_launches_give_the_same_bits(kind: str) -> None:
    from speckv.kernels.draft_step import DraftStep

    logits = logits_of(4, 49_152, torch.bfloat16, 0).cuda()
    state = deciding(4)
    options = on_device(options_of(kind, logits.cpu()))
    step = DraftStep(logits, state, POLICIES["survival-rate"].cuda(), **options)
    counters = step._launch.keywords["scratch"].counters
    found = count_differences(lambda: step(logits), list(vars(state).values()), [counters])
    assert found == 0


@pytest.mark.slow
def test_a_million_launches_back_to_back() -> None:
    """Two rows of logits in turn, on states of their own and one scratch, as in a step."""
    from speckv.kernels.draft_step import DraftStep, Scratch, draft_step_out

    policy = POLICIES["survival-rate"].cuda()
    logits = [logits_of(1, 128_256, torch.bfloat16, 0).cuda()]
    logits.append(logits[0].flip(1).contiguous())
    states = [deciding(1) for _ in logits]
    config = DraftStep(logits[0], states[0], policy).config
    assert config is not None
    scratch = Scratch.allocate(1, config, "cuda")
    launches = [
        partial(draft_step_out, x, state, policy, scratch=scratch)
        for x, state in zip(logits, states, strict=True)
    ]
    mutated = [list(vars(state).values()) for state in states]
    assert count_alternating(launches, mutated, [scratch.counters]) == 0


@pytest.mark.slow
def test_a_million_argmaxes_agree() -> None:
    """Two rows of logits in turn on one scratch; each has two equal maxima, far apart."""
    from speckv.kernels.argmax import argmax_out
    from speckv.kernels.draft_step import Scratch, _select_config, _sm_count

    logits = [logits_of(4, 128_256, torch.bfloat16, 0).cuda() for _ in range(2)]
    for i, x in enumerate(logits):
        x[:, [1000 + i, 100_000 + i]] = 50.0
    config = _select_config(128_256, _sm_count(torch.device("cuda", 0)))
    scratch = Scratch.allocate(4, config, "cuda")
    tokens = [torch.full((4,), -1, dtype=torch.int32, device="cuda") for _ in logits]
    launches = [
        partial(argmax_out, x, tokens=out, scratch=scratch)
        for x, out in zip(logits, tokens, strict=True)
    ]
    assert count_alternating(launches, [[out] for out in tokens], [scratch.counters]) == 0
    assert [out.tolist() for out in tokens] == [[1000] * 4, [1001] * 4]
