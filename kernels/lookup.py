"""Drafting tokens that were found rather than predicted: `draft_step` without logits.

What a lookup in the text so far finds is a run of tokens, known before the first of them is
decided about. So one call drafts a whole step: token after token is appended and its signals are
folded into the running features, until the policy stops or the run ends. The decision after each
token is `reference.decide`, as in `draft_step`, and has seen that token and those before it only.

Plain torch on every device, row by row: the tokens come from the host, which waits for the rows
anyway.
"""

from __future__ import annotations

import torch
from torch import Tensor

from . import layout as at
from . import reference
from .checks import check_tensor
from .layout import StepState

__all__ = ["lookup_step"]


def lookup_step(
    tokens: Tensor, signals: Tensor, counts: Tensor, state: StepState, policy: Tensor
) -> None:
    """Draft given tokens until the policy stops or they run out.

    For each row that is neither done nor stopped and is offered a token: the tokens drafted stand
    at ``sequence[LENGTH + DRAFTED]`` onwards, their signals are written and folded into
    ``running``, DRAFTED grows by their number, and STOP is set. Other rows are left alone.

    Parameters
    ----------
    tokens : int32 [B, G]
        Target token ids; row b offers its first ``counts[b]``.
    signals : float32 [B, G, SIGNALS]
        Of each token, as `StepState.signals` holds them: entropy in bits, confidence, margin and
        probability.
    counts : int32 [B]
        0 to G.
    state : StepState
        Mutated.
    policy : float32 [POLICY_WORDS]

    Raises
    ------
    TypeError, ValueError
        A tensor of another dtype, shape or device.
    """
    batch, device = state.rows.shape[0], state.rows.device
    check_tensor("counts", counts, "int32", (batch,), device)
    check_tensor("tokens", tokens, "int32", (batch, None), device)
    check_tensor("signals", signals, "float32", (*tokens.shape, at.SIGNALS), device)
    check_tensor("policy", policy, "float32", (at.POLICY_WORDS,), device)
    policy = policy.cpu()  # read for every token
    for b, count in enumerate(counts.tolist()):
        rows = state.rows[b].tolist()
        if not count or rows[at.DONE] or rows[at.STOP]:
            continue
        running = state.running[b].tolist()
        first = rows[at.DRAFTED]
        offered = zip(tokens[b, :count].tolist(), signals[b, :count].tolist(), strict=True)
        for token, each in offered:
            running = reference.fold_signals(running, each, rows[at.DRAFTED])
            rows[at.MATCH_LENGTH] = reference.follow_match(state, b, rows, token)
            rows[at.DRAFTED] += 1
            if reference.decide(policy, rows, running):
                break
        drafted = rows[at.DRAFTED] - first
        start = rows[at.LENGTH] + first
        state.sequence[b, start : start + drafted] = tokens[b, :drafted]
        state.signals[b, first : first + drafted] = signals[b, :drafted]
        state.running[b] = torch.tensor(running)
        state.rows[b, at.MATCH_LENGTH] = rows[at.MATCH_LENGTH]
        state.rows[b, at.DRAFTED], state.rows[b, at.STOP] = rows[at.DRAFTED], 1
