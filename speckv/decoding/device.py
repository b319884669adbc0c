"""The device loop: a generation is one launch of one CUDA graph.

The graph is that of a `plan` with its conditional nodes (`conditional`). The host launches it, then
reads tokens as they arrive in pinned memory.
"""

from __future__ import annotations

import time
from collections.abc import Iterator
from typing import Any

import torch

from .conditional import Driver, PlanGraph
from .eager import StepRecord
from .graphed import GraphedLoop, synchronize
from .planned import Reader
from .works import Form, Works


class DeviceLoop(GraphedLoop):
    """`PlannedLoop` with the plan on the device.

    Parameters
    ----------
    driver : Driver, optional
        The CUDA driver.
    arguments, options
        As of `PlannedLoop`.

    Attributes
    ----------
    launch_seconds : float
        Host time of the last generation's one launch.
    """

    _reads_conditions = False

    def __init__(self, *arguments: Any, driver: Driver | None = None, **options: Any) -> None:
        super().__init__(*arguments, **options)
        self._driver = driver or Driver()
        self._plans: dict[Form, PlanGraph] = {}
        self._launched = False
        self.launch_seconds = 0.0

    def _prepare(self, works: Works) -> Works:
        works = super()._prepare(works)
        graphs = {name: g.raw_cuda_graph() for name, g in self._graphs[works.form].items()}
        words = works.loop.conditions.data_ptr()
        self._plans[works.form] = PlanGraph(works.plan, graphs, words, self._driver)
        return works

    def _release(self) -> None:
        super()._release()
        for graph in self._plans.values():
            graph.close()
        self._plans.clear()

    def _begin(self, *arguments: Any) -> None:
        if self._launched:  # an abandoned generation may not have ended
            synchronize(self.target.device)
            self._launched = False
        super()._begin(*arguments)

    def _decode(self, works: Works, reader: Reader) -> Iterator[list[StepRecord]]:
        if reader.done:
            return
        self._launched = True
        start = time.perf_counter()
        self._plans[works.form].launch(current_stream(self.target.device))
        self.launch_seconds = time.perf_counter() - start
        while not reader.done:
            yield self._await_records(reader)


def current_stream(device: torch.device) -> int:
    """The handle of the stream that torch launches on."""
    return int(torch.cuda.current_stream(device).cuda_stream)
