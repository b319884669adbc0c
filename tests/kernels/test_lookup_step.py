"""`lookup_step` drafts as `draft_step` does from logits that say the same."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import Tensor

from speckv.kernels import layout as at
from speckv.kernels import reference
from speckv.kernels.layout import StepState
from speckv.kernels.lookup import lookup_step
from tests.kernels.steps import (
    Guards,
    assert_same_state,
    fixed_policy,
    guarded,
    mlp_policy,
    random_state,
)
from tests.tolerances import assert_close

VOCABULARY = 11


def threshold_policy(mode: int, threshold: float) -> Tensor:
    policy = fixed_policy(at.GAMMA_MAX)
    policy[at.MODE], policy[at.THRESHOLD] = mode, threshold
    return policy


POLICIES = {
    "fixed": fixed_policy(3),
    "entropy": threshold_policy(at.MODE_ENTROPY, 2.2),
    "confidence": threshold_policy(at.MODE_CONFIDENCE, 0.45),
    "mlp": mlp_policy(torch.Generator().manual_seed(2), at.LAYOUT_SURVIVAL, at.OBJECTIVE_RATE),
}


def offer(logits: Tensor) -> tuple[Tensor, Tensor]:
    """Tokens [B, G] and their signals of logits [B, G, V], by the reference."""
    tokens = logits.argmax(-1)
    signals = [
        [reference.token_signals(x.clone(), int(token)) for x, token in zip(*row, strict=True)]
        for row in zip(logits, tokens, strict=True)
    ]
    return tokens.int(), torch.tensor(signals).reshape(*tokens.shape, at.SIGNALS)


@pytest.mark.parametrize("policy", POLICIES.values(), ids=POLICIES)
@pytest.mark.parametrize("batch", [0, 1, 3, 17])
def test_the_same_as_draft_step_by_step(batch: int, policy: Tensor) -> None:
    generator = torch.Generator().manual_seed(batch)
    before = random_state(batch, 4, VOCABULARY, generator)
    before.rows[: batch // 2, at.STOP] = 0
    width = 9
    logits = 2.0 * torch.randn(batch, width, VOCABULARY, generator=generator)
    counts = torch.randint(0, width + 1, (batch,), generator=generator).int()
    tokens, signals = offer(logits)
    expected = copy.deepcopy(before)
    active = (before.rows[:, at.DONE] == 0) & (before.rows[:, at.STOP] == 0) & (counts > 0)
    idle = ~active
    expected.rows[idle, at.STOP] = 1  # keeps draft_step from them
    for j in range(width):
        expected.rows[active & (counts <= j), at.STOP] = 1
        reference.draft_step(logits[:, j], expected, policy)
    expected.rows[idle] = before.rows[idle]
    expected.rows[active, at.STOP] = 1
    guards = Guards()
    actual = guarded(before, guards)
    lookup_step(tokens, signals, counts, actual, policy)
    guards.check()
    assert_same_state(actual, expected)
    if batch == 17:
        drafted = (actual.rows - before.rows)[active, at.DRAFTED]
        assert len(set(drafted.tolist())) > 1


def test_by_hand() -> None:
    """Three tokens are offered, and the second is unsure."""
    state = StepState.allocate(2, 16)
    for b in range(2):
        state.reset(b, [4, 5], limit=14, request=0)
    state.rows[0, at.STOP] = 0
    signals = torch.tensor([[0.5, 0.8, 0.7, 0.8], [1.5, 0.4, 0.1, 0.4], [0.1, 0.9, 0.9, 0.9]])
    tokens = torch.tensor([[7, 8, 9]] * 2, dtype=torch.int32)
    stopped = copy.deepcopy(state)
    policy = threshold_policy(at.MODE_CONFIDENCE, 0.5)
    counts = torch.tensor([3, 3], dtype=torch.int32)
    lookup_step(tokens, signals.expand(2, 3, 4), counts, state, policy)
    assert state.sequence[0, :6].tolist() == [4, 5, 7, 8, 0, 0]
    assert state.rows[0, [at.LENGTH, at.DRAFTED, at.STOP]].tolist() == [2, 2, 1]
    assert torch.equal(state.signals[0, :3], torch.cat([signals[:2], torch.zeros(1, 4)]))
    wanted = torch.tensor([1.0, 1.5, 0.6, 0.4, 1.5, 0.4, 0.1, 0.5])
    assert_close(state.running[0], wanted, torch.float32)
    for mine, old in zip(vars(state).values(), vars(stopped).values(), strict=True):
        assert torch.equal(mine[1], old[1])


@pytest.mark.parametrize("remaining", [1, 2, 5])
def test_never_beyond_the_length_limit(remaining: int) -> None:
    """The target's own token needs a place too."""
    state = StepState.allocate(1, 16)
    state.reset(0, [1, 2], limit=2 + remaining, request=0)
    policy = fixed_policy(15)
    state.rows[0, at.STOP] = int(reference.decide(policy, state.rows[0].tolist(), [0.0] * 8))
    tokens = torch.ones(1, 9, dtype=torch.int32)
    count = torch.tensor([9], dtype=torch.int32)
    lookup_step(tokens, torch.full((1, 9, 4), 0.5), count, state, policy)
    assert int(state.rows[0, at.DRAFTED]) == remaining - 1


@pytest.mark.parametrize(
    ("name", "value", "error"),
    [
        ("tokens", torch.zeros(2, 3), TypeError),
        ("tokens", torch.zeros(3, 3, dtype=torch.int32), ValueError),
        ("signals", torch.zeros(2, 2, 4), ValueError),
        ("counts", torch.zeros(2, dtype=torch.int64), TypeError),
        ("policy", torch.zeros(3), ValueError),
    ],
)
def test_bad_tensors_are_refused(name: str, value: Tensor, error: type[Exception]) -> None:
    arguments = {
        "tokens": torch.zeros(2, 3, dtype=torch.int32),
        "signals": torch.zeros(2, 3, 4),
        "counts": torch.zeros(2, dtype=torch.int32),
        "policy": fixed_policy(3),
    }
    with pytest.raises(error, match=rf"^{name}: expected"):
        lookup_step(**{**arguments, name: value}, state=StepState.allocate(2, 8))
