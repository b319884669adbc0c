"""``speckv report``: a trace and its policies as one HTML file, its plots, and JSON."""

from __future__ import annotations

import base64
import html
import math
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np

from .. import figures
from ..files import write_atomically
from ..kernels import layout as at
from ..kernels.layout import GAMMA_MAX, WIDTH_MAX
from ..policies import CostTable
from .calibration import calibration
from .compare import OURS, POOLED, Cell, Comparison, Row
from .decisions import decisions
from .replay import Controller, Oracle, Replayed, replay
from .schema import Trace
from .tries import Try
from .tuning import ORACLE, STATIC, resolve, tune

NAME = "report.html"
_BINS = 12
_PLACES = 8  # of an answer's tokens in a bin of the plot over time
_FAR = 1000  # tokens of context
_COLOURS = ("#1b6ca8", "#c8553d", "#3c8d5a", "#7d5ba6", "#b8860b")
_SHORT = (STATIC, "static-by-task", "hf-confidence", "svip", "online-logistic", OURS)
"""Policies of the plots that have no room for all."""


@dataclass(frozen=True)
class Study:
    """What a report is of.

    Attributes
    ----------
    trace : Trace
    costs : mapping of str to CostTable
        By compression.
    found : Comparison
        Of `speckv.traces.compare.compare`.
    training : frozenset of int
        Prompts that policies were tuned on; the others judge.
    tried : mapping of (str, float) to sequence of Try
        By compression and temperature; empty where nothing else was tried.
    """

    trace: Trace
    costs: Mapping[str, CostTable]
    found: Comparison
    training: frozenset[int]
    tried: Mapping[tuple[str, float], Sequence[Try]] = field(default_factory=dict)

    @property
    def compressions(self) -> list[str]:
        """Of the trace, in its order."""
        return list(dict.fromkeys(answer.compression for answer in self.trace.answers))

    @cached_property
    def lowest(self) -> float:
        """The lowest temperature: 0 where there are greedy answers."""
        return min(answer.temperature for answer in self.trace.answers)

    def part(self, compression: str, *, judged: bool | None = None) -> Trace:
        """Answers of a compression at the lowest temperature: that judge, or do not, or all."""
        return self.trace.where(
            lambda a: (
                (a.compression, a.temperature) == (compression, self.lowest)
                and judged in (None, a.prompt_id not in self.training)
            )
        )

    @cached_property
    def decided(self) -> dict[tuple[str, str], Replayed]:
        """Replays by compression and policy: ours, the best fixed γ and the oracle."""
        found = {}
        for compression in self.compressions:
            cost = self.costs[compression]
            judged = self.part(compression, judged=True)
            train = self.part(compression, judged=False)
            for name in (STATIC, OURS, ORACLE):
                controller: Controller
                if name == ORACLE:
                    controller = Oracle(judged, cost)
                else:
                    controller = tune(name, train, compression, cost).controller
                found[compression, name] = replay(judged, controller, cost)
        return found


def write_report(study: Study, folder: Path) -> Path:
    """Write the plots and ``report.html``, which holds them too; the path of the latter.

    Raises
    ------
    SpeckvError
        matplotlib is not installed.
    OSError
        The folder cannot be made or written to.
    """
    images = figures.draw(PLOTS, study, folder)
    text = _page(study, images)
    path = folder / NAME
    write_atomically(path, lambda temporary: temporary.write_text(text, encoding="utf-8"))
    return path


def tries_to_list(study: Study) -> list[dict[str, Any]]:
    """JSON values of what else was tried, a cell each."""
    return [
        {
            "compression": compression,
            "temperature": temperature,
            "tries": [asdict(each) for each in tried],
        }
        for (compression, temperature), tried in study.tried.items()
    ]


def _page(study: Study, images: Sequence[Path]) -> str:
    info = study.trace.info
    facts = {
        "target": info.target["name"],
        "draft": info.draft["name"],
        "recorded on": info.device,
        "answers": f"{len(study.trace.answers):,}",
        "positions": f"{len(study.trace.rows):,}",
        "prompts tuned on": f"{len(study.training):,}",
        "versions": ", ".join(f"{name} {version}" for name, version in info.versions.items()),
    }
    listed = "".join(f"<dt>{_text(k)}</dt><dd>{_text(v)}</dd>" for k, v in facts.items())
    shown = "".join(_image(path) for path in images)
    tables = "".join(
        _table(cell) + _tries(study.tried.get((cell.compression, cell.temperature), ()))
        for cell in study.found.cells
    )
    pooled = "".join(map(_table, study.found.pooled))
    return (
        '<!doctype html>\n<html lang="en"><meta charset="utf-8">'
        f"<title>speckv: {_text(info.target['name'])}</title><style>{_STYLE}</style>"
        f"<h1>Policies on a trace</h1><dl>{listed}</dl>"
        "<p>Tokens per second are those of decoding steps, by measured costs. Settings are tuned "
        "on some prompts and judged on the others; intervals are 95%, over prompts.</p>"
        f"{pooled}{tables}<section>{shown}</section></html>\n"
    )


