"""The graph of a plan, and the loops on graphs, against a stand-in for the CUDA driver."""

from __future__ import annotations

import gc
import itertools
import weakref
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from speckv.decoding import EagerLoop, device, graphed, plan
from speckv.decoding.conditional import CudaError, Driver, PlanGraph
from speckv.decoding.device import DeviceLoop
from speckv.decoding.graphed import GraphedLoop
from speckv.decoding.signals import KeepingEagerLoop
from speckv.errors import SpeckvError
from speckv.kernels import layout as at
from speckv.kernels import set_conditions
from tests.decoding import grid
from tests.decoding.cuda_stub import Api, Graph
from tests.decoding.test_planned import (
    CAPACITY,
    POLICIES,
    REJECTION,
    assert_bounded,
    batch_of,
    broken_works,
    by_row,
    ended_early,
    packed,
)
from tests.decoding.tiny import wrapped

WORDS = 4096


def shape(graph: Graph, names: dict[int, str], handles: dict[int, str]) -> list[Any]:
    """A recorded graph as nested lists; asserts that its nodes are a chain."""
    found: list[Any] = []
    for before, node in zip([None, *graph.nodes], graph.nodes, strict=False):
        assert node.after == ([] if before is None else [before])
        if node.kind == "GRAPH":
            found.append(names[node.detail])
        elif node.kind == "KERNEL":
            words, values = node.detail
            assert words == WORDS
            found.append({handles[handle]: word for handle, word in values})
        else:
            handle, bodies = node.detail
            inner = [shape(body, names, handles) for body in bodies]
            found.append((node.kind, handles[handle], inner))
    return found


def built(gamma_cap: int, drafts: str = "while") -> list[Any]:
    whole = plan.generation_plan(gamma_cap, drafts)
    works = {name: 10 + i for i, name in enumerate(plan.works(whole))}
    api = Api({address: lambda: None for address in works.values()})
    graph = PlanGraph(whole, works, WORDS, Driver(api))
    assert len(api.images) == 1 and api.images[0].endswith(b"\0")
    handles = dict(zip(api.handles, plan.handles(whole), strict=True))
    assert api.used == set(api.handles), "every handle has its node"
    found = shape(api.graphs[0], {v: k for k, v in works.items()}, handles)
    graph.close()
    return found


RUN = {"running": at.RUNNING_ROWS}
BEGIN = {"lagging": at.LAGGING_ROWS, "drafting": at.DRAFTING_ROWS}
CATCH_UP = ("WHILE", "lagging", [["catch-up", {"lagging": at.LAGGING_ROWS}]])


def end(gamma_cap: int) -> list[Any]:
    """What every step with drafts ends with."""
    verify = [[f"verify-{w}"] for w in range(1, gamma_cap + 2)]
    return [{"width": at.MOST_DRAFTED}, ("SWITCH", "width", verify), "close", RUN]


def whole(*step: Any) -> list[Any]:
    return ["begin", RUN, ("WHILE", "running", [list(step)])]


def test_the_graph_without_drafts() -> None:
    assert built(0) == whole("verify-1", "close", RUN)


def test_the_graph_of_one_draft_token() -> None:
    for drafts in ("while", "chain"):
        first = ("IF", "drafting", [["first"]])
        assert built(1, drafts) == whole(BEGIN, CATCH_UP, first, *end(1))


@pytest.mark.parametrize("gamma_cap", [2, 4, 15])
def test_the_graph_of_longer_drafts(gamma_cap: int) -> None:
    more = {"more": at.DRAFTING_ROWS}
    draft = ["first", more, ("WHILE", "more", [["next", more]])]
    step = (BEGIN, CATCH_UP, ("IF", "drafting", [draft]))
    assert built(gamma_cap) == whole(*step, *end(gamma_cap))


def test_the_graph_of_a_chain() -> None:
    links = [
        node
        for n in (2, 3)
        for node in ({f"more-{n}": at.DRAFTING_ROWS}, ("IF", f"more-{n}", [["next"]]))
    ]
    step = (BEGIN, CATCH_UP, ("IF", "drafting", [["first"]]), *links)
    assert built(3, "chain") == whole(*step, *end(3))


def test_the_graph_of_unrolled_lengths() -> None:
    begin = {"lagging": at.LAGGING_ROWS, "length": at.FIXED_GAMMA}
    lengths = [[{}], ["first"], ["first", "next"]]
    step = (begin, CATCH_UP, ("SWITCH", "length", lengths))
    assert built(2, "switch") == whole(*step, *end(2))


