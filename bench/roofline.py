"""What a forward must read and launch: its bytes, its launches, and the time they cannot go below.

    python -m bench.roofline                                  # floors on 3,350 GB/s (H100 SXM)
    python -m bench.roofline --bandwidth 2039 --context 4096
    python -m bench.roofline --measured bench/history/gpu     # beside what bench.gpu measured

At few rows a forward is a read of its weights. The floor is all bytes over the bandwidth; launches
are those of the decoder itself, which a CUDA graph makes cheap but not free.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import torch
from torch import Tensor

from bench.lab import Lab, Row, isolated, nothing
from speckv.models.config import DecoderConfig
from speckv.models.fused import LAUNCHES_PER_LAYER, can_launch_early
from speckv.models.llama import LlamaDecoder

WIDTHS = (1, 3, 5, 9, 16)
COMPRESSIONS = ("bf16", "int8", "nf4")
_CONTEXT = 512
_OTHER_LAUNCHES = 4  # positions (2), embedding, head
_BITS = {"fp32": 32.0, "fp16": 16.0, "bf16": 16.0, "int8": 8.0, "nf4": 4.0}
TINY = {
    "vocab_size": 1031,
    "hidden_size": 64,
    "intermediate_size": 128,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 16,
}
MODELS: Mapping[str, Mapping[str, Any]] = {
    "SmolLM2-135M": {
        "vocab_size": 49_152,
        "hidden_size": 576,
        "intermediate_size": 1536,
        "num_hidden_layers": 30,
        "num_attention_heads": 9,
        "num_key_value_heads": 3,
        "head_dim": 64,
        "tie_word_embeddings": True,
    },
    "Llama-3.2-1B": {
        "vocab_size": 128_256,
        "hidden_size": 2048,
        "intermediate_size": 8192,
        "num_hidden_layers": 16,
        "num_attention_heads": 32,
        "num_key_value_heads": 8,
        "head_dim": 64,
        "tie_word_embeddings": True,
    },
    "Llama-3.2-3B": {
        "vocab_size": 128_256,
        "hidden_size": 3072,
        "intermediate_size": 8192,
        "num_hidden_layers": 28,
        "num_attention_heads": 24,
        "num_key_value_heads": 8,
        "head_dim": 128,
        "tie_word_embeddings": True,
    },
    "Llama-3.1-8B": {
        "vocab_size": 128_256,
        "hidden_size": 4096,
        "intermediate_size": 14_336,
        "num_hidden_layers": 32,
        "num_attention_heads": 32,
        "num_key_value_heads": 8,
        "head_dim": 128,
        "tie_word_embeddings": False,
    },
}
"""Shapes by name, as a transformers ``LlamaConfig`` has them."""


def shape(sizes: Mapping[str, Any]) -> DecoderConfig:
    """The decoder's view of a shape: that of a ``LlamaConfig``, which is not needed for it."""
    defaults: dict[str, Any] = {
        "model_type": "llama",
        "hidden_act": "silu",
        "rms_norm_eps": 1e-6,
        "rope_parameters": {"rope_type": "default", "rope_theta": 10_000.0},
        "tie_word_embeddings": False,
        "eos_token_id": 2,
        "max_position_embeddings": 131_072,
    }
    config: Any = SimpleNamespace(**{**defaults, **sizes})
    return DecoderConfig.from_transformers(config)


@dataclass(frozen=True)
class Traffic:
    """Bytes of one forward by what they are, and its launches.

    Attributes
    ----------
    weights : int
        Of the layers, scales and norms included.
    head : int
        Of the head, which is never packed.
    cache : int
        Keys and values, read and written.
    activations : int
        Rows that kernels hand to each other; mostly in the L2 cache.
    launches : int
    """

    weights: int
    head: int
    cache: int
    activations: int
    launches: int

    @property
    def bytes(self) -> int:
        """What must come from memory: all but the activations."""
        return self.weights + self.head + self.cache

    def floor_us(self, bandwidth: float) -> float:
        """Microseconds that the bytes take at ``bandwidth`` GB/s."""
        return self.bytes / bandwidth / 1e3


