"""A million launches from the same start, whose results are compared bit by bit on the device."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

LAUNCHES = 1_000_000
PER_GRAPH = 1000


def count_differences(launch: Callable[[], None], mutated: list[Tensor]) -> int:
    """Words that differ from the first launch's over `LAUNCHES` launches from the same start."""
    start = [tensor.clone() for tensor in mutated]
    launch()
    first = [tensor.clone() for tensor in mutated]
    different = torch.zeros((), dtype=torch.int64, device="cuda")

    def once() -> None:
        for tensor, value in zip(mutated, start, strict=True):
            tensor.copy_(value)
        launch()
        for tensor, value in zip(mutated, first, strict=True):
            different.add_((tensor.view(torch.int32) != value.view(torch.int32)).sum())

    once()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        for _ in range(PER_GRAPH):
            once()
    for _ in range(LAUNCHES // PER_GRAPH):
        graph.replay()
    torch.cuda.synchronize()
    return int(different)
