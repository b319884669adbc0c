"""The GPU command runs without a GPU, on tiny shapes, and keeps what it measured."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from bench import gpu


@pytest.mark.parametrize("part", ["kernels", "e2e"])
def test_dry_run_writes_rows_without_times(part: str, tmp_path: Path) -> None:
    rows = gpu.run_part(part, gpu.Lab(quick=True, dry=True), tmp_path)
    written = json.loads((tmp_path / f"{part}.json").read_text())
    assert written["rows"] == rows and len(rows) >= 4
    assert written["environment"]["torch"]
    assert all(row["dry_run"] for row in rows)
    times = [row.get("microseconds", row.get("tokens_per_second")) for row in rows]
    assert times == [None] * len(rows), "a CPU time is no GPU time"
    assert all(row.get("identical_to_plain", True) for row in rows)


def test_parts_merge_into_one_document(tmp_path: Path) -> None:
    with pytest.raises(SystemExit, match="no part's JSON"):
        gpu.merge(tmp_path, tmp_path / "all.json")
    gpu.run_part("e2e", gpu.Lab(quick=True, dry=True), tmp_path)
    gpu.merge(tmp_path, tmp_path / "all.json")
    assert list(json.loads((tmp_path / "all.json").read_text())) == ["e2e"]
