"""Run every check, the slow tests included, and write what came of it as JSON.

``make test-full`` runs this. The file says when and on what machine, with which versions and of
which commit, how each suite ended, and what the tests of lossless decoding covered.
"""

from __future__ import annotations

import argparse
import importlib.metadata
import json
import os
import platform
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from dataclasses import dataclass
from datetime import datetime, timezone
from pathlib import Path
from typing import Any
from xml.etree import ElementTree

ROOT = Path(__file__).resolve().parent.parent
_THREADS = 1  # of a worker, as in `make test`
PACKAGES = ("torch", "triton", "transformers", "bitsandbytes", "numpy", "pytest")


@dataclass(frozen=True)
class Suite:
    """One command; ``pytest`` ones are counted from their JUnit report.

    ``lowest`` ones run with the oldest Triton, where the Makefile has put it.
    """

    name: str
    arguments: tuple[str, ...]
    pytest: bool = False
    interpreted: bool = False
    lowest: bool = False


SUITES = (
    Suite("ruff", ("ruff", "check", ".")),
    Suite("format", ("ruff", "format", "--check", ".")),
    Suite("mypy", ("mypy",)),
    Suite("interpreter", ("pytest", "-m", "interpreter"), pytest=True, interpreted=True),
    Suite("tests", ("pytest", "-m", "not interpreter"), pytest=True),
    Suite("triton-lowest", ("pytest", "tests/aot"), pytest=True, lowest=True),
)


def run_suite(suite: Suite, workers: int) -> dict[str, Any]:
    """Run one suite in the repository root; its output goes to the terminal.

    Parameters
    ----------
    workers : int
        Processes of a pytest suite, of one thread each.

    Returns
    -------
    dict
        ``exit_code``, ``seconds`` and, for pytest, ``counts`` and ``lossless``.
    """
    environment = {k: v for k, v in os.environ.items() if k != "TRITON_INTERPRET"}
    if suite.interpreted:
        environment["TRITON_INTERPRET"] = "1"
    if suite.lowest:
        environment["PYTHONPATH"] = str(Path(sys.prefix) / "triton-lowest")
    with tempfile.TemporaryDirectory() as folder:
        junit = Path(folder) / "junit.xml"
        arguments = [*suite.arguments]
        if suite.pytest:
            environment["OMP_NUM_THREADS"] = str(_THREADS)
            arguments += ["-n", str(workers), "--dist", "loadgroup", f"--junitxml={junit}"]
        print(f"== {suite.name}: {' '.join(suite.arguments)}", flush=True)
        started = time.monotonic()
        done = subprocess.run([sys.executable, "-m", *arguments], cwd=ROOT, env=environment)
        outcome: dict[str, Any] = {
            "exit_code": done.returncode,
            "seconds": round(time.monotonic() - started, 1),
        }
        if suite.pytest and junit.exists():
            outcome |= read_junit(junit)
    return outcome


def read_junit(path: Path) -> dict[str, Any]:
    """Counts by outcome, and the cells that the ``lossless`` fixture recorded.

    Returns
    -------
    dict
        ``counts``: passed, failed, errors, skipped, xfailed. ``lossless``: a list of
        ``{"axes", "sequences", "tokens", "passed"}``.
    """
    counts = dict.fromkeys(("passed", "failed", "errors", "skipped", "xfailed"), 0)
    cells: list[dict[str, Any]] = []
    for case in ElementTree.parse(path).iter("testcase"):
        skipped = case.find("skipped")
        if case.find("failure") is not None:
            outcome = "failed"
        elif case.find("error") is not None:
            outcome = "errors"
        elif skipped is not None:
            outcome = "xfailed" if skipped.get("type") == "pytest.xfail" else "skipped"
        else:
            outcome = "passed"
        counts[outcome] += 1
        for recorded in case.iter("property"):
            if recorded.get("name") == "lossless":
                cell = json.loads(recorded.get("value", ""))
                cells.append({**cell, "passed": outcome == "passed"})
    return {"counts": counts, "lossless": cells}


