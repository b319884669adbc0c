"""Which loop is chosen, and what is said of it."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest
import torch

from speckv import Engine, SamplingParams, _cli_options
from speckv.decoding import choice
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


def driver(version: int = 13_000) -> Any:
    api = Api({})
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


def test_a_driver_that_cannot_build_one() -> None:
    """Too old a cuda-bindings, or whatever the driver says."""
    for call in ("cuGraphAddNode", "cuModuleLoadData", "cuGraphInstantiate"):
        broken: Any = lambda call=call: Driver(Api({}, fails=call))  # noqa: E731
        found = str(choose_loop(OnCuda(), None, driver=broken))
        assert found == f"graphed loop (a conditional graph cannot be built: {call}: 1)"
    old = Api({})
    old.cuGraphAddNode = lambda graph, after, count, parameters: (0, None)  # type: ignore
    found = str(choose_loop(OnCuda(), None, driver=lambda: Driver(old)))
    assert found.startswith("graphed loop (a conditional graph cannot be built: ")


def test_names_of_loops() -> None:
    assert choice.LOOPS == _cli_options.LOOPS


def test_loops_are_made_once_and_grow(monkeypatch: pytest.MonkeyPatch) -> None:
    """Rejection sampling has an eager loop of its own beside the chosen one."""
    made: list[tuple[str, int, int]] = []

    def kind(name: str) -> Any:
        def make(*pair: Any, batch: int, capacity: int, **options: Any) -> Any:
            made.append((name, batch, capacity))
            return SimpleNamespace(batch=batch, capacity=capacity, close=lambda: None)

        return make

    monkeypatch.setattr(choice, "DeviceLoop", kind("device"))
    monkeypatch.setattr(choice, "EagerLoop", kind("eager"))
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
    assert made == [
        ("device", 1, 512),
        ("device", 2, 1024),
        ("device", 2, 2000),
        ("eager", 1, 2000),
    ]
    loops.drop()
    loops.take(requests(1, 9))
    assert made[-1] == ("device", 1, 512)
