"""Rotary embedding of queries and keys, and the append of keys and values to the cache; one launch.

For a head ``x`` of a row at position p, in fp32 with one rounding at the end, with ``(c, s)`` the
cosines and signed sines of row p of the table (Su et al., RoFormer, 2021, in the half-split form of
the Llama checkpoints)::

    x = x / sqrt(mean(x^2) + eps) * weight[head]      with a head norm (Qwen3)
    x = x * c + roll(x, head_dim / 2) * s

Queries go to ``out``; rotated keys, and the values as they are, to row p of the sequence's slot of
the cache. Rules: a head of a row depends on nothing but itself; NaN and infinities stay in it.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
import triton
import triton.language as tl
from torch import Tensor

from . import functional
from .checks import check_tensor, dtype_name
from .device import EMULATED, _round, _wait
from .registry import FP_FUSION, KernelSpec, Variant

HEAD_DIM_MAX = 512


@triton.jit
def _load(ptr, mask):
    return tl.load(ptr, mask=mask, other=0.0).to(tl.float32)


@triton.jit(do_not_specialize=["width"])
def _rope_append_kernel(
    # inputs
    qkv_ptr,  # [rows, heads + 2 * kv_heads, head_dim]
    table_ptr,  # [positions, 2, head_dim]
    positions_ptr,  # [rows]
    slots_ptr,  # [rows / width]
    weight_ptr,  # [heads + kv_heads, head_dim]
    # outputs
    out_ptr,  # [rows, heads, head_dim]
    cache_ptr,  # [slots, cache rows, 2 * kv_heads, head_dim]
    # shape
    stride_qkv,
    stride_slot,
    stride_position,
    width,
    eps,
    # constants
    HEADS: tl.constexpr,
    KV_HEADS: tl.constexpr,
    HEAD_DIM: tl.constexpr,
    HAS_NORM: tl.constexpr,
    BLOCK_H: tl.constexpr,
    BLOCK_D: tl.constexpr,
    PDL: tl.constexpr,
    EMULATED: tl.constexpr,
):
    _wait(PDL)
    HALF: tl.constexpr = HEAD_DIM // 2
    i_row = tl.program_id(0).to(tl.int64)
    position = tl.load(positions_ptr + i_row)
    slot = tl.load(slots_ptr + i_row // width)
    o_head = tl.program_id(1) * BLOCK_H + tl.arange(0, BLOCK_H)[:, None]
    o_d = tl.arange(0, BLOCK_D)[None, :]
    m_d = o_d < HALF
    mask = m_d & (o_head < HEADS + 2 * KV_HEADS)
    m_rotated = m_d & (o_head < HEADS + KV_HEADS)
    dtype = out_ptr.dtype.element_ty

    x_ptr = qkv_ptr + i_row * stride_qkv + o_head * HEAD_DIM + o_d
    low = _load(x_ptr, mask)
    high = _load(x_ptr + HALF, mask)
    first, second = low, high
    if HAS_NORM:
        mean = (tl.sum(low * low, 1) + tl.sum(high * high, 1)) / HEAD_DIM
        scale = tl.rsqrt(mean + eps)[:, None]
        w_ptr = weight_ptr + o_head * HEAD_DIM + o_d
        first = low * scale * _load(w_ptr, m_rotated)
        second = high * scale * _load(w_ptr + HALF, m_rotated)
    table_ptr += position * (2 * HEAD_DIM) + o_d
    rotated_low = first * _load(table_ptr, m_d) + second * _load(table_ptr + HEAD_DIM, m_d)
    rotated_high = second * _load(table_ptr + HALF, m_d) + first * _load(
        table_ptr + HEAD_DIM + HALF, m_d
    )
    low = _round(tl.where(m_rotated, rotated_low, low), dtype, EMULATED)
    high = _round(tl.where(m_rotated, rotated_high, high), dtype, EMULATED)

    m_query = m_d & (o_head < HEADS)
    out_ptr += i_row * (HEADS * HEAD_DIM) + o_head * HEAD_DIM + o_d
    tl.store(out_ptr, low, mask=m_query)
    tl.store(out_ptr + HALF, high, mask=m_query)
    m_kv = mask & (o_head >= HEADS)
    cache_ptr += slot * stride_slot + position * stride_position
    cache_ptr += (o_head - HEADS) * HEAD_DIM + o_d
    tl.store(cache_ptr, low, mask=m_kv)
    tl.store(cache_ptr + HALF, high, mask=m_kv)


@dataclass(frozen=True)
class Config:
    """``block_h`` heads of a row are one program's; ``block_d`` covers half a head."""

    block_h: int
    block_d: int
    num_warps: int = 1


