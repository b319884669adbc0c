"""Processes that hang, crash or lose their device cost their own section, and are rows."""

from __future__ import annotations

import json
import os
import signal
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from bench import lab, running, suites
from bench.environment import ROOT
from bench.lab import DeviceLost, Row, isolated
from bench.running import Options, Section
from speckv.errors import ModelError

DRY = Options(quick=False, dry=True, trace=None)


def rows_of(out: Path, part: str) -> list[Row]:
    found: list[Row] = json.loads((out / f"{part}.json").read_text())["rows"]
    return found


def good(lab: Any) -> Iterator[Row]:
    yield {"name": "good"}


def raising(lab: Any) -> Iterator[Row]:
    yield {"name": "before"}
    raise RuntimeError("no luck")


def without(lab: Any) -> Iterator[Row]:
    raise ModelError("bitsandbytes is missing")
    yield {}


def importing(lab: Any) -> Iterator[Row]:
    import no_such_package  # noqa: F401

    yield {}


def test_an_error_costs_its_section(tmp_path: Path) -> None:
    jobs = [("p", Section(f.__name__, f)) for f in (raising, without, importing, good)]
    running.work(DRY.lab, tmp_path, jobs, time.monotonic() + 60)
    rows = rows_of(tmp_path, "p")
    assert [row["name"] for row in rows] == ["before", "raising", "without", "importing", "good"]
    assert rows[1]["problem"] == "RuntimeError: no luck" and rows[1]["exit_code"] == 1
    assert rows[2]["skipped"] == "bitsandbytes is missing" and "exit_code" not in rows[2]
    assert rows[3]["skipped"] == "No module named 'no_such_package'"


def test_a_section_that_is_late_is_cut_and_the_next_has_its_share(tmp_path: Path) -> None:
    def slow(lab: Any) -> Iterator[Row]:
        for i in range(1000):
            time.sleep(0.02)
            yield {"name": f"row {i}"}

    jobs = [("p", Section("slow", slow)), ("p", Section("good", good))]
    start = time.monotonic()
    running.work(DRY.lab, tmp_path, jobs, start + 1.0)
    rows = rows_of(tmp_path, "p")
    assert rows[-1]["name"] == "good" and rows[-2]["name"] == "slow" and "cut" in rows[-2]
    assert 5 < len(rows) < 40 and time.monotonic() - start < 5.0