def traffic(
    config: DecoderConfig, compression: str, rows: int, context: int, batch: int = 1
) -> Traffic:
    """The bytes and launches of a forward.

    Parameters
    ----------
    compression : str
        Weight format; activations are 16 bits wide, or 32 in fp32.
    rows : int
        New positions, of all sequences.
    context : int
        Positions of each sequence in the cache before them.
    batch : int
        Sequences.
    """
    c = config
    width = 4 if compression == "fp32" else 2
    queries, keys = c.heads * c.head_dim, c.kv_heads * c.head_dim
    products = (
        (queries + 2 * keys, c.hidden, c.qkv_bias),
        (c.hidden, queries, c.output_bias),
        (2 * c.intermediate, c.hidden, c.mlp_bias),
        (c.hidden, c.intermediate, c.mlp_bias),
    )
    weights = sum(
        _weight_bytes(n, k, compression) + (n * width if bias else 0) for n, k, bias in products
    )
    norms = 2 * c.hidden + ((c.heads + c.kv_heads) * c.head_dim if c.head_norm else 0)
    seen = sum(min(context, window - 1 if window else context) for window in c.windows)
    moved = 2 * c.hidden + (queries + 2 * keys) + 2 * queries + 2 * c.hidden + c.intermediate
    return Traffic(
        weights=c.layers * (weights + norms * width) + c.hidden * width,
        head=c.vocab_size * c.hidden * width,
        cache=2 * keys * width * (batch * seen + 2 * rows * c.layers),
        activations=2 * rows * width * (c.layers * moved + c.hidden + c.vocab_size),
        launches=c.layers * LAUNCHES_PER_LAYER + _OTHER_LAUNCHES,
    )


