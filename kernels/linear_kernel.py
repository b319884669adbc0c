"""The device half of `linear`: ``y = x @ W.T`` for few rows, at the speed at which ``W`` is read.

A program computes a tile of 16 rows by ``BLOCK_N`` columns over one split of the depth K, in fp32,
block after block of K. The splits of a tile store their sums; the last one to arrive adds them in
index order. Then, in fp32, with ``n`` a row of ``W`` and a single rounding at the end::

    y[n] = scale[n] * sum_k(x[k] * W[n, k]) + bias[n]          scale: int8 only, SCB / 127
    y[n] = silu(y[n]) * y[n + columns]                         SWIGLU: gate rows, then up rows
    y[n] = y[n] + residual[n]

A NORM takes the product of the RMS-normalised rows (Zhang and Sennrich, 2019): elements of ``x``
are multiplied by the norm's weight, rounded to the type of ``x``, as they are read, their squares
are summed on the way, and the sums times ``norm_scale`` are divided by ``sqrt(mean(x²) + eps)``
before the bias.

nf4 (Dettmers et al., QLoRA, 2023) scales by blocks of 64 along K. The sum over a block is taken of
the bare code values, rounded to the type of ``x``, and is then scaled by the block's ``absmax``:
one multiplication a block and column instead of one a weight. A byte holds two neighbours in K,
and is looked up as a pair: one register of what the tensor cores take.

Rules: neither the blocks, nor the splits, nor their order depend on how many rows there are or on
where in its tile a row is, so its bits do not either. NaN and infinities stay in their row. Weight
rows past the last are read as the last one, and what comes of them is not stored; rows of ``x``
past the last are read as zeros.

With PDL a program asks for the weights of its first blocks before it waits for the kernel that
makes its ``x``: weights are all that no kernel writes.
"""

from __future__ import annotations

import triton
import triton.language as tl

from .device import _round, _wait
from .linear_config import TILE_ROWS
from .nf4_lookup import NF4_BF16, NF4_FP16

_ROWS: tl.constexpr = tl.constexpr(TILE_ROWS)
_LOOKUP_BF16: tl.constexpr = tl.constexpr(NF4_BF16)
_LOOKUP_FP16: tl.constexpr = tl.constexpr(NF4_FP16)


@triton.jit
def _dot(x, w, acc, EMULATED: tl.constexpr):
    """``acc + x @ w.T``, with ``w`` of the type of ``x`` or int8, which that type holds exactly.

    The interpreter computes wrongly in bf16; in fp32, products of 16-bit floats are exact as well.
    """
    if EMULATED:
        acc = tl.dot(x.to(tl.float32), tl.trans(w.to(tl.float32)), acc, input_precision="ieee")
    else:
        acc = tl.dot(x, tl.trans(w.to(x.dtype)), acc)
    return acc


@triton.jit
def _load_block(ptr, m_rows, m_depth, EVEN: tl.constexpr):
    """A block of ``x``: rows past the last, and where K has a tail elements past it, are 0."""
    if EVEN:
        return tl.load(ptr, mask=m_rows, other=0)
    return tl.load(ptr, mask=m_rows & m_depth, other=0)


@triton.jit
def _load_weight(ptr, m_depth, EVEN: tl.constexpr):
    if EVEN:
        return tl.load(ptr)
    return tl.load(ptr, mask=m_depth, other=0)


@triton.jit
def _prefetch(ptr, o_row, row_bytes, first_byte, BLOCK_N: tl.constexpr, LINES: tl.constexpr):
    """Ask for ``LINES`` cache lines of each row of weights from ``first_byte`` on, into L2."""
    o_byte = tl.minimum(first_byte + tl.arange(0, LINES) * 128, row_bytes - 1)
    at = ptr.to(tl.pointer_type(tl.uint8)) + o_row[:, None] * row_bytes + o_byte[None, :]
    tl.inline_asm_elementwise(
        "prefetch.global.L2 [$1]; // $0", "=r,l", [at], tl.int32, is_pure=False, pack=1
    )


