"""The information ceiling: large gradient-boosted models on what the γ-MLP sees.

They are too slow to decide anything while decoding. What they reach in a replay shows how much the
same features could still give a larger model. So that it is none of the weaker data, one set of
models learns from the training prompts of every compression and temperature, on the decisions of
several policies, in rounds: γ drawn at random, then the models' own.

The prompts are in folds. A fold's models learn from the other folds, and the fold's own likelihood
says how many trees they have. What they decide on it is therefore what they decide on prompts that
they have not seen; λ of each compression and temperature is solved on all folds that way. Judged
prompts are decided on by the mean of all folds' models.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from copy import deepcopy
from dataclasses import dataclass
from importlib import import_module
from typing import Any

import numpy as np
import torch

from ..errors import SpeckvError
from ..kernels import layout as at
from ..kernels.layout import GAMMA_MAX, WIDTH_MAX
from ..policies import CostTable
from ..policies.mlp import SHAPES, Mlp
from ..policies.policy import mlp_policy
from .baselines import Static
from .calibration import surprise
from .decisions import Decisions, Explorer, decisions, join_decisions
from .packed import PackedController
from .replay import Replayed, replay
from .schema import Trace

_SETTINGS = {
    "learning_rate": 0.1,
    "max_leaf_nodes": 24,
    "min_samples_leaf": 150,
    "l2_regularization": 10.0,
    "max_features": 0.5,
    "early_stopping": False,
    "random_state": 0,
}
_STRIDE, _MOST_TREES = 15, 300
_FOLDS = 3
_AHEAD = 3
"""Tokens whose acceptance has models of its own; further ones fall off at the last one's rate."""

_ROUNDS = 1  # of gathering decisions under the models themselves
_UNDRAFTED = 2  # decisions learned from beyond those that were taken, in each step


class Boosted:
    """P(the next a tokens are accepted | features), for a = 1.._AHEAD.

    A model for each a and for decisions before the first draft token, which see the last step's
    signals, and another for those after it, which see the step's own.

    Parameters
    ----------
    train, validation : Decisions
        Examples to learn from, and those of other prompts, by whose likelihood the number of trees
        is chosen.

    Raises
    ------
    SpeckvError
        scikit-learn is not installed.
    """

    def __init__(self, train: Decisions, validation: Decisions) -> None:
        try:
            ensemble: Any = import_module("sklearn.ensemble")
        except ImportError:
            raise SpeckvError(
                "boosted policies need scikit-learn: pip install 'speckv[train]'"
            ) from None
        kind = ensemble.HistGradientBoostingClassifier
        self._models = [
            [
                _fit(kind, *(_outcomes(e, later, a) for e in (train, validation)))
                for a in range(_AHEAD)
            ]
            for later in (False, True)
        ]

    def survival(self, features: np.ndarray) -> np.ndarray:
        """Float64 [N, _AHEAD] of features [N, FEATURES], after one number of draft tokens."""
        later = bool(len(features)) and bool(features[0, at.FEATURE_DRAFTED] > 0)
        columns = [
            np.full(len(features), model)
            if isinstance(model, float)
            else model.predict_proba(features)[:, 1]
            for model in self._models[later]
        ]
        return np.minimum.accumulate(np.stack(columns, axis=1), axis=1)


@dataclass(frozen=True)
class _Bag:
    """The mean of some models."""

    parts: Sequence[Boosted]

    def tokens(self, features: np.ndarray) -> np.ndarray:
        """What each γ adds to the tokens of a step that ends now: float32 [n, WIDTH_MAX].

        ``features`` are those of decisions after one number of draft tokens, below which no γ is.
        """
        near = np.mean([part.survival(features) for part in self.parts], axis=0)
        kept = near[:, -1:] / np.maximum(near[:, -2:-1], 1e-9)
        far = near[:, -1:] * kept ** np.arange(1, GAMMA_MAX)
        gains = np.concatenate([near, far], axis=1).cumsum(axis=1)
        drafted = int(features[0, at.FEATURE_DRAFTED])
        tokens = np.full((len(features), WIDTH_MAX), -np.inf, dtype=np.float32)
        tokens[:, drafted] = 0.0
        tokens[:, drafted + 1 :] = gains[:, : GAMMA_MAX - drafted]
        return tokens


