"""The kernels' decisions are causal, by the same law as the reference's."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial

import pytest
import torch
from torch import Tensor

from speckv.kernels import layout as at
from speckv.kernels.draft_step import Config, Scratch, draft_step_out
from speckv.kernels.layout import StepState
from speckv.kernels.split import ChoiceScratch
from speckv.kernels.verify import _select_config, verify_out
from tests.causality import (
    OF_EACH_MODE,
    THAT_LOOK,
    VOCABULARY,
    WIDTH,
    assert_causal,
    assert_decisions_follow_the_logits,
    packed,
)

pytestmark = [
    pytest.mark.interpreter,
    # -inf - -inf and exp, which the kernels discard or saturate, make numpy warn.
    pytest.mark.filterwarnings("ignore::RuntimeWarning"),
]

SAMPLED = {
    "inv_temperature": torch.tensor([1.0, 0.0, 1.4]),
    "seeds": torch.tensor([5, 6, 2**33]),
}


def kernels(
    **sampling: Tensor,
) -> tuple[Callable[[Tensor, StepState, Tensor], None], Callable[..., None]]:
    """`draft_step` and `verify` as the GPU runs them, in the interpreter."""
    scratch = Scratch.allocate(3, Config(block=64, splits=2, num_warps=4), "cpu")
    choice = ChoiceScratch.allocate(3, WIDTH, _select_config(VOCABULARY), "cpu")

    def verify(logits: Tensor, state: StepState, policy: Tensor, eos: Tensor) -> None:
        verify_out(logits, state, policy, scratch=choice, eos=eos, **sampling)

    return partial(draft_step_out, scratch=scratch, **sampling), verify


@pytest.mark.parametrize("name", OF_EACH_MODE)
def test_the_kernels_are_causal(name: str) -> None:
    assert_causal(*kernels(), packed(name))


@pytest.mark.parametrize("name", ["shipped"])
def test_the_kernels_are_causal_when_sampling(name: str) -> None:
    assert_causal(*kernels(**SAMPLED), packed(name))


@pytest.mark.parametrize("name", THAT_LOOK)
def test_decisions_follow_the_logits_of_their_own_token(name: str) -> None:
    assert_decisions_follow_the_logits(kernels()[0], packed(name))


def test_a_kernel_that_peeks_is_caught() -> None:
    draft_step, verify = kernels()

    def peeking(logits: Tensor, state: StepState, policy: Tensor) -> None:
        drafted = state.rows[:, at.DRAFTED].long().clamp(max=at.GAMMA_MAX - 1)
        sure = state.signals[torch.arange(3), drafted, at.CONFIDENCE] > 0.5
        draft_step(logits, state, policy)
        state.rows[:, at.STOP] |= sure.int()

    with pytest.raises(AssertionError, match="operation"):
        assert_causal(peeking, verify, packed("fixed:15"))