@triton.jit
def _weigh(x, norm, squares, EMULATED: tl.constexpr):
    """``x`` times the norm's weight, rounded, and ``squares`` plus the sums of its squares."""
    wide = x.to(tl.float32)
    squares += tl.sum(wide * wide, axis=1)
    return _round(wide * norm.to(tl.float32)[None, :], x.dtype, EMULATED), squares


@triton.jit
def _sum_dense(
    x_ptr,
    norm_ptr,
    weight_ptr,
    up_ptr,
    stride_x,
    m_rows,
    o_row,
    depth,
    first,
    last,
    NORM: tl.constexpr,
    SWIGLU: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
    EVEN: tl.constexpr,
    EMULATED: tl.constexpr,
):
    """Sums over blocks ``first .. last - 1`` of K; weights are 16-bit floats or int8 codes.

    ``weight_ptr`` and ``up_ptr`` are at the first weight row of the tile, whose rows are ``o_row``.
    """
    o_k = tl.arange(0, BLOCK_K)
    o_w = o_row * depth
    o_x = tl.arange(0, _ROWS) * stride_x
    acc = tl.zeros([_ROWS, BLOCK_N], tl.float32)
    acc_up = acc
    squares = tl.zeros([_ROWS], tl.float32)
    for i_block in range(first, last):
        k = i_block * BLOCK_K
        m_depth = (k + o_k < depth)[None, :]
        x = _load_block(x_ptr + o_x[:, None] + (k + o_k)[None, :], m_rows[:, None], m_depth, EVEN)
        if NORM:
            norm = _load_weight(norm_ptr + k + o_k, k + o_k < depth, EVEN)
            x, squares = _weigh(x, norm, squares, EMULATED)
        o_weight = o_w[:, None] + (k + o_k)[None, :]
        w = _load_weight(weight_ptr + o_weight, m_depth, EVEN)
        acc = _dot(x, w, acc, EMULATED)
        if SWIGLU:
            w = _load_weight(up_ptr + o_weight, m_depth, EVEN)
            acc_up = _dot(x, w, acc_up, EMULATED)
    return acc, acc_up, squares


@triton.jit
def _absmax(
    scale_ptr,
    nested_code_ptr,
    nested_absmax_ptr,
    offset_ptr,
    o_block,
    NESTED: tl.constexpr,
    SUBS: tl.constexpr,
):
    """Scales [BLOCK_N, SUBS] from the blocks ``o_block`` [BLOCK_N] on, a multiple of ``SUBS``.

    Nested ones are codes of blocks of 256 scales, which ``SUBS`` divides.
    """
    scale = tl.load(scale_ptr + o_block[:, None] + tl.arange(0, SUBS)[None, :])
    if NESTED:
        outer = tl.load(nested_absmax_ptr + (o_block >> 8))[:, None]
        offset = tl.load(offset_ptr + (o_block >> 8))[:, None]
        scale = tl.load(nested_code_ptr + scale.to(tl.int32)) * outer + offset
    return scale


@triton.jit
def _column(scales, i: tl.constexpr, SUBS: tl.constexpr):
    """Column ``i`` of [N, SUBS], of which a thread holds whole rows; 1, 2 or 4 of them."""
    if SUBS == 1:
        column = tl.reshape(scales, [scales.shape[0]])
    else:
        if SUBS == 4:
            even, odd = tl.split(tl.reshape(scales, [scales.shape[0], 2, 2]))
            scales = odd if i % 2 else even
        first, second = tl.split(scales)
        column = second if i * 2 // SUBS else first
    return column


