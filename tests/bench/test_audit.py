"""The audit finds what makes the host wait, in torch and in a trace, and nothing in the loops."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from bench import audit, shares
from bench.audit import (
    SyncAudit,
    audited,
    captured_launches,
    gammas_of_steps,
    node_count,
    trace_syncs,
    within,
)
from bench.lab import Lab
from speckv.decoding import EagerLoop, device, graphed
from speckv.decoding.conditional import Driver
from speckv.decoding.device import DeviceLoop
from speckv.decoding.eager import StepRecord
from speckv.decoding.graphed import GraphedLoop
from speckv.decoding.works import Form
from tests.decoding.cuda_stub import Api
from tests.decoding.test_planned import CAPACITY, batch_of, by_row, packed
from tests.decoding.tiny import wrapped

FORM = Form(batch=2, gamma_cap=3, sampled=False, truncated=False, eos=8)
READS: dict[str, Callable[[torch.Tensor], Any]] = {
    "Tensor.item": lambda t: t[0].item(),
    "Tensor.tolist": lambda t: t.tolist(),
    "Tensor.cpu": lambda t: t.cpu(),
    "Tensor.numpy": lambda t: t.numpy(),
    "Tensor.__bool__": lambda t: bool(t[0] > 5),
    "Tensor.__int__": lambda t: int(t[1]),
    "Tensor.__float__": lambda t: float(t[1]),
    "Tensor.__index__": lambda t: [1, 2, 3][t.long()[0]],
    "nonzero": torch.nonzero,
    "equal": lambda t: torch.equal(t, t),
    "masked_select": lambda t: torch.masked_select(t, t > 1),
}


@pytest.mark.parametrize("name", READS)
def test_every_read_is_found(name: str) -> None:
    tensor = torch.arange(3.0)
    with SyncAudit("cpu") as audit:
        READS[name](tensor)
    assert len(audit.found) == 1, audit.found
    assert audit.found[0].startswith(f"{name} at ") and __file__ in audit.found[0]
    READS[name](tensor)
    with audit, audit.paused():
        READS[name](tensor)
    assert len(audit.found) == 1, "outside the audit, and while it is paused, nothing is noted"


def test_tensors_of_other_devices_may_be_read() -> None:
    with SyncAudit("cuda") as audit:
        for read in READS.values():
            read(torch.arange(3.0))
    assert audit.found == []


@pytest.mark.parametrize("owner", [torch.cuda, torch.cuda.Stream, torch.cuda.Event])
def test_waiting_is_found(owner: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(owner, "synchronize", lambda *arguments: None)
    with SyncAudit() as audit:
        owner.synchronize(None)
    assert len(audit.found) == 1 and ".synchronize at " in audit.found[0]


def test_waits_and_launches_of_a_trace() -> None:
    names = ["aten::add", "cudaLaunchKernel", "cudaStreamSynchronize", "cuLaunchKernelEx"]
    names += ["Memcpy DtoH (Device -> Pinned)", "Memcpy HtoD (Pinned -> Device)", "cuGraphLaunch"]
    waits, launches = trace_syncs(names)
    assert waits == ["cudaStreamSynchronize", "Memcpy DtoH (Device -> Pinned)"]
    assert launches == 3


def test_nodes_of_a_graph() -> None:
    class Library:
        @staticmethod
        def cuGraphGetNodes(graph: Any, nodes: None, count: Any) -> int:
            count._obj.value = graph.value - 1000
            return 0 if graph.value < 2000 else 1

    assert node_count(1007, Library) == 7
    with pytest.raises(RuntimeError, match="cuGraphGetNodes: CUDA error 1"):
        node_count(2000, Library)


def test_launches_of_captured_works(monkeypatch: pytest.MonkeyPatch) -> None:
    """Of each step by its longest draft, of all rows."""
    records = [
        [StepRecord(row, gamma, 0, [1], 0) for row, gamma in enumerate(gammas)]
        for gammas in ((-1, -1), (3, 1), (0, 0))
    ]
    assert gammas_of_steps([*records, [StepRecord(1, 2, 0, [1], 1)]]) == [3, 0, 2]
    monkeypatch.setattr(audit, "node_count", lambda graph: graph)
    graphs = {"first": SimpleNamespace(raw_cuda_graph=lambda: 9)}
    assert captured_launches(SimpleNamespace(_graphs={FORM: graphs}), FORM) == {"first": 9}
    assert captured_launches(SimpleNamespace(), FORM) == {}


def test_copies_from_pageable_memory_are_found() -> None:
    with SyncAudit("meta") as audit:
        torch.ones(3).to("meta")
        torch.empty(3, device="meta").copy_(torch.ones(3))
    assert [line.split(" at ")[0] for line in audit.found] == [
        "_to_copy from pageable memory",
        "copy_ from pageable memory",
    ]


def test_events_of_a_span() -> None:
    def event(name: str, start: int, end: int) -> Any:
        return SimpleNamespace(name=name, time_range=SimpleNamespace(start=start, end=end))

    events = [event("a", 0, 1), event("generation", 2, 9), event("b", 3, 4), event("c", 8, 12)]
    assert list(within(events, "generation")) == ["b"]


@pytest.fixture
def stub(monkeypatch: pytest.MonkeyPatch) -> tuple[SyncAudit, Api]:
    """An audit, and a driver whose captured graphs are calls on the host, which it pauses for."""
    watching = SyncAudit("cpu")
    children: dict[int, Callable[[], None]] = {}

    class Captured:
        def __init__(self, work: Callable[[], None]) -> None:
            self._work, self._address = work, len(children)
            children[self._address] = self.replay

        def instantiate(self) -> None:
            pass

        def replay(self) -> None:
            with watching.paused():
                self._work()

        def raw_cuda_graph(self) -> int:
            return self._address

    monkeypatch.setattr(graphed, "capture", lambda work, pool: (Captured(work), None))
    monkeypatch.setattr(graphed, "synchronize", lambda device: None)
    monkeypatch.setattr(graphed, "is_idle", lambda device: False)
    monkeypatch.setattr(device, "current_stream", lambda device: 0)
    return watching, Api(children)


@pytest.mark.parametrize("policy", ["fixed:0", "fixed:3", "speckv"])
def test_loops_on_graphs_read_nothing(policy: str, stub: tuple[SyncAudit, Api]) -> None:
    """What stands in for the device is not the host's; the eager loop is what the audit catches."""
    watching, api = stub
    pair = wrapped("llama", "target", "fp32"), wrapped("llama", "perturbed", "fp32")
    requests = batch_of("sampled", [0, 1], [])
    size = {"batch": 2, "capacity": CAPACITY}
    eager = EagerLoop(*pair, **size)
    loops = [GraphedLoop(*pair, **size), DeviceLoop(*pair, **size, driver=Driver(api))]
    expected = by_row(iter(audited(eager, requests, packed(policy), watching)))
    assert watching.found, "the eager loop reads the state in every step"
    for loop in loops:
        watching.found.clear()
        assert by_row(iter(audited(loop, requests, packed(policy), watching))) == expected
        assert watching.found == []


