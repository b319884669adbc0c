"""What the rows of a run say: which are wrong, which goals are met, and a table.

A row that is *wrong* (a failed test, another result than the reference's, a wait of the host where
there must be none) fails the command. A *goal* is a number that a kernel or a loop is to reach on
an H100: a missed one is reported beside what was measured, and hides nothing.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from bench.lab import Row

_SHAPE = (
    *("shape", "target", "draft", "model", "compression", "kind", "way", "policy", "batch"),
    *("width", "context", "vocabulary", "rows", "depth"),
)
_TIMES = {
    "kernel_us": "us",
    "iteration_us": "us an iteration",
    "above_first_us": "us above the first",
    "share_of_copy": "of copy bandwidth",
    "host_us": "us on the host",
    "tokens_per_second": "tokens/s",
    "above_forwards": "above its forwards",
    "launches_per_step": "launches a step",
    "syncs": "syncs",
}
_LARGE = 32_000_000
"""Bytes of a matrix that the goals of bandwidth are about."""

Found = Iterator[tuple[float, str]]
Parts = Mapping[str, Sequence[Row]]


def failed(row: Mapping[str, Any]) -> bool:
    """Whether a row is wrong."""
    differs = row.get("identical_to_plain") is False and row["dtype"] in ("bf16", "bfloat16")
    waits = bool(row.get("syncs")) or bool(row.get("traced_syncs")) or bool(row.get("grew"))
    return bool(row.get("exit_code")) or row.get("matches_reference") is False or differs or waits


@dataclass(frozen=True)
class Goal:
    """A number to reach.

    Attributes
    ----------
    name : str
    part : str
        Of the rows that it is about.
    find : callable
        What was measured, and where, of rows that are not wrong.
    limit : float
    most : bool
        Whether the limit is a maximum; else it is a minimum.
    unit : str
    wrong_too : bool
        Whether it is also about rows that are wrong.
    """

    name: str
    part: str
    find: Callable[[Sequence[Row]], Found]
    limit: float
    most: bool = True
    unit: str = ""
    wrong_too: bool = False

    def verdict(self, parts: Parts) -> Row:
        """The worst of what was measured against the limit; ``met`` is None where nothing was."""
        rows = [row for row in parts.get(self.part, ()) if not row.get("dry_run")]
        found = list(self.find([row for row in rows if self.wrong_too or not failed(row)]))
        row: Row = {"part": "verdicts", "name": f"goal: {self.name}", "unit": self.unit}
        row |= {"limit": float(self.limit), "at_most": self.most, "cases": {"n": len(found)}}
        row |= {"measured": None, "where": [], "met": None}
        if found:
            worst, where = max(found) if self.most else min(found)
            met = worst <= self.limit if self.most else worst >= self.limit
            row |= {"measured": float(worst), "where": [where], "met": met}
        return row


def verdicts(parts: Parts) -> list[Row]:
    """A row for each goal; those of a dry run say so."""
    dry = all(row.get("dry_run") for rows in parts.values() for row in rows)
    return [goal.verdict(parts) | {"dry_run": dry} for goal in GOALS]


def _median(value: Any) -> float | None:
    found = value.get("p50") if isinstance(value, Mapping) else value
    return None if found is None else float(found)


def _where(row: Row) -> str:
    return " ".join(str(row[key]) for key in _SHAPE if row.get(key) is not None)


def _metric(name: str, key: str, sign: float = 1.0, **facts: Any) -> Callable[..., Found]:
    """Of rows with this name and these facts."""

    def find(rows: Sequence[Row]) -> Found:
        for row in rows:
            value = _median(row.get(key))
            if row["name"] == name and value is not None and facts.items() <= row.items():
                yield sign * value, _where(row)

    return find


def _above_forwards(rows: Sequence[Row]) -> Found:
    for row in rows:
        if row["name"].startswith("device fixed:") and row.get("above_forwards") is not None:
            yield float(row["above_forwards"]), row["name"]


def _share(kind: str) -> Callable[[Sequence[Row]], Found]:
    """Shares of the copy bandwidth at one row, of large matrices."""

    def find(rows: Sequence[Row]) -> Found:
        for row in rows:
            named = (row["name"], row.get("kind"), row.get("width")) == ("linear", kind, 1)
            if named and row["bytes"] >= _LARGE and row.get("share_of_copy") is not None:
                yield float(row["share_of_copy"]), _where(row)

    return find


def _times(rows: Iterable[Row], name: str) -> dict[tuple[str, str, int], float]:
    """Microseconds by shape, format and width."""
    return {
        (row["shape"], row["kind"], row["width"]): us
        for row in rows
        if row["name"] == name and (us := _median(row.get("kernel_us"))) is not None
    }


def _widening(rows: Sequence[Row]) -> Found:
    """What nine rows cost in units of one."""
    ours = _times(rows, "linear")
    for (shape, kind, width), us in ours.items():
        if width == 9 and (shape, kind, 1) in ours:
            yield us / ours[shape, kind, 1], f"{shape} {kind}"


def _beside_bitsandbytes(rows: Sequence[Row]) -> Found:
    """Our time of an nf4 product in units of theirs."""
    theirs = _times(rows, "bitsandbytes.matmul_4bit")
    for (shape, kind, width), us in _times(rows, "linear").items():
        if kind.startswith("nf4") and width <= 16 and (shape, kind, width) in theirs:
            yield us / theirs[shape, kind, width], f"{shape} {kind} M={width}"


def _waits(rows: Sequence[Row]) -> Found:
    for row in rows:
        if row.get("syncs") is not None:
            yield float(row["syncs"]), row["name"]
        if row.get("traced_syncs") is not None:
            yield float(len(row["traced_syncs"])), row["name"]


def _exit_codes(start: str = "") -> Callable[[Sequence[Row]], Found]:
    """Of the runs of tests whose names begin so."""

    def find(rows: Sequence[Row]) -> Found:
        for row in rows:
            if row["name"].startswith(start) and row.get("exit_code") is not None:
                yield float(row["exit_code"]), row["name"]

    return find


def _other_tokens(rows: Sequence[Row]) -> Found:
    """Answers that are not plain decoding's; in other formats than bf16 they may not be."""
    for row in rows:
        if row.get("identical_to_plain") is not None:
            yield float(failed(row)), row["name"]