@triton.jit
def _values(codes, table_ptr, dtype: tl.constexpr, STANDARD: tl.constexpr):
    """Values [N, 64] of the weights in bytes [N, 32], rounded to ``dtype``."""
    if STANDARD:
        LOOKUP: tl.constexpr = _LOOKUP_BF16 if dtype == tl.bfloat16 else _LOOKUP_FP16
        pair = tl.inline_asm_elementwise(
            LOOKUP, "=r,=r,=r,=r,r", [codes], tl.int32, is_pure=True, pack=4
        )
        first = pair.to(tl.int16).to(dtype, bitcast=True)
        second = (pair >> 16).to(tl.int16).to(dtype, bitcast=True)
    else:
        code = codes.to(tl.int32)
        first = tl.load(table_ptr + (code >> 4))
        second = tl.load(table_ptr + (code & 15))
    return tl.reshape(tl.join(first, second), [codes.shape[0], 2 * codes.shape[1]])


@triton.jit
def _sum_block(x, codes, absmax, table_ptr, acc, STANDARD, EMULATED):
    """``acc`` plus the sum over one block of 64 elements of K."""
    w = _values(codes, table_ptr, x.dtype, STANDARD)
    return acc + _dot(x, w, tl.zeros_like(acc), EMULATED) * absmax[None, :]


@triton.jit
def _sum_nf4(
    x_ptr,
    norm_ptr,
    weight_ptr,
    up_ptr,
    scale_ptr,
    nested_code_ptr,
    nested_absmax_ptr,
    offset_ptr,
    table_ptr,
    stride_x,
    m_rows,
    o_row,
    o_n,
    o_up,
    depth,
    first,
    last,
    NORM: tl.constexpr,
    NESTED: tl.constexpr,
    STANDARD: tl.constexpr,
    SWIGLU: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
    STAGES: tl.constexpr,
    EMULATED: tl.constexpr,
):
    """`_sum_dense` of packed nf4; ``o_n`` and ``o_up`` index weight rows."""
    o_byte = tl.arange(0, 32)
    o_x = tl.arange(0, _ROWS) * stride_x
    acc = tl.zeros([_ROWS, BLOCK_N], tl.float32)
    acc_up = acc
    squares = tl.zeros([_ROWS], tl.float32)
    SUBS: tl.constexpr = BLOCK_K // 64
    blocks = depth // BLOCK_K * SUBS  # written so as to be seen to be a multiple of SUBS
    o_w = o_row * (blocks * 32)
    # Stages of the loop itself make the scales be prefetched too, which no product reads.
    for i_step in tl.range(first, last, num_stages=STAGES):
        o_block = o_n * blocks + i_step * SUBS
        scales = _absmax(
            scale_ptr, nested_code_ptr, nested_absmax_ptr, offset_ptr, o_block, NESTED, SUBS
        )
        scales_up = scales
        if SWIGLU:
            o_block = o_up * blocks + i_step * SUBS
            scales_up = _absmax(
                scale_ptr, nested_code_ptr, nested_absmax_ptr, offset_ptr, o_block, NESTED, SUBS
            )
        for i_sub in tl.static_range(SUBS):
            i_block = i_step * SUBS + i_sub
            o_k = i_block * 64 + tl.arange(0, 64)
            o_codes = o_w[:, None] + (i_block * 32 + o_byte)[None, :]
            # Codes ahead of ``x``: the other way round takes more registers.
            codes = tl.load(weight_ptr + o_codes)
            codes_up = codes
            if SWIGLU:
                codes_up = tl.load(up_ptr + o_codes)
            x = tl.load(x_ptr + o_x[:, None] + o_k[None, :], mask=m_rows[:, None], other=0)
            if NORM:
                x, squares = _weigh(x, tl.load(norm_ptr + o_k), squares, EMULATED)
            absmax = _column(scales, i_sub, SUBS)
            acc = _sum_block(x, codes, absmax, table_ptr, acc, STANDARD, EMULATED)
            if SWIGLU:
                absmax = _column(scales_up, i_sub, SUBS)
                acc_up = _sum_block(x, codes_up, absmax, table_ptr, acc_up, STANDARD, EMULATED)
    return acc, acc_up, squares


