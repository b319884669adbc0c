"""The device halves of `loop_step`: a program a row, or one for all; the semantics are those of
`reference_step`.

Every thread of a program loads the words that one of them stores, so a barrier stands between.

A word for the host must reach it while the graph that wrote it goes on, and the end of a kernel
within a graph promises the host nothing: so it is written through to the system (``st.wt``, which
ptxas makes a strong store of system scope; `tests/aot/test_system_stores.py` holds it to that).
The stores are relaxed: nothing orders the tokens of a step before its record. The reader needs no
order: every word carries its own mark, and a record whose tokens have not all arrived waits. A word
of the host's is read past every cache that would keep it, for the same reason.
"""

from __future__ import annotations

import triton
import triton.language as tl

from . import layout as at


@triton.jit
def _tell(pointer, word, mask=None):
    """Store a word for the host."""
    tl.store(pointer, word, mask=mask, cache_modifier=".wt")


@triton.jit
def _hear(pointer, EMULATED: tl.constexpr):
    """A word of the host's, not the cache's. (Triton 3.6 drops the modifier ``.cv``.)"""
    if EMULATED:
        word = tl.load(pointer)
    else:
        word = tl.inline_asm_elementwise(
            "ld.relaxed.sys.global.b32 $0, [$1];",
            "=r,l",
            [pointer],
            tl.int32,
            is_pure=False,
            pack=1,
        )
    return word


@triton.jit
def _step_inputs_kernel(
    rows_ptr,
    sequence_ptr,  # [B, S]
    input_ids_ptr,  # [V]
    # outputs [B, width]
    tokens_ptr,
    positions_ptr,
    # shape
    stride_sequence_b,
    # constants
    PURPOSE: tl.constexpr,
    HAS_IDS: tl.constexpr,
    WIDTH: tl.constexpr,
):
    i_row = tl.program_id(0).to(tl.int64)
    rows_ptr += i_row * at.ROW_WORDS
    length = tl.load(rows_ptr + at.LENGTH)
    if PURPOSE == at.INPUTS_VERIFY:
        first = length - 1
    else:
        held = tl.load(rows_ptr + at.DRAFT_LENGTH)
        idle = (tl.load(rows_ptr + at.DONE) != 0) | (tl.load(rows_ptr + at.STOP) != 0)
        if PURPOSE == at.INPUTS_CATCH_UP:
            first = held
            tl.debug_barrier()
            tl.store(
                rows_ptr + at.DRAFT_LENGTH,
                tl.where(idle, held, tl.minimum(held + WIDTH, length)),
            )
        elif PURPOSE == at.INPUTS_FIRST:
            first = length - 2
        else:
            first = length + tl.load(rows_ptr + at.DRAFTED) - 1
        first = tl.where(idle, held - WIDTH, first)
    first = tl.maximum(first, 0)
    o = tl.arange(0, 16)
    mask = o < WIDTH
    token = tl.load(sequence_ptr + i_row * stride_sequence_b + first + o, mask=mask, other=0)
    if HAS_IDS:
        token = tl.load(input_ids_ptr + token, mask=mask, other=0)
    tl.store(tokens_ptr + i_row * WIDTH + o, token, mask=mask)
    tl.store(positions_ptr + i_row * WIDTH + o, (first + o).to(tl.int64), mask=mask)


