"""Tokens per second: rates by hand, the cost fit, and what a policy's choices are worth."""

from __future__ import annotations

import numpy as np
import pytest

from speckv.paper.analysis import Analysis
from speckv.paper.data import COMPRESSIONS, GAMMAS, Released, Runs
from speckv.paper.protocol import Protocol
from speckv.paper.throughput import fit_cost, measure, pooled_gain
from tests.paper.synthetic import COSTS, Row


def test_rates_are_ratios_of_sums(analysis: Analysis, rows: tuple[list[Row], list[Row]]) -> None:
    assert tuple(analysis.throughput) == COMPRESSIONS
    for name, of in analysis.throughput.items():
        for place, gamma in enumerate(GAMMAS):
            chosen = [r for r in rows[1] if (r["compression"], r["gamma"]) == (name, gamma)]
            tokens, seconds, steps = (
                sum(r[key] for r in chosen) for key in ("num_tokens", "elapsed_sec", "num_steps")
            )
            assert of.tokens_per_second[place] == pytest.approx(tokens / seconds)
            assert of.step_ms[place] == pytest.approx(1e3 * seconds / steps)
            assert of.tokens_per_step[place] == pytest.approx(tokens / steps)
        assert of.best_gamma == GAMMAS[int(of.tokens_per_second.argmax())]
        assert of.best_share.sum() == pytest.approx(1)


def test_the_fit_finds_the_costs_despite_a_disturbed_run(released: Released) -> None:
    runs = released.runs
    for index, name in enumerate(COMPRESSIONS):
        rows = runs.compression == index
        of = Runs(*(column[rows] for column in vars(runs).values()))
        cost = fit_cost(of)
        draft, verify = COSTS[name]
        assert cost.t_draft_ms == pytest.approx(draft, abs=0.3)
        assert cost.t_verify_ms == pytest.approx(verify, abs=1.5)
        plain = np.polyfit(of.gamma, 1e3 * of.seconds / of.steps, 1)
        assert abs(plain[0] - draft) > 2, "plain least squares is misled"
        assert cost.largest_error_pct > 10, "and the disturbed mean shows as a miss"


def test_an_exact_line_is_fitted_exactly() -> None:
    gamma = np.array([2, 4, 6, 8])
    none = np.zeros(4, dtype=np.int64)
    steps = np.array([10, 8, 6, 5])
    seconds = steps * (20 + 3 * gamma) / 1e3
    cost = fit_cost(Runs(none, none, none, gamma, steps, 2 * steps, seconds))
    assert (cost.t_draft_ms, cost.t_verify_ms) == (pytest.approx(3), pytest.approx(20))
    assert cost.largest_error_pct == pytest.approx(0, abs=1e-9)


def _always(released: Released, gamma: int) -> Protocol:
    held_out = np.arange(0, len(released.steps), 3)
    tokens = np.ones((len(held_out), len(GAMMAS)))
    tokens[:, GAMMAS.index(gamma)] = 2
    none = np.zeros(len(held_out))
    return Protocol(held_out, none, none, None, tokens)


def test_a_policy_of_one_gamma_is_that_gamma(released: Released) -> None:
    eight = measure(released, _always(released, 8))
    four = measure(released, _always(released, 4))
    for name in COMPRESSIONS:
        of = eight[name]
        change = of.fixed8_vs_fixed4
        assert vars(of.paper_policy_vs_fixed4) == pytest.approx(vars(change))
        assert change.percent == pytest.approx(
            100 * (of.tokens_per_second[3] / of.tokens_per_second[1] - 1)
        )
        assert change.low <= change.percent <= change.high
        assert of.chosen.tolist() == [0, 0, 0, 1]
        same = four[name].paper_policy_vs_fixed4
        assert (same.percent, same.low, same.high) == pytest.approx((0, 0, 0), abs=1e-9)
        fitted = [of.cost.t_verify_ms + of.cost.t_draft_ms * gamma for gamma in (4, 8)]
        assert of.predicted_policy_vs_fixed4_pct == pytest.approx(
            100 * (2 / fitted[1] / (1 / fitted[0]) - 1)
        )


def test_the_gain_pools_the_compressions(released: Released, analysis: Analysis) -> None:
    runs = released.runs
    per_step = {
        gamma: runs.tokens[runs.gamma == gamma].sum() / runs.steps[runs.gamma == gamma].sum()
        for gamma in (4, 8)
    }
    gain = pooled_gain(released)
    assert gain == analysis.gain
    assert gain.percent == pytest.approx(100 * (per_step[8] / per_step[4] - 1))
    assert 0 < gain.low < gain.percent < gain.high
