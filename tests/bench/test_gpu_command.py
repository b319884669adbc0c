"""The GPU command runs without a GPU, on tiny shapes, and keeps what it measured."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from torch import Tensor

from bench import e2e_rows, gpu, kernel_rows, lab
from speckv.kernels import layout as at
from speckv.kernels.layout import StepState
from speckv.models import hub
from speckv.traces.schema import Rows, write_trace
from tests.traces.synthetic import made_up_trace


@pytest.fixture(autouse=True)
def without_the_default_model(monkeypatch: pytest.MonkeyPatch) -> None:
    """Whether it is cached is another test's doing."""
    monkeypatch.setattr(hub, "is_cached", lambda: False)


@pytest.mark.model
def test_the_default_pair(monkeypatch: pytest.MonkeyPatch) -> None:
    dry = gpu.Lab(quick=True, dry=True)
    (row,) = e2e_rows.default_pair_rows(dry)
    assert row["problem"] == "the default model is not in the cache" and not gpu.failed(row)
    monkeypatch.undo()
    hub.fetch(progress=False)
    rows = list(e2e_rows.default_pair_rows(dry))
    assert [row["name"].split()[-1] for row in rows[:2]] == ["fixed:0", "fixed:2"]
    for row in rows:
        assert row["identical_to_plain"] and row["tokens"] > 0
        assert row["tokens_per_second"] is None and row["loop"].startswith("eager loop")


@pytest.mark.parametrize("part", ["draft", "verify", "e2e"])
def test_dry_run_writes_rows_without_times(part: str, tmp_path: Path) -> None:
    rows = gpu.run_part(part, gpu.Lab(quick=True, dry=True), tmp_path)
    written = json.loads((tmp_path / f"{part}.json").read_text())
    assert written["rows"] == rows and len(rows) >= 4
    assert written["environment"]["torch"]
    assert all(row["dry_run"] for row in rows) and not any(map(gpu.failed, rows))
    for row in rows:
        times = {row.get(name) for name in ("kernel_us", "host_us", "tokens_per_second")}
        assert times == {None}, "a CPU time is no GPU time"
        assert row.get("identical_to_plain", True) and row.get("matches_reference", True)
        assert {"name", "batch", "vocabulary", "dtype", "n"} <= set(row)


def test_the_part_of_the_loops(tmp_path: Path) -> None:
    rows = gpu.run_part("loop", gpu.Lab(quick=True, dry=True), tmp_path)
    assert not any(map(gpu.failed, rows))
    named = {row["name"]: row for row in rows}
    for name in ("WHILE", "WHILE + SWITCH(4)", "nested WHILE"):
        assert named[name]["counted"] == named[name]["iterations"] == 10
        assert named[name]["iteration_us"] is None
    assert named["unfused decision on the host"]["host_us"] is None
    assert {"chained torch.argmax", "chained bare argmax", "chained draft_step"} <= set(named)
    assert named["planned fixed:4"]["steps"] > 0
    assert named["planned fixed:4"]["above_forwards"] is None


def test_the_audit_and_the_sanitizer(tmp_path: Path) -> None:
    dry = gpu.Lab(quick=True, dry=True)
    rows = [row for part in ("audit", "sanitizer") for row in gpu.run_part(part, dry, tmp_path)]
    named = {row["name"]: row for row in rows}
    assert named["syncs of the planned loop"]["syncs"] == 0
    assert named["memory of the planned loop"]["generations"] == 20
    for tool in ("memcheck", "racecheck"):
        assert named[f"compute-sanitizer {tool}"]["problem"] == "dry run"
    assert not any(map(gpu.failed, rows))


def test_policies_on_recorded_signals(tmp_path: Path) -> None:
    """Without a trace there is no row of a policy that looks at signals."""
    dry = gpu.Lab(quick=True, dry=True)
    bare = gpu.run_part("e2e", dry, tmp_path)
    assert {row["signals_and_acceptance"] for row in bare} == {"the draft's"}
    assert {row["name"].split()[-1].partition(":")[0] for row in bare} <= {
        *("fixed", "default", "pair")
    }
    dry.trace = tmp_path / "trace.parquet"
    trace = made_up_trace(prompts=6, length=20, compressions=("bf16",), temperatures=(0.0,))
    parts = [
        (answer, rows_between(trace.rows, *trace.first[i : i + 2]))
        for i, answer in enumerate(trace.answers)
    ]
    write_trace(dry.trace, trace.info, parts)
    found = gpu.run_part("e2e", dry, tmp_path)
    assert [row["name"] for row in found[: len(bare)]] == [row["name"] for row in bare]
    rows = {row["name"]: row for row in found[len(bare) :]}
    assert {f"planned {name}" for name in (*e2e_rows.FIXED, *e2e_rows.LOOKING)} == set(rows)
    for row in rows.values():
        assert row["signals_and_acceptance"] == "recorded, injected"
        assert row["identical_to_plain"] and row["tokens_per_second"] is None
    assert rows["planned fixed:4"]["tokens_per_step"] > 1.5, "what was recorded as right is taken"
    assert rows["planned fixed:0"]["tokens_per_step"] == 1.0


def rows_between(rows: Rows, first: int, end: int) -> Rows:
    return Rows(**{name: values[first:end] for name, values in vars(rows).items()})


