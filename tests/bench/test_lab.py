"""How variants are timed by turns, with replays that take what they are told to take."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest

from bench import lab
from bench.lab import Lab, nothing


class Pretended:
    """A graph of calls, which runs nothing."""

    def __init__(self, calls: list[Callable[[], Any]]) -> None:
        self.calls = calls

    def replay(self) -> int:
        return len(self.calls)


@pytest.fixture
def gpu(monkeypatch: pytest.MonkeyPatch) -> Lab:
    """A lab whose replays take 3, 6, 9, ... microseconds a call, whatever they hold."""
    found = Lab(quick=True, dry=True)
    found.dry = False
    ticks = iter(range(1, 10_000))
    monkeypatch.setattr(lab, "_captured", lambda calls, restore: Pretended(calls))
    monkeypatch.setattr(lab, "_elapsed_us", lambda replay: 3.0 * next(ticks) * replay())
    monkeypatch.setattr(lab.torch.cuda, "synchronize", lambda: None)
    return found


def test_times_are_those_of_a_call(gpu: Lab) -> None:
    row = gpu.time([nothing] * 4, nothing)
    assert row["launches"] == 4 and row["n"] == 20
    assert row["kernel_us"]["p50"] == pytest.approx(3.0 * 10.5)
    assert row["host_us"]["p50"] > 0.0 and "above_first_us" not in row


def test_variants_take_turns(gpu: Lab) -> None:
    """So each replay is compared with the one of the first variant just before it."""
    first, second, third = gpu.turns(*(([nothing] * n, nothing) for n in (2, 5, 1)))
    assert "above_first_us" not in first
    assert second["above_first_us"]["p50"] == pytest.approx(3.0)
    assert third["above_first_us"]["p50"] == pytest.approx(6.0)
    assert first["kernel_us"]["p50"] < second["kernel_us"]["p50"] < third["kernel_us"]["p50"]


def test_states_are_put_back_ahead_of_every_replay(gpu: Lab) -> None:
    restored: list[int] = []
    gpu.turns(([nothing], lambda: restored.append(0)), ([nothing], lambda: restored.append(1)))
    # Ahead of the first calls, of each replay, and of what is timed on the host.
    assert restored.count(0) == restored.count(1) == 1 + 20 + 1
    assert restored[2:6] == [0, 1, 0, 1]


def test_the_bandwidth_of_a_copy(gpu: Lab) -> None:
    gpu._l2_bytes = 1
    row = gpu.copied()
    assert row["bytes_per_us"] == row["bytes"] / row["kernel_us"]["p50"]


def test_a_dry_run_has_no_times() -> None:
    first, second = Lab(quick=True, dry=True).turns(([nothing], nothing), ([nothing], nothing))
    assert first["kernel_us"] is second["kernel_us"] is second["above_first_us"] is None