def test_rows_of_loops_on_graphs(
    stub: tuple[SyncAudit, Api], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Launches of a step are the nodes of what was captured, and what sets the conditions."""
    kinds = {"graphed": GraphedLoop, "device": partial(DeviceLoop, driver=Driver(stub[1]))}
    monkeypatch.setattr(audit, "on_graphs", lambda lab: kinds)
    monkeypatch.setattr(audit, "node_count", lambda graph: 100)
    monkeypatch.setattr(shares, "on_graphs", lambda lab: kinds)
    pair = wrapped("llama", "target", "fp32"), wrapped("llama", "perturbed", "fp32")
    lab = Lab(quick=True, dry=True)
    rows = list(audit.wait_rows(lab, *pair, {}))
    assert len(rows) == 2 * 2 * 4 and all(row["syncs"] == 0 for row in rows)
    for row in rows:
        fixed = row["policy"] == "fixed:3"
        # Three draft tokens, a verification and a close, and γ + 3 Sets.
        assert row["launches_per_step"] <= 506 if fixed else row["launches_per_step"] > 200
    first = next(row for row in rows if row["policy"] == "fixed:3" and row["batch"] == 1)
    assert first["launches_per_step"] > 450 and set(first["launches_of_works"].values()) == {100}
    named = {row["name"]: row for row in shares.host_rows(lab, *pair, {})}
    assert {f"host of the {kind} loop" for kind in kinds} == set(named)
    assert all(row["tokens"] == 16 for row in named.values())
    assert all(not row["grew"] for row in audit.memory_rows(lab, *pair, {}))
