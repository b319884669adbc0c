"""What the last tokens of a text repeat: by hand, by brute force, and by the device function."""

from __future__ import annotations

import numpy as np
import pytest
import torch
import triton
import triton.language as tl

from speckv.kernels import layout as at
from speckv.kernels import reference
from speckv.kernels.device import _latest_match
from speckv.kernels.draft_step import Scratch, _select_config, draft_step_out
from speckv.kernels.layout import StepState
from tests.kernels.cases import fixed

pytestmark = pytest.mark.interpreter


@triton.jit
def _latest_match_kernel(text_ptr, length, found_ptr):
    place, count = _latest_match(text_ptr, length)
    tl.store(found_ptr, place)
    tl.store(found_ptr + 1, count)


def brute_force(text: list[int]) -> tuple[int, int]:
    best = (0, 0)
    for end in range(1, len(text)):
        count = 0
        while count < min(at.MATCH_MAX, end) and text[end - 1 - count] == text[-1 - count]:
            count += 1
        if count and count >= best[1]:
            best = end, count
    return best


def latest_match(text: list[int]) -> tuple[int, int]:
    """The reference's, which the device function's must equal."""
    array = np.array(text, dtype=np.int32)
    expected = reference.latest_match(array)
    found = torch.full((2,), -1, dtype=torch.int32)
    beyond = torch.from_numpy(np.append(array, array[-1:]))  # what stands there is not looked at
    _latest_match_kernel[(1,)](beyond, len(text), found)
    assert tuple(found.tolist()) == expected
    return expected


def test_by_hand() -> None:
    assert latest_match([7]) == (0, 0)
    assert latest_match([7, 8]) == (0, 0)
    assert latest_match([7, 7]) == (1, 1)
    assert latest_match([1, 2, 3, 1, 2]) == (2, 2)
    assert latest_match([1, 2, 5, 2, 6, 2]) == (4, 1)  # the latest of equals
    assert latest_match([9, 2, 5, 4, 2, 6, 9, 2]) == (2, 2)  # the longest, though not the latest
    assert latest_match([5] * 9) == (8, 4)
    assert latest_match([1, 2, 3, 4, 5, 9, 0, 2, 3, 4, 5]) == (5, 4)


@pytest.mark.parametrize("words", [2, 5, 40])
@pytest.mark.parametrize("length", [1, 2, 3, 4, 5, 17, 200, 1023, 1024, 1025, 1026, 2100])
def test_by_brute_force(length: int, words: int) -> None:
    rng = np.random.default_rng(length * words)
    for _ in range(3):
        text = rng.integers(0, words, length).tolist()
        assert latest_match(text) == brute_force(text)


def test_the_only_match_is_far_back() -> None:
    text = [*range(3000), 1022, 1023, 1024, 1025]
    assert latest_match(text) == (1026, 4)


@pytest.mark.parametrize("mapped", [False, True])
def test_a_draft_follows_its_match(mapped: bool) -> None:
    """MATCH_LENGTH stands while draft tokens are those that came, and the text goes on."""
    prompt = [1, 2, 3, 4, 5, 6, 1, 2]
    id_map = torch.arange(10, dtype=torch.int32).roll(3) if mapped else None
    for drafts, wanted in (([3, 4, 5], [2, 2, 2]), ([3, 9, 5], [2, 0, 0]), ([0], [0])):
        state = StepState.allocate(1, 32)
        state.reset(0, prompt, limit=30, request=0)
        state.rows[0, at.STOP] = 0
        state.rows[0, at.MATCH], state.rows[0, at.MATCH_LENGTH] = 2, 2
        other = StepState(*(each.clone() for each in vars(state).values()))
        for token, length in zip(drafts, wanted, strict=True):
            x = torch.zeros(1, 10)
            x[0, token if id_map is None else int((id_map == token).nonzero())] = 9.0
            reference.draft_step(x, state, fixed(), id_map=id_map)
            run_kernel(x, other, id_map)
            for each in (state, other):
                assert int(each.rows[0, at.MATCH_LENGTH]) == length


def test_a_match_ends_with_the_text() -> None:
    state = StepState.allocate(1, 32)
    state.reset(0, [4, 4, 4], limit=30, request=0)
    state.rows[0, at.STOP] = 0
    state.rows[0, at.MATCH], state.rows[0, at.MATCH_LENGTH] = 2, 2
    other = StepState(*(each.clone() for each in vars(state).values()))
    x = torch.eye(10)[4:5]
    for length in (2, 0):
        reference.draft_step(x, state, fixed())
        run_kernel(x, other, None)
        assert int(state.rows[0, at.MATCH_LENGTH]) == int(other.rows[0, at.MATCH_LENGTH]) == length


def run_kernel(x: torch.Tensor, state: StepState, id_map: torch.Tensor | None) -> None:
    scratch = Scratch.allocate(1, _select_config(10, 4), "cpu")
    draft_step_out(x, state, fixed(), scratch=scratch, id_map=id_map)