@triton.jit
def _close_step_kernel(
    # state
    rows_ptr,
    sequence_ptr,  # [B, S]
    signals_ptr,  # [B, GAMMA_MAX * SIGNALS]
    # the loop's
    control_ptr,
    passes_ptr,
    cancel_ptr,  # [B]
    tokens_ptr,  # [B, S]
    records_ptr,  # [B, S]
    kept_signals_ptr,  # [B, S, GAMMA_MAX * SIGNALS]
    # shape
    stride_sequence_b,
    stride_loop_b,
    draft_positions,
    # constants
    HAS_SIGNALS: tl.constexpr,
    EMULATED: tl.constexpr,
):
    i_row = tl.program_id(0).to(tl.int64)
    rows_ptr += i_row * at.ROW_WORDS
    length = tl.load(rows_ptr + at.LENGTH)
    committed = tl.load(rows_ptr + at.COMMITTED)
    gamma = tl.load(rows_ptr + at.GAMMA)
    accepted = tl.load(rows_ptr + at.ACCEPTED)
    done = tl.load(rows_ptr + at.DONE)
    error = tl.load(rows_ptr + at.ERROR)
    step = tl.load(rows_ptr + at.STEP)
    reported = tl.load(rows_ptr + at.REPORTED)
    held = tl.load(rows_ptr + at.DRAFT_LENGTH)
    stop = tl.load(rows_ptr + at.STOP)
    cancelled = _hear(cancel_ptr + i_row, EMULATED) != 0
    mark = tl.load(control_ptr + at.GENERATION).to(tl.int64) << 32
    steps = tl.load(control_ptr + at.STEPS)
    tl.debug_barrier()
    if i_row == 0:
        tl.store(control_ptr + at.STEPS, steps + 1)
        tl.store(passes_ptr + at.PASSES, 0)

    before = length - committed
    records_ptr += i_row * stride_loop_b
    tokens_ptr += i_row * stride_loop_b
    if (done == at.DONE_ERROR) & (reported == 0):
        tl.store(rows_ptr + at.REPORTED, 1)
        word = (error << at.RECORD_ERROR) | (done << at.RECORD_DONE)
        _tell(records_ptr + step, mark | word.to(tl.int64))
    elif committed > 0:
        o = tl.arange(0, 16)
        mask = o < committed
        token = tl.load(sequence_ptr + i_row * stride_sequence_b + before + o, mask=mask, other=0)
        _tell(tokens_ptr + before + o, mark | token.to(tl.int64), mask)
        if HAS_SIGNALS:
            SIZE: tl.constexpr = at.GAMMA_MAX * at.SIGNALS
            o_signal = tl.arange(0, 64)
            m_signal = o_signal < SIZE
            signal = tl.load(signals_ptr + i_row * SIZE + o_signal, mask=m_signal)
            kept_signals_ptr += (i_row * stride_loop_b + step - 1) * SIZE
            tl.store(kept_signals_ptr + o_signal, signal, mask=m_signal)
        word = (done << at.RECORD_DONE) | (committed << at.RECORD_COMMITTED)
        word = word | (accepted << at.RECORD_ACCEPTED) | gamma
        _tell(records_ptr + step - 1, mark | word.to(tl.int64))
        held = tl.where(gamma > 0, before + tl.minimum(accepted, gamma - 1), held)
        tl.store(rows_ptr + at.DRAFT_LENGTH, held)
    if done == 0:
        tl.store(rows_ptr + at.DONE, tl.where(cancelled, at.DONE_STOP, done))
        tl.store(rows_ptr + at.STOP, tl.where(length + at.GAMMA_MAX > draft_positions, 1, stop))


