"""``speckv replay`` and ``calibrate``: costs as a file, and what was found as tables."""

from __future__ import annotations

import json
import math
from dataclasses import fields
from pathlib import Path
from typing import TYPE_CHECKING

from ._cli_output import progress_bar, stderr_console, write_json

if TYPE_CHECKING:
    from collections.abc import Mapping

    from rich.console import Console
    from rich.table import Table

    from .policies import CostTable
    from .traces.compare import Cell, Comparison, Row
    from .traces.schema import Trace
    from .traces.study import Study


def read_costs(path: Path) -> dict[str, CostTable]:
    """Cost tables by compression from a JSON file.

    Raises
    ------
    ValueError
        Not JSON, or not tables of 16 times and slopes that can be.
    OSError
        The file cannot be read.
    """
    expected = f"--costs: expected tables by compression in {path}, as speckv calibrate writes them"
    try:
        tables = json.loads(path.expanduser().read_text(encoding="utf-8"))
    except ValueError as error:
        raise ValueError(f"{expected}, got no JSON ({error})") from None
    if not isinstance(tables, dict) or not tables:
        raise ValueError(f"{expected}, got {'none' if tables == {} else type(tables).__name__}")
    try:
        return {name: _cost_table(name, table) for name, table in tables.items()}
    except ValueError as error:
        raise ValueError(f"{expected}: {error}") from None


def _cost_table(name: str, table: object) -> CostTable:
    from .models.base import COMPRESSIONS
    from .policies import CostTable

    if name not in COMPRESSIONS:
        raise ValueError(f"expected one of {', '.join(COMPRESSIONS)}, got {name!r}")
    needed = ("step_ms", "step_ms_per_context_token")
    known = {field.name for field in fields(CostTable)}
    if not isinstance(table, dict) or not set(needed) <= set(table) <= known:
        got = ", ".join(table) if isinstance(table, dict) else type(table).__name__
        raise ValueError(f"{name}: expected {' and '.join(needed)}, got {got or 'nothing'}")
    for key in needed:
        values = table[key]
        if not isinstance(values, list) or not all(type(v) in (int, float) for v in values):
            raise ValueError(f"{name}: {key}: expected a list of numbers")
    try:
        return CostTable.from_dict(table)
    except (AttributeError, TypeError, ValueError) as error:
        raise ValueError(f"{name}: {error}") from None


def replay_all(
    path: Path, policies: str | None, costs: Path | None, *, train_share: float, seed: int
) -> Study:
    """Read a trace and replay policies on it, with a progress bar; see `speckv.traces.compare`.

    ``policies`` are separated by commas; without them, and without ``costs``, the default ones and
    the trace's own.
    """
    from .traces.compare import compare, split_prompts
    from .traces.schema import read_trace
    from .traces.study import Study
    from .traces.tuning import DEFAULT, check_policy

    names = DEFAULT if policies is None else tuple(dict.fromkeys(policies.split(",")))
    for name in names:  # before the trace is read
        check_policy(name)
    trace = read_trace(path)
    tables = trace.info.costs if costs is None else read_costs(costs)
    count = len({(a.compression, a.temperature) for a in trace.answers})
    with progress_bar(stderr_console(), "replaying", count * len(names)) as advance:
        found = compare(
            trace,
            tables,
            names,
            train_share=train_share,
            seed=seed,
            advance=lambda: advance(1),
        )
    return Study(trace, tables, found, split_prompts(trace, train_share, seed))


def try_all(study: Study) -> Study:
    """The study with what else was tried at each temperature, with a progress bar."""
    from dataclasses import replace

    from .traces.tries import COUNT, tries

    tried = {}
    temperatures = study.temperatures
    with progress_bar(stderr_console(), "trying", COUNT * len(temperatures)) as advance:
        for temperature in temperatures:
            own = study.trace.where(lambda a, t=temperature: a.temperature == t)  # type: ignore[misc]
            train = own.where(lambda a: a.prompt_id in study.training)
            judged = own.where(lambda a: a.prompt_id not in study.training)
            tried[temperature] = tries(train, judged, study.costs, lambda: advance(1))
    return replace(study, tried=tried)


