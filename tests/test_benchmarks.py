"""Comparing benchmark results: what is slower, what is chance, what cannot be compared."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from speckv import cli
from speckv.benchmarks import compare, read_results
from speckv.errors import SpeckvError


def times(p50: float, spread: float = 0.01) -> dict[str, float]:
    return {"p50": p50, "p90": p50, "p99": p50, "low": p50 - spread, "high": p50 + spread}


def write(path: Path, rows: list[dict[str, Any]], device: str = "H100") -> Path:
    document = {"draft": {"environment": {"device": device}, "rows": rows}}
    path.write_text(json.dumps(document))
    return path


def row(name: str, **results: Any) -> dict[str, Any]:
    return {"part": "draft", "name": name, "batch": 1, "dry_run": False, "n": 9, **results}


@pytest.fixture
def old(tmp_path: Path) -> Path:
    rows = [
        row("a", kernel_us=times(2.0)),
        row("b", kernel_us=times(2.0, spread=0.5)),
        row("c", tokens_per_second=times(100.0)),
        row("d", launches_per_step=7),
        row("e", kernel_us=None),
    ]
    return write(tmp_path / "old.json", rows)


def verdicts(before: Path, after: Path) -> dict[str, str]:
    changes = compare(read_results(before), read_results(after))
    return {dict(change.key)["name"]: change.verdict for change in changes}


def test_what_changed(old: Path, tmp_path: Path) -> None:
    rows = [
        row("a", kernel_us=times(2.2)),
        row("b", kernel_us=times(2.4, spread=0.5)),
        row("c", tokens_per_second=times(90.0)),
        row("d", launches_per_step=6),
        row("new", kernel_us=times(1.0)),
    ]
    new = write(tmp_path / "new.json", rows)
    assert verdicts(old, new) == {"a": "slower", "b": "same", "c": "slower", "d": "faster"}
    assert verdicts(new, old) == {"a": "faster", "b": "same", "c": "faster", "d": "slower"}
    assert set(verdicts(old, old).values()) == {"same"}


def test_small_changes_are_none(old: Path, tmp_path: Path) -> None:
    new = write(tmp_path / "new.json", [row("a", kernel_us=times(2.09))])
    assert verdicts(old, new) == {"a": "same"}
    changes = compare(read_results(old), read_results(new), threshold=0.02)
    assert [(c.verdict, round(c.ratio, 3)) for c in changes] == [("slower", 1.045)]


def test_history_takes_the_last_of_a_row(old: Path, tmp_path: Path) -> None:
    history = tmp_path / "history.jsonl"
    with history.open("w") as file:
        for p50 in (5.0, 2.0):
            line = {"environment": {"device": "H100"}, **row("a", kernel_us=times(p50))}
            file.write(json.dumps(line) + "\n")
    assert verdicts(old, history) == {"a": "same"}


def test_dry_runs_are_no_results(tmp_path: Path) -> None:
    dry = write(tmp_path / "dry.json", [{**row("a"), "dry_run": True}], device="cpu")
    with pytest.raises(SpeckvError, match="found no row"):
        read_results(dry)


def test_what_cannot_be_compared(old: Path, tmp_path: Path) -> None:
    other = write(tmp_path / "other.json", [row("a", kernel_us=times(2.0))], device="A100")
    with pytest.raises(ValueError, match="expected results of one device, got 'H100' and 'A100'"):
        compare(read_results(old), read_results(other))
    nothing = write(tmp_path / "nothing.json", [row("z", kernel_us=times(2.0))])
    with pytest.raises(ValueError, match="a result that both hold"):
        compare(read_results(old), read_results(nothing))
    with pytest.raises(ValueError, match="threshold: expected at least 0"):
        compare(read_results(old), read_results(old), threshold=-1.0)
    for text in ("", "[1]", "{}", "no json", '{"a": {"rows": []}}'):
        (tmp_path / "bad.json").write_text(text)
        with pytest.raises(SpeckvError, match="bad.json: expected results"):
            read_results(tmp_path / "bad.json")
    with pytest.raises(SpeckvError, match="missing.json"):
        read_results(tmp_path / "missing.json")


def test_the_command(old: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.run(["bench", "compare", str(old), str(old)]) == 0
    assert "4 results in both, 0 slower, 0 faster" in capsys.readouterr().out
    new = write(tmp_path / "new.json", [row("a", kernel_us=times(3.0))])
    assert cli.run(["bench", "compare", str(old), str(new)]) == 1
    out = capsys.readouterr().out
    assert "kernel_us" in out and "slower" in out and "1.500" in out
    assert cli.run(["bench", "compare", str(old), str(tmp_path / "none")]) == 1
    assert "none: No such file" in capsys.readouterr().err
