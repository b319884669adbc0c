"""Width-invariant grouped-query attention over a static KV cache, on the CPU.

A query's bits must not depend on how many positions are computed with it, on where it stands among
them, or on how much of the cache is visible beyond it. The fast path stacks a block of positions in
one call of ``scaled_dot_product_attention`` over a context rounded up to a multiple of some block,
the rest masked. A probe (see :mod:`speckv.kernels.cpu`) finds the smallest block whose multiples
agree with each other, and the numbers of positions that agree. Where it finds none, each position
is computed alone over exactly the rows that it sees: no padding and no mask, hence exact by
construction.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from speckv.kernels.cpu import bits_equal, cached_proof, prove_counts, round_up_rows
from speckv.kernels.functional import attention_mask

__all__ = ["CONTEXT_BLOCK", "AttentionPiece", "CpuAttention", "round_up_context"]

CONTEXT_BLOCK = 512
"""The largest block of cache rows by which contexts are rounded; caches hold a multiple of it."""

_BLOCKS = (64, 128, 256, CONTEXT_BLOCK)


def round_up_context(rows: int, block: int = CONTEXT_BLOCK) -> int:
    """``rows`` rounded up to a multiple of ``block``, at least one block."""
    return max(1, -(-rows // block)) * block


@dataclass(frozen=True)
class AttentionPiece:
    """Positions of one sequence that are computed in one call.

    ``first`` and ``count`` say which rows of the block; ``padded`` the number of query positions of
    the call; ``low`` and ``high`` bound the visible cache rows; ``mask`` is additive,
    [1, 1, padded * group, high - low], or None where every visible row is seen.
    """

    first: int
    count: int
    padded: int
    low: int
    high: int
    mask: Tensor | None


class CpuAttention:
    """Attention of one sequence's block of positions, for one head geometry.

    Parameters
    ----------
    heads, kv_heads, dim : int
        Query heads, key heads (a divisor of ``heads``) and head width.
    dtype : torch.dtype
        Type of queries, keys and values.
    """

    def __init__(self, heads: int, kv_heads: int, dim: int, dtype: torch.dtype) -> None:
        self.heads, self.kv_heads, self.dim, self.dtype = heads, kv_heads, dim, dtype
        self.group = heads // kv_heads
        self.prove()

    def prove(self) -> None:
        """Probe again, as is needed after a change of ``torch.get_num_threads()``."""
        self.counts: tuple[int, ...] = ()
        self.block: int
        for self.block in _BLOCKS:
            key = ("attention", self.block, self.heads, self.kv_heads, self.dim, self.dtype)
            self.counts = cached_proof(key, self._probe)
            if self.counts:
                return

    def pieces(self, start: int, width: int, window: int | None = None) -> list[AttentionPiece]:
        """Cut the block at positions ``start .. start + width - 1`` into calls.

        ``window`` is the sliding window in positions, or None. The result serves every layer of a
        forward that has this window.
        """
        if not self.counts:
            return [
                AttentionPiece(i, 1, 1, max(0, end - window) if window else 0, end, None)
                for i, end in enumerate(range(start + 1, start + width + 1))
            ]
        step = self.counts[-1]
        return [
            self._masked_piece(start, first, min(step, width - first), window)
            for first in range(0, width, step)
        ]

    def _masked_piece(
        self, start: int, first: int, count: int, window: int | None
    ) -> AttentionPiece:
        context = round_up_context(start + first + count, self.block)
        padded = round_up_rows(count, self.counts)
        positions = torch.arange(start + first, start + first + count)
        mask = attention_mask(positions, context, self.dtype, window)
        if padded > count:
            mask = torch.cat((mask, mask.new_zeros(padded - count, context)))
        stacked = mask.repeat_interleave(self.group, 0).view(1, 1, padded * self.group, context)
        return AttentionPiece(first, count, padded, 0, context, stacked)

    def __call__(
        self, queries: Tensor, keys: Tensor, values: Tensor, piece: AttentionPiece
    ) -> Tensor:
        """Attend with the queries of one piece.

        Parameters
        ----------
        queries : Tensor [count, heads, dim]
            Rotated queries of the piece; any strides.
        keys, values : Tensor [1, kv_heads, high - low, dim]
            Views of the cache; masked rows must be finite.
        piece : AttentionPiece
            From :meth:`pieces`.

        Returns
        -------
        Tensor [count, heads * dim]
        """
        group, kv_heads, dim, count = self.group, self.kv_heads, self.dim, piece.count
        if count == 1 and piece.padded == 1:
            stacked = queries.reshape(1, kv_heads, group, dim)
            out = F.scaled_dot_product_attention(stacked, keys, values, attn_mask=piece.mask)
            return out.view(1, self.heads * dim)
        rows = queries.view(count, kv_heads, group, dim).transpose(0, 1)
        if count == piece.padded:
            stacked = rows.contiguous()
        else:
            stacked = queries.new_zeros(kv_heads, piece.padded, group, dim)
            stacked[:, :count] = rows
        out = F.scaled_dot_product_attention(
            stacked.view(1, kv_heads, -1, dim), keys, values, attn_mask=piece.mask
        )
        out = out.view(kv_heads, piece.padded, group, dim)[:, :count].transpose(0, 1)
        return out.reshape(count, self.heads * dim)

    @torch.inference_mode()
    def _probe(self) -> tuple[int, ...]:
        """Counts proven at contexts of one, a few and many blocks of ``self.block`` rows.

        Libraries cut the sum over the context into parts that depend on its length, up to and
        beyond `CONTEXT_BLOCK`: so the last positions of every number of blocks are tried, over
        these and over one more.
        """
        block, last = self.block, CONTEXT_BLOCK // self.block
        plans = [
            self._probe_at(block - 20, (1, 2, 3, last, last + 1, 2 * last)),
            self._probe_at(CONTEXT_BLOCK - 8, (last + 1, last + 2, 2 * last, 3 * last + 1)),
            self._probe_at(2 * CONTEXT_BLOCK - 20, (2 * last, 2 * last + 1, 3 * last, 4 * last)),
        ]
        for count in range(2 * last, 0, -1):
            if not all(plans):
                return ()
            plans.append(self._probe_at(count * block - 20, (count, count + 1)))
        return tuple(count for count in plans[0] if all(count in plan for plan in plans))

    def _probe_at(self, first_position: int, blocks: tuple[int, ...]) -> tuple[int, ...]:
        """Counts proven for sixteen positions from ``first_position``, at every context alike.

        ``blocks`` are the contexts, in units of ``self.block``. Keys come in equal pairs with
        opposite values at random places, so the exact result is zero and what is computed shows
        the order of the additions.
        """
        contexts = sorted({count * self.block for count in blocks})
        generator = torch.Generator().manual_seed(first_position)
        half, rows = first_position // 2, contexts[-1]
        place = torch.randperm(2 * half, generator=generator)
        kv = torch.randn(2, rows, self.kv_heads, self.dim, generator=generator)
        pairs = kv[:, :half] * torch.exp2(
            torch.randint(-3, 3, (2, half, 1, 1), generator=generator).float()
        )
        kv[0, : 2 * half] = torch.cat((pairs[0], pairs[0]))[place]
        kv[1, : 2 * half] = torch.cat((pairs[1], -pairs[1]))[place]
        kv[1, 2 * half :] = 0.0
        cache = kv.to(self.dtype).transpose(0, 1).reshape(1, rows, 2 * self.kv_heads, self.dim)
        keys, values = cache.transpose(1, 2).chunk(2, 1)
        queries = torch.randn(16, self.heads, self.dim, generator=generator).to(self.dtype)

        def run(pick: Tensor, context: int) -> Tensor:
            mask = attention_mask(first_position + pick, context, self.dtype)
            stacked = mask.repeat_interleave(self.group, 0).view(1, 1, -1, context)
            piece = AttentionPiece(0, len(pick), len(pick), 0, context, stacked)
            return self(queries[pick], keys[:, :, :context], values[:, :, :context], piece)

        every = torch.arange(16)
        reference = run(every, contexts[0])
        if not all(bits_equal(run(every, context), reference) for context in contexts[1:]):
            return ()
        narrow = prove_counts(lambda pick: run(pick, contexts[0]))
        return prove_counts(lambda pick: run(pick, contexts[-1]), narrow, shifts=(5,))
