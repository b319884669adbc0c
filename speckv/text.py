"""Token ids to text as they come, and the search for stop texts."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Protocol

_REPLACEMENT = "\N{REPLACEMENT CHARACTER}"


class Detokenizer(Protocol):
    """The one method of a tokenizer that decoding needs."""

    def decode(self, token_ids: list[int], *, skip_special_tokens: bool = ...) -> str: ...


class TextStream:
    """Text of one request, growing token by token.

    A tokenizer may decode a token differently beside its neighbours (leading spaces, characters
    spread over several tokens), so new text is the difference of two decodings of a short window,
    and is held back while it ends inside a character or could be the beginning of a stop text.

    Parameters
    ----------
    tokenizer : Detokenizer
    stop : sequence of str
        Texts that end the request; the text before the first occurrence is kept.
    """

    def __init__(self, tokenizer: Detokenizer, stop: Sequence[str] = ()) -> None:
        self._tokenizer = tokenizer
        self._stop = tuple(stop)
        self._ids: list[int] = []
        self._window = 0  # the window's first token
        self._read = 0  # tokens whose text is in `_text`
        self._text = ""
        self._given = 0  # characters already given out
        self.stopped = False

    @property
    def text(self) -> str:
        """All text so far, up to a stop text."""
        return self._text

    def push(self, tokens: Sequence[int]) -> int:
        """Add tokens until a stop text appears; returns how many were taken."""
        for count, token in enumerate(tokens, 1):
            self._ids.append(token)
            self._extend(final=False)
            if self._find_stop():
                return count
        return len(tokens)

    def take(self, final: bool = False) -> str:
        """Text that was not given out yet; all that is held back too if ``final``."""
        if final and not self.stopped:
            self._extend(final=True)
            self._find_stop()
        end = len(self._text)
        if not (final or self.stopped):
            end -= self._held()
        text = self._text[self._given : end]
        self._given = max(end, self._given)
        return text

    def _extend(self, final: bool) -> None:
        before = self._decode(self._ids[self._window : self._read])
        after = self._decode(self._ids[self._window :])
        if len(after) > len(before) and (final or not after.endswith(_REPLACEMENT)):
            self._text += after[len(before) :]
            self._window, self._read = self._read, len(self._ids)

    def _decode(self, ids: list[int]) -> str:
        return self._tokenizer.decode(ids, skip_special_tokens=True)

    def _find_stop(self) -> bool:
        places = [place for s in self._stop if (place := self._text.find(s)) >= 0]
        if places:
            self._text = self._text[: min(places)]
            self.stopped = True
        return self.stopped

    def _held(self) -> int:
        """Characters at the end that begin a stop text."""
        held = 0
        for stop in self._stop:
            for size in range(min(len(stop) - 1, len(self._text)), held, -1):
                if self._text.endswith(stop[:size]):
                    held = size
                    break
        return held
