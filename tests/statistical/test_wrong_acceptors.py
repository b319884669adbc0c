"""The law test fails acceptors that are wrong in the three classical ways."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from speckv.kernels import layout as at
from speckv.kernels.layout import StepState
from tests.statistical.law import ACCEPT_ABOVE, REJECT_BELOW, law_p_value
from tests.statistical.runs import plain_tokens, run
from tests.statistical.test_law import GUMBEL, REJECTION
from tests.statistical.vectorised import Operations

RUNS = 20_000


class NoResidual(Operations):
    """Redraws a rejected token from p: tokens that the draft favours come too often."""

    def residual(self, p: Tensor, q: Tensor) -> Tensor:
        return p


class DropsUnlikely(Operations):
    """Ends the step *before* a token to which the draft gives little, because it was drawn.

    The token never meets the target: whether a position is drafted then depends on its draw.
    """

    def draft_step(self, logits: Tensor, state: StepState, policy: Tensor, **options: Any) -> None:
        before = state.rows[:, at.DRAFTED].clone()
        super().draft_step(logits, state, policy, **options)
        last = (state.rows[:, at.DRAFTED].long() - 1).clamp(min=0)
        probability = state.signals[torch.arange(len(last)), last, at.TOKEN_PROBABILITY]
        dropped = (state.rows[:, at.DRAFTED] > before) & (probability < 0.3)
        state.rows[dropped, at.DRAFTED] -= 1
        state.rows[dropped, at.STOP] = 1


class ReusesNoise(Operations):
    """Keys noise by position: a redrafted one meets noise that has already steered the policy."""

    def noise_key(self, rows: Tensor, index: Tensor) -> tuple[Tensor, Tensor]:
        return rows[:, at.LENGTH] + index, torch.zeros_like(index)


def test_the_right_acceptor_passes_at_this_size() -> None:
    runs = run(REJECTION, RUNS, Operations())
    assert law_p_value(runs.tokens, REJECTION.law) > ACCEPT_ABOVE


@pytest.mark.parametrize("wrong", [NoResidual, DropsUnlikely, ReusesNoise])
def test_wrong_acceptors_fail(wrong: type[Operations]) -> None:
    runs = run(REJECTION, RUNS, wrong())
    assert runs.steps_with(0) and runs.steps_with(2, 3)
    assert law_p_value(runs.tokens, REJECTION.law) < REJECT_BELOW


def test_gumbel_coupling_survives_dropping() -> None:
    """Under the coupling any trimming is harmless: the target's tokens do not know the draft."""
    runs = run(GUMBEL, 4096, DropsUnlikely())
    assert torch.equal(runs.tokens, plain_tokens(GUMBEL, 4096))
