"""Progress on stderr for work that turns out to take more than two seconds."""

from __future__ import annotations

import time
from types import TracebackType
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from rich.progress import Progress

__all__ = ["SlowProgress"]

_DELAY_SECONDS = 2.0


class SlowProgress:
    """A progress bar that appears only if the work lasts.

    Parameters
    ----------
    description : str
        What is being done.
    total : int, optional
        Number of calls of :meth:`advance` that make the whole; None shows a pulse instead.
    enabled : bool
        Whether a bar may appear at all.
    """

    def __init__(self, description: str, total: int | None = None, *, enabled: bool = True) -> None:
        self._description, self._total, self._enabled = description, total, enabled
        self._done = 0
        self._began = time.monotonic()
        self._bar: Progress | None = None

    def __enter__(self) -> SlowProgress:
        self._began = time.monotonic()
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        value: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        if self._bar is not None:
            self._bar.stop()

    def advance(self) -> None:
        """Count one more unit of work, and show the bar once the delay has passed."""
        self._done += 1
        self.poll()

    def poll(self) -> None:
        """Refresh without counting: for work that is waited for."""
        if not self._enabled:
            return
        if self._bar is None:
            if time.monotonic() - self._began < _DELAY_SECONDS:
                return
            self._bar = self._start()
        self._bar.update(self._bar.task_ids[0], completed=self._done)

    def _start(self) -> Progress:
        from rich.console import Console
        from rich.progress import BarColumn, Progress, TextColumn, TimeElapsedColumn

        bar = Progress(
            TextColumn("{task.description}"),
            BarColumn(),
            TimeElapsedColumn(),
            console=Console(stderr=True),
            transient=True,
        )
        bar.add_task(self._description, total=self._total)
        bar.start()
        return bar
