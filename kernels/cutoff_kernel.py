"""The two kernels of `cutoff`: sums and a floor for each row, then exact selection above the floor.

Order is that of integer keys: fp32 bits, made monotonic. A key's rank is found by bisection, whose
sums run over a fixed tile in a fixed order, so that results do not depend on the order of arrival.
"""

from __future__ import annotations

import triton
import triton.language as tl

from . import layout as at
from .scan import _arrives_last

GROUPS = 32
"""Groups of a split whose maxima bound the k-th largest logit from below."""
_GROUPS = tl.constexpr(GROUPS)
_COLUMNS = tl.constexpr(16)  # candidates of each split that the selection takes at a time
_ABOVE_INFINITY = tl.constexpr(-0x7F800000)  # the lowest key of a finite logit


@triton.jit
def _key(x):
    """int32 in the order of ``x``; both zeros have one key."""
    bits = tl.where(x == 0.0, 0.0, x).to(tl.int32, bitcast=True)
    return bits ^ ((bits >> 31) & 0x7FFFFFFF)


@triton.jit
def _skipped(rows_ptr, i_row, width, HAS_ROWS: tl.constexpr):
    """Whether no token is drawn from this row: sequence done, or position not drafted."""
    skipped = False
    if HAS_ROWS:
        rows_ptr += (i_row // width) * at.ROW_WORDS
        done = tl.load(rows_ptr + at.DONE) != 0
        skipped = done | (i_row % width > tl.load(rows_ptr + at.DRAFTED))
    return skipped


@triton.jit
def _accumulate(b_x, inv, b_top, b_total):
    """Fold a block into each lane's maximum and its sum of ``exp((x - maximum) * inv)``."""
    b_x = tl.where(b_x == b_x, b_x, float("inf"))
    b_new = tl.maximum(b_top, b_x)
    b_shift = tl.where(b_new == float("-inf"), 0.0, b_new)
    b_total = b_total * tl.exp((b_top - b_shift) * inv) + tl.exp((b_x - b_shift) * inv)
    return b_new, b_total


@triton.jit
def _total(b_top, b_total, top, inv):
    """Sums relative to ``b_top``, as one sum relative to ``top``."""
    return tl.sum(tl.where(b_total > 0.0, b_total * tl.exp((b_top - top) * inv), 0.0), 0)


@triton.jit
def _floor_of_groups(group_ptr, splits, k, SPLITS: tl.constexpr):
    """A lower bound of the k-th largest logit: about the k-th largest of the groups' maxima."""
    o_split, o_group = tl.arange(0, SPLITS), tl.arange(0, _GROUPS)
    b_max = tl.load(
        group_ptr + o_split[:, None] * _GROUPS + o_group[None, :],
        mask=(o_split < splits)[:, None],
        other=float("-inf"),
        cache_modifier=".cg",
    )
    b_key = _key(b_max)  # [SPLITS, GROUPS]
    low = tl.full((), _ABOVE_INFINITY - 1, tl.int32)
    high = tl.max(tl.max(b_key, 1), 0) + 1
    count = splits * _GROUPS
    while (low + 1 < high) & (count > 2 * k):
        middle = (low & high) + ((low ^ high) >> 1)
        above = tl.sum(tl.sum((b_key >= middle).to(tl.int32), 1), 0)
        if above >= k:
            low, count = middle, above
        else:
            high = middle
    b_kept = tl.where(b_key >= low, b_max, float("inf"))
    floor = tl.min(tl.min(b_kept, 1), 0)
    return tl.where(k <= splits * _GROUPS, floor, float("-inf"))


@triton.jit
def _cutoff_sum_kernel(
    logits_ptr,
    stride_lr,
    vocabulary,
    inv_ptr,
    k_ptr,
    p_ptr,
    rows_ptr,
    width,
    # results [R]
    cutoff_ptr,
    lse_ptr,
    # scratch
    top_ptr,
    total_ptr,
    group_ptr,
    bound_ptr,
    counter_ptr,
    # shape
    blocks,
    HAS_K: tl.constexpr,
    HAS_P: tl.constexpr,
    HAS_ROWS: tl.constexpr,
    SPLITS: tl.constexpr,
    BLOCK: tl.constexpr,
):
    i_split, i_row = tl.program_id(0), tl.program_id(1).to(tl.int64)
    splits = tl.num_programs(0)
    if _skipped(rows_ptr, i_row, width, HAS_ROWS):
        return
    inv = tl.load(inv_ptr + i_row)
    inv = tl.where(inv == 0.0, 1.0, inv)
    k = tl.full((), 0, tl.int32)
    if HAS_K:
        k = tl.load(k_ptr + i_row)
        k = tl.where(k < vocabulary, k, 0)
    p = tl.full((), 1.0, tl.float32)
    if HAS_P:
        p = tl.load(p_ptr + i_row)

    o = tl.arange(0, BLOCK)
    b_top = tl.full([BLOCK], float("-inf"), tl.float32)
    b_total = tl.zeros([BLOCK], tl.float32)
    logits_ptr += i_row * stride_lr
    start = i_split * blocks * BLOCK
    full = tl.minimum(blocks, (vocabulary - start) // BLOCK)
    for i in range(0, full):
        b_x = tl.load(logits_ptr + start + i * BLOCK + o, eviction_policy="evict_first")
        b_top, b_total = _accumulate(b_x.to(tl.float32), inv, b_top, b_total)
    first = start + full * BLOCK
    if (full < blocks) & (first < vocabulary):
        b_x = tl.load(logits_ptr + first + o, mask=first + o < vocabulary, other=float("-inf"))
        b_top, b_total = _accumulate(b_x.to(tl.float32), inv, b_top, b_total)
    split_top = tl.max(b_top, 0)
    slot = i_row * splits + i_split
    tl.store(top_ptr + slot, split_top)
    tl.store(total_ptr + slot, _total(b_top, b_total, split_top, inv))
    if k > 0:
        b_group = tl.max(tl.reshape(b_top, [_GROUPS, BLOCK // _GROUPS]), 1)
        tl.store(group_ptr + slot * _GROUPS + tl.arange(0, _GROUPS), b_group)

    if _arrives_last(counter_ptr + i_row, splits):
        o_split = tl.arange(0, SPLITS)
        m_split = o_split < splits
        o_slot = i_row * splits + o_split
        b_tops = tl.load(top_ptr + o_slot, mask=m_split, other=float("-inf"), cache_modifier=".cg")
        b_totals = tl.load(total_ptr + o_slot, mask=m_split, other=0.0, cache_modifier=".cg")
        top = tl.max(b_tops, 0)
        total = _total(b_tops, b_totals, top, inv)
        floor = tl.full((), float("inf"), tl.float32)
        if tl.abs(top) < float("inf"):
            tl.store(lse_ptr + i_row, tl.log(total) + top * inv)
            if k > 0:
                group_ptr += i_row * splits * _GROUPS
                floor = _floor_of_groups(group_ptr, splits, k, SPLITS)
            elif p < 1.0:
                # Tokens below it weigh less, all together, than a seventh of what top-p drops.
                tail = tl.log(vocabulary.to(tl.float32) / ((1.0 - p) * total))
                floor = top - (tail + 2.0) / inv
        else:
            tl.store(lse_ptr + i_row, float("nan"))
        tl.store(cutoff_ptr + i_row, float("-inf"))
        tl.store(bound_ptr + i_row * 3, floor)
        tl.store(bound_ptr + i_row * 3 + 1, top)
        tl.store(bound_ptr + i_row * 3 + 2, total)


@triton.jit
def _gather(b_x, first_slot, count, candidate_ptr, floor, BLOCK: tl.constexpr):
    """Append what of a block is at or above the floor to the split's candidates, in order."""
    keep = (b_x >= floor) & (b_x > float("-inf"))
    b_place = tl.cumsum(keep.to(tl.int32), 0)
    tl.store(candidate_ptr + first_slot + count + b_place - 1, b_x, mask=keep)
    return count + tl.sum(keep.to(tl.int32), 0)


@triton.jit
def _candidates(candidate_ptr, o_first, b_count, column):
    """fp32 [SPLITS, COLUMNS] of the candidates; -inf where a split has no more."""
    o_column = column + tl.arange(0, _COLUMNS)
    return tl.load(
        candidate_ptr + o_first[:, None] + o_column[None, :],
        mask=o_column[None, :] < b_count[:, None],
        other=float("-inf"),
    ).to(tl.float32)


@triton.jit
def _at_or_above(candidate_ptr, o_first, b_count, key, top, inv):
    """Number and mass, relative to ``top``, of the candidates whose keys are at least ``key``."""
    b_number = tl.zeros([_COLUMNS], tl.int32)
    b_mass = tl.zeros([_COLUMNS], tl.float32)
    for column in range(0, tl.max(b_count, 0), _COLUMNS):
        b_x = _candidates(candidate_ptr, o_first, b_count, column)
        kept = _key(b_x) >= key
        b_number += tl.sum(kept.to(tl.int32), 0)
        b_mass += tl.sum(tl.where(kept, tl.exp((b_x - top) * inv), 0.0), 0)
    return tl.sum(b_number, 0), tl.sum(b_mass, 0)


@triton.jit
def _select(
    candidate_ptr, o_first, b_count, low, number_low, k, mass, top, inv, BY_MASS: tl.constexpr
):
    """Largest candidate with at least ``k`` candidates, or ``mass``, at or above it.

    Bisection between the key ``low``, which has ``number_low`` at or above it, and the key of
    ``top``, until one candidate or one key is left.
    """
    high = _key(top) + 1
    number_high = number_low * 0
    while (low + 1 < high) & (number_low - number_high > 1):
        middle = (low & high) + ((low ^ high) >> 1)
        number, above = _at_or_above(candidate_ptr, o_first, b_count, middle, top, inv)
        enough = above >= mass if BY_MASS else number >= k
        if enough:
            low, number_low = middle, number
        else:
            high, number_high = middle, number
    b_lowest = tl.full([_COLUMNS], float("inf"), tl.float32)
    for column in range(0, tl.max(b_count, 0), _COLUMNS):
        b_x = _candidates(candidate_ptr, o_first, b_count, column)
        b_x = tl.where(_key(b_x) >= low, b_x, float("inf"))
        b_lowest = tl.minimum(b_lowest, tl.min(b_x, 0))
    return tl.min(b_lowest, 0)


@triton.jit
def _cutoff_select_kernel(
    logits_ptr,
    stride_lr,
    vocabulary,
    inv_ptr,
    k_ptr,
    p_ptr,
    rows_ptr,
    width,
    # results [R]
    cutoff_ptr,
    lse_ptr,
    # scratch
    bound_ptr,
    candidate_ptr,
    count_ptr,
    counter_ptr,
    # shape
    blocks,
    HAS_K: tl.constexpr,
    HAS_P: tl.constexpr,
    HAS_ROWS: tl.constexpr,
    SPLITS: tl.constexpr,
    BLOCK: tl.constexpr,
):
    i_split, i_row = tl.program_id(0), tl.program_id(1).to(tl.int64)
    splits = tl.num_programs(0)
    if _skipped(rows_ptr, i_row, width, HAS_ROWS):
        return
    floor = tl.load(bound_ptr + i_row * 3)
    if floor == float("inf"):
        return

    o = tl.arange(0, BLOCK)
    logits_ptr += i_row * stride_lr
    span = blocks * BLOCK
    candidate_ptr += i_row * splits * span
    start = i_split * span
    count = tl.full((), 0, tl.int32)
    full = tl.minimum(blocks, (vocabulary - start) // BLOCK)
    for i in range(0, full):
        b_x = tl.load(logits_ptr + start + i * BLOCK + o, eviction_policy="evict_first")
        count = _gather(b_x.to(tl.float32), start, count, candidate_ptr, floor, BLOCK)
    first = start + full * BLOCK
    if (full < blocks) & (first < vocabulary):
        b_x = tl.load(logits_ptr + first + o, mask=first + o < vocabulary, other=float("-inf"))
        count = _gather(b_x.to(tl.float32), start, count, candidate_ptr, floor, BLOCK)
    tl.store(count_ptr + i_row * splits + i_split, count)

    if _arrives_last(counter_ptr + i_row, splits):
        o_split = tl.arange(0, SPLITS)
        b_count = tl.load(
            count_ptr + i_row * splits + o_split,
            mask=o_split < splits,
            other=0,
            cache_modifier=".cg",
        )
        o_first = o_split * span
        top = tl.load(bound_ptr + i_row * 3 + 1)
        mass = tl.load(bound_ptr + i_row * 3 + 2)
        inv = tl.load(inv_ptr + i_row)
        inv = tl.where(inv == 0.0, 1.0, inv)
        number = tl.sum(b_count, 0)
        low = tl.maximum(_key(floor), _ABOVE_INFINITY)
        cutoff = tl.full((), float("-inf"), tl.float32)
        if HAS_K:
            k = tl.load(k_ptr + i_row)
            # Fewer than k possible tokens: the k-th largest logit is -inf, and all are kept.
            if (k > 0) & (k < vocabulary) & (k <= number):
                cutoff = _select(
                    candidate_ptr, o_first, b_count, low, number, k, mass, top, inv, False
                )
                low = _key(cutoff)
                number, mass = _at_or_above(candidate_ptr, o_first, b_count, low, top, inv)
        if HAS_P:
            p = tl.load(p_ptr + i_row)
            if p < 1.0:
                cutoff = _select(
                    candidate_ptr, o_first, b_count, low, number, 0, p * mass, top, inv, True
                )
                number, mass = _at_or_above(candidate_ptr, o_first, b_count, _key(cutoff), top, inv)
        tl.store(cutoff_ptr + i_row, cutoff)
        tl.store(lse_ptr + i_row, tl.log(mass) + top * inv)
