"""A controller that takes the chance of each token from a table with a row for each place."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from .schema import Answer, Trace

_MOST_BIAS = 1.0  # logits


class Adaptive:
    """The rule of the next token, with a bias for each answer that follows what is accepted.

    The bias is added to the logit of every predicted chance. After a step it moves against the
    mistake: by ``rate`` times what was accepted of the step's tokens, less what was predicted. It
    begins at 0 and is never beyond 1 either way.

    Parameters
    ----------
    trace : Trace
    chance : float64 [J, R]
        That token j + 1 and all before it are accepted, known after j tokens, at each row.
    price : float64 [J, R]
        What it has to be worth.
    rate : float
    """

    def __init__(self, trace: Trace, chance: np.ndarray, price: np.ndarray, rate: float) -> None:
        prompts = np.array([len(a.prompt_tokens) for a in trace.answers], dtype=np.int64)
        self._offset, self._rate, self._price = trace.first[:-1] - prompts, rate, price
        clipped = np.clip(chance, 1e-6, 1 - 1e-6)
        self._logit = np.log(clipped / (1 - clipped))

    def start(self, answers: Sequence[Answer]) -> None:
        """See `Controller`."""
        self._bias = np.zeros(len(answers))
        self._row = np.zeros(len(answers), dtype=np.int64)

    def begins(self, lanes: np.ndarray, length: np.ndarray, match: np.ndarray) -> np.ndarray:
        """See `Controller`."""
        self._row[lanes] = self._offset[lanes] + length
        return self._pays(lanes, 0)

    def goes_on(
        self,
        lanes: np.ndarray,
        length: np.ndarray,
        drafted: int,
        signals: np.ndarray,
        match: np.ndarray,
    ) -> np.ndarray:
        """See `Controller`."""
        if drafted >= len(self._logit):
            return np.zeros(len(lanes), dtype=bool)
        return self._pays(lanes, drafted)

    def learns(self, lanes: np.ndarray, gamma: np.ndarray, accepted: np.ndarray) -> None:
        """See `Controller`."""
        mistake = np.zeros(len(lanes))
        for j in range(int(gamma.max(initial=0))):
            mistake += np.where(j < gamma, (j < accepted) - self._chance(lanes, j), 0.0)
        moved = self._bias[lanes] + self._rate * mistake
        self._bias[lanes] = np.clip(moved, -_MOST_BIAS, _MOST_BIAS)

    def _chance(self, lanes: np.ndarray, drafted: int) -> np.ndarray:
        logit = self._logit[drafted, self._row[lanes]] + self._bias[lanes]
        p: np.ndarray = 1 / (1 + np.exp(-logit))
        return p

    def _pays(self, lanes: np.ndarray, drafted: int) -> np.ndarray:
        more: np.ndarray = self._chance(lanes, drafted) > self._price[drafted, self._row[lanes]]
        return more
