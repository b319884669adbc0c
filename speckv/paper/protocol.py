"""The paper's evaluation (arXiv 2605.02888), step by step, and controls of it.

A regressor learns the acceptance rate from six inputs (`Steps.inputs`): scikit-learn's
``MLPRegressor`` with 16 ReLU units, not standardised, 500 iterations, ``random_state=42``. Its
quality is measured on a held-out fifth, stratified by compression and task, with predictions
clipped to [0, 1]. It is then refitted on *all* rows, and on the held-out rows every policy is
scored by the regressor itself: γ is worth ``clip(rate, 0, 1)·γ + 1`` tokens a step. SpecKV takes
the best of γ = 2, 4, 6, 8; its rival is γ = 4.

The controls ask what that shows. Labels are shuffled; prompts, not steps, are held out; and the
signals are those of the step before, which is what a policy can know before it drafts.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from importlib import import_module
from typing import Any

import numpy as np

from ..errors import SpeckvError
from .data import COMPRESSIONS, GAMMAS, SIGNALS, Floats, Ints, Released, Steps

FIXED4 = GAMMAS.index(4)
_SEED = 42
_LEAST = 10  # steps of a stratum: the held-out fifth has some of each
_SHUFFLES = 10
_FOLDS = 5


@dataclass(frozen=True, eq=False)
class Protocol:
    """What the protocol yields.

    Attributes
    ----------
    held_out : int64 [M]
        Rows of `Steps` that are scored.
    predicted, actual : float64 [M]
        Clipped predictions of the regressor that has not seen these rows; acceptance rates.
    regressor : Any
        Refitted on all rows.
    tokens : float64 [M, 4]
        Tokens per step that the refitted regressor expects at each γ of `GAMMAS`.
    """

    held_out: Ints
    predicted: Floats
    actual: Floats
    regressor: Any
    tokens: Floats

    @property
    def correlation(self) -> float:
        """Pearson's, of predictions and acceptance rates."""
        return correlation(self.predicted, self.actual)

    @property
    def mse(self) -> float:
        """Mean squared error of the predictions."""
        return float(np.mean((self.predicted - self.actual) ** 2))

    @property
    def choice(self) -> Ints:
        """SpecKV's γ at each scored row, int64 [M], as an index into `GAMMAS`."""
        return np.asarray(self.tokens.argmax(axis=1), dtype=np.int64)

    @property
    def fixed4(self) -> Floats:
        """Expected tokens per step at γ = 4, float64 [M]."""
        return self.tokens[:, FIXED4]

    @property
    def speckv(self) -> Floats:
        """Expected tokens per step at the chosen γ, float64 [M]."""
        return np.asarray(self.tokens.max(axis=1), dtype=np.float64)


@dataclass(frozen=True)
class Controls:
    """The protocol's measures where they should be low, or where a policy could act on them.

    Attributes
    ----------
    shuffled_correlations : tuple of float
        With labels shuffled before the split, one for each shuffle; the first has the protocol's
        own seed.
    shuffled_improvements_pct : tuple of float
        SpecKV over Fixed-4 by the protocol, scored by a regressor fitted to shuffled labels.
    by_prompt_correlation : float
        Every prompt predicted by a regressor that has seen none of its steps.
    causal_correlation : float
        The same, from the signals of the run's previous step; first steps left out.
    """

    shuffled_correlations: tuple[float, ...]
    shuffled_improvements_pct: tuple[float, ...]
    by_prompt_correlation: float
    causal_correlation: float


def new_regressor() -> Any:
    """The paper's regressor, not yet fitted.

    Raises
    ------
    SpeckvError
        scikit-learn is not installed.
    """
    regressor = _of_sklearn("neural_network", "MLPRegressor")
    return regressor(hidden_layer_sizes=(16,), max_iter=500, random_state=_SEED)


def split(steps: Steps) -> tuple[Ints, Ints]:
    """Rows to fit and the held-out fifth, stratified by compression and task.

    Raises
    ------
    SpeckvError
        scikit-learn is not installed.
    ValueError
        Too few steps of a compression and task to be split.
    """
    strata, counts = np.unique(steps.strata, return_counts=True)
    if counts.min() < _LEAST:
        raise ValueError(
            f"steps: expected at least {_LEAST} of each compression and task,"
            f" got {counts.min()} of {strata[counts.argmin()]}"
        )
    fit, held_out = _of_sklearn("model_selection", "train_test_split")(
        np.arange(len(steps)), test_size=0.2, random_state=_SEED, stratify=steps.strata
    )
    return fit, held_out


def evaluate(steps: Steps) -> Protocol:
    """Run the protocol."""
    fit, held_out = split(steps)
    inputs, labels = steps.inputs, steps.acceptance
    predicted = _rates(new_regressor().fit(inputs[fit], labels[fit]), inputs[held_out])
    final = new_regressor().fit(inputs, labels)
    tokens = expected_tokens(final, inputs[held_out])
    return Protocol(held_out, predicted, labels[held_out], final, tokens)


