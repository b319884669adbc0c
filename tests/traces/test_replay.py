"""Replay on made-up traces: worked by hand, by brute force, and with a poisoned future."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from functools import cache
from typing import Any

import numpy as np
import pytest
from threadpoolctl import threadpool_limits
from torch import Tensor

from speckv.kernels import cpu_step, native, reference
from speckv.kernels import layout as at
from speckv.kernels.layout import GAMMA_MAX, StepState
from speckv.policies import CostTable, parse_policy
from speckv.traces import boosted
from speckv.traces.packed import PackedController
from speckv.traces.replay import Controller, Oracle, Planned, Replayed, replay
from speckv.traces.schema import Answer, Trace, join
from tests import causality
from tests.traces.conftest import POLICIES, survival_policy
from tests.traces.synthetic import COST, INFO, made_up_rows, made_up_trace

CHEAP = CostTable(
    tuple(1.0 + 0.1 * g for g in range(16)), tuple(0.001 * (1 + g) for g in range(16))
)


def controller(name: str, cost: CostTable = COST) -> PackedController:
    return PackedController(causality.POLICIES[name].pack("fp32", cost))


def one_answer(accepted: list[int], limit: int, prompt: int = 5) -> Trace:
    rows = made_up_rows(np.random.default_rng(0), len(accepted))
    rows = replace(rows, accepted=np.array(accepted, dtype=np.int8))
    answer = Answer(0, "code", "fp32", 0.0, 0, limit, tuple(range(prompt)))
    return join(INFO, [(answer, rows)])


@cache
def trace_of_one_compression() -> Trace:
    return made_up_trace(prompts=16, length=60, compressions=("fp32",))


def test_worked_by_hand() -> None:
    """Ten tokens at most, of which eight came: the last is an end-of-sequence token."""
    #                   place: 0  1  2  3  4  5  6  7
    trace = one_answer(accepted=[0, 2, 0, 1, 0, 3, 2, 1], limit=10)
    found = replay(trace, controller("fixed:4"), CHEAP)
    # From 1: two accepted and one more, 4; from 4: none, 5; from 5: all three that are left.
    assert found.steps_of(0) == [(4, 2), (4, 0), (4, 3)]
    assert found.tokens.tolist() == [7] and found.steps.tolist() == [3]
    assert found.histogram[0].tolist() == [0, 0, 0, 0, 3] + [0] * 11
    lengths = 5 + np.array([1, 4, 5])
    assert found.ms[0] == pytest.approx(sum(1.4 + 0.005 * lengths))
    assert found.tokens_per_step == pytest.approx(7 / 3)
    assert found.tokens_per_second == pytest.approx(7e3 / found.ms[0])


def test_gamma_leaves_room_for_the_targets_own_token() -> None:
    trace = one_answer(accepted=[0, 0, 6, 5, 4, 3, 2, 1], limit=8)
    found = replay(trace, controller("fixed:15"), CHEAP)
    assert found.steps_of(0) == [(6, 0), (5, 5)]


def test_an_answer_of_one_token_has_no_step() -> None:
    found = replay(one_answer([1], limit=4), controller("fixed:4"), CHEAP)
    assert found.steps_of(0) == [] and found.tokens.tolist() == [0]
    assert np.isnan(found.tokens_per_second) and np.isnan(found.tokens_per_step)


def test_plain_decoding() -> None:
    trace = trace_of_one_compression()
    found = replay(trace, controller("fixed:0"), COST)
    np.testing.assert_array_equal(found.steps, trace.lengths - 1)
    assert found.tokens_per_step == 1.0
    assert found.tokens_per_second == pytest.approx(1e3 / COST.step_ms[0])


def test_a_draft_that_plain_steps_left_behind_catches_up() -> None:
    trace = one_answer(accepted=[0] * 8, limit=10)
    cost = replace(CHEAP, catch_up_ms=0.5)
    planned = Planned(trace, np.array([0, 0, 0, 2, 0, 1, 1, 0]))
    found = replay(trace, planned, cost)
    assert found.steps_of(0) == [(g, 0) for g in (0, 0, 2, 0, 1, 1, 0)]
    # Two tokens, then one; those of the last plain step are never fed.
    usual = replay(trace, planned, CHEAP).ms[0]
    assert found.ms[0] - usual == pytest.approx(3 * 0.5)
    by_block = replay(trace, planned, replace(cost, catch_up_tokens=16))
    assert by_block.ms[0] - usual == pytest.approx(2 * 0.5), "a forward of its own each time"


def test_the_oracle_charges_plain_steps_for_what_they_leave() -> None:
    trace = one_answer([0, 0, 3, 0, 0, 2, 1, 0, 0, 4, 0, 0, 0, 0], limit=14)
    dear = replace(CHEAP, catch_up_ms=0.4)
    charged = replace(dear, step_ms=(CHEAP.step_ms[0] + 0.4, *CHEAP.step_ms[1:]), catch_up_ms=0.0)
    found = replay(trace, Oracle(trace, dear), dear).ms[0]
    assert found <= least_ms(trace, charged, 1) + 1e-9
    assert replay(trace, Oracle(trace, charged), CHEAP).ms[0] > least_ms(trace, CHEAP, 1)
    assert replay(trace, Oracle(trace, dear), dear).steps_of(0) == replay(
        trace, Oracle(trace, charged), charged
    ).steps_of(0)


def least_ms(trace: Trace, cost: CostTable, place: int) -> float:
    """By trying every γ everywhere."""
    length, limit = int(trace.lengths[0]), trace.answers[0].limit

    @cache
    def least(place: int) -> float:
        if place >= length:
            return 0.0
        context = len(trace.answers[0].prompt_tokens) + place
        accepted = int(trace.rows.accepted[place])
        return min(
            cost.step_ms[g]
            + cost.step_ms_per_context_token[g] * context
            + least(min(place + min(g, accepted) + 1, length))
            for g in range(min(GAMMA_MAX, limit - place - 1) + 1)
        )

    return least(place)


@pytest.mark.parametrize("seed", range(8))
def test_the_oracle_takes_the_least_time(seed: int) -> None:
    rng = np.random.default_rng(seed)
    length = 7
    accepted = np.minimum(rng.integers(0, 5, length), length - np.arange(length))
    trace = one_answer(accepted.tolist(), limit=int(rng.integers(length, length + 3)))
    for cost in (CHEAP, COST):
        found = replay(trace, Oracle(trace, cost), cost)
        assert found.ms[0] == pytest.approx(least_ms(trace, cost, 1))


def test_no_policy_beats_the_oracle() -> None:
    trace = trace_of_one_compression()
    best = replay(trace, Oracle(trace, COST), COST)
    for name in POLICIES:
        found = replay(trace, controller(name), COST)
        assert (found.ms >= best.ms - 1e-9).all(), name
        np.testing.assert_array_equal(found.tokens, best.tokens)


def test_answers_do_not_meddle() -> None:
    """Each answer's steps are those it has alone."""
    trace = trace_of_one_compression()
    for name in ("survival", "speckv"):
        together = replay(trace, controller(name), COST)
        for i in (0, 5, 17):
            alone = trace.where(lambda a, i=i: a == trace.answers[i])
            found = replay(alone, controller(name), COST)
            assert found.steps_of(0) == together.steps_of(i)
            assert found.ms[0] == together.ms[i]