def write_costs(path: Path, tables: Mapping[str, CostTable]) -> None:
    """Write what `read_costs` reads."""
    write_json(path, {name: table.to_dict() for name, table in tables.items()})


def show_costs(console: Console, compression: str, cost: CostTable) -> None:
    """Print a cost table, by γ."""
    parts = cost.parts
    of_parts = () if parts is None else ("target's forward", "overhead")
    table = _table("ms at context 0", "at 1,000", "plain steps", *of_parts, rows="")
    for gamma, (ms, slope) in enumerate(
        zip(cost.step_ms, cost.step_ms_per_context_token, strict=True)
    ):
        cells = [f"{ms:.2f}", f"{ms + 1000 * slope:.2f}", f"{ms / cost.step_ms[0]:.2f}"]
        if parts is not None:
            cells += [f"{parts.verify_ms[gamma]:.2f}", f"{parts.overhead_ms[gamma]:.2f}"]
        table.add_row(f"γ = {gamma}", *cells)
    console.print(f"{compression}: a step that verifies γ draft tokens", markup=False)
    console.print(table)
    if parts is not None:
        console.print(
            f"a draft token {parts.draft_ms:.2f} ms; {cost.catch_up_ms:.3f} ms for "
            f"{cost.catch_up_tokens} that the draft was not fed in plain steps",
            markup=False,
        )


def show(console: Console, trace: Trace, found: Comparison) -> None:
    """Print what was replayed, and tables for each cell and for all compressions."""
    info = trace.info
    console.print(
        f"target {info.target['name']}, draft {info.draft['name']}, on {info.device}: "
        f"{len(trace.answers)} answers, {len(trace.rows):,} positions",
        markup=False,
    )
    for cell in (*found.cells, *found.pooled):
        _show_cell(console, cell)


def _show_cell(console: Console, cell: Cell) -> None:
    from rich.text import Text

    from .traces.report import title_of

    console.print()
    console.print(
        f"{title_of(cell)}, temperature {cell.temperature:g}: judged on {cell.prompts} prompts, "
        f"{cell.tokens:,} tokens",
        style="bold",
        markup=False,
    )
    figures = _table("tokens/s", "a step", "mean γ", "x plain", "x static", "95%", "gap closed")
    for row in cell.rows:
        figures.add_row(
            Text(row.policy),
            f"{row.tokens_per_second:.1f}",
            f"{row.tokens_per_step:.2f}",
            f"{_mean_gamma(row):.2f}",
            f"{row.over_plain:.3f}",
            f"{row.over_static:.3f}",
            "{:.3f}-{:.3f}".format(*row.over_static_95),
            "-" if math.isnan(row.gap_closed) else f"{row.gap_closed:.0%}",
        )
    console.print(figures)
    tasks = list(cell.rows[0].tasks)
    by_task = _table(*tasks, "regret", "speckv x it", "95%")
    for row in cell.rows:
        ratios = (f"{row.tasks[task]['over_static']:.3f}" for task in tasks)
        unknown = math.isnan(row.ours_over_it)
        by_task.add_row(
            Text(row.policy),
            *ratios,
            f"{row.regret:.1%}",
            "-" if unknown else f"{row.ours_over_it:.3f}",
            "-" if unknown else "{:.3f}-{:.3f}".format(*row.ours_over_it_95),
        )
    console.print("x static by task; speckv beside each", style="dim")
    console.print(by_task)
    for row in cell.rows:
        if row.settings:
            found = ", ".join(f"{name} {value:g}" for name, value in row.settings.items())
            edge = f"; at the end of what was tried: {', '.join(row.on_edge)}" * bool(row.on_edge)
            console.print(f"tuned {row.policy}: {found}{edge}", style="dim", markup=False)


def _table(*columns: str, rows: str = "policy") -> Table:
    from rich.table import Table

    table = Table(box=None, padding=(0, 1, 0, 0), header_style="dim")
    table.add_column(rows, no_wrap=True)
    for name in columns:
        table.add_column(name, justify="right")
    return table


def _mean_gamma(row: Row) -> float:
    steps = sum(row.histogram)
    return sum(g * n for g, n in enumerate(row.histogram)) / steps if steps else 0.0
