"""``speckv report``: a trace and its policies as one HTML file, its plots, and JSON."""

from __future__ import annotations

import base64
import html
import math
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

from .. import figures
from ..files import write_atomically
from .compare import OURS, POOLED, Cell, Row
from .plots import CAPTIONS, PLOTS
from .study import Study
from .tries import Try

NAME = "report.html"


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
    """JSON values of what else was tried, by temperature."""
    return [
        {"temperature": temperature, "tries": [asdict(each) for each in tried]}
        for temperature, tried in study.tried.items()
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
    pooled, tables = (
        "".join(map(_table, cells)) for cells in (study.found.pooled, study.found.cells)
    )
    tried = "".join(_tries(*each) for each in study.tried.items())
    return (
        '<!doctype html>\n<html lang="en"><meta charset="utf-8">'
        f"<title>speckv: {_text(info.target['name'])}</title><style>{_STYLE}</style>"
        f"<h1>Policies on a trace</h1><dl>{listed}</dl>"
        "<p>Tokens per second are those of decoding steps, by measured costs. Settings are tuned "
        "on some prompts and judged on the others; intervals are 95%, over prompts.</p>"
        f"{pooled}{tried}{tables}<section>{shown}</section></html>\n"
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


def _tries(temperature: float, tried: Sequence[Try]) -> str:
    head = ("tried", "over static, validated", "judged", "95%", "gap closed", "bits")
    rows = "".join(_cells(_try_values(each)) for each in tried)
    return (
        f"<h3>What else a controller could go by, temperature {temperature:g}</h3>"
        "<p>Boosted trees on what is known within a step, over all compressions; rules and targets "
        "see the signals and the match. Validated on the training prompts, each by models that "
        "have not seen it: that is what to choose by. The judged prompts chose nothing here.</p>"
        "<table><tr>" + "".join(f"<th>{name}</th>" for name in head) + f"</tr>{rows}</table>"
    )


def _try_values(tried: Try) -> tuple[str, ...]:
    low, high = tried.over_static_95
    return (
        _text(tried.name),
        f"{tried.validated:.3f}",
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
