"""The conversation of ``speckv chat``: turns, slash commands, and what is remembered."""

from __future__ import annotations

import sys
from typing import TYPE_CHECKING

from ._cli_output import show_stats
from ._cli_run import follow
from .errors import SpeckvError

if TYPE_CHECKING:
    from rich.console import Console

    from .engine import Engine
    from .results import Chunk, Result
    from .sampling import SamplingParams

_COMMANDS = "/reset starts over, /stats shows the last answer's statistics, /exit leaves"


def write_chunk(chunk: Chunk) -> None:
    """Show a chunk's text at once."""
    sys.stdout.write(chunk.text)
    sys.stdout.flush()


class Conversation:
    """One multi-turn chat; what is said so far, and the last answer's statistics.

    Parameters
    ----------
    engine : Engine
        A loaded engine.
    params : SamplingParams
        Used for every answer.
    system : str or None
        System message, kept over ``/reset``.
    console : rich.console.Console
        Where everything but the answers goes.
    """

    def __init__(
        self, engine: Engine, params: SamplingParams, system: str | None, console: Console
    ) -> None:
        self._engine = engine
        self._params = params
        self._console = console
        self._opening = [{"role": "system", "content": system}] if system else []
        self._messages = list(self._opening)
        self._last: Result | None = None

    def run(self) -> None:
        """Read and answer lines until ``/exit`` or the end of input."""
        self._console.print(f"{_COMMANDS}; Ctrl-C stops an answer", style="dim", markup=False)
        while True:
            try:
                line = input("> ").strip()
            except EOFError:
                return
            except KeyboardInterrupt:
                self._console.print("\n/exit or Ctrl-D leaves", style="dim", markup=False)
                continue
            if line == "/exit":
                return
            if line.startswith("/"):
                self._command(line)
            elif line:
                self._answer(line)

    def _command(self, line: str) -> None:
        if line == "/reset":
            self._messages = list(self._opening)
            self._console.print("the conversation starts over", style="dim")
        elif line != "/stats":
            self._console.print(f"unknown command {line}: {_COMMANDS}", markup=False)
        elif self._last is None:
            self._console.print("no answer yet", style="dim")
        else:
            show_stats(self._console, self._last.stats.to_dict())

    def _answer(self, line: str) -> None:
        asked = [*self._messages, {"role": "user", "content": line}]
        try:
            self._last = follow(self._engine.stream(asked, self._params, chat=True), write_chunk)
        except (SpeckvError, ValueError) as error:
            # Most likely the conversation has outgrown the context: /reset mends that.
            self._console.print(f"error: {error}", markup=False)
            return
        except KeyboardInterrupt:
            self._console.print("\nstopped", style="dim")
            return
        sys.stdout.write("\n")
        sys.stdout.flush()
        if self._last.finish_reason != "stop":
            self._console.print(f"[{self._last.finish_reason}]", style="dim", markup=False)
        self._messages = [*asked, {"role": "assistant", "content": self._last.text}]