_STYLE = (
    "body{font:15px/1.5 system-ui,sans-serif;max-width:60rem;margin:2rem auto;padding:0 1rem;"
    "color:#222}dl{display:grid;grid-template-columns:max-content 1fr;gap:.1rem 1rem}"
    "dt{color:#666}dd{margin:0}table{border-collapse:collapse;font-variant-numeric:tabular-nums;"
    "width:100%}td,th{padding:.15rem .6rem;text-align:right;border-bottom:1px solid #eee}"
    "td:first-child,th:first-child{text-align:left}.ours{font-weight:600}"
    "section{display:grid;grid-template-columns:repeat(auto-fit,minmax(26rem,1fr));gap:1rem}"
    "figure{margin:0}img{width:100%}figcaption{color:#444}"
)


def _table(cell: Cell) -> str:
    ratios = ("over plain", "over static", "95%", "gap closed", "speckv over it", "95%")
    head = ("policy", "tokens/s", "a step", *ratios)
    rows = "".join(_table_row(row) for row in cell.rows)
    return (
        f"<h2>{_text(title_of(cell))}, temperature {cell.temperature:g}</h2>"
        f"<p>{cell.prompts:,} prompts, {cell.tokens:,} tokens</p><table><tr>"
        + "".join(f"<th>{name}</th>" for name in head)
        + f"</tr>{rows}</table>"
    )


def title_of(cell: Cell) -> str:
    """The compression of a cell, or that it is all of them."""
    return "All compressions" if cell.compression == POOLED else cell.compression


def _table_row(row: Row) -> str:
    low, high = row.over_static_95
    ours = row.policy == OURS or math.isnan(row.ours_over_it)
    values = (
        _text(row.policy),
        f"{row.tokens_per_second:.1f}",
        f"{row.tokens_per_step:.2f}",
        f"{row.over_plain:.3f}",
        f"{row.over_static:.3f}",
        f"{low:.3f} to {high:.3f}",
        "" if math.isnan(row.gap_closed) else f"{row.gap_closed:.0%}",
        "" if ours else f"{row.ours_over_it:.3f}",
        "" if ours else "{:.3f} to {:.3f}".format(*row.ours_over_it_95),
    )
    return _cells(values, ' class="ours"' if row.policy == OURS else "")


def _cells(values: Sequence[str], mark: str = "") -> str:
    return f"<tr{mark}>" + "".join(f"<td>{value}</td>" for value in values) + "</tr>"


def _tries(tried: Sequence[Try]) -> str:
    if not tried:
        return ""
    head = ("tried", "over static", "95%", "gap closed", "bits")
    rows = "".join(_cells(_try_values(each)) for each in tried)
    return (
        "<h3>What else a controller could go by</h3>"
        "<p>Boosted trees on what is known within a step; the rules see the signals and the "
        "match.</p><table><tr>" + "".join(f"<th>{name}</th>" for name in head) + f"</tr>{rows}"
        "</table>"
    )


def _try_values(tried: Try) -> tuple[str, ...]:
    low, high = tried.over_static_95
    return (
        _text(tried.name),
        f"{tried.over_static:.3f}",
        f"{low:.3f} to {high:.3f}",
        "" if math.isnan(tried.gap_closed) else f"{tried.gap_closed:.0%}",
        "" if math.isnan(tried.bits) else f"{tried.bits:.4f}",
    )


def _image(path: Path) -> str:
    data = base64.b64encode(path.read_bytes()).decode("ascii")
    caption = _text(CAPTIONS[path.stem])
    return (
        f'<figure><img alt="{caption}" src="data:image/png;base64,{data}">'
        f"<figcaption>{caption}</figcaption></figure>"
    )


def _text(value: Any) -> str:
    return html.escape(str(value))


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
    for colour, compression in zip(_COLOURS, study.compressions, strict=False):
        mlp = resolve(OURS, study.trace).mlp
        if mlp is None or mlp.layout != at.LAYOUT_SURVIVAL:
            axes.set_title("no policy was trained for this pair")
            break
        judged = study.part(compression, judged=True)
        bins = calibration(mlp, decisions(judged, study.decided[compression, OURS]))
        points = np.array([(b["predicted"], b["actual"]) for b in bins])
        axes.plot(*points.T, "o-", color=colour, label=compression)
        axes.legend()
    axes.plot([0, 1], [0, 1], ":", color="grey")
    axes.set(xlabel="predicted: the next token is accepted", ylabel="share that is")


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
    cell = next(cell for cell in study.found.cells if cell.temperature == study.lowest)
    rows = [row for row in cell.rows if row.policy in _SHORT]
    tasks = list(rows[0].tasks)
    places = np.arange(len(tasks))
    width = 0.8 / len(rows)
    for i, row in enumerate(rows):
        lost = [100 * row.tasks[task]["regret"] for task in tasks]
        axes.bar(places + i * width, lost, width, label=row.policy)
    axes.set(xticks=places + 0.4 - width / 2, xticklabels=tasks)
    axes.set(ylabel=f"tokens/s lost to the oracle, %, {cell.compression}")
    axes.legend()


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
    "regret": "What is lost to a policy that knows the outcome, by task",
    "best_gamma": "Tokens per second at a fixed γ, and the best one by compression",
    "cost": "Measured cost of a step",
    "acceptance_by_entropy": "Acceptance against the draft's entropy",
    "acceptance_by_confidence": "Acceptance against the draft's confidence",
    "gamma_over_time": "γ over the course of an answer: chosen, and in hindsight the best",
    "calibration": "The policy's own predictions, on prompts that it was not trained on",
}
