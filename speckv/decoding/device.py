"""The device loop: a generation is one launch of one CUDA graph.

The graph is that of a `plan` with its conditional nodes (`conditional`). The host launches it, then
reads tokens as they arrive in pinned memory.
"""

from __future__ import annotations

import time
from collections.abc import Iterator
from typing import Any

import torch

from . import plan as of
from .conditional import Driver, PlanGraph
from .eager import StepRecord
from .graphed import GraphedLoop
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
        self.launch_seconds = 0.0

    @property
    def _plans(self) -> dict[Form, PlanGraph]:
        return self._in_flight.graphs

    def _prepare(self, works: Works) -> None:
        super()._prepare(works)
        graphs = {name: g.raw_cuda_graph() for name, g in self._graphs[works.form].items()}
        words = works.loop.conditions.data_ptr()
        self._plans[works.form] = graph = PlanGraph(works.plan, graphs, words, self._driver)
        graph.upload(current_stream(self.target.device))  # not within the first generation

    def _replayed(self, works: Works) -> list[str]:
        return [of.CLOSE]  # after the prefill

    def _forget(self, form: Form) -> None:
        super()._forget(form)
        if graph := self._plans.pop(form, None):
            graph.close()

    def _decode(self, works: Works, reader: Reader) -> Iterator[list[StepRecord]]:
        if reader.done:
            return
        start = time.perf_counter()
        self._plans[works.form].launch(current_stream(self.target.device))
        self._in_flight.launched = True
        self.launch_seconds = time.perf_counter() - start
        while not reader.done:
            yield self._await_records(reader)


def current_stream(device: torch.device) -> int:
    """The handle of the stream that torch launches on."""
    return int(torch.cuda.current_stream(device).cuda_stream)