def _select_config(head_dim: int) -> Config:
    """A warp holds 8 elements of each half in every thread: 16 bytes of 16-bit floats."""
    block_d = triton.next_power_of_2(head_dim // 2)
    return Config(max(256 // block_d, 1), block_d)


def rope_append_out(
    qkv: Tensor,
    table: Tensor,
    positions: Tensor,
    slots: Tensor,
    cache: Tensor,
    *,
    out: Tensor,
    head_norm: Tensor | None = None,
    eps: float = 0.0,
    pdl: bool = False,
) -> None:
    """Launch `rope_append` on arguments that it would accept; nothing else.

    No allocation, no synchronisation: safe to capture in a CUDA graph. Runs on CPU tensors in
    Triton's interpreter.

    Parameters
    ----------
    qkv, table, positions, slots, cache, out, head_norm, eps
        As in `rope_append`.
    pdl : bool
        Programmatic dependent launch: from compute capability 9.0 on.
    """
    rows, total, head_dim = qkv.shape
    if rows == 0:
        return
    kv_heads = cache.shape[2] // 2
    config = _select_config(head_dim)
    # The stride of a single row means nothing, and must not choose another compilation.
    _rope_append_kernel[(rows, triton.cdiv(total, config.block_h))](
        qkv,
        table,
        positions,
        slots,
        head_norm,
        out,
        cache,
        qkv.stride(0) if rows > 1 else total * head_dim,
        cache.stride(0),
        cache.stride(1),
        positions.shape[1],
        eps,
        HEADS=total - 2 * kv_heads,
        KV_HEADS=kv_heads,
        HEAD_DIM=head_dim,
        HAS_NORM=head_norm is not None,
        BLOCK_H=config.block_h,
        BLOCK_D=config.block_d,
        PDL=pdl,
        EMULATED=EMULATED,
        num_warps=config.num_warps,
        launch_pdl=pdl,
        enable_fp_fusion=FP_FUSION,
    )


def rope_append(
    qkv: Tensor,
    table: Tensor,
    positions: Tensor,
    slots: Tensor,
    cache: Tensor,
    *,
    head_norm: Tensor | None = None,
    eps: float = 0.0,
    out: Tensor | None = None,
) -> Tensor:
    """Rotate queries and keys, return the queries, and write keys and values to the cache.

    On CPU tensors these are the operations of `functional`, elsewhere one kernel launch, which
    rounds once instead of after every operation.

    Parameters
    ----------
    qkv : fp32 | fp16 | bf16 [rows, heads + 2 * kv_heads, head_dim]
        Queries, keys, values of ``batch * width`` rows; any row stride, else contiguous. On the CPU
        a head norm overwrites it.
    table : Tensor [positions, 2, head_dim]
        Of the type of ``qkv``, from `functional.rope_table`.
    positions : int64 [batch, width]
        Position of each row, below those of the table and of the cache. Not checked.
    slots : int64 [batch]
        Slot of each sequence. Not checked.
    cache : Tensor [slots, cache rows, 2 * kv_heads, head_dim]
        Of the type of ``qkv``; keys, then values; contiguous heads. Mutated at the positions.
    head_norm : Tensor [heads + kv_heads, head_dim], optional
        Weights of the norm of each head of the queries and keys.
    eps : float
        Of the head norm.
    out : Tensor [rows, heads, head_dim], optional
        Contiguous; overwritten.

    Returns
    -------
    Tensor [rows, heads, head_dim]
        The queries: ``out``, or a new tensor.

    Raises
    ------
    TypeError, ValueError
        Naming the argument, what was expected and what came.
    """
    check_tensor("qkv", qkv, "floating", (None, None, None))
    rows, total, head_dim = qkv.shape
    dtype, device = dtype_name(qkv.dtype), qkv.device
    if head_dim % 2 or not 2 <= head_dim <= HEAD_DIM_MAX:
        raise ValueError(f"qkv: expected an even head_dim up to {HEAD_DIM_MAX}, got {head_dim}")
    if qkv.stride(1) != head_dim:
        raise ValueError(f"qkv: expected contiguous heads, got strides {qkv.stride()}")
    check_tensor("table", table, dtype, (None, 2, head_dim), device, dense=True)
    check_tensor("positions", positions, "int64", (None, None), device, dense=True)
    batch, width = positions.shape
    if batch * width != rows:
        raise ValueError(f"positions: expected {rows} in all, got {batch} x {width}")
    check_tensor("slots", slots, "int64", (batch,), device, dense=True)
    check_tensor("cache", cache, dtype, (None, None, None, head_dim), device)
    heads = total - cache.shape[2]
    if heads < 1 or cache.shape[2] % 2 or cache.stride(2) != head_dim:
        raise ValueError(
            "cache: expected contiguous heads, an even number below the "
            f"{total} of qkv, got {cache.shape[2]} of strides {cache.stride()}"
        )
    if head_norm is not None:
        shape = (total - cache.shape[2] // 2, head_dim)
        check_tensor("head_norm", head_norm, dtype, shape, device, dense=True)
    if out is None:
        out = torch.empty(rows, heads, head_dim, dtype=qkv.dtype, device=device)
    check_tensor("out", out, dtype, (rows, heads, head_dim), device, dense=True)
    if device.type != "cpu":
        rope_append_out(qkv, table, positions, slots, cache, out=out, head_norm=head_norm, eps=eps)
        return out
    if head_norm is not None:
        functional.head_rms_norm(qkv, head_norm, eps)
    rotated = total - cache.shape[2] // 2
    factors = functional.rope_rows(table, positions.view(-1), rotated, total)
    turned = functional.rope(qkv, *factors)
    out.copy_(turned[:, :heads])
    kv = turned[:, heads:].view(batch, width, -1, head_dim)
    functional.append_kv(cache, kv, slots[:, None], positions)
    return out


def _variant(
    dtype: str, heads: int, kv_heads: int, head_dim: int, *, norm: bool, pdl: bool = False
) -> Variant:
    """What `rope_append_out` would launch."""
    config = _select_config(head_dim)
    floats = ("qkv_ptr", "table_ptr", "out_ptr", "cache_ptr", *(("weight_ptr",) if norm else ()))
    signature = {n: f"*{dtype}" for n in floats}
    signature |= {"positions_ptr": "*i64", "slots_ptr": "*i64", "eps": "fp32"}
    signature |= {n: "i32" for n in ("stride_qkv", "stride_slot", "stride_position", "width")}
    suffix = f"{'-norm' if norm else ''}{'-pdl' if pdl else ''}"
    return Variant(
        name=f"{dtype}-H{heads}-{kv_heads}-D{head_dim}{suffix}",
        signature=signature,
        constexprs={
            **({} if norm else {"weight_ptr": None}),
            "HEADS": heads,
            "KV_HEADS": kv_heads,
            "HEAD_DIM": head_dim,
            "HAS_NORM": norm,
            "BLOCK_H": config.block_h,
            "BLOCK_D": config.block_d,
            "PDL": pdl,
            "EMULATED": False,
        },
        pdl=pdl,
        divisible=frozenset(signature) - {"eps", "width"},
        num_warps=config.num_warps,
    )


SPECS = (
    KernelSpec(
        name="rope_append",
        kernel=_rope_append_kernel,
        variants=(
            _variant("bf16", 32, 8, 64, norm=False),
            _variant("bf16", 32, 8, 128, norm=False),
            _variant("fp16", 9, 3, 64, norm=False),
            _variant("bf16", 16, 8, 128, norm=True),
            _variant("fp32", 16, 8, 64, norm=True),
            _variant("bf16", 4, 2, 80, norm=False),
            _variant("bf16", 32, 8, 64, norm=False, pdl=True),
        ),
        max_registers=128,
        max_shared_bytes=4096,
    ),
)
