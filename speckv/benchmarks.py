"""Two sets of benchmark results against each other: what became slower, beyond chance.

Results are those of the GPU command: documents of parts, or JSON lines of single rows, to which
later runs are appended. Rows are the same measurement if everything that is no result of theirs is
equal; of several the last counts. Times of different devices are not compared.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from .errors import SpeckvError

__all__ = ["Change", "Results", "compare", "read_results"]

SLOWER_IS_MORE = ("kernel_us", "iteration_us", "decode_seconds")
SLOWER_IS_LESS = ("tokens_per_second",)
"""Results that hold quantiles, and which way is worse."""

COUNTS = ("launches_per_step", "syncs", "device_bytes")
"""Results that are exact: any growth is a regression."""

_RESULTS = {*SLOWER_IS_MORE, *SLOWER_IS_LESS, *COUNTS, "host_us", "n", "tokens", "steps", "seconds"}
_RESULTS |= {"launches", "copies", "counted", "exit_code", "host_bytes", "grew", "first", "tail"}
_RESULTS |= {"matches_reference", "identical_to_plain", "traced_syncs", "config", "generations"}

Key = tuple[tuple[str, str], ...]


@dataclass(frozen=True)
class Results:
    """A set of results.

    Attributes
    ----------
    device : str
        Where they were measured.
    rows : mapping of Key to dict
    """

    device: str
    rows: Mapping[Key, Mapping[str, Any]]


@dataclass(frozen=True)
class Change:
    """One result in both sets.

    Attributes
    ----------
    key : Key
    metric : str
    before, after : float
        Medians, or counts.
    verdict : str
        ``"slower"``, ``"faster"`` or ``"same"``.
    """

    key: Key
    metric: str
    before: float
    after: float
    verdict: str

    @property
    def name(self) -> str:
        """The measurement in words."""
        return " ".join(value for _, value in self.key)

    @property
    def ratio(self) -> float:
        """After over before; NaN where before is 0."""
        return self.after / self.before if self.before else float("nan")


def read_results(path: Path) -> Results:
    """Results from a document of the GPU command, or from JSON lines.

    Raises
    ------
    SpeckvError
        If it is neither, holds no row, or rows of several devices.
    """
    try:
        text = path.read_text(encoding="utf-8")
    except OSError as error:
        raise SpeckvError(f"{path}: {error.strerror}") from None
    found: dict[Key, Mapping[str, Any]] = {}
    devices: set[str] = set()
    try:
        for environment, row in _rows(text):
            devices.add(str(environment["device"]))
            found[_key(row)] = row
    except (ValueError, TypeError, KeyError, AttributeError):
        raise SpeckvError(f"{path}: expected results of python -m bench.gpu") from None
    if not found:
        raise SpeckvError(f"{path}: expected results of python -m bench.gpu, found no row")
    if len(devices) != 1:
        raise SpeckvError(f"{path}: expected rows of one device, got {', '.join(sorted(devices))}")
    return Results(devices.pop(), found)


def compare(before: Results, after: Results, threshold: float = 0.05) -> list[Change]:
    """Every result that both sets hold.

    A time is slower, or faster, if the 95% intervals of the medians do not touch and the medians
    differ by more than ``threshold``; a count if it differs at all.

    Raises
    ------
    ValueError
        If the devices differ, nothing is in both, or the threshold is negative.
    """
    if threshold < 0:
        raise ValueError(f"threshold: expected at least 0, got {threshold}")
    if before.device != after.device:
        raise ValueError(
            f"expected results of one device, got {before.device!r} and {after.device!r}"
        )
    changes = []
    for key, old in before.rows.items():
        new = after.rows.get(key)
        if new is None:
            continue
        changes += [
            Change(key, metric, *_judge(metric, old[metric], new[metric], threshold))
            for metric in (*SLOWER_IS_MORE, *SLOWER_IS_LESS, *COUNTS)
            if old.get(metric) is not None and new.get(metric) is not None
        ]
    if not changes:
        raise ValueError("expected a result that both hold, found none")
    return changes


def _judge(metric: str, old: Any, new: Any, threshold: float) -> tuple[float, float, str]:
    """Both values and the verdict."""
    if metric in COUNTS:
        a, b = float(old), float(new)
        return a, b, "same" if a == b else "slower" if b > a else "faster"
    a, b = float(old["p50"]), float(new["p50"])
    apart = new["low"] > old["high"] or new["high"] < old["low"]
    if not apart or abs(b / a - 1.0) <= threshold:
        return a, b, "same"
    worse = b > a if metric in SLOWER_IS_MORE else b < a
    return a, b, "slower" if worse else "faster"


def _rows(text: str) -> Iterator[tuple[Mapping[str, Any], Mapping[str, Any]]]:
    """Environment and row of everything measured, dry runs left out."""
    try:
        documents = [json.loads(text)]
    except ValueError:
        documents = [json.loads(line) for line in text.splitlines() if line.strip()]
    for document in documents:
        if "environment" in document and "rows" not in document:
            parts = [{"environment": document["environment"], "rows": [document]}]
        else:
            parts = [document] if "rows" in document else list(document.values())
        for part in parts:
            for row in part["rows"]:
                if not row.get("dry_run"):
                    yield part["environment"], row


def _key(row: Mapping[str, Any]) -> Key:
    """What a row is a measurement of."""
    return tuple(
        (name, str(value))
        for name, value in row.items()
        if isinstance(value, str | int) and name not in _RESULTS and not isinstance(value, bool)
    )
