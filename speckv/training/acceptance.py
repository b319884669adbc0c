"""How much of a draft its target accepts: the training loss, and exact counts on its own text."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from ..kernels.layout import GAMMA_MAX
from ..policies import CostTable


def overlap(logits: Tensor, rows: Tensor, probs: Tensor) -> tuple[Tensor, Tensor]:
    """Acceptance of a draft under rejection sampling, from below, and its log-likelihood.

    Parameters
    ----------
    logits : Tensor [M, V_draft]
        The draft's.
    rows : int64 [M, top]
        Draft ids of the target's likeliest tokens, -1 where the draft has none.
    probs : float32 [M, top]
        The target's probabilities p of them.

    Returns
    -------
    overlap : float32 [M]
        Sum of min(p, q) over these tokens, q being the draft's probabilities: one minus the total
        variation, but for tokens beyond ``top`` (Leviathan et al. 2023), so never more than the
        acceptance.
    likelihood : float32 [M]
        Sum of p · log q over those that the draft has.
    """
    scores = logits.float()
    known = rows >= 0
    log_q = scores.gather(1, rows.clamp(min=0)) - scores.logsumexp(dim=1, keepdim=True)
    p = probs * known
    return torch.minimum(p, log_q.exp()).sum(dim=1), (p * log_q).sum(dim=1)


@dataclass(frozen=True)
class Counts:
    """What decoding a text with some fixed γ would have counted."""

    steps: int
    drafted: int
    accepted: int

    @property
    def tokens(self) -> int:
        """Tokens produced by the steps."""
        return self.accepted + self.steps

    @property
    def acceptance(self) -> float:
        """Share of drafted tokens that were accepted; 0 if none were drafted."""
        return self.accepted / self.drafted if self.drafted else 0.0


def count_accepted(agreed: Sequence[np.ndarray], gamma: int) -> Counts:
    """Decode greedily by what a draft says at each position of the target's own text.

    As long as its tokens are accepted the draft reads the target's text, so agreement position by
    position tells exactly how many tokens of a block are accepted. A text counts as if a length
    limit ended it: where the target did, a draft would go on past the end, in its last block.

    Parameters
    ----------
    agreed : sequence of bool [n]
        For each sequence and response token: whether draft and target chose the same. The first
        token comes from the prompt's own forward and is no step.
    gamma : int
    """
    steps = drafted = accepted = 0
    for bits in agreed:
        runs = _run_lengths(bits)
        at, end = 1, len(bits)
        while at < end:
            block = min(gamma, end - at - 1)
            run = min(int(runs[at]), block)
            steps, drafted, accepted = steps + 1, drafted + block, accepted + run
            at += run + 1
    return Counts(steps, drafted, accepted)


def predict_speedup(
    agreed: Sequence[np.ndarray], cost: CostTable, context: int
) -> tuple[int, float]:
    """The best fixed γ by measured costs, and its tokens per second over plain decoding's."""
    times = [
        ms + slope * context
        for ms, slope in zip(cost.step_ms, cost.step_ms_per_context_token, strict=True)
    ]
    best, most = 0, 1.0
    for gamma in range(1, GAMMA_MAX + 1):
        counts = count_accepted(agreed, gamma)
        if not counts.steps:
            continue
        speedup = counts.tokens * times[0] / (counts.steps * times[gamma])
        if speedup > most:
            best, most = gamma, speedup
    return best, most


def _run_lengths(bits: np.ndarray) -> np.ndarray:
    """At each place, how many are true from there on."""
    runs = np.zeros(len(bits) + 1, dtype=np.int64)
    for i in range(len(bits) - 1, -1, -1):
        runs[i] = runs[i + 1] + 1 if bits[i] else 0
    return runs
