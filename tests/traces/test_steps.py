"""The paper's step table from a trace."""

from __future__ import annotations

import csv
from pathlib import Path

import numpy as np
import pytest

from speckv.paper import policy
from speckv.paper.data import COMPRESSIONS, SIGNALS, read_steps
from speckv.traces.schema import Trace
from speckv.traces.steps import COLUMNS, write_steps
from tests.traces.synthetic import made_up_trace
from tests.traces.test_replay import one_answer


def read(path: Path) -> list[dict[str, str]]:
    with path.open(newline="", encoding="utf-8") as file:
        return list(csv.DictReader(file))


def test_columns_are_the_papers(tmp_path: Path) -> None:
    expected = (
        "compression,gamma,task,step,accepted,acceptance_rate,tokens_produced,"
        "mean_draft_entropy,mean_draft_confidence,max_draft_entropy,min_draft_confidence"
    )
    assert ",".join(COLUMNS) == expected
    out = tmp_path / "steps.csv"
    write_steps(out, one_answer([0, 1, 0], limit=9))
    assert out.read_text().splitlines()[0] == expected


def test_by_hand(tmp_path: Path) -> None:
    #                   place: 0  1  2  3  4  5
    trace = one_answer(accepted=[0, 2, 0, 0, 0, 0], limit=6)
    out = tmp_path / "steps.csv"
    assert write_steps(out, trace, (4,)) == 2
    first, second = read(out)
    assert (first["compression"], first["gamma"], first["task"]) == ("fp32", "4", "code")
    assert (first["step"], first["accepted"], first["tokens_produced"]) == ("0", "2", "3")
    block = trace.rows.signals[1, :4].astype(float)
    assert float(first["acceptance_rate"]) == 0.5
    assert float(first["mean_draft_entropy"]) == pytest.approx(block[:, 0].mean(), abs=6e-5)
    assert float(first["mean_draft_confidence"]) == pytest.approx(block[:, 1].mean(), abs=6e-5)
    assert float(first["max_draft_entropy"]) == pytest.approx(block[:, 0].max(), abs=6e-5)
    assert float(first["min_draft_confidence"]) == pytest.approx(block[:, 1].min(), abs=6e-5)
    # At 4 one draft token fits beside the target's own; at 5 none does: no row.
    assert (second["step"], second["acceptance_rate"], second["tokens_produced"]) == (
        "1",
        "0.0",
        "1",
    )


def test_every_greedy_token_is_accounted_for(tmp_path: Path) -> None:
    trace = made_up_trace(prompts=8, length=30)
    out = tmp_path / "steps.csv"
    count = write_steps(out, trace)
    rows = read(out)
    assert len(rows) == count
    greedy: Trace = trace.where(lambda a: a.temperature == 0 and a.compression == "int8")
    most = int((greedy.lengths - 1).sum())
    for gamma in ("2", "4", "6", "8"):
        own = [r for r in rows if (r["compression"], r["gamma"]) == ("int8", gamma)]
        produced = sum(int(r["tokens_produced"]) for r in own)
        assert most - len(greedy.answers) <= produced <= most
        assert {r["task"] for r in own} == {a.task for a in greedy.answers}
        assert np.mean([int(r["accepted"]) for r in own]) > 0.5


def test_sampled_answers_alone_are_refused(tmp_path: Path) -> None:
    sampled = made_up_trace(prompts=2, temperatures=(0.7,))
    with pytest.raises(ValueError, match="trace: expected greedy answers"):
        write_steps(tmp_path / "steps.csv", sampled)
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("compression", ["bf16", "fp32", "fp16", "int8", "nf4"])
def test_the_papers_reader_reads_it(compression: str, tmp_path: Path) -> None:
    trace = made_up_trace(length=40, compressions=(compression,), temperatures=(0.0,))
    out = tmp_path / "steps.csv"
    count = write_steps(out, trace)
    rows, steps = read(out), read_steps(out)
    assert len(steps) == count
    assert {row["compression"] for row in rows} == {compression}
    counted_as = {"bf16": "fp16", "fp32": "fp16"}.get(compression, compression)
    assert {COMPRESSIONS[i] for i in steps.compression} == {counted_as}
    for name, values in (
        ("gamma", steps.gamma),
        ("step", steps.step),
        ("accepted", steps.accepted),
        ("tokens_produced", steps.tokens),
        ("acceptance_rate", steps.acceptance),
        *zip(SIGNALS, steps.signals.T, strict=True),
    ):
        assert values.tolist() == [float(row[name]) for row in rows], name
    assert [steps.tasks[i] for i in steps.task] == [row["task"] for row in rows]
    assert (steps.tokens == steps.accepted).any(), "a run that ends with a draft token"
    mlp = policy.train(out)
    assert mlp.card["rows"] == count and mlp.card["held_out_correlation"] > 0.2
