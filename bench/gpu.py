"""Everything that needs a GPU, in parts of under nine minutes, results written row by row.

    python -m bench.gpu --out DIR                 # all parts
    python -m bench.gpu --out DIR --part kernels  # tests | kernels | e2e
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
from functools import partial
from pathlib import Path
from statistics import median
from typing import Any

import torch

from bench.environment import ROOT, environment, write_json
from speckv.kernels import layout as at
from speckv.kernels.layout import StepState
from speckv.policies import CostTable, parse_policy

Row = dict[str, Any]

VOCABULARIES = (32_000, 49_152, 128_256, 262_144)
BATCHES = (1, 4, 8)
_L2_BYTES = 64 << 20
_LAUNCHES = 1000
_COST = CostTable.from_parts(0.3, [2.0 + 0.05 * width for width in range(16)])


class Lab:
    """Where a part runs: the GPU, or a dry run on the CPU.

    Parameters
    ----------
    quick : bool
        Fewer shapes and repeats.
    dry : bool
        Tiny shapes on the CPU, no times.
    """

    def __init__(self, quick: bool, dry: bool) -> None:
        self.quick, self.dry = quick, dry
        self.device = torch.device("cpu" if dry else "cuda")
        self.facts = environment()

    def microseconds(self, calls: list[Callable[[], Any]]) -> float | None:
        """Median time of one call, in a captured graph that goes through ``calls`` in turn.

        Each call works on buffers of its own, together larger than the L2 cache.
        """
        if self.dry:
            for call in calls:
                call()
            return None
        for call in calls:
            call()
        torch.cuda.synchronize()
        graph = torch.cuda.CUDAGraph()
        count = 0
        with torch.cuda.graph(graph):
            while count < (_LAUNCHES // 5 if self.quick else _LAUNCHES):
                for call in calls:
                    call()
                    count += 1
        times = []
        for _ in range(5 if self.quick else 20):
            start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
            start.record()
            graph.replay()
            end.record()
            torch.cuda.synchronize()
            times.append(start.elapsed_time(end) * 1e3 / count)
        return median(times)


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


def kernels_part(lab: Lab) -> Iterator[Row]:
    """`draft_step` and `verify` beside torch.argmax and the unfused PyTorch way."""
    vocabularies = (1031,) if lab.dry else VOCABULARIES[2:3] if lab.quick else VOCABULARIES
    batches = BATCHES[:1] if lab.dry or lab.quick else BATCHES
    for vocabulary in vocabularies:
        for batch in batches:
            yield from _draft_rows(lab, batch, vocabulary)
            yield from _verify_rows(lab, batch, vocabulary)


def _draft_rows(lab: Lab, batch: int, vocabulary: int) -> Iterator[Row]:
    from speckv.kernels.draft_step import DraftStep

    copies = _copies(batch * vocabulary * 2)
    generator = torch.Generator(lab.device).manual_seed(0)
    logits = [
        torch.randn(batch, vocabulary, device=lab.device, generator=generator).bfloat16() * 3
        for _ in range(copies)
    ]
    shape = {"batch": batch, "vocabulary": vocabulary, "dtype": "bf16", "copies": copies}

    def row(name: str, calls: list[Callable[[], Any]]) -> Row:
        return {"name": name, **shape, "microseconds": lab.microseconds(calls)}

    yield row("torch.argmax", [partial(torch.argmax, x, -1) for x in logits])
    yield row("unfused signals", [partial(_unfused, x) for x in logits])
    for policy in ("fixed:15", "entropy:2.0", "paper", "speckv"):
        packed = parse_policy(policy).pack(cost=_COST).to(lab.device)
        for sampled in (False, True):
            calls = []
            for x in logits:
                state = _state(lab, batch)
                options = _sampling(lab, batch) if sampled else {}
                step = DraftStep(x, state, packed, **options)
                calls.append(partial(_again, step, x, state.rows))
            name = f"draft_step {policy}{' sampled' if sampled else ''}"
            yield row(name, calls)
    state = _state(lab, batch)
    yield row("reset of the row state", [partial(_reset, state.rows)])


def _verify_rows(lab: Lab, batch: int, vocabulary: int) -> Iterator[Row]:
    from speckv.kernels.verify import verify

    policy = parse_policy("fixed:0").pack().to(lab.device)
    for width in (1, 5) if lab.quick or lab.dry else (1, 3, 5, 9, 16):
        copies = _copies(batch * width * vocabulary * 2)
        state = _state(lab, batch)
        eos = torch.full((batch, 1), -1, dtype=torch.int32, device=lab.device)
        calls = []
        for _ in range(copies):
            x = torch.randn(batch, width, vocabulary, device=lab.device).bfloat16()
            calls.append(partial(_verify, verify, x, state, policy, eos))
        yield {
            "name": "verify",
            "batch": batch,
            "vocabulary": vocabulary,
            "width": width,
            "dtype": "bf16",
            "copies": copies,
            "microseconds": lab.microseconds(calls),
        }


def e2e_part(lab: Lab) -> Iterator[Row]:
    """Tokens per second of the eager loop on a Llama-shaped pair with random weights."""
    from speckv.decoding import EagerLoop, RequestBatch
    from speckv.models.loading import wrap_model
    from speckv.sampling import SamplingParams

    model = _random_llama(lab)
    target = wrap_model(model, compression="fp32" if lab.dry else "bf16", device=lab.device)
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
        packed = parse_policy(name).pack(cost=_COST)
        produced: list[int] = []
        times = []
        for _ in range(3):
            start = time.perf_counter()
            produced = [t for step in loop.run(requests, packed) for r in step for t in r.tokens]
            times.append(time.perf_counter() - start)
        reference = reference or produced
        yield {
            "name": f"eager {name}",
            "model": model.config.to_dict()["hidden_size"],
            "identical_to_plain": produced == reference,
            "tokens_per_second": None if lab.dry else len(produced) / median(times),
        }


PARTS: dict[str, Callable[[Lab], Iterator[Row]]] = {
    "tests": tests_part,
    "kernels": kernels_part,
    "e2e": e2e_part,
}


def _copies(size: int) -> int:
    return max(2, min(64, _L2_BYTES // size + 1))


def _state(lab: Lab, batch: int) -> StepState:
    state = StepState.allocate(batch, 64, lab.device)
    for row in range(batch):
        state.reset(row, [1, 2, 3], limit=60, request=row)
    _reset(state.rows)
    return state


def _reset(rows: torch.Tensor) -> None:
    """Make the rows draft again; timed by itself, because it rides in every draft_step row."""
    rows[:, at.DRAFTED : at.DONE].zero_()


def _again(step: Callable[[torch.Tensor], None], logits: torch.Tensor, rows: torch.Tensor) -> None:
    _reset(rows)
    step(logits)


def _verify(
    verify: Callable[..., None],
    logits: torch.Tensor,
    state: StepState,
    policy: torch.Tensor,
    eos: torch.Tensor,
) -> None:
    """Verify a full block; the length goes back, so that the row never ends."""
    state.rows[:, at.LENGTH].fill_(3)
    state.rows[:, at.DRAFTED].fill_(logits.shape[1] - 1)
    verify(logits, state, policy, eos=eos)


def _sampling(lab: Lab, batch: int) -> dict[str, torch.Tensor]:
    return {
        "inv_temperature": torch.full((batch,), 1.25, device=lab.device),
        "seeds": torch.arange(batch, dtype=torch.int64, device=lab.device),
    }


def _unfused(logits: torch.Tensor) -> None:
    """Signals and token in separate PyTorch operations, all on the device."""
    log_p = torch.log_softmax(logits.float(), -1)
    p = log_p.exp()
    (p * log_p).sum(-1)
    p.topk(2, -1)
    logits.argmax(-1)


def _random_llama(lab: Lab) -> Any:
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(0)
    if lab.dry:
        config = LlamaConfig(
            hidden_size=64,
            intermediate_size=128,
            num_hidden_layers=2,
            num_attention_heads=4,
            num_key_value_heads=2,
            vocab_size=1031,
        )
    else:  # Llama-3.2-1B
        config = LlamaConfig(
            hidden_size=2048,
            intermediate_size=8192,
            num_hidden_layers=16,
            num_attention_heads=32,
            num_key_value_heads=8,
            head_dim=64,
            vocab_size=128_256,
            tie_word_embeddings=True,
        )
    return LlamaForCausalLM(config).to(torch.float32 if lab.dry else torch.bfloat16)


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
    failed = [row for row in rows if row.get("exit_code") or row.get("identical_to_plain") is False]
    print(f"{len(rows)} rows, {len(failed)} failed, in {arguments.out}")
    raise SystemExit(1 if failed else 0)


if __name__ == "__main__":
    main()