def test_a_part_that_takes_too_long_is_cut(tmp_path: Path) -> None:
    rows = gpu.run_part("draft", gpu.Lab(quick=True, dry=True), tmp_path, seconds=0.0)
    assert len(rows) == 1
    assert json.loads((tmp_path / "draft.json").read_text())["cut"] is True


def test_the_table_of_a_merge(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    rows: list[dict[str, Any]] = [
        {"name": "a", "batch": 1, "kernel_us": {"p50": 2.5}},
        {"name": "b", "compression": "nf4", "tokens_per_second": None},
        {"name": "c", "exit_code": 1, "syncs": 2},
    ]
    lines = list(gpu.table(rows))
    assert lines[0].split() == ["a", "1", "2.50", "us"]
    assert lines[1].split() == ["b", "nf4", "no", "time"]
    assert lines[2].split() == ["c", "2.00", "syncs,", "FAILED"]


def test_every_kernel_has_its_rows(tmp_path: Path) -> None:
    dry = gpu.Lab(quick=True, dry=True)
    rows = [row for part in ("draft", "verify") for row in gpu.run_part(part, dry, tmp_path)]
    forms = {row["name"] for row in rows}
    assert {f"draft_step {form}" for form in ("greedy", "sampled", "truncated")} <= forms
    assert {f"verify {form}" for form in ("greedy", "sampled", "truncated")} <= forms
    assert {"cutoff truncated", "cutoff lse"} <= forms
    assert {"verify_rejection bonus", "verify_rejection residual"} <= forms


def test_a_wrong_result_has_no_time(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(kernel_rows.kernels.Verify, "__call__", _commits_too_much)
    dry = gpu.Lab(quick=True, dry=True)
    rows = {row["name"]: row for row in gpu.run_part("verify", dry, tmp_path)}
    assert rows["verify greedy"]["matches_reference"] is False
    assert "kernel_us" not in rows["verify greedy"] and "n" not in rows["verify greedy"]
    assert rows["cutoff lse"]["matches_reference"] is True


def _commits_too_much(step: Any, logits: Tensor) -> None:
    step._state.rows[:, at.LENGTH] += 1


def test_every_launch_starts_from_its_own_state() -> None:
    starts = [StepState.allocate(1, 8) for _ in range(2)]
    starts[1].rows[0, at.LENGTH] = 3
    states = lab.States(starts, 5)
    assert [int(state.rows[0, at.LENGTH]) for state in states.each] == [0, 3, 0, 3, 0]
    for state in states.each:
        assert state.rows.is_contiguous() and state.sequence.stride(-1) == 1
        state.rows.add_(7)
        state.sequence.add_(7)
    states.restore()
    assert [int(state.rows.sum()) for state in states.each] == [0, 3, 0, 3, 0]
    assert not any(state.sequence.any() for state in states.each)


@pytest.mark.gpu
@pytest.mark.parametrize("part", ["draft", "verify"])
def test_rows_with_times(part: str, tmp_path: Path) -> None:
    for row in gpu.run_part(part, gpu.Lab(quick=True, dry=False), tmp_path):
        assert row.get("matches_reference", True), row["name"]
        assert row.get("config", True), row["name"]
        for times in (row["kernel_us"], row["host_us"]):
            assert 0.0 < times["p50"] <= times["p90"] <= times["p99"]


@pytest.mark.parametrize(
    ("row", "failed"),
    [
        ({"dtype": "fp32", "identical_to_plain": True}, False),
        ({"dtype": "bf16", "identical_to_plain": False}, True),
        ({"dtype": "fp32", "identical_to_plain": False}, False),
        ({"dtype": "bf16", "matches_reference": False}, True),
        ({"dtype": "bf16", "matches_reference": True}, False),
        ({"exit_code": 0}, False),
        ({"exit_code": 1}, True),
        ({"syncs": 0, "traced_syncs": None}, False),
        ({"syncs": 1}, True),
        ({"syncs": 0, "traced_syncs": ["cudaStreamSynchronize"]}, True),
        ({"grew": True}, True),
    ],
)
def test_what_fails_the_command(row: dict[str, Any], failed: bool) -> None:
    """In bf16 CUDA does not promise the tokens of plain decoding yet."""
    assert gpu.failed(row) == failed


def test_quantiles() -> None:
    assert lab.quantiles([4.0, 1.0, 3.0, 2.0, 5.0]) == pytest.approx(
        {"p50": 3.0, "p90": 4.6, "p99": 4.96, "low": 1.0, "high": 5.0}
    )
    many = lab.quantiles([float(i) for i in range(101)])
    assert (many["p50"], many["low"], many["high"]) == (50.0, 40.0, 60.0)


def test_parts_merge_into_one_document(tmp_path: Path) -> None:
    with pytest.raises(SystemExit, match="no part's JSON"):
        gpu.merge(tmp_path, tmp_path / "all.json")
    gpu.run_part("e2e", gpu.Lab(quick=True, dry=True), tmp_path)
    gpu.merge(tmp_path, tmp_path / "all.json")
    assert list(json.loads((tmp_path / "all.json").read_text())) == ["e2e"]
    history = tmp_path / "history.jsonl"
    for count in (1, 2):
        gpu.merge(tmp_path, history)
        lines = [json.loads(line) for line in history.read_text().splitlines()]
        written = json.loads((tmp_path / "e2e.json").read_text())["rows"]
        assert len(lines) == count * len(written)
        assert all(line["environment"]["torch"] and line["part"] == "e2e" for line in lines)
