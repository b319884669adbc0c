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


def split_row(vocabulary: int, block: int, max_splits: int = MAX_SPLITS) -> SplitConfig:
    """Split ``vocabulary`` tokens: one block a program while that takes at most ``max_splits``.

    A pure function of the vocabulary: never of the batch or the width, so a row's partial results,
    and with them its bits, do not depend on what rides along.
    """
    total = -(-vocabulary // block)
    blocks = -(-total // max_splits)
    return SplitConfig(block, blocks, -(-total // blocks), num_warps=4)


@dataclass(frozen=True)
class ChoiceScratch:
    """Partial choices of tokens, for one shape; launches that share it must not overlap.

    Attributes
    ----------
    config : SplitConfig
    score : float32 [B, W, channels, splits]
    token : int32 [B, W, channels, splits]
    counter : int32 [B]
        Programs of a row that have arrived; zero between launches.
    """

    config: SplitConfig
    score: Tensor
    token: Tensor
    counter: Tensor

    @classmethod
    def allocate(
        cls,
        batch: int,
        width: int,
        config: SplitConfig,
        device: torch.device | str,
        channels: int = 1,
    ) -> ChoiceScratch:
        """Scratch for logits of ``batch`` rows of ``width`` positions, split by ``config``."""
        shape = (batch, width, channels, config.splits)
        return cls(
            config=config,
            score=torch.empty(shape, dtype=torch.float32, device=device),
            token=torch.empty(shape, dtype=torch.int32, device=device),
            counter=torch.zeros(batch, dtype=torch.int32, device=device),
        )
