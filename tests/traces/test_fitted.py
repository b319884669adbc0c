"""The paper's predictor on the steps of a trace."""

from __future__ import annotations

import csv
from pathlib import Path

import numpy as np
import pytest

from speckv.kernels import layout as at
from speckv.traces.fitted import paper_fitted, paper_steps
from speckv.traces.packed import PackedController
from speckv.traces.steps import write_steps
from speckv.traces.tuning import PAPER_FITTED, Training, tune
from tests.traces.synthetic import COST, made_up_trace
from tests.traces.test_replay import assert_causal

COSTS = {"fp32": COST, "int8": COST}
TRACE = made_up_trace(prompts=12, length=40)


def test_steps_are_those_of_the_paper_table(tmp_path: Path) -> None:
    greedy = TRACE.where(lambda a: a.temperature == 0)
    inputs, rates = paper_steps(greedy)
    write_steps(tmp_path / "steps.csv", greedy)
    with (tmp_path / "steps.csv").open() as file:
        rows = list(csv.DictReader(file))
    assert len(rows) == len(rates) > 500
    names = ("mean_draft_entropy", "mean_draft_confidence", "max_draft_entropy")
    for place, name in enumerate((*names, "min_draft_confidence")):
        np.testing.assert_array_equal(inputs[:, place], [float(row[name]) for row in rows])
    np.testing.assert_array_equal(rates, [float(row["acceptance_rate"]) for row in rows])
    np.testing.assert_array_equal(inputs[:, 5], [int(row["gamma"]) for row in rows])
    assert inputs[:, 4].tolist() == [{"fp32": 0, "int8": 1}[row["compression"]] for row in rows]


def test_it_predicts_acceptance_and_decides_causally() -> None:
    greedy = TRACE.where(lambda a: a.temperature == 0)
    policy = paper_fitted(greedy)
    assert policy.mlp is not None and policy.mlp.layout == at.LAYOUT_PAPER
    assert policy.candidates == (2, 4, 6, 8) and policy.objective == at.OBJECTIVE_TOKENS
    assert 0.2 < policy.mlp.card["mean_acceptance"] < 0.9
    own = greedy.where(lambda a: a.compression == "fp32")
    assert_causal(own, lambda: PackedController(policy.pack("fp32", COST)))
    again = paper_fitted(greedy)
    assert again.pack().tolist() == policy.pack().tolist()


def test_it_is_fitted_on_all_compressions_of_a_temperature() -> None:
    whole = Training(TRACE, COSTS)
    assert whole.paper(0.7) is whole.paper(0.7) is not whole.paper(0.0)
    train = TRACE.where(lambda a: (a.compression, a.temperature) == ("int8", 0.7))
    tuned = tune(PAPER_FITTED, train, "int8", COST, whole)
    assert isinstance(tuned.controller, PackedController) and not tuned.settings
    with pytest.raises(ValueError, match="expected steps to fit on, got none"):
        paper_fitted(TRACE.where(lambda a: False))
