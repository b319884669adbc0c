"""Replay against the live engine with the default target: prompts, chat template, costs and all."""

from __future__ import annotations

from itertools import product
from pathlib import Path

import pytest

from speckv import Engine, SamplingParams
from speckv.policies import CostTable, parse_policy
from speckv.prompts import evaluation_prompts
from speckv.traces import profile as profiling
from speckv.traces.packed import PackedController
from speckv.traces.profile import ProfileRecipe, profile
from speckv.traces.replay import replay
from speckv.traces.schema import read_trace
from tests.traces.test_profile import Quiet

COST = CostTable.from_parts(0.05, [1.0 + 0.02 * w for w in range(16)], 0.01, 1e-5, 1e-4)
"""A draft so cheap that ``speckv`` uses it; costs that grow with the context."""


@pytest.mark.model
def test_live_steps_are_the_replayed_ones(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(profiling, "calibrated", lambda *pair, graphs: COST)
    out, prompts = tmp_path / "trace.parquet", evaluation_prompts(1)[:3]
    recipe = ProfileRecipe(("fp32",), (0.0, 0.7), max_new_tokens=10, seed=4)
    profile(None, "first:4", out, prompts, recipe, Quiet(), device="cpu")
    trace = read_trace(out)
    engine = Engine.from_pretrained(None, "first:4", compression="fp32", device="cpu")
    engine._cost = COST
    drafted = 0
    for policy, temperature in product(("fixed:2", "entropy:5", "speckv"), (0.0, 0.7)):
        packed = parse_policy(policy).pack("fp32", COST, temperature=temperature)
        found = replay(trace, PackedController(packed), COST)
        for i, answer in enumerate(trace.answers):
            if answer.temperature != temperature:
                continue
            params = SamplingParams(
                max_new_tokens=10, temperature=answer.temperature, seed=answer.seed
            )
            text = prompts[answer.prompt_id].text
            result = engine.generate(text, params, chat=True, policy=policy)
            own = slice(trace.first[i], trace.first[i + 1])
            assert result.token_ids == trace.rows.target_token[own].tolist()
            assert result.stats.steps == found.steps_of(i)
            drafted += sum(gamma for gamma, _ in found.steps_of(i))
    assert drafted > 100
