"""Sampling parameters refuse what makes no sense, naming it."""

from __future__ import annotations

import math
from typing import Any

import pytest

from speckv import SamplingParams


@pytest.mark.parametrize(
    ("values", "error", "message"),
    [
        ({"max_new_tokens": 0}, ValueError, "max_new_tokens: expected 1 to"),
        ({"max_new_tokens": 1.5}, TypeError, "max_new_tokens: expected an integer"),
        ({"max_new_tokens": True}, TypeError, "max_new_tokens"),
        ({"temperature": -0.1}, ValueError, "temperature: expected 0 to 100, got -0.1"),
        ({"temperature": math.nan}, ValueError, "temperature"),
        ({"temperature": math.inf}, ValueError, "temperature"),
        ({"temperature": "hot"}, ValueError, "temperature"),
        ({"temperature": 1e-9}, ValueError, r"0 \(greedy\) or at least 0.001"),
        ({"top_k": -1}, ValueError, "top_k: expected 0"),
        ({"top_p": 0.0}, ValueError, r"top_p: expected a value in \(0, 1\]"),
        ({"top_p": 1.01}, ValueError, "top_p"),
        ({"seed": 2**63}, ValueError, "seed"),
        ({"seed": "x"}, TypeError, "seed"),
        ({"coupling": "magic"}, ValueError, "coupling"),
        ({"stop": ("",)}, ValueError, "stop: expected non-empty strings"),
        ({"stop_token_ids": (-1,)}, ValueError, "stop_token_ids"),
    ],
)
def test_bad_values(values: dict[str, Any], error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message):
        SamplingParams(**values)


def test_a_single_stop_text_may_be_given_bare() -> None:
    assert SamplingParams(stop="END").stop == ("END",)


def test_a_missing_seed_is_drawn_once() -> None:
    drawn = SamplingParams().seeded()
    assert drawn.seed is not None and drawn.seeded() is drawn
    assert SamplingParams(seed=4).seeded().seed == 4
