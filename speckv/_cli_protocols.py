"""What the command line needs of an engine, and no more: the seam its tests replace."""

from __future__ import annotations

from collections.abc import Generator, Sequence
from typing import TYPE_CHECKING, Any, Protocol

if TYPE_CHECKING:
    from .sampling import SamplingParams


class StatsLike(Protocol):
    """Statistics of one generation."""

    @property
    def tokens_per_second(self) -> float: ...

    def to_dict(self) -> dict[str, Any]: ...


class ResultLike(Protocol):
    """One finished or interrupted generation; ``token_ids`` are the new tokens only."""

    @property
    def text(self) -> str: ...

    @property
    def token_ids(self) -> Sequence[int]: ...

    @property
    def finish_reason(self) -> str: ...

    @property
    def stats(self) -> StatsLike: ...


class ChunkLike(Protocol):
    """What a stream yields: a delta of text and tokens; the last one carries the result."""

    @property
    def text(self) -> str: ...

    @property
    def token_ids(self) -> Sequence[int]: ...

    @property
    def result(self) -> Any: ...


class EngineLike(Protocol):
    """A loaded engine, as ``Engine.from_pretrained`` returns it."""

    @property
    def tokenizer(self) -> Any: ...

    def warmup(self) -> None: ...

    def describe(self) -> str: ...

    def generate(
        self,
        prompt: str | list[int],
        params: SamplingParams,
        *,
        chat: bool = ...,
        policy: str | None = ...,
    ) -> Any: ...

    def stream(
        self,
        prompt: str | list[int],
        params: SamplingParams,
        *,
        chat: bool = ...,
        policy: str | None = ...,
    ) -> Generator[Any, None, None]: ...
