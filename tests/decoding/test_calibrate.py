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
    assert len(captured) in ((12, 6) if graphs else (0,)), "one a γ and context length"
    each = (calibrate._REPEATS + 1) * calibrate._REPLAYS
    assert all(graph.replays == each for graph in captured)


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

    taking(target, lambda width, start: 10 + width + 0.01 * start)
    taking(draft, lambda width, start: 2.0 + 0.002 * start)
    monkeypatch.setattr(calibrate, "perf_counter", lambda: now[0])
    table = measure(target, draft)
    for gamma in range(WIDTH_MAX):
        assert table.step_ms[gamma] == pytest.approx(11 + 3 * gamma, abs=0.25)
        assert table.step_ms_per_context_token[gamma] == pytest.approx(0.01 + 0.002 * gamma)


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
