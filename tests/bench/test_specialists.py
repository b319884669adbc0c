"""One policy beside one for each compression, on made-up traces."""

from __future__ import annotations

from dataclasses import replace

import pytest

from bench.specialists import measure
from speckv.training.gamma import GammaRecipe
from tests.traces.synthetic import COST, INFO, made_up_trace
from tests.training.test_gamma import Quiet


def test_both_are_judged_on_the_same_prompts() -> None:
    made = made_up_trace(prompts=16, length=24, temperatures=(0.0,))
    trace = replace(made, info=replace(INFO, costs={"fp32": COST, "int8": COST}))
    document = measure(trace, GammaRecipe(rounds=1, seeds=(0,)), Quiet())
    assert [row["compression"] for row in document["cells"]] == ["fp32", "int8"]
    (pooled,) = document["pooled"]
    ratios = [row["one_over_own"] for row in document["cells"]]
    assert min(ratios) <= pooled["one_over_own"] <= max(ratios)
    for row in (*document["cells"], pooled):
        assert row["prompts"] == 8
        low, high = row["one_over_own_95"]
        assert low <= row["one_over_own"] <= high


def test_costs_are_needed() -> None:
    made = made_up_trace(prompts=16, length=24, temperatures=(0.0,))
    with pytest.raises(ValueError, match="costs: expected a table for fp32, got none"):
        trace = replace(made, info=replace(INFO, costs={}))
        measure(trace, GammaRecipe(rounds=1, seeds=(0,)), Quiet())
