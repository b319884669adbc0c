"""Very many launches whose results are compared bit by bit, on the device.

``SPECKV_GPU_LAUNCHES`` says how many, a million by default.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Sequence

import torch
import triton
import triton.language as tl
from torch import Tensor

LAUNCHES = int(os.environ.get("SPECKV_GPU_LAUNCHES", "1000000"))
PER_GRAPH = 1000
_BLOCK = 1024


@triton.jit
def _differences_kernel(a_ptr, b_ptr, words, different_ptr, BLOCK: tl.constexpr):
    o = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    mask = o < words
    a = tl.load(a_ptr + o, mask=mask, other=0)
    b = tl.load(b_ptr + o, mask=mask, other=0)
    count = tl.sum((a != b).to(tl.int32), 0)
    if count > 0:
        tl.atomic_add(different_ptr, count)


def add_differences(a: Tensor, b: Tensor, different: Tensor) -> None:
    """Add to ``different`` how many 16-bit words of two contiguous tensors are not equal."""
    a, b = a.view(torch.int16), b.view(torch.int16)
    grid = (triton.cdiv(a.numel(), _BLOCK),)
    _differences_kernel[grid](a, b, a.numel(), different, BLOCK=_BLOCK)


def count_differences(
    launch: Callable[[], None], mutated: Sequence[Tensor], counters: Sequence[Tensor] = ()
) -> int:
    """Words that differ from the first launch's over `LAUNCHES` launches from the same start.

    Parameters
    ----------
    launch : callable
    mutated : sequence of Tensor
        What it reads and changes, or writes: put back ahead of every launch, compared after it.
    counters : sequence of Tensor
        What it must leave as it was, and nobody puts back: a launch that does not set its arrival
        counters to zero spoils the next one.
    """
    return count_alternating([launch], [mutated], counters)


def count_alternating(
    launches: Sequence[Callable[[], None]],
    mutated: Sequence[Sequence[Tensor]],
    counters: Sequence[Tensor] = (),
) -> int:
    """As `count_differences`, of several launches in turn, back to back.

    All run before anything is compared, so each finds the counters and partial results that another
    one has left a moment ago.
    """
    for counter in counters:
        assert not counter.any()
    start = [[tensor.clone() for tensor in each] for each in mutated]
    for launch in launches:
        launch()
    first = [[tensor.clone() for tensor in each] for each in mutated]
    different = torch.zeros((), dtype=torch.int32, device="cuda")

    def once() -> None:
        for each, values in zip(mutated, start, strict=True):
            for tensor, value in zip(each, values, strict=True):
                tensor.copy_(value)
        for launch in launches:
            launch()
        for each, values in zip(mutated, first, strict=True):
            for tensor, value in zip(each, values, strict=True):
                add_differences(tensor, value, different)

    once()
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        for _ in range(PER_GRAPH):
            once()
    for _ in range(max(LAUNCHES // PER_GRAPH // len(launches), 1)):
        graph.replay()
    torch.cuda.synchronize()
    for counter in counters:
        assert not counter.any(), "a launch has left an arrival counter that is not zero"
    return int(different)
