"""Which loop is chosen, and what is said of it."""

from __future__ import annotations

from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from speckv import Engine, SamplingParams, _cli_options
from speckv.decoding import choice, graphed, trial
from speckv.decoding.choice import Loops, choose_loop
from speckv.decoding.conditional import CudaError, Driver
from speckv.decoding.lookup import Lookup
from speckv.decoding.requests import RequestBatch
from speckv.models.llama import LlamaDecoder
from tests.decoding.cuda_stub import Api
from tests.decoding.tiny import wrapped


class OnCuda(LlamaDecoder):
    """A decoder that says it is on a GPU."""

    def __init__(self) -> None:
        self.device, self.name = torch.device("cuda"), "llama"


CHILDREN: dict[int, Callable[[], object]] = {}
"""What was captured for trials, by address."""


class Captured:
    def __init__(self, work: Callable[[], object]) -> None:
        self._address = 1 + len(CHILDREN)
        CHILDREN[self._address] = work

    def raw_cuda_graph(self) -> int:
        return self._address


@pytest.fixture(autouse=True)
def trials_on_the_cpu(monkeypatch: pytest.MonkeyPatch) -> None:
    CHILDREN.clear()
    monkeypatch.setattr(graphed, "capture", lambda work, pool: (Captured(work), None))
    monkeypatch.setattr(graphed, "synchronize", lambda device: None)
    monkeypatch.setattr(trial, "current_stream", lambda device: 0)
    cpu = torch.device("cpu")
    monkeypatch.setattr(choice, "try_conditionals", lambda d, _: trial.try_conditionals(d, cpu))


def driver(version: int = 13_000) -> Any:
    api = Api(CHILDREN)
    api.cuDriverGetVersion = lambda: (0, version)  # type: ignore[method-assign]
    return lambda: Driver(api)


def failing(error: Exception) -> Any:
    def opened() -> Driver:
        raise error

    return opened


@pytest.mark.parametrize(
    ("wanted", "opened", "expected"),
    [
        ("auto", driver(), "device loop"),
        ("device", driver(12_080), "device loop"),
        (
            "auto",
            driver(12_040),
            "graphed loop (conditional graphs need a driver of CUDA 12.8, found 12.4)",
        ),
        (
            "auto",
            failing(ModuleNotFoundError("cuda")),
            "graphed loop (conditional graphs need cuda-bindings: pip install 'speckv[graphs]')",
        ),
        (
            "auto",
            failing(CudaError("cuInit: 3")),
            "graphed loop (the CUDA driver cannot be asked: cuInit: 3)",
        ),
        ("graphed", driver(), "graphed loop (as asked for)"),
        ("eager", driver(), "eager loop (as asked for)"),
    ],
)
def test_on_a_gpu(wanted: str, opened: Any, expected: str) -> None:
    assert str(choose_loop(OnCuda(), None, wanted=wanted, driver=opened)) == expected


def test_pairs_that_no_graph_can_hold() -> None:
    """Without a GPU, with a lookup, and with a model of transformers."""
    here = wrapped("llama", "target", "fp32")
    assert str(choose_loop(here, here)) == "eager loop (CUDA graphs need a GPU)"
    there = OnCuda()
    found = choose_loop(there, None, Lookup(), driver=driver())
    assert str(found) == "eager loop (a lookup searches on the host)"
    other: Any = SimpleNamespace(name="gpt2", device=there.device)
    found = choose_loop(there, other, driver=driver())
    assert str(found) == "eager loop (gpt2 runs in transformers)"


def test_what_cannot_be_had_is_refused() -> None:
    here = wrapped("llama", "target", "fp32")
    for wanted in ("device", "graphed"):
        with pytest.raises(ValueError, match=f"for '{wanted}', got: CUDA graphs need a GPU"):
            choose_loop(here, here, wanted=wanted)
    with pytest.raises(ValueError, match="for 'device', got: conditional graphs need a driver"):
        choose_loop(OnCuda(), None, wanted="device", driver=driver(12_000))
    with pytest.raises(ValueError, match="loop: expected one of auto, device, .* got 'fast'"):
        choose_loop(here, here, wanted="fast")
    with pytest.raises(ValueError, match="loop: expected one of"):
        Engine(here, None, here, loop="fast")