def test_a_failed_call_is_named() -> None:
    whole = plan.generation_plan(0)
    works = {name: 1 for name in plan.works(whole)}
    for call in ("cuGraphCreate", "cuGraphAddNode", "cuModuleLoadData", "cuGraphInstantiate"):
        api = Api({1: lambda: None}, fails=call)
        with pytest.raises(CudaError, match=f"^{call}: 1"):
            PlanGraph(whole, works, WORDS, Driver(api))
        assert not api.graphs, "what was begun is given back"
    no_context = Api({1: lambda: None})
    no_context.cuCtxGetCurrent = lambda: (0, 0)  # type: ignore[method-assign]
    with pytest.raises(CudaError, match="no context is current in this thread"):
        PlanGraph(whole, works, WORDS, Driver(no_context))
    with pytest.raises(ValueError, match="values: expected at most 4, got 5"):
        Driver(Api({})).add_set_conditions(Graph(), [], WORDS, [(1, 0)] * 5)


def test_a_graph_is_given_back() -> None:
    """Once: by hand, or with the object."""
    api = Api({1: lambda: None})
    whole = plan.generation_plan(0)
    for by_hand in (True, False):
        graph = PlanGraph(whole, {name: 1 for name in plan.works(whole)}, WORDS, Driver(api))
        assert api.graphs and api.executables
        if by_hand:
            graph.close()
            assert not api.graphs and not api.executables
        del graph
        assert not api.graphs and not api.executables
    assert Driver(api).version == 13_000


class Captured:
    """A captured graph that replays by calling what was captured."""

    def __init__(self, work: Callable[[], None], children: dict[int, Callable[[], None]]) -> None:
        self._work, self._address = work, 1 + len(children)
        self._instantiated = False
        children[self._address] = work

    def instantiate(self) -> None:
        self._instantiated = True

    def replay(self) -> None:
        assert self._instantiated, "not within a generation"
        self._work()

    def raw_cuda_graph(self) -> int:
        return self._address


@pytest.fixture
def api(monkeypatch: pytest.MonkeyPatch) -> Api:
    """Captures, streams and the driver, on the CPU."""
    children: dict[int, Callable[[], None]] = {}
    monkeypatch.setattr(graphed, "capture", lambda work, pool: (Captured(work, children), "pool"))
    monkeypatch.setattr(graphed, "synchronize", lambda device: None)
    monkeypatch.setattr(graphed, "is_idle", lambda device: True)
    monkeypatch.setattr(device, "current_stream", lambda device: 5)
    return Api(children)


def loops(
    api: Api, draft: str, batch: int, drafts: str = "while"
) -> tuple[EagerLoop, GraphedLoop, DeviceLoop]:
    pair = wrapped("llama", "target", "fp32"), wrapped("llama", draft, "fp32")
    size: dict[str, Any] = {"batch": batch, "capacity": CAPACITY}
    return (
        KeepingEagerLoop(*pair, **size),
        GraphedLoop(*pair, **size, drafts=drafts),
        DeviceLoop(*pair, **size, drafts=drafts, driver=Driver(api)),
    )


@pytest.mark.parametrize("policy", POLICIES)
@pytest.mark.parametrize("sampling", ["greedy", "sampled", "mixed", REJECTION + "mixed"])
@pytest.mark.parametrize("rows", [[2], [0, 1, 2, 3]], ids=["B1", "B4"])
def test_steps_of_the_eager_loop(policy: str, sampling: str, rows: list[int], api: Api) -> None:
    eager, *others = loops(api, "perturbed", len(rows))
    requests = batch_of(sampling, rows, grid.EOS)
    expected = by_row(eager.run(requests, packed(policy)))
    for loop in others:
        for _ in range(2):  # captured, then replayed
            assert by_row(loop.run(requests, packed(policy))) == expected
    assert api.launches == [5, 5], "one launch a generation"
    assert api.uploads == [5]


