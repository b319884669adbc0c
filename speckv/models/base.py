"""The interface between a decoding loop and a model."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Protocol

import torch
from torch import Tensor

from speckv.models.cache import KVCache

__all__ = ["COMPRESSIONS", "CausalModel"]

COMPRESSIONS = ("fp32", "fp16", "bf16", "int8", "nf4")
"""Weight formats, by the name people type."""


class CausalModel(Protocol):
    """A causal language model over a static KV cache with a start position per sequence.

    A row of logits has the same bits at every width, batch, slot and cache capacity (on the CPU;
    see the implementations for other devices). That is what makes speculative output identical
    to plain decoding.

    Attributes
    ----------
    name : str
        Hub id or path, as shown to people.
    vocab_size : int
        Width of the logits.
    embedding_size : int
        Number of ids the model can be fed.
    max_positions : int
        Longest sequence in tokens.
    dtype : torch.dtype
        Type of the activations, the KV cache and the logits.
    device : torch.device
        Where tensors live.
    compression : str
        Weight format, one of :data:`COMPRESSIONS`.
    eos_ids : tuple of int
        Ids that the checkpoint says end a sequence; may be empty.
    """

    name: str
    vocab_size: int
    embedding_size: int
    max_positions: int
    dtype: torch.dtype
    device: torch.device
    compression: str
    eos_ids: tuple[int, ...]

    def new_cache(self, batch: int, capacity: int) -> KVCache:
        """A zero-filled cache of ``batch`` slots for sequences of up to ``capacity`` tokens.

        Raises
        ------
        ValueError
            If ``batch`` or ``capacity`` is below 1, or ``capacity`` exceeds ``max_positions``.
        """
        ...

    def forward(
        self,
        tokens: Tensor,
        start: Sequence[int] | Tensor,
        cache: KVCache,
        *,
        slots: Sequence[int] | Tensor | None = None,
        select: Sequence[int] | Tensor | int | None = None,
        context: int | None = None,
    ) -> Tensor:
        """Process a block of new positions of several sequences.

        Parameters
        ----------
        tokens : Tensor [batch, width] int64 or int32
            Token ids. Columns beyond a sequence's real block may hold any valid id: what they write
            lies beyond the sequence's length and is overwritten later.
        start : sequence of int, or Tensor [batch] int, or Tensor [batch, width] int64
            Position of ``tokens[:, 0]`` in each sequence, or of every token; positions below it
            must be in the cache. On the CPU a list saves a conversion; on CUDA a tensor saves a
            transfer.
        cache : KVCache
            Mutated: rows ``start .. start + width - 1`` of the slots are written.
        slots : sequence of int, or Tensor [batch] int, optional
            Cache slot of each sequence; 0 .. batch - 1 by default.
        select : sequence of int, or Tensor [batch] int, or int, optional
            Column of each sequence, or of all, whose logits are wanted.
        context : int, optional
            Upper bound of ``start + width`` over the batch, known on the host. On CUDA it bounds
            the attended context (default: the whole cache); the CPU knows it from ``start``.

        Returns
        -------
        Tensor [batch, width, vocab_size], or [batch, vocab_size] with ``select``
            Logits, of the model's dtype.

        Raises
        ------
        ValueError
            On the CPU, if a shape is wrong or a position lies outside the cache.
        """
        ...

    def prefill(
        self,
        tokens: Tensor,
        cache: KVCache,
        slot: int,
        *,
        start: int = 0,
        want_logits: bool = True,
    ) -> Tensor | None:
        """Process a prompt of any length for one slot, in wide chunks.

        Parameters
        ----------
        tokens : Tensor [length] int64 or int32
            Token ids, at least one.
        cache : KVCache
            Mutated.
        slot : int
            Cache slot.
        start : int
            Position of the first token.
        want_logits : bool
            Whether the logits of the last token are computed.

        Returns
        -------
        Tensor [vocab_size] or None
            Logits of the last token, bitwise those of :meth:`forward`.
        """
        ...
