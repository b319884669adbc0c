"""What else a controller could go by: nothing that is not known yet, and worth what it tells."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest

from speckv.kernels.layout import GAMMA_MAX
from speckv.traces.schema import Trace
from speckv.traces.tries import MATCH, SIGNALS, Known, _rates, tries
from tests.traces.synthetic import COST, made_up_trace

EVERYTHING = ("signals", "entropy", "confidence", "survival", "target", "prior", "match")


def greedy(seed: int, prompts: int = 12) -> Trace:
    return made_up_trace(prompts, length=60, seed=seed, compressions=("fp32",), temperatures=(0.0,))


@pytest.mark.parametrize("drafted", [0, 1, 5])
def test_only_what_was_drafted_is_known(drafted: int) -> None:
    trace = greedy(0)
    rng = np.random.default_rng(0)
    signals, tokens = trace.rows.signals.copy(), trace.rows.draft_tokens.copy()
    signals[:, drafted:] = rng.random(signals[:, drafted:].shape)
    tokens[:, drafted:] = rng.integers(0, 50, tokens[:, drafted:].shape)
    match = trace.match.copy()
    match[:, drafted + 1 :] = 3
    rows = replace(trace.rows, signals=signals, draft_tokens=tokens)
    rates = _rates(trace, 50)
    one = Known.of(trace, rates, own=False).inputs(EVERYTHING)
    other = Known.of(replace(trace, rows=rows, match=match), rates, own=False).inputs(EVERYTHING)
    np.testing.assert_array_equal(one[drafted], other[drafted])
    assert (one[drafted + 1] != other[drafted + 1]).any()


def test_a_row_is_no_information_about_itself() -> None:
    """With one token id of all rows, its rate without the row tells nothing but the outcome."""
    trace = greedy(1)
    rng = np.random.default_rng(2)
    accepted = rng.integers(0, 2, len(trace.rows)).astype(np.int8)
    alone = replace(trace.rows, target_token=np.arange(len(trace.rows), dtype=np.int32))
    trace = replace(trace, rows=replace(alone, accepted=accepted))
    rates = _rates(trace, len(trace.rows) + 50)
    after = np.setdiff1d(np.arange(len(trace.rows)), trace.first[:-1])
    own = Known.of(trace, rates, own=True).inputs(("prior",))[0, after, 1]
    known = Known.of(trace, rates, own=False).inputs(("prior",))[0, after, 1]
    np.testing.assert_allclose(own, own[0])  # each id was seen in the row itself alone
    assert np.corrcoef(known, accepted[after])[0, 1] > 0.5


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

    found = tries(decided(greedy(3, 30)), decided(greedy(4, 30)), "fp32", COST)
    by_name = {each.name: each for each in found}
    match, signals = by_name["signals, agreement with a match"], by_name["the draft's signals"]
    assert match.over_static > signals.over_static + 0.02
    assert match.gap_closed > 0.9 and match.bits < signals.bits - 0.05
    assert {MATCH, SIGNALS} <= set(EVERYTHING)
