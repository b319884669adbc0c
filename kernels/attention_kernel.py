"""The device half of `attention`: grouped-query attention of a few new positions over the cache.

The query heads that share a key head are rows of one matrix, ``width * group`` of them, in tiles of
16. A program takes one tile over every 32nd chunk of 128 positions, by online softmax in fp32
(Milakov and Gimelshein, 2018), with ``s = q . k / sqrt(head_dim)`` in units of ln 2. Programs store
their maximum, sum and weighted values; the last one to arrive merges them: it takes the maximum of
all, scales each program's by its distance from it, and adds in the order of the programs.

Rules: a row sees the positions up to and including its own, or with a window the last ones of
them. Where a chunk begins and whose it is depends on nothing, and what a row does not see leaves
its sums as they are to the last bit (they are multiplied by 1, and 0 is added), so its bits do not
depend on the rows beside it. NaN stays in its row.
Cache rows that no row of a tile sees are not read; those that only others see must be finite.
"""

from __future__ import annotations

import triton
import triton.language as tl

from .device import _round, _wait

TILE_ROWS: tl.constexpr = tl.constexpr(16)
PROGRAMS = 32
"""Most programs of a tile: enough for a GPU, few enough to be merged soon."""
_PROGRAMS: tl.constexpr = tl.constexpr(PROGRAMS)


@triton.jit
def _dot(a, b, acc, EMULATED: tl.constexpr):
    """``acc + a @ b``. The interpreter computes wrongly in bf16, and rightly in fp32."""
    if EMULATED:
        acc = tl.dot(a.to(tl.float32), b.to(tl.float32), acc, input_precision="ieee")
    else:
        acc = tl.dot(a, b, acc)
    return acc


@triton.jit
def _shift(top, top_new):
    """Factor of sums taken with the maximum ``top``; 0 where they have seen nothing."""
    return tl.exp2(top - tl.where(top_new == float("-inf"), 0.0, top_new))


@triton.jit
def _first_chunk(i_program, first):
    """The first chunk from ``first`` on that is a program's."""
    return first + ((i_program - first) & (_PROGRAMS - 1))


@triton.jit
def _partial(tops_ptr, values_ptr, i, first, last, o_value, m_row, HEAD_DIM: tl.constexpr):
    """Maxima and values of program ``i``, from L2, where the other programs' stores are."""
    m = m_row & (tl.full([TILE_ROWS], 0, tl.int32) + _first_chunk(i, first) <= last)
    top = tl.load(tops_ptr + i * (2 * TILE_ROWS), m, float("-inf"), cache_modifier=".cg")
    p = values_ptr + i * (TILE_ROWS * HEAD_DIM) + o_value
    return top, tl.load(p, m[:, None], 0.0, cache_modifier=".cg")


