"""How a product of few rows is cut into programs, and what they hand to each other."""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch
from torch import Tensor

TILE_ROWS = 16
"""Rows of a tile: the least that tensor cores multiply at once."""
SPLITS_MAX = 16
_MULTIPROCESSORS = {(8, 0): 108, (9, 0): 132, (10, 0): 148}
_SHARED_BYTES = {(8, 0): 167_936, (9, 0): 233_472, (10, 0): 233_472}
_REGISTERS = 65_536
_THREAD_REGISTERS = {"dense": 128, "int8": 128, "nf4": 144}
"""At most; those of nf4 as compiled, which sets no limit (`Config.maxnreg`)."""


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


def _shared_bytes(config: Config, kind: str, swiglu: bool) -> int:
    """Shared memory of a program: one buffer fewer than stages, of ``x``, weights and scales.

    The weights of a norm come on top, with up to 4% of it.
    """
    half_bytes = {"dense": 4, "int8": 2, "nf4": 1}[kind]
    row = config.block_k * half_bytes // 2 + (config.block_k // 16 if kind == "nf4" else 0)
    weights = config.block_n * (2 if swiglu else 1) * row
    return (config.num_stages - 1) * (2 * config.block_k * TILE_ROWS + weights)


def _resident(config: Config, kind: str, swiglu: bool, capability: tuple[int, int]) -> int:
    """Programs that a multiprocessor holds at once, by shared memory and by registers."""
    shared = _SHARED_BYTES.get(capability, 102_400)
    by_shared = shared // (_shared_bytes(config, kind, swiglu) + 1024)  # 1 KiB is the system's
    by_registers = _REGISTERS // (32 * config.num_warps * _THREAD_REGISTERS[kind])
    return max(min(by_shared, by_registers), 1)


def _select_config(
    columns: int,
    depth: int,
    capability: tuple[int, int],
    kind: str,
    swiglu: bool = False,
    multiprocessors: int | None = None,
) -> Config:
    """Tiles whose loads are 16 bytes a thread, and splits that fill the multiprocessors.

    A tile has 64 weight rows, as 128 threads load those of nf4 in 16 bytes each from 64; the two
    halves of SwiGLU share them where 32 rows are enough for that. The splits minimise the time of
    the busiest multiprocessor, in units of half the time in which it can read a block of weights:

    - a program alone reads at half that speed, and programs together at no more than all of it;
    - each wave of as many programs as are resident fills its pipelines for two blocks' time; in
      nf4, where a multiprocessor is kept busy by looking codes up, that of all but the first is
      hidden behind others;
    - each partial sum takes half a block's time to merge.

    The number of rows has no say: a row's result must not depend on it.

    Parameters
    ----------
    columns : int
        Of the result: half the weight's rows with SwiGLU.
    depth : int
        K.
    capability : (int, int)
        Of the device.
    kind : "dense" | "int8" | "nf4"
    swiglu : bool
    multiprocessors : int, optional
        Of the device; by default those of the largest one of this capability.
    """
    if kind == "nf4":
        block_n = 64
        # Twice the weights of 128 elements fill as many loads, and spill no registers.
        sizes = (128, 64) if swiglu else (256, 128, 64)
        block_k = next(size for size in sizes if depth % size == 0)
    else:
        block_n = 32 if swiglu else 64
        # Rows of an odd K are loaded element by element, which takes registers.
        block_k = 32 if depth % 16 else 64 if depth % 128 else 128
    tiles, blocks = _cdiv(columns, block_n), _cdiv(depth, block_k)
    whole = Config(
        block_n,
        block_k,
        splits=1,
        num_stages=4 if depth % 16 == 0 else 1,
        maxnreg=None if kind == "nf4" else 128,
    )
    if multiprocessors is None:
        multiprocessors = _MULTIPROCESSORS.get(capability, 128)
    resident = _resident(whole, kind, swiglu, capability)

    def cost(splits: int) -> int:
        programs = tiles * splits
        waves = _cdiv(programs, resident * multiprocessors)
        speed = max(2 * waves, _cdiv(programs, multiprocessors))
        filled = 1 if kind == "nf4" else waves
        return speed * _cdiv(blocks, splits) + 4 * filled + (splits if splits > 1 else 0)

    return replace(whole, splits=min(range(1, min(blocks, SPLITS_MAX) + 1), key=cost))


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
