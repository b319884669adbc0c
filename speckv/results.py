"""What a generation returns."""

from __future__ import annotations

from dataclasses import dataclass

from .decoding.stats import Stats


@dataclass(frozen=True)
class Result:
    """One finished request.

    Attributes
    ----------
    text : str
        Of the new tokens, special tokens left out, up to a stop text.
    token_ids : list of int
        New tokens only, the end-of-sequence token included.
    finish_reason : "stop" | "length" | "interrupted"
        An end-of-sequence token or stop text; the length limit; Ctrl-C.
    stats : Stats
    prompt_token_ids : list of int
    seed : int or None
        The seed that was used, for sampled requests.
    """

    text: str
    token_ids: list[int]
    finish_reason: str
    stats: Stats
    prompt_token_ids: list[int]
    seed: int | None


@dataclass(frozen=True)
class Chunk:
    """A piece of a streamed request.

    Attributes
    ----------
    text : str
        New text; may be empty while a character is incomplete.
    token_ids : list of int
        New tokens.
    finish_reason : str or None
        As in `Result`, on the last chunk.
    result : Result or None
        On the last chunk.
    """

    text: str
    token_ids: list[int]
    finish_reason: str | None = None
    result: Result | None = None


class GenerationInterrupted(KeyboardInterrupt):
    """Ctrl-C during `Engine.generate`.

    Attributes
    ----------
    results : list of Result
        Of the prompts that were finished or under way, with the text they had.
    """

    def __init__(self, results: list[Result]) -> None:
        super().__init__("interrupted")
        self.results = results
