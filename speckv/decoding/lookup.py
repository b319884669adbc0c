"""Prompt lookup: a draft without a model, for text that repeats itself.

The tokens that followed the latest occurrences of a sequence's last n tokens, in its own prompt and
output, are offered as draft tokens (Saxena 2023, "Prompt Lookup Decoding"; Fu et al. 2024). n is as
large as finds anything, up to ``max_ngram``; each drafted token belongs to the text that the next
one is looked up by.

Signals. Let m be the occurrences of the matched n tokens and c(t) those that token t followed. The
next token is given the distribution ``p(t) = c(t) / (m + 2/n)``; what has not followed yet counts
as one more token, the less likely the longer the match. Entropy (in bits), confidence, margin and
token probability are those of p, so thresholds mean what they mean for a model: a single occurrence
of three tokens has a confidence of 0.6. The 2 is what SmolLM2-135M's answers ask for: after single
occurrences of 1, 2, 4 and 8 tokens the same token came again in 29%, 47%, 72% and 87% of 554, 246,
25 and 77 cases, where p says 33%, 50%, 67% and 80%.
"""

from __future__ import annotations

import math
import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import NamedTuple

import torch

from ..kernels.layout import SIGNALS, StepState
from ..kernels.lookup import lookup_step

MAX_NGRAM = 15
"""Longest n-gram that can be asked for; memory and time of an index grow with it."""

_UNSEEN = 2.0
"""Occurrences that a token not seen yet counts for, after a match of one token."""

_FORM = re.compile(r"lookup(?::(?P<ngram>[^+]*))?(?:\+(?P<model>.*))?", re.DOTALL)


@dataclass(frozen=True)
class Lookup:
    """How matches are looked for.

    Attributes
    ----------
    max_ngram : int
        Most last tokens that a match repeats.
    min_ngram : int
        Fewest.
    """

    max_ngram: int = 3
    min_ngram: int = 2

    def __post_init__(self) -> None:
        if not 1 <= self.min_ngram <= self.max_ngram <= MAX_NGRAM:
            raise ValueError(
                f"lookup: expected 1 <= min_ngram <= max_ngram <= {MAX_NGRAM}, "
                f"got {self.min_ngram} and {self.max_ngram}"
            )

    @property
    def name(self) -> str:
        """As `parse_draft` reads it, but for ``min_ngram``."""
        return f"lookup:{self.max_ngram}"


def parse_draft(draft: str | None) -> tuple[Lookup | None, str | None]:
    """The lookup that a draft's name asks for, and the name of the model that it leaves.

    ``lookup`` and ``lookup:N`` (n-grams of up to N tokens) leave ``none``, and ``lookup+MODEL`` and
    ``lookup:N+MODEL`` the model; any other name asks for no lookup.

    Raises
    ------
    ValueError
        N is no number or out of range, or what follows the ``+`` is nothing or a lookup again.
    """
    found = None if draft is None else _FORM.fullmatch(draft)
    if found is None:
        return None, draft
    ngram, model = found["ngram"], found["model"]
    if model is not None and (not model or _FORM.fullmatch(model)):
        raise ValueError(f"draft: expected the name of a model after '+', got {draft!r}")
    if ngram is None:
        return Lookup(), model or "none"
    if not re.fullmatch("[0-9]{1,4}", ngram) or not 1 <= int(ngram) <= MAX_NGRAM:
        raise ValueError(
            f"draft: expected an integer from 1 to {MAX_NGRAM} after 'lookup:', got {draft!r}"
        )
    return Lookup(int(ngram), min(int(ngram), Lookup.min_ngram)), model or "none"


class Match(NamedTuple):
    """A token that followed the sequence's last tokens before.

    Attributes
    ----------
    token : int
        The one that followed most often, the latest of them among equals.
    length : int
        How many last tokens were found, n.
    occurrences : int
        How often they were, m.
    agreeing : int
        After how many of them ``token`` followed, c(token).
    signals : tuple of float
        Entropy in bits, confidence, margin, token probability.
    """

    token: int
    length: int
    occurrences: int
    agreeing: int
    signals: tuple[float, float, float, float]


class _Followers:
    """What followed one n-gram; every figure is kept current, so that a match costs O(1)."""

    __slots__ = ("best", "counts", "information", "occurrences", "second")

    def __init__(self) -> None:
        self.counts: dict[int, int] = {}
        self.occurrences = 0
        self.best = -1
        self.second = 0  # the count of the runner-up
        self.information = 0.0  # sum of c log2 c

    def add(self, token: int) -> None:
        most = self.counts.get(self.best, 0)
        before = self.counts.get(token, 0)
        now = self.counts[token] = before + 1
        self.occurrences += 1
        self.information += _information(now) - _information(before)
        if token == self.best:
            return
        if now >= most:
            self.best, self.second = token, most
        else:
            self.second = max(self.second, now)

    def match(self, length: int) -> Match:
        agreeing, rest = self.counts[self.best], _UNSEEN / length
        total = self.occurrences + rest
        confidence = agreeing / total
        entropy = math.log2(total) - (self.information + _information(rest)) / total
        margin = (agreeing - self.second) / total
        signals = (entropy, confidence, margin, confidence)
        return Match(self.best, length, self.occurrences, agreeing, signals)


