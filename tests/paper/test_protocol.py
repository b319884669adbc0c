"""The protocol on a regressor that is known, and on data that can be learned; the controls."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch

from speckv.paper import protocol
from speckv.paper.analysis import Analysis
from speckv.paper.data import GAMMAS, Released
from speckv.paper.decision import time_decisions


class Known:
    """Predicts a function of the inputs, whatever it is fitted to, and remembers every row."""

    def __init__(self, predict: Callable[[np.ndarray], np.ndarray]) -> None:
        self._predict = predict
        self.fitted: list[np.ndarray] = []
        self.asked: list[np.ndarray] = []

    def fit(self, inputs: np.ndarray, labels: np.ndarray) -> Known:
        self.fitted.append(inputs)
        return self

    def predict(self, inputs: np.ndarray) -> Any:
        self.asked.append(inputs)
        return self._predict(inputs)


def test_expected_tokens_by_hand() -> None:
    inputs = np.array([[0.5, 0, 0, 0, 1, 2], [2.0, 0, 0, 0, 1, 8], [-1.0, 0, 0, 0, 1, 4]])
    tokens = protocol.expected_tokens(Known(lambda x: x[:, 0] - 0.05 * x[:, 5]), inputs)
    expected = [
        [0.4 * 2 + 1, 0.3 * 4 + 1, 0.2 * 6 + 1, 0.1 * 8 + 1],
        [3.0, 5.0, 7.0, 9.0],
        [1.0, 1.0, 1.0, 1.0],
    ]
    np.testing.assert_allclose(tokens, expected)
    assert inputs[:, 5].tolist() == [2, 8, 4], "the caller's rows are left alone"


def test_policies_and_tables_by_hand(released: Released, monkeypatch: pytest.MonkeyPatch) -> None:
    """A regressor that is wrong in a known way: γ=8 is worth most below an entropy, 2 above."""
    known = Known(lambda x: np.where(x[:, 0] < 0.8, 0.5, np.where(x[:, 5] == 2, 0.4, -3.0)))
    monkeypatch.setattr(protocol, "new_regressor", lambda: known)
    steps = released.steps
    found = protocol.evaluate(steps)
    assert len(found.held_out) == pytest.approx(len(steps) / 5, abs=1)
    assert [len(rows) for rows in known.fitted] == [len(steps) - len(found.held_out), len(steps)]
    low = steps.signals[found.held_out, 0] < 0.8
    np.testing.assert_array_equal(np.array(GAMMAS)[found.choice], np.where(low, 8, 2))
    np.testing.assert_allclose(found.speckv, np.where(low, 5.0, 1.8))
    np.testing.assert_allclose(found.fixed4, np.where(low, 3.0, 1.0))
    assert np.all((found.predicted >= 0) & (found.predicted <= 1))

    overall = protocol.table(steps, found, by_task=False)[-1]
    assert (overall["compression"], overall["task"]) == ("all", "all")
    assert overall["improvement_pct"] == pytest.approx(
        100 * (overall["speckv"] - overall["fixed4"]) / overall["fixed4"]
    )
    assert overall["fixed4"] == pytest.approx(1 + 2 * low.mean())
    rows = protocol.table(steps, found, by_task=True)
    assert len(rows) == 12 and len(protocol.table(steps, found, by_task=False)) == 4
    strata = np.array(steps.strata)[found.held_out]
    for row in rows:
        members = strata == f"{row['compression']}/{row['task']}"
        assert row["fixed4"] == pytest.approx(1 + 2 * low[members].mean())


def test_what_can_be_learned_is_learned(analysis: Analysis) -> None:
    found, controls = analysis.protocol, analysis.controls
    assert found.correlation > 0.5
    assert found.mse == pytest.approx(float(((found.predicted - found.actual) ** 2).mean()))
    assert controls.by_prompt_correlation > 0.5
    assert abs(controls.causal_correlation) < 0.2, "made-up steps do not depend on the one before"


def test_shuffled_labels_give_noise_which_few_made_up_steps_let_exceed_a_tenth(
    analysis: Analysis,
) -> None:
    """On the released data none does; here the held-out fifth is a few hundred steps."""
    found = np.array(analysis.controls.shuffled_correlations)
    noise = 1 / np.sqrt(len(analysis.protocol.held_out))
    assert abs(found).max() < 3 * noise and abs(found.mean()) < 3 * noise / np.sqrt(len(found))
    labels = analysis.released.steps.acceptance
    again = np.random.default_rng(protocol._SEED).permutation(labels)
    assert not np.array_equal(again, labels) and found[0] == pytest.approx(
        _shuffled_correlation(analysis.released, again)
    ), "the first is the protocol's own seed"


def _shuffled_correlation(released: Released, labels: np.ndarray) -> float:
    return protocol.evaluate(replace(released.steps, acceptance=labels)).correlation


def test_shuffled_labels_improve_by_the_protocol_all_the_same(analysis: Analysis) -> None:
    assert min(analysis.controls.shuffled_improvements_pct) > 20
    assert analysis.p_value < 0.001 and analysis.p_value_by_prompt < 0.001


def test_causal_inputs_are_of_the_step_before_and_prompts_are_held_out(
    released: Released, monkeypatch: pytest.MonkeyPatch
) -> None:
    names = np.repeat(np.arange(float(len(released.steps)))[:, None], 4, axis=1)
    steps = replace(released.steps, signals=names)
    known = Known(lambda x: np.zeros(len(x)))
    monkeypatch.setattr(protocol, "new_regressor", lambda: known)
    monkeypatch.setattr(protocol, "_SHUFFLES", 0)
    protocol.control(replace(released, steps=steps))
    prompts, number = released.prompt_of_step, steps.step
    assert len(known.fitted) == len(known.asked) == 10
    for fold, (fitted, asked) in enumerate(zip(known.fitted, known.asked, strict=True)):
        ours, theirs = (x[:, 0].astype(int) for x in (fitted, asked))
        assert not set(prompts[ours]) & set(prompts[theirs])
        if fold >= 5:  # rows are named by their signals, which are those of the step before
            for rows, inputs in ((ours, fitted), (theirs, asked)):
                assert np.all(number[rows + 1] == number[rows] + 1)
                np.testing.assert_array_equal(inputs[:, 4], steps.compression[rows + 1])
                np.testing.assert_array_equal(inputs[:, 5], steps.gamma[rows + 1])
    assert sum(len(asked) for asked in known.asked[:5]) == len(steps)
    assert sum(len(asked) for asked in known.asked[5:]) == (number > 0).sum()


def test_signals_correlate_with_their_sign(released: Released) -> None:
    found = protocol.signal_correlations(released.steps)
    assert list(found) == [
        "mean_draft_entropy",
        "mean_draft_confidence",
        "max_draft_entropy",
        "min_draft_confidence",
    ]
    for name, value in found.items():
        assert (value < -0.3) if "entropy" in name else (value > 0.3)


def test_a_constant_does_not_correlate() -> None:
    assert protocol.correlation(np.ones(4), np.arange(4.0)) == 0.0
    assert protocol.correlation(np.arange(4.0), -np.arange(4.0)) == pytest.approx(-1)


def test_too_few_steps_are_refused(released: Released) -> None:
    steps = released.steps
    few = type(steps)(*(v[:20] if isinstance(v, np.ndarray) else v for v in vars(steps).values()))
    with pytest.raises(ValueError, match="at least 10 of each compression and task"):
        protocol.split(few)


def test_the_packed_decision_agrees_and_is_ten_times_cheaper(analysis: Analysis) -> None:
    """Medians of decisions taken in turns: what disturbs one kind disturbs the other."""
    threads = torch.get_num_threads()
    inputs = analysis.released.steps.inputs
    cost = time_decisions(analysis.protocol.regressor, inputs, decisions=300)
    assert torch.get_num_threads() == threads
    assert cost.same_choice == 1.0 and cost.decisions == 300
    assert cost.ratio == cost.predict_ms / cost.packed_ms
    assert cost.ratio >= 10
