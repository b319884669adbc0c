"""The trace that comes with the project is that of its policy and of its report."""

from __future__ import annotations

import json
from dataclasses import asdict
from typing import Any

import pytest

from speckv.decoding.trained import SHIPPED, pair_key
from speckv.models.slice_draft import shipped_draft
from speckv.policies import Mlp
from speckv.traces.compare import split_prompts
from speckv.traces.schema import Trace, read_trace
from tests.killed import ROOT

TRACES = ROOT / "bench" / "traces"


@pytest.fixture(scope="module")
def trace() -> Trace:
    return read_trace(TRACES / "smollm2-135m-instruct.parquet")


@pytest.fixture(scope="module")
def report() -> dict[str, Any]:
    document: dict[str, Any] = json.loads((TRACES / "report" / "report.json").read_text("utf-8"))
    return document


def test_the_shipped_policy_is_of_the_trace(trace: Trace) -> None:
    info = trace.info
    folder = shipped_draft(info.target["fingerprint"])
    assert folder is not None
    card = Mlp.load(folder / SHIPPED).card
    assert card["pair"] == pair_key(info.target, info.draft)
    assert card["prompts_sha256"] == info.recipe["prompts_sha256"]
    learned = set(card["prompts"]["fitted"]) | set(card["prompts"]["validated"])
    split = card["split"]
    assert learned == split_prompts(trace, split["train_share"], split["seed"])


def test_the_report_is_of_the_trace(trace: Trace, report: dict[str, Any]) -> None:
    info, facts = trace.info, report["trace"]
    for name in ("target", "draft", "device", "versions", "recipe"):
        assert facts[name] == getattr(info, name), name
    assert (facts["answers"], facts["positions"]) == (len(trace.answers), len(trace.rows))
    costs = {name: asdict(table) for name, table in info.costs.items()}
    assert report["costs"] == json.loads(json.dumps(costs))
    split = report["split"]
    train = split_prompts(trace, split["train_share"], split["seed"])
    assert split["train_prompts"] == sorted(train)


def test_it_covers_what_it_should(trace: Trace) -> None:
    cells = {(a.compression, a.temperature) for a in trace.answers}
    assert {t for _, t in cells} == {0.0, 0.7, 1.0} and {"int8", "nf4"} < {c for c, _ in cells}
    assert len({a.task for a in trace.answers}) == 4
    assert len(trace.rows) >= 5112 and (trace.rows.accepted > 0).mean() > 0.2
