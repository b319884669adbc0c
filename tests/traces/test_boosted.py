"""The information ceiling: learned from all cells, out of fold, and causal."""

from __future__ import annotations

import numpy as np
import pytest

from speckv.kernels import layout as at
from speckv.kernels.layout import GAMMA_MAX
from speckv.traces import boosted
from speckv.traces.baselines import Static
from speckv.traces.boosted import Boosted, Ceiling
from speckv.traces.decisions import Explorer, decisions
from speckv.traces.packed import PackedController
from speckv.traces.replay import Oracle, replay
from speckv.traces.schema import Trace
from speckv.traces.tuning import BOOSTED, Training, tune
from tests.traces.synthetic import COST, made_up_trace
from tests.traces.test_replay import assert_causal

COSTS = {"fp32": COST, "int8": COST}


@pytest.fixture(autouse=True)
def few_trees(monkeypatch: pytest.MonkeyPatch) -> None:
    for name, value in (("min_samples_leaf", 20), ("max_leaf_nodes", 8)):
        monkeypatch.setitem(boosted._SETTINGS, name, value)
    monkeypatch.setattr(boosted, "_MOST_TREES", 30)


def one_cell(seed: int, prompts: int = 24) -> Trace:
    return made_up_trace(prompts, length=60, seed=seed, compressions=("fp32",), temperatures=(0.0,))


def test_it_beats_every_fixed_gamma_on_prompts_it_has_not_seen() -> None:
    train, judged = one_cell(0, 36), one_cell(1, 36)
    tuned = tune(BOOSTED, train, "fp32", COST)
    own = replay(judged, tuned.controller, COST)
    best = min(replay(judged, Static({}, g), COST).ms.sum() for g in range(16))
    assert replay(judged, Oracle(judged, COST), COST).ms.sum() < own.ms.sum() < 0.99 * best
    assert_causal(judged, lambda: tuned.controller)


def test_one_set_of_models_serves_all_cells() -> None:
    trace = made_up_trace(prompts=12, length=40)
    whole = Training(trace, COSTS)
    rates = []
    for compression, temperature in (("fp32", 0.0), ("int8", 0.7)):
        train = trace.where(
            lambda a, k=(compression, temperature): (a.compression, a.temperature) == k
        )
        controller = tune(BOOSTED, train, compression, COST, whole).controller
        assert isinstance(controller, PackedController)
        assert len(controller._header) == at.HEADER_WORDS
        assert controller._header[at.TEMPERATURE] == np.float32(temperature)
        rates.append(controller._header[at.RATE])
    assert whole.ceiling is whole.ceiling
    assert rates[0] != rates[1] and all(0.5 < rate * COST.step_ms[0] < 3 for rate in rates)


def test_it_is_the_same_every_time() -> None:
    trace = one_cell(2, 12)
    first, second = (Ceiling(trace, COSTS).controller("fp32", 0.0) for _ in range(2))
    assert first._header == second._header
    found, again = (replay(trace, each, COST) for each in (first, second))
    assert found.gamma.tolist() == again.gamma.tolist()


def test_predictions_never_rise_with_the_number_of_tokens() -> None:
    seen = [decisions(part, replay(part, Explorer(0), COST)) for part in (one_cell(3), one_cell(4))]
    models = Boosted(*seen)
    for drafted in (0, 2):
        asked = seen[1].features[seen[1].features[:, at.FEATURE_DRAFTED] == drafted]
        survival = models.survival(asked)
        assert (np.diff(survival, axis=1) <= 0).all() and (survival <= 1).all()
        tokens = boosted._Bag([models]).tokens(asked)
        assert np.isneginf(tokens[:, :drafted]).all() and (tokens[:, drafted] == 0).all()
        gains = np.diff(tokens[:, drafted:], axis=1)
        assert gains.shape[1] == GAMMA_MAX - drafted
        np.testing.assert_allclose(gains[:, : survival.shape[1]], survival, atol=1e-5)
        assert (np.diff(gains, axis=1) <= 1e-5).all()


def test_too_little_to_learn_from_is_its_mean() -> None:
    trace = one_cell(5, 4)
    nothing = decisions(
        trace.where(lambda a: False), replay(trace.where(lambda a: False), Explorer(0), COST)
    )
    seen = decisions(trace, replay(trace, Explorer(0), COST))
    models = Boosted(seen, nothing)
    asked = seen.features[seen.features[:, at.FEATURE_DRAFTED] == 1]
    assert len(np.unique(models.survival(asked)[:, 0])) == 1
