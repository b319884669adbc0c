"""The eager loop, with every step's draft signals kept for requests that ask for them."""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor

from .eager import EagerLoop, StepRecord
from .requests import RequestBatch


class KeepingEagerLoop(EagerLoop):
    """`EagerLoop`, which between two steps can be asked what stands in its state."""

    _kept: list[list[Tensor]] | None = None

    def run(self, requests: RequestBatch, policy: Tensor) -> Iterator[list[StepRecord]]:
        """As of `EagerLoop`."""
        self._kept = [[] for _ in requests.prompts] if requests.keep_signals else None
        for records in super().run(requests, policy):
            if self._kept is not None:
                for record in records:
                    if record.gamma >= 0:
                        self._kept[record.row].append(self._state.signals[record.row].cpu().clone())
            yield records

    def signals(self, row: int, steps: int) -> Tensor:
        """As of `PlannedLoop`."""
        if self._kept is None:
            raise ValueError("signals: expected requests with keep_signals")
        kept = self._kept[row][:steps]
        return torch.stack(kept) if kept else self._state.signals[:0].cpu()
