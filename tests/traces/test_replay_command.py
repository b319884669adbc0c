"""``speckv replay``: tables, the JSON file, costs from a file, and mistakes."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from speckv import cli
from speckv.traces.schema import write_trace
from speckv.traces.tuning import DEFAULT
from tests.traces.synthetic import COST, made_up_trace
from tests.traces.test_schema import parts_of


@pytest.fixture(scope="module")
def path(tmp_path_factory: pytest.TempPathFactory) -> Path:
    trace = made_up_trace(prompts=16, length=30, temperatures=(0.0,))
    file = tmp_path_factory.mktemp("trace") / "trace.parquet"
    write_trace(file, trace.info, parts_of(trace))
    return file


def strictly(path: Path) -> Any:
    """A JSON document without NaN or infinities."""

    def refuse(name: str) -> None:
        raise AssertionError(name)

    return json.loads(path.read_text(), parse_constant=refuse)


def test_tables_and_json(path: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    out = tmp_path / "new" / "replay.json"
    steps = tmp_path / "steps.csv"
    assert cli.run(["replay", str(path), "--json", str(out), "--steps", str(steps)]) == 0
    assert len(steps.read_text().splitlines()) > 100
    shown = capsys.readouterr().out
    for text in ("fp32, temperature 0", "int8, temperature 0", "judged on 8 prompts", *DEFAULT):
        assert text in shown
    document = strictly(out)
    assert document["trace"]["answers"] == 32
    assert document["costs"]["int8"]["step_ms"] == list(COST.step_ms)
    assert len(document["split"]["train_prompts"]) == 8
    for cell in document["cells"]:
        assert [row["policy"] for row in cell["rows"]] == list(DEFAULT)
        rows = {row["policy"]: row for row in cell["rows"]}
        assert rows["svip"]["settings"]["cap"] in rows["svip"]["search"]["cap"]
        assert len(rows["speckv"]["histogram"]) == 16
        assert set(rows["speckv"]["tasks"]) == {"code", "math", "chat", "summarization"}
        assert f"{rows['static']['tokens_per_second']:.1f}" in shown


def test_chosen_policies_and_costs(path: Path, tmp_path: Path) -> None:
    costs, out = tmp_path / "costs.json", tmp_path / "replay.json"
    dear = {"step_ms": [10.0 + 10 * g for g in range(16)], "step_ms_per_context_token": [0] * 16}
    costs.write_text(json.dumps({"fp32": dear, "int8": dear}))
    arguments = ["--policies", "static,fixed:2,oracle", "--costs", str(costs)]
    assert cli.run(["replay", str(path), *arguments, "--json", str(out)]) == 0
    (row, _, oracle), _ = (cell["rows"] for cell in strictly(out)["cells"])
    assert row["settings"] == {"gamma": 0} and row["tokens_per_second"] == pytest.approx(100)
    assert oracle["gap_closed"] is None, "drafting never pays, so there is no gap"


def test_mistakes_are_one_line(
    path: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    costs = tmp_path / "costs.json"
    costs.write_text("nonsense")
    for arguments, code, message in (
        ([str(path), "--policies", "magic"], 2, "got 'magic'; or one of"),
        ([str(tmp_path / "none.parquet")], 1, "no such trace file"),
        ([str(costs)], 1, "not a Parquet file"),
        ([str(path), "--train-share", "0"], 2, "train_share: expected a number between"),
    ):
        assert cli.run(["replay", *arguments]) == code
        (line,) = capsys.readouterr().err.splitlines()
        assert line.startswith("error: ") and message in line


FLAT = [0.0] * 16


def costs_of(first: object, slopes: object = FLAT) -> str:
    """A cost file, broken or not, whose first time is ``first``."""
    table = {"step_ms": [first, *[1.0] * 15], "step_ms_per_context_token": slopes}
    return json.dumps({"fp32": table})


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("nonsense", "got no JSON"),
        (costs_of(1.0)[:40], "got no JSON"),
        ("[]", "got list"),
        ("{}", "got none"),
        ('{"fp32": 3}', "fp32: expected step_ms and step_ms_per_context_token, got int"),
        (
            '{"fp32": {"draft_ms": 1, "verify_ms": [1]}}',
            "fp32: expected step_ms and step_ms_per_context_token, got draft_ms, verify_ms",
        ),
        ('{"step_ms": [1], "step_ms_per_context_token": [0]}', "bf16, int8, nf4, got 'step_ms'"),
        (costs_of(1.0, FLAT[:3]), "fp32: step_ms_per_context_token: expected 16 values, got 3"),
        (costs_of("1.0"), "fp32: step_ms: expected a list of numbers"),
        (costs_of(None), "fp32: step_ms: expected a list of numbers"),
        (costs_of(float("nan")), "fp32: step_ms: expected positive, finite values, got nan"),
        (costs_of(float("inf")), "fp32: step_ms: expected positive, finite values, got inf"),
        (costs_of(0), "fp32: step_ms: expected positive, finite values, got 0.0"),
        (
            costs_of(1.0).replace("}}", ', "catch_up_ms": -1}}'),
            "fp32: catch_up_ms: expected a finite value of at least 0, got -1.0",
        ),
        (costs_of(1.0).replace("}}", ', "parts": 3}}'), "fp32: "),
        (costs_of(1.0, [-0.1] * 16), "expected finite values of at least 0, got -0.1"),
    ],
)
def test_costs_that_cannot_be_are_one_line(
    text: str, message: str, path: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    costs = tmp_path / "costs.json"
    costs.write_text(text)
    assert cli.run(["replay", str(path), "--costs", str(costs)]) == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith(f"error: --costs: expected tables by compression in {costs}")
    assert message in line
