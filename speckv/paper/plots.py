"""Plots of the analysis, as PNG files."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np

from .. import figures
from .analysis import Analysis
from .data import GAMMAS, SIGNALS

_BINS = 10
_COLOURS = {"fp16": "#1b6ca8", "int8": "#c8553d", "nf4": "#3c8d5a"}


def draw(analysis: Analysis, folder: Path) -> list[Path]:
    """Write every plot of `PLOTS` into ``folder``; see `speckv.figures.draw`."""
    return figures.draw(PLOTS, analysis, folder)


def _tokens_per_second(analysis: Analysis, axes: Any) -> None:
    for name, of in analysis.throughput.items():
        best = int(np.argmax(of.tokens_per_second))
        colour = _COLOURS[name]
        label = f"{name}: γ={of.best_gamma} is fastest"
        axes.plot(GAMMAS, of.tokens_per_second, "o-", color=colour, label=label)
        axes.plot(GAMMAS[best], of.tokens_per_second[best], "*", color=colour, markersize=16)
    axes.set(xlabel="fixed γ", ylabel="tokens/s, measured", xticks=GAMMAS, ylim=(0, None))
    axes.legend()


def _tokens_per_step(analysis: Analysis, axes: Any) -> None:
    for name, of in analysis.throughput.items():
        colour = _COLOURS[name]
        axes.plot(GAMMAS, of.tokens_per_step, "o-", color=colour, label=f"{name}, measured")
        axes.plot(
            GAMMAS, of.predicted_tokens_per_step, "x--", color=colour, label=f"{name}, predicted"
        )
    axes.set(xlabel="fixed γ", ylabel="tokens per step", xticks=GAMMAS, ylim=(1, None))
    axes.legend()


def _step_cost(analysis: Analysis, axes: Any) -> None:
    line = np.array([0, max(GAMMAS)])
    for name, of in analysis.throughput.items():
        cost = of.cost
        label = f"{name}: {cost.t_verify_ms:.1f} + {cost.t_draft_ms:.1f} γ"
        axes.plot(GAMMAS, of.step_ms, "o", color=_COLOURS[name], label=label)
        axes.plot(line, cost.t_verify_ms + cost.t_draft_ms * line, "-", color=_COLOURS[name])
    axes.set(xlabel="γ", ylabel="ms per step", ylim=(0, None))
    axes.legend()


def _signals(analysis: Analysis, axes: Any) -> None:
    """Mean acceptance in bins of equal counts; each signal on the scale of its own ranks."""
    steps = analysis.released.steps
    for column, name in enumerate(SIGNALS):
        order = np.argsort(steps.signals[:, column], kind="stable")
        bins = np.array_split(steps.acceptance[order], min(_BINS, len(order)))
        places = (np.arange(len(bins)) + 0.5) / len(bins)
        axes.plot(places, [part.mean() for part in bins], "o-", label=name.replace("_", " "))
    axes.set(xlabel="quantile of the signal", ylabel="acceptance rate", ylim=(0, 1))
    axes.legend()


def _calibration(analysis: Analysis, axes: Any) -> None:
    found = analysis.protocol
    order = np.argsort(found.predicted, kind="stable")
    parts = np.array_split(order, min(_BINS, len(order)))
    axes.scatter(found.predicted, found.actual, s=4, alpha=0.2, label="held-out steps")
    means = [(found.predicted[part].mean(), found.actual[part].mean()) for part in parts]
    axes.plot(*np.array(means).T, "o-", color="black", label="means of equal counts")
    axes.plot([0, 1], [0, 1], ":", color="grey")
    axes.set(
        xlabel="predicted acceptance rate",
        ylabel="acceptance rate",
        title=f"correlation {found.correlation:.3f}",
    )
    axes.legend()


def _improvement(analysis: Analysis, axes: Any) -> None:
    """What the protocol says of SpecKV over Fixed-4, beside measured speed."""
    table1, _ = analysis.tables
    names = list(analysis.throughput)
    places = np.arange(len(names))
    predicted = [row["improvement_pct"] for row in table1 if row["compression"] in names]
    changes = [of.paper_policy_vs_fixed4 for of in analysis.throughput.values()]
    speed = np.array([change.percent for change in changes])
    ends = np.array([(change.low, change.high) for change in changes])
    axes.bar(places - 0.2, predicted, 0.4, label="expected tokens per step", color="#9bb7d4")
    axes.bar(
        places + 0.2,
        speed,
        0.4,
        yerr=[speed - ends[:, 0], ends[:, 1] - speed],
        capsize=4,
        label="measured tokens per second",
        color="#1b6ca8",
    )
    axes.axhline(0, color="black", linewidth=0.8)
    axes.set(ylabel="the paper's policy over γ=4, %", xticks=places, xticklabels=names)
    axes.legend(loc="lower center", bbox_to_anchor=(0.5, 1), ncols=2)


PLOTS: dict[str, Callable[[Analysis, Any], None]] = {
    "tokens_per_second": _tokens_per_second,
    "tokens_per_step": _tokens_per_step,
    "step_cost": _step_cost,
    "signals": _signals,
    "calibration": _calibration,
    "improvement": _improvement,
}
"""What `draw` writes, by file name without its ending."""
