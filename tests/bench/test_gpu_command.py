"""The GPU command runs without a GPU, on tiny shapes, and keeps what it measured."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from torch import Tensor

from bench import gpu, kernel_rows, lab
from speckv.kernels import layout as at
from speckv.kernels.layout import StepState


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
    ],
)
def test_what_fails_the_command(row: dict[str, Any], failed: bool) -> None:
    """In bf16 CUDA does not promise the tokens of plain decoding yet."""
    assert gpu.failed(row) == failed


def test_quantiles() -> None:
    assert lab.quantiles([4.0, 1.0, 3.0, 2.0, 5.0]) == pytest.approx(
        {"p50": 3.0, "p90": 4.6, "p99": 4.96}
    )


def test_parts_merge_into_one_document(tmp_path: Path) -> None:
    with pytest.raises(SystemExit, match="no part's JSON"):
        gpu.merge(tmp_path, tmp_path / "all.json")
    gpu.run_part("e2e", gpu.Lab(quick=True, dry=True), tmp_path)
    gpu.merge(tmp_path, tmp_path / "all.json")
    assert list(json.loads((tmp_path / "all.json").read_text())) == ["e2e"]
