"""`rms_norm` in the interpreter, against its formula in float64."""

from __future__ import annotations

import importlib

import pytest
import torch
from torch import Tensor

from speckv import kernels
from tests.kernels.cases import WORD, guarded
from tests.tolerances import assert_close

rms_norm_module = importlib.import_module("speckv.kernels.rms_norm")
EPS = 1e-3
DTYPES = (torch.float32, torch.float16, torch.bfloat16)


def random(*shape: int, dtype: torch.dtype, seed: int = 0) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed)).to(dtype)


def expected(x: Tensor, weight: Tensor) -> Tensor:
    y = x.double()
    return (y / (y.square().mean(1, keepdim=True) + EPS).sqrt() * weight.double()).to(x.dtype)


def launch(x: Tensor, weight: Tensor, residual: Tensor | None = None) -> Tensor:
    """The kernel's result, written between guards."""
    whole, out = guarded(*x.shape, dtype=x.dtype, pad=3)
    rms_norm_module.rms_norm_out(x, weight, EPS, out=out, residual=residual)
    found = out.clone()
    out.fill_(WORD)
    assert (whole == torch.tensor(WORD).to(x.dtype)).all()
    return found


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("columns", [1, 7, 111, 256, 576, 1031, 2048])
def test_the_kernel_equals_the_formula(columns: int, dtype: torch.dtype) -> None:
    x = random(5, columns + 2, dtype=dtype)[:, :columns]
    weight = random(columns, dtype=dtype, seed=1)
    assert_close(launch(x, weight), expected(x, weight), dtype)
    residual_whole, residual = guarded(5, columns, dtype=dtype, pad=4)
    before = random(5, columns, dtype=dtype, seed=2)
    residual.copy_(before)
    found = launch(x, weight, residual)
    total = x + before
    assert torch.equal(residual, total)
    assert_close(found, expected(total, weight), dtype)
    residual.fill_(WORD)
    assert (residual_whole == torch.tensor(WORD).to(dtype)).all()


def test_a_row_worked_by_hand() -> None:
    """The mean square of 3, 4, 0, 0 and eps is 6.251."""
    x, weight = torch.tensor([[3.0, 4.0, 0.0, 0.0]]), torch.tensor([1.0, 2.0, 3.0, 4.0])
    root = 6.251**0.5
    assert launch(x, weight)[0].tolist() == pytest.approx([3 / root, 8 / root, 0.0, 0.0])


def test_rows_do_not_see_each_other() -> None:
    weight = random(576, dtype=torch.bfloat16, seed=1)
    x = random(17, 576, dtype=torch.bfloat16)
    clean = launch(x, weight)
    for rows in (1, 2, 3, 16):
        assert torch.equal(launch(x[17 - rows :], weight), clean[17 - rows :])
    x[3, 5], x[9, 0] = float("nan"), float("inf")
    found = launch(x, weight)
    assert found[3].isnan().all() and found[9, 0].isnan()
    others = [i for i in range(17) if i not in (3, 9)]
    assert torch.equal(found[others], clean[others])


def test_in_place_and_without_rows() -> None:
    weight, x = random(48, dtype=torch.float16), random(3, 48, dtype=torch.float16, seed=1)
    apart = launch(x, weight)
    rms_norm_module.rms_norm_out(x, weight, EPS, out=x)
    assert torch.equal(x, apart)
    assert launch(x[:0], weight).shape == (0, 48)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_the_twin_on_the_cpu(dtype: torch.dtype) -> None:
    weight, x = random(96, dtype=dtype), random(3, 96, dtype=dtype, seed=1)
    assert_close(kernels.rms_norm(x, weight, EPS), expected(x, weight), dtype)
    residual = random(3, 96, dtype=dtype, seed=2)
    total = x + residual
    found = kernels.rms_norm(x, weight, EPS, residual=residual, out=x)
    assert found is x and torch.equal(residual, total)
    assert_close(found, expected(total, weight), dtype)


def test_bad_arguments_are_refused() -> None:
    x, weight = torch.zeros(2, 8), torch.zeros(8)
    for arguments, error, message in (
        ((x[0], weight), ValueError, r"x: expected floating \[any, any\]"),
        ((x.int(), weight), TypeError, "x: expected floating"),
        ((torch.zeros(2, 0), weight), ValueError, "x: expected 1 to 32768 columns, got 0"),
        ((x, weight[:7]), ValueError, r"weight: expected float32 \[8\]"),
        ((x, weight.half()), TypeError, "weight: expected float32"),
    ):
        with pytest.raises(error, match=message):
            kernels.rms_norm(*arguments, EPS)
    with pytest.raises(ValueError, match=r"residual: expected float32 \[2, 8\]"):
        kernels.rms_norm(x, weight, EPS, residual=x[:1])
    with pytest.raises(TypeError, match="out: expected float32"):
        kernels.rms_norm(x, weight, EPS, out=x.half())
