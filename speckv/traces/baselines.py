"""Other ways to choose γ, as controllers of a replay: what is in use, and what was published.

All draft a token, look at it and then decide on the next one, so that every token they look at is
verified. None sees more than `speckv.traces.replay` shows it. Where a method has a state that
learns, each answer begins with a fresh one unless it says otherwise. Settings are for
`speckv.traces.tuning` to find.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np

from ..kernels import layout as at
from ..kernels.layout import GAMMA_MAX, WIDTH_MAX
from ..policies import CostTable
from .schema import Answer, Trace

_PROBE_EVERY = 16  # steps without a draft token before one is drafted to learn from


class _Memoryless:
    """A controller that drafts in every step and learns nothing."""

    def start(self, answers: Sequence[Answer]) -> None:
        """See `Controller`."""

    def begins(self, lanes: np.ndarray, length: np.ndarray, match: np.ndarray) -> np.ndarray:
        """See `Controller`."""
        return np.ones(len(lanes), dtype=bool)

    def learns(self, lanes: np.ndarray, gamma: np.ndarray, accepted: np.ndarray) -> None:
        """See `Controller`."""


class Static(_Memoryless):
    """The same γ in every step, by task.

    Parameters
    ----------
    by_task : mapping of str to int
    otherwise : int
        γ of the other tasks.
    """

    def __init__(self, by_task: Mapping[str, int], otherwise: int) -> None:
        self._by_task, self._otherwise = by_task, otherwise

    def start(self, answers: Sequence[Answer]) -> None:
        """See `Controller`."""
        gammas = [self._by_task.get(answer.task, self._otherwise) for answer in answers]
        self._gamma = np.array(gammas, dtype=np.int64)

    def begins(self, lanes: np.ndarray, length: np.ndarray, match: np.ndarray) -> np.ndarray:
        """See `Controller`."""
        more: np.ndarray = self._gamma[lanes] > 0
        return more

    def goes_on(
        self,
        lanes: np.ndarray,
        length: np.ndarray,
        drafted: int,
        signals: np.ndarray,
        match: np.ndarray,
    ) -> np.ndarray:
        """See `Controller`."""
        more: np.ndarray = self._gamma[lanes] > drafted
        return more


class Threshold(_Memoryless):
    """Stops after the first token whose signal is on the wrong side of a threshold.

    With the token's probability this is Hugging Face's ``assistant_confidence_threshold``; with
    entropy, SVIP (Zhang et al. 2024, arXiv 2411.18462), which stops once the square root of the
    entropy is above a threshold.

    Parameters
    ----------
    signal : int
        Of `speckv.kernels.layout`: ENTROPY stops above the threshold, the others below it.
    threshold : float
    cap : int
        Most draft tokens.
    """

    def __init__(self, signal: int, threshold: float, cap: int = GAMMA_MAX) -> None:
        self._signal, self._threshold, self._cap = signal, np.float32(threshold), cap

    def goes_on(
        self,
        lanes: np.ndarray,
        length: np.ndarray,
        drafted: int,
        signals: np.ndarray,
        match: np.ndarray,
    ) -> np.ndarray:
        """See `Controller`."""
        value = signals[:, self._signal]
        if self._signal == at.ENTROPY:
            sure: np.ndarray = value <= self._threshold
        else:
            sure = value >= self._threshold
        return sure & (drafted < self._cap)


class Heuristic(_Memoryless):
    """Hugging Face's ``heuristic_transient`` schedule: 2 more after a full acceptance, else 1 less.

    Parameters
    ----------
    first : int
        γ of an answer's first step.
    """

    def __init__(self, first: int) -> None:
        self._first = first

    def start(self, answers: Sequence[Answer]) -> None:
        """See `Controller`."""
        self._gamma = np.full(len(answers), self._first, dtype=np.int64)

    def goes_on(
        self,
        lanes: np.ndarray,
        length: np.ndarray,
        drafted: int,
        signals: np.ndarray,
        match: np.ndarray,
    ) -> np.ndarray:
        """See `Controller`."""
        more: np.ndarray = self._gamma[lanes] > drafted
        return more

    def learns(self, lanes: np.ndarray, gamma: np.ndarray, accepted: np.ndarray) -> None:
        """See `Controller`; γ that the end of a text cut short counts as it is."""
        whole = (accepted == gamma) & (gamma > 0)
        after = np.where(whole, self._gamma[lanes] + 2, np.maximum(self._gamma[lanes] - 1, 1))
        self._gamma[lanes] = np.where(gamma > 0, np.minimum(after, GAMMA_MAX), self._gamma[lanes])


class AdaEdl(_Memoryless):
    """AdaEDL (Agrawal et al. 2024, arXiv 2410.18351): a bound on acceptance from the entropy.

    Stops once ``1 - sqrt(scale · H)``, with the entropy H in nats, is below a threshold. The
    threshold follows the acceptance rate as in Draft & Verify (Zhang et al. 2023, arXiv
    2309.08168): up by a step while the rate is below its aim, else down.

    Parameters
    ----------
    scale : float
    threshold : float
        An answer's first.
    aim : float
        Acceptance rate.
    cap : int
        Most draft tokens.

    Attributes
    ----------
    threshold : float
    """

    _RATE_KEPT, _THRESHOLD_KEPT, _STEP = 0.5, 0.9, 0.01  # β1, β2 and ε of Draft & Verify

    def __init__(self, scale: float, threshold: float, aim: float, cap: int = GAMMA_MAX) -> None:
        self._scale, self.threshold, self._aim, self._cap = scale, threshold, aim, cap

    def start(self, answers: Sequence[Answer]) -> None:
        """See `Controller`."""
        self._threshold = np.full(len(answers), self.threshold)
        self._rate = np.full(len(answers), self._aim)

    def goes_on(
        self,
        lanes: np.ndarray,
        length: np.ndarray,
        drafted: int,
        signals: np.ndarray,
        match: np.ndarray,
    ) -> np.ndarray:
        """See `Controller`."""
        nats = signals[:, at.ENTROPY].astype(np.float64) * math.log(2)
        sure: np.ndarray = 1 - np.sqrt(self._scale * nats) >= self._threshold[lanes]
        return sure & (drafted < self._cap)

    def learns(self, lanes: np.ndarray, gamma: np.ndarray, accepted: np.ndarray) -> None:
        """See `Controller`."""
        own = lanes[gamma > 0]
        share = accepted[gamma > 0] / gamma[gamma > 0]
        self._rate[own] += (1 - self._RATE_KEPT) * (share - self._rate[own])
        step = np.where(self._rate[own] <= self._aim, self._STEP, -self._STEP)
        self._threshold[own] += (1 - self._THRESHOLD_KEPT) * step


@dataclass(frozen=True)
class Prior:
    """What an `OnlineLogistic` begins with.

    Attributes
    ----------
    weight, bias : float
        Acceptance of a token, given all before, is ``sigmoid(weight · logit(confidence) + bias)``.
    mean : float
        Acceptance of a token not yet drafted.
    """

    weight: float
    bias: float
    mean: float

    @classmethod
    def fit(cls, trace: Trace, rounds: int = 20) -> Prior:
        """By maximum likelihood on the tokens of a trace whose predecessors were accepted."""
        rows = trace.rows
        place = np.arange(GAMMA_MAX)
        seen = (place <= rows.accepted[:, None]) & (place < rows.drafted[:, None])
        hit = (place < rows.accepted[:, None])[seen].astype(np.float64)
        x = _logit(rows.signals[:, :, at.CONFIDENCE][seen])
        columns = np.stack([x, np.ones_like(x)], axis=1)
        solution = np.array([1.0, 0.0])
        for _ in range(rounds if len(x) else 0):
            p = _sigmoid(columns @ solution)
            gradient = columns.T @ (hit - p) - 1e-3 * solution
            curvature = (columns * (p * (1 - p))[:, None]).T @ columns + 1e-3 * np.eye(2)
            solution += np.clip(np.linalg.solve(curvature, gradient), -2, 2)
        mean = float((hit.sum() + 1) / (len(hit) + 2))
        return cls(float(solution[0]), float(solution[1]), mean)


class OnlineLogistic:
    """Expected tokens over measured time, from a logistic regression that learns as it decodes.

    In the manner of vLLM's adaptive verification, which predicts a token's acceptance from
    ``logit(max probability)``; here what is uncertain is not drafted in the first place, so no
    draft time is lost. After each token, γ is the one of the most expected tokens per millisecond,
    tokens not yet drafted counting as the running mean of what was predicted.

    Parameters
    ----------
    prior : Prior
    rate : float
        Of stochastic gradient descent.
    cost : CostTable
    carries : bool
        Whether what one answer taught holds for the others too, as in a server: the answers of a
        replay advance side by side, one step at a time, and then share one state. It moves by the
        mean over what a step of all of them showed. Otherwise each answer begins anew.

    Attributes
    ----------
    prior : Prior
    """

    _MEAN_WEIGHT = 0.05

    def __init__(
        self, prior: Prior, rate: float, cost: CostTable, *, carries: bool = False
    ) -> None:
        self.prior, self._rate, self._carries = prior, rate, carries
        self._ms, self._slope = np.array(cost.step_ms), np.array(cost.step_ms_per_context_token)

    def start(self, answers: Sequence[Answer]) -> None:
        """See `Controller`."""
        count = len(answers)
        own = np.arange(count)
        self._owner = np.zeros_like(own) if self._carries else own  # whose state is whose
        self._weight = np.tile([self.prior.weight, self.prior.bias], (count, 1))
        self._mean = np.full(count, self.prior.mean)
        self._x = np.zeros((count, GAMMA_MAX))
        self._survival = np.ones(count)  # of the last token drafted in the step
        self._expected = np.ones(count)  # tokens of the step, if it ended now
        self._plain_run = np.zeros(count, dtype=np.int64)

    def begins(self, lanes: np.ndarray, length: np.ndarray, match: np.ndarray) -> np.ndarray:
        """See `Controller`."""
        self._survival[lanes] = self._expected[lanes] = 1.0
        more: np.ndarray = self._pays(lanes, length, 0) | (self._plain_run[lanes] >= _PROBE_EVERY)
        return more

    def goes_on(
        self,
        lanes: np.ndarray,
        length: np.ndarray,
        drafted: int,
        signals: np.ndarray,
        match: np.ndarray,
    ) -> np.ndarray:
        """See `Controller`."""
        owner = self._owner[lanes]
        x = _logit(signals[:, at.CONFIDENCE])
        self._x[lanes, drafted - 1] = x
        p = self._acceptance(owner, x)
        self._mean += self._MEAN_WEIGHT * self._mean_by(owner, p - self._mean[owner])
        self._survival[lanes] *= p
        self._expected[lanes] += self._survival[lanes]
        return self._pays(lanes, length, drafted)

    def learns(self, lanes: np.ndarray, gamma: np.ndarray, accepted: np.ndarray) -> None:
        """See `Controller`."""
        self._plain_run[lanes] = np.where(gamma > 0, 0, self._plain_run[lanes] + 1)
        for j in range(int(gamma.max(initial=0))):
            seen = (j <= accepted) & (j < gamma)
            owner, x = self._owner[lanes[seen]], self._x[lanes[seen], j]
            error = self._rate * ((j < accepted[seen]) - self._acceptance(owner, x))
            self._weight[:, 0] += self._mean_by(owner, error * x)
            self._weight[:, 1] += self._mean_by(owner, error)

    def _acceptance(self, owner: np.ndarray, x: np.ndarray) -> np.ndarray:
        return _sigmoid(self._weight[owner, 0] * x + self._weight[owner, 1])

    def _mean_by(self, owner: np.ndarray, values: np.ndarray) -> np.ndarray:
        """By owner: the mean of its values, 0 where it has none."""
        count = len(self._owner)
        total = np.bincount(owner, values, minlength=count)
        mean: np.ndarray = total / np.maximum(np.bincount(owner, minlength=count), 1)
        return mean

    def _pays(self, lanes: np.ndarray, length: np.ndarray, drafted: int) -> np.ndarray:
        """Whether some γ above ``drafted`` promises more tokens a millisecond than stopping."""
        ms = self._ms + self._slope * length[:, None]
        further = np.arange(1, WIDTH_MAX - drafted)
        if not len(further):
            return np.zeros(len(lanes), dtype=bool)
        gains = np.cumsum(self._mean[self._owner[lanes], None] ** further, axis=1)
        expected = self._expected[lanes, None] + self._survival[lanes, None] * gains
        beyond = (expected / ms[:, drafted + 1 :]).max(axis=1)
        more: np.ndarray = beyond > self._expected[lanes] / ms[:, drafted]
        return more


def _logit(p: np.ndarray) -> np.ndarray:
    clipped = np.clip(p.astype(np.float64), 1e-6, 1 - 1e-6)
    odds: np.ndarray = np.log(clipped / (1 - clipped))
    return odds


def _sigmoid(x: np.ndarray) -> np.ndarray:
    p: np.ndarray = 1 / (1 + np.exp(-np.clip(x, -60, 60)))
    return p