@triton.jit
def _finish(
    acc,
    row_scale,
    scale_ptr,
    bias_ptr,
    o_n,
    NORM: tl.constexpr,
    INT8: tl.constexpr,
    HAS_BIAS: tl.constexpr,
):
    """Scale normalised rows and int8 columns, and add the bias."""
    if NORM:
        acc = acc * row_scale[:, None]
    if INT8:
        acc = acc * (tl.load(scale_ptr + o_n) * (1.0 / 127.0))[None, :]
    if HAS_BIAS:
        acc = acc + tl.load(bias_ptr + o_n).to(tl.float32)[None, :]
    return acc


@triton.jit(do_not_specialize=["rows"])
def _linear_kernel(
    # inputs
    x_ptr,  # [rows, K]
    norm_ptr,  # [K]
    weight_ptr,  # [N, K]; uint8 [N, K / 2] for nf4
    scale_ptr,  # int8: [N]; nf4: [N * K / 64]
    nested_code_ptr,  # [256]
    nested_absmax_ptr,  # [N * K / 64 / 256]
    offset_ptr,  # as nested_absmax
    table_ptr,  # [16], of the type of x
    bias_ptr,  # [N]
    residual_ptr,  # [rows, columns]
    # output and scratch
    out_ptr,  # [rows, columns]
    partials_ptr,  # [row tiles, column tiles, SPLITS, (1 or 2) * TILE_ROWS * BLOCK_N + squares]
    counters_ptr,  # [row tiles, column tiles], zero between launches
    # shape
    stride_x,
    stride_residual,
    stride_out,
    rows,
    columns,
    depth,
    eps,
    norm_scale,
    # constants
    KIND: tl.constexpr,  # "dense", "int8", "nf4"
    NORM: tl.constexpr,
    SWIGLU: tl.constexpr,
    NESTED: tl.constexpr,
    STANDARD: tl.constexpr,
    HAS_BIAS: tl.constexpr,
    HAS_RESIDUAL: tl.constexpr,
    SPLITS: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
    EVEN: tl.constexpr,
    STAGES: tl.constexpr,
    PDL: tl.constexpr,
    EMULATED: tl.constexpr,
):
    i_row_tile = tl.program_id(0).to(tl.int64)
    i_tile = tl.program_id(1)
    i_split = tl.program_id(2)
    o_row = tl.arange(0, _ROWS)
    m_rows = i_row_tile * _ROWS + o_row < rows
    x_ptr += i_row_tile * _ROWS * stride_x
    o_column = i_tile * BLOCK_N + tl.arange(0, BLOCK_N)
    o_n = tl.minimum(o_column, columns - 1)
    start = i_tile.to(tl.int64) * BLOCK_N
    blocks = tl.cdiv(depth, BLOCK_K)
    first = blocks * i_split // SPLITS
    last = blocks * (i_split + 1) // SPLITS
    if PDL:
        BITS: tl.constexpr = 4 if KIND == "nf4" else weight_ptr.dtype.element_ty.primitive_bitwidth
        BYTES: tl.constexpr = BLOCK_K * BITS // 8
        LINES: tl.constexpr = max(STAGES * BYTES // 128, 1)
        row_bytes = depth * BITS // 8
        w = weight_ptr.to(tl.pointer_type(tl.uint8))
        o_own = o_n - i_tile * BLOCK_N
        _prefetch(w + start * row_bytes, o_own, row_bytes, first * BYTES, BLOCK_N, LINES)
        if SWIGLU:
            w += (start + columns) * row_bytes
            _prefetch(w, o_own, row_bytes, first * BYTES, BLOCK_N, LINES)
    _wait(PDL)

    if KIND == "nf4":
        acc, acc_up, squares = _sum_nf4(
            x_ptr,
            norm_ptr,
            weight_ptr + start * (depth // 2),
            weight_ptr + (start + columns) * (depth // 2),
            scale_ptr,
            nested_code_ptr,
            nested_absmax_ptr,
            offset_ptr,
            table_ptr,
            stride_x,
            m_rows,
            o_n - i_tile * BLOCK_N,
            o_n,
            columns + o_n,
            depth,
            first,
            last,
            NORM,
            NESTED,
            STANDARD,
            SWIGLU,
            BLOCK_N,
            BLOCK_K,
            STAGES,
            EMULATED,
        )
    else:
        acc, acc_up, squares = _sum_dense(
            x_ptr,
            norm_ptr,
            weight_ptr + start * depth,
            weight_ptr + (start + columns) * depth,
            stride_x,
            m_rows,
            o_n - i_tile * BLOCK_N,
            depth,
            first,
            last,
            NORM,
            SWIGLU,
            BLOCK_N,
            BLOCK_K,
            EVEN,
            EMULATED,
        )

    if SPLITS > 1:
        SIZE: tl.constexpr = _ROWS * BLOCK_N
        SUMS: tl.constexpr = SIZE * (2 if SWIGLU else 1)
        STEP: tl.constexpr = SUMS + (_ROWS if NORM else 0)
        i_counter = i_row_tile * tl.num_programs(1) + i_tile
        o_tile = o_row[:, None] * BLOCK_N + tl.arange(0, BLOCK_N)[None, :]
        m_tile = m_rows[:, None] & (o_column >= 0)[None, :]
        p = partials_ptr + i_counter * (SPLITS * STEP) + o_tile
        tl.store(p + i_split * STEP, acc, mask=m_tile)
        if SWIGLU:
            tl.store(p + i_split * STEP + SIZE, acc_up, mask=m_tile)
        q = partials_ptr + i_counter * (SPLITS * STEP) + SUMS + o_row
        if NORM:
            tl.store(q + i_split * STEP, squares, mask=m_rows)
        tl.debug_barrier()
        arrived = tl.atomic_add(counters_ptr + i_counter, 1, sem="acq_rel")
        if arrived != SPLITS - 1:
            return
        tl.store(counters_ptr + i_counter, 0)
        # .cg: from L2, where the other programs' stores are.
        acc = tl.load(p, m_tile, 0.0, cache_modifier=".cg")
        if SWIGLU:
            acc_up = tl.load(p + SIZE, m_tile, 0.0, cache_modifier=".cg")
        if NORM:
            squares = tl.load(q, m_rows, 0.0, cache_modifier=".cg")
        for i in tl.static_range(1, SPLITS):
            acc += tl.load(p + i * STEP, m_tile, 0.0, cache_modifier=".cg")
            if SWIGLU:
                acc_up += tl.load(p + i * STEP + SIZE, m_tile, 0.0, cache_modifier=".cg")
            if NORM:
                squares += tl.load(q + i * STEP, m_rows, 0.0, cache_modifier=".cg")

    row_scale = squares
    if NORM:
        row_scale = norm_scale / tl.sqrt(squares / depth + eps)
    INT8: tl.constexpr = KIND == "int8"
    acc = _finish(acc, row_scale, scale_ptr, bias_ptr, o_n, NORM, INT8, HAS_BIAS)
    if SWIGLU:
        acc_up = _finish(
            acc_up, row_scale, scale_ptr, bias_ptr, columns + o_n, NORM, INT8, HAS_BIAS
        )
        acc = acc / (1.0 + tl.exp(-acc)) * acc_up
    o_row = i_row_tile * _ROWS + o_row
    mask = m_rows[:, None] & (o_column < columns)[None, :]
    if HAS_RESIDUAL:
        residual_ptr += o_row[:, None] * stride_residual + o_column[None, :]
        acc += tl.load(residual_ptr, mask=mask, other=0).to(tl.float32)
    out_ptr += o_row[:, None] * stride_out + o_column[None, :]
    tl.store(out_ptr, _round(acc, out_ptr.dtype.element_ty, EMULATED), mask=mask)