@pytest.mark.parametrize("drafts", ["chain", "switch"])
@pytest.mark.parametrize("rows", [[2], [0, 1, 2, 3]], ids=["B1", "B4"])
def test_other_ways_of_drafting(drafts: str, rows: list[int], api: Api) -> None:
    eager, *others = loops(api, "perturbed", len(rows), drafts)
    for sampling in ("mixed", REJECTION + "mixed"):
        for policy in ("fixed:0", "fixed:4", *(["entropy:1.5"] * (drafts == "chain"))):
            requests = batch_of(sampling, rows, grid.EOS)
            expected = by_row(eager.run(requests, packed(policy)))
            for loop in others:
                assert by_row(loop.run(requests, packed(policy))) == expected


def test_signals_are_kept(api: Api) -> None:
    found = []
    for loop in loops(api, "perturbed", 4):
        requests = batch_of("mixed", [0, 1, 2, 3], grid.EOS, keep_signals=True)
        steps = by_row(loop.run(requests, packed("entropy:1.5")))
        rows = [
            each[: record.gamma]
            for row, records in sorted(steps.items())
            for record, each in zip(records[1:], loop.signals(row, len(records) - 1), strict=True)
        ]
        found.append(torch.cat(rows))
    assert len(found[0]) > 20
    assert torch.equal(found[0], found[1]) and torch.equal(found[0], found[2])


@pytest.mark.parametrize("never", ["stop", "catch up"])
def test_a_step_that_never_stops(never: str, api: Api, monkeypatch: pytest.MonkeyPatch) -> None:
    """One launch, which ends, and the host says that it misses something."""
    monkeypatch.setattr(graphed, "_GRACE_SECONDS", 0.0)
    monkeypatch.setattr(graphed, "_PATIENCE", 2)
    _, _, loop = loops(api, "perturbed", 1)
    requests = batch_of("greedy", [1], [], most=4)
    list(loop.run(requests, packed("fixed:15")))  # prepares
    with broken_works(never) as ran, pytest.raises(SpeckvError, match="expected a word"):
        list(loop.run(requests, packed("fixed:15")))
    assert_bounded(ran, never, int(loop._shared.passes[at.MOST_PASSES]), 4)
    assert len(api.launches) == 2
    assert loop._shared.ended[0] == loop._generation << 32 | 5, "its end was told all the same"
    loop._drain()  # does not wait for it once more


def test_forms_are_captured_once(api: Api) -> None:
    _, _, loop = loops(api, "perturbed", 4)
    turns = [("greedy", "fixed:2"), ("sampled", "fixed:2"), ("greedy", "fixed:0")]
    for sampling, policy in turns * 3:
        list(loop.run(batch_of(sampling, [0, 1], []), packed(policy)))
    assert len(loop._plans) == len(loop._graphs) == 3
    assert len(api.launches) == 9


def test_a_row_that_the_host_ends(api: Api) -> None:
    """The stand-in runs ahead to the end: the host takes no more of the row all the same."""
    eager, _, loop = loops(api, "perturbed", 4)
    requests = batch_of("greedy", [0, 1, 2, 3], [])
    whole = by_row(eager.run(requests, packed("fixed:2")))
    cut = by_row(ended_early(loop, requests, packed("fixed:2"), row=2, records=3))
    assert cut[2] == whole[2][:3] and cut[0] == whole[0]


def test_a_generation_that_is_abandoned(api: Api) -> None:
    eager, _, loop = loops(api, "perturbed", 4)
    requests = batch_of("greedy", [0, 1, 2, 3], [])
    running = loop.run(requests, packed("fixed:2"))
    for _ in itertools.islice(running, 3):
        pass
    running.close()  # type: ignore[attr-defined]
    assert loop._shared.cancel.all()
    expected = by_row(eager.run(requests, packed("fixed:2")))
    assert by_row(loop.run(requests, packed("fixed:2"))) == expected


