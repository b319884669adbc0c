"""Baselines: worked by hand, causal, and what learning ones learn."""

from __future__ import annotations

import math
import time
from collections.abc import Callable
from dataclasses import replace

import numpy as np
import pytest

from speckv.kernels import layout as at
from speckv.kernels.layout import GAMMA_MAX
from speckv.policies import CostTable, parse_policy
from speckv.traces.baselines import (
    AdaEdl,
    Heuristic,
    OnlineLogistic,
    Prior,
    Static,
    Threshold,
)
from speckv.traces.packed import PackedController
from speckv.traces.replay import Controller, Oracle, replay
from speckv.traces.schema import Answer, Trace, join
from tests.traces.synthetic import COST, INFO, made_up_rows, made_up_trace
from tests.traces.test_replay import assert_causal, one_answer, trace_of_one_compression

PRIOR = Prior(1.0, 0.0, 0.7)
CONTROLLERS: dict[str, Callable[[], Controller]] = {
    "static": lambda: Static({"code": 2, "math": 0}, 5),
    "confidence": lambda: Threshold(at.CONFIDENCE, 0.6),
    "hf-confidence": lambda: Threshold(at.TOKEN_PROBABILITY, 0.4, 7),
    "svip": lambda: Threshold(at.ENTROPY, 1.5),
    "hf-heuristic": lambda: Heuristic(5),
    "adaedl": lambda: AdaEdl(0.2, 0.3, 0.7),
    "online-logistic": lambda: OnlineLogistic(PRIOR, 0.03, COST),
    "online-logistic, carried": lambda: OnlineLogistic(PRIOR, 0.3, COST, carries=True),
}


@pytest.mark.parametrize("name", CONTROLLERS)
def test_baselines_are_causal(name: str) -> None:
    assert_causal(trace_of_one_compression(), CONTROLLERS[name])


@pytest.mark.parametrize("name", [name for name in CONTROLLERS if "carried" not in name])
def test_answers_do_not_meddle(name: str) -> None:
    trace = trace_of_one_compression()
    together = replay(trace, CONTROLLERS[name](), COST)
    for i in (1, 6):
        alone = trace.where(lambda a, i=i: a == trace.answers[i])
        assert replay(alone, CONTROLLERS[name](), COST).steps_of(0) == together.steps_of(i)


def test_a_hundred_thousand_positions_take_seconds() -> None:
    trace = made_up_trace(prompts=960, length=128, compressions=("fp32",), temperatures=(0.0,))
    assert len(trace.rows) > 100_000
    names = [*(f"fixed:{gamma}" for gamma in range(16)), "paper", "speckv"]
    packed = [parse_policy(name).pack("fp32", COST) for name in names]
    start = time.process_time()
    controllers: list[Controller] = [PackedController(policy) for policy in packed]
    controllers += [build() for build in CONTROLLERS.values()]
    times = [replay(trace, c, COST).ms.sum() for c in (*controllers, Oracle(trace, COST))]
    assert time.process_time() - start < 60, "of the processor, for 26 policies"
    assert min(times) == times[-1]


def test_a_controller_can_be_used_again() -> None:
    trace = trace_of_one_compression()
    for build in CONTROLLERS.values():
        controller = build()
        first, second = (replay(trace, controller, COST) for _ in range(2))
        assert first.gamma.tolist() == second.gamma.tolist()


def test_thresholds_are_those_of_the_policies() -> None:
    trace = trace_of_one_compression()
    for policy, own in (
        ("confidence:0.6", Threshold(at.CONFIDENCE, 0.6)),
        ("entropy:1.5", Threshold(at.ENTROPY, 1.5)),
        ("fixed:6", Static({}, 6)),
    ):
        packed = parse_policy(policy).pack()
        expected = replay(trace, PackedController(packed), COST)
        assert replay(trace, own, COST).gamma.tolist() == expected.gamma.tolist()


def test_static_by_task() -> None:
    trace = trace_of_one_compression()
    found = replay(trace, CONTROLLERS["static"](), COST)
    most = {"code": 2, "math": 0, "chat": 5, "summarization": 5}
    for i, answer in enumerate(trace.answers):
        assert (
            max((g for g, _ in found.steps_of(i)), default=most[answer.task]) == most[answer.task]
        )


def test_the_heuristic_by_hand() -> None:
    #                   place: 0  1  2  3  4  5  6  7  8 ...
    trace = one_answer(accepted=[0, 2, 0, 0, 4, 0, 0, 0, 0, 1, 0, 0] + [0] * 30, limit=60)
    steps = replay(trace, Heuristic(2), COST).steps_of(0)
    assert steps[:5] == [(2, 2), (4, 4), (6, 1), (5, 0), (4, 0)]
    assert [g for g, _ in steps[5:8]] == [3, 2, 1] and steps[-1][0] == 1


