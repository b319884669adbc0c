"""Tokens per second, from the timings released with the paper.

Rates are sums of tokens over sums of seconds: what a user waits for. Intervals resample prompts,
because the steps of one prompt are not independent.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np

from . import bootstrap
from .data import COMPRESSIONS, GAMMAS, Floats, Ints, Released, Runs
from .protocol import FIXED4, Protocol, percent

_HUBER = 1.345  # of a residual's standard deviation: 95% efficient where errors are normal
_MAD_TO_SIGMA = 1.4826
_ITERATIONS = 50
# Columns of a prompt's sums at one γ.
_TOKENS, _SECONDS, _STEPS = range(3)


@dataclass(frozen=True)
class CostFit:
    """ms of a step = t_verify_ms + t_draft_ms · γ.

    Attributes
    ----------
    t_draft_ms, t_verify_ms : float
        Of one draft token; of a verification with everything that does not depend on γ.
    largest_error_pct : float
        Of the fit, at the γ where it misses the measured mean step the most.
    """

    t_draft_ms: float
    t_verify_ms: float
    largest_error_pct: float


@dataclass(frozen=True)
class Change:
    """A relative difference in percent, with its interval over prompts."""

    percent: float
    low: float
    high: float


@dataclass(frozen=True, eq=False)
class Throughput:
    """One compression's timings.

    Attributes
    ----------
    tokens_per_second, step_ms, tokens_per_step : float64 [4]
        Measured at each γ of `GAMMAS`.
    predicted_tokens_per_step : float64 [4]
        What the paper's regressor expects on the scored rows.
    chosen : float64 [4]
        Share of the scored rows at which the paper's policy chooses each γ.
    best_share : float64 [4]
        Share of the resamples in which each γ has the most tokens per second.
    cost : CostFit
    paper_policy_vs_fixed4 : Change
        Tokens per second, if each choice yields the tokens and takes the seconds that steps of its
        γ did.
    fixed8_vs_fixed4, fixed8_vs_fixed4_tokens : Change
        γ = 8 over γ = 4, as measured: tokens per second, and tokens per step.
    predicted_policy_vs_fixed4_pct : float
        Tokens per second, if each choice yields the tokens that the regressor expects and takes the
        fitted time.
    """

    tokens_per_second: Floats
    step_ms: Floats
    tokens_per_step: Floats
    predicted_tokens_per_step: Floats
    chosen: Floats
    best_share: Floats
    cost: CostFit
    paper_policy_vs_fixed4: Change
    fixed8_vs_fixed4: Change
    fixed8_vs_fixed4_tokens: Change
    predicted_policy_vs_fixed4_pct: float

    @property
    def best_gamma(self) -> int:
        """The fixed γ with the most tokens per second."""
        return GAMMAS[int(np.argmax(self.tokens_per_second))]


def measure(released: Released, protocol: Protocol) -> dict[str, Throughput]:
    """Tokens per second of each compression, by its name."""
    sums = _prompt_sums(released.runs)
    scored = released.steps.compression[protocol.held_out]
    return {
        name: _measure(
            sums[index],
            fit_cost(_of_compression(released.runs, index)),
            protocol.choice[scored == index],
            protocol.tokens[scored == index],
        )
        for index, name in enumerate(COMPRESSIONS)
    }


def pooled_gain(released: Released) -> Change:
    """Measured tokens per step of γ = 8 over γ = 4, all compressions together."""
    sums = _prompt_sums(released.runs).sum(axis=0)
    return _change(sums, _resampled(sums), lambda s: _fixed8_over_fixed4(s, _STEPS))


def fit_cost(runs: Runs) -> CostFit:
    """Fit the cost of a step to runs of one compression.

    Least squares over γ of each run's mean step, with Huber's weights (iteratively reweighted,
    scale by the median absolute deviation), so that a run that was disturbed counts for less.
    """
    step_ms = 1e3 * runs.seconds / runs.steps
    design = np.column_stack([np.ones(len(runs)), runs.gamma]).astype(np.float64)
    weight: Floats = np.ones(len(runs))
    fitted: Floats = np.zeros(2)
    for _ in range(_ITERATIONS):
        root = np.sqrt(weight)
        before = fitted
        fitted = np.asarray(np.linalg.lstsq(design * root[:, None], step_ms * root)[0])
        residual = np.abs(step_ms - design @ fitted)
        limit = _HUBER * _MAD_TO_SIGMA * np.median(residual)
        if np.allclose(fitted, before, rtol=1e-9) or limit == 0:
            break
        weight = limit / np.maximum(residual, limit)
    errors = []
    for gamma in GAMMAS:
        mean = float(step_ms[runs.gamma == gamma].mean())
        errors.append(abs(percent(float(fitted[0] + fitted[1] * gamma), mean)))
    return CostFit(float(fitted[1]), float(fitted[0]), max(errors))


def _measure(sums: Floats, cost: CostFit, choice: Ints, expected: Floats) -> Throughput:
    """One compression, of ``sums`` [prompts, 4, 3]."""
    total, drawn = sums.sum(axis=0), _resampled(sums)  # [4, 3] and [RESAMPLES, 4, 3]
    chosen = np.bincount(choice, minlength=len(GAMMAS)) / max(len(choice), 1)
    best = _ratio(drawn, _TOKENS, _SECONDS).argmax(axis=1)
    fitted_ms = cost.t_verify_ms + cost.t_draft_ms * np.array(GAMMAS, dtype=np.float64)
    policy_rate = expected.max(axis=1).sum() / fitted_ms[choice].sum()
    fixed4_rate = expected[:, FIXED4].mean() / fitted_ms[FIXED4]
    return Throughput(
        tokens_per_second=_ratio(total, _TOKENS, _SECONDS),
        step_ms=1e3 * _ratio(total, _SECONDS, _STEPS),
        tokens_per_step=_ratio(total, _TOKENS, _STEPS),
        predicted_tokens_per_step=expected.mean(axis=0),
        chosen=chosen,
        best_share=np.bincount(best, minlength=len(GAMMAS)) / len(best),
        cost=cost,
        paper_policy_vs_fixed4=_change(sums, drawn, lambda s: _chosen_over_fixed4(s, chosen)),
        fixed8_vs_fixed4=_change(sums, drawn, lambda s: _fixed8_over_fixed4(s, _SECONDS)),
        fixed8_vs_fixed4_tokens=_change(sums, drawn, lambda s: _fixed8_over_fixed4(s, _STEPS)),
        predicted_policy_vs_fixed4_pct=percent(float(policy_rate), float(fixed4_rate)),
    )


def _prompt_sums(runs: Runs) -> Floats:
    """Sums over runs, float64 [compressions, prompts, 4, 3]; the last axis is ``_TOKENS`` etc."""
    columns = np.column_stack([runs.tokens, runs.seconds, runs.steps])
    place = np.searchsorted(GAMMAS, runs.gamma)
    prompts = int(runs.prompt.max()) + 1
    sums = np.zeros((len(COMPRESSIONS), prompts, len(GAMMAS), columns.shape[1]))
    np.add.at(sums, (runs.compression, runs.prompt, place), columns)
    return sums


def _resampled(sums: Floats) -> Floats:
    """Sums of resampled prompts, float64 [RESAMPLES, 4, 3]."""
    flat = bootstrap.resampled_sums(sums.reshape(len(sums), -1))
    return flat.reshape(len(flat), *sums.shape[1:])


def _change(sums: Floats, drawn: Floats, ratio: Callable[[Floats], Floats]) -> Change:
    """What ``ratio`` of sums [..., 4, 3] says of all prompts, and its interval."""
    low, high = bootstrap.interval(ratio(drawn))
    point = float(ratio(sums.sum(axis=0)))
    return Change(percent(point, 1), percent(low, 1), percent(high, 1))


def _fixed8_over_fixed4(sums: Floats, per: int) -> Floats:
    rate = _ratio(sums, _TOKENS, per)
    return np.asarray(rate[..., GAMMAS.index(8)] / rate[..., FIXED4])


def _chosen_over_fixed4(sums: Floats, chosen: Floats) -> Floats:
    """Tokens per second of a mixture of γ, a share of the steps each, over those of γ = 4."""
    tokens, seconds = _ratio(sums, _TOKENS, _STEPS), _ratio(sums, _SECONDS, _STEPS)
    return np.asarray(
        (tokens @ chosen) / (seconds @ chosen) * seconds[..., FIXED4] / tokens[..., FIXED4]
    )


def _ratio(sums: Floats, column: int, per: int) -> Floats:
    """One column over another; NaN where the other is 0."""
    with np.errstate(invalid="ignore"):
        return np.asarray(sums[..., column] / sums[..., per])


def _of_compression(runs: Runs, index: int) -> Runs:
    rows = runs.compression == index
    return Runs(*(column[rows] for column in vars(runs).values()))
