"""What long work tells while it runs, whoever shows it."""

from __future__ import annotations

from typing import Protocol


class Reporter(Protocol):
    """Shows the progress of work that goes in stages."""

    def stage(self, name: str, total: int) -> None:
        """A stage of ``total`` units, at most, begins."""

    def advance(self, units: int, note: str) -> None:
        """So many more units are done; ``note`` is a few words on how it goes."""

    def line(self, text: str) -> None:
        """Something to keep."""
