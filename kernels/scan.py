"""Device functions that choose a token of a row of logits which several programs share.

A row is split into ranges of whole blocks, so that every block but the row's last is loaded
unmasked, 16 bytes a thread. Each program keeps the best score and its token; the program that
arrives last merges the splits in index order, so results do not depend on the order of arrival.

A partial result is (score, token). A split without a candidate leaves (-inf, _NO_TOKEN); one that
holds NaN or +inf leaves (+inf, -1), which no other split can beat.
"""

from __future__ import annotations

import triton
import triton.language as tl

from .device import _gumbel_run

_NO_TOKEN = tl.constexpr(2**31 - 1)
_SPREAD = tl.constexpr(26.1)  # largest Gumbel draw minus the smallest: reference._GUMBEL_SPREAD


@triton.jit
def _consider(
    b_x,
    first,
    best,
    token,
    top,
    inv,
    low,
    seed,
    request,
    index,
    purpose,
    SAMPLED: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """Fold one block of logits into the running best of each lane."""
    b_x = tl.where(b_x == b_x, b_x, float("inf"))
    b_score = b_x
    if SAMPLED:
        b_top = tl.max(b_x, 0)
        top = tl.maximum(top, b_top)
        if inv > 0.0:
            b_score = tl.where(b_x >= low, b_x * inv, float("-inf"))
            # Noise cannot lift a block that is so far below what was seen already.
            if b_top * inv >= top * inv - _SPREAD:
                b_score += _gumbel_run(seed, request, index, purpose, first, BLOCK)
            else:
                b_score = tl.full([BLOCK], float("-inf"), tl.float32)
    better = b_score > best
    best = tl.where(better, b_score, best)
    token = tl.where(better, first + tl.arange(0, BLOCK), token)
    return best, token, top


@triton.jit
def _best_of_lanes(best, token):
    score = tl.max(best, 0)
    return score, tl.min(tl.where(best == score, token, _NO_TOKEN), 0)


@triton.jit
def _best_of_split(
    x_ptr,
    vocabulary,
    i_split,
    blocks,
    inv,
    low,
    seed,
    request,
    index,
    purpose,
    SAMPLED: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """(score, token) of one split: argmax of ``x``, or of ``x * inv + noise`` over ``x >= low``.

    With ``SAMPLED``, ``inv`` 0 still means the plain argmax.
    """
    o = tl.arange(0, BLOCK)
    best = tl.full([BLOCK], float("-inf"), tl.float32)
    token = tl.full([BLOCK], _NO_TOKEN, tl.int32)
    top = tl.full((), float("-inf"), tl.float32)
    start = i_split * blocks * BLOCK
    full = tl.minimum(blocks, (vocabulary - start) // BLOCK)
    for i in range(0, full):
        first = start + i * BLOCK
        b_x = tl.load(x_ptr + first + o, eviction_policy="evict_first").to(tl.float32)
        best, token, top = _consider(
            b_x, first, best, token, top, inv, low, seed, request, index, purpose, SAMPLED, BLOCK
        )
    first = start + full * BLOCK
    if (full < blocks) & (first < vocabulary):
        b_x = tl.load(x_ptr + first + o, mask=first + o < vocabulary, other=float("-inf"))
        b_x = b_x.to(tl.float32)
        best, token, top = _consider(
            b_x, first, best, token, top, inv, low, seed, request, index, purpose, SAMPLED, BLOCK
        )
    score, winner = _best_of_lanes(best, token)
    invalid = score == float("inf")
    if SAMPLED:
        invalid = top == float("inf")
    return tl.where(invalid, float("inf"), score), tl.where(invalid, -1, winner)


@triton.jit
def _arrives_last(counter_ptr, expected):
    """Whether this program is the last of ``expected``; if so the counter is 0 again.

    Whatever any of them stored before its arrival is visible to the last.
    """
    tl.debug_barrier()
    last = tl.atomic_add(counter_ptr, 1, sem="acq_rel") == expected - 1
    if last:
        tl.store(counter_ptr, 0)
    return last


@triton.jit
def _merge_splits(
    score_ptr, token_ptr, stride_w, o_position, m_position, splits, SPLITS: tl.constexpr
):
    """(score, token) of each position from its splits; -1 for a row without a token.

    Ties go to the lowest id. Positions outside ``m_position`` get (-inf, -1) unread.
    """
    o_split = tl.arange(0, SPLITS)
    o_slot = o_position[:, None] * stride_w + o_split[None, :]  # [positions, SPLITS]
    mask = m_position[:, None] & (o_split < splits)[None, :]
    score = tl.load(score_ptr + o_slot, mask=mask, other=float("-inf"), cache_modifier=".cg")
    token = tl.load(token_ptr + o_slot, mask=mask, other=_NO_TOKEN, cache_modifier=".cg")
    best = tl.max(score, 1)
    winner = tl.min(tl.where(score == best[:, None], token, _NO_TOKEN), 1)
    return best, tl.where(best == float("-inf"), -1, winner)
