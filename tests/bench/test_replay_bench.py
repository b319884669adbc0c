"""The benchmark of replay against live decoding, on a tabular pair."""

from __future__ import annotations

from dataclasses import replace

import pytest

from bench import replay as bench
from speckv import Engine
from speckv.traces.record import record
from speckv.traces.schema import Answer, Trace, join
from tests.test_engine import COST, EOS, Letters, model, table
from tests.traces.synthetic import INFO

DEARER = replace(COST, step_ms=tuple(2 * ms for ms in COST.step_ms))


@pytest.fixture(scope="module")
def engine() -> Engine:
    target, draft = model(table(seed=0)), model(table(seed=0) + 0.5 * table(seed=1))
    return Engine(target, Letters(), draft)


@pytest.fixture(scope="module")
def trace(engine: Engine) -> Trace:
    asked = [Answer(i, "t", "fp32", (0.0, 0.8)[i % 2], 9 + i, 30, (3 + i, 4)) for i in range(4)]
    assert engine.draft is not None
    rows = record(engine.target, engine.draft, asked, eos=[EOS])
    return join(INFO, zip(asked, rows, strict=True))


def test_live_beside_replayed(engine: Engine, trace: Trace) -> None:
    document = bench.measure(engine, trace, ["fixed:3", "speckv"], [lambda: COST, lambda: DEARER])
    assert list(document["policies"]) == ["fixed:0", "fixed:3", "speckv"]
    assert document["tokens"] == int((trace.lengths - 1).sum())
    for row in document["policies"].values():
        ratio = row["replayed_tokens_per_second"] / row["live_tokens_per_second"]
        assert row["replayed_over_live"] == pytest.approx(ratio) and ratio > 0
    assert [cost["step_ms"] for cost in document["costs"]] == [COST.step_ms, DEARER.step_ms]
    plain = document["policies"]["fixed:0"]["replayed_tokens_per_second"]
    assert 1 / DEARER.step_ms[0] < plain / 1e3 < 1 / COST.step_ms[0], "each prices its answers"


def test_a_difference_ends_it(engine: Engine, trace: Trace) -> None:
    tokens = trace.rows.target_token.copy()
    tokens[3] = (tokens[3] + 1) % 20
    changed = replace(trace, rows=replace(trace.rows, target_token=tokens))
    with pytest.raises(RuntimeError, match="fixed:0: the tokens of answer 0 are not the trace's"):
        bench.measure(engine, changed, ["fixed:3"], [lambda: COST])
    accepted = trace.rows.accepted.copy()
    accepted[1:10] = 15 - accepted[1:10]
    changed = replace(trace, rows=replace(trace.rows, accepted=accepted))
    with pytest.raises(RuntimeError, match="fixed:3: the steps of answer 0 are not the replay's"):
        bench.measure(engine, changed, ["fixed:3"], [lambda: COST])
