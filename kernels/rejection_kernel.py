"""The kernel of `rejection`: which position closes a step, and what token closes it."""

from __future__ import annotations

import triton
import triton.language as tl

from . import layout as at
from .commit import _commit
from .device import _gumbel_run, _uniform
from .scan import _NO_TOKEN, _arrives_last, _best_of_lanes, _best_of_split, _merge_splits


@triton.jit
def _probability(b_x, inv, low, lse):
    return tl.where(b_x >= low, tl.exp(b_x * inv - lse), 0.0)


@triton.jit
def _draw(b_weight, b_noise, o_token, best, token):
    """Fold one block of unnormalised probabilities into the lanes' best draw."""
    possible = b_weight > 0.0
    b_score = tl.log(tl.where(possible, b_weight, 1.0)) + b_noise
    better = possible & (b_score > best)
    return tl.where(better, b_score, best), tl.where(better, o_token, token)


@triton.jit
def _residual_block(
    # logits of the position and, by draft id, of the draft
    x_ptr,
    y_ptr,
    ids_ptr,
    vocabulary,
    first,
    # distributions
    inv,
    low,
    lse,
    draft_low,
    draft_lse,
    # noise
    seed,
    request,
    step,
    purpose,
    # running best of the residual and of the target
    best,
    token,
    target_best,
    target_token,
    HAS_IDS: tl.constexpr,
    MASKED: tl.constexpr,
    BLOCK: tl.constexpr,
):
    o_token = first + tl.arange(0, BLOCK)
    if MASKED:
        mask = o_token < vocabulary
        b_x = tl.load(x_ptr + o_token, mask=mask, other=float("-inf")).to(tl.float32)
        if HAS_IDS:
            b_id = tl.load(ids_ptr + o_token, mask=mask, other=-1)
            b_y = tl.load(y_ptr + b_id, mask=b_id >= 0, other=float("-inf")).to(tl.float32)
        else:
            b_y = tl.load(y_ptr + o_token, mask=mask, other=float("-inf")).to(tl.float32)
    else:
        b_x = tl.load(x_ptr + o_token, eviction_policy="evict_first").to(tl.float32)
        if HAS_IDS:
            b_id = tl.load(ids_ptr + o_token)
            b_y = tl.load(y_ptr + b_id, mask=b_id >= 0, other=float("-inf")).to(tl.float32)
        else:
            b_y = tl.load(y_ptr + o_token, eviction_policy="evict_first").to(tl.float32)
    b_p = _probability(b_x, inv, low, lse)
    b_q = _probability(b_y, inv, draft_low, draft_lse)
    b_noise = _gumbel_run(seed, request, step, purpose, first, BLOCK)
    best, token = _draw(b_p - b_q, b_noise, o_token, best, token)
    target_best, target_token = _draw(b_p, b_noise, o_token, target_best, target_token)
    return best, token, target_best, target_token


