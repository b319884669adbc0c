"""What runs between the models in a loop without a host, in plain torch: the oracle of `loop_step`.

Rows are handled one after the other, in Python, as in `reference`.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from . import layout as at
from .layout import LoopState, StepState

__all__ = ["close_step", "keep_draft", "publish_conditions", "step_inputs"]


def step_inputs(
    state: StepState,
    purpose: int,
    *,
    tokens: Tensor,
    positions: Tensor,
    input_ids: Tensor | None = None,
) -> None:
    """The tokens of a forward and where they stand.

    A verification feeds the last committed token and what follows it. The draft is fed what its
    cache lacks of the committed tokens (catching up, which is noted in DRAFT_LENGTH), the last two
    of them (its first forward: one of the two may be there already), or its own last token. A row
    that does not draft is fed again what the draft's cache holds.

    Parameters
    ----------
    state : StepState
        Mutated by INPUTS_CATCH_UP only.
    purpose : int
        ``INPUTS_CATCH_UP``, ``INPUTS_FIRST``, ``INPUTS_NEXT`` or ``INPUTS_VERIFY``.
    tokens : int32 [B, W]
        Overwritten. W is 16, 2, 1, or for a verification 1 to 16.
    positions : int64 [B, W]
        Overwritten.
    input_ids : int32 [V], optional
        What the model is fed for each target id. None: the same.
    """
    width = tokens.shape[1]
    for b, row in enumerate(state.rows.tolist()):
        length, held = row[at.LENGTH], row[at.DRAFT_LENGTH]
        if purpose == at.INPUTS_VERIFY:
            first = length - 1
        elif row[at.DONE] or row[at.STOP]:
            first = held - width
        elif purpose == at.INPUTS_CATCH_UP:
            first = held
            state.rows[b, at.DRAFT_LENGTH] = min(held + width, length)
        elif purpose == at.INPUTS_FIRST:
            first = length - 2
        else:
            first = length + row[at.DRAFTED] - 1
        first = max(first, 0)
        fed = state.sequence[b, first : first + width]
        tokens[b] = fed if input_ids is None else input_ids[fed.long()]
        positions[b] = torch.arange(first, first + width)


def close_step(state: StepState, loop: LoopState, *, draft_positions: int = 0) -> None:
    """Tell the host what each row committed, and make the rows ready for the next step.

    After a verification. A row that committed tokens, or met an error, gets its record, and its
    tokens are written out; DRAFT_LENGTH becomes what the draft's cache holds of the committed
    tokens; a row that the host has cancelled is done; one that the draft cannot reach the end of a
    step for is stopped. STEPS is counted, and PASSES begins anew.

    Parameters
    ----------
    state : StepState
        Mutated.
    loop : LoopState
        Mutated.
    draft_positions : int
        Longest sequence of the draft; 0 without one.
    """
    mark = int(loop.control[at.GENERATION]) << 32
    loop.control[at.STEPS] += 1
    loop.passes[at.PASSES] = 0
    for b, row in enumerate(state.rows.tolist()):
        length, committed = row[at.LENGTH], row[at.COMMITTED]
        before, gamma = length - committed, row[at.GAMMA]
        failed = row[at.DONE] == at.DONE_ERROR and not row[at.REPORTED]
        if failed:
            state.rows[b, at.REPORTED] = 1
            loop.records[b, row[at.STEP]] = (
                mark | row[at.ERROR] << at.RECORD_ERROR | row[at.DONE] << at.RECORD_DONE
            )
        elif committed:
            index = row[at.STEP] - 1
            loop.tokens[b, before:length] = mark | state.sequence[b, before:length].long()
            if loop.signals is not None:
                loop.signals[b, index] = state.signals[b]
            loop.records[b, index] = (
                mark
                | row[at.DONE] << at.RECORD_DONE
                | committed << at.RECORD_COMMITTED
                | row[at.ACCEPTED] << at.RECORD_ACCEPTED
                | gamma
            )
            if gamma:
                held = before + min(row[at.ACCEPTED], gamma - 1)
                state.rows[b, at.DRAFT_LENGTH] = held
        if row[at.DONE]:
            continue
        if loop.cancel[b]:
            state.rows[b, at.DONE] = at.DONE_STOP
        if length + at.GAMMA_MAX > draft_positions:
            state.rows[b, at.STOP] = 1


def publish_conditions(state: StepState, loop: LoopState, *, gamma_cap: int = at.GAMMA_MAX) -> None:
    """What the loop goes by: whether rows run, draft and lag, and the longest draft.

    Both loops within a step are bounded here, whatever the other kernels do: after MOST_PASSES
    since the close of the last step nothing drafts or lags. Steps are bounded by MOST_STEPS.

    Parameters
    ----------
    state : StepState
        Not mutated.
    loop : LoopState
        TICKET and PASSES are incremented; ``conditions`` is overwritten, and ``ended`` if no row
        runs.
    gamma_cap : int
        Most draft tokens of a step, for FIXED_GAMMA.
    """
    rows = state.rows.tolist()
    running = [row for row in rows if not row[at.DONE]]
    drafting = [row for row in running if not row[at.STOP]]
    steps, most = loop.control[[at.STEPS, at.MOST_STEPS]].tolist()
    ticket = int(loop.control[at.TICKET]) + 1
    loop.control[at.TICKET] = ticket
    loop.passes[at.PASSES] += 1
    bounded = bool(loop.passes[at.PASSES] <= loop.passes[at.MOST_PASSES])
    lagging = any(row[at.LENGTH] - row[at.DRAFT_LENGTH] > 2 for row in drafting)
    values = [0] * at.CONDITIONS
    values[at.RUNNING_ROWS] = int(bool(running) and steps < most)
    values[at.DRAFTING_ROWS] = int(bool(drafting) and bounded)
    values[at.LAGGING_ROWS] = int(lagging and bounded)
    values[at.MOST_DRAFTED] = max((row[at.DRAFTED] for row in running), default=0)
    room = [min(row[at.LIMIT] - row[at.LENGTH] - 1, gamma_cap) for row in drafting]
    values[at.FIXED_GAMMA] = max(room, default=0)
    loop.conditions.copy_(torch.tensor([ticket << 32 | value for value in values]))
    if not values[at.RUNNING_ROWS]:
        loop.ended[0] = int(loop.control[at.GENERATION]) << 32 | steps


def keep_draft(
    state: StepState, logits: Tensor, cutoffs: Tensor, lse: Tensor, *, kept: Sequence[Tensor]
) -> None:
    """Keep what a draft token is about to be drawn from, for rejection sampling.

    Ahead of `draft_step`: rows that draft keep it as their draft token number DRAFTED.

    Parameters
    ----------
    state : StepState
        Not mutated.
    logits : floating [B, V]
        Unit stride in V.
    cutoffs, lse : float32 [B]
        Of ``logits``, from `cutoff`.
    kept : (floating [B, GAMMA_MAX, V], float32 [B, GAMMA_MAX], float32 [B, GAMMA_MAX])
        Of all draft tokens of the step. Mutated.
    """
    for b, row in enumerate(state.rows.tolist()):
        drafted = row[at.DRAFTED]
        if not (row[at.DONE] or row[at.STOP]) and drafted < at.GAMMA_MAX:
            for tensor, new in zip(kept, (logits, cutoffs, lse), strict=True):
                tensor[b, drafted] = new[b]
