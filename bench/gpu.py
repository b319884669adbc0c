"""Everything that needs a GPU, in parts of under nine minutes, results written row by row.

    python -m bench.gpu --out DIR                 # all parts
    python -m bench.gpu --out DIR --part loop     # one; "kernels" is draft, verify and linear
    python -m bench.gpu --out DIR --quick         # fewer shapes and repeats: all in four minutes
    python -m bench.gpu --out DIR --merge FILE    # the parts as one JSON document, and a table;
                                                  # FILE.jsonl: appended to what is there
    python -m bench.gpu --out DIR --dry-run       # on the CPU, tiny shapes: does it run at all?

A dry run's rows say so and hold no times: interpreter and CPU times are not GPU times.
"""

from __future__ import annotations

import argparse
import json
import shutil
import subprocess
import sys
import time
import traceback
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

import torch

from bench import roofline
from bench.audit import audit_rows
from bench.e2e_rows import e2e_rows, random_decoder
from bench.environment import ROOT, write_json
from bench.kernel_rows import draft_rows, verify_rows
from bench.lab import Lab, Row
from bench.linear_rows import linear_rows
from bench.loop_rows import conditional_rows, decision_rows, share_rows, unfused_rows

_SHAPE = ("target", "draft", "compression", "policy", "batch", "width", "vocabulary", "rows")
_TIMES = {
    "kernel_us": "us",
    "iteration_us": "us an iteration",
    "above_bare_argmax_us": "us above argmax",
    "share_of_copy": "of copy bandwidth",
    "tokens_per_second": "tokens/s",
    "above_forwards": "above its forwards",
    "syncs": "syncs",
}

PART_SECONDS = 520.0
"""What a part may take, so that each fits in nine minutes."""
QUICK_SECONDS = 230.0
"""What all parts may take in their quick form."""


def tests_part(lab: Lab) -> Iterator[Row]:
    """The tests marked gpu, as one row."""
    command = [sys.executable, "-m", "pytest", "-m", "gpu", "-q"]
    if lab.quick:
        command += ["-m", "gpu and not slow"]
    if lab.dry:
        command.append("--collect-only")
    yield {"name": "pytest -m gpu", **run_tests(command)}


def loop_part(lab: Lab) -> Iterator[Row]:
    """Conditional nodes, the decision, and what each loop adds to its forwards."""
    yield from conditional_rows(lab)
    yield from decision_rows(lab)
    yield from unfused_rows(lab)
    name = "tiny" if lab.dry else "Llama-3.2-1B"
    target = random_decoder(lab, name, "bf16")
    draft = target.first_layers(1)
    yield from share_rows(lab, target, draft, {"target": name, "draft": "its first layer"})


def audit_part(lab: Lab) -> Iterator[Row]:
    """Whatever makes the host wait, and memory that grows, in the loops on graphs."""
    name = "tiny" if lab.dry else "Llama-3.2-1B"
    target = random_decoder(lab, name, "bf16")
    yield from audit_rows(lab, target, target.first_layers(1))


def sanitizer_part(lab: Lab) -> Iterator[Row]:
    """The kernels' tests on the GPU under compute-sanitizer's memcheck and racecheck."""
    for tool in ("memcheck", "racecheck"):
        command = ["compute-sanitizer", "--tool", tool, "--error-exitcode", "9", sys.executable]
        command += ["-m", "pytest", "-q", "-x", "-m", "gpu and not slow", "tests/gpu"]
        row: Row = {"name": f"compute-sanitizer {tool}", "command": " ".join(command[:5])}
        if lab.dry or shutil.which(command[0]) is None:
            problem = "dry run" if lab.dry else f"{command[0]} is not installed"
            yield row | {"exit_code": 0 if lab.dry else 1, "problem": problem}
            continue
        yield row | run_tests(command)


def run_tests(command: list[str]) -> Row:
    """Exit code, seconds and last lines of a command; 124 if it took half of a part's time."""
    start = time.perf_counter()
    try:
        run = subprocess.run(
            command, cwd=ROOT, capture_output=True, text=True, timeout=PART_SECONDS / 2
        )
        code, said = run.returncode, run.stdout
    except subprocess.TimeoutExpired as late:
        code, said = 124, late.stdout.decode() if late.stdout else ""
    return {
        "exit_code": code,
        "seconds": time.perf_counter() - start,
        "tail": said.splitlines()[-15:],
    }


PARTS: dict[str, Callable[[Lab], Iterator[Row]]] = {
    "tests": tests_part,
    "draft": draft_rows,
    "verify": verify_rows,
    "linear": linear_rows,
    "forward": roofline.forward_rows,
    "loop": loop_part,
    "audit": audit_part,
    "e2e": e2e_rows,
    "sanitizer": sanitizer_part,
}
GROUPS = {"kernels": ("draft", "verify", "linear")}
"""Parts under one name."""


