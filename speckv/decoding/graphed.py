"""The graphed loop: every work is a CUDA graph, and the host follows the plan from one to the next.

What to launch next the host reads from the conditions, which the kernels publish in pinned memory:
it waits for a word, never for a stream.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from functools import partial
from typing import Any

import torch

from ..errors import SpeckvError
from ..kernels import layout as at
from . import plan as of
from .planned import PlannedLoop
from .works import Form, Works

_PATIENCE = 1 << 14
"""Polls between two looks at whether the device still lives."""
_GRACE_SECONDS = 10.0
"""How long a device that looks idle may leave the host waiting."""


class GraphedLoop(PlannedLoop):
    """`PlannedLoop` on CUDA, with each work captured once for each form of requests.

    Parameters and errors are those of `PlannedLoop`.
    """

    def __init__(self, *arguments: Any, **options: Any) -> None:
        super().__init__(*arguments, **options)
        self._graphs: dict[Form, dict[str, Any]] = {}
        self._pool: Any = None

    def _prepare(self, works: Works) -> Works:
        """Compile, then capture, every work.

        Neither compiling nor a first allocation may happen in a capture, so each work runs first:
        on rows that are done, which it leaves as they are.
        """
        works.state.rows.zero_()
        works.state.rows[:, at.DONE] = at.DONE_STOP
        works.state.rows[:, at.LENGTH] = 1
        for name in works.names:
            super()._run(works, name)
        synchronize(self.target.device)
        graphs = {}
        for name in works.names:
            graphs[name], self._pool = capture(partial(works, name), self._pool)
        self._graphs[works.form] = graphs
        return works

    def _run(self, works: Works, name: str) -> None:
        graphs = self._graphs.get(works.form)
        if graphs is None:
            super()._run(works, name)
            return
        self._ticket += of.publishes(name)
        graphs[name].replay()

    def _release(self) -> None:
        synchronize(self.target.device)
        self._graphs.clear()

    def _wait(self, ready: Callable[[], bool]) -> None:
        """Poll until the device has written what is waited for."""
        idle_since: float | None = None
        while True:
            for _ in range(_PATIENCE):
                if ready():
                    return
            if not is_idle(self.target.device):  # raises what has gone wrong there
                idle_since = None
            elif idle_since is None:
                idle_since = time.monotonic()
            elif time.monotonic() - idle_since > _GRACE_SECONDS:
                raise SpeckvError(
                    f"{self.target.device}: expected a word from the device, which has been idle "
                    f"for {_GRACE_SECONDS:.0f} s"
                )


def capture(work: Callable[[], object], pool: Any) -> tuple[Any, Any]:
    """A CUDA graph of what ``work`` launches, and the memory pool that it shares with others.

    It is instantiated when it is first replayed, which in the device loop few are.
    """
    graph = torch.cuda.CUDAGraph(keep_graph=True)
    with torch.cuda.graph(graph, pool=pool):
        work()
    return graph, graph.pool()


def synchronize(device: torch.device) -> None:
    """Wait for a device; between two generations only."""
    torch.cuda.synchronize(device)


def is_idle(device: torch.device) -> bool:
    """Whether the current stream has nothing to do; raises its errors."""
    return bool(torch.cuda.current_stream(device).query())
