"""Parts of the GPU command in processes of their own, each row on disk before the next one.

A *part* is a few *sections*, each a generator of rows. `run` starts processes that work through
sections (`work`), watches the clock, and goes on in another process after one that has hung,
crashed or lost the device: what goes wrong costs its own section at most, and is a row.
"""

from __future__ import annotations

import contextlib
import gc
import json
import os
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

from bench.environment import ROOT, environment, write_json
from bench.lab import DeviceLost, Lab, Row, isolated

PART_SECONDS = 470.0
"""What a part may take before it is cut, so that with the grace each fits in nine minutes."""
QUICK_SECONDS = 205.0
"""What all parts may take in their quick form."""
GRACE_SECONDS = 45.0
"""What a row may take beyond its section's time before its process is killed."""
QUICK_GRACE_SECONDS = 20.0
_START_SECONDS = 150.0
_LEAST_SECONDS = 10.0  # to start, however late it is
_DEVICE_LOST = 3
_POLL_SECONDS = 0.05


@dataclass(frozen=True)
class Section:
    """Rows that stand or fall together.

    Attributes
    ----------
    name : str
    rows : callable
    share : float
        Of its part's time, beside those of the part's other sections; what one leaves goes to the
        next.
    quick : float
        Seconds that it takes in the quick form, or so; 0: it is left out there.
    alone : bool
        Whether no other section shares its process.
    vital : bool
        Whether a process that it brings down is a failure.
    """

    name: str
    rows: Callable[[Lab], Iterator[Row]]
    share: float = 1.0
    quick: float = 0.0
    alone: bool = False
    vital: bool = True

    def weight(self, quick: bool) -> float:
        """Beside other sections."""
        return self.quick if quick else self.share


Parts = Mapping[str, Sequence[Section]]
Job = tuple[str, Section]


@dataclass(frozen=True)
class Options:
    """How a process is to run, as `Lab` has it."""

    quick: bool
    dry: bool
    trace: Path | None

    @property
    def lab(self) -> Lab:
        lab = Lab(self.quick, self.dry)
        lab.trace = self.trace
        return lab

    @property
    def grace(self) -> float:
        return QUICK_GRACE_SECONDS if self.quick else GRACE_SECONDS


class PartFile:
    """A part's JSON, written anew with every row; rows that are there stay."""

    def __init__(self, out: Path, part: str, facts: Mapping[str, Any]) -> None:
        self._path, self._part = out / f"{part}.json", part
        self._document: dict[str, Any] = {"environment": dict(facts), "cut": False, "rows": []}
        if self._path.exists():
            self._document = json.loads(self._path.read_text(encoding="utf-8"))

    def add(self, row: Row, options: Options | Lab) -> Row:
        """Write a row; returns it as written."""
        row = {"part": self._part, "dry_run": options.dry, "quick": options.quick, **row}
        print(json.dumps(row), flush=True)
        self._document["rows"].append(row)
        self._document["cut"] |= "cut" in row
        write_json(self._path, self._document)
        return row


def work(
    lab: Lab,
    out: Path,
    jobs: Sequence[Job],
    end: float,
    began: Callable[[int, float], None] = lambda index, end: None,
) -> list[Row]:
    """Work through sections in this process.

    Parameters
    ----------
    end : float
        When to stop, by `time.monotonic`. A section whose time is over is cut before its next row.
    began : callable
        Told of the number and the end of each section that begins.

    Raises
    ------
    DeviceLost
        The device is unusable from here on; the row that says so is written.
    """
    found: list[Row] = []
    for index, (part, section) in enumerate(jobs):
        now, weight = time.monotonic(), _weight(jobs[index:], lab.quick)
        lab.end = now + max(end - now, 0.0) * section.weight(lab.quick) / weight
        began(index, lab.end)
        file = PartFile(out, part, lab.facts)
        if lab.quick and not section.quick:
            row = {"name": section.name, "skipped": "not in the quick form"}
            found.append(file.add(row, lab))
            continue
        rows = isolated({"name": section.name}, partial(section.rows, lab))
        while True:
            if time.monotonic() > lab.end:
                late = f"after {lab.end - now:.0f} s"
                found.append(file.add({"name": section.name, "cut": late}, lab))
                break
            measured = next(rows, None)
            if measured is None:
                break
            found.append(file.add(measured, lab))
        rows.close()
        del rows
        gc.collect()
    return found


def _weight(jobs: Sequence[Job], quick: bool) -> float:
    return sum(section.weight(quick) for _, section in jobs) or 1.0


