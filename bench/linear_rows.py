"""Rows of `linear`: products of few rows, as a share of the bandwidth at which the GPU copies.

Activations are bf16, and the weights of Llama-3.2-1B's and Llama-3.1-8B's shapes are random.
PyTorch's product of the same shape, and bitsandbytes' own nf4 product, stand beside them.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from bench.lab import Lab, Row, nothing
from speckv import kernels
from speckv.kernels import reference_linear
from speckv.kernels.packed import Int8Weight, Nf4Weight, Weight
from speckv.models.quantize import compress

_WIDTHS = (1, 3, 5, 9, 16, 32)
_SHAPES = (
    ("1B qkv", 3072, 2048, False),
    ("1B gate-up", 16_384, 2048, True),
    ("1B down", 2048, 8192, False),
    ("1B head", 128_256, 2048, False),
    ("8B qkv", 6144, 4096, False),
    ("8B gate-up", 28_672, 4096, True),
    ("8B down", 4096, 14_336, False),
)
_COPIED_BYTES = 1 << 28

Calls = Sequence[Callable[[], Any]]


def linear_rows(lab: Lab) -> Iterator[Row]:
    """`linear` in bf16, int8 and nf4, at every width, beside what others make of the shape."""
    copied = 1 << 12 if lab.dry else _COPIED_BYTES
    source = torch.zeros(copied, dtype=torch.uint8, device=lab.device)
    target = torch.empty_like(source)
    row = lab.time([partial(target.copy_, source)] * lab.launches(2), nothing)
    row = {"name": "copy", "dtype": "uint8", "bytes": 2 * copied, **row}
    bandwidth = None if lab.dry else row["bytes"] / row["kernel_us"]["p50"]
    yield row | {"bytes_per_us": bandwidth}
    for shape in _shapes(lab):
        for kind in ("bf16", "int8", "nf4"):
            if kind == "bf16" or "head" not in shape[0]:
                yield from _shape_rows(lab, bandwidth, *shape, kind)


def _shapes(lab: Lab) -> Sequence[tuple[str, int, int, bool]]:
    if lab.dry:
        return [("tiny", 96, 128, False), ("tiny gate-up", 96, 128, True)]
    return _SHAPES[:3] if lab.quick else _SHAPES


def _shape_rows(
    lab: Lab, bandwidth: float | None, name: str, rows: int, depth: int, swiglu: bool, kind: str
) -> Iterator[Row]:
    dense = torch.randn(rows, depth, device=lab.device, dtype=torch.bfloat16) * depth**-0.5
    weight = compress(dense, kind, torch.bfloat16)
    size = _bytes(weight)
    weights = [weight, *(_copy(weight) for _ in range(lab.copies(size) - 1))]
    count = lab.launches(len(weights))
    products = [kernels.Linear(w, dtype=torch.bfloat16, swiglu=swiglu) for w in weights]
    for width in (1, 5) if lab.quick or lab.dry else _WIDTHS:
        x = torch.randn(width, depth, device=lab.device, dtype=torch.bfloat16)
        out = torch.empty(width, products[0].columns, device=lab.device, dtype=torch.bfloat16)
        facts = {"shape": name, "kind": kind, "rows": rows, "depth": depth, "width": width}
        facts |= {"dtype": "bf16", "bytes": size, "copies": len(weights)}
        products[0](x, out=out)
        want = torch.empty_like(out)
        reference_linear.linear(x, weight, out=want, swiglu=swiglu)
        same = torch.allclose(out.float(), want.float(), rtol=2e-2, atol=2e-2)
        row = {"name": "linear", **facts, "matches_reference": same}
        if same:
            turns = [products[i % len(products)] for i in range(count)]
            calls: Calls = [partial(product, x, out=out) for product in turns]
            row |= _shared(lab.time(calls, nothing), size, bandwidth)
        yield row
        others: Callable[[Tensor], Calls] | None = None
        if kind == "bf16":
            others = partial(_torch_calls, [w for w in weights if isinstance(w, Tensor)], count)
        elif kind == "nf4":
            others = partial(_bitsandbytes_calls, dense, len(weights), count)
        if others is not None:
            other = {"name": "F.linear" if kind == "bf16" else "bitsandbytes.matmul_4bit", **facts}
            yield other | _shared(lab.time(others(x), nothing), size, bandwidth)


def _torch_calls(weights: Sequence[Tensor], count: int, x: Tensor) -> Calls:
    return [partial(F.linear, x, weights[i % len(weights)]) for i in range(count)]


def _bitsandbytes_calls(dense: Tensor, copies: int, count: int, x: Tensor) -> Calls:
    import bitsandbytes

    quantize = partial(bitsandbytes.functional.quantize_4bit, blocksize=64, quant_type="nf4")
    packed = [quantize(dense) for _ in range(copies)]
    turns = [packed[i % copies] for i in range(count)]
    return [partial(bitsandbytes.matmul_4bit, x, codes.t(), state) for codes, state in turns]


def _shared(times: Row, size: int, bandwidth: float | None) -> Row:
    """With the share of the bandwidth of a copy at which the weight is read."""
    share = None
    if bandwidth is not None:
        share = size / times["kernel_us"]["p50"] / bandwidth
    return {**times, "share_of_copy": share}


def _tensors(weight: Weight) -> tuple[Tensor, ...]:
    if isinstance(weight, Int8Weight):
        return weight.codes, weight.scale
    return (weight.codes, weight.absmax) if isinstance(weight, Nf4Weight) else (weight,)


def _bytes(weight: Weight) -> int:
    return sum(tensor.numel() * tensor.element_size() for tensor in _tensors(weight))


def _copy(weight: Weight) -> Weight:
    if isinstance(weight, Int8Weight):
        return Int8Weight(weight.codes.clone(), weight.scale)
    if isinstance(weight, Nf4Weight):
        return replace(weight, codes=weight.codes.clone(), absmax=weight.absmax.clone())
    return weight.clone()
