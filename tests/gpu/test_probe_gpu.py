"""What the device loop rests on, before any model: a module that loads, bounded conditional nodes
whose values are checked, words that cross between a running graph and the host.

Every graph here counts its own iterations and ends by that count, so none can run on for ever.
"""

from __future__ import annotations

import time
from collections.abc import Callable

import pytest
import torch
from torch import Tensor

from speckv.decoding import plan
from speckv.decoding.conditional import DRIVER_MIN, Driver, PlanGraph
from speckv.decoding.graphed import capture
from speckv.decoding.plan import If, Plan, Set, Switch, While, Work
from speckv.decoding.trial import try_conditionals
from speckv.decoding.works import step_operations
from speckv.kernels import layout as at
from speckv.kernels.layout import LoopState, StepState

pytestmark = pytest.mark.gpu

PATIENCE = 20.0
"""Seconds that a word of the device is waited for."""
BOUND = 7


class Board:
    """Counters and condition words on the device, and works that change them by plain torch."""

    def __init__(self) -> None:
        self.counts = torch.zeros(8, dtype=torch.int64, device="cuda")
        self.words = torch.zeros(4, dtype=torch.int64, device="cuda")
        self.works: dict[str, Callable[[], object]] = {}

    def counting(self, name: str, counter: int) -> Work:
        """A work that counts."""
        self.works[name] = lambda: self.counts[counter].add_(1)
        return Work(name)

    def comparing(self, name: str, word: int, counter: int, bound: int) -> Work:
        """A work that makes a word 1 while a counter is below a bound, else 0."""
        self.works[name] = lambda: self.words[word].copy_(self.counts[counter] < bound)
        return Work(name)

    def clearing(self, name: str, counter: int) -> Work:
        self.works[name] = lambda: self.counts[counter].zero_()
        return Work(name)

    def launch(self, what: Plan, times: int = 1) -> list[int]:
        """Build a plan's graph, launch it so often, and return the counters."""
        needed = plan.works(what)
        start = self.counts.clone(), self.words.clone()
        for name in needed:
            self.works[name]()
        self.counts.copy_(start[0])
        self.words.copy_(start[1])
        torch.cuda.synchronize()
        pool, graphs = None, {}
        for name in needed:
            graphs[name], pool = capture(self.works[name], pool)
        addresses = {name: graph.raw_cuda_graph() for name, graph in graphs.items()}
        built = PlanGraph(what, addresses, self.words.data_ptr(), Driver())
        for _ in range(times):
            built.launch(torch.cuda.current_stream().cuda_stream)
            torch.cuda.synchronize()
        built.close()
        return self.counts.tolist()


def test_the_driver_has_conditional_nodes() -> None:
    torch.zeros(1, device="cuda")
    driver = Driver()
    assert driver.version >= DRIVER_MIN


def test_the_module_is_loaded() -> None:
    """The driver supplies ``cudaGraphSetConditional``, which the PTX leaves open."""
    torch.zeros(1, device="cuda")
    assert Driver()._function() is not None


def test_a_graph_of_every_kind_runs() -> None:
    device = torch.device("cuda", torch.cuda.current_device())
    torch.zeros(1, device=device)
    try_conditionals(Driver(), device)


def test_set_conditions_alone_is_launched() -> None:
    board = Board()
    assert board.launch((board.counting("tick", 0), Set(())))[0] == 1


def test_a_while_runs_until_its_condition_is_0() -> None:
    board = Board()
    again = Set((("again", 0),))
    below = board.comparing("below", 0, 0, BOUND)
    tick = board.counting("tick", 0)
    assert board.launch((below, again, While("again", (tick, below, again))))[0] == BOUND


def test_a_while_whose_condition_is_0_does_not_run() -> None:
    board = Board()
    tick, below = board.counting("tick", 0), board.comparing("below", 0, 1, BOUND)
    again = Set((("again", 0),))
    board.counts[1] = BOUND
    assert board.launch((below, again, While("again", (tick, below, again))))[0] == 0


def test_a_graph_is_launched_again() -> None:
    """A handle begins at its default with every launch, and its bodies run as often."""
    board = Board()
    again = Set((("again", 0),))
    below, tick = board.comparing("below", 0, 0, BOUND), board.counting("tick", 0)
    first = board.clearing("clear", 0)
    total = board.counting("total", 1)
    what = (first, below, again, While("again", (tick, total, below, again)))
    found = board.launch(what, times=3)
    assert (found[0], found[1]) == (BOUND, 3 * BOUND)


@pytest.mark.parametrize("taken", [0, 1, 5])
def test_an_if(taken: int) -> None:
    board = Board()
    board.words[0] = taken
    tick, after = board.counting("tick", 0), board.counting("after", 1)
    found = board.launch((Set((("taken", 0),)), If("taken", (tick,)), after))
    assert (found[0], found[1]) == (int(taken > 0), 1)


@pytest.mark.parametrize("number", [0, 1, 3, 4, 9])
def test_a_switch(number: int) -> None:
    """A number beyond the bodies runs none."""
    board = Board()
    board.words[0] = number
    bodies: tuple[Plan, ...] = tuple((board.counting(f"body-{i}", i),) for i in range(4))
    found = board.launch((Set((("number", 0),)), Switch("number", bodies)))
    assert found[:4] == [int(i == number) for i in range(4)]