def test_what_runs_ends_before_the_next_begins(api: Api, monkeypatch: pytest.MonkeyPatch) -> None:
    """The word of the end, then the device: before the host clears what it has cancelled."""
    _, _, loop = loops(api, "perturbed", 1)
    requests = batch_of("greedy", [0], [])
    expected = by_row(loop.run(requests, packed("fixed:2")))
    late: list[Callable[[], None]] = []
    whole = Api.cuGraphLaunch

    def launch(self: Api, executable: Graph, stream: int) -> tuple[int]:
        late.append(lambda: whole(self, executable, stream))  # type: ignore[arg-type, return-value]
        return (0,)

    monkeypatch.setattr(Api, "cuGraphLaunch", launch)
    running = loop.run(requests, packed("fixed:2"))
    next(running)
    stepping = iter(running)
    monkeypatch.setattr(loop, "_await_records", lambda reader: [])
    next(stepping)
    running.close()  # type: ignore[attr-defined]
    assert loop._shared.cancel.all() and len(late) == 1
    monkeypatch.undo()
    order: list[str] = []

    def await_word(device: Any, ready: Callable[[], bool]) -> None:
        if not ready():
            order.append("waited")
            assert loop._shared.cancel.all(), "it must be seen"
            late.pop()()
        assert ready()

    monkeypatch.setattr(graphed, "await_word", await_word)
    monkeypatch.setattr(graphed, "synchronize", lambda device: order.append("synchronized"))
    monkeypatch.setattr(device, "current_stream", lambda device: 5)
    assert by_row(loop.run(requests, packed("fixed:2"))) == expected
    assert order[:2] == ["waited", "synchronized"]


@pytest.mark.parametrize("fails", ["capture", "upload"])
def test_an_interrupted_preparation(fails: str, api: Api, monkeypatch: pytest.MonkeyPatch) -> None:
    """Nothing half prepared is found later, and the driver has everything back."""
    eager, *others = loops(api, "perturbed", 2)
    requests = batch_of("sampled", [0, 1], [])
    for loop in others:
        with monkeypatch.context() as patch:

            def interrupted(*arguments: Any) -> Any:
                raise KeyboardInterrupt

            if fails == "capture":
                patch.setattr(graphed, "capture", interrupted)
            else:
                patch.setattr(Captured, "instantiate", interrupted)
                patch.setattr(Api, "cuGraphUpload", interrupted)
            with pytest.raises(KeyboardInterrupt):
                next(loop.run(requests, packed("fixed:3")))
        assert not loop._works and not loop._graphs and not api.graphs
        expected = by_row(eager.run(requests, packed("fixed:3")))
        assert by_row(loop.run(requests, packed("fixed:3"))) == expected


def test_a_loop_that_is_dropped(api: Api) -> None:
    """Its graphs go with it: by hand, or with the last reference, without the collector's help."""
    gc.disable()
    try:
        for by_hand in (True, False):
            _, graphs, loop = loops(api, "perturbed", 2)
            seen = [weakref.ref(loop), weakref.ref(graphs)]
            for each in (graphs, loop):
                for policy in ("fixed:0", "fixed:2"):
                    list(each.run(batch_of("greedy", [0, 1], []), packed(policy)))
            seen += [weakref.ref(works) for works in loop._works.values()]
            assert len(api.graphs) == len(api.executables) == 2
            if by_hand:
                loop.close()
                assert not api.graphs and not api.executables
            del graphs, loop, each
            api._children.clear()  # the stand-in's
            assert not api.graphs and not api.executables
            assert all(reference() is None for reference in seen)
    finally:
        gc.enable()


def test_a_device_that_says_nothing(api: Api, monkeypatch: pytest.MonkeyPatch) -> None:
    _, graphs, loop = loops(api, "perturbed", 1)
    monkeypatch.setattr(graphed, "_GRACE_SECONDS", 0.0)
    monkeypatch.setattr(graphed, "_PATIENCE", 2)
    requests = batch_of("greedy", [0], [])
    monkeypatch.setattr(Api, "cuGraphLaunch", lambda self, executable, stream: (0,))
    with pytest.raises(SpeckvError, match="expected a word from the device"):
        list(loop.run(requests, packed("fixed:2")))
    list(graphs.run(requests, packed("fixed:2")))
    monkeypatch.setattr(Captured, "replay", lambda self: None)
    with pytest.raises(SpeckvError, match="expected a word from the device"):
        list(graphs.run(requests, packed("fixed:2")))


@pytest.mark.aot
@pytest.mark.parametrize("arch", ["sm_80", "sm_90", "sm_100"])
def test_the_kernel_that_sets_conditions_assembles(arch: str, tmp_path: Path) -> None:
    """One call of the driver's function for each handle, and nothing on the stack."""
    from speckv.kernels import registry

    cubin = registry.assemble(set_conditions.ptx(), arch)
    usage = registry.resource_usage(cubin)
    assert usage["STACK"] == usage["LOCAL"] == 0
    assert usage["REG"] <= 32
    sass = registry.disassemble(cubin)
    calls = [line for line in sass.splitlines() if " CALL." in line]
    assert len(calls) == set_conditions.HANDLES_MAX