@pytest.mark.parametrize("compiled", [True, False])
def test_near_ties_are_decided_by_the_loops_own_function(
    compiled: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """With everything called a near tie, the replay is that function's alone, and the same."""
    if not compiled:
        monkeypatch.setattr(native, "library", lambda: None)
    trace = made_up_trace(prompts=6, length=30, compressions=("fp32",))
    for seed in (10, 53):
        packed = survival_policy("s", seed).pack("fp32", COST)
        fast = replay(trace, PackedController(packed), COST)
        with monkeypatch.context() as patch:
            patch.setattr("speckv.traces.packed._NEARLY_EQUAL", 1e9)
            exact = replay(trace, PackedController(packed), COST)
        assert fast.gamma.tolist() == exact.gamma.tolist()
        assert len(set(fast.gamma.tolist())) > 4


def poisoned(trace: Trace, found: Replayed) -> Trace:
    """Every token that no step drafted becomes another, and its signals rubbish."""
    rng = np.random.default_rng(1)
    drafted = np.zeros((len(trace.rows), GAMMA_MAX), dtype=bool)
    for i in range(len(trace.answers)):
        place = 1
        for gamma, accepted in found.steps_of(i):
            drafted[trace.first[i] + place, :gamma] = True
            place += accepted + 1
    signals = trace.rows.signals.copy()
    rubbish = rng.choice(np.array([np.nan, 0.0, 1.0, -5.0, 1e9], np.float32), signals.shape)
    signals[~drafted] = rubbish[~drafted]
    tokens = np.where(drafted, trace.rows.draft_tokens, rng.integers(0, 50, drafted.shape))
    rows = replace(trace.rows, signals=signals, draft_tokens=tokens.astype(np.int32))
    bounds = zip(trace.first[:-1], trace.first[1:], strict=True)
    parts = [(a, rows.take(np.arange(*b))) for a, b in zip(trace.answers, bounds, strict=True)]
    return join(trace.info, parts)


def assert_causal(trace: Trace, make: Callable[[], Controller], cost: CostTable = COST) -> None:
    """Signals of tokens that were not drafted change no decision."""
    found = replay(trace, make(), cost)
    again = replay(poisoned(trace, found), make(), cost)
    for name in ("lane", "gamma", "accepted"):
        np.testing.assert_array_equal(getattr(again, name), getattr(found, name))


@pytest.mark.parametrize("name", causality.POLICIES)
def test_replay_is_causal(name: str) -> None:
    assert_causal(trace_of_one_compression(), lambda: controller(name))


def test_boosted_replay_is_causal(monkeypatch: pytest.MonkeyPatch) -> None:
    """Few trees read what many do."""
    monkeypatch.setattr(boosted, "_MOST_TREES", boosted._STRIDE)
    monkeypatch.setitem(boosted._SETTINGS, "min_samples_leaf", 5)
    trace = made_up_trace(prompts=8, length=30, compressions=("fp32",), temperatures=(0.0,))
    with threadpool_limits(1):
        model = boosted.Ceiling(trace, {"fp32": COST}).controller("fp32", 0.0)
        assert len(set(replay(trace, model, COST).gamma)) > 3
        assert_causal(trace, lambda: model)


def test_the_causality_test_can_fail() -> None:
    class Peeking(PackedController):
        """Looks at a token that it has not drafted."""

        def begins(self, lanes: np.ndarray, length: np.ndarray, match: np.ndarray) -> np.ndarray:
            trace = Peeking.shown
            first = trace.first[lanes] + length
            first -= np.array([len(a.prompt_tokens) for a in trace.answers])[lanes]
            more: np.ndarray = trace.rows.signals[first, 0, at.CONFIDENCE] > 0.5
            return more

        shown: Trace

    trace = trace_of_one_compression()
    packed = parse_policy("fixed:4").pack()
    Peeking.shown = trace
    found = replay(trace, Peeking(packed), COST)
    Peeking.shown = poisoned(trace, found)
    again = replay(Peeking.shown, Peeking(packed), COST)
    assert found.gamma.tolist() != again.gamma.tolist()


ON_THE_CPU = pytest.mark.parametrize("on", [reference, cpu_step], ids=["reference", "cpu path"])


@ON_THE_CPU
@pytest.mark.parametrize("name", causality.POLICIES)
def test_the_step_is_causal(name: str, on: Any) -> None:
    """Nothing beyond the drafted tokens is read: neither signals nor the sequence."""

    def verify(logits: Tensor, state: StepState, policy: Tensor, eos: Tensor) -> None:
        on.verify(logits, state, policy, eos=eos)

    causality.assert_causal(on.draft_step, verify, causality.packed(name))


@ON_THE_CPU
@pytest.mark.parametrize("name", causality.THAT_LOOK)
def test_decisions_follow_the_logits_of_their_own_token(name: str, on: Any) -> None:
    causality.assert_decisions_follow_the_logits(on.draft_step, causality.packed(name))