def signal_rows(column: int, values: list[float], accepted: int, places: int = 3) -> Trace:
    """An answer with the same signals and outcome at every place."""
    rows = made_up_rows(np.random.default_rng(0), places)
    signals = np.zeros_like(rows.signals)
    signals[:, : len(values), column] = values
    counts = np.full(places, accepted, dtype=np.int8)
    rows = replace(rows, signals=signals, accepted=counts)
    return join(INFO, [(Answer(0, "t", "fp32", 0.0, 0, 400, (1,)), rows)])


def test_adaedl_by_hand() -> None:
    """1 - sqrt(0.2 · H) falls below 0.3 once H is above 2.45 nats, which are 3.53 bits."""
    trace = signal_rows(at.ENTROPY, [0.0, 3.5, 3.6, 0.0], accepted=0)
    assert replay(trace, AdaEdl(0.2, 0.3, 0.7), COST).steps_of(0)[0] == (3, 0)
    nats = 3.6 * math.log(2)
    assert 1 - math.sqrt(0.2 * nats) < 0.3 < 1 - math.sqrt(0.2 * 3.5 * math.log(2))


def test_adaedl_grows_careful_while_little_is_accepted() -> None:
    rejecting = signal_rows(at.ENTROPY, [3.5] * GAMMA_MAX, accepted=0, places=200)
    steps = replay(rejecting, AdaEdl(0.2, 0.3, 0.7), COST).steps_of(0)
    assert steps[0][0] == GAMMA_MAX and steps[-1][0] == 1


def test_the_prior_is_the_best_fit() -> None:
    """On tokens that are accepted as their confidence says, the fit is the identity."""
    trace = made_up_trace(prompts=60, length=120, compressions=("fp32",), temperatures=(0.0,))
    prior = Prior.fit(trace)
    assert prior.weight == pytest.approx(1.0, abs=0.15)
    assert prior.bias == pytest.approx(0.0, abs=0.15)
    assert 0.5 < prior.mean < 0.9
    empty = Prior.fit(trace.where(lambda a: False))
    assert empty == Prior(1.0, 0.0, 0.5)


def test_online_logistic_learns_that_a_draft_is_useless() -> None:
    """It believes a confident draft until it has seen enough."""
    useless = signal_rows(at.CONFIDENCE, [0.95] * GAMMA_MAX, accepted=0, places=300)
    learning = replay(useless, OnlineLogistic(PRIOR, 0.1, COST), COST).steps_of(0)
    believing = replay(useless, OnlineLogistic(PRIOR, 0.0, COST), COST).steps_of(0)
    assert learning[0][0] > 2 and believing[-2][0] > 2
    gammas = [g for g, _ in learning[-60:]]
    assert gammas.count(0) > 45 and sum(gammas) <= 60 - gammas.count(0) + 3


def test_what_is_carried_is_learned_from_all_answers() -> None:
    """A short answer profits from what a long one beside it has taught, and not the reverse."""
    useless = signal_rows(at.CONFIDENCE, [0.95] * GAMMA_MAX, accepted=0, places=300)
    answer = useless.answers[0]
    rows = useless.rows
    many = join(INFO, [(replace(answer, prompt_id=i), rows) for i in range(3)])
    alone = replay(useless, OnlineLogistic(PRIOR, 0.1, COST), COST)
    for carries in (False, True):
        found = replay(many, OnlineLogistic(PRIOR, 0.1, COST, carries=carries), COST)
        for i in range(3):  # the mean of the same is the same
            assert found.steps_of(i) == alone.steps_of(0)
    good = signal_rows(at.CONFIDENCE, [0.95] * GAMMA_MAX, accepted=GAMMA_MAX, places=300)
    mixed = join(INFO, [(answer, rows), (replace(answer, prompt_id=1), good.rows)])
    apart, together = (
        replay(mixed, OnlineLogistic(PRIOR, 0.1, COST, carries=c), COST) for c in (False, True)
    )
    assert apart.steps_of(0) == alone.steps_of(0) != together.steps_of(0)


def test_online_logistic_counts_the_cost() -> None:
    trace = trace_of_one_compression()
    dear = CostTable.from_parts(2.0, [1.0] * 16)
    cheap = CostTable.from_parts(0.001, [1.0] * 16)
    assert replay(trace, OnlineLogistic(PRIOR, 0.0, dear), dear).gamma.max() <= 1
    assert replay(trace, OnlineLogistic(PRIOR, 0.0, cheap), cheap).gamma.mean() > 6