def run_part(name: str, lab: Lab, out: Path, seconds: float = PART_SECONDS) -> list[Row]:
    """Run a part; every row is on disk before the next one is measured.

    A part that has taken ``seconds`` ends after the row under way, and its file says so.
    """
    rows: list[Row] = []
    end = time.monotonic() + seconds
    for row in _until_an_error(PARTS[name](lab)):
        rows.append({"part": name, "dry_run": lab.dry, "quick": lab.quick, **row})
        print(json.dumps(rows[-1]), flush=True)
        cut = time.monotonic() > end
        write_json(out / f"{name}.json", {"environment": lab.facts, "cut": cut, "rows": rows})
        if cut:
            print(f"{name}: cut after {seconds:.0f} s", file=sys.stderr)
            break
    return rows


def _until_an_error(rows: Iterator[Row]) -> Iterator[Row]:
    """Rows; what goes wrong becomes the last one, so that other parts are measured all the same."""
    try:
        yield from rows
    except Exception as error:
        traceback.print_exc()
        yield {"name": "error", "exit_code": 1, "problem": f"{type(error).__name__}: {error}"}


def merge(out: Path, file: Path) -> None:
    """All parts in ``out`` as one document, or appended to a history of JSON lines.

    A table of what was timed is printed.
    """
    parts = {p: json.loads((out / f"{p}.json").read_text()) for p in PARTS if _has(out, p)}
    if not parts:
        raise SystemExit(f"error: no part's JSON in {out}")
    if file.suffix == ".jsonl":
        with file.open("a", encoding="utf-8") as history:
            for part in parts.values():
                for row in part["rows"]:
                    history.write(json.dumps({"environment": part["environment"], **row}) + "\n")
    else:
        write_json(file, parts)
    for line in table([row for part in parts.values() for row in part["rows"]]):
        print(line)


def table(rows: Sequence[Row]) -> Iterator[str]:
    """A line for each row that has a time or a verdict."""
    for row in rows:
        what = [str(row.get(key)) for key in _SHAPE if row.get(key) is not None]
        said = []
        for key, unit in _TIMES.items():
            value = row.get(key)
            value = value.get("p50") if isinstance(value, dict) else value
            if value is not None:
                said.append(f"{value:,.2f} {unit}")
        said += ["FAILED"] * failed(row)
        yield f"{row['name']:36s} {' '.join(what):48s} {', '.join(said) or 'no time'}"


def _has(out: Path, part: str) -> bool:
    return (out / f"{part}.json").exists()


def failed(row: Row) -> bool:
    """Whether a row's test failed or its gate is red."""
    differs = row.get("identical_to_plain") is False and row["dtype"] in ("bf16", "bfloat16")
    waits = bool(row.get("syncs")) or bool(row.get("traced_syncs")) or bool(row.get("grew"))
    return bool(row.get("exit_code")) or row.get("matches_reference") is False or differs or waits


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--out", type=Path, required=True, help="folder of the JSON files")
    parser.add_argument("--part", choices=[*PARTS, *GROUPS], help="only this part")
    parser.add_argument("--trace", type=Path, help="signals and acceptance for e2e's policies")
    parser.add_argument("--quick", action="store_true", help="fewer shapes and repeats")
    parser.add_argument("--dry-run", action="store_true", help="tiny shapes on the CPU")
    parser.add_argument("--merge", type=Path, metavar="FILE", help="merge what is in --out")
    arguments = parser.parse_args()
    if arguments.merge:
        merge(arguments.out, arguments.merge)
        return
    if not arguments.dry_run and not torch.cuda.is_available():
        raise SystemExit("error: no CUDA device; --dry-run runs the same code on the CPU")
    lab = Lab(arguments.quick, arguments.dry_run)
    lab.trace = arguments.trace
    names = GROUPS.get(arguments.part, (arguments.part,)) if arguments.part else tuple(PARTS)
    share = len(GROUPS.get(arguments.part, ("one",)))  # a group takes as long as a part
    if arguments.quick:
        share = len(PARTS)
    budget = (QUICK_SECONDS if arguments.quick else PART_SECONDS) / share
    rows = [row for name in names for row in run_part(name, lab, arguments.out, budget)]
    for line in table(rows):
        print(line)
    red = [row for row in rows if failed(row)]
    print(f"{len(rows)} rows, {len(red)} failed, in {arguments.out}")
    raise SystemExit(1 if red else 0)


if __name__ == "__main__":
    main()
