"""Rows of `linear`: products of few rows, as a share of the bandwidth at which the GPU copies.

Activations are bf16, and the weights, of the shapes of Llama models, are random. Beside them stand
PyTorch's product of the same shape, bitsandbytes' own fused nf4 product (also with absmax values
that are coded themselves, ``nf4 nested``), and its int8 product, which rounds activations to int8
too and whose activations are fp16; its threshold of outliers is 0, with which it can be captured.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from bench.lab import Calls, Lab, Row, isolated, nothing
from speckv import kernels
from speckv.kernels import reference_linear
from speckv.kernels.packed import Int8Weight, NestedScales, Nf4Weight, Weight
from speckv.models.quantize import compress

WIDTHS = (1, 9, 5, 16, 3, 32)
EVERY_WIDTH = ("8B down", "nf4")
"""A shape and a format that are measured at every width up to 16 as well: bitsandbytes has several
kernels, and goes by the width."""
KINDS = ("bf16", "int8", "nf4", "nf4 nested")
SHAPES: dict[str, tuple[tuple[str, int, int, bool], ...]] = {
    "8B": (
        ("gate-up", 28_672, 4096, True),
        ("down", 4096, 14_336, False),
        ("qkv", 6144, 4096, False),
        ("out", 4096, 4096, False),
        ("head", 128_256, 4096, False),
    ),
    "1B": (
        ("gate-up", 16_384, 2048, True),
        ("down", 2048, 8192, False),
        ("head", 128_256, 2048, False),
        ("qkv", 3072, 2048, False),
        ("out", 2048, 2048, False),
    ),
    "3B": (
        ("gate-up", 16_384, 3072, True),
        ("down", 3072, 8192, False),
        ("qkv", 5120, 3072, False),
        ("out", 3072, 3072, False),
        ("head", 128_256, 3072, False),
    ),
}
"""Products of a layer, and the head, of Llama-3.1-8B, Llama-3.2-1B and 3B: rows, K, SwiGLU."""
TINY = (("gate-up", 96, 128, True), ("out", 96, 128, False))

Others = Callable[[Tensor], Calls]


def linear_rows(lab: Lab, model: str = "8B") -> Iterator[Row]:
    """`linear` in every format, at every width, beside what others make of the shape.

    The head is never packed.
    """
    copy = lab.copied()
    yield copy
    shapes = TINY if lab.dry else SHAPES[model][: 2 if lab.quick else None]
    for part, rows, depth, swiglu in shapes:
        for kind in KINDS[:1] if part == "head" else KINDS[: 3 if lab.quick else None]:
            facts: Row = {"shape": f"{model} {part}", "kind": kind, "rows": rows, "depth": depth}
            measure = partial(_shape_rows, lab, copy["bytes_per_us"], facts, swiglu)
            yield from isolated({"name": "linear", **facts}, measure)


def _shape_rows(lab: Lab, bandwidth: float | None, facts: Row, swiglu: bool) -> Iterator[Row]:
    kind, rows, depth = facts["kind"], facts["rows"], facts["depth"]
    dense = torch.randn(rows, depth, device=lab.device, dtype=torch.bfloat16) * depth**-0.5
    weight = packed(dense, kind)
    size = weight_bytes(weight)
    weights = [weight, *(copy_of(weight) for _ in range(lab.copies(size) - 1))]
    count = lab.launches(len(weights))
    products = [kernels.Linear(w, dtype=torch.bfloat16, swiglu=swiglu) for w in weights]
    name, others = _others(dense, weights, kind, count)
    widths: Sequence[int] = WIDTHS
    if lab.quick or lab.dry:
        widths = (1, 9)
    elif (facts["shape"], kind) == EVERY_WIDTH:
        widths = (*WIDTHS, *sorted({*range(1, 17)} - {*WIDTHS}))
    for width in widths:
        x = torch.randn(width, depth, device=lab.device, dtype=torch.bfloat16)
        out = torch.empty(width, products[0].columns, device=lab.device, dtype=torch.bfloat16)
        here = facts | {"width": width, "dtype": "bf16", "bytes": size, "copies": len(weights)}
        products[0](x, out=out)
        want = torch.empty_like(out)
        reference_linear.linear(x, weight, out=want, swiglu=swiglu)
        same = torch.allclose(out.float(), want.float(), rtol=2e-2, atol=2e-2)
        row = {"name": "linear", **here, "matches_reference": same}
        if same:
            turns = [products[i % len(products)] for i in range(count)]
            calls: Calls = [partial(product, x, out=out) for product in turns]
            row |= shared(lab.time(calls, nothing), size, bandwidth)
        yield row
        other = {"name": name, **here}

        def beside(x: Tensor = x, other: Row = other) -> Iterator[Row]:
            yield other | shared(lab.time(others(x), nothing), size, bandwidth)

        yield from isolated(other, beside, vital=False)


def packed(dense: Tensor, kind: str) -> Weight:
    """A weight in one of the `KINDS`.

    Raises
    ------
    ModelError
        If bitsandbytes is needed and missing.
    """
    if kind != "nf4 nested":
        return compress(dense, kind, torch.bfloat16)
    weight = compress(dense, "nf4", torch.bfloat16)
    assert isinstance(weight, Nf4Weight)
    codes, state = _quantized(dense, nested=True)
    inner = state.state2
    scales = NestedScales(inner.code.float(), inner.absmax.float(), state.offset.float())
    return replace(weight, codes=codes.flatten(), absmax=state.absmax, nested=scales)


def _quantized(dense: Tensor, *, nested: bool) -> Any:
    import bitsandbytes

    return bitsandbytes.functional.quantize_4bit(
        dense, blocksize=64, quant_type="nf4", compress_statistics=nested
    )


def _others(dense: Tensor, weights: Sequence[Weight], kind: str, count: int) -> tuple[str, Others]:
    """What stands beside a product: its name, and its calls on some rows."""
    turns = [i % len(weights) for i in range(count)]
    if kind == "bf16":
        tensors = [w for w in weights if isinstance(w, Tensor)]
        return "F.linear", lambda x: [partial(F.linear, x, tensors[i]) for i in turns]
    if kind == "int8":
        whole = [w for w in weights if isinstance(w, Int8Weight)]
        return "bitsandbytes.matmul int8", partial(_int8_calls, whole, turns)
    nested, made = kind == "nf4 nested", list[Any]()

    def four_bits(x: Tensor) -> Calls:
        import bitsandbytes

        if not made:  # once for all widths
            made.extend(_quantized(dense, nested=nested) for _ in weights)
        matmul = bitsandbytes.matmul_4bit
        return [partial(matmul, x, made[i][0].t(), made[i][1]) for i in turns]

    return "bitsandbytes.matmul_4bit", four_bits


def _int8_calls(weights: Sequence[Int8Weight], turns: Sequence[int], x: Tensor) -> Calls:
    import bitsandbytes

    states = [bitsandbytes.MatmulLtState(CB=w.codes, SCB=w.scale) for w in weights]
    for state in states:
        state.has_fp16_weights = state.is_training = False
    half = x.to(torch.float16)
    return [
        partial(bitsandbytes.matmul, half, weights[i].codes, state=states[i], threshold=0.0)
        for i in turns
    ]


def shared(times: Row, size: int, bandwidth: float | None) -> Row:
    """With the share of the bandwidth of a copy at which the weight is read."""
    share = None
    if bandwidth is not None:
        share = size / times["kernel_us"]["p50"] / bandwidth
    return {**times, "share_of_copy": share}


def _tensors(weight: Weight) -> tuple[Tensor, ...]:
    if isinstance(weight, Int8Weight):
        return weight.codes, weight.scale
    if not isinstance(weight, Nf4Weight):
        return (weight,)
    nested = () if weight.nested is None else (weight.nested.absmax,)
    return weight.codes, weight.absmax, *nested


def weight_bytes(weight: Weight) -> int:
    """What a product reads of a weight."""
    return sum(tensor.numel() * tensor.element_size() for tensor in _tensors(weight))


def copy_of(weight: Weight) -> Weight:
    """The weight in other memory."""
    if isinstance(weight, Int8Weight):
        return Int8Weight(weight.codes.clone(), weight.scale)
    if isinstance(weight, Nf4Weight):
        return replace(weight, codes=weight.codes.clone(), absmax=weight.absmax.clone())
    return weight.clone()
