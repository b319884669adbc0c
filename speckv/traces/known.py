"""What is known where a decision is made, beside the signals of the step: columns for tries.

Every row of a trace is a place where a step may begin. What is known there after each number of
draft tokens does not depend on the steps before it, so that γ of a row can be decided for all rows
at once. The past of the steps (the last one's signals, the acceptance so far) has a stand-in that
needs no steps: the draft reads every committed token, so what it would have proposed at each place,
and whether that came, is known whatever was drafted.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np

from ..kernels import layout as at
from ..policies.policy import COMPRESSION_INDEX, EMA_WEIGHT
from .decisions import running_features
from .schema import Trace

MOST = 8
"""Draft tokens of a step; the best fixed γ of pairs in use are well below."""

_PRIOR_WEIGHT = 10.0  # tokens that the mean counts for in a token's own rate

SIGNALS, ENTROPY, CONFIDENCE = "signals", "entropy", "confidence"
SURVIVAL, DRAWN, HISTORY = "survival", "drawn", "history"
TARGET, PRIOR, MATCH, PLACE = "target", "prior", "match", "place"
EVERYTHING = (SIGNALS, SURVIVAL, DRAWN, HISTORY, TARGET, PRIOR, MATCH, PLACE)

INFORMATION: Mapping[str, tuple[str, ...]] = {
    "the draft's entropy": (ENTROPY,),
    "the draft's confidence": (CONFIDENCE,),
    "the draft's signals": (SIGNALS,),
    "signals, product of confidences": (SIGNALS, SURVIVAL),
    "signals, the drawn token's probability": (SIGNALS, DRAWN),
    "signals, target's entropy and margin": (SIGNALS, TARGET),
    "signals, acceptance after each token id": (SIGNALS, PRIOR),
    "signals, agreement with a match": (SIGNALS, MATCH),
    "signals, place in the answer": (SIGNALS, PLACE),
    "signals, how the draft did so far": (SIGNALS, HISTORY),
    "signals, match, how the draft did so far": (SIGNALS, MATCH, HISTORY),
    "all of these": EVERYTHING,
}
"""Information by name; all are judged with the rule of the next token."""


class Rates:
    """How often a draft began after each token id, and how often its first token was accepted.

    Parameters
    ----------
    trace : Trace
        What is counted.
    fold : int64 [R]
        Of each of its rows: what is asked of a row of the trace is counted on the other folds.
    size : int
        Above all token ids.
    """

    def __init__(self, trace: Trace, fold: np.ndarray, size: int) -> None:
        later = ~begins(trace)
        after = np.roll(trace.rows.target_token, 1)[later]
        hit = (trace.rows.accepted > 0)[later]
        place = fold[later] * size + after
        folds = int(fold.max(initial=0)) + 1
        counts = np.stack(
            [np.bincount(place, weight, minlength=folds * size) for weight in (None, hit)], axis=1
        ).reshape(folds, size, 2)
        self._own = counts.sum(axis=0) - counts  # by fold
        self._all = counts.sum(axis=0)

    def of(self, tokens: np.ndarray, fold: np.ndarray | None) -> np.ndarray:
        """Acceptance after ids [R, C], float64 [R, C], of rows of these folds or of none."""
        if fold is None:
            table, found = self._all[None], self._all[tokens]
        else:
            table, found = self._own, self._own[fold[:, None], tokens]
        counts, hits = table.sum(axis=1).T
        mean = hits / np.maximum(counts, 1)
        prior = mean[0] if fold is None else mean[fold][:, None]
        rates: np.ndarray = (found[..., 1] + _PRIOR_WEIGHT * prior) / (
            found[..., 0] + _PRIOR_WEIGHT
        )
        return rates


def begins(trace: Trace) -> np.ndarray:
    """Whether a row is the first of its answer: bool [R]."""
    first = np.zeros(len(trace.rows), dtype=bool)
    first[trace.first[:-1]] = True
    return first


@dataclass(frozen=True)
class Known:
    """What is known in each row of a trace after j = 0..MOST draft tokens.

    Attributes
    ----------
    columns : mapping of str to float32 [MOST + 1, R, C]
    accepted : int64 [R]
    compression : int64 [R]
        As the γ-MLP's one-hot counts them.
    """

    columns: Mapping[str, np.ndarray]
    accepted: np.ndarray
    compression: np.ndarray

    @classmethod
    def of(cls, trace: Trace, rates: Rates, fold: np.ndarray | None = None) -> Known:
        """``fold``: of each row, if the rates were counted on them."""
        rows = trace.rows
        first = begins(trace)

        def before(values: np.ndarray) -> np.ndarray:
            """Of the row before, whose token is committed; 0 where there is none."""
            return np.where(first, 0, np.roll(values, 1))

        running = running_features(rows.signals)[:, :MOST]
        tokens = np.concatenate(
            [before(rows.target_token)[:, None], rows.draft_tokens[:, :MOST]], axis=1
        )
        hit = rows.accepted > 0
        history = [
            _moving_average(trace, hit),
            before(hit),
            before(rows.signals[:, 0, at.ENTROPY]),
            before(rows.signals[:, 0, at.CONFIDENCE]),
        ]
        drawn = rows.signals[:, :MOST, at.TOKEN_PROBABILITY]
        target = [before(rows.target_entropy), before(rows.target_margin)]
        answers = np.repeat(np.arange(len(trace.answers)), trace.lengths)
        place = np.arange(len(rows)) - trace.first[answers]
        columns = {
            SIGNALS: _after(running),
            ENTROPY: _after(running[:, :, at.LAST_ENTROPY, None]),
            CONFIDENCE: _after(running[:, :, at.LAST_CONFIDENCE, None]),
            SURVIVAL: _after(_product(rows.signals[:, :MOST, at.CONFIDENCE])),
            DRAWN: _after(np.concatenate([drawn[:, :, None], _product(drawn)], axis=2)),
            HISTORY: _throughout(history),
            TARGET: _throughout(target),
            PRIOR: rates.of(np.maximum(tokens, 0), fold).T[:, :, None],
            MATCH: trace.match[:, : MOST + 1].T[:, :, None],
            PLACE: _throughout([place]),
        }
        index = np.array([COMPRESSION_INDEX[a.compression] for a in trace.answers])
        return cls(
            {name: values.astype(np.float32) for name, values in columns.items()},
            rows.accepted.astype(np.int64),
            index[answers],
        )

    def inputs(self, names: Sequence[str]) -> np.ndarray:
        """Float32 [MOST + 1, R, C]; first the number of draft tokens and the compression."""
        shape = MOST + 1, len(self.accepted), 1
        count = np.arange(MOST + 1, dtype=np.float32)[:, None, None]
        index = self.compression.astype(np.float32)[None, :, None]
        always = [np.broadcast_to(values, shape) for values in (count, index)]
        return np.concatenate([*always, *(self.columns[name] for name in names)], axis=2)


def _moving_average(trace: Trace, hit: np.ndarray) -> np.ndarray:
    """Of the rows before each in its answer, as of a policy's acceptance: float64 [R]."""
    found = np.full(len(hit), float(at.RUNNING_START[at.ACCEPTANCE]))
    lengths = trace.lengths
    for place in range(1, int(lengths.max(initial=0))):
        row = trace.first[:-1][lengths > place] + place
        found[row] = found[row - 1] + EMA_WEIGHT * (hit[row - 1] - found[row - 1])
    return found


def _product(p: np.ndarray) -> np.ndarray:
    """Log of the product of probabilities [R, MOST] so far: [R, MOST, 1]."""
    total: np.ndarray = np.log(np.maximum(p, 1e-6)).cumsum(axis=1)[:, :, None]
    return total


def _after(values: np.ndarray) -> np.ndarray:
    """[MOST + 1, R, C] of [R, MOST, C]: zeros before the first draft token."""
    moved = values.transpose(1, 0, 2)
    return np.concatenate([np.zeros_like(moved[:1]), moved])


def _throughout(columns: Sequence[np.ndarray]) -> np.ndarray:
    """[MOST + 1, R, C] of C columns [R]: the same after any number of draft tokens."""
    return np.tile(np.stack(columns, axis=1), (MOST + 1, 1, 1))
