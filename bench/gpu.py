"""Everything that needs a GPU, in parts of under nine minutes, results written row by row.

    python -m bench.gpu --out DIR                 # all parts, one after the other
    python -m bench.gpu --out DIR --part loop     # one part, or one group of parts: see below
    python -m bench.gpu --out DIR --quick         # fewer shapes and repeats: all in four minutes
    python -m bench.gpu --out DIR --merge FILE    # the parts as one JSON document, and a table;
                                                  # FILE.jsonl: appended to what is there
    python -m bench.gpu --out DIR --dry-run       # on the CPU, tiny shapes: does it run at all?

Parts are kernels, loop, e2e, audit and sanitizer; the group ``kernels`` is the parts draft, verify
and linear, which share its nine minutes, and have nine each under their own names. What does not
fit has further names: probe, forward, e2e-8b, tests, tests-decision, tests-decoder, races and
races-decoder.

A part's processes are killed when they hang, and what is wrong with a row costs that row. The exit
code is 1 if a result was wrong (`bench.verdicts.failed`). Goals of speed are rows of their own in
``verdicts.json``: a missed one is said, and changes no exit code. A dry run's rows say so and hold
no times: interpreter and CPU times are not GPU times.
"""

from __future__ import annotations

import argparse
import json
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch

from bench import running
from bench.environment import ROOT, environment, write_json
from bench.lab import Lab, Row
from bench.parts import GROUPS, PARTS
from bench.running import PART_SECONDS, QUICK_SECONDS, Options
from bench.verdicts import failed, table, verdicts

__all__ = ["GROUPS", "PARTS", "failed", "main", "merge", "run_part", "table"]

TRACE = ROOT / "bench" / "traces" / "smollm2-135m-instruct.parquet"
"""Signals and acceptance of the default pair, for pairs of random weights."""
_VERDICTS = "verdicts"


def run_part(name: str, lab: Lab, out: Path, seconds: float = PART_SECONDS) -> list[Row]:
    """Run a part in this process; every row is on disk before the next one is measured.

    A section of it that takes too long is cut ahead of its next row, and a row says so.
    """
    (out / f"{name}.json").unlink(missing_ok=True)
    jobs = [(name, section) for section in PARTS[name]]
    return running.work(lab, out, jobs, time.monotonic() + seconds)


def read_parts(out: Path) -> dict[str, dict[str, Any]]:
    """The documents of the parts in a folder."""
    return {
        name: json.loads((out / f"{name}.json").read_text(encoding="utf-8"))
        for name in PARTS
        if (out / f"{name}.json").exists()
    }


def judge(documents: Mapping[str, Mapping[str, Any]]) -> dict[str, Any]:
    """The document of the goals, by the parts there are."""
    rows = verdicts({name: document["rows"] for name, document in documents.items()})
    facts = [document["environment"] for document in documents.values()]
    return {"environment": facts[0] if facts else environment(), "cut": False, "rows": rows}


def merge(out: Path, file: Path) -> None:
    """All parts in ``out`` and the goals as one document, or appended to a history of JSON lines.

    A table of what was timed is printed.
    """
    parts = read_parts(out)
    if not parts:
        raise SystemExit(f"error: no part's JSON in {out}")
    parts[_VERDICTS] = judge(parts)
    if file.suffix == ".jsonl":
        with file.open("a", encoding="utf-8") as history:
            for part in parts.values():
                for row in part["rows"]:
                    history.write(json.dumps({"environment": part["environment"], **row}) + "\n")
    else:
        write_json(file, parts)
    for line in table([row for part in parts.values() for row in part["rows"]]):
        print(line)


def _names(part: str | None) -> Sequence[str]:
    return GROUPS.get(part, (part,)) if part else tuple(PARTS)


def _run(names: Sequence[str], out: Path, options: Options, together: bool) -> None:
    """``together``: the parts are a group, which takes as long as one."""
    if options.quick:
        running.run(PARTS, names, out, options, QUICK_SECONDS)
    elif together:
        running.run(PARTS, names, out, options, PART_SECONDS)
    else:
        for name in names:
            running.run(PARTS, (name,), out, options, PART_SECONDS)


def main(arguments: Sequence[str] | None = None) -> None:
    choices = list(dict.fromkeys(["kernels", "loop", "e2e", "audit", "sanitizer", *PARTS]))
    parser = argparse.ArgumentParser(
        prog="python -m bench.gpu",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--out", type=Path, required=True, help="folder of the JSON files")
    parser.add_argument("--part", choices=choices, help="only this part, or group of parts")
    parser.add_argument(
        "--trace",
        type=Path,
        default=TRACE,
        help="signals and acceptance for e2e's policies (default: the committed trace)",
    )
    parser.add_argument("--quick", action="store_true", help="fewer shapes and repeats")
    parser.add_argument("--dry-run", action="store_true", help="tiny shapes on the CPU")
    parser.add_argument("--merge", type=Path, metavar="FILE", help="merge what is in --out")
    asked = parser.parse_args(arguments)
    if asked.merge:
        merge(asked.out, asked.merge)
        return
    if not asked.dry_run and not torch.cuda.is_available():
        raise SystemExit("error: no CUDA device; --dry-run runs the same code on the CPU")
    asked.out.mkdir(parents=True, exist_ok=True)
    names = _names(asked.part)
    options = Options(asked.quick, asked.dry_run, asked.trace if asked.trace.exists() else None)
    _run(names, asked.out, options, together=asked.part in GROUPS)
    documents = read_parts(asked.out)
    goals = judge(documents)
    write_json(asked.out / f"{_VERDICTS}.json", goals)
    rows = [row for name in names for row in documents.get(name, {}).get("rows", ())]
    for line in table([*rows, *goals["rows"]]):
        print(line)
    missing = [name for name in names if name not in documents]
    red = [row for row in rows if failed(row)]
    missed = [row for row in goals["rows"] if row["met"] is False]
    print(f"{len(rows)} rows, {len(red)} failed, {len(missed)} goals missed, in {asked.out}")
    for name in missing:
        print(f"{name}: no row was written")
    raise SystemExit(1 if red or missing else 0)


if __name__ == "__main__":
    main()
