"""The bytes and launches of a forward, against the tensors and the calls of a real one."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import fields, is_dataclass
from typing import Any

import pytest
import torch
from torch import Tensor

from bench import roofline
from bench.lab import Lab
from speckv.models.config import DecoderConfig
from speckv.models.fused import FusedLayer
from speckv.models.llama import LlamaDecoder

CPU = torch.device("cpu")


@pytest.mark.parametrize("name", roofline.MODELS)
def test_shapes_are_those_of_transformers(name: str) -> None:
    from transformers import LlamaConfig

    sizes = roofline.MODELS[name]
    config = LlamaConfig(**sizes, max_position_embeddings=131_072)
    expected, found = vars(DecoderConfig.from_transformers(config)), vars(roofline.shape(sizes))
    assert torch.equal(found.pop("inv_freq"), expected.pop("inv_freq")) and found == expected


def build(compression: str) -> LlamaDecoder:
    config = roofline.shape(roofline.TINY)
    return LlamaDecoder.from_tensors(
        config,
        roofline.RandomTensors(config, CPU),
        name="tiny",
        compression=compression,
        dtype=torch.bfloat16,
        device=CPU,
        invariant=False,
    )


def stored(value: Any) -> Iterator[Tensor]:
    """Every tensor of a fused layer that a forward reads, but the values of the codes."""
    if isinstance(value, Tensor):
        yield value
    elif is_dataclass(value) and not isinstance(value, type):
        for field in fields(value):
            if field.name != "table":
                yield from stored(getattr(value, field.name))
    elif value is not None and hasattr(value, "_weight"):
        yield from stored(value._weight)
        yield from stored(value._bias)
        yield from stored(value._norm)


@pytest.mark.parametrize("compression", ["bf16", "int8", "nf4"])
def test_bytes_are_those_of_the_tensors(compression: str) -> None:
    model = build(compression)
    layers = [layer.fused for layer in model._weights.layers]
    assert all(isinstance(layer, FusedLayer) for layer in layers)
    weights = sum(t.nbytes for layer in layers for t in stored(layer))
    head = sum(t.nbytes for t in stored(model._weights.fused_head))
    found = roofline.traffic(model.config, compression, rows=3, context=40)
    norm = model.config.hidden * 2
    assert found.weights + found.head == weights + head
    assert found.weights == weights + norm
    per_position = model.new_cache(1, 16).kv[0][0, 0].nbytes * model.config.layers
    assert found.cache == per_position * (40 + 2 * 3)
    assert found.bytes == found.weights + found.head + found.cache


def test_packed_formats_are_smaller_and_more_rows_move_more() -> None:
    config = roofline.shape(roofline.MODELS["Llama-3.1-8B"])
    sizes = [roofline.traffic(config, name, 1, 512).weights for name in ("bf16", "int8", "nf4")]
    assert sizes[0] == pytest.approx(2 * sizes[1], rel=1e-3)
    assert sizes[0] == pytest.approx(2 * 6.98e9, rel=0.01), "its layers have 6.98e9 parameters"
    assert sizes[2] == pytest.approx(sizes[0] / 4 * (1 + 1 / 8), rel=1e-2), "scales of 64 weights"
    few, many = (roofline.traffic(config, "nf4", rows, 512) for rows in (1, 16))
    assert few.activations * 16 == many.activations and few.cache < many.cache
    assert few.weights == many.weights and few.launches == many.launches == 32 * 6 + 4
    assert few.floor_us(3350.0) == pytest.approx(few.bytes / 3350.0e9 * 1e6)


def test_a_table_with_what_was_measured() -> None:
    row = {"model": "Llama-3.2-1B", "compression": "bf16", "width": 1, "context": 512}
    lines = list(roofline.table(3350.0, 512, [{**row, "kernel_us": {"p50": 1000.0}}]))
    assert len(lines) == 1 + len(roofline.MODELS) * 3 * len(roofline.WIDTHS)
    (line,) = (line for line in lines if "1000 us" in line)
    assert line.startswith("Llama-3.2-1B   bf16      1") and line.endswith("74% of the bandwidth")


def test_the_dry_run_forwards_every_format_at_every_width() -> None:
    copy, *rows = roofline.forward_rows(Lab(quick=False, dry=True))
    assert copy["name"] == "copy"
    shapes = [*((1, width) for width in roofline.WIDTHS), (2, 16)]
    assert [(r["compression"], r["batch"], r["width"]) for r in rows] == [
        (compression, *shape) for compression in roofline.COMPRESSIONS for shape in shapes
    ]
    assert all(row["kernel_us"] is row["share_of_copy"] is None for row in rows)
    two, one = rows[5]["bytes"], rows[4]["bytes"]
    assert two - one == 2 * 2 * 2 * 16 * 2 * (16 + 2 * 16), "keys and values of a second sequence"
