"""The graphed loop: every work is a CUDA graph, and the host follows the plan from one to the next.

What to launch next the host reads from the conditions, which the kernels publish in pinned memory:
it waits for a word, never for a stream.
"""

from __future__ import annotations

import time
import weakref
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass, field
from functools import cache, partial
from typing import Any

import torch

from ..errors import NumericsError, SpeckvError
from ..kernels import layout as at
from ..kernels.layout import LoopState
from . import plan as of
from .planned import PlannedLoop
from .requests import RequestBatch
from .works import Form, Works

_PATIENCE = 1 << 14
"""Polls between two looks at whether the device still lives."""
_GRACE_SECONDS = 10.0
"""How long a device that looks idle may leave the host waiting."""


@dataclass
class InFlight:
    """What a loop has on the device, held apart from it: the device may outlive the loop.

    Attributes
    ----------
    device : torch.device
    loop : LoopState
    graphs : dict of Form to objects with a ``close``
        Graphs that the driver does not give back by itself.
    generation : int
        The one that may be running; 0 for none.
    launched : bool
        Whether all of it was launched, so that it ends with a word in ``LoopState.ended``.
    """

    device: torch.device
    loop: LoopState
    graphs: dict[Form, Any] = field(default_factory=dict)
    generation: int = 0
    launched: bool = False

    def drain(self) -> None:
        """Wait for the end of the generation under way.

        The word first: a stream with a WHILE may look idle, and what the host wrote for the next
        generation would then be read by the last one. Then the rest of the graph.
        """
        try:
            if self.launched:
                self.launched = False  # one wait: what is in vain once is in vain again
                ended = self.loop.ended.numpy()
                await_word(self.device, lambda: int(ended[0]) >> 32 == self.generation)
        finally:  # what runs still must end before its graph is given back
            if self.generation:
                synchronize(self.device)
        self.generation = 0

    @torch.inference_mode()
    def give_back(self) -> None:
        """End what runs, then give every graph back."""
        self.loop.cancel.fill_(1)
        with suppress(Exception):  # whoever waited for tokens has been told
            self.drain()
        for graph in self.graphs.values():
            graph.close()
        self.graphs.clear()


class GraphedLoop(PlannedLoop):
    """`PlannedLoop` on CUDA, with each work captured once for each form of requests.

    Parameters and errors are those of `PlannedLoop`.
    """

    def __init__(self, *arguments: Any, **options: Any) -> None:
        super().__init__(*arguments, **options)
        self._graphs: dict[Form, dict[str, Any]] = {}
        self._pool: Any = None
        self._in_flight = InFlight(self.target.device, self._shared)
        self._give_back = weakref.finalize(self, self._in_flight.give_back)
        self._give_back.atexit = False  # the process takes everything with it

    def close(self) -> None:
        """Give everything back, as happens to a loop that is dropped; it cannot be used again."""
        self._give_back()
        super().close()
        self._graphs.clear()

    def _prepare(self, works: Works) -> None:
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
        for name in self._replayed(works):
            graphs[name].instantiate()
        self._graphs[works.form] = graphs

    def _replayed(self, works: Works) -> list[str]:
        """The works that the host launches one by one."""
        return works.names

    def _forget(self, form: Form) -> None:
        self._graphs.pop(form, None)

    def _run(self, works: Works, name: str) -> None:
        graphs = self._graphs.get(works.form)
        if graphs is None:
            super()._run(works, name)
            return
        self._ticket += of.publishes(name)
        graphs[name].replay()

    def _drain(self) -> None:
        self._in_flight.drain()

    def _prefill(self, requests: RequestBatch, works: Works) -> None:
        self._in_flight.generation = self._generation
        super()._prefill(requests, works)

    def _wait(self, ready: Callable[[], bool]) -> None:
        try:
            await_word(self.target.device, ready)
        except NumericsError:  # told by a device that runs on: its end will be told too
            raise
        except SpeckvError:
            self._in_flight.launched = False  # nor will its end be told
            raise


def await_word(device: torch.device, ready: Callable[[], bool]) -> None:
    """Poll until a device has written what is waited for.

    Raises
    ------
    SpeckvError
        It has long been idle, and has not.
    RuntimeError
        What went wrong there.
    """
    idle_since: float | None = None
    while True:
        for _ in range(_PATIENCE):
            if ready():
                return
        if not is_idle(device):  # raises what has gone wrong there
            idle_since = None
        elif idle_since is None:
            idle_since = time.monotonic()
        elif time.monotonic() - idle_since > _GRACE_SECONDS:
            raise SpeckvError(
                f"{device}: expected a word from the device, which has been idle for "
                f"{_GRACE_SECONDS:.0f} s"
            )


def capture(work: Callable[[], object], pool: Any) -> tuple[Any, Any]:
    """A CUDA graph of what ``work`` launches, and the memory pool that it shares with others.

    It is not instantiated: in the device loop few are replayed. Other threads may use the device
    meanwhile.
    """
    graph = torch.cuda.CUDAGraph(keep_graph=True)
    index = torch.cuda.current_device()
    stream, before = _capture_stream(index), torch.cuda.current_stream()
    pool = pool or torch.cuda.graph_pool_handle()
    try:
        with torch.cuda.graph(graph, pool=pool, stream=stream, capture_error_mode="thread_local"):
            work()
    except BaseException:
        end_capture(index, pool, before)
        raise
    return graph, pool


def end_capture(index: int, pool: Any, stream: Any) -> None:
    """Tidy up after a capture that failed, which torch 2.11 does not.

    The current stream is then still that of the capture, and the device's allocations still go to
    its pool: no later capture could begin.
    """
    torch.cuda.set_stream(stream)
    with suppress(Exception):  # later versions have ended it
        torch._C._cuda_endAllocateToPool(index, pool)


@cache
def _capture_stream(index: int) -> Any:
    """One for all captures on a device: torch's own is of the device that captured first."""
    return torch.cuda.Stream(index)


def synchronize(device: torch.device) -> None:
    """Wait for a device; between two generations only."""
    torch.cuda.synchronize(device)


def is_idle(device: torch.device) -> bool:
    """Whether the current stream has nothing to do; raises its errors."""
    return bool(torch.cuda.current_stream(device).query())
