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
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from bench.lab import Lab, Row, nothing
from speckv.models.config import DecoderConfig
from speckv.models.fused import LAUNCHES_PER_LAYER
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
    """The decoder's view of a shape."""
    from transformers import LlamaConfig

    return DecoderConfig.from_transformers(LlamaConfig(**sizes, max_position_embeddings=131_072))


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


def traffic(config: DecoderConfig, compression: str, rows: int, context: int) -> Traffic:
    """The bytes and launches of a forward of one sequence.

    Parameters
    ----------
    compression : str
        Weight format; activations are 16 bits wide, or 32 in fp32.
    rows : int
        New positions.
    context : int
        Positions in the cache before them.
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
        cache=2 * keys * width * (seen + 2 * rows * c.layers),
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


def forward_rows(lab: Lab) -> Iterator[Row]:
    """Whole forwards, captured into a graph, at every width, beside their bytes.

    Logits at every width must have the bits of those at width 1.
    """
    models = {"tiny": TINY} if lab.dry else {n: MODELS[n] for n in MODELS if "SmolLM2" not in n}
    if lab.quick:
        models = dict(list(models.items())[:1])
    context = 16 if lab.dry else _CONTEXT
    for name, sizes in models.items():
        config = shape(sizes)
        for compression in COMPRESSIONS:
            yield from _forwards(lab, name, config, compression, context)


def _forwards(
    lab: Lab, name: str, config: DecoderConfig, compression: str, context: int
) -> Iterator[Row]:
    torch.manual_seed(0)
    model = LlamaDecoder.from_tensors(
        config,
        RandomTensors(config, lab.device),
        name=name,
        compression=compression,
        dtype=torch.bfloat16,
        device=lab.device,
        invariant=False,
    )
    cache = model.new_cache(1, context + 32)
    ids = torch.randint(0, config.vocab_size, (context + 16,), device=lab.device)
    model.prefill(ids[:context], cache, 0, want_logits=False)
    start = torch.tensor([context], device=lab.device)
    slots = torch.zeros(1, dtype=torch.int64, device=lab.device)
    alone = [
        model.forward(ids[None, context + i : context + i + 1], start + i, cache, slots=slots)[0, 0]
        for i in range(max(WIDTHS))
    ]
    for width in WIDTHS:
        block = ids[None, context : context + width].contiguous()
        forward = partial(model.forward, block, start, cache, slots=slots)
        found = forward()[0]
        pairs = zip(found, alone, strict=False)
        # A dry run takes the references, whose bits do depend on the width.
        same = lab.dry or all(torch.equal(row, other) for row, other in pairs)
        floor = traffic(config, compression, width, context)
        row = {
            "name": "forward",
            "model": name,
            "compression": compression,
            "width": width,
            "context": context,
            "bytes": floor.bytes,
            "launches_planned": floor.launches,
            "matches_reference": same,
        }
        yield row | (lab.time([forward] * (2 if lab.dry else 4), nothing) if same else {})


def table(bandwidth: float, context: int, measured: Sequence[Row]) -> Iterator[str]:
    """Lines of what `main` prints."""
    times = {
        (r["model"], r["compression"], r["width"], r["context"]): r["kernel_us"]["p50"]
        for r in measured
        if r.get("kernel_us")
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
