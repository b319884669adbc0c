"""The device function that ends a step, and what `verify` and `verify_rejection` check alike.

Its twin is `reference._commit`.
"""

from __future__ import annotations

import triton
import triton.language as tl
from torch import Tensor

from . import layout as at
from .checks import check_tensor
from .device import _decide, _latest_match, _load_policy
from .layout import StepState

STATE_TYPES = {
    "rows_ptr": "*i32",
    "running_ptr": "*fp32",
    "sequence_ptr": "*i32",
    "stride_sb": "i32",
    "policy_ptr": "*fp32",
    "eos_ptr": "*i32",
    "stride_eb": "i32",
    "n_eos": "i32",
}
"""Triton types of the arguments that describe the state, for the registry."""


@triton.jit
def _commit(
    rows_ptr,
    running_ptr,
    sequence_ptr,
    policy_ptr,
    eos_ptr,
    n_eos,
    length,
    drafted,
    accepted,
    b_token,
):
    """Append the first ``accepted + 1`` of ``b_token`` [16] to a row and close its step.

    The pointers are the row's. A last token of -1 stands for a row of logits without a token.
    """
    # All threads load each of these words, and one stores it: none may still be about to load.
    # The barrier stands behind the caller's loads too, those of the draft tokens among them.
    error = tl.load(rows_ptr + at.ERROR)
    limit = tl.load(rows_ptr + at.LIMIT)
    step = tl.load(rows_ptr + at.STEP)
    plain_run = tl.load(rows_ptr + at.PLAIN_RUN) + 1
    mean_entropy = tl.load(running_ptr + at.MEAN_ENTROPY)
    max_entropy = tl.load(running_ptr + at.MAX_ENTROPY)
    mean_confidence = tl.load(running_ptr + at.MEAN_CONFIDENCE)
    min_confidence = tl.load(running_ptr + at.MIN_CONFIDENCE)
    last_entropy = tl.load(running_ptr + at.LAST_ENTROPY)
    last_confidence = tl.load(running_ptr + at.LAST_CONFIDENCE)
    last_margin = tl.load(running_ptr + at.LAST_MARGIN)
    acceptance = tl.load(running_ptr + at.ACCEPTANCE)
    match_length = tl.load(rows_ptr + at.MATCH_LENGTH)
    ema_weight = tl.load(policy_ptr + at.EMA_WEIGHT)
    sees_matches = tl.load(policy_ptr + at.MATCHES) != 0.0
    tl.debug_barrier()

    o = tl.arange(0, 16)
    if tl.sum(tl.where(o == accepted, b_token, 0), 0) < 0:
        tl.store(rows_ptr + at.ERROR, error | at.ERROR_TARGET)
        tl.store(rows_ptr + at.DONE, at.DONE_ERROR)
        tl.store(rows_ptr + at.COMMITTED, 0)
    else:
        room = limit - length
        ends = tl.zeros([16], tl.int1)
        for i in range(0, n_eos):
            ends = ends | (b_token == tl.load(eos_ptr + i))
        o_end = tl.min(tl.where(ends & (o <= accepted) & (o < room), o, 16), 0)
        ended = o_end < 16
        count = tl.where(ended, o_end + 1, tl.minimum(accepted + 1, room))
        if drafted > 0:
            share = accepted.to(tl.float32) / drafted.to(tl.float32)
            acceptance += ema_weight * (share - acceptance)
            plain_run = plain_run * 0
        done = tl.where(count == room, at.DONE_LENGTH, at.RUNNING)
        done = tl.where(ended, at.DONE_STOP, done)
        tl.store(sequence_ptr + length + o, b_token, mask=o < count)
        stop = tl.full((), 1, tl.int32)
        if done == at.RUNNING:
            if sees_matches:
                tl.debug_barrier()  # what was appended is seen by all threads
                match, match_length = _latest_match(sequence_ptr, length + count)
                tl.store(rows_ptr + at.MATCH, match)
                tl.store(rows_ptr + at.MATCH_LENGTH, match_length)
            stop = _decide(
                _load_policy(policy_ptr),
                length + count,
                limit,
                drafted * 0,
                plain_run,
                mean_entropy,
                max_entropy,
                mean_confidence,
                min_confidence,
                last_entropy,
                last_confidence,
                last_margin,
                acceptance,
                match_length,
            )
        tl.store(running_ptr + at.ACCEPTANCE, acceptance)
        tl.store(rows_ptr + at.LENGTH, length + count)
        tl.store(rows_ptr + at.DRAFTED, 0)
        tl.store(rows_ptr + at.STOP, stop)
        tl.store(rows_ptr + at.DONE, done)
        tl.store(rows_ptr + at.GAMMA, drafted)
        tl.store(rows_ptr + at.ACCEPTED, tl.minimum(accepted, count))
        tl.store(rows_ptr + at.COMMITTED, count)
        tl.store(rows_ptr + at.STEP, step + 1)
        tl.store(rows_ptr + at.PLAIN_RUN, plain_run)


def check_step(logits: Tensor, state: StepState, policy: Tensor, eos: Tensor) -> None:
    """Refuse arguments that a verification cannot work on.

    Parameters
    ----------
    logits, state, policy, eos
        As in `reference.verify`.

    Raises
    ------
    TypeError, ValueError
        One line that names the argument, what was expected and what came.
    """
    check_tensor("logits", logits, "floating", (None, None, None))
    batch, width, vocabulary = logits.shape
    if not 1 <= width <= at.WIDTH_MAX:
        raise ValueError(f"logits: expected 1 to {at.WIDTH_MAX} positions, got {width}")
    if vocabulary < 1:
        raise ValueError("logits: expected a vocabulary of at least 1, got 0")
    device = logits.device
    check_tensor("state.rows", state.rows, "int32", (batch, at.ROW_WORDS), device, dense=True)
    running = (batch, at.RUNNING_WORDS)
    check_tensor("state.running", state.running, "float32", running, device, dense=True)
    check_tensor("state.sequence", state.sequence, "int32", (batch, None), device)
    check_tensor("policy", policy, "float32", (at.POLICY_WORDS,), device, dense=True)
    check_tensor("eos", eos, "int32", (batch, None), device)
