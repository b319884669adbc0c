"""Running one generation, or several side by side, with Ctrl-C kept to the text it stops."""

from __future__ import annotations

from collections.abc import Callable, Generator, Iterator
from dataclasses import dataclass
from statistics import median
from typing import TYPE_CHECKING, Any

from ._cli_output import progress_bar
from .errors import SpeckvError

if TYPE_CHECKING:
    from rich.console import Console

    from .engine import Engine, Prompt
    from .results import Chunk, Result
    from .sampling import SamplingParams

PLAIN, FIXED4 = "fixed:0", "fixed:4"


def follow(stream: Iterator[Chunk], on_chunk: Callable[[Chunk], None]) -> Result:
    """Consume a stream and return its result.

    A Ctrl-C inside the engine makes it end the stream with the text so far. One that arrives
    outside, while a chunk is being shown, is handed to the engine for the same treatment.

    Raises
    ------
    SpeckvError
        The stream ended without a result.
    KeyboardInterrupt
        A second Ctrl-C.
    """
    chunk: Chunk | None = None
    try:
        for chunk in stream:
            on_chunk(chunk)
    except KeyboardInterrupt as interrupt:
        if chunk is None or chunk.result is None:
            if not isinstance(stream, Generator):
                raise
            chunk = stream.throw(interrupt)
            on_chunk(chunk)
    if chunk is None or chunk.result is None:
        raise SpeckvError("the stream ended without a result")
    return chunk.result


@dataclass(frozen=True)
class Comparison:
    """Tokens per second of a policy beside plain decoding and a fixed γ of 4.

    Parameters
    ----------
    this, plain, fixed4 : float
        Median tokens/s over the rounds.
    ratio_to_plain, ratio_to_fixed4 : float
        Median over the rounds of this policy's tokens/s over the other's in the same round.
    runs : int
        Rounds measured.
    identical : bool or None
        Whether every run of every policy gave the same tokens; ``None`` under rejection sampling,
        which promises the same distribution and not the same tokens.
    """

    this: float
    plain: float
    fixed4: float
    ratio_to_plain: float
    ratio_to_fixed4: float
    runs: int
    identical: bool | None

    def to_dict(self) -> dict[str, Any]:
        """The JSON form."""
        return dict(vars(self))


def compare(
    engine: Engine,
    prompt: Prompt,
    params: SamplingParams,
    *,
    chat: bool,
    policy: str,
    runs: int,
    expected: list[int],
    console: Console,
) -> Comparison:
    """Measure ``policy`` beside plain decoding and ``fixed:4``, interleaved.

    Each is warmed up once. Then every round runs all three, starting with another one each time, so
    that a slow minute of the machine or an order effect falls on all of them alike.

    Parameters
    ----------
    engine : Engine
        A loaded engine.
    prompt, params, chat
        As for ``engine.generate``.
    policy : str
        The policy to compare.
    runs : int
        Measured rounds, at least 1.
    expected : list of int
        Token ids of an earlier run of ``policy``, which all others must repeat.
    console : rich.console.Console
        Where the progress bar is drawn.

    Raises
    ------
    KeyboardInterrupt
        Ctrl-C, whether the engine raised it or reported an interrupted result.
    """
    contenders = (policy, PLAIN, FIXED4)
    same_tokens = params.temperature == 0 or params.coupling == "gumbel"
    speeds: list[list[float]] = [[], [], []]
    identical = True
    with progress_bar(console, "comparing", (runs + 1) * len(contenders)) as advance:
        for index in range(runs + 1):
            for offset in range(len(contenders)):
                i = (index + offset) % len(contenders)
                result = engine.generate(prompt, params, chat=chat, policy=contenders[i])
                if result.finish_reason == "interrupted":
                    raise KeyboardInterrupt
                identical = identical and list(result.token_ids) == expected
                if index > 0:
                    speeds[i].append(result.stats.tokens_per_second)
                advance(1)
    this, plain, fixed4 = speeds
    return Comparison(
        this=median(this),
        plain=median(plain),
        fixed4=median(fixed4),
        ratio_to_plain=_median_ratio(this, plain),
        ratio_to_fixed4=_median_ratio(this, fixed4),
        runs=runs,
        identical=identical if same_tokens else None,
    )


def show_comparison(console: Console, comparison: Comparison, policy: str) -> None:
    """Print a comparison: speeds, ratios, and whether the tokens agree."""
    from rich.table import Table

    rounds = "round" if comparison.runs == 1 else "rounds"
    table = Table(box=None, padding=(0, 2, 0, 0), title_justify="left", header_style="dim")
    table.add_column(f"median of {comparison.runs} {rounds}")
    table.add_column("tokens/s", justify="right")
    table.add_column(f"{policy} is", justify="right")
    table.add_row(policy, f"{comparison.this:.1f}", "")
    table.add_row(
        f"plain ({PLAIN})", f"{comparison.plain:.1f}", f"{comparison.ratio_to_plain:.2f}x"
    )
    table.add_row(FIXED4, f"{comparison.fixed4:.1f}", f"{comparison.ratio_to_fixed4:.2f}x")
    console.print(table)
    if comparison.identical is None:
        console.print("rejection sampling: same distribution, so tokens are not compared")
    elif comparison.identical:
        console.print("tokens are identical under all three")


def _median_ratio(ours: list[float], theirs: list[float]) -> float:
    return median(a / b if b else float("nan") for a, b in zip(ours, theirs, strict=True))