def test_a_switch_of_sixteen_in_a_while() -> None:
    """The step of the longest drafts."""
    board = Board()
    again, below = Set((("again", 0), ("number", 1))), board.comparing("below", 0, 0, 16)
    board.works["number"] = lambda: board.words[1].copy_(board.counts[0])
    board.works["sum"] = lambda: board.counts[2].add_(board.words[1] * board.words[1])
    bodies: tuple[Plan, ...] = tuple((board.counting(f"body-{i}", 1),) for i in range(16))
    step = (Switch("number", bodies), Work("sum"), board.counting("tick", 0))
    what = (below, Work("number"), again, While("again", (*step, below, Work("number"), again)))
    found = board.launch(what)
    assert found[:3] == [16, 16, sum(i * i for i in range(16))]


@pytest.mark.parametrize(("outer", "inner"), [(1, 5), (5, 1), (3, 4), (100, 10)])
def test_a_nested_while(outer: int, inner: int) -> None:
    """The handle of the inner one is set again ahead of it: a default counts once a launch."""
    board = Board()
    run, more = Set((("run", 0),)), Set((("more", 1),))
    outside, inside = board.comparing("out", 0, 0, outer), board.comparing("in", 1, 1, inner)
    clear, total = board.clearing("clear", 1), board.counting("total", 2)
    deep = While("more", (board.counting("inner", 1), total, inside, more))
    body = (clear, inside, more, deep, board.counting("outer", 0), outside, run)
    found = board.launch((outside, run, While("run", body)))
    assert (found[0], found[2]) == (outer, outer * inner)


def test_an_if_and_a_switch_in_a_while() -> None:
    """As in a step: whether it drafts, then how wide its verification is."""
    board = Board()
    begin = Set((("run", 0), ("draft", 1), ("width", 2)))
    compare = board.comparing("run", 0, 0, 6)
    board.works["turn"] = lambda: board.words[1].copy_(board.counts[0] % 2)
    board.works["width"] = lambda: board.words[2].copy_(board.counts[0] % 3)
    widths: tuple[Plan, ...] = tuple((board.counting(f"width-{i}", 2 + i),) for i in range(3))
    publish = (compare, Work("turn"), Work("width"), begin)
    body = (
        If("draft", (board.counting("drafted", 1),)),
        Switch("width", widths),
        board.counting("step", 0),
        *publish,
    )
    assert board.launch((*publish, While("run", body)))[:5] == [6, 3, 2, 2, 2]


class Talking:
    """A WHILE of slow steps that tell the host, as those of the device loop do."""

    def __init__(self, steps: int) -> None:
        device = torch.device("cuda")
        self.state = StepState.allocate(1, 64, device)
        self.loop = LoopState.allocate(1, 64, device, conditions_on_host=False)
        self.state.reset(0, [1, 2, 3], limit=64, request=0)
        self.state.rows[0, at.COMMITTED] = self.state.rows[0, at.STEP] = 1
        self.loop.control.copy_(torch.tensor([9, 0, steps, 0], dtype=torch.int32))
        between = step_operations(device)

        def step() -> None:
            torch.cuda._sleep(200_000)  # about 0.1 ms
            between.close_step(self.state, self.loop)
            between.publish_conditions(self.state, self.loop)

        works = {"step": step}
        works["begin"] = lambda: between.publish_conditions(self.state, self.loop)
        for work in works.values():
            work()
        self.loop.control[at.STEPS] = 0
        torch.cuda.synchronize()
        self.loop.records.zero_()
        graphs = {name: capture(work, None)[0] for name, work in works.items()}
        self._graphs = graphs
        again = Set((("run", at.RUNNING_ROWS),))
        what = (Work("begin"), again, While("run", (Work("step"), again)))
        addresses = {name: graph.raw_cuda_graph() for name, graph in graphs.items()}
        self.built = PlanGraph(what, addresses, self.loop.conditions.data_ptr(), Driver())
        torch.cuda.synchronize()

    def first_record(self) -> float:
        """Launch; seconds until the first record arrives in pinned memory."""
        records = self.loop.records.numpy()
        start = time.perf_counter()
        self.built.launch(torch.cuda.current_stream().cuda_stream)
        while not records[0, 0]:
            assert time.perf_counter() - start < PATIENCE, "no word has come from the device"
        return time.perf_counter() - start


def test_records_arrive_while_the_graph_runs() -> None:
    talking = Talking(steps=2000)
    first = talking.first_record()
    start = time.perf_counter()
    torch.cuda.synchronize()
    rest = time.perf_counter() - start
    assert int(talking.loop.control[at.STEPS]) == 2000
    assert int(talking.loop.records[0, 0]) >> 32 == 9
    print(f"first record after {first * 1e3:.2f} ms, the end {rest * 1e3:.2f} ms later")
    assert first < 0.2 * rest
    talking.built.close()


def test_a_word_of_the_host_ends_the_graph() -> None:
    talking = Talking(steps=20_000)
    talking.first_record()
    talking.loop.cancel.fill_(1)
    torch.cuda.synchronize()
    steps = int(talking.loop.control[at.STEPS])
    assert 0 < steps < 10_000
    assert int(talking.state.rows[0, at.DONE]) == at.DONE_STOP
    talking.built.close()


def test_a_captured_graph_says_how_many_nodes_it_has() -> None:
    from bench.audit import node_count

    def work(tensor: Tensor) -> None:
        tensor.add_(1)
        tensor.mul_(2)

    tensor = torch.zeros(3, device="cuda")
    work(tensor)
    torch.cuda.synchronize()
    graph, _ = capture(lambda: work(tensor), None)
    assert node_count(graph.raw_cuda_graph()) == 2
