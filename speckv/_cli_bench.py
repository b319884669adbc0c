"""``speckv bench``: results of the GPU command against each other."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

app = typer.Typer(help="Results of benchmarks.", rich_markup_mode=None)


@app.callback()
def _group() -> None:
    """Results of benchmarks."""


@app.command()
def compare(
    before: Annotated[Path, typer.Argument(help="Results: a merged document, or JSON lines.")],
    after: Annotated[Path, typer.Argument(help="Results of the same device, later.")],
    threshold: Annotated[
        float, typer.Option(help="Changes of a median up to this share are none.")
    ] = 0.05,
    every: Annotated[bool, typer.Option("--all", help="Show what did not change too.")] = False,
) -> None:
    """Compare two sets of results of one device.

    Exits with 1 if anything became slower: medians apart by more than the threshold, whose 95%
    intervals do not touch; or a count that grew.
    """
    from rich.console import Console
    from rich.table import Table

    from .benchmarks import compare as compare_results
    from .benchmarks import read_results

    old, new = read_results(before.expanduser()), read_results(after.expanduser())
    changes = compare_results(old, new, threshold)
    shown = [change for change in changes if every or change.verdict != "same"]
    console = Console()
    if shown:
        table = Table(title=f"{old.device}: {len(changes)} results in both")
        for column in ("measurement", "result", "before", "after", "ratio", ""):
            table.add_column(column, justify="left" if column in ("measurement", "") else "right")
        for change in shown:
            table.add_row(
                change.name,
                change.metric,
                f"{change.before:,.3f}",
                f"{change.after:,.3f}",
                f"{change.ratio:.3f}",
                change.verdict,
            )
        console.print(table, markup=False)
    slower = sum(change.verdict == "slower" for change in changes)
    faster = sum(change.verdict == "faster" for change in changes)
    typer.echo(f"{len(changes)} results in both, {slower} slower, {faster} faster")
    if slower:
        raise typer.Exit(1)
