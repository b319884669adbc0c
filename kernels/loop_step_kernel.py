"""The device halves of `loop_step`: a program a row, or one for all; the semantics are those of
`reference_step`.

Every thread of a program loads the words that one of them stores, so a barrier stands between.
"""

from __future__ import annotations

import triton
import triton.language as tl

from . import layout as at


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
    cancelled = tl.load(cancel_ptr + i_row, cache_modifier=".cv") != 0
    mark = tl.load(control_ptr + at.GENERATION).to(tl.int64) << 32
    steps = tl.load(control_ptr + at.STEPS)
    tl.debug_barrier()
    if i_row == 0:
        tl.store(control_ptr + at.STEPS, steps + 1)

    before = length - committed
    records_ptr += i_row * stride_loop_b
    tokens_ptr += i_row * stride_loop_b
    if (done == at.DONE_ERROR) & (reported == 0):
        tl.store(rows_ptr + at.REPORTED, 1)
        word = (error << at.RECORD_ERROR) | (done << at.RECORD_DONE)
        tl.store(records_ptr + step, mark | word.to(tl.int64))
    elif committed > 0:
        o = tl.arange(0, 16)
        mask = o < committed
        token = tl.load(sequence_ptr + i_row * stride_sequence_b + before + o, mask=mask, other=0)
        tl.store(tokens_ptr + before + o, mark | token.to(tl.int64), mask=mask)
        if HAS_SIGNALS:
            SIZE: tl.constexpr = at.GAMMA_MAX * at.SIGNALS
            o_signal = tl.arange(0, 64)
            m_signal = o_signal < SIZE
            signal = tl.load(signals_ptr + i_row * SIZE + o_signal, mask=m_signal)
            kept_signals_ptr += (i_row * stride_loop_b + step - 1) * SIZE
            tl.store(kept_signals_ptr + o_signal, signal, mask=m_signal)
        word = (done << at.RECORD_DONE) | (committed << at.RECORD_COMMITTED)
        word = word | (accepted << at.RECORD_ACCEPTED) | gamma
        tl.store(records_ptr + step - 1, mark | word.to(tl.int64))
        held = tl.where(gamma > 0, before + tl.minimum(accepted, gamma - 1), held)
        tl.store(rows_ptr + at.DRAFT_LENGTH, held)
    if done == 0:
        tl.store(rows_ptr + at.DONE, tl.where(cancelled, at.DONE_STOP, done))
        tl.store(rows_ptr + at.STOP, tl.where(length + at.GAMMA_MAX > draft_positions, 1, stop))


@triton.jit
def _publish_conditions_kernel(
    rows_ptr,  # [B, ROW_WORDS]
    control_ptr,
    conditions_ptr,
    # shape
    batch,
    # constants
    BLOCK: tl.constexpr,
):
    o = tl.arange(0, BLOCK)
    mask = o < batch
    row_ptr = rows_ptr + o * at.ROW_WORDS
    running = mask & (tl.load(row_ptr + at.DONE, mask=mask, other=1) == 0)
    drafting = running & (tl.load(row_ptr + at.STOP, mask=mask, other=1) == 0)
    drafted = tl.load(row_ptr + at.DRAFTED, mask=mask, other=0)
    lag = tl.load(row_ptr + at.LENGTH, mask=mask, other=0)
    lag -= tl.load(row_ptr + at.DRAFT_LENGTH, mask=mask, other=0)
    bounded = tl.load(control_ptr + at.STEPS) < tl.load(control_ptr + at.MOST_STEPS)
    ticket = tl.load(control_ptr + at.TICKET) + 1
    tl.debug_barrier()
    tl.store(control_ptr + at.TICKET, ticket)
    mark = ticket.to(tl.int64) << 32
    any_running = tl.max(running.to(tl.int32), 0) & bounded.to(tl.int32)
    any_drafting = tl.max(drafting.to(tl.int32), 0)
    any_lagging = tl.max((drafting & (lag > 2)).to(tl.int32), 0)
    most = tl.max(tl.where(running, drafted, 0), 0)
    tl.store(conditions_ptr + at.RUNNING_ROWS, mark | any_running.to(tl.int64))
    tl.store(conditions_ptr + at.DRAFTING_ROWS, mark | any_drafting.to(tl.int64))
    tl.store(conditions_ptr + at.LAGGING_ROWS, mark | any_lagging.to(tl.int64))
    tl.store(conditions_ptr + at.MOST_DRAFTED, mark | most.to(tl.int64))
