"""Costs of a step: kept by what they depend on, and on graphs those of replays."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from speckv.decoding import calibrate
from speckv.decoding.calibrate import calibrated, measure
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


def test_on_graphs_replays_are_timed(captured: list[Replayed]) -> None:
    pair = wrapped("llama", "target", "fp32"), wrapped("llama", "perturbed", "fp32")
    table = measure(*pair, graphs=True)
    assert all(ms > 0 for ms in table.step_ms)
    contexts, forwards = 2, len(calibrate._WIDTHS) + len(calibrate._DRAFT_WIDTHS)
    assert len(captured) in (contexts * forwards + 2, forwards + 2)
    each = (calibrate._REPEATS + 1) * calibrate._REPLAYS
    assert {graph.replays for graph in captured} == {each}


def test_every_replay_does_the_same_work(
    captured: list[Replayed], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Kernels leave rows alone that have stopped or are done: each replay begins a step anew."""
    seen: list[list[int]] = []
    step = calibrate._step_ms

    def watched(operation: Callable[[], object], state: Any, graphs: bool) -> float:
        def watching() -> None:
            seen.append(state.rows[0].tolist())
            operation()

        return step(watching, state, graphs)

    monkeypatch.setattr(calibrate, "_step_ms", watched)
    measure(wrapped("llama", "target", "fp32"), wrapped("llama", "perturbed", "fp32"), graphs=True)
    assert len(seen) > 2 * calibrate._REPLAYS
    assert all(rows == seen[0] for rows in seen)


def test_kinds_of_loop_have_tables_of_their_own(
    captured: list[Replayed], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv(CACHE_VARIABLE, str(tmp_path))
    measured: list[bool] = []

    def measure(target: object, draft: object, *, graphs: bool) -> CostTable:
        measured.append(graphs)
        return CostTable.from_parts(draft_ms=1.0, verify_ms=[2.0 + len(measured)] * 16)

    monkeypatch.setattr(calibrate, "measure", measure)
    pair = wrapped("llama", "target", "fp32"), wrapped("llama", "perturbed", "fp32")
    eager, graphs = calibrated(*pair), calibrated(*pair, graphs=True)
    assert (calibrated(*pair), calibrated(*pair, graphs=True)) == (eager, graphs)
    assert eager != graphs and measured == [False, True]
    assert calibrated(*pair, graphs=True, anew=True) not in (eager, graphs)
