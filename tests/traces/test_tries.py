"""What else a controller could go by: nothing that is not known yet, and worth what it tells."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest

from speckv.kernels.layout import GAMMA_MAX
from speckv.traces.adaptive import Adaptive
from speckv.traces.known import EVERYTHING, INFORMATION, Known, Rates
from speckv.traces.replay import Planned, replay
from speckv.traces.schema import Trace
from speckv.traces.tries import COUNT, tries
from tests.traces.synthetic import COST, made_up_trace
from tests.traces.test_replay import assert_causal

COSTS = {"fp32": COST, "int8": COST}


def greedy(seed: int, prompts: int = 12, compressions: tuple[str, ...] = ("fp32",)) -> Trace:
    return made_up_trace(
        prompts, length=60, seed=seed, compressions=compressions, temperatures=(0.0,)
    )


def folds(trace: Trace, count: int = 3) -> np.ndarray:
    return np.repeat([a.prompt_id % count for a in trace.answers], trace.lengths)


@pytest.mark.parametrize("drafted", [0, 1, 5])
def test_only_what_was_drafted_is_known(drafted: int) -> None:
    trace = greedy(0)
    rng = np.random.default_rng(0)
    rates = Rates(trace, folds(trace), 50)
    inputs = Known.of(trace, rates).inputs(EVERYTHING)
    row = 30  # in the midst of an answer, whose other rows stay
    signals, tokens = trace.rows.signals.copy(), trace.rows.draft_tokens.copy()
    signals[row, drafted:] = rng.random(signals[row, drafted:].shape)
    tokens[row, drafted:] = 49 - tokens[row, drafted:]
    match = trace.match.copy()
    match[row, drafted + 1 :] = 3 - match[row, drafted + 1 :]
    accepted = trace.rows.accepted.copy()
    accepted[row] = 15 - accepted[row]
    rows = replace(trace.rows, signals=signals, draft_tokens=tokens, accepted=accepted)
    other = Known.of(replace(trace, rows=rows, match=match), rates).inputs(EVERYTHING)
    np.testing.assert_array_equal(inputs[: drafted + 1, row], other[: drafted + 1, row])
    np.testing.assert_array_equal(inputs[:, :row], other[:, :row])
    assert (inputs[drafted + 1, row] != other[drafted + 1, row]).any()
    assert (inputs[0, row + 1] != other[0, row + 1]).any(), "the next row's past"


def test_the_past_ends_where_an_answer_begins() -> None:
    trace = greedy(1)
    known = Known.of(trace, Rates(trace, folds(trace), 50))
    first = trace.first[:-1]
    assert (known.columns["history"][:, first] == [0.5, 0, 0, 0]).all()
    rate, lane = 0.5, 1
    for row in range(trace.first[lane], trace.first[lane + 1]):
        assert known.columns["history"][0, row, 0] == pytest.approx(rate, abs=1e-6)
        rate += 0.2 * ((trace.rows.accepted[row] > 0) - rate)


def test_a_fold_is_no_information_about_itself() -> None:
    """With token ids that only one fold has, rates tell other folds' rows of them alone."""
    trace = greedy(1)
    fold = folds(trace)
    rows = replace(trace.rows, target_token=fold.astype(np.int32))
    trace = replace(trace, rows=rows)
    rates = Rates(trace, fold, 3)
    asked = np.arange(3)[:, None]
    out_of_fold = rates.of(asked, np.arange(3))[:, 0]
    for own in range(3):
        later = np.setdiff1d(np.flatnonzero(fold != own), trace.first[:-1])
        assert out_of_fold[own] == pytest.approx((trace.rows.accepted[later] > 0).mean())
    known = rates.of(asked, None)[:, 0]
    for own in range(3):
        later = np.setdiff1d(np.flatnonzero(fold == own), trace.first[:-1])
        assert known[own] == pytest.approx((trace.rows.accepted[later] > 0).mean(), abs=0.03)


def test_adaptation_follows_what_is_accepted_within_bounds() -> None:
    trace = greedy(2)
    shape = 8, len(trace.rows)
    chance, price = np.full(shape, 0.5), np.full(shape, 0.6)
    never = replay(trace, Adaptive(trace, chance, price, 0.2), COST)
    assert never.gamma.max() == 0, "nothing drafted, nothing learned"
    price = np.full(shape, 0.4)
    hopeless = replace(trace.rows, accepted=np.zeros_like(trace.rows.accepted))
    found = replay(replace(trace, rows=hopeless), Adaptive(trace, chance, price, 0.2), COST)
    steps = found.steps_of(1)
    assert steps[0] == (8, 0) and steps[-1] == (0, 0)
    fixed = replay(trace, Adaptive(trace, chance, price, 0.0), COST)
    planned = replay(trace, Planned(trace, np.full(len(trace.rows), 8)), COST)
    assert fixed.gamma.tolist() == planned.gamma.tolist()
    believed = replay(
        replace(trace, rows=hopeless), Adaptive(trace, chance * 1.7, price, 9.0), COST
    )
    assert believed.steps_of(1)[5][0] == 8, "a bias of at most 1 leaves 0.85 above 0.4"
    assert_causal(trace, lambda: Adaptive(trace, chance, price, 0.2))


def test_information_is_worth_what_it_tells() -> None:
    """Where a match decides what is accepted, it beats signals that tell nothing."""

    def decided(trace: Trace) -> Trace:
        rng = np.random.default_rng(len(trace.rows))
        match = np.zeros_like(trace.match)
        accepted = rng.integers(0, 2, len(trace.rows)).astype(np.int8)
        match[:, 0] = 4 * accepted
        signals = rng.random(trace.rows.signals.shape, dtype=np.float32)
        drafted = np.full(len(trace.rows), GAMMA_MAX, dtype=np.int8)
        rows = replace(trace.rows, signals=signals, accepted=accepted, drafted=drafted)
        return replace(trace, rows=rows, match=match)

    kinds = ("fp32", "int8")
    calls: list[int] = []
    found = tries(
        decided(greedy(3, 16, kinds)),
        decided(greedy(4, 16, kinds)),
        COSTS,
        lambda: calls.append(1),
    )
    assert len(calls) == len(found) == COUNT
    assert [each.name for each in found[: len(INFORMATION)]] == [*INFORMATION]
    by_name = {each.name: each for each in found}
    match, signals = by_name["signals, agreement with a match"], by_name["the draft's signals"]
    assert match.over_static > signals.over_static + 0.02
    assert match.gap_closed > 0.9 and match.bits < signals.bits - 0.05
    for each in found[len(INFORMATION) :]:
        assert each.gap_closed > 0.8, each.name
        assert each.validated == pytest.approx(each.over_static, abs=0.1)
