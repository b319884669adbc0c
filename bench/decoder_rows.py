"""Rows of what a decoder launches besides plain products.

They are attention, RoPE, products with norms and epilogues, and packed weights written out. Shapes
are those of Llama-3.2-1B and Llama-3.1-8B. Attention reads the keys and values of every position
before it once: these are its bytes.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from bench.lab import Calls, Lab, Row, isolated, nothing
from bench.linear_rows import SHAPES, copy_of, packed, shared, weight_bytes
from speckv import kernels
from speckv.kernels import functional, reference_linear
from speckv.kernels.packed import Weight
from speckv.models.fused import row_operations

_HEADS = {"Llama-3.1-8B": (32, 8, 128), "Llama-3.2-1B": (32, 8, 64)}
_CONTEXTS = (512, 4096, 32_768)
_WIDTHS = (1, 9, 5, 16)
_ROOM = 32
_EPS = 1e-5


def attention_rows(lab: Lab) -> Iterator[Row]:
    """Attention of a block at the end of a context, and RoPE with the append to the cache."""
    copy = lab.copied()
    yield copy
    heads = {"tiny": (4, 2, 16)} if lab.dry else _HEADS
    for model, sizes in heads.items():
        for context in (40,) if lab.dry else _CONTEXTS[: 2 if lab.quick else None]:
            for width in _WIDTHS[: 2 if lab.quick or lab.dry else None]:
                facts = {"model": model, "context": context, "width": width, "dtype": "bf16"}
                rows = partial(_attention, lab, copy["bytes_per_us"], facts, sizes)
                yield from isolated({"name": "attention", **facts}, rows)


def _attention(
    lab: Lab, bandwidth: float | None, facts: Row, sizes: tuple[int, int, int]
) -> Iterator[Row]:
    heads, kv_heads, head_dim = sizes
    width, context = facts["width"], facts["context"]
    rows, seen = context + _ROOM, context + width
    size = 2 * 2 * kv_heads * head_dim * seen
    caches = torch.randn(
        lab.copies(size), rows, 2 * kv_heads, head_dim, device=lab.device, dtype=torch.bfloat16
    )
    count, copies = lab.launches(len(caches)), len(caches)
    qkv = _random(lab, width, heads + 2 * kv_heads, head_dim)
    positions = torch.arange(context, seen, device=lab.device)[None]
    slots = torch.arange(copies, device=lab.device)
    rope, attend = row_operations(lab.device)
    table = functional.rope_table(
        10_000.0 ** -torch.linspace(0, 1, head_dim // 2), 1.0, rows, torch.bfloat16
    ).to(lab.device)
    queries = torch.empty(width, heads, head_dim, device=lab.device, dtype=torch.bfloat16)
    facts = {**facts, "batch": 1, "bytes": size, "copies": copies}

    appends = [
        partial(rope, qkv, table, positions, slots[i % copies, None], caches, out=queries)
        for i in range(count)
    ]
    yield {"name": "rope_append", **facts, **lab.time(appends, nothing)}
    blocks = queries.view(1, width, heads, head_dim)
    out = torch.empty_like(blocks)
    options: dict[str, Any] = {"out": out, "scratch": _scratch(lab, blocks, kv_heads, rows)}
    calls: Calls = [
        partial(attend, blocks, caches, positions, slots[i % copies, None], **options)
        for i in range(count)
    ]
    calls[0]()
    mask = functional.attention_mask(positions, seen, torch.bfloat16, None)
    want = functional.attention(blocks, caches, slots[:1], mask).view_as(out)
    same = torch.allclose(out.float(), want.float(), rtol=2e-2, atol=2e-2)
    row: Row = {"name": "attention", **facts, "matches_reference": same}
    yield row | (shared(lab.time(calls, nothing), size, bandwidth) if same else {})
    if width == 1:
        row = {"name": "F.scaled_dot_product_attention", **facts}
        rows_of = partial(_torch_attention, lab, row, blocks, caches, bandwidth)
        yield from isolated(row, rows_of, vital=False)


def _torch_attention(
    lab: Lab, row: Row, blocks: Tensor, caches: Tensor, bandwidth: float | None
) -> Iterator[Row]:
    """One row sees the whole context, so that no mask is needed."""
    half, seen = caches.shape[2] // 2, row["context"] + 1
    calls = []
    for i in range(lab.launches(len(caches))):
        cache = caches[i % len(caches), :seen].transpose(0, 1)[None]  # [1, 2 * kv_heads, seen, D]
        arguments = blocks.transpose(1, 2), cache[:, :half], cache[:, half:]
        calls.append(partial(F.scaled_dot_product_attention, *arguments, enable_gqa=True))
    yield row | shared(lab.time(calls, nothing), row["bytes"], bandwidth)


def _scratch(lab: Lab, blocks: Tensor, kv_heads: int, rows: int) -> object:
    if lab.dry:
        return None
    from speckv.kernels.attention import Scratch

    return Scratch.allocate(blocks.shape, kv_heads, rows, lab.device)


def product_rows(lab: Lab) -> Iterator[Row]:
    """Products as a layer runs them: with its norm, its residual, or through SwiGLU."""
    copy = lab.copied()
    yield copy
    models = ("tiny",) if lab.dry else ("8B", "1B")[: 1 if lab.quick else None]
    for model in models:
        for kind in ("bf16", "nf4", "int8")[: 2 if lab.quick else None]:
            for part in ("qkv", "out", "gate-up", "down", "head"):
                if part == "head" and kind != "bf16":
                    continue
                facts: Row = {"shape": f"{model} {part}", "kind": kind, "dtype": "bf16"}
                rows = partial(_product, lab, copy["bytes_per_us"], facts)
                yield from isolated({"name": "product of a layer", **facts}, rows)


def _product(lab: Lab, bandwidth: float | None, facts: Row) -> Iterator[Row]:
    model, part = facts["shape"].split()
    shapes = SHAPES.get(model, ((part, 96, 128, part == "gate-up"),))
    rows, depth, swiglu = next(shape[1:] for shape in shapes if shape[0] == part)
    dense = _random(lab, rows, depth) * depth**-0.5
    weight = packed(dense, facts["kind"])
    size = weight_bytes(weight)
    weights = [weight, *(copy_of(weight) for _ in range(lab.copies(size) - 1))]
    norm = None if part in ("out", "down") else _random(lab, depth)
    products = [
        kernels.Linear(w, dtype=torch.bfloat16, swiglu=swiglu, norm=norm, eps=_EPS) for w in weights
    ]
    count, columns = lab.launches(len(weights)), products[0].columns
    for width in (1, 9) if lab.dry or lab.quick else (1, 9, 5, 16):
        x = _random(lab, width, depth)
        residual = _random(lab, width, columns) if norm is None else None
        out = torch.empty(width, columns, device=lab.device, dtype=torch.bfloat16)
        want = torch.empty_like(out)
        run: Callable[..., None] = partial(products[0], x, residual, out=out)
        run()
        reference_linear.linear(
            x, weight, out=want, residual=residual, swiglu=swiglu, norm=norm, eps=_EPS
        )
        scale = max(float(want.float().abs().mean()), 1.0)
        same = torch.allclose(out.float(), want.float(), rtol=2e-2, atol=3e-2 * scale)
        row: Row = {"name": "product of a layer", **facts, "rows": rows, "depth": depth}
        row |= {"width": width, "bytes": size, "copies": len(weights), "matches_reference": same}
        if same:
            turns = [products[i % len(products)] for i in range(count)]
            calls: Calls = [partial(product, x, residual, out=out) for product in turns]
            row |= shared(lab.time(calls, nothing), size, bandwidth)
        yield row
    if not isinstance(weight, Tensor):
        yield _expansion(lab, bandwidth, facts, weights)


def _expansion(lab: Lab, bandwidth: float | None, facts: Row, weights: Sequence[Weight]) -> Row:
    """What a packed weight costs where many rows are multiplied: it is written out before."""
    whole = [weight for weight in weights if not isinstance(weight, Tensor)]
    rows, depth = whole[0].shape
    size = weight_bytes(whole[0]) + 2 * rows * depth
    out = torch.empty(rows, depth, device=lab.device, dtype=torch.bfloat16)
    calls: Calls = [
        partial(kernels.expand, whole[i % len(whole)], torch.bfloat16, out=out)
        for i in range(lab.launches(len(whole)))
    ]
    calls[0]()
    same = torch.equal(out, whole[0].expand(torch.bfloat16))
    row: Row = {"name": "expand", **facts, "rows": rows, "depth": depth, "bytes": size}
    row |= {"copies": len(whole), "matches_reference": same}
    return row | (shared(lab.time(calls, nothing), size, bandwidth) if same else {})


def _random(lab: Lab, *shape: int) -> Tensor:
    generator = torch.Generator(lab.device).manual_seed(math.prod(shape))
    return torch.randn(shape, device=lab.device, dtype=torch.bfloat16, generator=generator)
