"""Progress on stderr for work that turns out to take more than two seconds."""

from __future__ import annotations

import threading
from collections.abc import Iterator
from contextlib import contextmanager
from types import TracebackType
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from rich.progress import Progress

__all__ = ["SlowProgress", "without_transformers_bars"]

_DELAY_SECONDS = 2.0


class SlowProgress:
    """A progress bar that appears only if the work lasts.

    A thread of its own shows it, so work that never calls back has one too.

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
        self._ended = False
        self._lock = threading.Lock()  # `_show` runs in the thread of the timer
        self._timer: threading.Timer | None = None
        self._bar: Progress | None = None

    def __enter__(self) -> SlowProgress:
        if self._enabled:
            self._timer = threading.Timer(_DELAY_SECONDS, self._show)
            self._timer.daemon = True
            self._timer.start()
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        value: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        if self._timer is not None:
            self._timer.cancel()
        with self._lock:
            self._ended = True
            if self._bar is not None:
                self._bar.stop()

    def advance(self) -> None:
        """Count one more unit of work."""
        with self._lock:
            self._done += 1
            if self._bar is not None:
                self._bar.update(self._bar.task_ids[0], completed=self._done)

    def _show(self) -> None:
        from rich.console import Console
        from rich.progress import BarColumn, Progress, TextColumn, TimeElapsedColumn

        with self._lock:
            if self._ended:
                return
            self._bar = Progress(
                TextColumn("{task.description}"),
                BarColumn(),
                TimeElapsedColumn(),
                console=Console(stderr=True),
                transient=True,
            )
            self._bar.add_task(self._description, total=self._total, completed=self._done)
            self._bar.start()


@contextmanager
def without_transformers_bars() -> Iterator[None]:
    """Keep transformers from drawing bars of its own meanwhile."""
    from transformers.utils import logging

    shown = logging.is_progress_bar_enabled()
    logging.disable_progress_bar()
    try:
        yield
    finally:
        if shown:
            logging.enable_progress_bar()
