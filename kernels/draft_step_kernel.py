"""The device half of `draft_step`: one launch, one pass over the logits.

For a row ``x`` of logits, with ``M = max x``, ``d = (x - M) / ln 2``, ``s = sum(2^d)`` and
``t = sum(d 2^d)``::

    entropy    = log2 s - t / s   (bits)
    confidence = 1 / s
    margin     = (1 - 2^(second - M)) / s
    token      = argmax x                      (greedy rows)
               = argmax x / T + gumbel(token)  (sampled rows, over x >= cutoff)

A row is split over several programs. Each keeps running values per lane, reduces them once and
stores one partial; the last one to arrive merges the partials in index order, so the result does
not depend on who that is, folds the signals into the step's features, and decides whether to draft
another token (`device._decide`). The semantics are those of `reference.draft_step`.

Rules: ties go to the lowest draft id; ``-inf`` is an impossible token; a row that holds NaN or
``+inf``, or nothing but ``-inf``, sets ERROR and ends; rows that are done or stopped are left bit
for bit as they are. Only a row's last, incomplete block is masked, so that every other load is 16
bytes a thread where base and row stride allow it.
"""

from __future__ import annotations

import triton
import triton.language as tl

from . import layout as at
from .device import _decide, _gumbel_at, _gumbel_run, _load_policy

_LOG2E: tl.constexpr = tl.constexpr(1.4426950408889634)
_NO_ID: tl.constexpr = tl.constexpr(1 << 24)  # above every id, and exact in float32


@triton.jit
def _exponent(x, top):
    """``(x - top) / ln 2``; 0 where they are equal, also if infinite; NaN where ``x`` is NaN.

    The floor keeps the 0 * -inf of an impossible token out of the weighted sum.
    """
    d = tl.where(x == top, 0.0, (x - top) * _LOG2E)
    return tl.where(d < -1e4, -1e4, d)


@triton.jit
def _fold(x, o_token, top, second, total, weighted, token):
    """Fold a block of logits into the lanes' running values."""
    token = tl.where(x > top, o_token, token)
    second = tl.maximum(second, tl.minimum(top, x))
    top_new = tl.maximum(top, x)
    shift = _exponent(top, top_new)
    kept = tl.exp2(shift)
    d = _exponent(x, top_new)
    e = tl.exp2(d)
    weighted = kept * (weighted + shift * total) + d * e
    return top_new, second, kept * total + e, weighted, token


@triton.jit
def _better(top0, second0, token0, top1, second1, token1):
    """The highest logit of two lanes, the next, and the id of the first."""
    first = (top0 > top1) | ((top0 == top1) & (token0 < token1))
    second = tl.maximum(tl.minimum(top0, top1), tl.maximum(second0, second1))
    return tl.maximum(top0, top1), second, tl.where(first, token0, token1)


@triton.jit
def _better_draw(score0, token0, logit0, score1, token1, logit1):
    first = (score0 > score1) | ((score0 == score1) & (token0 < token1))
    token = tl.where(first, token0, token1)
    return tl.maximum(score0, score1), token, tl.where(first, logit0, logit1)


@triton.jit
def _rescaled(total, weighted, top, best):
    """Sums that are relative to ``top``, relative to ``best``."""
    shift = _exponent(top, best)
    kept = tl.exp2(shift)
    return kept * total, kept * (weighted + shift * total)


@triton.jit
def _joined(top0, second0, total0, weighted0, token0, top1, second1, total1, weighted1, token1):
    """`_fold`'s values of two lanes."""
    top, second, token = _better(top0, second0, token0, top1, second1, token1)
    total0, weighted0 = _rescaled(total0, weighted0, top0, top)
    total1, weighted1 = _rescaled(total1, weighted1, top1, top)
    return top, second, total0 + total1, weighted0 + weighted1, token


@triton.jit
def _add(total0, weighted0, total1, weighted1):
    return total0 + total1, weighted0 + weighted1


@triton.jit
def _merge_apart(top, second, total, weighted, token):
    """`_joined` of all lanes, value by value: the interpreter would take them one at a time."""
    best = tl.max(top, 0)
    first = tl.min(tl.where(top == best, token, _NO_ID), 0)
    second = tl.max(tl.where(token == first, second, top), 0)
    total, weighted = _rescaled(total, weighted, top, best)
    return best, second, tl.sum(total, 0), tl.sum(weighted, 0), first


