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
from .device import _decide, _gumbel_at, _gumbel_run

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
def _merge(top, second, total, weighted, token):
    """Merge lanes, or partials, into one: `_fold`'s values of them all."""
    best = tl.max(top, 0)
    first = tl.min(tl.where(top == best, token, _NO_ID), 0)
    runner_up = tl.max(tl.where(token == first, second, top), 0)
    shift = _exponent(top, best)
    kept = tl.exp2(shift)
    return (
        best,
        runner_up,
        tl.sum(kept * total, 0),
        tl.sum(kept * (weighted + shift * total), 0),
        first,
    )


@triton.jit
def _merge_draws(score, token, logit):
    """The highest score, the lowest id among its equals, and the logit of that id."""
    best = tl.max(score, 0)
    first = tl.min(tl.where(score == best, token, _NO_ID), 0)
    return best, first, tl.max(tl.where(token == first, logit, float("-inf")), 0)


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
):
    i_split = tl.program_id(0)
    i_row = tl.program_id(1).to(tl.int64)
    rows_ptr += i_row * at.ROW_WORDS
    if (tl.load(rows_ptr + at.DONE) != 0) | (tl.load(rows_ptr + at.STOP) != 0):
        return
    length = tl.load(rows_ptr + at.LENGTH)
    drafted = tl.load(rows_ptr + at.DRAFTED)
    logits_ptr += i_row * stride_logits_b

    o = tl.arange(0, BLOCK)
    token = i_split * BLOCK + o
    top = tl.full([BLOCK], float("-inf"), tl.float32)
    second = top
    total = tl.zeros([BLOCK], tl.float32)
    weighted = total

    if SAMPLED:
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
        score, drawn, logit = top, token, top

    full_blocks = vocabulary // BLOCK
    for i_block in range(i_split, tl.cdiv(vocabulary, BLOCK), SPLITS):
        o_token = i_block * BLOCK + o
        if i_block < full_blocks:
            x = tl.load(logits_ptr + o_token, eviction_policy="evict_first").to(tl.float32)
        else:
            x = tl.load(
                logits_ptr + o_token,
                mask=o_token < vocabulary,
                other=float("-inf"),
                eviction_policy="evict_first",
            ).to(tl.float32)
        top, second, total, weighted, token = _fold(x, o_token, top, second, total, weighted, token)
        if SAMPLED:  # noqa: SIM102 - the second test is made on the device
            if inv_temperature != 0.0:
                if HAS_ID_MAP:
                    b_target = tl.load(id_map_ptr + o_token, mask=o_token < vocabulary, other=0)
                    noise = _gumbel_at(seed, request, index, purpose, b_target)
                else:
                    noise = _gumbel_run(seed, request, index, purpose, i_block * BLOCK, BLOCK)
                y = tl.where(x >= cutoff, x * inv_temperature + noise, float("-inf"))
                drawn = tl.where(y > score, o_token, drawn)
                logit = tl.where(y > score, x, logit)
                score = tl.maximum(score, y)

    top, second, total, weighted, token = _merge(top, second, total, weighted, token)
    if SAMPLED:
        score, drawn, logit = _merge_draws(score, drawn, logit)

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
        top, second, total, weighted, token = _merge(b_top, b_second, b_total, b_weighted, b_token)
        if SAMPLED:
            b_score = tl.load(p + 5 * SPLITS, m_split, low, cache_modifier=".cg")
            b_drawn = tl.load(p + 6 * SPLITS, m_split, _NO_ID, cache_modifier=".cg").to(tl.int32)
            b_logit = tl.load(p + 7 * SPLITS, m_split, low, cache_modifier=".cg")
            score, drawn, logit = _merge_draws(b_score, b_drawn, b_logit)

    # NaN reaches `total`; a NaN or infinite `top` fails both comparisons.
    valid = (top > float("-inf")) & (top < float("inf")) & (total == total)
    chosen = token
    token_logit = top
    if SAMPLED:  # noqa: SIM102 - as above
        if inv_temperature != 0.0:
            valid = valid & (score > float("-inf"))
            chosen = drawn
            token_logit = logit
    # All threads load each of these words, and one stores it: none may still be about to load.
    running_ptr += i_row * at.RUNNING_WORDS
    error = tl.load(rows_ptr + at.ERROR)
    limit = tl.load(rows_ptr + at.LIMIT)
    plain_run = tl.load(rows_ptr + at.PLAIN_RUN)
    sequence_ptr += i_row * stride_sequence_b
    place = tl.load(rows_ptr + at.MATCH) + drafted
    came = tl.load(sequence_ptr + place, mask=place < length, other=-1)
    match_length = tl.load(rows_ptr + at.MATCH_LENGTH)
    mean_entropy = tl.load(running_ptr + at.MEAN_ENTROPY)
    max_entropy = tl.load(running_ptr + at.MAX_ENTROPY)
    mean_confidence = tl.load(running_ptr + at.MEAN_CONFIDENCE)
    min_confidence = tl.load(running_ptr + at.MIN_CONFIDENCE)
    acceptance = tl.load(running_ptr + at.ACCEPTANCE)
    tl.debug_barrier()

    if valid == 0:
        tl.store(rows_ptr + at.ERROR, error | at.ERROR_DRAFT)
        tl.store(rows_ptr + at.STOP, 1)
        tl.store(rows_ptr + at.DONE, at.DONE_ERROR)
        return
    if HAS_ID_MAP:
        chosen = tl.load(id_map_ptr + chosen)
    match_length = tl.where(came == chosen, match_length, 0)
    confidence = 1.0 / total
    entropy = tl.maximum(tl.log2(total) - weighted * confidence, 0.0)
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
        policy_ptr,
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
