"""Costs of a step: kept by what they depend on, and on graphs those of replays."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from torch import Tensor

from speckv.decoding import calibrate
from speckv.decoding.calibrate import calibrated, measure
from speckv.kernels import layout as at
from speckv.kernels.layout import WIDTH_MAX
from speckv.models.base import CausalModel
from speckv.models.cache import KVCache
from speckv.models.hub import CACHE_VARIABLE
from speckv.policies import CostTable
from tests.decoding.tiny import wrapped


class Replayed:
    """Stands in for a CUDA graph: replays by calling, and tells how often."""

    def __init__(self, work: Callable[[], object]) -> None:
        self.work, self.replays = work, 0

    def replay(self) -> None:
        self.replays += 1
        self.work()


@pytest.fixture
def captured(monkeypatch: pytest.MonkeyPatch) -> list[Replayed]:
    found: list[Replayed] = []

    def capture(work: Callable[[], object], pool: Any) -> tuple[Replayed, None]:
        found.append(Replayed(work))
        return found[-1], None

    monkeypatch.setattr(calibrate, "capture", capture)
    monkeypatch.setattr(calibrate, "synchronize", lambda device: None)
    return found


def pair() -> tuple[CausalModel, CausalModel]:
    return wrapped("llama", "target", "fp32"), wrapped("llama", "perturbed", "fp32")


@pytest.mark.parametrize("graphs", [False, True])
def test_a_table_of_whole_steps(graphs: bool, captured: list[Replayed]) -> None:
    table = measure(*pair(), graphs=graphs)
    assert all(ms > 0 for ms in table.step_ms) and min(table.step_ms_per_context_token) >= 0
    assert list(table.step_ms) == sorted(table.step_ms)
    assert table.parts is not None and len(table.parts.verify_ms) == WIDTH_MAX
    assert len(captured) == (50 if graphs else 0), "each γ, its parts, two of catching up"
    repeats = calibrate._REPEATS, calibrate._PART_REPEATS, calibrate._CATCH_UP_REPEATS
    assert {graph.replays // calibrate._REPLAYS for graph in captured} == (
        {n + 1 for n in repeats} if graphs else set()
    )


def test_a_step_is_the_loops(monkeypatch: pytest.MonkeyPatch) -> None:
    """γ draft tokens, the first after two rows; one verification; the same in every call."""
    target, draft = pair()
    seen: list[tuple[str, int, int]] = []

    def watch(model: CausalModel, name: str) -> None:
        forward = model.forward

        def watched(tokens: Tensor, start: list[int], cache: KVCache) -> Tensor:
            seen.append((name, tokens.shape[1], start[0]))
            return forward(tokens, start, cache)

        monkeypatch.setattr(model, "forward", watched)

    watch(target, "target")
    watch(draft, "draft")
    steps = calibrate._Steps(target, draft, 64)
    step = steps.of(3, context=20)
    for _ in range(2):
        step()
        assert seen == [("draft", 2, 19), ("draft", 1, 21), ("draft", 1, 22), ("target", 4, 20)]
        assert steps.state.rows[0, at.GAMMA] == 3
        seen.clear()
    steps.of(0, context=20)()
    assert seen == [("target", 1, 20)] and steps.state.rows[0, at.GAMMA] == 0
    steps.of(15, context=20)()
    assert steps.state.rows[0, at.GAMMA] == 15


def test_costs_of_parts_are_found(monkeypatch: pytest.MonkeyPatch) -> None:
    """A clock that the forwards advance: what they take is what the table says."""
    now = [0.0]
    monkeypatch.setattr(calibrate, "_CONTEXTS", (8, 32))
    target, draft = pair()

    def taking(model: CausalModel, ms: Callable[[int, int], float]) -> None:
        forward = model.forward

        def slow(tokens: Tensor, start: list[int], cache: KVCache) -> Tensor:
            now[0] += ms(tokens.shape[1], start[0]) / 1e3
            return forward(tokens, start, cache)

        monkeypatch.setattr(model, "forward", slow)

    taking(target, lambda width, start: 10 + width + (width == 4) + 0.01 * start)
    taking(draft, lambda width, start: 1.9 + 0.05 * width + 0.002 * start)
    monkeypatch.setattr(calibrate, "perf_counter", lambda: now[0])
    table = measure(target, draft)
    for gamma in range(WIDTH_MAX):
        drafts = sum(1.95 + 0.002 * j for j in range(gamma)) + 0.05 * (gamma > 0)
        jag = gamma == 3  # each γ is measured: what only one of them costs is seen
        assert table.step_ms[gamma] == pytest.approx(11 + gamma + jag + drafts, abs=0.02)
        assert table.step_ms_per_context_token[gamma] == pytest.approx(0.01 + 0.002 * gamma)
    assert table.catch_up_ms == pytest.approx(0.05, abs=0.01)
    parts = table.parts
    assert parts is not None
    assert parts.draft_ms == pytest.approx(1.97, abs=0.05)
    for width, ms in enumerate(parts.verify_ms, start=1):
        assert ms == pytest.approx(10.08 + width + (width == 4), abs=0.01)
    assert max(parts.overhead_ms) == 0
    assert table.catch_up_tokens == 1
    monkeypatch.setattr(calibrate, "synchronize", lambda device: None)
    monkeypatch.setattr(calibrate, "capture", lambda work, pool: (Replayed(work), None))
    graphs = measure(target, draft, graphs=True)  # there a forward of its own, of eight rows here
    assert graphs.catch_up_ms == pytest.approx(1.9 + 0.05 * 8, abs=0.02)
    assert graphs.catch_up_tokens == WIDTH_MAX


def test_kinds_of_loop_have_tables_of_their_own(
    captured: list[Replayed], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv(CACHE_VARIABLE, str(tmp_path))
    measured: list[bool] = []

    def measure(target: object, draft: object, *, graphs: bool) -> CostTable:
        measured.append(graphs)
        return CostTable.from_parts(draft_ms=1.0, verify_ms=[2.0 + len(measured)] * 16)

    monkeypatch.setattr(calibrate, "measure", measure)
    models = pair()
    eager, graphs = calibrated(*models), calibrated(*models, graphs=True)
    assert (calibrated(*models), calibrated(*models, graphs=True)) == (eager, graphs)
    assert eager != graphs and measured == [False, True]
    assert calibrated(*models, graphs=True, anew=True) not in (eager, graphs)


def _other_name(monkeypatch: pytest.MonkeyPatch, model: Any) -> None:
    model.name = "another"


def _other_checkpoint(monkeypatch: pytest.MonkeyPatch, model: Any) -> None:
    model.fingerprint = "another"


def _other_format(monkeypatch: pytest.MonkeyPatch, model: Any) -> None:
    model.compression = "int8"


def _other_dtype(monkeypatch: pytest.MonkeyPatch, model: Any) -> None:
    model.dtype = "another"


def _other_threads(monkeypatch: pytest.MonkeyPatch, model: Any) -> None:
    monkeypatch.setattr(calibrate.torch, "get_num_threads", lambda: 99)


def _other_device(monkeypatch: pytest.MonkeyPatch, model: Any) -> None:
    monkeypatch.setattr(calibrate, "device_name", lambda device: "another")


def _other_version(monkeypatch: pytest.MonkeyPatch, model: Any) -> None:
    monkeypatch.setattr(calibrate, "package_version", lambda name: "another")


def _no_native(monkeypatch: pytest.MonkeyPatch, model: Any) -> None:
    monkeypatch.setattr(calibrate.native, "library", lambda: None)


class _Named:
    """What the key of a table asks of a model."""

    def __init__(self, name: str) -> None:
        self.name, self.fingerprint, self.vocab_size = name, "0" * 64, 99
        self.compression, self.dtype = "fp32", "float32"
        self.device = pair()[0].device


@pytest.mark.parametrize(
    "change",
    [
        _other_name,
        _other_checkpoint,
        _other_format,
        _other_dtype,
        _other_threads,
        _other_device,
        _other_version,
        _no_native,
    ],
)
@pytest.mark.parametrize("which", ["target", "draft"])
def test_costs_are_measured_again_when_what_they_depend_on_changes(
    change: Callable[[pytest.MonkeyPatch, Any], None], which: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    models: dict[str, Any] = {name: _Named(name) for name in ("target", "draft")}
    monkeypatch.setattr(calibrate.native, "library", lambda: object())
    before = calibrate._key(models["target"], models["draft"], False)
    assert calibrate._key(models["target"], models["draft"], False) == before
    change(monkeypatch, models[which])
    assert calibrate._key(models["target"], models["draft"], False) != before


def test_a_cached_table_that_is_not_whole_is_measured_again(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv(CACHE_VARIABLE, str(tmp_path))
    tables = [CostTable.from_parts(draft_ms=1.0, verify_ms=[ms] * 16) for ms in (2.0, 3.0, 4.0)]
    left = iter(tables)
    monkeypatch.setattr(calibrate, "measure", lambda *pair, graphs: next(left))
    models = pair()
    assert calibrated(*models) == calibrated(*models) == tables[0]
    (path,) = (tmp_path / "costs").iterdir()
    whole = path.read_text()
    path.write_text(whole[: len(whole) // 2])
    assert calibrated(*models) == calibrated(*models) == tables[1]
    path.write_text(whole.replace("2.0", "NaN"))
    assert calibrated(*models) == tables[2]
