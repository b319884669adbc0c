"""Rows of the tests that need a GPU: a row a file, each with a time limit of its own.

Ordinary tests, the million launches that look for races (marked ``slow``), and the smallest tests
of every kernel under compute-sanitizer. A row holds the exit code and the last lines; 124 is a run
that was stopped at its limit, which keeps what it had said.
"""

from __future__ import annotations

import importlib.util
import os
import re
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Mapping, Sequence

from bench.environment import ROOT
from bench.lab import Lab, Row

PROBE = "tests/gpu/test_probe_gpu.py"
EVERY_KERNEL = "tests/gpu/test_every_kernel_gpu.py"
FILES: Mapping[str, str] = {
    EVERY_KERNEL: "test_a_launch",
    "tests/models/test_llama.py": "",
    "tests/gpu/test_loops_gpu.py": "count or (bf16 and (greedy-1 or waits))",
}
"""Tests of the kernels' launches and of the loops, and which of them the quick form selects."""
DECISION_FILES: Mapping[str, str] = {
    "tests/gpu/test_verify_gpu.py": "",
    "tests/gpu/test_draft_step_gpu.py": "whole_step",
}
"""Tests of the decision, likewise."""
DECODER_FILES: Mapping[str, str] = {
    "tests/gpu/test_decoder_gpu.py": "bf16 and (captured or 9-bf16)",
    "tests/gpu/test_decoder_kernels_gpu.py": "",
}
"""Tests of the decoder, likewise."""
QUICK_LAUNCHES = 20_000
_TAIL = 15
_WORKERS = 4


def probe_rows(lab: Lab) -> Iterator[Row]:
    """What the loops rest on, before any model: modules, conditional nodes, words that arrive."""
    yield _tests(lab, PROBE, "gpu", lab.seconds_left)


def test_rows(lab: Lab, files: Mapping[str, str]) -> Iterator[Row]:
    """A file after the other, each with an equal share of what is left."""
    for index, (path, selected) in enumerate(files.items()):
        if lab.quick and not selected:
            continue
        options, environment = (["-k", selected], {}) if lab.quick else _workers()
        limit = lab.seconds_left / (len(files) - index)
        yield _tests(lab, path, "gpu and not slow", limit, options, environment)


def race_rows(lab: Lab, files: Sequence[str]) -> Iterator[Row]:
    """Many launches of every kernel whose programs wait for each other, bits compared."""
    environment = {"SPECKV_GPU_LAUNCHES": str(QUICK_LAUNCHES)} if lab.quick else {}
    for index, path in enumerate(files):
        limit = lab.seconds_left / (len(files) - index)
        yield _tests(lab, path, "gpu and slow", limit, environment=environment)


def sanitizer_rows(lab: Lab, tool: str) -> Iterator[Row]:
    """The smallest test of every kernel under one of compute-sanitizer's tools."""
    name = f"compute-sanitizer {tool}"
    program = shutil.which("compute-sanitizer") or "/usr/local/cuda/bin/compute-sanitizer"
    command = [program, "--tool", tool, "--error-exitcode", "9"]
    command += ["--target-processes", "application-only", *_pytest(EVERY_KERNEL, "gpu")]
    if lab.quick:
        command += ["-k", "draft_step or verify or attention"]
    if lab.dry:
        yield {"name": name, "exit_code": 0, "problem": "dry run"}
    elif (missing := _missing(program)) is not None:
        yield {"name": name, "skipped": missing}
    else:
        # With torch's caching allocator a stray access would often hit memory that is in use.
        uncached = {"PYTORCH_NO_CUDA_MEMORY_CACHING": "1"}
        yield _limited(lab, {"name": name, **run_tests(command, lab.seconds_left, uncached)})


def _tests(
    lab: Lab,
    path: str,
    marked: str,
    limit: float,
    options: Sequence[str] = (),
    environment: Mapping[str, str] | None = None,
) -> Row:
    name = f"pytest {path}" + " (races)" * ("and slow" in marked)
    if lab.dry:
        there = (ROOT / path).is_file()
        return {"name": name, "exit_code": int(not there), "problem": "dry run"}
    if (missing := _missing()) is not None:
        return {"name": name, "skipped": missing}
    return _limited(
        lab, {"name": name, **run_tests([*_pytest(path, marked), *options], limit, environment)}
    )


def _limited(lab: Lab, row: Row) -> Row:
    """In the quick form a run that needed more time is cut, not failed."""
    if lab.quick and row["exit_code"] == 124:
        row["exit_code"], row["cut"] = None, row.pop("problem")
    return row


def _pytest(path: str, marked: str) -> list[str]:
    command = [sys.executable, "-m", "pytest", path, "-q", "-m", marked]
    return [*command, "-p", "no:cacheprovider", "--durations=5"]


def _workers() -> tuple[list[str], dict[str, str]]:
    """Options and environment of several processes, where there is what it takes.

    Each has threads of its own for the references on the CPU: threads of several processes would
    wait for each other.
    """
    count = os.cpu_count() or 1
    if importlib.util.find_spec("xdist") is None or count < 2 * _WORKERS:
        return [], {}
    threads = {"OMP_NUM_THREADS": str(count // _WORKERS)}
    return ["-n", str(_WORKERS), "--dist", "load"], threads


def _missing(*programs: str) -> str | None:
    """What cannot be run without."""
    if importlib.util.find_spec("pytest") is None:
        return "pytest is not installed"
    return next((f"{p} is not installed" for p in programs if shutil.which(p) is None), None)


def run_tests(
    command: Sequence[str], seconds: float, environment: Mapping[str, str] | None = None
) -> Row:
    """Exit code, seconds, counts and last lines of a run of pytest that is given so long."""
    start = time.perf_counter()
    with tempfile.TemporaryFile("w+", encoding="utf-8", errors="replace") as output:
        process = subprocess.Popen(
            command,
            cwd=ROOT,
            stdout=output,
            stderr=subprocess.STDOUT,
            env={**os.environ, **(environment or {})},
            start_new_session=True,
        )
        try:
            code = process.wait(seconds)
        except subprocess.TimeoutExpired:
            code = 124
        finally:
            if process.poll() is None:
                os.killpg(process.pid, signal.SIGKILL)
                process.wait()
        output.seek(0)
        lines = output.read().splitlines()
    counts = _counts(lines)
    row: Row = {"exit_code": code, "seconds": time.perf_counter() - start, "counts": counts}
    if code == 124:
        row["problem"] = f"stopped after {seconds:.0f} s"
    elif code == 0 and not counts.get("passed"):
        row |= {"exit_code": 1, "problem": "no test has passed"}
    return row | {"tail": lines[-_TAIL:]}


def _counts(lines: Sequence[str]) -> dict[str, int]:
    """Tests by outcome, from pytest's last line that has any."""
    for line in reversed(lines):
        found = re.findall(r"(\d+) (passed|failed|skipped|errors?|deselected)", line)
        if found:
            return {name: int(count) for count, name in found}
    return {}
