"""How a row of logits is divided among programs, and what they hand to each other."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

MAX_SPLITS = 64


@dataclass(frozen=True)
class SplitConfig:
    """How a row of logits is divided among programs.

    Attributes
    ----------
    block : int
        Tokens a program loads at once; a power of two, at least 128.
    blocks : int
        Blocks of one program.
    splits : int
        Programs of one row; every one of them has tokens.
    num_warps : int
    """

    block: int
    blocks: int
    splits: int
    num_warps: int

    @property
    def padded_splits(self) -> int:
        """The power of two at or above ``splits``: the width of the merging tile."""
        return 1 << (self.splits - 1).bit_length()


def split_row(
    vocabulary: int, block: int, max_splits: int = MAX_SPLITS, num_warps: int = 4
) -> SplitConfig:
    """Split ``vocabulary`` tokens: one block a program while that takes at most ``max_splits``.

    Never a function of the batch or the width, so a row's partial results, and with them its bits,
    do not depend on what rides along.
    """
    total = -(-vocabulary // block)
    blocks = -(-total // max_splits)
    return SplitConfig(block, blocks, -(-total // blocks), num_warps)


@dataclass(frozen=True)
class SplitScratch:
    """Partial results of programs, for one shape; launches that share it must not overlap.

    Attributes
    ----------
    config : SplitConfig
    values : float32 [B, values, splits]
    tokens : int32 [B, tokens, splits]
    counter : int32 [B]
        Programs of a row that have arrived; zero between launches.
    """

    config: SplitConfig
    values: Tensor
    tokens: Tensor
    counter: Tensor

    @classmethod
    def allocate(
        cls,
        batch: int,
        config: SplitConfig,
        device: torch.device | str,
        values: int,
        tokens: int,
    ) -> SplitScratch:
        """Scratch for ``batch`` rows, each program of which leaves so many values and tokens."""
        return cls(
            config=config,
            values=torch.empty(batch, values, config.splits, device=device),
            tokens=torch.empty(batch, tokens, config.splits, dtype=torch.int32, device=device),
            counter=torch.zeros(batch, dtype=torch.int32, device=device),
        )
