"""Packed weights as bitsandbytes stores them; imports no triton."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

NF4_BLOCK = 64
"""Weights that share an absmax."""
NESTED_BLOCK = 256
"""Absmax codes that share an absmax of their own."""


@dataclass(frozen=True)
class Int8Weight:
    """A row-wise int8 weight: ``codes`` [N, K] int8 and ``scale`` [N] fp32, the row maxima."""

    codes: Tensor
    scale: Tensor

    @property
    def shape(self) -> tuple[int, int]:
        """(N, K)."""
        return self.codes.shape[0], self.codes.shape[1]

    def expand(self, dtype: torch.dtype) -> Tensor:
        """The weight [N, K] in ``dtype``: ``codes * (scale / 127)``, computed in fp32."""
        # By a tensor: on CUDA torch multiplies by the reciprocal of a number.
        scale = self.scale / torch.full_like(self.scale, 127.0)
        return self.codes.float().mul_(scale[:, None]).to(dtype)


@dataclass(frozen=True)
class NestedScales:
    """How the absmax values of a double-quantised weight are coded.

    The absmax of block i is ``table[code[i]] * absmax[i // 256] + offset[i // 256]``: ``table``
    [256] fp32, ``absmax`` and ``offset`` [blocks / 256, rounded up] fp32. An offset of one element,
    as bitsandbytes has it, is repeated; parts of a fused weight have their own.
    """

    table: Tensor
    absmax: Tensor
    offset: Tensor

    def __post_init__(self) -> None:
        if self.offset.numel() == 1:
            repeated = self.offset.reshape(1).expand(self.absmax.shape[0]).contiguous()
            object.__setattr__(self, "offset", repeated)

    def expand(self, codes: Tensor) -> Tensor:
        """Absmax values [blocks] fp32 of their ``codes`` [blocks] uint8."""
        outer = self.absmax.repeat_interleave(NESTED_BLOCK)[: codes.shape[0]]
        offset = self.offset.repeat_interleave(NESTED_BLOCK)[: codes.shape[0]]
        return self.table[codes.int()] * outer + offset


@dataclass(frozen=True)
class Nf4Weight:
    """A 4-bit NormalFloat weight of shape ``shape``.

    ``codes`` [N * K / 2] uint8 holds two codes a byte, the first in the high half; ``absmax``
    [N * K / 64] fp32 the maximum of each block of 64, or its uint8 code if there are ``nested``
    scales; ``table`` [16] fp32 the values of the codes.
    """

    codes: Tensor
    absmax: Tensor
    table: Tensor
    shape: tuple[int, int]
    nested: NestedScales | None = None

    def scales(self) -> Tensor:
        """The absmax of each block, [N * K / 64] fp32."""
        return self.absmax if self.nested is None else self.nested.expand(self.absmax)

    def expand(self, dtype: torch.dtype) -> Tensor:
        """The weight [N, K] in ``dtype``: ``table[code] * absmax``, computed in fp32."""
        absmax = self.scales()
        # Both values of each byte at once: half as many indices as weights, and one fp32 copy.
        high, low = self.table.repeat_interleave(16), self.table.repeat(16)
        values = torch.stack((high, low), 1).index_select(0, self.codes.int()).flatten()
        total = self.shape[0] * self.shape[1]
        padding = absmax.shape[0] * NF4_BLOCK - values.shape[0]
        if padding:
            values = torch.nn.functional.pad(values, (0, padding))
        blocks = values.view(-1, NF4_BLOCK).mul_(absmax[:, None])
        return blocks.flatten()[:total].view(self.shape).to(dtype)


Weight = Tensor | Int8Weight | Nf4Weight
"""What `linear` multiplies with."""
