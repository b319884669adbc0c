"""The whole analysis of the released data: the paper's numbers, and what they leave out."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np

from . import bootstrap
from .data import GAMMAS, Floats, Ints, Released
from .decision import DecisionCost, time_decisions
from .protocol import Controls, Protocol, comparison, control, evaluate, signal_correlations, table
from .throughput import Change, Throughput, measure, pooled_gain

PUBLISHED: dict[str, float] = {
    "corr": 0.6853,
    "mse": 0.0896,
    "decision_ms": 0.336,
    "fixed4": 3.73,
    "speckv": 5.82,
    "improvement_pct": 56.0,
}
"""What arXiv 2605.02888 reports."""


@dataclass(frozen=True, eq=False)
class Analysis:
    """Everything that ``speckv paper`` shows.

    Attributes
    ----------
    released : Released
    protocol : Protocol
    controls : Controls
    decision : DecisionCost
    throughput : dict of str to Throughput
        By compression.
    gain : Change
        Measured tokens per step of γ = 8 over γ = 4.
    p_value, p_value_by_prompt : float
        One-sided, of SpecKV over Fixed-4 by the paper's yardstick; steps or prompts resampled.
    intervals : dict
        ``by_step`` and ``by_prompt``, each with ``fixed4``, ``speckv``, ``difference`` (tokens per
        step) and ``improvement_pct``, as (low, high) at 95%.
    """

    released: Released
    protocol: Protocol
    controls: Controls
    decision: DecisionCost
    throughput: dict[str, Throughput]
    gain: Change
    p_value: float
    p_value_by_prompt: float
    intervals: dict[str, dict[str, tuple[float, float]]]

    @property
    def tables(self) -> tuple[list[dict[str, Any]], list[dict[str, Any]]]:
        """Table 1, by compression, and Table 2, by compression and task."""
        steps = self.released.steps
        return (
            table(steps, self.protocol, by_task=False),
            table(steps, self.protocol, by_task=True),
        )

    def summary(self) -> dict[str, Any]:
        """The headline numbers, as JSON values."""
        table1, table2 = self.tables
        return {
            "predictor": {
                "corr": self.protocol.correlation,
                "mse": self.protocol.mse,
                "decision_ms": self.decision.predict_ms,
            },
            "table1": table1,
            "table2": table2,
            "overall": comparison(self.protocol),
            "p_value": self.p_value,
            "confidence_intervals": self.intervals,
            "throughput": {
                name: {
                    "tokens_per_second": _by_gamma(of.tokens_per_second),
                    "best_gamma": of.best_gamma,
                    "paper_policy_vs_fixed4_pct": of.paper_policy_vs_fixed4.percent,
                    "cost_fit": {
                        "t_draft_ms": of.cost.t_draft_ms,
                        "t_verify_ms": of.cost.t_verify_ms,
                    },
                }
                for name, of in self.throughput.items()
            },
        }

    def details(self) -> dict[str, Any]:
        """The controls and everything that is measured rather than predicted, as JSON values."""
        return {
            "rows": {
                "steps": len(self.released.steps),
                "held_out": len(self.protocol.held_out),
                "runs": len(self.released.runs),
            },
            "published": PUBLISHED,
            "p_value_by_prompt": self.p_value_by_prompt,
            "signal_correlations": signal_correlations(self.released.steps),
            "controls": asdict(self.controls),
            "expected_tokens_per_step": _by_gamma(self.protocol.tokens.mean(axis=0)),
            "measured_gamma8_over_gamma4_tokens_per_step": asdict(self.gain),
            "decision": {**asdict(self.decision), "ratio": self.decision.ratio},
            "throughput": {
                name: {
                    "step_ms": _by_gamma(of.step_ms),
                    "decision_share_of_step_pct": _by_gamma(
                        100 * self.decision.predict_ms / of.step_ms
                    ),
                    "tokens_per_step_measured": _by_gamma(of.tokens_per_step),
                    "tokens_per_step_predicted": _by_gamma(of.predicted_tokens_per_step),
                    "chosen_by_paper_policy": _by_gamma(of.chosen),
                    "best_gamma_share_of_resamples": _by_gamma(of.best_share),
                    "cost_fit_largest_error_pct": of.cost.largest_error_pct,
                    "paper_policy_vs_fixed4": asdict(of.paper_policy_vs_fixed4),
                    "paper_policy_vs_fixed4_by_predicted_tokens_pct": (
                        of.predicted_policy_vs_fixed4_pct
                    ),
                    "gamma8_vs_gamma4": asdict(of.fixed8_vs_fixed4),
                    "gamma8_vs_gamma4_tokens_per_step": asdict(of.fixed8_vs_fixed4_tokens),
                }
                for name, of in self.throughput.items()
            },
        }


def analyse(released: Released, stage: Callable[[str], None] = lambda name: None) -> Analysis:
    """Run everything; about ten seconds for the released data on one core.

    Parameters
    ----------
    released : Released
    stage : callable
        Told the name of each part before it runs.

    Raises
    ------
    SpeckvError
        scikit-learn is not installed.
    ValueError
        Too few steps or prompts.
    """
    stage("the paper's protocol")
    found = evaluate(released.steps)
    values = np.column_stack([found.fixed4, found.speckv, np.ones(len(found.held_out))])
    p_value, by_step = _bootstrap(values, np.arange(len(values)))
    p_by_prompt, by_prompt = _bootstrap(values, released.prompt_of_step[found.held_out])
    stage("controls")
    controls = control(released)
    stage("tokens per second")
    speeds, gain = measure(released, found), pooled_gain(released)
    stage("the cost of a decision")
    cost = time_decisions(found.regressor, released.steps.inputs[found.held_out])
    return Analysis(
        released,
        found,
        controls,
        cost,
        speeds,
        gain,
        p_value,
        p_by_prompt,
        {"by_step": by_step, "by_prompt": by_prompt},
    )


def _bootstrap(values: Floats, cluster: Ints) -> tuple[float, dict[str, tuple[float, float]]]:
    """p-value and intervals of columns Fixed-4, SpecKV and ones, [rows, 3]."""
    fixed4, speckv, rows = bootstrap.resampled_sums(bootstrap.cluster_sums(values, cluster)).T
    difference = (speckv - fixed4) / rows
    return bootstrap.p_value(difference), {
        "fixed4": bootstrap.interval(fixed4 / rows),
        "speckv": bootstrap.interval(speckv / rows),
        "difference": bootstrap.interval(difference),
        "improvement_pct": bootstrap.interval(100 * (speckv / fixed4 - 1)),
    }


def _by_gamma(values: Floats) -> dict[str, float]:
    """JSON values under γ as text."""
    return {str(gamma): float(value) for gamma, value in zip(GAMMAS, values, strict=True)}
