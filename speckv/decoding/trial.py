"""A plan of every kind of node, run once: whether conditional graphs do here what loops rest on.

That a graph can be built and instantiated does not say that it runs as it should. So a small one is
launched before the first loop is made: a WHILE of three turns with an IF that holds a WHILE, and a
SWITCH, whose works count. It ends by itself, and what it has counted is compared.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from functools import partial

import torch

from . import graphed
from . import plan as of
from .conditional import CudaError, Driver, PlanGraph
from .device import current_stream

_SECONDS = 10.0
_TURNS_LEFT, _INNER_LEFT, _CASE = 0, 1, 2
_TOLD = 7
_START = [3, 0, -1, 0, 0, 0, 0, 1]
_ADDED = {
    "turn": [-1, 2, 1, 0, 0, 0, 0, 0],
    "inner": [0, -1, 0, 1, 0, 0, 0, 0],
    "case-0": [0, 0, 0, 0, 1, 0, 0, 0],
    "case-1": [0, 0, 0, 0, 0, 1, 0, 0],
}
_EXPECTED = [0, 2, 2, 4, 1, 1, 0, 1]
"""Of three turns, two had an inner loop of two; the third one's case is beyond the SWITCH."""


def trial_plan() -> of.Plan:
    """The plan, on words of `_START`."""
    running = of.Set(((of.RUNNING, _TURNS_LEFT),))
    more = of.Set(((of.MORE, _INNER_LEFT),))
    cases = tuple((of.Work(f"case-{i}"),) for i in range(2))
    turn: of.Plan = (
        of.Work("turn"),
        of.Set(((of.DRAFTING, _TURNS_LEFT), (of.WIDTH, _CASE))),
        of.If(of.DRAFTING, (more, of.While(of.MORE, (of.Work("inner"), more)))),
        of.Switch(of.WIDTH, cases),
        running,
    )
    return of.Work("begin"), running, of.While(of.RUNNING, turn), of.Work("tell")


def try_conditionals(driver: Driver, device: torch.device) -> None:
    """Launch the trial and check what it leaves.

    Raises
    ------
    CudaError
        A call failed, the graph did not end, or it did something else.
    TypeError, AttributeError
        This version of cuda-bindings is not what is expected.
    """
    graphed.synchronize(device)  # gives this thread a context
    on_gpu = device.type != "cpu"
    start = torch.tensor(_START, device=device)
    words = start.clone()
    told = torch.zeros(len(_START), dtype=torch.int64, pin_memory=on_gpu)
    works: dict[str, Callable[[], object]] = {
        "begin": partial(words.copy_, start),
        "tell": partial(told.copy_, words, non_blocking=True),
    }
    for name, added in _ADDED.items():
        works[name] = partial(words.add_, torch.tensor(added, device=device))
    for work in works.values():  # compiles, and allocates
        work()
    graphed.synchronize(device)
    told.zero_()
    pool, captured = None, {}
    for name, work in works.items():
        captured[name], pool = graphed.capture(work, pool)
    addresses = {name: graph.raw_cuda_graph() for name, graph in captured.items()}
    graph = PlanGraph(trial_plan(), addresses, words.data_ptr(), driver)
    graph.launch(current_stream(device))
    seen, deadline = told.numpy(), time.monotonic() + _SECONDS
    while seen[_TOLD] == 0:
        if time.monotonic() > deadline:
            raise CudaError(f"a trial graph has not ended within {_SECONDS:.0f} s")
    graphed.synchronize(device)
    graph.close()
    if seen.tolist() != _EXPECTED:
        raise CudaError(f"a trial graph counted {seen.tolist()}, expected {_EXPECTED}")
