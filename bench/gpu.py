"""Everything that needs a GPU, in parts of under nine minutes, results written row by row.

    python -m bench.gpu --out DIR                 # all parts
    python -m bench.gpu --out DIR --part draft    # tests | draft | verify | linear | forward | e2e
    python -m bench.gpu --out DIR --merge FILE    # the parts as one JSON document
    python -m bench.gpu --out DIR --dry-run       # on the CPU, tiny shapes: does it run at all?

A dry run's rows say so and hold no times: interpreter and CPU times are not GPU times.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch

from bench import roofline
from bench.environment import ROOT, write_json
from bench.kernel_rows import draft_rows, verify_rows
from bench.lab import COST, Lab, Row, quantiles
from bench.linear_rows import linear_rows
from bench.sides import DTYPES
from speckv.policies import parse_policy


def tests_part(lab: Lab) -> Iterator[Row]:
    """The tests marked gpu, as one row."""
    command = [sys.executable, "-m", "pytest", "-m", "gpu", "-q"]
    if lab.quick:
        command += ["-m", "gpu and not slow"]
    if lab.dry:
        command.append("--collect-only")
    start = time.perf_counter()
    run = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    yield {
        "name": "pytest -m gpu",
        "exit_code": run.returncode,
        "seconds": time.perf_counter() - start,
        "tail": run.stdout.splitlines()[-15:],
    }


def e2e_part(lab: Lab) -> Iterator[Row]:
    """Tokens per second of the eager loop on a Llama-shaped pair with random weights.

    Other tokens than plain decoding's are a failure in bf16, whose products do not depend on how
    many rows they have. In fp32 they are PyTorch's, which may round by that, and are reported.
    """
    model = _random_llama(lab)
    for dtype in DTYPES:
        yield from _e2e_rows(lab, model.to(DTYPES[dtype]), dtype)


def _e2e_rows(lab: Lab, model: Any, dtype: str) -> Iterator[Row]:
    from speckv.decoding import EagerLoop, RequestBatch
    from speckv.models.llama import LlamaDecoder
    from speckv.models.loading import wrap_model
    from speckv.sampling import SamplingParams

    target = wrap_model(model, compression=dtype, device=lab.device)
    assert isinstance(target, LlamaDecoder)
    draft = target.first_layers(1)
    loop = EagerLoop(target, draft, batch=1, capacity=512)
    tokens = 16 if lab.dry else 64
    requests = RequestBatch.build(
        [[1, 2, 3, 4]],
        [SamplingParams(max_new_tokens=tokens, ignore_eos=True)],
        eos_ids=[],
        max_length=512,
        device=lab.device,
    )
    reference: list[int] | None = None
    for name in ("fixed:0", "fixed:2", "fixed:4", "fixed:8"):
        packed = parse_policy(name).pack(cost=COST)
        produced: list[int] = []
        seconds = []
        for repeat in range(2 if lab.dry else 4):
            start = time.perf_counter()
            produced = [t for step in loop.run(requests, packed) for r in step for t in r.tokens]
            if repeat:  # the first compiles
                seconds.append(time.perf_counter() - start)
        reference = reference or produced
        same = produced == reference
        row = {
            "name": f"eager {name}",
            "hidden_size": model.config.hidden_size,
            "vocabulary": model.config.vocab_size,
            "dtype": dtype,
            "batch": 1,
            "tokens": len(produced),
            "identical_to_plain": same,
            "n": len(seconds),
            "tokens_per_second": None,
        }
        if not failed(row) and not lab.dry:
            row["tokens_per_second"] = quantiles([len(produced) / each for each in seconds])
        yield row


PARTS: dict[str, Callable[[Lab], Iterator[Row]]] = {
    "tests": tests_part,
    "draft": draft_rows,
    "verify": verify_rows,
    "linear": linear_rows,
    "forward": roofline.forward_rows,
    "e2e": e2e_part,
}


def _random_llama(lab: Lab) -> Any:
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(0)
    sizes = roofline.TINY if lab.dry else roofline.MODELS["Llama-3.2-1B"]
    return LlamaForCausalLM(LlamaConfig(**sizes))


def run_part(name: str, lab: Lab, out: Path) -> list[Row]:
    """Run a part; every row is on disk before the next one is measured."""
    rows: list[Row] = []
    for row in PARTS[name](lab):
        rows.append({"part": name, "dry_run": lab.dry, "quick": lab.quick, **row})
        print(json.dumps(rows[-1]), flush=True)
        write_json(out / f"{name}.json", {"environment": lab.facts, "rows": rows})
    return rows


def merge(out: Path, file: Path) -> None:
    """All parts in ``out`` as one document."""
    parts = {p: json.loads((out / f"{p}.json").read_text()) for p in PARTS if _has(out, p)}
    if not parts:
        raise SystemExit(f"error: no part's JSON in {out}")
    write_json(file, parts)


def _has(out: Path, part: str) -> bool:
    return (out / f"{part}.json").exists()


def failed(row: Row) -> bool:
    """Whether a row's test failed or its gate is red."""
    differs = row.get("identical_to_plain") is False and row["dtype"] == "bf16"
    return bool(row.get("exit_code")) or row.get("matches_reference") is False or differs


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--out", type=Path, required=True, help="folder of the JSON files")
    parser.add_argument("--part", choices=PARTS, help="only this part")
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
    rows = [
        row
        for name in ([arguments.part] if arguments.part else PARTS)
        for row in run_part(name, lab, arguments.out)
    ]
    red = [row for row in rows if failed(row)]
    print(f"{len(rows)} rows, {len(red)} failed, in {arguments.out}")
    raise SystemExit(1 if red else 0)


if __name__ == "__main__":
    main()
