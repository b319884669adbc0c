"""Matches of a whole answer against the reference at each of its places."""

from __future__ import annotations

import numpy as np
import pytest

from speckv.kernels import layout as at
from speckv.kernels import reference
from speckv.kernels.layout import GAMMA_MAX, StepState
from speckv.traces.matches import match_lengths


@pytest.mark.parametrize(("words", "prompt"), [(2, 1), (3, 9), (12, 30), (500, 3)])
def test_equals_the_reference_at_every_place(words: int, prompt: int) -> None:
    rng = np.random.default_rng(words)
    text = rng.integers(0, words, prompt + 60).astype(np.int32)
    answer = text[prompt:]
    drafts = rng.integers(0, words, (60, GAMMA_MAX)).astype(np.int32)
    for place in range(0, 60, 3):  # what is drafted is mostly right
        drafts[place, : len(answer[place:])] = answer[place : place + GAMMA_MAX]
    found = match_lengths(text[:prompt].tolist(), answer, drafts)
    seen = set()
    for place in range(60):
        state = StepState.allocate(1, 120)
        state.reset(0, text[: prompt + place].tolist(), limit=110, request=0)
        rows = state.rows[0].tolist()
        rows[at.MATCH], rows[at.MATCH_LENGTH] = reference.latest_match(text[: prompt + place])
        wanted = [rows[at.MATCH_LENGTH]]
        for token in drafts[place].tolist():
            rows[at.MATCH_LENGTH] = reference.follow_match(state, 0, rows, token)
            rows[at.DRAFTED] += 1
            wanted.append(rows[at.MATCH_LENGTH])
        assert found[place].tolist() == wanted, place
        seen.update(wanted)
    assert 0 in seen and len(seen) > 1