def expected_tokens(regressor: Any, inputs: Floats) -> Floats:
    """``clip(rate, 0, 1)·γ + 1`` at each γ of `GAMMAS`, whatever γ the rows of ``inputs`` had.

    Returns
    -------
    float64 [rows, 4]
    """
    columns = []
    for gamma in GAMMAS:
        asked = inputs.copy()
        asked[:, -1] = gamma
        columns.append(_rates(regressor, asked) * gamma + 1)
    return np.column_stack(columns)


def control(released: Released) -> Controls:
    """Run the controls."""
    steps = released.steps
    inputs, labels = steps.inputs, steps.acceptance
    fit, held_out = split(steps)
    shuffled_correlations, shuffled_improvements = [], []
    for seed in (_SEED, *range(_SHUFFLES))[:_SHUFFLES]:
        shuffled = np.random.default_rng(seed).permutation(labels)
        predicted = _rates(new_regressor().fit(inputs[fit], shuffled[fit]), inputs[held_out])
        shuffled_correlations.append(correlation(predicted, shuffled[held_out]))
        tokens = expected_tokens(new_regressor().fit(inputs, shuffled), inputs[held_out])
        best, fixed4 = float(tokens.max(axis=1).mean()), float(tokens[:, FIXED4].mean())
        shuffled_improvements.append(percent(best, fixed4))

    later = np.flatnonzero(steps.step > 0)
    causal = inputs[later].copy()
    causal[:, : len(SIGNALS)] = steps.signals[later - 1]
    prompts = released.prompt_of_step
    return Controls(
        tuple(shuffled_correlations),
        tuple(shuffled_improvements),
        _by_prompt(inputs, labels, prompts),
        _by_prompt(causal, labels[later], prompts[later]),
    )


def signal_correlations(steps: Steps) -> dict[str, float]:
    """Pearson's correlation of each signal with the acceptance rate, over all steps."""
    return {
        name: correlation(steps.signals[:, column], steps.acceptance)
        for column, name in enumerate(SIGNALS)
    }


def table(steps: Steps, protocol: Protocol, *, by_task: bool) -> list[dict[str, Any]]:
    """The paper's Table 2, by compression and task, or its Table 1, by compression and overall.

    Returns
    -------
    list of dict
        ``compression``, ``task`` ("all" where they are pooled), ``fixed4``, ``speckv`` (expected
        tokens per step) and ``improvement_pct``.
    """
    compression, task = steps.compression[protocol.held_out], steps.task[protocol.held_out]
    groups: list[tuple[str, str, Any]] = []
    for c, name in enumerate(COMPRESSIONS):
        if by_task:
            tasks = enumerate(steps.tasks)
            groups += [(name, which, (compression == c) & (task == t)) for t, which in tasks]
        else:
            groups.append((name, "all", compression == c))
    if not by_task:
        groups.append(("all", "all", np.ones(len(task), dtype=bool)))
    return [
        {"compression": name, "task": which, **comparison(protocol, rows)}
        for name, which, rows in groups
        if rows.any()
    ]


def comparison(protocol: Protocol, rows: Any = slice(None)) -> dict[str, float]:
    """Means of Fixed-4 and SpecKV over some scored rows, and the improvement in percent."""
    fixed4, speckv = float(protocol.fixed4[rows].mean()), float(protocol.speckv[rows].mean())
    return {"fixed4": fixed4, "speckv": speckv, "improvement_pct": percent(speckv, fixed4)}


def correlation(first: Floats, second: Floats) -> float:
    """Pearson's; 0 where one of them does not vary."""
    if np.ptp(first) == 0 or np.ptp(second) == 0:
        return 0.0
    return float(np.corrcoef(first, second)[0, 1])


def percent(value: float, base: float) -> float:
    """By how many percent ``value`` is above ``base``."""
    return 100 * (value / base - 1)


def _by_prompt(inputs: Floats, labels: Floats, prompts: Ints) -> float:
    """Correlation of predictions that were made with the prompt held out."""
    names = np.unique(prompts)
    folds: Sequence[Ints] = np.array_split(
        np.random.default_rng(_SEED).permutation(names), min(_FOLDS, len(names))
    )
    predicted = np.empty(len(labels))
    for fold in folds:
        held_out = np.isin(prompts, fold)
        if held_out.all():
            raise ValueError("runs: expected at least 2 different prompts, got 1")
        regressor = new_regressor().fit(inputs[~held_out], labels[~held_out])
        predicted[held_out] = _rates(regressor, inputs[held_out])
    return correlation(predicted, labels)


def _rates(regressor: Any, inputs: Floats) -> Floats:
    return np.clip(np.asarray(regressor.predict(inputs), dtype=np.float64), 0.0, 1.0)


def _of_sklearn(module: str, name: str) -> Any:
    try:
        return getattr(import_module(f"sklearn.{module}"), name)
    except ImportError:
        raise SpeckvError(
            "the paper's predictor needs scikit-learn: pip install 'speckv[train]'"
        ) from None