@triton.jit(do_not_specialize=["width", "kv_heads"])
def _attention_kernel(
    # inputs
    queries_ptr,  # [batch, width, kv_heads * GROUP, HEAD_DIM]
    cache_ptr,  # [slots, cache rows, 2 * kv_heads, HEAD_DIM]
    positions_ptr,  # [batch, width]
    slots_ptr,  # [batch]
    # output and scratch
    out_ptr,  # as the queries
    tops_ptr,  # [batch * kv_heads, tiles, programs, 2, TILE_ROWS]: maxima and sums
    values_ptr,  # [batch * kv_heads, tiles, programs, TILE_ROWS, HEAD_DIM]
    counters_ptr,  # [batch * kv_heads, tiles], zero between launches
    # shape
    stride_slot,
    stride_position,
    width,
    kv_heads,
    scale,  # 1 / (sqrt(HEAD_DIM) ln 2)
    # constants
    GROUP: tl.constexpr,
    HEAD_DIM: tl.constexpr,
    WINDOW: tl.constexpr,  # 0: none
    CHUNK: tl.constexpr,
    BLOCK: tl.constexpr,
    PDL: tl.constexpr,
    EMULATED: tl.constexpr,
):
    _wait(PDL)
    i_program = tl.program_id(0)
    i_tile = tl.program_id(1)
    i_head = tl.program_id(2).to(tl.int64)
    i_batch, i_kv = i_head // kv_heads, i_head % kv_heads
    o_row = tl.arange(0, TILE_ROWS)
    o_query = i_tile * TILE_ROWS + o_row
    m_row = o_query < width * GROUP
    place = tl.load(positions_ptr + i_batch * width + o_query // GROUP, mask=m_row, other=-1)
    place = place.to(tl.int32)
    last = tl.max(place, 0)
    first = 0
    if WINDOW:
        first = tl.maximum(tl.min(tl.where(m_row, place, last), 0) - WINDOW + 1, 0)
    first_chunk, last_chunk = first // CHUNK, last // CHUNK
    i_chunk = _first_chunk(i_program, first_chunk)
    if i_chunk > last_chunk:
        return

    o_d = tl.arange(0, HEAD_DIM)
    row = (i_batch * width + o_query // GROUP) * (kv_heads * GROUP) + i_kv * GROUP
    o_out = (row + o_query % GROUP)[:, None] * HEAD_DIM + o_d[None, :]
    q = tl.load(queries_ptr + o_out, mask=m_row[:, None], other=0.0)
    cache_ptr += tl.load(slots_ptr + i_batch) * stride_slot + i_kv * HEAD_DIM
    top = tl.full([TILE_ROWS], float("-inf"), tl.float32)
    total = tl.zeros([TILE_ROWS], tl.float32)
    acc = tl.zeros([TILE_ROWS, HEAD_DIM], tl.float32)
    # Blocks of all of the program's chunks, in one loop: their loads overlap.
    EACH: tl.constexpr = CHUNK // BLOCK
    before = (last_chunk - i_chunk) // _PROGRAMS  # whole chunks ahead of the last
    left = last + 1 - (i_chunk + before * _PROGRAMS) * CHUNK
    for i_block in range(0, before * EACH + tl.cdiv(tl.minimum(left, CHUNK), BLOCK)):
        start = (i_chunk + i_block // EACH * _PROGRAMS) * CHUNK + i_block % EACH * BLOCK
        key = start + tl.arange(0, BLOCK)
        m_key = (key <= last)[:, None]
        block_ptr = cache_ptr + start.to(tl.int64) * stride_position
        kv_ptr = block_ptr + tl.arange(0, BLOCK)[:, None] * stride_position + o_d[None, :]
        k = tl.load(kv_ptr, mask=m_key, other=0.0)
        v = tl.load(kv_ptr + kv_heads * HEAD_DIM, mask=m_key, other=0.0)
        s = _dot(q, tl.trans(k), tl.zeros([TILE_ROWS, BLOCK], tl.float32), EMULATED) * scale
        seen = key[None, :] <= place[:, None]
        if WINDOW:
            seen = seen & (key[None, :] > place[:, None] - WINDOW)
        s = tl.where(seen, s, float("-inf"))
        top_new = tl.maximum(top, tl.max(s, 1))
        kept = _shift(top, top_new)
        p = _shift(s, top_new[:, None])
        total = total * kept + tl.sum(p, 1)
        acc = _dot(_round(p, q.dtype, EMULATED), v, acc * kept[:, None], EMULATED)
        top = top_new

    i_counter = i_head * tl.num_programs(1) + i_tile
    programs = tl.num_programs(0)
    tops_ptr += i_counter * programs * (2 * TILE_ROWS) + o_row
    values_ptr += i_counter * programs * (TILE_ROWS * HEAD_DIM)
    o_value = o_row[:, None] * HEAD_DIM + o_d[None, :]
    tl.store(tops_ptr + i_program * (2 * TILE_ROWS), top)
    tl.store(tops_ptr + i_program * (2 * TILE_ROWS) + TILE_ROWS, total)
    tl.store(values_ptr + i_program * (TILE_ROWS * HEAD_DIM) + o_value, acc, mask=m_row[:, None])
    tl.debug_barrier()
    arrived = tl.atomic_add(counters_ptr + i_counter, 1, sem="acq_rel")
    if arrived != tl.minimum(last_chunk - first_chunk, _PROGRAMS - 1):
        return
    tl.store(counters_ptr + i_counter, 0)
    # No load waits for another's value; .cg as in `_partial`.
    o_program = tl.arange(0, _PROGRAMS)[:, None]
    m_program = _first_chunk(o_program, first_chunk) <= last_chunk
    p = tops_ptr + o_program * (2 * TILE_ROWS)
    b_top = tl.load(p, m_program, float("-inf"), cache_modifier=".cg")
    b_total = tl.load(p + TILE_ROWS, m_program, 0.0, cache_modifier=".cg")
    top = tl.max(b_top, 0)
    total = tl.sum(b_total * _shift(b_top, top[None, :]), 0)
    acc = tl.zeros([TILE_ROWS, HEAD_DIM], tl.float32)
    for i in range(0, tl.minimum(last_chunk + 1, _PROGRAMS), 4):
        # All loads stand before the factors' way through shared memory, which they cannot pass.
        top0, acc0 = _partial(
            tops_ptr, values_ptr, i, first_chunk, last_chunk, o_value, m_row, HEAD_DIM
        )
        top1, acc1 = _partial(
            tops_ptr, values_ptr, i + 1, first_chunk, last_chunk, o_value, m_row, HEAD_DIM
        )
        top2, acc2 = _partial(
            tops_ptr, values_ptr, i + 2, first_chunk, last_chunk, o_value, m_row, HEAD_DIM
        )
        top3, acc3 = _partial(
            tops_ptr, values_ptr, i + 3, first_chunk, last_chunk, o_value, m_row, HEAD_DIM
        )
        acc += acc0 * _shift(top0, top)[:, None]
        acc += acc1 * _shift(top1, top)[:, None]
        acc += acc2 * _shift(top2, top)[:, None]
        acc += acc3 * _shift(top3, top)[:, None]
    y = _round(acc / total[:, None], out_ptr.dtype.element_ty, EMULATED)
    tl.store(out_ptr + o_out, y, mask=m_row[:, None])