@triton.jit
def _publish_conditions_kernel(
    rows_ptr,  # [B, ROW_WORDS]
    control_ptr,
    passes_ptr,
    conditions_ptr,
    ended_ptr,
    # shape
    batch,
    gamma_cap,
    # constants
    BLOCK: tl.constexpr,
):
    o = tl.arange(0, BLOCK)
    mask = o < batch
    row_ptr = rows_ptr + o * at.ROW_WORDS
    running = mask & (tl.load(row_ptr + at.DONE, mask=mask, other=1) == 0)
    drafting = running & (tl.load(row_ptr + at.STOP, mask=mask, other=1) == 0)
    drafted = tl.load(row_ptr + at.DRAFTED, mask=mask, other=0)
    length = tl.load(row_ptr + at.LENGTH, mask=mask, other=0)
    lag = length - tl.load(row_ptr + at.DRAFT_LENGTH, mask=mask, other=0)
    room = tl.load(row_ptr + at.LIMIT, mask=mask, other=0) - length - 1
    generation = tl.load(control_ptr + at.GENERATION)
    steps = tl.load(control_ptr + at.STEPS)
    in_steps = (steps < tl.load(control_ptr + at.MOST_STEPS)).to(tl.int32)
    ticket = tl.load(control_ptr + at.TICKET) + 1
    passes = tl.load(passes_ptr + at.PASSES) + 1
    in_passes = (passes <= tl.load(passes_ptr + at.MOST_PASSES)).to(tl.int32)
    tl.debug_barrier()
    tl.store(control_ptr + at.TICKET, ticket)
    tl.store(passes_ptr + at.PASSES, passes)
    any_running = tl.max(running.to(tl.int32), 0) & in_steps
    any_drafting = tl.max(drafting.to(tl.int32), 0) & in_passes
    any_lagging = tl.max((drafting & (lag > 2)).to(tl.int32), 0) & in_passes
    most = tl.max(tl.where(running, drafted, 0), 0)
    fixed = tl.max(tl.where(drafting, tl.minimum(room, gamma_cap), 0), 0)
    mark = ticket.to(tl.int64) << 32
    _tell(conditions_ptr + at.RUNNING_ROWS, mark | any_running.to(tl.int64))
    _tell(conditions_ptr + at.DRAFTING_ROWS, mark | any_drafting.to(tl.int64))
    _tell(conditions_ptr + at.LAGGING_ROWS, mark | any_lagging.to(tl.int64))
    _tell(conditions_ptr + at.MOST_DRAFTED, mark | most.to(tl.int64))
    _tell(conditions_ptr + at.FIXED_GAMMA, mark | fixed.to(tl.int64))
    if any_running == 0:
        _tell(ended_ptr, (generation.to(tl.int64) << 32) | steps.to(tl.int64))


@triton.jit
def _keep_draft_kernel(
    rows_ptr,  # [B, ROW_WORDS]
    # of the draft token that is being chosen
    logits_ptr,  # [B, V]
    cutoffs_ptr,  # [B]
    lse_ptr,  # [B]
    # of the step's draft tokens
    kept_ptr,  # [B, GAMMA_MAX, V]
    kept_cutoffs_ptr,  # [B, GAMMA_MAX]
    kept_lse_ptr,  # [B, GAMMA_MAX]
    # shape
    stride_logits_b,
    stride_kept_b,
    stride_kept_j,
    vocabulary,
    # constants
    BLOCK: tl.constexpr,
):
    i_block = tl.program_id(0)
    i_row = tl.program_id(1).to(tl.int64)
    rows_ptr += i_row * at.ROW_WORDS
    drafted = tl.load(rows_ptr + at.DRAFTED)
    idle = (tl.load(rows_ptr + at.DONE) != 0) | (tl.load(rows_ptr + at.STOP) != 0)
    if idle | (drafted >= at.GAMMA_MAX):
        return
    logits_ptr += i_row * stride_logits_b
    kept_ptr += i_row * stride_kept_b + drafted.to(tl.int64) * stride_kept_j
    o = i_block * BLOCK + tl.arange(0, BLOCK)
    if (i_block + 1) * BLOCK <= vocabulary:
        tl.store(kept_ptr + o, tl.load(logits_ptr + o))
    else:
        mask = o < vocabulary
        tl.store(kept_ptr + o, tl.load(logits_ptr + o, mask=mask), mask=mask)
    if i_block == 0:
        place = i_row * at.GAMMA_MAX + drafted
        tl.store(kept_cutoffs_ptr + place, tl.load(cutoffs_ptr + i_row))
        tl.store(kept_lse_ptr + place, tl.load(lse_ptr + i_row))
