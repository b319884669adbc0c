"""Causal models that are a lookup: exact laws can be computed, and a forward costs next to nothing.

The logits after position i are ``table[i % phases, token i - 1, token i]``. The token before the
last comes from the cache, so a cache that is stale or short of a token gives other logits, as a KV
cache would.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

BEFORE_FIRST = 0
"""The token that stands before position 0."""

_SLACK = 16
_UNWRITTEN = -1


@dataclass(frozen=True)
class TabularCache:
    """int64 [batch, 1 + capacity + slack]: the token of position i stands in column i + 1."""

    tokens: Tensor


class TabularModel:
    """A causal language model (`speckv.models.base.CausalModel`) of the last two tokens.

    Parameters
    ----------
    table : float32 [phases, V_in, V_in, V]
        Logits by position modulo ``phases``, token before the last, last token; -inf for a token
        that never follows.
    """

    name = "tabular"
    max_positions = 4096
    compression = "fp32"

    def __init__(self, table: Tensor) -> None:
        self.table = table
        self.vocab_size = table.shape[-1]
        self.embedding_size = table.shape[1]
        self.dtype, self.device = table.dtype, table.device

    def new_cache(self, batch: int, capacity: int) -> TabularCache:
        tokens = torch.full((batch, 1 + capacity + _SLACK), _UNWRITTEN)
        tokens[:, 0] = BEFORE_FIRST
        return TabularCache(tokens)

    def forward(
        self,
        tokens: Tensor,
        start: Sequence[int] | Tensor,
        cache: TabularCache,
        *,
        slots: Sequence[int] | Tensor | None = None,
        select: Sequence[int] | Tensor | int | None = None,
        context: int | None = None,
    ) -> Tensor:
        batch, width = tokens.shape
        rows = torch.arange(batch) if slots is None else torch.as_tensor(slots)
        first = torch.as_tensor(start).long()
        first = first[:, :1] if first.ndim == 2 else first[:, None]
        position = first + torch.arange(width)  # [B, W]
        last = tokens.long()
        cache.tokens[rows[:, None], position + 1] = last
        before = cache.tokens[rows[:, None], position]
        if bool((before == _UNWRITTEN).any()):
            raise AssertionError("a position was fed before the one ahead of it")
        logits = self.table[position % self.table.shape[0], before, last]
        return logits if select is None else logits[torch.arange(batch), torch.as_tensor(select)]

    def prefill(
        self,
        tokens: Tensor,
        cache: TabularCache,
        slot: int,
        *,
        start: int = 0,
        want_logits: bool = True,
    ) -> Tensor | None:
        logits = self.forward(
            tokens[None], [start], cache, slots=[slot], select=[tokens.numel() - 1]
        )
        return logits[0] if want_logits else None


def random_table(
    vocab: int, outputs: int, *, seed: int, phases: int = 2, scale: float = 1.0, zeros: int = 1
) -> Tensor:
    """Normal logits [phases, vocab, vocab, outputs] with ``zeros`` impossible tokens a row."""
    generator = torch.Generator().manual_seed(seed)
    shape = (phases, vocab, vocab, outputs)
    table = torch.randn(shape, generator=generator) * scale
    dropped = torch.rand(shape, generator=generator).topk(zeros, dim=-1).indices
    return table.scatter(-1, dropped, -torch.inf)
