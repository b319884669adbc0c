"""How long the stages of interrupted work took in all."""

from __future__ import annotations

import json
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from ..files import write_atomically


class Stopwatch:
    """Seconds by stage, kept in a file from one process to the next.

    Parameters
    ----------
    path : Path
        Written at every `save`, and when a stage ends or is interrupted.
    """

    def __init__(self, path: Path) -> None:
        self._path = path
        self._seconds: dict[str, float] = {}
        if path.is_file():
            self._seconds = json.loads(path.read_text())
        self._stage: str | None = None
        self._since = 0.0

    def __getitem__(self, stage: str) -> float:
        """Seconds that a stage has taken so far."""
        return self._seconds.get(stage, 0.0)

    @contextmanager
    def stage(self, name: str) -> Iterator[None]:
        """Count what happens inside as a stage's."""
        self._stage, self._since = name, time.perf_counter()
        try:
            yield
        finally:
            self.save()
            self._stage = None

    def save(self) -> None:
        """Write what has passed, so that a process that is killed loses little."""
        if self._stage is None:
            return
        now = time.perf_counter()
        self._seconds[self._stage] = self[self._stage] + now - self._since
        self._since = now
        text = json.dumps(self._seconds)
        write_atomically(self._path, lambda temporary: temporary.write_text(text))
