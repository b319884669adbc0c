"""The information ceiling: large gradient-boosted models on what the γ-MLP sees.

They are too slow to decide anything while decoding. What they reach in a replay shows how much the
same features could still give a larger model.
"""

from __future__ import annotations

from importlib import import_module
from typing import Any

import numpy as np
import torch

from ..errors import SpeckvError
from ..kernels import layout as at
from ..kernels.layout import GAMMA_MAX, WIDTH_MAX
from ..policies import CostTable, Policy
from ..policies.mlp import SHAPES, Mlp
from ..policies.policy import mlp_policy
from .calibration import surprise
from .decisions import Decisions, Explorer, decisions, join_decisions
from .packed import PackedController, expected_tokens
from .replay import Controller, replay, solve_rate
from .schema import Trace

_SETTINGS = {"learning_rate": 0.05, "max_leaf_nodes": 15, "min_samples_leaf": 100}
_MOST_ROUNDS = 300
_VALIDATION_SHARE = 0.25


class Boosted:
    """P(accepted >= k | features), a `HistGradientBoostingClassifier` for each k = 1..15.

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
        self._models = [_fit(kind, train, validation, k) for k in range(GAMMA_MAX)]

    def survival(self, features: np.ndarray) -> np.ndarray:
        """Of features [N, FEATURES], float32: float64 [N, GAMMA_MAX]."""
        columns = [
            np.full(len(features), model)
            if isinstance(model, float)
            else model.predict_proba(features)[:, 1]
            for model in self._models
        ]
        return np.stack(columns, axis=1)

    def tokens(self, features: np.ndarray) -> np.ndarray:
        """`expected_tokens` of those."""
        return expected_tokens(self.survival(features))


def boosted_controller(train: Trace, compression: str, cost: CostTable) -> Controller:
    """The policy of boosted models on the answers of one compression.

    Examples are gathered twice, under γ drawn at random and under the models fitted on that. λ is
    solved on the answers that chose the number of trees: on the others the models know too much.

    Raises
    ------
    SpeckvError
        scikit-learn is not installed.
    """
    zeros = {name: torch.zeros(shape) for name, shape in SHAPES.items()}
    blank = mlp_policy("boosted", Mlp(at.LAYOUT_SURVIVAL, tuple(range(1, WIDTH_MAX)), zeros))
    prompts = sorted({answer.prompt_id for answer in train.answers})
    held = set(prompts[:: round(1 / _VALIDATION_SHARE)])
    parts = [
        train.where(lambda a, inside=inside: (a.prompt_id in held) == inside)  # type: ignore[misc]
        for inside in (False, True)
    ]
    seen = [decisions(part, replay(part, Explorer(0), cost)) for part in parts]
    explored = _solved(Boosted(*seen), blank, parts[1], compression, cost)
    seen = [
        join_decisions([known, decisions(part, replay(part, explored, cost), ahead=2)])
        for known, part in zip(seen, parts, strict=True)
    ]
    return _solved(Boosted(*seen), blank, parts[1], compression, cost)


def _solved(
    models: Boosted, blank: Policy, held: Trace, compression: str, cost: CostTable
) -> Controller:
    """The controller of some models with its λ."""
    temperature = held.mean_temperature

    def build(rate: float) -> Controller:
        packed = blank.pack(compression, cost, temperature=temperature, rate=rate)
        return PackedController(packed, models.tokens)

    return build(solve_rate(build, held, cost, tolerance=5e-3)[0])


def _fit(kind: Any, train: Decisions, validation: Decisions, k: int) -> Any:
    """A model of outcome ``k``; its mean where there is too little to learn from."""
    features, outcome = _known(train, k)
    held, held_outcome = _known(validation, k)
    if min(outcome.sum(), (~outcome).sum()) < 2 or not len(held):
        return float(outcome.mean()) if len(outcome) else 0.0
    most = kind(max_iter=_MOST_ROUNDS, early_stopping=False, **_SETTINGS).fit(features, outcome)
    losses = [surprise(p[:, 1], held_outcome).mean() for p in most.staged_predict_proba(held)]
    rounds = int(np.argmin(losses)) + 1
    return kind(max_iter=rounds, early_stopping=False, **_SETTINGS).fit(features, outcome)


def _known(examples: Decisions, k: int) -> tuple[np.ndarray, np.ndarray]:
    known = examples.known[:, k]
    return examples.features[known], examples.survived[known, k]
