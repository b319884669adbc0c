"""The plots of ``speckv report``."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from .. import figures
from ..kernels import layout as at
from ..kernels.layout import GAMMA_MAX, WIDTH_MAX
from .calibration import calibration
from .compare import OURS, Cell
from .decisions import Decisions, decisions, join_decisions
from .study import Study
from .tuning import ORACLE, STATIC, resolve

_BINS = 12
_PLACES = 8  # of an answer's tokens in a bin of the plot over time
_FAR = 1000  # tokens of context
_COLOURS = ("#1b6ca8", "#c8553d", "#3c8d5a", "#7d5ba6", "#b8860b")
_MARKS = ("o", "s", "^", "D", "v")
_SHORT = (STATIC, "static-by-task", "hf-confidence", "svip", "online-logistic", OURS)
"""Policies of the plots that have no room for all."""


def _acceptance_by(signal: int, name: str, study: Study, axes: Any) -> None:
    """Of the first draft token, in bins of equal counts."""
    for colour, compression in zip(_COLOURS, study.compressions, strict=False):
        rows = study.part(compression).rows
        drafted = rows.drafted > 0
        value, hit = rows.signals[drafted, 0, signal], rows.accepted[drafted] > 0
        parts = np.array_split(np.argsort(value, kind="stable"), min(_BINS, len(value)))
        means = [(value[part].mean(), hit[part].mean()) for part in parts if len(part)]
        axes.plot(*np.array(means).T, "o-", color=colour, label=compression)
    axes.set(xlabel=name, ylabel="first draft token accepted", ylim=(0, 1))
    axes.legend()


def _acceptance_by_entropy(study: Study, axes: Any) -> None:
    _acceptance_by(at.ENTROPY, "entropy, bits", study, axes)


def _acceptance_by_confidence(study: Study, axes: Any) -> None:
    _acceptance_by(at.CONFIDENCE, "confidence", study, axes)


def _gamma_over_time(study: Study, axes: Any) -> None:
    for colour, compression in zip(_COLOURS, study.compressions, strict=False):
        for name, style in ((OURS, "-"), (ORACLE, ":")):
            found = study.decided[compression, name]
            place = np.concatenate(
                [
                    np.cumsum([1, *(a + 1 for _, a in steps[:-1])])
                    for lane in range(len(found.steps))
                    if (steps := found.steps_of(lane))
                ]
            )
            order = np.argsort(found.lane, kind="stable")
            gamma = found.gamma[order]
            bins = place // _PLACES
            x = np.unique(bins)
            means = [gamma[bins == b].mean() for b in x]
            label = f"{compression}, {name}"
            axes.plot((x + 0.5) * _PLACES, means, style, color=colour, label=label)
    axes.set(xlabel="token of the answer", ylabel="mean γ", ylim=(0, None))
    axes.legend()


def _calibration(study: Study, axes: Any) -> None:
    """By temperature, over all compressions."""
    policy = resolve(OURS, study.trace)
    mlp = policy.mlp
    if mlp is None or not policy.trained:
        axes.set_title("no policy was trained for this pair")
    else:
        for colour, temperature in zip(_COLOURS, study.temperatures, strict=False):
            bins = calibration(mlp, _own_decisions(study, temperature))
            points = np.array([(b["predicted"], b["actual"]) for b in bins])
            axes.plot(*points.T, "o-", color=colour, label=f"temperature {temperature:g}")
        axes.legend()
    axes.plot([0, 1], [0, 1], ":", color="grey")
    axes.set(xlabel="predicted: the next token is accepted", ylabel="share that is")


def _own_decisions(study: Study, temperature: float) -> Decisions:
    """Decisions of our policy on the judged answers of a temperature."""
    return join_decisions(
        [
            decisions(judged, study.replayed(OURS, compression, temperature))
            for compression in study.compressions
            if (judged := study.part(compression, temperature, judged=True)).answers
        ]
    )


def _comparison(study: Study, axes: Any) -> None:
    cells = [cell for cell in study.found.cells if cell.temperature == study.lowest]
    names = [row.policy for row in cells[0].rows if not row.policy.startswith("fixed:")]
    places = np.arange(len(names))
    height = 0.8 / len(cells)
    for i, (colour, cell) in enumerate(zip(_COLOURS, cells, strict=False)):
        rows = {row.policy: row for row in cell.rows}
        over = np.array([rows[name].over_static for name in names])
        ends = np.array([rows[name].over_static_95 for name in names])
        axes.barh(
            places + i * height,
            over,
            height,
            xerr=np.abs(ends.T - over),
            color=colour,
            label=cell.compression,
        )
    axes.axvline(1, color="black", linewidth=0.8)
    axes.set(yticks=places + 0.4 - height / 2, yticklabels=names)
    axes.set(xlabel="tokens/s over the best fixed γ", xlim=(0.7, None))
    axes.invert_yaxis()
    axes.legend()


def _regret(study: Study, axes: Any) -> None:
    """Bars over all compressions where their prompts are the same, and a dot for each."""
    cells = [cell for cell in study.found.cells if cell.temperature == study.lowest]
    pooled = [cell for cell in study.found.pooled if cell.temperature == study.lowest]
    whole = (pooled or cells)[0]
    names = [row.policy for row in whole.rows if row.policy in _SHORT]
    tasks = list(whole.rows[0].tasks)
    places = np.arange(len(tasks))
    width = 0.8 / len(names)
    for i, name in enumerate(names):
        axes.bar(places + i * width, _lost(whole, name, tasks), width, label=name)
        for mark, cell in zip(_MARKS, cells if pooled else (), strict=False):
            label = cell.compression if i == 0 else None
            lost = _lost(cell, name, tasks)
            axes.plot(places + i * width, lost, mark, color="black", markersize=3, label=label)
    axes.set(xticks=places + 0.4 - width / 2, xticklabels=tasks)
    over = "all compressions" if pooled else whole.compression
    axes.set(ylabel=f"tokens/s lost to the oracle, %, {over}")
    axes.legend()


def _lost(cell: Cell, name: str, tasks: Sequence[str]) -> list[float]:
    """Percent lost by a policy, by task."""
    row = next(row for row in cell.rows if row.policy == name)
    return [100 * row.tasks[task]["regret"] if task in row.tasks else math.nan for task in tasks]


def _cost(study: Study, axes: Any) -> None:
    gammas = np.arange(WIDTH_MAX)
    for colour, compression in zip(_COLOURS, study.compressions, strict=False):
        cost = study.costs[compression]
        near = np.array(cost.step_ms)
        far = near + _FAR * np.array(cost.step_ms_per_context_token)
        axes.plot(gammas, near, "o-", color=colour, label=f"{compression}, no context")
        axes.plot(gammas, far, "x:", color=colour, label=f"{compression}, {_FAR:,} tokens")
    axes.set(xlabel="γ", ylabel="ms per step", ylim=(0, None))
    axes.legend()


def _best_gamma(study: Study, axes: Any) -> None:
    for colour, compression in zip(_COLOURS, study.compressions, strict=False):
        cell = next(
            c
            for c in study.found.cells
            if (c.compression, c.temperature) == (compression, study.lowest)
        )
        speeds = {
            int(row.policy.removeprefix("fixed:")): row.tokens_per_second
            for row in cell.rows
            if row.policy.startswith("fixed:")
        }
        if not speeds:
            axes.set_title("no fixed γ was replayed")
            return
        best = max(speeds, key=speeds.__getitem__)
        axes.plot([*speeds], [*speeds.values()], "o-", color=colour, label=f"{compression}: {best}")
        axes.plot(best, speeds[best], "*", color=colour, markersize=16)
    axes.set(xlabel="fixed γ", ylabel="tokens/s", ylim=(0, None), xlim=(-0.5, GAMMA_MAX + 0.5))
    axes.legend()


PLOTS: Mapping[str, figures.Plot[Study]] = {
    "comparison": _comparison,
    "regret": _regret,
    "best_gamma": _best_gamma,
    "cost": _cost,
    "acceptance_by_entropy": _acceptance_by_entropy,
    "acceptance_by_confidence": _acceptance_by_confidence,
    "gamma_over_time": _gamma_over_time,
    "calibration": _calibration,
}
"""What `write_report` draws, by file name without its ending."""

CAPTIONS: Mapping[str, str] = {
    "comparison": "Policies against the best fixed γ, with 95% intervals over prompts",
    "regret": "What is lost to a policy that knows the outcome, by task and (dots) compression",
    "best_gamma": "Tokens per second at a fixed γ, and the best one by compression",
    "cost": "Measured cost of a step",
    "acceptance_by_entropy": "Acceptance against the draft's entropy",
    "acceptance_by_confidence": "Acceptance against the draft's confidence",
    "gamma_over_time": "γ over the course of an answer: chosen, and in hindsight the best",
    "calibration": "The policy's own predictions, on prompts that it was not trained on",
}
