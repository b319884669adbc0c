"""What a step's draft tokens were drawn from, kept for rejection sampling."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from ..kernels import layout as at
from ..models.base import CausalModel


@dataclass(frozen=True)
class DraftRows:
    """The distributions of the draft tokens of a step.

    Attributes
    ----------
    logits : floating [B, GAMMA_MAX, V]
    cutoffs, lse : float32 [B, GAMMA_MAX]
        Of each row of logits, from `cutoff`.
    """

    logits: Tensor
    cutoffs: Tensor
    lse: Tensor

    @classmethod
    def allocate(cls, batch: int, vocab_size: int, model: CausalModel) -> DraftRows:
        """For ``batch`` sequences and logits of ``model``'s type and device."""
        shape = (batch, at.GAMMA_MAX)
        return cls(
            torch.zeros(*shape, vocab_size, dtype=model.dtype, device=model.device),
            torch.zeros(shape, device=model.device),
            torch.zeros(shape, device=model.device),
        )

    def narrow(self, batch: int) -> DraftRows:
        """A view of the first ``batch`` rows."""
        return DraftRows(self.logits[:batch], self.cutoffs[:batch], self.lse[:batch])

    def store(self, slots: list[int], index: list[int], *rows: Tensor) -> None:
        """Keep logits, cutoff and lse [B, ...] of draft token ``index[i]`` of row ``slots[i]``."""
        for b, j in zip(slots, index, strict=True):
            for kept, new in zip((self.logits, self.cutoffs, self.lse), rows, strict=True):
                kept[b, j] = new[b]

    def store_certain(self, row: int, tokens: Sequence[int]) -> None:
        """Keep that the first draft tokens of row ``row`` were ``tokens`` with probability 1."""
        index = torch.arange(len(tokens), device=self.logits.device)
        self.logits[row, : len(tokens)] = -torch.inf
        self.logits[row, index, torch.tensor(tokens, device=index.device)] = 0.0
        self.cutoffs[row, : len(tokens)] = self.lse[row, : len(tokens)] = 0.0
