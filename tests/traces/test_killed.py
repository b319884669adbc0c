"""kill -9 during each command that writes a file: the old file is left, or the whole new one."""

from __future__ import annotations

from pathlib import Path

import pytest

from speckv.traces.schema import write_trace
from tests.killed import OLD, assert_whole_png, killed
from tests.traces.synthetic import made_up_trace
from tests.traces.test_profile import folder
from tests.traces.test_schema import parts_of

__all__ = ["folder"]


@pytest.fixture(scope="module")
def trace(tmp_path_factory: pytest.TempPathFactory) -> Path:
    made = made_up_trace(prompts=16, length=24, temperatures=(0.0,))
    path = tmp_path_factory.mktemp("trace") / "trace.parquet"
    write_trace(path, made.info, parts_of(made))
    return path


@pytest.mark.parametrize(
    "command",
    [
        ("train", "{trace}", "--rounds", "1", "--seeds", "1", "--out", "{out}"),
        ("replay", "{trace}", "--policies", "static", "--json", "{out}"),
        ("replay", "{trace}", "--policies", "static", "--steps", "{out}"),
    ],
    ids=["train", "replay-json", "replay-steps"],
)
def test_the_old_file_is_left(command: tuple[str, ...], trace: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    out.write_text(OLD)
    killed(tmp_path, 0, *(word.format(trace=trace, out=out) for word in command))
    assert out.read_text() == OLD


def test_calibrate_leaves_the_old_table_or_none(folder: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    out.write_text(OLD)
    command = ("calibrate", "--target", str(folder), "--draft", "first:2", "--json", str(out))
    killed(tmp_path, 0, *command)
    assert out.read_text() == OLD
    kept = [path for path in (tmp_path / "cache").rglob("*.json") if path.is_file()]
    assert kept == []


@pytest.mark.parametrize("renames", [0, 3])
def test_a_report_is_of_whole_files(renames: int, trace: Path, tmp_path: Path) -> None:
    out = tmp_path / "report"
    out.mkdir()
    names = ("report.html", "report.json")
    for name in names:
        (out / name).write_text(OLD)
    killed(tmp_path, renames, "report", str(trace), "--policies", "static", "--out", str(out))
    assert [(out / name).read_text() for name in names] == [OLD, OLD]
    plots = sorted(out.glob("*.png"))
    assert len(plots) == renames
    for plot in plots:
        assert_whole_png(plot)