def _growth(rows: Sequence[Row]) -> Found:
    """Whether many generations left memory taken."""
    for row in rows:
        if row.get("grew") is not None:
            yield float(row["grew"]), row["name"]


def _right(name: str, part: str, find: Callable[[Sequence[Row]], Found]) -> Goal:
    """A goal that is met where nothing is wrong, and not measured where nothing was run."""
    return Goal(name, part, find, 0.0, wrong_too=True)


_AT = {"vocabulary": 128_256, "batch": 1}
GOALS = (
    _right("words, modules and conditional nodes", "probe", _exit_codes()),
    _right("tests of kernels and loops", "tests", _exit_codes()),
    _right("tests of the decision", "tests-decision", _exit_codes()),
    _right("tests of the decoder, every width and batch", "tests-decoder", _exit_codes()),
    _right("a million launches, the decision's kernels", "races", _exit_codes()),
    _right("a million launches, the decoder's kernels", "races-decoder", _exit_codes()),
    _right("memcheck", "sanitizer", _exit_codes("compute-sanitizer memcheck")),
    _right("racecheck", "sanitizer", _exit_codes("compute-sanitizer racecheck")),
    _right("tokens of every loop and policy", "e2e", _other_tokens),
    _right("tokens of every loop and policy, 8B", "e2e-8b", _other_tokens),
    _right("memory after a thousand generations", "audit", _growth),
    Goal("a decision", "loop", _metric("chained draft_step", "kernel_us", **_AT), 5.0, unit="us"),
    Goal(
        "a decision above an argmax, chained",
        "loop",
        _metric("chained draft_step", "above_first_us", **_AT),
        1.0,
        unit="us",
    ),
    Goal(
        "a decision above an argmax, in a draft step",
        "loop",
        _metric("draft step with draft_step", "above_first_us"),
        1.0,
        unit="us",
    ),
    Goal(
        "the argmax above torch.argmax",
        "loop",
        _metric("chained torch.argmax", "above_first_us", -1.0, **_AT),
        0.0,
        unit="us",
    ),
    Goal("the device loop above its forwards", "loop", _above_forwards, 0.03),
    Goal("waits of the host in a generation", "audit", _waits, 0.0, wrong_too=True),
    Goal("share of copy bandwidth, bf16", "linear", _share("bf16"), 0.85, most=False),
    Goal("share of copy bandwidth, int8", "linear", _share("int8"), 0.80, most=False),
    Goal("share of copy bandwidth, nf4", "linear", _share("nf4"), 0.70, most=False),
    Goal("nine rows over one", "linear", _widening, 1.1, unit="x"),
    Goal("nf4 over bitsandbytes, 1 to 16 rows", "linear", _beside_bitsandbytes, 1.0, unit="x"),
    Goal(
        "a forward of Llama-3.2-1B in bf16",
        "forward",
        _metric(
            "forward",
            "kernel_us",
            model="Llama-3.2-1B",
            compression="bf16",
            width=1,
            batch=1,
            context=512,
        ),
        1000.0,
        unit="us",
    ),
)


def table(rows: Sequence[Row]) -> Iterator[str]:
    """A line for each row that has a time or a verdict."""
    for row in rows:
        if "met" in row:
            yield _goal_line(row)
            continue
        said = []
        for key, unit in _TIMES.items():
            value = _median(row.get(key))
            if value is not None:
                said.append(f"{value:,.2f} {unit}")
        if row.get("exit_code"):
            said.append(f"exit code {row['exit_code']}")
        said += [f"{key}: {row[key]}" for key in ("skipped", "cut", "problem") if row.get(key)]
        said += ["FAILED"] * failed(row)
        yield f"{row['name']:36s} {_where(row):48s} {', '.join(said) or 'no time'}"


def _goal_line(row: Row) -> str:
    unit = f" {row['unit']}" * bool(row["unit"])
    limit = f"at {'most' if row['at_most'] else 'least'} {row['limit']:g}{unit}"
    if row["met"] is None:
        return f"{row['name']:60s} {limit:16s} not measured"
    said = "met" if row["met"] else "MISSED"
    where = f" ({row['where'][0]})" * bool(row["where"][0])
    return f"{row['name']:60s} {limit:16s} {said}: {row['measured']:,.3f}{unit}{where}"