@triton.jit
def _merge(
    top,
    second,
    total,
    weighted,
    token,
    WARPS: tl.constexpr,
    RUN: tl.constexpr,
    EMULATED: tl.constexpr,
):
    """Merge lanes, or partials, into one: `_fold`'s values of them all.

    Where each warp loads ``RUN`` neighbours at a time, it first merges what it has: sums are
    rescaled once then, and warps wait for each other once. Elsewhere it is slower.
    """
    if EMULATED:
        top, second, total, weighted, token = _merge_apart(top, second, total, weighted, token)
    else:
        SHAPE: tl.constexpr = (top.shape[0] // (WARPS * RUN), WARPS, RUN)
        tops = tl.reshape(top, SHAPE)
        best = (tops, tl.reshape(second, SHAPE), tl.reshape(token, SHAPE))
        top, second, token = tl.reduce(tl.reduce(best, 2, _better), 0, _better)
        total, weighted = _rescaled(
            tl.reshape(total, SHAPE), tl.reshape(weighted, SHAPE), tops, top[None, :, None]
        )
        total, weighted = tl.reduce(tl.reduce((total, weighted), 2, _add), 0, _add)
        top, second, total, weighted, token = tl.reduce(
            (top, second, total, weighted, token), 0, _joined
        )
    return top, second, total, weighted, token


@triton.jit
def _merge_draws(score, token, logit, EMULATED: tl.constexpr):
    """The highest score, the lowest id among its equals, and the logit of that id."""
    if EMULATED:
        best = tl.max(score, 0)
        first = tl.min(tl.where(score == best, token, _NO_ID), 0)
        logit = tl.max(tl.where(token == first, logit, float("-inf")), 0)
    else:
        best, first, logit = tl.reduce((score, token, logit), 0, _better_draw)
    return best, first, logit


@triton.jit
def _log2(x, EMULATED: tl.constexpr):
    """Of a number from 1 on, within 2^-22, or within that share of a result above 1."""
    if EMULATED:
        return tl.log2(x)
    return tl.inline_asm_elementwise(
        "lg2.approx.ftz.f32 $0, $1;", "=f,f", [x], tl.float32, is_pure=True, pack=1
    )


@triton.jit
def _load_block(logits_ptr, i_block, vocabulary, BLOCK: tl.constexpr):
    """Block ``i_block`` of a row of logits; -inf behind its end."""
    o_token = i_block * BLOCK + tl.arange(0, BLOCK)
    if i_block < vocabulary // BLOCK:
        x = tl.load(logits_ptr + o_token, eviction_policy="evict_first").to(tl.float32)
    else:
        x = tl.load(
            logits_ptr + o_token,
            mask=o_token < vocabulary,
            other=float("-inf"),
            eviction_policy="evict_first",
        ).to(tl.float32)
    return x


@triton.jit
def _scores(
    x, i_block, draw, id_map_ptr, vocabulary, HAS_ID_MAP: tl.constexpr, BLOCK: tl.constexpr
):
    """``x / T + gumbel`` of a block of logits; -inf below the cutoff, and for a greedy row."""
    inv_temperature, cutoff, seed, request, index, purpose = draw
    y = tl.full([BLOCK], float("-inf"), tl.float32)
    if inv_temperature != 0.0:
        if HAS_ID_MAP:
            o_token = i_block * BLOCK + tl.arange(0, BLOCK)
            b_target = tl.load(id_map_ptr + o_token, mask=o_token < vocabulary, other=0)
            noise = _gumbel_at(seed, request, index, purpose, b_target)
        else:
            noise = _gumbel_run(seed, request, index, purpose, i_block * BLOCK, BLOCK)
        y = tl.where(x >= cutoff, x * inv_temperature + noise, float("-inf"))
    return y


@triton.jit
def _draft_step_kernel(
    logits_ptr,  # [B, V]
    id_map_ptr,  # [V]
    inv_temperature_ptr,  # [B]
    seeds_ptr,  # [B]
    cutoffs_ptr,  # [B]
    policy_ptr,
    # state and scratch
    rows_ptr,
    running_ptr,
    sequence_ptr,
    signals_ptr,
    partials_ptr,  # [B, PARTIAL_WORDS, SPLITS]
    counters_ptr,  # [B], zero between launches
    # shape
    stride_logits_b,
    stride_sequence_b,
    vocabulary,
    # constants
    SAMPLED: tl.constexpr,
    HAS_ID_MAP: tl.constexpr,
    HAS_CUTOFFS: tl.constexpr,
    REJECTION: tl.constexpr,
    SPLITS: tl.constexpr,
    SPLITS_PADDED: tl.constexpr,
    BLOCK: tl.constexpr,
    WARPS: tl.constexpr,
    EMULATED: tl.constexpr,
):
    i_split = tl.program_id(0)
    i_row = tl.program_id(1).to(tl.int64)
    rows_ptr += i_row * at.ROW_WORDS
    running_ptr += i_row * at.RUNNING_WORDS
    sequence_ptr += i_row * stride_sequence_b
    logits_ptr += i_row * stride_logits_b

    # As much as there is room for is asked for at once: to wait for each is as long as a merge. All
    # threads load each of these words, and one stores it: none may still be about to load when the
    # row's last program stores. That one follows every arrival, or the barrier in its place.
    x = _load_block(logits_ptr, i_split, vocabulary, BLOCK)
    idle = (tl.load(rows_ptr + at.DONE) != 0) | (tl.load(rows_ptr + at.STOP) != 0)
    length = tl.load(rows_ptr + at.LENGTH)
    drafted = tl.load(rows_ptr + at.DRAFTED)
    error = tl.load(rows_ptr + at.ERROR)
    limit = tl.load(rows_ptr + at.LIMIT)
    plain_run = tl.load(rows_ptr + at.PLAIN_RUN)
    match_length = tl.load(rows_ptr + at.MATCH_LENGTH)
    mean_entropy = tl.load(running_ptr + at.MEAN_ENTROPY)
    max_entropy = tl.load(running_ptr + at.MAX_ENTROPY)
    mean_confidence = tl.load(running_ptr + at.MEAN_CONFIDENCE)
    min_confidence = tl.load(running_ptr + at.MIN_CONFIDENCE)
    acceptance = tl.load(running_ptr + at.ACCEPTANCE)
    match = tl.load(rows_ptr + at.MATCH)
    if not SAMPLED:
        policy = _load_policy(policy_ptr)
    else:
        inv_temperature = tl.load(inv_temperature_ptr + i_row)
        seed = tl.load(seeds_ptr + i_row)
        request = tl.load(rows_ptr + at.REQUEST)
        if REJECTION:
            index = tl.load(rows_ptr + at.STEP)
            purpose = at.NOISE_DRAFT + drafted * 256
        else:
            index = length + drafted
            purpose = at.NOISE_COUPLED + drafted * 0
        cutoff = float("-inf")
        if HAS_CUTOFFS:
            cutoff = tl.load(cutoffs_ptr + i_row)
        draw = (inv_temperature, cutoff, seed, request, index, purpose)
    if idle:
        return

    o = tl.arange(0, BLOCK)
    top = x  # `_fold` of a first block: one logit a lane
    second = tl.full([BLOCK], float("-inf"), tl.float32)
    total = tl.full([BLOCK], 1.0, tl.float32)
    weighted = tl.zeros([BLOCK], tl.float32)
    token = i_split * BLOCK + o
    if SAMPLED:
        logit = x
        drawn = token
        score = _scores(x, i_split, draw, id_map_ptr, vocabulary, HAS_ID_MAP, BLOCK)
    for i_block in range(i_split + SPLITS, tl.cdiv(vocabulary, BLOCK), SPLITS):
        x = _load_block(logits_ptr, i_block, vocabulary, BLOCK)
        o_token = i_block * BLOCK + o
        top, second, total, weighted, token = _fold(x, o_token, top, second, total, weighted, token)
        if SAMPLED:
            y = _scores(x, i_block, draw, id_map_ptr, vocabulary, HAS_ID_MAP, BLOCK)
            drawn = tl.where(y > score, o_token, drawn)
            logit = tl.where(y > score, x, logit)
            score = tl.maximum(score, y)

    BITS: tl.constexpr = logits_ptr.dtype.element_ty.primitive_bitwidth
    RUN: tl.constexpr = min(32 * 128 // BITS, BLOCK // WARPS)
    top, second, total, weighted, token = _merge(
        top, second, total, weighted, token, WARPS, RUN, EMULATED
    )
    if SAMPLED:
        score, drawn, logit = _merge_draws(score, drawn, logit, EMULATED)
        policy = _load_policy(policy_ptr)  # there was no room for it before
    place = match + drafted
    came = tl.load(sequence_ptr + place, mask=place < length, other=-1)

    if SPLITS > 1:
        partials_ptr += i_row * (8 * SPLITS)
        partial_ptr = partials_ptr + i_split
        tl.store(partial_ptr, top)
        tl.store(partial_ptr + SPLITS, second)
        tl.store(partial_ptr + 2 * SPLITS, total)
        tl.store(partial_ptr + 3 * SPLITS, weighted)
        tl.store(partial_ptr + 4 * SPLITS, token.to(tl.float32))
        if SAMPLED:
            tl.store(partial_ptr + 5 * SPLITS, score)
            tl.store(partial_ptr + 6 * SPLITS, drawn.to(tl.float32))
            tl.store(partial_ptr + 7 * SPLITS, logit)
        tl.debug_barrier()
        arrived = tl.atomic_add(counters_ptr + i_row, 1, sem="acq_rel")
        if arrived != SPLITS - 1:
            return
        tl.store(counters_ptr + i_row, 0)
        MERGING: tl.constexpr = min(WARPS, max(SPLITS_PADDED // 32, 1))  # warps with partials
        o_split = tl.arange(0, SPLITS_PADDED)
        m_split = o_split < SPLITS
        p = partials_ptr + o_split
        low = float("-inf")
        # .cg: from L2, where the other programs' stores are.
        b_top = tl.load(p, m_split, low, cache_modifier=".cg")
        b_second = tl.load(p + SPLITS, m_split, low, cache_modifier=".cg")
        b_total = tl.load(p + 2 * SPLITS, m_split, 0.0, cache_modifier=".cg")
        b_weighted = tl.load(p + 3 * SPLITS, m_split, 0.0, cache_modifier=".cg")
        b_token = tl.load(p + 4 * SPLITS, m_split, _NO_ID, cache_modifier=".cg").to(tl.int32)
        top, second, total, weighted, token = _merge(
            b_top,
            b_second,
            b_total,
            b_weighted,
            b_token,
            MERGING,
            SPLITS_PADDED // MERGING,
            EMULATED,
        )
        if SAMPLED:
            b_score = tl.load(p + 5 * SPLITS, m_split, low, cache_modifier=".cg")
            b_drawn = tl.load(p + 6 * SPLITS, m_split, _NO_ID, cache_modifier=".cg").to(tl.int32)
            b_logit = tl.load(p + 7 * SPLITS, m_split, low, cache_modifier=".cg")
            score, drawn, logit = _merge_draws(b_score, b_drawn, b_logit, EMULATED)
    else:
        tl.debug_barrier()

    # NaN reaches `total`; a NaN or infinite `top` fails both comparisons.
    valid = (top > float("-inf")) & (top < float("inf")) & (total == total)
    chosen = token
    token_logit = top
    if SAMPLED:  # noqa: SIM102 - as above
        if inv_temperature != 0.0:
            valid = valid & (score > float("-inf"))
            chosen = drawn
            token_logit = logit
    if valid == 0:
        tl.store(rows_ptr + at.ERROR, error | at.ERROR_DRAFT)
        tl.store(rows_ptr + at.STOP, 1)
        tl.store(rows_ptr + at.DONE, at.DONE_ERROR)
        return
    if HAS_ID_MAP:
        chosen = tl.load(id_map_ptr + chosen)
    match_length = tl.where(came == chosen, match_length, 0)
    confidence = 1.0 / total
    entropy = tl.maximum(_log2(total, EMULATED) - weighted * confidence, 0.0)
    margin = confidence - tl.exp2(_exponent(second, top)) * confidence
    probability = tl.exp2(_exponent(token_logit, top)) * confidence
    if drafted > 0:
        share = 1.0 / (drafted + 1).to(tl.float32)
        mean_entropy += (entropy - mean_entropy) * share
        max_entropy = tl.maximum(max_entropy, entropy)
        mean_confidence += (confidence - mean_confidence) * share
        min_confidence = tl.minimum(min_confidence, confidence)
    else:
        mean_entropy = entropy
        max_entropy = entropy
        mean_confidence = confidence
        min_confidence = confidence
    stop = _decide(
        policy,
        length,
        limit,
        drafted + 1,
        plain_run,
        mean_entropy,
        max_entropy,
        mean_confidence,
        min_confidence,
        entropy,
        confidence,
        margin,
        acceptance,
        match_length,
    )

    tl.store(sequence_ptr + length + drafted, chosen)
    signals_ptr += (i_row * at.GAMMA_MAX + drafted) * at.SIGNALS
    tl.store(signals_ptr + at.ENTROPY, entropy)
    tl.store(signals_ptr + at.CONFIDENCE, confidence)
    tl.store(signals_ptr + at.MARGIN, margin)
    tl.store(signals_ptr + at.TOKEN_PROBABILITY, probability)
    tl.store(running_ptr + at.MEAN_ENTROPY, mean_entropy)
    tl.store(running_ptr + at.MAX_ENTROPY, max_entropy)
    tl.store(running_ptr + at.MEAN_CONFIDENCE, mean_confidence)
    tl.store(running_ptr + at.MIN_CONFIDENCE, min_confidence)
    tl.store(running_ptr + at.LAST_ENTROPY, entropy)
    tl.store(running_ptr + at.LAST_CONFIDENCE, confidence)
    tl.store(running_ptr + at.LAST_MARGIN, margin)
    tl.store(rows_ptr + at.DRAFTED, drafted + 1)
    tl.store(rows_ptr + at.MATCH_LENGTH, match_length)
    tl.store(rows_ptr + at.STOP, stop)
