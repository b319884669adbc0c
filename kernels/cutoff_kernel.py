"""The two kernels of `cutoff`: sums and a floor for each row, then exact selection above the floor.

Order is that of integer keys: fp32 bits, made monotonic. Candidates are gathered in the order of
arrival, but nothing depends on it: the bisection over keys counts them and adds up their masses as
integers, in units of 2**-40 of the most likely token's.
"""

from __future__ import annotations

import triton
import triton.language as tl

from . import layout as at
from .scan import _arrives_last

GROUPS = 32
"""Groups of a split whose maxima bound the k-th largest logit from below."""
_GROUPS = tl.constexpr(GROUPS)
_TILE = tl.constexpr(1024)  # candidates that the selection takes at a time
_MASS_UNITS = tl.constexpr(2.0**40)
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


@triton.jit(do_not_specialize=["vocabulary", "width", "blocks"])
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
def _gather(b_x, floor, candidate_ptr, cursor_ptr):
    """Append what of a block is at or above the floor to the row's candidates."""
    keep = (b_x >= floor) & (b_x > float("-inf"))
    b_place = tl.cumsum(keep.to(tl.int32), 0)
    first = tl.atomic_add(cursor_ptr, tl.max(b_place, 0), sem="relaxed")
    tl.store(candidate_ptr + first + b_place - 1, b_x, mask=keep)


@triton.jit
def _candidates(candidate_ptr, first, number):
    """fp32 [TILE] of the candidates from ``first`` on; -inf behind the last."""
    o = first + tl.arange(0, _TILE)
    return tl.load(candidate_ptr + o, mask=o < number, other=float("-inf")).to(tl.float32)


@triton.jit
def _at_or_above(candidate_ptr, number, key, top, inv, SHIFT: tl.constexpr):
    """Number and mass units, relative to ``top``, of candidates whose keys are at least ``key``."""
    b_count = tl.zeros([_TILE], tl.int32)
    b_mass = tl.zeros([_TILE], tl.int64)
    for first in range(0, number, _TILE):
        b_x = _candidates(candidate_ptr, first, number)
        kept = (_key(b_x) >> SHIFT) >= key
        b_count += kept.to(tl.int32)
        b_units = tl.where(kept, tl.exp((b_x - top) * inv), 0.0) * _MASS_UNITS
        b_mass += b_units.to(tl.int64)
    return tl.sum(b_count, 0), tl.sum(b_mass, 0)


@triton.jit
def _mass(units):
    return units.to(tl.float32) / _MASS_UNITS


@triton.jit
def _keep_between(candidate_ptr, number, low, high, SHIFT: tl.constexpr):
    """Move the candidates of keys from ``low`` to below ``high`` to the front; their number."""
    kept = number * 0
    for first in range(0, number, _TILE):
        b_x = _candidates(candidate_ptr, first, number)
        b_key = _key(b_x) >> SHIFT
        keep = (b_key >= low) & (b_key < high) & (first + tl.arange(0, _TILE) < number)
        b_place = tl.cumsum(keep.to(tl.int32), 0)
        tl.debug_barrier()  # all of the tile is loaded before some of it is overwritten
        tl.store(candidate_ptr + kept + b_place - 1, b_x, mask=keep)
        kept += tl.max(b_place, 0)
    tl.debug_barrier()
    return kept


@triton.jit
def _select(
    candidate_ptr,
    number,
    low,
    count_low,
    k,
    mass,
    top,
    inv,
    BY_MASS: tl.constexpr,
    SHIFT: tl.constexpr,
):
    """Largest candidate with at least ``k`` candidates, or ``mass``, at or above it.

    Bisection between the key ``low``, which ``count_low`` are at or above, and the key of ``top``,
    until one candidate or one key is left. By mass there may be as many candidates as tokens: those
    that are decided on are dropped while there are many. Comes with the number and the mass units
    at or above it.
    """
    high = (_key(top) >> SHIFT) + 1
    count_high = count_low * 0
    units_high = count_high.to(tl.int64)
    dropped, dropped_units = count_high, units_high
    while (low + 1 < high) & (count_low - count_high > 1):
        middle = (low & high) + ((low ^ high) >> 1)
        count, units = _at_or_above(candidate_ptr, number, middle, top, inv, SHIFT)
        count, units = count + dropped, units + dropped_units
        enough = _mass(units) >= mass if BY_MASS else count >= k
        if enough:
            low, count_low = middle, count
        else:
            high, count_high, units_high = middle, count, units
        if BY_MASS:  # noqa: SIM102 - the second test is made on the device
            if number > 2 * _TILE:
                number = _keep_between(candidate_ptr, number, low, high, SHIFT)
                dropped, dropped_units = count_high, units_high
    b_lowest = tl.full([_TILE], float("inf"), tl.float32)
    for first in range(0, number, _TILE):
        b_x = _candidates(candidate_ptr, first, number)
        b_lowest = tl.minimum(b_lowest, tl.where((_key(b_x) >> SHIFT) >= low, b_x, float("inf")))
    count, units = _at_or_above(candidate_ptr, number, low, top, inv, SHIFT)
    return tl.min(b_lowest, 0), count + dropped, units + dropped_units


@triton.jit(do_not_specialize=["vocabulary", "width", "blocks"])
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
    cursor_ptr,
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
    candidate_ptr += i_row * vocabulary
    cursor_ptr += i_row
    start = i_split * blocks * BLOCK
    full = tl.minimum(blocks, (vocabulary - start) // BLOCK)
    for i in range(0, full):
        b_x = tl.load(logits_ptr + start + i * BLOCK + o, eviction_policy="evict_first")
        _gather(b_x.to(tl.float32), floor, candidate_ptr, cursor_ptr)
    first = start + full * BLOCK
    if (full < blocks) & (first < vocabulary):
        b_x = tl.load(logits_ptr + first + o, mask=first + o < vocabulary, other=float("-inf"))
        _gather(b_x.to(tl.float32), floor, candidate_ptr, cursor_ptr)

    if _arrives_last(counter_ptr + i_row, splits):
        number = tl.load(cursor_ptr, cache_modifier=".cg")
        tl.debug_barrier()  # all threads have loaded what one resets
        tl.store(cursor_ptr, 0)
        top = tl.load(bound_ptr + i_row * 3 + 1)
        mass = tl.load(bound_ptr + i_row * 3 + 2)
        inv = tl.load(inv_ptr + i_row)
        inv = tl.where(inv == 0.0, 1.0, inv)
        # What the bits of a narrower type leave constant is not bisected.
        SHIFT: tl.constexpr = 23 - candidate_ptr.dtype.element_ty.fp_mantissa_width
        low = tl.maximum(_key(floor), _ABOVE_INFINITY) >> SHIFT
        count = number
        cutoff = tl.full((), float("-inf"), tl.float32)
        if HAS_K:
            k = tl.load(k_ptr + i_row)
            # Fewer than k possible tokens: the k-th largest logit is -inf, and all are kept.
            if (k > 0) & (k < vocabulary) & (k <= number):
                cutoff, count, units = _select(
                    candidate_ptr, number, low, number, k, mass, top, inv, False, SHIFT
                )
                low = _key(cutoff) >> SHIFT
                mass = _mass(units)
        if HAS_P:
            p = tl.load(p_ptr + i_row)
            if p < 1.0:
                cutoff, _, units = _select(
                    candidate_ptr, number, low, count, 0, p * mass, top, inv, True, SHIFT
                )
                mass = _mass(units)
        tl.store(cutoff_ptr + i_row, cutoff)
        tl.store(lse_ptr + i_row, tl.log(mass) + top * inv)
