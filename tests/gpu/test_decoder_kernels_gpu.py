"""Products and attention on a GPU: the compiled kernels against their twins, their bits, races."""

from __future__ import annotations

from dataclasses import fields, is_dataclass, replace
from functools import partial
from typing import Any

import pytest
import torch
from torch import Tensor

from speckv import kernels
from speckv.kernels import functional, reference_linear
from speckv.kernels.nf4_lookup import NF4_TABLE
from speckv.kernels.packed import Int8Weight, NestedScales, Nf4Weight, Weight
from tests.tolerances import assert_close

pytestmark = pytest.mark.gpu

DEVICE = "cuda"
KINDS = ("dense", "int8", "nf4", "nested", "table")
WIDTHS = (*range(1, 18), 33, 136)
SHAPES = ((2048, 2048), (1032, 576), (96, 8192))


def random(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def weight_of(kind: str, rows: int, depth: int, dtype: torch.dtype) -> Weight:
    """A random weight whose products with unit normal rows are about 1."""
    size = depth**-0.5
    if kind == "dense":
        return (size * random(rows, depth)).to(dtype)
    if kind == "int8":
        codes = (40 * random(rows, depth)).clamp(-127, 127).to(torch.int8)
        return Int8Weight(codes, 3 * size * random(rows, seed=1).abs())
    blocks = rows * depth // 64
    codes = (random(rows * depth // 2) * 80).to(torch.int16).to(torch.uint8)
    table, nested = torch.tensor(NF4_TABLE), None
    if kind == "table":
        table = table.flip(0).contiguous()
    absmax = 2 * size * random(blocks, seed=1).abs()
    if kind == "nested":
        outer = size * random(-(-blocks // 256), seed=2).abs()
        nested = NestedScales(random(256, seed=3), outer, torch.tensor(size))
        absmax = (random(blocks, seed=1) * 80).to(torch.int16).to(torch.uint8)
    return Nf4Weight(codes, absmax, table, (rows, depth), nested)


def on_device(value: Any) -> Any:
    """A tensor, or a dataclass with all its tensors, on the GPU."""
    if isinstance(value, Tensor):
        return value.to(DEVICE)
    if is_dataclass(value) and not isinstance(value, type):
        return replace(value, **{f.name: on_device(getattr(value, f.name)) for f in fields(value)})
    return value


@pytest.mark.parametrize(
    ("dtype", "rows", "depth"),
    [*((torch.bfloat16, *shape) for shape in SHAPES), (torch.float16, *SHAPES[1])],
)
@pytest.mark.parametrize("swiglu", [False, True], ids=["plain", "swiglu"])
@pytest.mark.parametrize("kind", KINDS)
def test_linear_equals_its_twin_with_the_same_bits_at_every_width(
    kind: str, rows: int, depth: int, swiglu: bool, dtype: torch.dtype
) -> None:
    weight = weight_of(kind, rows, depth, dtype)
    columns = rows // 2 if swiglu else rows
    x, bias = random(136, depth).to(dtype), random(rows, seed=4).to(dtype)
    residual = random(136, columns, seed=5).to(dtype)
    expected = torch.empty_like(residual)
    reference_linear.linear(x, weight, out=expected, bias=bias, residual=residual, swiglu=swiglu)
    x, residual = x.to(DEVICE), residual.to(DEVICE)
    run = partial(kernels.linear, weight=on_device(weight), bias=bias.to(DEVICE), swiglu=swiglu)
    together = run(x, residual=residual)
    assert_close(together.cpu(), expected, dtype)
    for width in WIDTHS:
        for first in (0, 136 - width):
            part = slice(first, first + width)
            assert torch.equal(run(x[part], residual=residual[part]), together[part])


@pytest.mark.parametrize("depth", [1, 7, 111, 1031])
@pytest.mark.parametrize("kind", ["dense", "int8"])
def test_linear_of_an_odd_depth(kind: str, depth: int) -> None:
    weight = weight_of(kind, 257, depth, torch.bfloat16)
    x = random(5, depth).to(torch.bfloat16)
    found = kernels.linear(x.to(DEVICE), on_device(weight))
    assert_close(found.cpu(), kernels.linear(x, weight), torch.bfloat16)


def attention_case(head_dim: int, window: int | None) -> dict[str, Any]:
    """Two sequences that end on both sides of a chunk; what is beyond them is NaN."""
    cache = random(3, 1024, 8, head_dim)
    positions = torch.stack((torch.arange(16) + 760, torch.arange(16) + 3))
    slots = torch.tensor([2, 0])
    queries = random(2, 16, 16, head_dim, seed=1)
    return {
        "queries": queries.to(torch.bfloat16),
        "cache": cache.to(torch.bfloat16),
        "positions": positions,
        "slots": slots,
        "window": window,
    }


@pytest.mark.parametrize("window", [None, 300])
@pytest.mark.parametrize("head_dim", [64, 128, 256])
def test_attention_equals_its_twin_with_the_same_bits_at_every_width(
    head_dim: int, window: int | None
) -> None:
    case = attention_case(head_dim, window)
    expected = kernels.attention(**case)
    case["cache"][2, 776:], case["cache"][0, 19:] = float("nan"), float("nan")
    case = {name: on_device(value) for name, value in case.items()}
    together = kernels.attention(**case)
    assert_close(together.cpu(), expected, torch.bfloat16)
    for width in range(1, 17):
        for b in range(2):
            part = slice(16 - width, 16)
            alone = {
                **case,
                "queries": case["queries"][b : b + 1, part].contiguous(),
                "positions": case["positions"][b : b + 1, part].contiguous(),
                "slots": case["slots"][b : b + 1],
            }
            assert torch.equal(kernels.attention(**alone), together[b : b + 1, part])


def test_rope_append_equals_its_twin_in_fp32() -> None:
    table = functional.rope_table(100.0 ** -torch.linspace(0, 1, 64), 1.0, 64, torch.float16)
    qkv, cache = random(6, 20, 128, seed=1).half(), random(2, 64, 8, 128, seed=2).half()
    places = torch.tensor([[4, 5, 6], [31, 32, 33]]), torch.tensor([1, 0])
    full = cache.float()
    expected = kernels.rope_append(qkv.float(), table.float(), *places, full)
    moved = [on_device(tensor) for tensor in (qkv, table, *places, cache.clone())]
    found = kernels.rope_append(*moved)
    assert_close(found.cpu(), expected.half(), torch.float16)
    assert_close(moved[-1].cpu(), full.half(), torch.float16)


@pytest.mark.parametrize("columns", [576, 2048, 16_384])
def test_rms_norm_equals_its_twin(columns: int) -> None:
    x, residual = random(17, columns).bfloat16(), random(17, columns, seed=1).bfloat16()
    weight = random(columns, seed=2).bfloat16()
    moved = residual.clone().to(DEVICE)
    found = kernels.rms_norm(x.to(DEVICE), weight.to(DEVICE), 1e-5, residual=moved)
    expected = kernels.rms_norm(x, weight, 1e-5, residual=residual)
    assert_close(found.cpu(), expected, torch.bfloat16)
    assert torch.equal(moved.cpu(), residual)
