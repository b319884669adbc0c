"""A corpus as training examples: batches, the vocabulary of a head, what is kept from training."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from ..prompts import TASKS
from .corpus import Shard

_KEEP_EVERY = 40
_SORTED_TOGETHER = 64  # batches whose sequences are sorted by length, so that little is padding


@dataclass(frozen=True)
class Batch:
    """Some sequences, padded at the end, and what their target would have said.

    Attributes
    ----------
    tokens, mask : int64 [B, T]
    rows : int64 [M]
        Places in the flattened batch that predict a response token.
    top_ids : int64 [M, top]
    top_probs : float32 [M, top]
    """

    tokens: Tensor
    mask: Tensor
    rows: Tensor
    top_ids: Tensor
    top_probs: Tensor

    def to(self, device: torch.device) -> Batch:
        """The same on another device."""
        return Batch(
            self.tokens.to(device),
            self.mask.to(device),
            self.rows.to(device),
            self.top_ids.to(device),
            self.top_probs.to(device),
        )


@dataclass(frozen=True)
class Examples:
    """All sequences of a corpus, end to end; see `Shard` for what each tensor holds.

    Attributes
    ----------
    starts, response_starts : int64 [S]
        Where a sequence begins in ``tokens``, and its response in ``top_ids``.
    """

    tokens: Tensor
    lengths: Tensor
    prompt_lengths: Tensor
    starts: Tensor
    response_starts: Tensor
    top_ids: Tensor
    top_probs: Tensor
    tasks: list[str]

    @classmethod
    def from_shards(cls, shards: Iterable[Shard]) -> Examples:
        """Join shards, at least one."""
        parts = list(shards)
        lengths = torch.cat([shard.lengths for shard in parts]).long()
        prompts = torch.cat([shard.prompt_lengths for shard in parts]).long()
        responses = lengths - prompts
        return cls(
            tokens=torch.cat([shard.tokens for shard in parts]),
            lengths=lengths,
            prompt_lengths=prompts,
            starts=lengths.cumsum(0) - lengths,
            response_starts=responses.cumsum(0) - responses,
            top_ids=torch.cat([shard.top_ids for shard in parts]),
            top_probs=torch.cat([shard.top_probs for shard in parts]),
            tasks=[task for shard in parts for task in shard.tasks],
        )

    @property
    def size(self) -> int:
        """Number of sequences."""
        return self.lengths.numel()

    def split(self) -> tuple[list[int], list[int], list[int]]:
        """Sequences to train on, to choose by (validation), and to report alone (held out).

        Every 40th turn of the tasks is kept from training, and these turns go to validation and to
        what is held out by turns; where there is but one such turn, its sequences do, and of a
        corpus of less than two turns the first two sequences. Under the default recipe all that
        is kept from training is greedy.
        """
        kept = [i for i in range(self.size) if i // len(TASKS) % _KEEP_EVERY == 0]
        if self.size < 2 * len(TASKS):
            kept = [0, 1]
        single = kept[-1] < len(TASKS)
        halves: tuple[list[int], list[int]] = ([], [])
        for i in kept:
            halves[(i if single else i // len(TASKS) // _KEEP_EVERY) % 2].append(i)
        rest = set(range(self.size)) - set(kept)
        return sorted(rest), *halves

    def vocabulary(self, size: int, sequences: Sequence[int], total: int) -> Tensor:
        """The ``size`` ids that the target gives most probability, falling: int64 [size].

        Ids that it never considers follow by number, which is by frequency where a tokenizer's
        merges are. ``total`` is the size of the whole vocabulary.
        """
        rows = torch.cat([self._response(i) for i in sequences])
        ids, probs = self.top_ids[rows].flatten().long(), self.top_probs[rows].flatten()
        mass = torch.bincount(ids, weights=probs.double(), minlength=total)
        return mass.sort(descending=True, stable=True).indices[:size].clone()

    def batches(
        self, sequences: Sequence[int], tokens: int, generator: torch.Generator | None = None
    ) -> Iterator[Batch]:
        """Batches of up to ``tokens`` places, padding included; shuffled with a generator.

        A sequence that is longer than ``tokens`` is a batch of its own.
        """
        for group in self._grouped(sequences, tokens, generator):
            yield self._batch(group)

    def count_batches(self, sequences: Sequence[int], tokens: int) -> int:
        """About how many batches an epoch has."""
        total = int(self.lengths[list(sequences)].sum())
        return max(1, -(-total // tokens))

    def _grouped(
        self, sequences: Sequence[int], tokens: int, generator: torch.Generator | None
    ) -> list[list[int]]:
        order = list(sequences)
        if generator is not None:
            order = [order[i] for i in torch.randperm(len(order), generator=generator).tolist()]
        mean = max(1, int(self.lengths[order].float().mean())) if order else 1
        chunk = max(1, _SORTED_TOGETHER * tokens // mean) if generator is not None else len(order)
        groups: list[list[int]] = []
        for first in range(0, len(order), max(chunk, 1)):
            part = sorted(order[first : first + chunk], key=lambda i: int(self.lengths[i]))
            inside: list[list[int]] = [[]]
            for i in part:
                if inside[-1] and (len(inside[-1]) + 1) * int(self.lengths[i]) > tokens:
                    inside.append([])
                inside[-1].append(i)
            groups += inside
        if generator is not None:
            groups = [groups[i] for i in torch.randperm(len(groups), generator=generator).tolist()]
        return groups

    def _batch(self, group: Sequence[int]) -> Batch:
        lengths = self.lengths[list(group)].tolist()
        width = max(lengths)
        tokens = torch.zeros(len(group), width, dtype=torch.int64)
        mask = torch.zeros(len(group), width, dtype=torch.int64)
        rows = []
        for b, (i, length) in enumerate(zip(group, lengths, strict=True)):
            start = int(self.starts[i])
            tokens[b, :length] = self.tokens[start : start + length]
            mask[b, :length] = 1
            first = int(self.prompt_lengths[i]) - 1
            rows.append(torch.arange(first, length - 1) + b * width)
        at = torch.cat([self._response(i) for i in group])
        return Batch(
            tokens,
            mask,
            torch.cat(rows),
            self.top_ids[at].long(),
            self.top_probs[at].float(),
        )

    def _response(self, sequence: int) -> Tensor:
        """Rows of ``top_ids`` of a sequence's response: int64 [length]."""
        start = int(self.response_starts[sequence])
        count = int(self.lengths[sequence] - self.prompt_lengths[sequence])
        return torch.arange(start, start + count)
