"""What a useless draft costs: the default target with a draft of random weights, beside plain.

    python -m bench.random_draft --compression bf16 --out FILE

The draft has the shapes of the default one, so it costs the same, and next to nothing it proposes
is accepted. Live, whole calls of ``speckv`` and of plain decoding are interleaved, as in
`bench.pair`; in replay, on a trace of the same prompts, steps are priced at costs measured first.
"""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any
from zlib import crc32

import torch
from torch import Tensor

from bench import pair
from bench.environment import command, environment, write_json
from bench.sides import bootstrap_median
from speckv import Engine
from speckv.decoding.calibrate import measure as measure_costs
from speckv.models.llama import LlamaDecoder
from speckv.models.pairing import eos_token_ids
from speckv.models.slice_draft import SliceManifest, read_tensors, shipped_draft
from speckv.models.weights import TensorSource
from speckv.prompts import Prompt, evaluation_prompts
from speckv.traces.packed import PackedController
from speckv.traces.record import record
from speckv.traces.replay import replay
from speckv.traces.schema import Answer, TraceInfo, join

PLAIN, OURS = pair.PLAIN, "speckv"


class _Random:
    """Matrices of the shapes and deviations of a source's, drawn at random; vectors as they are."""

    def __init__(self, source: TensorSource) -> None:
        self._source = source

    def __contains__(self, name: object) -> bool:
        return name in self._source

    def __getitem__(self, name: str) -> Tensor:
        tensor = self._source[name]
        if tensor.ndim != 2:
            return tensor
        generator = torch.Generator().manual_seed(crc32(name.encode()))
        return torch.randn(tensor.shape, generator=generator) * tensor.std()


def random_pair(compression: str) -> tuple[Engine, Tensor]:
    """The default target with a draft of random weights in the shapes of its own; the id map."""
    engine = Engine.from_pretrained(draft="first:1", compression=compression, policy=PLAIN)
    target = engine.target
    assert isinstance(target, LlamaDecoder)
    folder = shipped_draft(target.fingerprint)
    assert folder is not None, "the default target has a draft of its own"
    manifest = SliceManifest.read(folder)
    source, id_map = read_tensors(folder, manifest)
    draft = target.slice_draft(
        _Random(source), manifest.layers, manifest.vocab_size, name="random draft"
    )
    cost = measure_costs(target, draft)
    return Engine(target, engine.tokenizer, draft, policy=OURS, id_map=id_map, cost=cost), id_map


def replayed(engine: Engine, id_map: Tensor, prompts: list[Prompt], tokens: int) -> dict[str, Any]:
    """Tokens per second of the same prompts over plain decoding's, by costs, in replay."""
    target, draft, cost = engine.target, engine.draft, engine._cost
    assert draft is not None and cost is not None
    answers = [
        Answer(i, p.task, target.compression, 0.0, 0, tokens, tuple(engine.encode(p.text, True)))
        for i, p in enumerate(prompts)
    ]
    eos = eos_token_ids(target, engine.tokenizer)
    rows = record(target, draft, answers, eos=eos, id_map=id_map)
    facts = {"name": "", "fingerprint": None, "vocab_size": 0}
    trace = join(TraceInfo(facts, facts, "", {}, {}), zip(answers, rows, strict=True))
    ms = {
        name: replay(
            trace, PackedController(engine._policy(name).pack(target.compression, cost)), cost
        ).ms
        for name in (OURS, PLAIN)
    }
    each = ms[PLAIN] / ms[OURS]
    return {
        "ratio": float(ms[PLAIN].sum() / ms[OURS].sum()),
        "median": float(sorted(each)[len(each) // 2]),
        "median_95": list(bootstrap_median(each)),
        "first_token_accepted": float((trace.rows.accepted > 0).mean()),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--compression", default="bf16")
    parser.add_argument("--per-task", type=int, default=3)
    parser.add_argument("--tokens", type=int, default=128)
    parser.add_argument("--out", type=Path, help="JSON file to write")
    arguments = parser.parse_args()
    engine, id_map = random_pair(arguments.compression)
    prompts = evaluation_prompts(arguments.per_task)
    live = pair.measure(engine, [OURS], prompts, arguments.tokens)
    found = live["policies"][OURS]["all"]
    document = {
        "benchmark": "random_draft",
        "engine": engine.describe(),
        "compression": arguments.compression,
        "prompts": len(prompts),
        "live": found,
        "replay": replayed(engine, id_map, prompts, arguments.tokens),
        "cost": engine._cost and engine._cost.to_dict(),
        "command": command(),
        "environment": environment(),
    }
    low, high = found["ratio_95"]
    print(
        f"{arguments.compression}: live {found['ratio']:.3f}x plain, 95% [{low:.3f}, {high:.3f}]; "
        f"in replay {document['replay']['ratio']:.3f}x"
    )
    if arguments.out:
        write_json(arguments.out, document)


if __name__ == "__main__":
    main()