@triton.jit
def _residual_of_split(
    x_ptr,
    y_ptr,
    ids_ptr,
    vocabulary,
    i_split,
    blocks,
    inv,
    low,
    lse,
    draft_low,
    draft_lse,
    seed,
    request,
    step,
    purpose,
    HAS_IDS: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """Best draw of one split from the residual, (score, token), and from the target, likewise."""
    best = tl.full([BLOCK], float("-inf"), tl.float32)
    token = tl.full([BLOCK], _NO_TOKEN, tl.int32)
    target_best, target_token = best, token
    start = i_split * blocks * BLOCK
    full = tl.minimum(blocks, (vocabulary - start) // BLOCK)
    for i in range(0, full):
        best, token, target_best, target_token = _residual_block(
            x_ptr, y_ptr, ids_ptr, vocabulary, start + i * BLOCK,
            inv, low, lse, draft_low, draft_lse, seed, request, step, purpose,
            best, token, target_best, target_token, HAS_IDS, False, BLOCK,
        )  # fmt: skip
    first = start + full * BLOCK
    if (full < blocks) & (first < vocabulary):
        best, token, target_best, target_token = _residual_block(
            x_ptr, y_ptr, ids_ptr, vocabulary, first,
            inv, low, lse, draft_low, draft_lse, seed, request, step, purpose,
            best, token, target_best, target_token, HAS_IDS, True, BLOCK,
        )  # fmt: skip
    score, winner = _best_of_lanes(best, token)
    target_score, target_winner = _best_of_lanes(target_best, target_token)
    return score, winner, target_score, target_winner


@triton.jit(do_not_specialize=["vocabulary", "stride_eb", "n_eos", "blocks"])
def _verify_rejection_kernel(
    # logits [B, W, V] and [B, GAMMA_MAX, V_draft]
    logits_ptr,
    stride_lb,
    stride_lw,
    vocabulary,
    draft_ptr,
    stride_db,
    stride_dj,
    ids_ptr,
    # state
    rows_ptr,
    running_ptr,
    sequence_ptr,
    stride_sb,
    policy_ptr,
    eos_ptr,
    stride_eb,
    n_eos,
    # sampling; cutoffs and log-sum-exps [B, W] and [B, GAMMA_MAX]
    inv_ptr,
    seed_ptr,
    cutoff_ptr,
    lse_ptr,
    draft_cutoff_ptr,
    draft_lse_ptr,
    # scratch
    score_ptr,
    token_ptr,
    counter_ptr,
    # shape
    blocks,
    HAS_IDS: tl.constexpr,
    SPLITS: tl.constexpr,
    BLOCK: tl.constexpr,
):
    i_split, i_position = tl.program_id(0), tl.program_id(1)
    i_row = tl.program_id(2).to(tl.int64)
    splits, width = tl.num_programs(0), tl.num_programs(1)
    rows_ptr += i_row * at.ROW_WORDS
    if tl.load(rows_ptr + at.DONE) != 0:
        if (i_split == 0) & (i_position == 0):
            tl.store(rows_ptr + at.COMMITTED, 0)
        return
    drafted = tl.load(rows_ptr + at.DRAFTED)
    if i_position > drafted:
        return

    length = tl.load(rows_ptr + at.LENGTH)
    step = tl.load(rows_ptr + at.STEP)
    request = tl.load(rows_ptr + at.REQUEST)
    inv = tl.load(inv_ptr + i_row)
    seed = tl.load(seed_ptr + i_row)
    logits_ptr += i_row * stride_lb
    draft_ptr += i_row * stride_db
    sequence_ptr += i_row * stride_sb
    cutoff_ptr += i_row * width
    lse_ptr += i_row * width
    draft_cutoff_ptr += i_row * at.GAMMA_MAX
    draft_lse_ptr += i_row * at.GAMMA_MAX

    o = tl.arange(0, 16)
    m_draft = o < drafted
    b_draft = tl.load(sequence_ptr + length + o, mask=m_draft, other=-2)
    # The position that closes the step; of a greedy row, known once all positions are scanned.
    closing = drafted
    valid = tl.full((), True, tl.int1)
    if inv > 0.0:
        b_lse = tl.load(lse_ptr + o, mask=o <= drafted, other=0.0)
        b_x = tl.load(logits_ptr + o.to(tl.int64) * stride_lw + b_draft, mask=m_draft, other=0.0)
        b_low = tl.load(cutoff_ptr + o, mask=m_draft, other=0.0)
        b_p = _probability(b_x.to(tl.float32), inv, b_low, b_lse)
        b_id = b_draft
        if HAS_IDS:
            b_id = tl.load(ids_ptr + b_draft, mask=m_draft, other=-1)
        m_id = m_draft & (b_id >= 0)
        b_y = tl.load(draft_ptr + o.to(tl.int64) * stride_dj + b_id, mask=m_id, other=float("-inf"))
        b_low = tl.load(draft_cutoff_ptr + o, mask=m_draft, other=0.0)
        b_draft_lse = tl.load(draft_lse_ptr + o, mask=m_draft, other=0.0)
        b_q = _probability(b_y.to(tl.float32), inv, b_low, b_draft_lse)
        zero = (o * 0).to(tl.uint32)
        words, _, _, _ = tl.philox(
            seed,
            zero,
            zero + step.to(tl.uint32),
            zero + request.to(tl.uint32),
            (at.NOISE_ACCEPT | o << 8).to(tl.uint32),
        )
        m_valid = tl.abs(b_lse) < float("inf")
        m_accept = m_draft & m_valid & (_uniform(words) * b_q < b_p)
        closing = tl.min(tl.where(m_accept, 16, o), 0)
        valid = tl.sum(tl.where((o == closing) & m_valid, 1, 0), 0) > 0

    slots = width * 2 * splits
    score_ptr += i_row * slots
    token_ptr += i_row * slots
    slot = i_position * 2 * splits + i_split
    if (inv > 0.0) & (i_position == closing) & (i_position < drafted):
        score, token, target_score, target_token = _residual_of_split(
            logits_ptr + i_position.to(tl.int64) * stride_lw,
            draft_ptr + i_position.to(tl.int64) * stride_dj,
            ids_ptr,
            vocabulary,
            i_split,
            blocks,
            inv,
            tl.load(cutoff_ptr + i_position),
            tl.load(lse_ptr + i_position),
            tl.load(draft_cutoff_ptr + i_position),
            tl.load(draft_lse_ptr + i_position),
            seed,
            request,
            step,
            at.NOISE_RESIDUAL | i_position << 8,
            HAS_IDS,
            BLOCK,
        )
        tl.store(score_ptr + slot, score)
        tl.store(token_ptr + slot, token)
        tl.store(score_ptr + slot + splits, target_score)
        tl.store(token_ptr + slot + splits, target_token)
    elif (inv == 0.0) | (i_position == closing):
        score, token = _best_of_split(
            logits_ptr + i_position.to(tl.int64) * stride_lw,
            vocabulary,
            i_split,
            blocks,
            inv,
            tl.load(cutoff_ptr + i_position),
            seed,
            request,
            step,
            at.NOISE_BONUS | i_position << 8,
            True,
            BLOCK,
        )
        tl.store(score_ptr + slot, score)
        tl.store(token_ptr + slot, token)

    if _arrives_last(counter_ptr + i_row, (drafted + 1) * splits):
        m_scanned = tl.where(inv == 0.0, o <= drafted, o == closing)
        stride = 2 * splits
        best, b_token = _merge_splits(score_ptr, token_ptr, stride, o, m_scanned, splits, SPLITS)
        if inv > 0.0:
            m_residual = m_scanned & m_draft
            _, b_target = _merge_splits(
                score_ptr + splits, token_ptr + splits, stride, o, m_residual, splits, SPLITS
            )
            b_token = tl.where(m_residual & (best == float("-inf")), b_target, b_token)
            b_token = tl.where(o < closing, b_draft, tl.where(valid, b_token, -1))
        else:
            closing = tl.min(tl.where(b_token == b_draft, 16, o), 0)
        _commit(
            rows_ptr,
            running_ptr + i_row * at.RUNNING_WORDS,
            sequence_ptr,
            policy_ptr,
            eos_ptr + i_row * stride_eb,
            n_eos,
            length,
            drafted,
            closing,
            b_token,
        )
