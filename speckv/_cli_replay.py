"""``speckv replay`` and ``calibrate``: costs as a file, and what was found as tables."""

from __future__ import annotations

import json
import math
from dataclasses import asdict
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
        Not JSON, or not tables.
    OSError
        The file cannot be read.
    """
    from .policies import CostTable

    try:
        tables = json.loads(path.expanduser().read_text(encoding="utf-8"))
        return {
            name: CostTable(**{key: tuple(map(float, values)) for key, values in table.items()})
            for name, table in tables.items()
        }
    except (AttributeError, TypeError, ValueError) as error:
        raise ValueError(f"--costs: expected tables by compression in {path}: {error}") from None


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
    write_json(path, {name: asdict(table) for name, table in tables.items()})


def show_costs(console: Console, compression: str, cost: CostTable) -> None:
    """Print a cost table, by γ."""
    table = _table("ms at context 0", "at 1,000", "plain steps", rows="")
    for gamma, (ms, slope) in enumerate(
        zip(cost.step_ms, cost.step_ms_per_context_token, strict=True)
    ):
        far = ms + 1000 * slope
        table.add_row(f"γ = {gamma}", f"{ms:.2f}", f"{far:.2f}", f"{ms / cost.step_ms[0]:.2f}")
    console.print(f"{compression}: a step that verifies γ draft tokens", markup=False)
    console.print(table)


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
