"""Token ids to text as they come, and the search for stop texts."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Protocol

_REPLACEMENT = "\N{REPLACEMENT CHARACTER}"
_UNREAD_MAX = 16  # tokens without text of their own; a character takes four at most


class Detokenizer(Protocol):
    """The one method of a tokenizer that decoding needs."""

    def decode(self, token_ids: list[int], *, skip_special_tokens: bool = ...) -> str: ...


class TextStream:
    """Text of one request, growing token by token; the work is linear in the tokens.

    A tokenizer may decode a token differently beside its neighbours (leading spaces, characters
    spread over several tokens), so new text is the difference of two decodings of a short window:
    the tokens that gave the last piece of text, and those that gave none yet. It is held back while
    it ends inside a character or could be the beginning of a stop text.

    The window is bounded. Tokens that give no text (special ones) leave it, and what is still no
    character after sixteen tokens is bytes that never become one, and is taken as it stands.

    Parameters
    ----------
    tokenizer : Detokenizer
    stop : sequence of str
        Texts that end the request; the text before the first occurrence is kept.
    """

    def __init__(self, tokenizer: Detokenizer, stop: Sequence[str] = ()) -> None:
        self._tokenizer = tokenizer
        self._stop = tuple(stop)
        self._ids: list[int] = []  # the window
        self._read = 0  # its first tokens, whose text is known
        self._read_text = ""
        self._given: list[str] = []
        self._rest = ""  # text that was not given out yet
        self.stopped = False

    @property
    def text(self) -> str:
        """All text so far, up to a stop text."""
        return "".join(self._given) + self._rest

    def push(self, tokens: Sequence[int]) -> int:
        """Add tokens until a stop text appears; returns how many were taken."""
        for count, token in enumerate(tokens, 1):
            self._ids.append(token)
            self._extend(final=False)
            if self.stopped:
                return count
        return len(tokens)

    def take(self, final: bool = False) -> str:
        """Text that was not given out yet; all that is held back too if ``final``."""
        if final and not self.stopped:
            self._extend(final=True)
        held = 0 if final or self.stopped else self._held()
        end = len(self._rest) - held
        text, self._rest = self._rest[:end], self._rest[end:]
        self._given.append(text)
        return text

    def _extend(self, final: bool) -> None:
        text = self._decode()
        stuck = len(self._ids) - self._read >= _UNREAD_MAX
        if len(text) <= len(self._read_text):
            if stuck:
                del self._ids[self._read :]
        elif final or stuck or not text.endswith(_REPLACEMENT):
            self._append(text[len(self._read_text) :])
            del self._ids[: self._read]
            self._read = len(self._ids)
            self._read_text = self._decode()

    def _decode(self) -> str:
        return self._tokenizer.decode(self._ids, skip_special_tokens=True)

    def _append(self, new: str) -> None:
        """Add to the text, and cut it at a stop text, which must end in what is new."""
        before = len(self._rest)
        self._rest += new
        first = (self._rest.find(s, max(before - len(s) + 1, 0)) for s in self._stop)
        places = [place for place in first if place >= 0]
        if places:
            self._rest = self._rest[: min(places)]
            self.stopped = True

    def _held(self) -> int:
        """Characters at the end that begin a stop text."""
        held = 0
        for stop in self._stop:
            for size in range(min(len(stop) - 1, len(self._rest)), held, -1):
                if self._rest.endswith(stop[:size]):
                    held = size
                    break
        return held
