"""What the command line shows: statistics as a table, results as JSON, and a clean stdout."""

from __future__ import annotations

import json
import math
import os
import sys
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager, redirect_stdout
from typing import TYPE_CHECKING, Any

from .files import write_atomically

if TYPE_CHECKING:
    from collections.abc import Mapping
    from pathlib import Path

    from rich.console import Console
    from rich.progress import Progress

_BAR_WIDTH = 30


def stderr_console() -> Console:
    """A rich console on stderr: stdout is kept for the text or the JSON object."""
    from rich.console import Console

    return Console(stderr=True, highlight=False, soft_wrap=True)


def show_stats(console: Console, stats: Mapping[str, Any]) -> None:
    """Print a result's statistics, with the histogram of γ as bars.

    Parameters
    ----------
    console : rich.console.Console
        Where to print.
    stats : mapping
        ``result.stats.to_dict()``: times in seconds, inter-token times in ms.
    """
    from rich.table import Table

    table = Table(box=None, show_header=False, padding=(0, 2, 0, 0))
    table.add_column(style="dim")
    table.add_column()
    seconds, inter_token = stats["seconds"], stats["inter_token_ms"]
    parts = ", ".join(f"{k} {_number(v, 2)}" for k, v in seconds.items() if k != "total")
    table.add_row("tokens/s", _number(stats["tokens_per_second"], 1))
    table.add_row("tokens/step", f"{_number(stats['tokens_per_step'], 2)} ({stats['steps']} steps)")
    table.add_row("acceptance", _percent(stats["acceptance_rate"]))
    table.add_row("seconds", f"{_number(seconds.get('total'), 2)} ({parts})")
    table.add_row("first token", f"{_milliseconds(stats['time_to_first_token'])} ms")
    table.add_row(
        "inter-token",
        f"p50 {_number(inter_token['p50'], 1)} ms, p99 {_number(inter_token['p99'], 1)} ms",
    )
    console.print(table)
    histogram = {int(gamma): int(steps) for gamma, steps in stats["gamma_histogram"].items()}
    for line in histogram_lines(histogram):
        console.print(line, markup=False)


def histogram_lines(histogram: Mapping[int, int]) -> list[str]:
    """One line per γ from 0 to the largest used: its value, its steps and a bar.

    >>> histogram_lines({2: 4, 0: 1})
    ['γ  0 │███████▌                      │ 1', 'γ  1 │                              │ 0', \
'γ  2 │██████████████████████████████│ 4']
    """
    if not histogram:
        return []
    most = max(histogram.values())
    return [
        f"γ {gamma:2d} │{_bar(histogram.get(gamma, 0), most):<{_BAR_WIDTH}}│ "
        f"{histogram.get(gamma, 0)}"
        for gamma in range(max(histogram) + 1)
    ]


def to_json(document: Mapping[str, Any], indent: int | None = None) -> str:
    """Strict JSON, one line unless indented; NaN and infinities, which it lacks, become null."""
    return json.dumps(_finite(document), allow_nan=False, indent=indent)


def write_json(path: Path, document: Mapping[str, Any]) -> None:
    """Write `to_json`, indented; an interrupted write leaves the old file or none."""
    text = to_json(document, indent=1) + "\n"
    write_atomically(path, lambda temporary: temporary.write_text(text, encoding="utf-8"))


@contextmanager
def progress_bar(
    console: Console, label: str, total: float | None
) -> Iterator[Callable[[int], None]]:
    """A bar while the context lasts; what it yields advances it by so many steps.

    Nothing is drawn where ``console`` is no terminal. Without a total the bar only pulses.
    """
    if not console.is_terminal:
        yield lambda steps: None
        return
    from rich.progress import Progress

    with Progress(console=console, transient=True) as progress:
        task = progress.add_task(label, total=total)
        yield lambda steps: progress.advance(task, steps)


class Progressing:
    """A `Reporter` that shows one bar a stage on a terminal, and lines above it."""

    def __init__(self, console: Console) -> None:
        from rich.progress import BarColumn, Progress, TextColumn, TimeRemainingColumn

        self._console = console
        self._bar: Progress = Progress(
            TextColumn("{task.description}"),
            BarColumn(),
            TextColumn("{task.completed:,.0f} of {task.total:,.0f}"),
            TimeRemainingColumn(),
            TextColumn("{task.fields[note]}"),
            console=console,
            transient=True,
        )
        self._task: Any = None

    def __enter__(self) -> Progressing:
        return self

    def __exit__(self, *exception: object) -> None:
        if self._bar.live.is_started:
            self._bar.stop()

    def stage(self, name: str, total: int) -> None:
        """Replace the bar."""
        if self._task is not None:
            self._bar.remove_task(self._task)
        self._task = self._bar.add_task(name, total=total, note="")
        if self._console.is_terminal:
            self._bar.start()

    def advance(self, units: int, note: str) -> None:
        """Move the bar."""
        self._bar.update(self._task, advance=units, note=note)

    def line(self, text: str) -> None:
        """Print a line that stays."""
        self._console.print(text, markup=False)


@contextmanager
def stdout_to_stderr() -> Iterator[None]:
    """Send whatever is written to stdout, by child processes too, to stderr meanwhile."""
    sys.stdout.flush()
    with redirect_stdout(sys.stderr):
        try:
            saved = os.dup(1)
        except OSError:  # started with stdout closed: nothing to protect
            yield
            return
        try:
            os.dup2(2, 1)
            yield
        finally:
            os.dup2(saved, 1)
            os.close(saved)


@contextmanager
def warnings_as_lines() -> Iterator[None]:
    """Show what speckv warns of as one line on stderr; other warnings as Python shows them."""
    from .errors import UntrainedPolicyWarning

    with warnings.catch_warnings():
        warnings.simplefilter("always", UntrainedPolicyWarning)
        as_python_does = warnings.showwarning

        def show(message: Any, category: type[Warning], *place: Any, **more: Any) -> None:
            if issubclass(category, UntrainedPolicyWarning):
                print(f"warning: {message}", file=sys.stderr)
            else:
                as_python_does(message, category, *place, **more)

        warnings.showwarning = show
        yield


def _bar(count: int, most: int) -> str:
    eighths = round(count / most * _BAR_WIDTH * 8) if most else 0
    if count and not eighths:
        eighths = 1
    full, rest = divmod(eighths, 8)
    return "█" * full + (" ▏▎▍▌▋▊▉"[rest] if rest else "")


def _number(value: float | None, digits: int) -> str:
    return "n/a" if value is None or not math.isfinite(value) else f"{value:.{digits}f}"


def _percent(value: float | None) -> str:
    return _number(None if value is None else 100 * value, 1) + ("" if value is None else "%")


def _milliseconds(value: float | None) -> str:
    return _number(None if value is None else 1000 * value, 0)


def _finite(value: Any) -> Any:
    if isinstance(value, float):
        return value if math.isfinite(value) else None
    if isinstance(value, dict):
        return {str(key): _finite(item) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [_finite(item) for item in value]
    return value
