"""Sides run in turn, their gate, and the interval of a median."""

from __future__ import annotations

import numpy as np
import pytest

from bench.sides import Run, bootstrap_median, compare, differing


def side(name: str, log: list[str], *, wrong_on: int | None = None) -> Run:
    """Takes a second a token and repeats the prompt, but for one prompt."""

    def run(prompt: list[int]) -> tuple[float, list[int]]:
        log.append(f"{name}{prompt[0]}")
        ids = [*prompt, 9] if prompt[0] == wrong_on else prompt
        return float(len(ids)), ids

    return run


PROMPTS = [[0, 5], [1], [2, 6, 7], [3]]


def test_the_order_rotates() -> None:
    log: list[str] = []
    rows = compare({name: side(name, log) for name in "abc"}, PROMPTS, exact=True)
    assert log == ["a0", "b0", "c0", "b1", "c1", "a1", "c2", "a2", "b2", "a3", "b3", "c3"]
    assert [row["b"]["tokens"] for row in rows] == [2, 1, 3, 1]
    assert [row["c"]["seconds"] for row in rows] == [2.0, 1.0, 3.0, 1.0]


def test_other_tokens_are_refused_or_counted() -> None:
    sides = {"a": side("a", []), "b": side("b", []), "c": side("c", [], wrong_on=2)}
    with pytest.raises(RuntimeError, match="^c: token ids differ from a's on prompt 2$"):
        compare(sides, PROMPTS, exact=True)
    rows = compare(sides, PROMPTS, exact=False)
    assert [differing(rows, name) for name in sides] == [0, 0, 1]
    assert rows[2]["c"] == {"seconds": 4.0, "tokens": 4, "identical": False}


def test_the_interval_of_a_median() -> None:
    assert bootstrap_median(np.full(7, 1.5)) == (1.5, 1.5)
    values = np.random.default_rng(1).normal(2.0, 0.1, 400)
    low, high = bootstrap_median(values)
    # The median's standard error is 1.2533 times that of the mean, 0.005.
    assert low < np.median(values) < high
    assert high - low == pytest.approx(2 * 1.96 * 1.2533 * 0.005, rel=0.3)
    assert bootstrap_median(values) == (low, high)
    assert bootstrap_median(values[:20], 100) != bootstrap_median(values[:20], 10)