class Ceiling:
    """Boosted models of the answers of a trace, and λ of each compression and temperature.

    Parameters
    ----------
    trace : Trace
        Of training prompts, several of them.
    costs : mapping of str to CostTable
        By compression.

    Raises
    ------
    SpeckvError
        scikit-learn is not installed.
    """

    def __init__(self, trace: Trace, costs: Mapping[str, CostTable]) -> None:
        prompts = sorted({answer.prompt_id for answer in trace.answers})
        self._fold = {prompt: place % _FOLDS for place, prompt in enumerate(prompts)}
        self._costs = costs
        keys = dict.fromkeys((a.compression, a.temperature) for a in trace.answers)
        self._cells = {
            key: trace.where(lambda a, key=key: (a.compression, a.temperature) == key)  # type: ignore[misc]
            for key in keys
        }
        self._rates = {key: _static_rate(cell, costs[key[0]]) for key, cell in self._cells.items()}
        seen = [
            decisions(cell, replay(cell, Explorer(seed), costs[key[0]]))
            for seed, (key, cell) in enumerate(self._cells.items())
        ]
        self._models = self._fitted(join_decisions(seen))
        for _ in range(_ROUNDS):
            seen += [each for key in keys for each in self._own_decisions(key)]
            self._models = self._fitted(join_decisions(seen))
        for key in keys:
            self._solve(key)

    def controller(self, compression: str, temperature: float) -> PackedController:
        """That of one compression and temperature of the trace, by all folds' models."""
        return self._controller((compression, temperature), self._models)

    def _fitted(self, examples: Decisions) -> list[Boosted]:
        fold = np.array([self._fold[prompt] for prompt in examples.prompt.tolist()])
        return [
            Boosted(examples.take(fold != own), examples.take(fold == own))
            for own in range(min(_FOLDS, len(self._fold)))
        ]

    def _controller(self, key: tuple[str, float], models: Sequence[Boosted]) -> PackedController:
        zeros = {name: torch.zeros(shape) for name, shape in SHAPES.items()}
        blank = mlp_policy("boosted", Mlp(at.LAYOUT_SURVIVAL, tuple(range(1, WIDTH_MAX)), zeros))
        packed = blank.pack(key[0], self._costs[key[0]], temperature=key[1], rate=self._rates[key])
        return PackedController(packed, _Bag(models).tokens)

    def _out_of_fold(self, key: tuple[str, float]) -> list[tuple[Trace, Replayed]]:
        """Each fold's answers of a cell, replayed by models that have not seen its prompts."""
        found = []
        for own, model in enumerate(self._models):
            part = self._cells[key].where(
                lambda a, own=own: self._fold[a.prompt_id] == own  # type: ignore[misc]
            )
            found.append((part, replay(part, self._controller(key, [model]), self._costs[key[0]])))
        return found

    def _solve(self, key: tuple[str, float], tolerance: float = 5e-3, rounds: int = 6) -> None:
        """λ: the rate that is reached with it, out of fold."""
        for _ in range(rounds):
            before, self._rates[key] = self._rates[key], _rate(self._out_of_fold(key))
            if abs(self._rates[key] - before) <= tolerance * before:
                break

    def _own_decisions(self, key: tuple[str, float]) -> list[Decisions]:
        """Those out of fold, whose rate is λ from then on."""
        found = [each for each in self._out_of_fold(key) if each[0].answers]
        self._rates[key] = _rate(found)
        return [decisions(part, replayed, ahead=_UNDRAFTED) for part, replayed in found]


def _rate(parts: Sequence[tuple[Trace, Replayed]]) -> float:
    """Tokens per millisecond of replays."""
    tokens, ms = (
        sum(float(getattr(found, name).sum()) for _, found in parts) for name in ("tokens", "ms")
    )
    return tokens / ms


def _static_rate(trace: Trace, cost: CostTable) -> float:
    """Tokens per millisecond at the best fixed γ: λ to begin with."""
    found = [replay(trace, Static({}, gamma), cost) for gamma in range(WIDTH_MAX)]
    return max(_rate([(trace, each)]) for each in found)


def _outcomes(examples: Decisions, later: bool, ahead: int) -> tuple[np.ndarray, np.ndarray]:
    """Features of decisions, before the first draft token or ``later``; if ``ahead`` + 1 pass."""
    drafted = examples.features[:, at.FEATURE_DRAFTED].astype(np.int64)
    asked = np.flatnonzero(((drafted > 0) == later) & (drafted + ahead < GAMMA_MAX))
    asked = asked[examples.known[asked, drafted[asked] + ahead]]
    return examples.features[asked], examples.survived[asked, drafted[asked] + ahead]


def _fit(
    kind: Any,
    train: tuple[np.ndarray, np.ndarray],
    validation: tuple[np.ndarray, np.ndarray],
) -> Any:
    """A model of an outcome; its mean where there is too little to learn from."""
    features, outcome = train
    held, held_outcome = validation
    if min(outcome.sum(), (~outcome).sum()) < 2 or not len(held):
        return float(outcome.mean()) if len(outcome) else 0.0
    model = kind(warm_start=True, **_SETTINGS)
    kept, best = model, np.inf
    for trees in range(_STRIDE, _MOST_TREES + 1, _STRIDE):
        model.set_params(max_iter=trees).fit(features, outcome)
        loss = float(surprise(model.predict_proba(held)[:, 1], held_outcome).mean())
        if loss >= best:
            break
        kept, best = deepcopy(model), loss
    return kept
