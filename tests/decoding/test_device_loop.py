"""The graph of a plan, and the loops on graphs, against a stand-in for the CUDA driver."""

from __future__ import annotations

import itertools
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from speckv.decoding import EagerLoop, device, graphed, plan
from speckv.decoding.conditional import CudaError, Driver, PlanGraph
from speckv.decoding.device import DeviceLoop
from speckv.decoding.graphed import GraphedLoop
from speckv.errors import SpeckvError
from speckv.kernels import layout as at
from speckv.kernels import set_conditions
from tests.decoding import grid
from tests.decoding.cuda_stub import Api, Graph
from tests.decoding.test_planned import CAPACITY, POLICIES, batch_of, by_row, ended_early, packed
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


def built(gamma_cap: int) -> list[Any]:
    whole = plan.generation_plan(gamma_cap)
    works = {name: 10 + i for i, name in enumerate(plan.works(whole))}
    api = Api({address: lambda: None for address in works.values()})
    PlanGraph(whole, works, WORDS, Driver(api))
    assert len(api.images) == 1 and api.images[0].endswith(b"\0")
    handles = dict(zip(api.handles, plan.handles(whole), strict=True))
    assert api.used == set(api.handles), "every handle has its node"
    return shape(api.graphs[0], {v: k for k, v in works.items()}, handles)


RUN = {"running": at.RUNNING_ROWS}


def test_the_graph_without_drafts() -> None:
    assert built(0) == ["begin", RUN, ("WHILE", "running", [["verify-1", "close", RUN]])]


def test_the_graph_of_one_draft_token() -> None:
    width = {"width": at.MOST_DRAFTED}
    begin = {**RUN, "lagging": at.LAGGING_ROWS, "drafting": at.DRAFTING_ROWS, **width}
    step = [
        ("WHILE", "lagging", [["catch-up", {"lagging": at.LAGGING_ROWS}]]),
        ("IF", "drafting", [["first", width]]),
        ("SWITCH", "width", [["verify-1"], ["verify-2"]]),
        "close",
        begin,
    ]
    assert built(1) == ["begin", begin, ("WHILE", "running", [step])]


@pytest.mark.parametrize("gamma_cap", [2, 4, 15])
def test_the_graph_of_longer_drafts(gamma_cap: int) -> None:
    (*_, (kind, handle, (step,))) = built(gamma_cap)
    assert (kind, handle) == ("WHILE", "running")
    again = {"more": at.DRAFTING_ROWS, "width": at.MOST_DRAFTED}
    draft = ["first", again, ("WHILE", "more", [["next", again]])]
    assert step[1] == ("IF", "drafting", [draft])
    assert step[2] == ("SWITCH", "width", [[f"verify-{w}"] for w in range(1, gamma_cap + 2)])


def test_a_failed_call_is_named() -> None:
    whole = plan.generation_plan(0)
    works = {name: 1 for name in plan.works(whole)}
    for call in ("cuGraphCreate", "cuGraphAddNode", "cuModuleLoadData", "cuGraphInstantiate"):
        with pytest.raises(CudaError, match=f"^{call}: 1"):
            PlanGraph(whole, works, WORDS, Driver(Api({1: lambda: None}, fails=call)))
    with pytest.raises(ValueError, match="values: expected at most 4, got 5"):
        Driver(Api({})).add_set_conditions(Graph(), [], WORDS, [(1, 0)] * 5)


def test_a_graph_is_given_back() -> None:
    api = Api({1: lambda: None})
    whole = plan.generation_plan(0)
    graph = PlanGraph(whole, {name: 1 for name in plan.works(whole)}, WORDS, Driver(api))
    graph.close()
    assert not api.graphs
    assert Driver(api).version == 13_000


class Captured:
    """A captured graph that replays by calling what was captured."""

    def __init__(self, work: Callable[[], None], children: dict[int, Callable[[], None]]) -> None:
        self._work, self._address = work, 1 + len(children)
        children[self._address] = work

    def replay(self) -> None:
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
    monkeypatch.setattr(device, "synchronize", lambda device: None)
    monkeypatch.setattr(device, "current_stream", lambda device: 5)
    return Api(children)


def loops(api: Api, draft: str, batch: int) -> tuple[EagerLoop, GraphedLoop, DeviceLoop]:
    pair = wrapped("llama", "target", "fp32"), wrapped("llama", draft, "fp32")
    size = {"batch": batch, "capacity": CAPACITY}
    return (
        EagerLoop(*pair, **size),
        GraphedLoop(*pair, **size),
        DeviceLoop(*pair, **size, driver=Driver(api)),
    )


@pytest.mark.parametrize("policy", POLICIES)
@pytest.mark.parametrize("sampling", ["greedy", "sampled", "truncated", "mixed"])
@pytest.mark.parametrize("rows", [[2], [0, 1, 2, 3]], ids=["B1", "B4"])
def test_steps_of_the_eager_loop(policy: str, sampling: str, rows: list[int], api: Api) -> None:
    eager, *others = loops(api, "perturbed", len(rows))
    requests = batch_of(sampling, rows, grid.EOS)
    expected = by_row(eager.run(requests, packed(policy)))
    for loop in others:
        for _ in range(2):  # captured, then replayed
            assert by_row(loop.run(requests, packed(policy))) == expected
    assert api.launches == [5, 5], "one launch a generation"


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
