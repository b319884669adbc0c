"""A position's attention on the CPU has the same bits alone and in any block, at any context."""

from __future__ import annotations

import pytest
import torch

from speckv.kernels.cpu import bits_equal
from speckv.kernels.cpu_attention import CONTEXT_BLOCK, CpuAttention

ROWS = 3 * CONTEXT_BLOCK


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32], ids=str)
@pytest.mark.parametrize("geometry", [(9, 3, 64), (4, 2, 8)], ids=str)
def test_blocks_across_every_boundary(geometry: tuple[int, int, int], dtype: torch.dtype) -> None:
    """Blocks of 16 that straddle multiples of 64, where libraries change how they cut a sum."""
    heads, kv_heads, dim = geometry
    attention = CpuAttention(heads, kv_heads, dim, dtype)
    generator = torch.Generator().manual_seed(0)
    cache = torch.randn(1, ROWS, 2 * kv_heads, dim, generator=generator).to(dtype)
    keys, values = cache.transpose(1, 2).chunk(2, 1)
    queries = torch.randn(16, heads, dim, generator=generator).to(dtype)

    def attend(start: int, picked: torch.Tensor) -> torch.Tensor:
        parts = []
        for piece in attention.pieces(start, len(picked)):
            seen = slice(piece.low, piece.high)
            own = picked[piece.first : piece.first + piece.count]
            parts.append(attention(own, keys[:, :, seen], values[:, :, seen], piece))
        return torch.cat(parts)

    with torch.inference_mode():
        for boundary in range(64, 2 * CONTEXT_BLOCK + 64, 64):
            for start in (boundary - 9, boundary - 3):
                together = attend(start, queries)
                for i in range(16):
                    alone = attend(start + i, queries[i : i + 1])
                    assert bits_equal(alone[0], together[i]), (start, i)
