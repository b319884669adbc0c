"""`expand` in the interpreter, and its twin, against weights written out one by one.

Every comparison is of bits: products are of two fp32 numbers and are rounded once.
"""

from __future__ import annotations

import importlib
from dataclasses import replace

import pytest
import torch
from torch import Tensor

from speckv import kernels
from speckv.kernels.packed import Int8Weight, NestedScales, Nf4Weight
from tests.kernels.cases import WORD, guarded

expand_module = importlib.import_module("speckv.kernels.expand")

DTYPES = (torch.float32, torch.float16, torch.bfloat16)
INT8_SHAPES = ((1, 1), (3, 2048), (2, 2049), (5, 576), (4, 31))
NF4_SHAPES = ((1, 64), (70, 64), (3, 1088), (5, 63), (1, 1), (2, 80), (129, 65))


def random(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def codes_of(low: int, high: int, *shape: int, dtype: torch.dtype) -> Tensor:
    generator = torch.Generator().manual_seed(7)
    return torch.randint(low, high, shape, generator=generator, dtype=dtype)


def int8_weight(rows: int, columns: int) -> Int8Weight:
    codes = codes_of(-127, 128, rows, columns, dtype=torch.int8)
    return Int8Weight(codes, random(rows).abs())


def nf4_weight(rows: int, columns: int, *, nested: bool) -> Nf4Weight:
    """One whose code table is not the standard one."""
    total = rows * columns
    blocks, size = -(-total // 64), -(-total // 2)
    codes, table = codes_of(0, 256, size, dtype=torch.uint8), random(16, seed=1)
    if not nested:
        return Nf4Weight(codes, random(blocks, seed=2).abs(), table, (rows, columns))
    outer = -(-blocks // 256)
    scales = NestedScales(random(256, seed=3), random(outer, seed=4), random(outer, seed=5))
    absmax = codes_of(0, 256, blocks, dtype=torch.uint8)
    return Nf4Weight(codes, absmax, table, (rows, columns), scales)


def int8_values(weight: Int8Weight) -> Tensor:
    """In fp32, code by code."""
    rows, columns = weight.shape
    return torch.stack(
        [
            weight.codes[n, k].float() * (weight.scale[n] / 127)
            for n in range(rows)
            for k in range(columns)
        ]
    ).view(rows, columns)


def nf4_values(weight: Nf4Weight) -> Tensor:
    """In fp32, code by code."""
    values = []
    for i in range(weight.shape[0] * weight.shape[1]):
        byte, block = int(weight.codes[i // 2]), i // 64
        scale, nested = weight.absmax[block], weight.nested
        if nested is not None:
            outer = nested.absmax[block // 256], nested.offset[block // 256]
            scale = nested.table[int(scale)] * outer[0] + outer[1]
        values.append(weight.table[byte % 16 if i % 2 else byte // 16] * scale)
    return torch.stack(values).view(weight.shape)


def launch(weight: Int8Weight | Nf4Weight, dtype: torch.dtype) -> Tensor:
    """The kernel's result, written between guards."""
    whole, out = guarded(*weight.shape, dtype=dtype)
    expand_module.expand_out(weight, out=out)
    found = out.clone()
    out.fill_(WORD)
    assert (whole == torch.tensor(WORD).to(dtype)).all()
    return found


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("shape", INT8_SHAPES, ids=str)
def test_int8_codes_are_written_out(shape: tuple[int, int], dtype: torch.dtype) -> None:
    weight = int8_weight(*shape)
    expected = int8_values(weight).to(dtype)
    assert torch.equal(launch(weight, dtype), expected)
    assert torch.equal(kernels.expand(weight, dtype), expected)


@pytest.mark.parametrize("nested", [False, True], ids=["plain", "nested"])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("shape", NF4_SHAPES, ids=str)
def test_nf4_codes_are_written_out(
    shape: tuple[int, int], dtype: torch.dtype, nested: bool
) -> None:
    weight = nf4_weight(*shape, nested=nested)
    expected = nf4_values(weight).to(dtype)
    assert torch.equal(launch(weight, dtype), expected)
    assert torch.equal(kernels.expand(weight, dtype), expected)


def test_scales_of_many_blocks_have_scales_of_their_own() -> None:
    """More than one block of 256 scales, in more than one program."""
    weight = nf4_weight(300, 64, nested=True)
    expected = nf4_values(weight)
    assert torch.equal(launch(weight, torch.float32), expected)
    assert not torch.equal(expected[256:], nf4_values(nf4_weight(300, 64, nested=False))[256:])


def test_a_nan_stays_in_its_row_or_block() -> None:
    rows, blocks = int8_weight(3, 40), nf4_weight(3, 64, nested=False)
    rows.scale[1] = blocks.absmax[1] = float("nan")
    for weight in (rows, blocks):
        found = launch(weight, torch.bfloat16).isnan()
        assert found[1].all() and not found[[0, 2]].any()


def test_out_is_written() -> None:
    out = torch.zeros(2, 80, dtype=torch.float16)
    weight = int8_weight(2, 80)
    assert kernels.expand(weight, torch.float16, out=out) is out
    assert torch.equal(out, weight.expand(torch.float16))


def test_bad_arguments_are_refused() -> None:
    weight, packed = int8_weight(2, 8), nf4_weight(2, 64, nested=True)
    assert packed.nested is not None
    short = replace(packed.nested, absmax=torch.zeros(2), offset=torch.zeros(2))
    for bad, error, message in (
        (torch.zeros(2, 8), TypeError, "weight: expected Int8Weight or Nf4Weight, got Tensor"),
        (replace(weight, scale=weight.scale[:1]), ValueError, r"weight.scale: .*float32 \[2\]"),
        (replace(weight, codes=weight.codes.T), ValueError, "weight.*: expected"),
        (replace(packed, codes=packed.codes[:9]), ValueError, r"weight.codes: .*uint8 \[64\]"),
        (replace(packed, nested=None), TypeError, r"weight.absmax: expected float32 \[2\]"),
        (replace(packed, nested=short), ValueError, r"weight.nested.absmax: .*float32 \[1\]"),
    ):
        with pytest.raises(error, match=message):
            kernels.expand(bad, torch.float16)
    with pytest.raises(TypeError, match=r"dtype: expected torch.float32, .* got torch.int8"):
        kernels.expand(weight, torch.int8)
    with pytest.raises(ValueError, match=r"out: expected float16 \[2, 8\]"):
        kernels.expand(weight, torch.float16, out=torch.zeros(2, 7).half())
    with pytest.raises(TypeError, match="out: expected float16"):
        kernels.expand(weight, torch.float16, out=torch.zeros(2, 8))
