"""The decisions of a replay as examples: what a policy knew, and how far the draft would have got.

A controller decides before the first draft token of a step, with the signals of the last step that
drafted, and again after every draft token. Each decision is an example: its features, in the order
of `speckv.kernels.layout`, and which of the next tokens the target accepts. The trace knows that of
all 15, drafted or not.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from ..kernels import layout as at
from ..kernels.layout import GAMMA_MAX
from ..policies.policy import COMPRESSION_INDEX, EMA_WEIGHT
from .replay import Replayed
from .schema import Answer, Trace


@dataclass(frozen=True)
class Decisions:
    """N examples.

    Attributes
    ----------
    features : float32 [N, FEATURES]
    survived : bool [N, GAMMA_MAX]
        Column k: whether at least k + 1 tokens are accepted.
    known : bool [N, GAMMA_MAX]
        False where the recorded text is cut before that could be told.
    prompt : int64 [N]
        Id of the prompt.
    """

    features: np.ndarray
    survived: np.ndarray
    known: np.ndarray
    prompt: np.ndarray

    def __len__(self) -> int:
        return len(self.features)

    def take(self, index: np.ndarray) -> Decisions:
        """The examples at ``index``, or where it is true."""
        return Decisions(**{name: values[index] for name, values in vars(self).items()})


class Explorer:
    """A controller that draws γ anew for each step: geometric, from 1 on.

    Parameters
    ----------
    seed : int
    mean : float
        Of γ, if 15 did not end it.
    """

    def __init__(self, seed: int, mean: float = 3.0) -> None:
        self._seed, self._stop = seed, 1 / mean

    def start(self, answers: Sequence[Answer]) -> None:
        """See `Controller`."""
        self._random = np.random.default_rng(self._seed)

    def begins(self, lanes: np.ndarray, length: np.ndarray, match: np.ndarray) -> np.ndarray:
        """See `Controller`."""
        return np.ones(len(lanes), dtype=bool)

    def goes_on(
        self,
        lanes: np.ndarray,
        length: np.ndarray,
        drafted: int,
        signals: np.ndarray,
        match: np.ndarray,
    ) -> np.ndarray:
        """See `Controller`."""
        more: np.ndarray = self._random.random(len(lanes)) > self._stop
        return more

    def learns(self, lanes: np.ndarray, gamma: np.ndarray, accepted: np.ndarray) -> None:
        """It learns nothing."""


def join_decisions(parts: Sequence[Decisions]) -> Decisions:
    """One after the other.

    Raises
    ------
    ValueError
        There are none.
    """
    if not parts:
        raise ValueError("parts: expected at least one, got none")
    names = vars(parts[0])
    return Decisions(**{name: np.concatenate([getattr(p, name) for p in parts]) for name in names})


def decisions(trace: Trace, replayed: Replayed, *, ahead: int = 0) -> Decisions:
    """Every decision of a replay.

    Parameters
    ----------
    trace : Trace
        Of one compression.
    replayed : Replayed
        What a controller did on it.
    ahead : int
        Decisions after tokens that were not drafted, so many of each step, as if they had been.

    Raises
    ------
    ValueError
        The trace is of several compressions.
    """
    compressions = {answer.compression for answer in trace.answers}
    if len(compressions) > 1:
        raise ValueError(f"trace: expected one compression, got {sorted(compressions)}")
    order = np.argsort(replayed.lane, kind="stable")
    lane, gamma, accepted = (
        values[order] for values in (replayed.lane, replayed.gamma, replayed.accepted)
    )
    row = trace.first[lane] + _places(lane, accepted)
    last, acceptance = _history(lane, gamma, accepted)
    signals = running_features(trace.rows.signals)
    temperature = np.array([answer.temperature for answer in trace.answers])[lane]
    parts = []
    for drafted in range(GAMMA_MAX + 1):
        if drafted:
            reach = np.minimum(gamma + ahead, trace.rows.drafted[row])
            asked = np.flatnonzero((gamma > 0) & (drafted <= reach))
            seen = signals[row[asked], drafted - 1]
        else:
            asked = np.flatnonzero(last >= 0)
            before = last[asked]
            seen = signals[row[before], gamma[before] - 1]
        features = np.zeros((len(asked), at.FEATURES), dtype=np.float32)
        features[:, : at.FEATURE_DRAFTED] = seen
        features[:, at.FEATURE_DRAFTED] = drafted
        features[:, at.FEATURE_ACCEPTANCE] = acceptance[asked]
        features[:, at.FEATURE_MATCH] = trace.match[row[asked], drafted]
        features[:, at.FEATURE_TEMPERATURE] = temperature[asked]
        parts.append((asked, features))
    asked = np.concatenate([each for each, _ in parts])
    features = np.concatenate([each for _, each in parts])
    for compression in compressions:
        features[:, at.FEATURE_COMPRESSION + COMPRESSION_INDEX[compression]] = 1.0
    survived, known = _outcomes(trace, lane[asked], row[asked])
    prompts = np.array([answer.prompt_id for answer in trace.answers], dtype=np.int64)
    return Decisions(features, survived, known, prompts[lane[asked]])


def running_features(signals: np.ndarray) -> np.ndarray:
    """What `StepState.running` holds after each token of a block, acceptance apart.

    Parameters
    ----------
    signals : float32 [R, GAMMA_MAX, SIGNALS]

    Returns
    -------
    float32 [R, GAMMA_MAX, 7]
    """
    entropy, confidence, margin = (
        signals[:, :, i].astype(np.float64) for i in (at.ENTROPY, at.CONFIDENCE, at.MARGIN)
    )
    count = np.arange(1, GAMMA_MAX + 1)
    columns = [
        entropy.cumsum(axis=1) / count,
        np.maximum.accumulate(entropy, axis=1),
        confidence.cumsum(axis=1) / count,
        np.minimum.accumulate(confidence, axis=1),
        entropy,
        confidence,
        margin,
    ]
    return np.stack(columns, axis=-1).astype(np.float32)


def _places(lane: np.ndarray, accepted: np.ndarray) -> np.ndarray:
    """Where each step begins in its answer; the steps of an answer follow one another."""
    produced = np.cumsum(accepted + 1)
    before = np.concatenate(([0], produced[:-1])) if len(lane) else produced
    first = np.flatnonzero(np.diff(lane, prepend=-1))
    of_lane = np.repeat(before[first], np.diff(np.append(first, len(lane))))
    places: np.ndarray = 1 + before - of_lane
    return places


def _history(
    lane: np.ndarray, gamma: np.ndarray, accepted: np.ndarray
) -> tuple[np.ndarray, np.ndarray]:
    """Of each step: the last one before it that drafted, or -1, and the acceptance so far."""
    last = np.full(len(lane), -1, dtype=np.int64)
    acceptance = np.empty(len(lane))
    before, rate, of = -1, at.RUNNING_START[at.ACCEPTANCE], -1
    for i, (own, drafted, kept) in enumerate(
        zip(lane.tolist(), gamma.tolist(), accepted.tolist(), strict=True)
    ):
        if own != of:
            before, rate, of = -1, at.RUNNING_START[at.ACCEPTANCE], own
        last[i], acceptance[i] = before, rate
        if drafted:
            before, rate = i, rate + EMA_WEIGHT * (kept / drafted - rate)
    return last, acceptance


def _outcomes(trace: Trace, lane: np.ndarray, row: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """``survived`` and ``known`` of examples at these rows; see `Decisions`."""
    accepted = trace.rows.accepted[row].astype(np.int64)
    survived = accepted[:, None] > np.arange(GAMMA_MAX)
    limits = np.array([answer.limit for answer in trace.answers], dtype=np.int64)
    cut = trace.lengths >= limits  # by its limit, at the latest; what follows is not recorded
    at_the_end = cut[lane] & (accepted == trace.first[lane + 1] - row)
    known = survived | ~at_the_end[:, None]
    return survived, known
