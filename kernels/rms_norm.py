"""RMSNorm of rows, with the residual addition before it; one launch.

With a residual, ``x`` is first replaced by ``h = x + residual``, rounded to the type of ``x`` and
stored over the residual. Then, in fp32 with one rounding at the end (Zhang and Sennrich, 2019)::

    y = x / sqrt(mean(x^2) + eps) * weight

Rules: a row is one program's, so its bits depend on nothing but itself; NaN and infinities stay in
their row. Only a row whose length is no power of two is masked.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
import triton
import triton.language as tl
from torch import Tensor

from . import functional
from .checks import check_tensor, dtype_name
from .device import EMULATED, _round
from .registry import FP_FUSION, KernelSpec, Variant

COLUMNS_MAX = 32_768


@triton.jit
def _load(ptr, mask, EVEN: tl.constexpr):
    if EVEN:
        return tl.load(ptr).to(tl.float32)
    return tl.load(ptr, mask=mask, other=0.0).to(tl.float32)


@triton.jit
def _rms_norm_kernel(
    # inputs
    x_ptr,  # [rows, columns]
    weight_ptr,  # [columns]
    residual_ptr,  # [rows, columns]
    # output
    out_ptr,  # [rows, columns]
    # shape
    stride_x,
    stride_residual,
    stride_out,
    columns,
    eps,
    # constants
    HAS_RESIDUAL: tl.constexpr,
    EVEN: tl.constexpr,
    BLOCK: tl.constexpr,
    EMULATED: tl.constexpr,
):
    i_row = tl.program_id(0).to(tl.int64)
    o = tl.arange(0, BLOCK)
    mask = o < columns
    dtype = out_ptr.dtype.element_ty
    x = _load(x_ptr + i_row * stride_x + o, mask, EVEN)
    if HAS_RESIDUAL:
        residual_ptr += i_row * stride_residual + o
        rounded = _round(x + _load(residual_ptr, mask, EVEN), dtype, EMULATED)
        tl.debug_barrier()  # no thread may be about to load what another stores
        tl.store(residual_ptr, rounded, mask=mask)
        x = rounded.to(tl.float32)
    scale = tl.rsqrt(tl.sum(x * x, 0) / columns + eps)
    y = x * scale * _load(weight_ptr + o, mask, EVEN)
    tl.store(out_ptr + i_row * stride_out + o, _round(y, dtype, EMULATED), mask=mask)


@dataclass(frozen=True)
class Config:
    """``block``: the power of two at or above the columns, which a program of a row holds."""

    block: int
    num_warps: int


def _select_config(columns: int) -> Config:
    """A thread holds 8 or 16 elements as far as 16 warps go."""
    block = max(triton.next_power_of_2(columns), 256)
    return Config(block, num_warps=min(max(block // 512, 1), 16))


def rms_norm_out(
    x: Tensor, weight: Tensor, eps: float, *, out: Tensor, residual: Tensor | None = None
) -> None:
    """Launch `rms_norm` on arguments that it would accept; nothing else.

    No allocation, no synchronisation: safe to capture in a CUDA graph. Runs on CPU tensors in
    Triton's interpreter.

    Parameters
    ----------
    x, weight, eps, out, residual
        As in `rms_norm`.
    """
    rows, columns = x.shape
    if rows == 0:
        return
    config = _select_config(columns)
    # The stride of a single row means nothing, and must not choose another compilation.
    _rms_norm_kernel[(rows,)](
        x,
        weight,
        residual,
        out,
        x.stride(0) if rows > 1 else columns,
        columns if residual is None or rows == 1 else residual.stride(0),
        out.stride(0) if rows > 1 else columns,
        columns,
        eps,
        HAS_RESIDUAL=residual is not None,
        EVEN=columns == config.block,
        BLOCK=config.block,
        EMULATED=EMULATED,
        num_warps=config.num_warps,
        enable_fp_fusion=FP_FUSION,
    )


def rms_norm(
    x: Tensor,
    weight: Tensor,
    eps: float,
    *,
    residual: Tensor | None = None,
    out: Tensor | None = None,
) -> Tensor:
    """``x / sqrt(mean(x^2) + eps) * weight``, of ``x + residual`` if there is one.

    On CPU tensors this is `functional.rms_norm`, elsewhere one kernel launch.

    Parameters
    ----------
    x : fp32 | fp16 | bf16 [M, K]
        Unit stride in K, any row stride; K at most 32,768. Not mutated, unless it is also ``out``.
    weight : Tensor [K]
        Of the type of ``x``, as are ``residual`` and ``out``.
    eps : float
        Added to the mean square.
    residual : Tensor [M, K], optional
        Unit stride in K. Overwritten with ``x + residual``, which is what is normalised.
    out : Tensor [M, K], optional
        Overwritten. Unit stride in K; may be ``x``.

    Returns
    -------
    Tensor [M, K]
        ``out``, or a new tensor.

    Raises
    ------
    TypeError, ValueError
        Naming the argument, what was expected and what came.
    """
    check_tensor("x", x, "floating", (None, None))
    rows, columns = x.shape
    if not 1 <= columns <= COLUMNS_MAX:
        raise ValueError(f"x: expected 1 to {COLUMNS_MAX} columns, got {columns}")
    dtype = dtype_name(x.dtype)
    check_tensor("weight", weight, dtype, (columns,), x.device, dense=True)
    if residual is not None:
        check_tensor("residual", residual, dtype, (rows, columns), x.device)
    if out is None:
        out = torch.empty(rows, columns, dtype=x.dtype, device=x.device)
    check_tensor("out", out, dtype, (rows, columns), x.device)
    if x.device.type == "cpu":
        if residual is not None:
            x = residual.add_(x)
        out.copy_(functional.rms_norm(x, weight, eps))
    else:
        rms_norm_out(x, weight, eps, out=out, residual=residual)
    return out


def _variant(dtype: str, columns: int, *, residual: bool) -> Variant:
    """What `rms_norm_out` would launch."""
    config = _select_config(columns)
    pointers = ("x_ptr", "weight_ptr", "out_ptr", *(("residual_ptr",) if residual else ()))
    sizes = ("stride_x", "stride_residual", "stride_out", "columns")
    signature = {n: f"*{dtype}" for n in pointers} | {n: "i32" for n in sizes} | {"eps": "fp32"}
    aligned = columns % 16 == 0
    return Variant(
        name=f"{dtype}-K{columns}{'-residual' if residual else ''}",
        signature=signature,
        constexprs={
            **({} if residual else {"residual_ptr": None}),
            "HAS_RESIDUAL": residual,
            "EVEN": columns == config.block,
            "BLOCK": config.block,
            "EMULATED": False,
        },
        divisible=frozenset({*pointers, *(sizes if aligned else ())}),
        num_warps=config.num_warps,
    )


SPECS = (
    KernelSpec(
        name="rms_norm",
        kernel=_rms_norm_kernel,
        variants=(
            _variant("bf16", 2048, residual=False),
            _variant("bf16", 2048, residual=True),
            _variant("bf16", 576, residual=True),
            _variant("fp16", 8192, residual=True),
            _variant("fp32", 4096, residual=True),
            _variant("bf16", 1031, residual=True),
            _variant("bf16", 16_384, residual=True),
        ),
        max_registers=128,
        max_shared_bytes=8192,
    ),
)
