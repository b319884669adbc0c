"""The cost of a decision: its figures by hand, a short run, and its gate."""

from __future__ import annotations

import pytest
import torch

from bench import decision
from bench.decision import made_up_steps, measure, summary


def test_a_summary_by_hand() -> None:
    found = summary({"predict": [0.3, 0.1, 0.2], "paper": [0.02] * 3, "survival": [0.01] * 3})
    assert found["decisions"] == 3
    assert found["us"]["predict"] == pytest.approx({"p50": 200, "p90": 280, "p99": 298})
    assert found["times_cheaper"] == pytest.approx({"paper": 10, "survival": 20})


def test_a_short_run() -> None:
    threads = torch.get_num_threads()
    document = measure(60)
    assert torch.get_num_threads() == threads
    assert document["benchmark"] == "decision" and document["decisions"] == 60
    assert document["same_choice"] >= 0.99 and document["environment"]["threads"] == 1
    for found in document["us"].values():
        assert 0 < found["p50"] <= found["p90"] <= found["p99"]
    assert min(document["times_cheaper"].values()) >= 10


def test_steps_are_as_the_papers() -> None:
    inputs, rates = made_up_steps(500)
    assert inputs.shape == (500, 6) and rates.shape == (500,)
    assert set(inputs[:, 4]) == {0, 1, 2} and set(inputs[:, 5]) == {2, 4, 6, 8}
    assert (inputs[:, 2] >= inputs[:, 0]).all() and (inputs[:, 3] <= inputs[:, 1]).all()
    assert rates.min() >= 0 and rates.max() <= 1 and rates.std() > 0.1


def test_other_choices_are_no_result(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(decision, "choose", lambda regressor, row: 3)
    with pytest.raises(ValueError, match="the packed MLP chose as the regressor in 0 of 5"):
        measure(5)
