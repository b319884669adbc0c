"""Shapes of logits that tests on a GPU go through."""

from __future__ import annotations

from collections.abc import Sequence

import torch

SMALL = (7, 1031)
LARGE = (32_000, 49_152, 128_256, 262_144)

Case = tuple[int, int, torch.dtype, int]
"""Batch, vocabulary, type and padding of a row."""


def logits_cases(batches: Sequence[int], few: Sequence[int]) -> list[Case]:
    """Every type and alignment at small vocabularies; at large ones, where the CPU's twin takes
    long, bf16 for all, and the others once."""
    dtypes = (torch.float32, torch.float16, torch.bfloat16)
    cases = [(b, v, d, p) for b in batches for v in SMALL for d in dtypes for p in (0, 1)]
    cases += [(b, v, torch.bfloat16, 0) for b in few for v in LARGE]
    cases += [(few[0], 49_152, dtype, pad) for dtype in dtypes[:2] for pad in (0, 1)]
    return [*cases, (few[0], 49_152, torch.bfloat16, 1)]
