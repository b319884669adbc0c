"""The GPU command runs without a GPU, on tiny shapes, and keeps what it measured."""

from __future__ import annotations

import itertools
import json
import os
import subprocess
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from bench import e2e_rows, gpu, kernel_rows, lab, pair_rows, running, verdicts
from bench.environment import ROOT
from speckv.kernels import layout as at
from speckv.kernels.layout import StepState
from speckv.models import hub

DRY = ("--dry-run", "--quick")


@pytest.fixture(autouse=True)
def without_the_default_model(monkeypatch: pytest.MonkeyPatch) -> None:
    """Whether it is cached is another test's doing."""
    monkeypatch.setattr(hub, "is_cached", lambda: False)


def command(*arguments: str, **environment: str) -> subprocess.CompletedProcess[str]:
    """The command as a user runs it."""
    return subprocess.run(
        [sys.executable, "-m", "bench.gpu", *arguments],
        cwd=ROOT,
        env={**os.environ, **environment},
        capture_output=True,
        text=True,
        timeout=600,
    )


@pytest.fixture(scope="module")
def dry_run(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """The folder of a quick dry run of everything, by the command line."""
    out = tmp_path_factory.mktemp("dry")
    empty = tmp_path_factory.mktemp("cache")  # no default model, and none is fetched
    done = command("--out", str(out), *DRY, SPECKV_CACHE=str(empty))
    assert done.returncode == 0, done.stdout[-4000:] + done.stderr[-4000:]
    said = done.stdout.splitlines()
    assert said[-1].endswith(f" rows, 0 failed, 0 goals missed, in {out}")
    assert sum(line.startswith("goal: ") for line in said) == len(verdicts.GOALS)
    yield out


def rows_of(out: Path, *parts: str) -> list[dict[str, Any]]:
    return [row for p in parts for row in json.loads((out / f"{p}.json").read_text())["rows"]]


def test_every_part_has_rows_and_nothing_failed(dry_run: Path) -> None:
    for part in gpu.PARTS:
        document = json.loads((dry_run / f"{part}.json").read_text())
        assert document["rows"] and document["environment"]["torch"], part
        for row in document["rows"]:
            assert row["part"] == part and row["dry_run"] and row["quick"]
            assert not gpu.failed(row), row
            times = ("kernel_us", "host_us", "tokens_per_second", "iteration_us", "decode_seconds")
            assert {row.get(name) for name in times} == {None}, "a CPU time is no GPU time"
            assert row.get("identical_to_plain", True) and row.get("matches_reference", True)
            assert {"exit_code", "problem"} - set(row) or row["problem"] == "dry run"


def test_rows_of_kernels(dry_run: Path) -> None:
    rows = rows_of(dry_run, "draft", "verify")
    for row in rows:
        assert {"name", "batch", "vocabulary", "dtype", "n"} <= set(row)
    forms = {row["name"] for row in rows}
    assert {f"draft_step {form}" for form in ("greedy", "sampled", "truncated")} <= forms
    assert {f"verify {form}" for form in ("greedy", "sampled", "truncated")} <= forms
    assert {"cutoff truncated", "cutoff lse"} <= forms
    assert {"verify_rejection bonus", "verify_rejection residual"} <= forms


def test_rows_of_the_loops(dry_run: Path) -> None:
    named = {row["name"]: row for row in rows_of(dry_run, "loop")}
    for name in ("WHILE", "WHILE + SWITCH(4)", "nested WHILE, the inner one once"):
        assert named[name]["counted"] == named[name]["iterations"] == 12
    assert named["WHILE + SWITCH(4)"]["visits"] == [3, 3, 3, 3]
    assert named["1,000 unrolled, conditions set"]["counted"] == 1000
    assert named["unfused decision on the host"]["host_us"] is None
    assert {"chained torch.argmax", "chained bare argmax", "chained draft_step"} <= set(named)
    assert {"draft step with a bare argmax", "draft step with draft_step"} <= set(named)
    assert named["planned fixed:4"]["steps"] > 0
    assert named["planned fixed:4"]["above_forwards"] is None
    assert named["host of the planned loop"]["tokens"] == 16


def test_rows_of_the_audit(dry_run: Path) -> None:
    rows = [r for r in rows_of(dry_run, "audit") if r["name"] == "syncs of the planned loop"]
    cases = {(row["batch"], row["way"], row["policy"]) for row in rows}
    ways = (("greedy", "sampled"), ("fixed:3", "speckv"))
    assert cases == {(batch, *case) for batch in (1, 4) for case in itertools.product(*ways)}
    assert all(row["syncs"] == 0 and row["steps"] > 0 for row in rows)
    named = {row["name"]: row for row in rows_of(dry_run, "audit")}
    assert named["memory of the planned loop"]["generations"] == 20
    assert named["trace"]["skipped"] == "not in the quick form"
    trace = next(section for section in gpu.PARTS["audit"] if section.name == "trace")
    traced = {row["name"]: row for row in trace.rows(gpu.Lab(quick=False, dry=True))}
    assert traced["trace of the planned loop"]["traced_syncs"] is None


def test_rows_of_pairs(dry_run: Path) -> None:
    rows = rows_of(dry_run, "e2e")
    assert rows[0]["skipped"] == "the default model is not in the cache"
    injected = [r for r in rows if r.get("signals_and_acceptance") == "recorded, injected"]
    planned = {r["name"]: r for r in injected if r["name"].startswith("planned")}
    assert set(planned) == {f"planned {name}" for name in (*e2e_rows.FIXED, *e2e_rows.LOOKING)}
    assert planned["planned fixed:0"]["tokens_per_step"] == 1.0
    assert planned["planned fixed:4"]["tokens_per_step"] > 1.2, "what was right is taken"
    assert planned["planned speckv"]["trained"], "the policy of the pair that was recorded"
    assert {f"eager {name}" for name in e2e_rows.SOME} <= {row["name"] for row in injected}
    names = {row["name"] for row in rows}
    assert {f"transformers assisted generation {n}" for n in ("default", "fixed:4")} <= names
    assert {f"beside assisted generation: planned fixed:{n}" for n in (0, 4)} <= names


def test_merging_by_the_command_line(dry_run: Path, tmp_path: Path) -> None:
    merged = command("--out", str(dry_run), "--merge", str(tmp_path / "all.json"))
    assert merged.returncode == 0, merged.stderr
    assert list(json.loads((tmp_path / "all.json").read_text())) == [*gpu.PARTS, "verdicts"]
    assert "chained draft_step" in merged.stdout and "goal: a decision" in merged.stdout
    absent = command("--out", str(tmp_path / "none"), "--merge", str(tmp_path / "all.json"))
    assert absent.returncode == 1 and "no part's JSON" in absent.stderr


def test_what_may_be_asked_for(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as ended:
        gpu.main(["--out", str(tmp_path), "--part", "nothing"])
    assert ended.value.code == 2
    said = " ".join(capsys.readouterr().err.split())
    assert "{kernels,loop,e2e,audit,sanitizer,probe,draft,verify,linear,forward,e2e-8b," in said
    if not torch.cuda.is_available():
        with pytest.raises(SystemExit, match="no CUDA device"):
            gpu.main(["--out", str(tmp_path)])


def test_groups_and_exit_codes(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A group's parts share its time, single parts have one each; wrong rows are exit code 1."""
    asked: list[tuple[tuple[str, ...], float]] = []

    def run(parts: Any, names: Sequence[str], out: Path, options: Any, seconds: float) -> None:
        asked.append((tuple(names), seconds))
        for name in names:
            running.PartFile(out, name, {"device": "cpu"}).add({"name": name, **extra}, options)

    monkeypatch.setattr(running, "run", run)
    extra: dict[str, Any] = {"exit_code": 0}
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    full, quick = running.PART_SECONDS, running.QUICK_SECONDS
    for arguments, expected in (
        (["--part", "kernels"], [(("draft", "verify", "linear"), full)]),
        (["--part", "loop"], [(("loop",), full)]),
        ([], [((name,), full) for name in gpu.PARTS]),
        (["--quick"], [(tuple(gpu.PARTS), quick)]),
    ):
        asked.clear()
        with pytest.raises(SystemExit) as ended:
            gpu.main(["--out", str(tmp_path), *arguments])
        assert ended.value.code == 0 and asked == expected
    extra = {"exit_code": 1}
    with pytest.raises(SystemExit) as ended:
        gpu.main(["--out", str(tmp_path), "--part", "e2e"])
    assert ended.value.code == 1
    assert full + running.GRACE_SECONDS < 9 * 60 and quick + running.QUICK_GRACE_SECONDS < 4 * 60


@pytest.mark.model
def test_the_default_pair(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.undo()
    hub.fetch(progress=False)
    rows = list(pair_rows.default_pair_rows(gpu.Lab(quick=True, dry=True)))
    assert [row["name"].split()[-1] for row in rows] == list(e2e_rows.SOME)
    for row in rows:
        assert row["identical_to_plain"] and row["tokens"] > 0
        assert row["tokens_per_second"] is None and row["loop"].startswith("eager loop")


def test_without_a_trace_no_policy_looks_at_signals(tmp_path: Path) -> None:
    rows = list(e2e_rows.e2e_rows(gpu.Lab(quick=True, dry=True)))
    assert {row["signals_and_acceptance"] for row in rows} == {"the draft's"}
    assert {row["name"].split()[-1] for row in rows} == set(e2e_rows.FIXED)


def test_a_part_that_takes_too_long_is_cut(tmp_path: Path) -> None:
    rows = gpu.run_part("draft", gpu.Lab(quick=True, dry=True), tmp_path, seconds=0.0)
    assert [row["cut"] for row in rows] == ["after 0 s"]
    assert json.loads((tmp_path / "draft.json").read_text())["cut"] is True
    assert list(gpu.table(rows))[0].split()[:3] == ["draft", "cut:", "after"]


def test_the_table(tmp_path: Path) -> None:
    rows: list[dict[str, Any]] = [
        {"name": "a", "batch": 1, "kernel_us": {"p50": 2.5}},
        {"name": "b", "compression": "nf4", "tokens_per_second": None},
        {"name": "c", "exit_code": 1, "syncs": 2},
        {"name": "d", "skipped": "nothing there"},
    ]
    lines = list(gpu.table(rows))
    assert lines[0].split() == ["a", "1", "2.50", "us"]
    assert lines[1].split() == ["b", "nf4", "no", "time"]
    assert lines[2].split() == ["c", "2.00", "syncs,", "exit", "code", "1,", "FAILED"]
    assert lines[3].split() == ["d", "skipped:", "nothing", "there"]


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


def test_a_history_is_appended_to(dry_run: Path, tmp_path: Path) -> None:
    with pytest.raises(SystemExit, match="no part's JSON"):
        gpu.merge(tmp_path, tmp_path / "all.json")
    history = tmp_path / "history.jsonl"
    count = len(rows_of(dry_run, *gpu.PARTS)) + len(verdicts.GOALS)
    for times in (1, 2):
        gpu.merge(dry_run, history)
        lines = [json.loads(line) for line in history.read_text().splitlines()]
        assert len(lines) == times * count
        assert all(line["environment"]["torch"] for line in lines)
