"""What the engine asks of its loop: signals, and to run on the models' device."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from types import SimpleNamespace
from typing import Any

import pytest
import torch

import speckv.engine
from speckv import Engine, SamplingParams
from speckv.decoding import current
from speckv.decoding.choice import Loops
from speckv.decoding.current import OnDevice, on_device
from speckv.decoding.planned import PlannedLoop
from speckv.kernels import layout as at
from tests.decoding.loops import COST
from tests.decoding.tiny import wrapped

PROMPTS = [[5, 9, 3], [7, 1, 2, 3, 4, 5], [11]]
PARAMS = [
    SamplingParams(max_new_tokens=9),
    SamplingParams(max_new_tokens=14, temperature=0.9, seed=3),
    SamplingParams(max_new_tokens=5, temperature=0.9, seed=4, top_k=9),
]
TOKENIZER = SimpleNamespace(
    eos_token_id=None,
    encode=lambda text: [1],
    decode=lambda ids, **_: "".join(chr(97 + i % 26) for i in ids),
)


def engine(target: Any = None) -> Engine:
    target = target or wrapped("llama", "target", "fp32")
    draft = wrapped("llama", "perturbed", "fp32")
    return Engine(target, TOKENIZER, draft, policy="entropy:1.5", cost=COST)


@pytest.fixture(params=["eager", "planned"])
def kind(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> str:
    """The engine's loop on a CPU, and the one that the loops on graphs are."""
    if request.param == "planned":

        def make(self: Loops, batch: int, length: int) -> PlannedLoop:
            return PlannedLoop(*self._pair, batch=batch, capacity=length, id_map=self._id_map)

        monkeypatch.setattr(Loops, "_make", make)
    kind: str = request.param
    return kind


def test_signals_come_with_the_stats(kind: str) -> None:
    found = engine().generate(PROMPTS, PARAMS, keep_signals=True)
    for result in found:
        signals = result.stats.signals
        assert [len(step) for step in signals] == [gamma for gamma, _ in result.stats.steps]
        words = torch.tensor([token for step in signals for token in step])
        assert words.shape[1] == at.SIGNALS and (words[:, at.CONFIDENCE] > 0).all()
        assert (words[:, at.ENTROPY] >= 0).all() and len(words) >= 2
    assert engine().generate(PROMPTS, PARAMS)[0].stats.signals is None


def test_loops_keep_the_same_signals(monkeypatch: pytest.MonkeyPatch) -> None:
    expected = [r.stats.signals for r in engine().generate(PROMPTS, PARAMS, keep_signals=True)]
    monkeypatch.setattr(
        Loops, "_make", lambda self, b, n: PlannedLoop(*self._pair, batch=b, capacity=n)
    )
    found = [r.stats.signals for r in engine().generate(PROMPTS, PARAMS, keep_signals=True)]
    assert found == expected


def test_the_last_chunk_of_a_stream_has_them(kind: str) -> None:
    *_, last = engine().stream(PROMPTS[1], PARAMS[1], keep_signals=True)
    assert last.result is not None and last.result.stats.signals
    assert len(last.result.stats.signals) == len(last.result.stats.steps)
    stopped = SamplingParams(max_new_tokens=14, stop=(last.result.text[6:8],))
    *_, last = engine().stream(PROMPTS[1], stopped, keep_signals=True)
    assert len(last.result.stats.signals) == len(last.result.stats.steps)


def test_an_interrupted_request_has_those_of_its_steps(kind: str) -> None:
    class Interrupting:
        """A target that Ctrl-C meets in its fifth pass."""

        left = 5

        def __getattr__(self, name: str) -> Any:
            return getattr(wrapped("llama", "target", "fp32"), name)

        def forward(self, *arguments: Any, **options: Any) -> Any:
            self.left -= 1
            if not self.left:
                raise KeyboardInterrupt
            return wrapped("llama", "target", "fp32").forward(*arguments, **options)

    *_, last = engine(Interrupting()).stream(
        PROMPTS[0], SamplingParams(max_new_tokens=40), keep_signals=True
    )
    assert last.finish_reason == "interrupted"
    assert len(last.result.stats.signals) == len(last.result.stats.steps) == 4


class Devices:
    """Stands in for torch's current device."""

    def __init__(self) -> None:
        self.current = 0

    @contextmanager
    def __call__(self, device: torch.device) -> Iterator[None]:
        before, self.current = self.current, device.index
        try:
            yield
        finally:
            self.current = before


@pytest.fixture
def devices(monkeypatch: pytest.MonkeyPatch) -> Devices:
    devices = Devices()
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device", devices)
    return devices


def test_steps_run_on_their_device_and_the_caller_on_its_own(devices: Devices) -> None:
    def steps() -> Iterator[int]:
        try:
            for _ in range(3):
                yield devices.current
        finally:
            closed.append(devices.current)

    closed: list[int] = []
    running = OnDevice(torch.device("cuda", 1), steps())
    assert (next(running), devices.current) == (1, 0)
    assert (next(running), devices.current) == (1, 0)
    running.close()
    assert closed == [1] and devices.current == 0
    with on_device(torch.device("cpu")):
        assert devices.current == 0


def test_whatever_the_engine_runs_is_on_the_models_device(
    kind: str, devices: Devices, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The loop's own work, that of making it, and that of a policy that needs costs."""
    seen: list[int] = []
    whole = current.on_device

    def guarded(device: torch.device) -> Any:
        assert device.type == "cpu"
        return whole(torch.device("cuda", 3))

    monkeypatch.setattr(current, "on_device", guarded)
    monkeypatch.setattr(speckv.engine, "on_device", guarded)

    class Watched:
        def __getattr__(self, name: str) -> Any:
            if name in ("forward", "prefill", "new_cache"):
                seen.append(devices.current)
            return getattr(wrapped("llama", "target", "fp32"), name)

    found = engine(Watched())
    found.warmup(batch_size=2, length=64)
    chunks = found.stream(PROMPTS[0], PARAMS[0])
    for _ in chunks:
        assert devices.current == 0
    found.generate(PROMPTS, PARAMS)
    assert len(seen) > 30 and set(seen) == {3}