def _information(count: float) -> float:
    return count * math.log2(count) if count else 0.0


class NgramIndex:
    """What followed each n-gram of a sequence: O(max_ngram) for a token added or looked up.

    Parameters
    ----------
    lookup : Lookup
    tokens : iterable of int
        The sequence to begin with.
    """

    def __init__(self, lookup: Lookup, tokens: Iterable[int] = ()) -> None:
        self._lookup = lookup
        self._followers: dict[tuple[int, ...], _Followers] = {}
        self._tail: list[int] = []  # the last max_ngram tokens
        self.extend(tokens)

    def extend(self, tokens: Iterable[int]) -> None:
        """Append committed tokens."""
        lookup, tail = self._lookup, self._tail
        for token in tokens:
            for n in range(lookup.min_ngram, len(tail) + 1):
                gram = tuple(tail[-n:])
                if gram not in self._followers:
                    self._followers[gram] = _Followers()
                self._followers[gram].add(token)
            tail.append(token)
            if len(tail) > lookup.max_ngram:
                del tail[0]

    def find(self, drafted: Sequence[int] = (), at_least: int = 1) -> Match | None:
        """The longest match of the sequence's last tokens, ``drafted`` ones included.

        Parameters
        ----------
        drafted : sequence of int
            Tokens after the committed ones; nothing is looked up *in* them.
        at_least : int
            A shorter match is none.
        """
        lookup = self._lookup
        last = [*self._tail, *drafted][-lookup.max_ngram :]
        for n in range(len(last), max(lookup.min_ngram, at_least) - 1, -1):
            followers = self._followers.get(tuple(last[-n:]))
            if followers is not None:
                return followers.match(n)
        return None

    def propose(self, limit: int, at_least: int = 1) -> list[Match]:
        """Up to ``limit`` matches, each after the tokens of those before it.

        Parameters
        ----------
        limit : int
        at_least : int
            Length of the first match; the others may be shorter.
        """
        matches: list[Match] = []
        drafted: list[int] = []
        match = self.find(at_least=at_least)
        while match is not None and len(matches) < limit:
            matches.append(match)
            drafted.append(match.token)
            match = self.find(drafted)
        return matches


class Lookups:
    """The indexes of one batch's rows, from its first token to its last.

    Parameters
    ----------
    lookup : Lookup
    prompts : sequence of sequences of int
    limit : int
        Most tokens of one step.
    alone : bool
        Whether nothing else drafts. A draft model is the better one where a match is short, so
        beside one only matches of ``max_ngram`` tokens count.
    """

    def __init__(
        self, lookup: Lookup, prompts: Sequence[Sequence[int]], limit: int, *, alone: bool
    ) -> None:
        self._indexes = [NgramIndex(lookup, prompt) for prompt in prompts]
        self._limit = limit
        self._at_least = lookup.min_ngram if alone else lookup.max_ngram

    def extend(self, row: int, tokens: Sequence[int]) -> None:
        """Append committed tokens of row ``row``."""
        self._indexes[row].extend(tokens)

    def find(self, rows: Sequence[int]) -> dict[int, list[Match]]:
        """What to draft, for those of ``rows`` where something was found."""
        proposals = {b: self._indexes[b].propose(self._limit, self._at_least) for b in rows}
        return {b: matches for b, matches in proposals.items() if matches}


def draft_matches(
    matches: Mapping[int, Sequence[Match]], state: StepState, policy: torch.Tensor
) -> None:
    """`lookup_step` of the matches by row."""
    size, device = state.rows.shape[0], state.rows.device
    width = max(map(len, matches.values()))
    tokens, signals, counts = [[0] * width] * size, [[[0.0] * SIGNALS] * width] * size, [0] * size
    for b, found in matches.items():
        rest = width - len(found)
        tokens[b] = [match.token for match in found] + [0] * rest
        signals[b] = [list(match.signals) for match in found] + [[0.0] * SIGNALS] * rest
        counts[b] = len(found)
    lookup_step(
        torch.tensor(tokens, dtype=torch.int32, device=device),
        torch.tensor(signals, dtype=torch.float32, device=device),
        torch.tensor(counts, dtype=torch.int32, device=device),
        state,
        policy,
    )
