"""Plots as PNG files: one kind of figure, saved in one rename."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from importlib import import_module
from pathlib import Path
from typing import Any, TypeVar

from .errors import SpeckvError
from .files import write_atomically

_DOTS_PER_INCH = 150

T = TypeVar("T")
Plot = Callable[[T, Any], None]
"""Draws something on matplotlib axes."""


def require_matplotlib() -> None:
    """Find out early whether plots can be drawn.

    Raises
    ------
    SpeckvError
        matplotlib is not installed.
    """
    try:
        import_module("matplotlib.figure")
    except ImportError:
        raise SpeckvError("plots need matplotlib: pip install 'speckv[report]'") from None


def draw(plots: Mapping[str, Plot[T]], of: T, folder: Path) -> list[Path]:
    """Write every plot into ``folder``, which is made if need be, as ``<name>.png``.

    Returns
    -------
    list of Path
        The files, in the order of ``plots``.

    Raises
    ------
    SpeckvError
        matplotlib is not installed.
    OSError
        The folder cannot be made or written to.
    """
    require_matplotlib()
    from matplotlib.figure import Figure

    written = []
    for name, plot in plots.items():
        figure = Figure(figsize=(7, 4.5), layout="constrained")
        axes = figure.add_subplot()
        plot(of, axes)
        axes.grid(alpha=0.3)
        path = folder / f"{name}.png"

        def save(temporary: Path, figure: Figure = figure) -> None:
            figure.savefig(temporary, format="png", dpi=_DOTS_PER_INCH)

        write_atomically(path, save)
        written.append(path)
    return written