def chosen(api: Api) -> str:
    return str(choose_loop(OnCuda(), None, driver=lambda: Driver(api)))


NOT = "graphed loop (a conditional graph does not run: "


def test_a_driver_that_cannot_build_one() -> None:
    """Too old a cuda-bindings, or whatever the driver says."""
    for call in ("cuGraphAddNode", "cuModuleLoadData", "cuGraphInstantiate", "cuGraphLaunch"):
        assert chosen(Api(CHILDREN, fails=call)) == f"{NOT}{call}: 1)"
    old = Api(CHILDREN)
    old.cuGraphAddNode = lambda graph, after, count, parameters: (0, None)  # type: ignore
    assert chosen(old).startswith(NOT)


def test_a_driver_that_runs_graphs_otherwise(monkeypatch: pytest.MonkeyPatch) -> None:
    """The trial is launched, and what it leaves is checked; its graph is given back."""
    api = Api(CHILDREN)
    assert chosen(api) == "device loop"
    assert api.launches == [0] and not api.graphs and not api.executables
    whole = Api._branch

    def at_most_once(self: Api, node: Any) -> None:
        kind, node.kind = node.kind, "IF" if node.kind == "WHILE" else node.kind
        whole(self, node)
        node.kind = kind

    monkeypatch.setattr(Api, "_branch", at_most_once)
    wrong = "a trial graph counted [2, 1, 0, 1, 1, 0, 0, 1], expected [0, 2, 2, 4, 1, 1, 0, 1])"
    assert chosen(Api(CHILDREN)) == NOT + wrong
    monkeypatch.setattr(Api, "cuGraphLaunch", lambda self, executable, stream: (0,))
    monkeypatch.setattr(trial, "_SECONDS", 0.0)
    assert chosen(Api(CHILDREN)) == f"{NOT}a trial graph has not ended within 0 s)"


def test_names_of_loops() -> None:
    assert choice.LOOPS == _cli_options.LOOPS


def test_loops_are_made_once_and_grow(monkeypatch: pytest.MonkeyPatch) -> None:
    """One loop, whatever the coupling; the old one is closed before a larger one is made."""
    made: list[tuple[str, int, int]] = []
    closed: list[int] = []

    def make(*pair: Any, batch: int, capacity: int, **options: Any) -> Any:
        made.append(("device", batch, capacity))
        number = len(made)
        return SimpleNamespace(batch=batch, capacity=capacity, close=lambda: closed.append(number))

    monkeypatch.setattr(choice, "DeviceLoop", make)
    pair = OnCuda(), OnCuda()
    monkeypatch.setattr(choice, "choose_loop", lambda *a: choose_loop(*a, driver=driver()))
    loops = Loops(*pair, id_map=None, lookup=None, max_length=2000)

    def requests(count: int, new: int, **options: Any) -> RequestBatch:
        params = [SamplingParams(max_new_tokens=new, seed=1, **options)] * count
        cpu = torch.device("cpu")
        return RequestBatch.build([[1]] * count, params, eos_ids=[], max_length=2000, device=cpu)

    first = loops.take(requests(1, 9))
    assert loops.take(requests(1, 511)) is first
    assert loops.take(requests(2, 512)) is not first
    loops.take(requests(1, 1900))
    loops.reserve(1, 2000)
    loops.take(requests(1, 9, temperature=1.0, coupling="rejection"))
    assert made == [("device", 1, 512), ("device", 2, 1024), ("device", 2, 2000)]
    assert closed == [1, 2]
    loops.drop()
    assert closed == [1, 2, 3]
    loops.take(requests(1, 9))
    assert made[-1] == ("device", 1, 512)