def _weight_bytes(rows: int, depth: int, compression: str) -> int:
    scales = {"int8": 4 * rows, "nf4": 4 * rows * depth // 64}.get(compression, 0)
    return int(rows * depth * _BITS[compression] / 8) + scales


class RandomTensors:
    """A checkpoint of random weights, made tensor by tensor when they are read."""

    def __init__(self, config: DecoderConfig, device: torch.device) -> None:
        self._device = device
        c = config
        queries, keys = c.heads * c.head_dim, c.kv_heads * c.head_dim
        self._shapes = {
            "embed_tokens": (c.vocab_size, c.hidden),
            "lm_head": (c.vocab_size, c.hidden),
            "q_proj": (queries, c.hidden),
            "k_proj": (keys, c.hidden),
            "v_proj": (keys, c.hidden),
            "o_proj": (c.hidden, queries),
            "gate_proj": (c.intermediate, c.hidden),
            "up_proj": (c.intermediate, c.hidden),
            "down_proj": (c.hidden, c.intermediate),
        }
        self._hidden = c.hidden

    def __contains__(self, name: object) -> bool:
        return True

    def __getitem__(self, name: str) -> Tensor:
        size = self._shapes.get(name.split(".")[-2])
        if size is None:  # a norm
            return torch.ones(self._hidden, device=self._device)
        weight = torch.randn(size, device=self._device, dtype=torch.bfloat16)
        return weight.mul_(float(size[1]) ** -0.5)


def forward_rows(lab: Lab, model: str = "Llama-3.2-1B") -> Iterator[Row]:
    """Whole forwards, captured into a graph, at every width, beside their bytes.

    Logits at every width must have the bits of those at width 1.
    """
    copy = lab.copied()
    yield copy
    name = "tiny" if lab.dry else model
    context = 16 if lab.dry else _CONTEXT
    for compression in COMPRESSIONS:
        facts = {"name": "forward", "model": name, "compression": compression}
        rows = partial(_forwards, lab, facts, context, copy["bytes_per_us"])
        yield from isolated(facts, rows)


def _forwards(lab: Lab, facts: Row, context: int, bandwidth: float | None) -> Iterator[Row]:
    torch.manual_seed(0)
    config = shape(TINY if lab.dry else MODELS[facts["model"]])
    model = LlamaDecoder.from_tensors(
        config,
        RandomTensors(config, lab.device),
        name=facts["model"],
        compression=facts["compression"],
        dtype=torch.bfloat16,
        device=lab.device,
        invariant=False,
    )
    cache = model.new_cache(2, context + 32)
    ids = torch.randint(0, config.vocab_size, (context + 16,), device=lab.device)
    for slot in range(2):
        model.prefill(ids[:context], cache, slot, want_logits=False)
    start = torch.full((2,), context, device=lab.device)
    slots = torch.arange(2, device=lab.device)

    def run(batch: int, first: int, width: int) -> Callable[[], Tensor]:
        block = ids[None, context + first : context + first + width].repeat(batch, 1)
        return partial(model.forward, block, start[:batch] + first, cache, slots=slots[:batch])

    alone = [run(1, i, 1)()[0, 0] for i in range(max(WIDTHS))]
    for batch, width in [*((1, width) for width in WIDTHS), (2, max(WIDTHS))]:
        forward = run(batch, 0, width)
        pairs = [pair for found in forward() for pair in zip(found, alone, strict=False)]
        # A dry run takes the references, whose bits do depend on the width.
        same = lab.dry or all(torch.equal(row, other) for row, other in pairs)
        rows = batch * width
        floor = traffic(config, facts["compression"], rows, context, batch)
        row = {**facts, "batch": batch, "width": width, "context": context}
        row |= {"bytes": floor.bytes, "launches_planned": floor.launches}
        row |= {"matches_reference": same, "share_of_copy": None}
        if same:
            row |= lab.time([forward] * (2 if lab.dry else 4), nothing)
            if bandwidth is not None:
                row["share_of_copy"] = floor.bytes / row["kernel_us"]["p50"] / bandwidth
        yield row
    if not lab.dry and can_launch_early(lab.device):
        model.pdl = True
        forward = run(1, 0, 1)
        row = {**facts, "name": "forward, early launches", "batch": 1, "width": 1}
        row |= {"context": context, "matches_reference": torch.equal(forward()[0, 0], alone[0])}
        yield row | (lab.time([forward] * 4, nothing) if row["matches_reference"] else {})


def table(bandwidth: float, context: int, measured: Sequence[Row]) -> Iterator[str]:
    """Lines of what `main` prints."""
    times = {
        (r["model"], r["compression"], r["width"], r["context"]): r["kernel_us"]["p50"]
        for r in measured
        if r.get("kernel_us") and r.get("batch", 1) == 1 and "model" in r
    }
    head = ("rows", "MB", "launches", "floor us")
    yield "{:14} {:6} {:>4} {:>9} {:>8} {:>9}  {}".format("model", "format", *head, "measured")
    for name, sizes in MODELS.items():
        config = shape(sizes)
        for compression in COMPRESSIONS:
            for width in WIDTHS:
                of = traffic(config, compression, width, context)
                floor = of.floor_us(bandwidth)
                us = times.get((name, compression, width, context))
                beside = "-" if us is None else f"{us:.0f} us, {floor / us:.0%} of the bandwidth"
                yield (
                    f"{name:14} {compression:6} {width:4} {of.bytes / 1e6:9.1f} {of.launches:8} "
                    f"{floor:9.0f}  {beside}"
                )


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--bandwidth", type=float, default=3350.0, help="GB/s of the GPU's memory")
    parser.add_argument("--context", type=int, default=_CONTEXT, help="tokens in the cache")
    parser.add_argument("--measured", type=Path, help="folder with the forward.json of bench.gpu")
    options = parser.parse_args(arguments)
    measured: list[Row] = []
    if options.measured is not None:
        measured = json.loads((options.measured / "forward.json").read_text())["rows"]
    print("\n".join(table(options.bandwidth, options.context, measured)))


if __name__ == "__main__":
    main()
