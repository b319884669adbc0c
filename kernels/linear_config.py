"""How a product of few rows is cut into programs, and what they hand to each other."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

TILE_ROWS = 16
"""Rows of a tile: the least that tensor cores multiply at once."""
SPLITS_MAX = 16
_MULTIPROCESSORS = {(8, 0): 108, (9, 0): 132, (10, 0): 148}
_RESIDENT = 2


@dataclass(frozen=True)
class Config:
    """How a product is cut.

    Attributes
    ----------
    block_n : int
        Columns of a program; with SwiGLU, of the gate and of the up half each.
    block_k : int
        Elements of K that a program loads at once.
    splits : int
        Programs that share a tile; each has at least one block.
    num_warps, num_stages : int
    maxnreg : int or None
        Registers of a thread; None leaves the compiler to choose. It then spills some of the dense
        products for an occupancy that the shared memory of the stages forbids; given a number, it
        spills some of the nf4 ones by moving loads too far ahead.
    """

    block_n: int
    block_k: int
    splits: int
    num_warps: int = 4
    num_stages: int = 4
    maxnreg: int | None = None


def _select_config(
    columns: int, depth: int, capability: tuple[int, int], kind: str, swiglu: bool = False
) -> Config:
    """Tiles whose loads are 16 bytes a thread, and splits that fill the multiprocessors.

    A tile has 64 weight rows, as 128 threads load those of nf4 in 16 bytes each from 64; the two
    halves of SwiGLU share them where 32 rows are enough for that. The splits minimise the waves of
    programs (two resident on a multiprocessor) times the blocks that a program works through, with
    two more for filling its pipeline, and with half a block for every partial sum to be merged.
    The number of rows has no say: a row's result must not depend on it.

    Parameters
    ----------
    columns : int
        Of the result: half the weight's rows with SwiGLU.
    depth : int
        K.
    capability : (int, int)
        Of the device; unknown ones count as having 128 multiprocessors.
    kind : "dense" | "int8" | "nf4"
    """
    if kind == "nf4":
        block_n = 64
        block_k = next(size for size in (256, 128, 64) if depth % size == 0)
    else:
        block_n = 32 if swiglu else 64
        # Rows of an odd K are loaded element by element, which takes registers.
        block_k = 32 if depth % 16 else 64 if depth % 128 else 128
    tiles, blocks = _cdiv(columns, block_n), _cdiv(depth, block_k)
    slots = _RESIDENT * _MULTIPROCESSORS.get(capability, 128)

    def cost(splits: int) -> int:
        waves = _cdiv(tiles * splits, slots)
        return waves * (2 * _cdiv(blocks, splits) + 4) + (splits if splits > 1 else 0)

    splits = min(range(1, min(blocks, SPLITS_MAX) + 1), key=cost)
    return Config(
        block_n,
        block_k,
        splits,
        num_stages=4 if depth % 16 == 0 else 1,
        maxnreg=None if kind == "nf4" else 128,
    )


@dataclass(frozen=True)
class Scratch:
    """What programs hand to each other; launches that share it must not overlap.

    Attributes
    ----------
    partials : float32 [any]
    counters : int32 [any]
        Programs of a tile that have arrived; zero between launches.
    """

    partials: Tensor
    counters: Tensor

    @staticmethod
    def sizes(rows: int, columns: int, config: Config, *, swiglu: bool = False) -> dict[str, int]:
        """Elements of each tensor for what `allocate` takes; squares for a norm included."""
        tiles = _cdiv(rows, TILE_ROWS) * _cdiv(columns, config.block_n)
        size = config.splits * TILE_ROWS * ((2 if swiglu else 1) * config.block_n + 1)
        if config.splits == 1:
            tiles = 0
        return {"partials": tiles * size, "counters": tiles}

    @classmethod
    def allocate(
        cls,
        rows: int,
        columns: int,
        config: Config,
        device: torch.device | str,
        *,
        swiglu: bool = False,
    ) -> Scratch:
        """Scratch for products of up to ``rows`` rows, cut by ``config``."""
        sizes = cls.sizes(rows, columns, config, swiglu=swiglu)
        return cls(
            partials=torch.empty(sizes["partials"], dtype=torch.float32, device=device),
            counters=torch.zeros(sizes["counters"], dtype=torch.int32, device=device),
        )


def _cdiv(a: int, b: int) -> int:
    return -(-a // b)