def test_a_lost_device_ends_the_process(monkeypatch: pytest.MonkeyPatch) -> None:
    def broken() -> Iterator[Row]:
        raise RuntimeError("an illegal memory access")
        yield {}

    def refuses() -> None:
        raise RuntimeError("still an illegal memory access")

    monkeypatch.setattr(lab.torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(lab.torch.cuda, "synchronize", refuses)
    rows = isolated({"name": "x"}, broken)
    assert next(rows)["problem"] == "RuntimeError: an illegal memory access"
    with pytest.raises(DeviceLost):
        next(rows)


CHILD = """
import json, os, sys, time
from pathlib import Path
from bench.running import PartFile, Options
asked = json.loads(sys.argv[1])
for index, (part, section) in enumerate(asked["jobs"]):
    Path(asked["status"]).write_text(f"{index} {time.monotonic() + 1.0}")
    if section == "hang":
        time.sleep(600)
    if section == "crash":
        os.kill(os.getpid(), 11)
    file = PartFile(Path(asked["out"]), part, {"device": "cpu"})
    if section == "lose":
        file.add({"name": "lose", "exit_code": 1}, Options(False, True, None))
        os._exit(3)
    file.add({"name": section, "process": os.getpid()}, Options(False, True, None))
Path(asked["status"]).write_text(f"{len(asked['jobs'])} {time.monotonic()}")
"""


@pytest.fixture
def processes(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """In place of what works through sections: what they are called is what they do."""
    script = tmp_path / "child.py"
    script.write_text(CHILD)
    whole = running.subprocess.Popen

    def popen(command: list[str], **options: Any) -> Any:
        assert command[:3] == [sys.executable, "-m", "bench.running"]
        return whole([sys.executable, str(script), command[3]], **options)

    monkeypatch.setattr(running.subprocess, "Popen", popen)
    monkeypatch.setattr(running, "GRACE_SECONDS", 1.0)


def test_sections_after_a_crash_a_hang_and_a_lost_device(tmp_path: Path, processes: None) -> None:
    names = ("first", "crash", "second", "hang", "lose", "third")
    parts = {"p": tuple(Section(name, good) for name in names)}
    (tmp_path / "p.json").write_text("of another time")
    running.run(parts, ["p"], tmp_path, Options(False, False, None), 60.0)
    rows = rows_of(tmp_path, "p")
    assert [row["name"] for row in rows] == list(names)
    assert rows[1]["problem"] == "the process was ended by SIGSEGV" and rows[1]["exit_code"] == 1
    assert rows[3]["problem"] == "the process hung and was killed"
    assert rows[3]["exit_code"] == 124 and "problem" not in rows[4]


def test_in_the_quick_form_parts_share_processes() -> None:
    jobs = [("p", Section("a", good)), ("q", Section("b", good))]
    alone = ("q", Section("c", good, alone=True))
    assert running._together([*jobs, alone], parts_too=True) == 2
    assert running._together([*jobs, alone], parts_too=False) == 1
    assert running._together([alone, *jobs], parts_too=True) == 1


def test_parts_and_sections_alone_have_processes_of_their_own(
    tmp_path: Path, processes: None
) -> None:
    parts = {
        "p": (Section("a", good), Section("b", good), Section("c", good, alone=True)),
        "q": (Section("d", good),),
    }
    running.run(parts, list(parts), tmp_path, Options(False, False, None), 60.0)
    rows = rows_of(tmp_path, "p") + rows_of(tmp_path, "q")
    of_section = {row["name"]: row["process"] for row in rows}
    assert len({*of_section.values()}) == 3 and of_section["a"] == of_section["b"]
    running.run({"p": parts["p"][:1], "q": parts["q"]}, ["p", "q"], tmp_path, DRY, 60.0)
    (a,), (d,) = rows_of(tmp_path, "p"), rows_of(tmp_path, "q")
    assert a["process"] == d["process"], "a dry run has one"


def test_what_a_run_of_tests_says(tmp_path: Path) -> None:
    test = tmp_path / "test_it.py"
    test.write_text("def test_a(): pass\ndef test_b(): assert False\n")
    command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", str(test)]
    row = suites.run_tests(command, 120.0)
    assert row["exit_code"] == 1 and row["counts"] == {"failed": 1, "passed": 1}
    assert any("test_b" in line for line in row["tail"])
    test.write_text("import pytest\n@pytest.mark.skip\ndef test_a(): pass\n")
    row = suites.run_tests(command, 120.0)
    assert row["exit_code"] == 1 and row["problem"] == "no test has passed"


def test_a_run_of_tests_that_hangs_is_stopped_with_its_processes(tmp_path: Path) -> None:
    inner = "import os, time; print(os.getpid(), flush=True); time.sleep(600)"
    program = f"import subprocess, sys; subprocess.run([sys.executable, '-c', {inner!r}])"
    row = suites.run_tests([sys.executable, "-c", program], 3.0)
    assert row["exit_code"] == 124 and row["problem"] == "stopped after 3 s"
    (process,) = map(int, row["tail"])
    for _ in range(100):
        try:
            os.kill(process, 0)
        except ProcessLookupError:
            return
        state = Path(f"/proc/{process}/stat")
        if not state.exists() or state.read_text().split()[2] == "Z":
            return
        time.sleep(0.05)
    os.kill(process, signal.SIGKILL)
    pytest.fail("a process of the tests lives on")


def test_the_quick_form_selects_what_there_is() -> None:
    files = {**suites.FILES, **suites.DECISION_FILES, **suites.DECODER_FILES}
    for path in (*files, suites.PROBE):
        assert (ROOT / path).is_file(), path
    assert any(files.values())
