"""What one decision costs: the paper's four ``predict`` calls, and the packed MLP, in one run."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from statistics import median
from typing import Any

import numpy as np
import torch
from torch import Tensor

from ..kernels import cpu_step
from ..kernels import layout as at
from ..policies.policy import Policy
from .data import GAMMAS, Floats
from .policy import pack

_WARM_UP = 50


@dataclass(frozen=True)
class DecisionCost:
    """Medians over decisions of either kind, taken in turns.

    Attributes
    ----------
    predict_ms : float
        Four calls of the regressor's ``predict``, one for each γ, as the paper times it.
    packed_ms : float
        `speckv.kernels.cpu_step.best_gamma` on the packed weights: what runs on the CPU.
    decisions : int
        Of each kind.
    same_choice : float
        Share of the decisions in which both choose the same γ.
    """

    predict_ms: float
    packed_ms: float
    decisions: int
    same_choice: float

    @property
    def ratio(self) -> float:
        """How many times cheaper the packed MLP is."""
        return self.predict_ms / self.packed_ms


def time_decisions(regressor: Any, inputs: Floats, decisions: int = 1000) -> DecisionCost:
    """Time both on one thread, on the same rows.

    Parameters
    ----------
    regressor : MLPRegressor
        Fitted.
    inputs : float64 [N, 6]
        Rows as `Steps.inputs`; decision i takes row i modulo N.
    decisions : int
        Of each kind, after a warm-up.
    """
    packed = paper_policy(regressor)
    rows = [0] * at.ROW_WORDS
    predict_ms, packed_ms, same = [], [], 0
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        for i in range(_WARM_UP + decisions):
            row = inputs[i % len(inputs)]
            running = running_features(row)
            packed[at.COMPRESSION] = row[4]
            theirs, theirs_ms = timed(choose, regressor, row)
            ours, ours_ms = timed(cpu_step.best_gamma, packed, rows, running)
            if i >= _WARM_UP:
                predict_ms.append(theirs_ms)
                packed_ms.append(ours_ms)
                same += ours == theirs
    finally:
        torch.set_num_threads(threads)
    return DecisionCost(median(predict_ms), median(packed_ms), decisions, same / decisions)


def paper_policy(regressor: Any) -> Tensor:
    """A fitted regressor as the kernels read it, deciding as the paper does."""
    return Policy(
        "paper",
        at.MODE_MLP,
        gamma_cap=max(GAMMAS),
        mlp=pack(regressor.coefs_, regressor.intercepts_, {}),
        objective=at.OBJECTIVE_TOKENS,
        candidates=GAMMAS,
    ).pack()


def timed(decide: Callable[..., int], *arguments: Any) -> tuple[int, float]:
    """The γ that ``decide`` chooses, and its ms."""
    began = time.perf_counter_ns()
    chosen = decide(*arguments)
    return chosen, (time.perf_counter_ns() - began) / 1e6


def choose(regressor: Any, row: Floats) -> int:
    """The paper's decision: the γ of the most expected tokens, one ``predict`` call for each."""
    best, most = GAMMAS[0], 0.0
    for gamma in GAMMAS:
        asked = row[None].copy()
        asked[0, -1] = gamma
        tokens = float(np.clip(regressor.predict(asked)[0], 0.0, 1.0)) * gamma + 1
        if tokens > most:
            best, most = gamma, tokens
    return best


def running_features(row: Sequence[float] | Floats) -> list[float]:
    """A step's running features with the four signals of ``row``; the MLP reads no others."""
    running = [0.0] * at.RUNNING_WORDS
    places = (at.MEAN_ENTROPY, at.MEAN_CONFIDENCE, at.MAX_ENTROPY, at.MIN_CONFIDENCE)
    for place, value in zip(places, row[:4], strict=True):
        running[place] = float(value)
    return running
