"""The policies of `speckv.policies` as controllers of a replay: `decide`, for many rows at once.

Features are folded in the loop's own order of operations and rounded where it rounds. Sums over the
MLP's units may differ from the loop's in their last bits; where that could change a decision, the
loop's own function decides. So replayed decisions are those of the CPU loop.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence

import numpy as np
from torch import Tensor

from ..kernels import cpu_step
from ..kernels import layout as at
from .schema import Answer

Tokens = Callable[[np.ndarray], np.ndarray]

_NEARLY_EQUAL = 1e-4
"""Much more than what orders of summation differ by in values of γ, in tokens."""

_FIRST_PLAIN_RUN = 1  # `verify` after prefill counts as a step without a draft token


class PackedController:
    """A packed policy.

    Parameters
    ----------
    policy : float32 [POLICY_WORDS], on the CPU
    tokens : callable, optional
        Expected tokens of a step by γ, float32 [n, WIDTH_MAX], from features [n, FEATURES]; takes
        the place of the policy's MLP.
    """

    def __init__(self, policy: Tensor, tokens: Tokens | None = None) -> None:
        self._policy = policy
        self._by_mlp = tokens is None
        words = policy.numpy()
        self._header = words[: at.HEADER_WORDS].tolist()
        self._mode = int(self._header[at.MODE])
        self._cap = int(self._header[at.GAMMA_CAP])
        self._values = _Values(words, tokens)

    def start(self, answers: Sequence[Answer]) -> None:
        """See `Controller`."""
        first = np.array(at.RUNNING_START, dtype=np.float32)
        self._running = np.tile(first, (len(answers), 1))
        # A step's outcome is decided on before it is rounded to what is kept.
        self._acceptance = self._running[:, at.ACCEPTANCE].astype(np.float64)
        self._plain_run = np.full(len(answers), _FIRST_PLAIN_RUN, dtype=np.int64)

    def begins(self, lanes: np.ndarray, length: np.ndarray, match: np.ndarray) -> np.ndarray:
        """See `Controller`."""
        if self._cap == 0:
            return np.zeros(len(lanes), dtype=bool)
        more = np.ones(len(lanes), dtype=bool)
        if self._mode != at.MODE_MLP:
            return more
        probe = int(self._header[at.PROBE_EVERY])
        known = self._running[lanes, at.LAST_ENTROPY] >= 0
        if probe > 0:
            known &= self._plain_run[lanes] < probe
        asked = np.flatnonzero(known)
        acceptance = self._acceptance[lanes[asked]]
        more[asked] = self._wants_more(lanes[asked], length[asked], 0, acceptance, match[asked])
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
        self._fold(lanes, drafted, signals)
        if drafted >= self._cap:
            return np.zeros(len(lanes), dtype=bool)
        if self._mode == at.MODE_FIXED:
            return np.ones(len(lanes), dtype=bool)
        threshold = np.float32(self._header[at.THRESHOLD])
        more: np.ndarray
        if self._mode == at.MODE_ENTROPY:
            more = ~(signals[:, at.ENTROPY] > threshold)
        elif self._mode == at.MODE_CONFIDENCE:
            more = ~(signals[:, at.CONFIDENCE] < threshold)
        else:
            acceptance = self._running[lanes, at.ACCEPTANCE].astype(np.float64)
            more = self._wants_more(lanes, length, drafted, acceptance, match)
        return more

    def learns(self, lanes: np.ndarray, gamma: np.ndarray, accepted: np.ndarray) -> None:
        """See `Controller`."""
        drafted = gamma > 0
        self._plain_run[lanes] = np.where(drafted, 0, self._plain_run[lanes] + 1)
        before = self._running[lanes, at.ACCEPTANCE].astype(np.float64)
        share = accepted / np.maximum(gamma, 1)
        after = before + self._header[at.EMA_WEIGHT] * (share - before)
        self._acceptance[lanes] = np.where(drafted, after, before)
        self._running[lanes, at.ACCEPTANCE] = self._acceptance[lanes]

    def _fold(self, lanes: np.ndarray, drafted: int, signals: np.ndarray) -> None:
        """`reference.fold_signals` of the last of ``drafted`` tokens."""
        before = self._running[lanes].astype(np.float64)
        entropy, confidence, margin = (
            signals[:, i].astype(np.float64) for i in (at.ENTROPY, at.CONFIDENCE, at.MARGIN)
        )
        if drafted == 1:
            step = [entropy, entropy, confidence, confidence]
        else:
            share = 1.0 / drafted
            mean, sure = before[:, at.MEAN_ENTROPY], before[:, at.MEAN_CONFIDENCE]
            step = [
                mean + (entropy - mean) * share,
                np.maximum(before[:, at.MAX_ENTROPY], entropy),
                sure + (confidence - sure) * share,
                np.minimum(before[:, at.MIN_CONFIDENCE], confidence),
            ]
        columns = np.stack([*step, entropy, confidence, margin], axis=1)
        self._running[lanes, : at.ACCEPTANCE] = columns

    def _wants_more(
        self,
        lanes: np.ndarray,
        length: np.ndarray,
        drafted: int,
        acceptance: np.ndarray,
        match: np.ndarray,
    ) -> np.ndarray:
        """Whether the best γ is above ``drafted``: bool [n]."""
        if not len(lanes):
            return np.zeros(0, dtype=bool)
        values = self._values(self._running[lanes], drafted, length, acceptance, match)
        here = values[:, : drafted + 1].max(axis=1)
        beyond = values[:, drafted + 1 :].max(axis=1, initial=-math.inf)
        more: np.ndarray = beyond > here
        if not self._by_mlp:
            return more
        for i in np.flatnonzero(_close(here, beyond)):
            running = self._running[lanes[i]].tolist()
            running[at.ACCEPTANCE] = float(acceptance[i])
            rows = [0] * at.ROW_WORDS
            rows[at.DRAFTED], rows[at.LENGTH] = drafted, int(length[i])
            rows[at.MATCH_LENGTH] = int(match[i])
            more[i] = cpu_step.best_gamma(self._policy, rows, running) > drafted
        return more


def _close(a: np.ndarray, b: np.ndarray) -> np.ndarray:
    finite = np.isfinite(a) & np.isfinite(b)
    gap = np.abs(np.where(finite, a, 0.0) - np.where(finite, b, 1.0))
    near: np.ndarray = finite & (gap <= _NEARLY_EQUAL * np.maximum(1.0, np.abs(a)))
    return near


def expected_tokens(survival: np.ndarray) -> np.ndarray:
    """Expected tokens of a step by γ, float32 [n, WIDTH_MAX], from P(accepted >= k) [n, 15]."""
    tokens = np.ones((len(survival), at.WIDTH_MAX), dtype=np.float32)
    tokens[:, 1:] += survival.cumsum(axis=1)
    return tokens


class _Values:
    """The value of each γ by a packed policy; see `reference.decide`.

    ``tokens`` takes the place of its MLP: features [n, FEATURES] to `expected_tokens`.
    """

    def __init__(self, words: np.ndarray, tokens: Tokens | None) -> None:
        def block(start: int, *shape: int) -> np.ndarray:
            values: np.ndarray = words[start : start + math.prod(shape)].reshape(shape)
            return values

        self._tokens = tokens or self._mlp_tokens
        header = words[: at.HEADER_WORDS].tolist()
        self._mean, self._scale = (
            block(at.FEATURE_MEAN, at.FEATURES),
            block(at.FEATURE_SCALE, at.FEATURES),
        )
        self._weight = block(at.HIDDEN_WEIGHT, at.FEATURES, at.HIDDEN).T.copy()
        self._bias = block(at.HIDDEN_BIAS, at.HIDDEN)
        self._output = block(at.OUTPUT_WEIGHT, at.HIDDEN, at.OUTPUTS).T.copy()
        self._output_bias = block(at.OUTPUT_BIAS, at.OUTPUTS)
        self._cost, self._slope = (
            block(at.COST, at.WIDTH_MAX),
            block(at.COST_PER_TOKEN, at.WIDTH_MAX),
        )
        self._temperature = header[at.TEMPERATURE]
        self._one_hot = at.FEATURE_COMPRESSION + int(header[at.COMPRESSION])
        self._paper = int(header[at.MLP_LAYOUT]) == at.LAYOUT_PAPER
        self._expected = header[at.EXPECTED_ACCEPTANCE]
        by_rate = int(header[at.OBJECTIVE]) == at.OBJECTIVE_RATE
        self._rate = np.float32(header[at.RATE]) if by_rate else None
        chosen = int(header[at.CANDIDATES])
        self._barred = np.array([not chosen >> g & 1 for g in range(at.WIDTH_MAX)])

    def __call__(
        self,
        running: np.ndarray,
        drafted: int,
        length: np.ndarray,
        acceptance: np.ndarray,
        match: np.ndarray,
    ) -> np.ndarray:
        """Float32 [n, WIDTH_MAX]; -inf for what may not be chosen."""
        features = np.zeros((len(running), at.FEATURES), dtype=np.float32)
        features[:, : at.FEATURE_DRAFTED] = running[:, : at.FEATURE_DRAFTED]
        features[:, at.FEATURE_DRAFTED] = drafted
        features[:, self._one_hot] = 1.0
        features[:, at.FEATURE_ACCEPTANCE] = acceptance
        features[:, at.FEATURE_MATCH] = match
        features[:, at.FEATURE_TEMPERATURE] = self._temperature
        tokens = self._tokens(features)
        if self._expected > 0:
            trust = np.minimum(acceptance / self._expected, 1.0).astype(np.float32)
            tokens = 1 + (tokens - 1) * trust[:, None]
        if self._rate is not None:
            cost = self._cost + self._slope * length[:, None].astype(np.float32)
            tokens = tokens - self._rate * cost
        values: np.ndarray = np.where(self._barred, -np.inf, tokens)
        return values

    def _mlp_tokens(self, features: np.ndarray) -> np.ndarray:
        hidden = ((features - self._mean) * self._scale) @ self._weight.T + self._bias
        return self._paper_tokens(hidden) if self._paper else self._survival_tokens(hidden)

    def _survival_tokens(self, hidden: np.ndarray) -> np.ndarray:
        logit = np.maximum(hidden, 0) @ self._output.T + self._output_bias
        survival = 1 / (1 + np.exp(-np.clip(logit[:, : at.GAMMA_MAX], -80, 80)))
        return expected_tokens(survival)

    def _paper_tokens(self, hidden: np.ndarray) -> np.ndarray:
        gammas = np.arange(at.WIDTH_MAX, dtype=np.float32)
        by_gamma = np.outer(gammas * self._scale[-1], self._weight[:, -1])  # [16, HIDDEN]
        active = np.maximum(hidden[:, None] + by_gamma, 0)
        rate = active @ self._output[0] + self._output_bias[0]
        tokens: np.ndarray = np.clip(rate, 0, 1) * gammas + 1
        return tokens