def summarise_lossless(cells: Sequence[dict[str, Any]]) -> dict[str, Any]:
    """Totals over the grid, and per value of each axis: cells, sequences, tokens, failed cells."""
    axes: dict[str, dict[str, dict[str, int]]] = {}
    for cell in cells:
        for axis, value in cell["axes"].items():
            row = axes.setdefault(axis, {}).setdefault(value, _no_cells())
            _add(row, cell)
    total = _no_cells()
    for cell in cells:
        _add(total, cell)
    return {**total, "by": {axis: dict(sorted(rows.items())) for axis, rows in axes.items()}}


def machine() -> dict[str, Any]:
    """Processor, cores, memory and system; no name that tells whose it is."""
    cpu, memory_kib = platform.processor() or platform.machine(), 0
    if Path("/proc/cpuinfo").exists():
        models = [
            line.partition(":")[2].strip()
            for line in Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines()
            if line.startswith("model name")
        ]
        cpu = models[0] if models else cpu
        memory_kib = int(Path("/proc/meminfo").read_text(encoding="utf-8").split()[1])
    return {
        "cpu": cpu,
        "cores": os.cpu_count(),
        "memory_gib": round(memory_kib / 2**20, 1),
        "os": f"{platform.system()} {platform.machine()}",
    }


def versions() -> dict[str, str | None]:
    """Of Python and of every package whose numerics or behaviour the tests depend on."""
    found: dict[str, str | None] = {"python": platform.python_version()}
    for name in PACKAGES:
        try:
            found[name] = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            found[name] = None
    return found


def commit() -> dict[str, Any]:
    """The commit under test, and whether the working tree differs from it."""
    return {
        "id": _git("rev-parse", "HEAD"),
        "dirty": bool(_git("status", "--porcelain", "--untracked-files=no")),
    }


def write_json(path: Path, document: dict[str, Any]) -> None:
    """Write under a temporary name, then rename."""
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f".{path.name}.{os.getpid()}")
    temporary.write_text(json.dumps(document, indent=2) + "\n", encoding="utf-8")
    temporary.replace(path)


def main(arguments: Sequence[str] | None = None) -> int:
    """Run all suites, write the report, and return 0 if every one of them passed."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--out", type=Path, required=True, help="where to write the JSON")
    parser.add_argument("--workers", type=int, default=2, help="processes of a pytest run")
    options = parser.parse_args(arguments)

    started = datetime.now(timezone.utc)
    tested = commit()
    suites = {suite.name: run_suite(suite, options.workers) for suite in SUITES}
    cells = [cell for outcome in suites.values() for cell in outcome.pop("lossless", [])]
    passed = all(outcome["exit_code"] == 0 for outcome in suites.values())
    document = {
        "date": started.isoformat(timespec="seconds"),
        "passed": passed,
        "seconds": round(sum(outcome["seconds"] for outcome in suites.values()), 1),
        "commit": tested,
        "machine": machine(),
        "workers": {"processes": options.workers, "threads_each": _THREADS},
        "versions": versions(),
        "suites": suites,
        "lossless": summarise_lossless(cells),
    }
    write_json(options.out, document)
    print(f"{'passed' if passed else 'FAILED'}; written to {options.out}")
    return 0 if passed else 1


def _no_cells() -> dict[str, int]:
    return dict.fromkeys(("cells", "sequences", "tokens", "failed_cells"), 0)


def _add(row: dict[str, int], cell: dict[str, Any]) -> None:
    row["cells"] += 1
    row["sequences"] += cell["sequences"]
    row["tokens"] += cell["tokens"]
    row["failed_cells"] += not cell["passed"]


def _git(*arguments: str) -> str | None:
    try:
        done = subprocess.run(
            ["git", *arguments], cwd=ROOT, capture_output=True, text=True, check=True
        )
    except (OSError, subprocess.CalledProcessError):
        return None
    return done.stdout.strip()


if __name__ == "__main__":
    sys.exit(main())