def run(parts: Parts, names: Sequence[str], out: Path, options: Options, seconds: float) -> None:
    """Run parts, in processes of their own, within so many seconds and the grace.

    Files that are there are written anew. In the quick form the parts share processes, as each
    takes a while to start; a dry run has one.
    """
    for name in names:
        (out / f"{name}.json").unlink(missing_ok=True)
    jobs: list[Job] = [(name, section) for name in names for section in parts[name]]
    end = time.monotonic() + seconds
    while jobs:
        count = len(jobs) if options.dry else _together(jobs, options.quick)
        now, own = time.monotonic(), _weight(jobs[:count], options.quick)
        until = now + max(end - now, 0.0) * own / _weight(jobs, options.quick)
        jobs = jobs[_process(jobs[:count], out, options, until, end) :]


def _together(jobs: Sequence[Job], parts_too: bool) -> int:
    """How many of the jobs, from the first on, share a process."""
    part, section = jobs[0]
    count = 1
    while not section.alone and count < len(jobs):
        other, following = jobs[count]
        if following.alone or (other != part and not parts_too):
            break
        count += 1
    return count


def _process(jobs: Sequence[Job], out: Path, options: Options, end: float, last: float) -> int:
    """Work through jobs in another process; how many of them are dealt with.

    ``end`` is that of these jobs, ``last`` that of all.
    """
    with tempfile.TemporaryDirectory() as folder:
        status = Path(folder) / "status"
        request = {
            "out": str(out.resolve()),
            "jobs": [[part, section.name] for part, section in jobs],
            "end": end,
            "status": str(status),
            "quick": options.quick,
            "dry": options.dry,
            "trace": options.trace and str(options.trace.resolve()),
        }
        sys.stdout.flush()
        process = subprocess.Popen(
            [sys.executable, "-m", "bench.running", json.dumps(request)],
            cwd=ROOT,
            env=_environment(options),
            start_new_session=True,
        )
        start = time.monotonic()
        limit = min(start + _START_SECONDS, max(last + options.grace, start + _LEAST_SECONDS))
        try:
            code: int | None = None
            while code is None:
                index, until = _read(status)
                limit = limit if until is None else until + options.grace
                if time.monotonic() > limit:
                    break
                try:
                    code = process.wait(_POLL_SECONDS)
                except subprocess.TimeoutExpired:
                    continue
        finally:
            if process.poll() != 0:
                _kill(process)
        index, until = _read(status)
    if code == 0 or index == len(jobs):
        return len(jobs)
    part, section = jobs[index]
    if code != _DEVICE_LOST:
        problem = "the process hung and was killed" if code is None else _ended(code)
        row: Row = {"name": section.name, "exit_code": 124 if code is None else 1}
        row["problem"] = problem
        if options.quick and code is None:  # it had little time
            row = {"name": section.name, "cut": problem}
        elif not section.vital:
            row = {"name": section.name, "skipped": problem}
        facts = {} if (out / f"{part}.json").exists() else environment()
        PartFile(out, part, facts).add(row, options)
    return len(jobs) if until is None else index + 1


def _environment(options: Options) -> dict[str, str]:
    paths = filter(None, (str(ROOT), os.environ.get("PYTHONPATH", "")))
    threads = {"OMP_NUM_THREADS": "1"} if options.dry else {}  # tiny tensors
    return {**os.environ, **threads, "PYTHONPATH": os.pathsep.join(paths)}


def _read(status: Path) -> tuple[int, float | None]:
    """The job under way and its end; 0 and None before the first."""
    try:
        index, end = status.read_text().split()
    except (OSError, ValueError):
        return 0, None
    return int(index), float(end)


def _kill(process: subprocess.Popen[bytes]) -> None:
    """End a process that was started here; asked first, so that it ends what it has started."""
    for number, seconds in ((signal.SIGTERM, 3.0), (signal.SIGKILL, None)):
        with contextlib.suppress(ProcessLookupError, PermissionError):
            os.killpg(process.pid, number)
        with contextlib.suppress(subprocess.TimeoutExpired):
            process.wait(seconds)


def _ended(code: int) -> str:
    if code < 0:
        return f"the process was ended by {signal.Signals(-code).name}"
    return f"the process ended with exit code {code}"


def main() -> None:
    """Work through what the one argument asks for."""
    from bench.parts import PARTS

    signal.signal(signal.SIGTERM, lambda *_: sys.exit(1))  # what it has started ends with it
    asked = json.loads(sys.argv[1])
    trace = asked["trace"] and Path(asked["trace"])
    lab = Options(asked["quick"], asked["dry"], trace).lab
    named = {(part, each.name): each for part, sections in PARTS.items() for each in sections}
    jobs = [(part, named[part, section]) for part, section in asked["jobs"]]
    status = Path(asked["status"])

    def began(index: int, end: float) -> None:
        new = status.with_suffix(".new")
        new.write_text(f"{index} {end}")
        new.replace(status)

    try:
        work(lab, Path(asked["out"]), jobs, asked["end"], began)
    except DeviceLost:
        sys.stdout.flush()
        os._exit(_DEVICE_LOST)
    began(len(jobs), time.monotonic())  # what is left is to end, and may take a while


if __name__ == "__main__":
    main()
