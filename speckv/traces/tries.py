"""What else a controller could go by: other information, training targets and stopping rules.

Each try is a model of scikit-learn on what is known after each number of draft tokens, fitted on
the rows of training prompts and replayed on the others. What a step's past would add (the last
step's signals, the acceptance so far) is left out, so that γ of a row does not depend on the steps
before it; a try therefore says what its information is worth beside the other tries', and the
policies of `speckv.traces.compare` how far one gets.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from importlib import import_module
from typing import Any

import numpy as np

from ..errors import SpeckvError
from ..kernels import layout as at
from ..policies import CostTable
from .calibration import surprise
from .compare import speedup_interval
from .decisions import running_features
from .replay import Oracle, replay
from .schema import Answer, Trace
from .tuning import STATIC, tune

_MOST = 8
"""Draft tokens of a step; the best fixed γ of pairs in use are well below."""

_SETTINGS = {
    "learning_rate": 0.05,
    "max_iter": 60,
    "max_leaf_nodes": 8,
    "min_samples_leaf": 100,
    "l2_regularization": 10.0,
}
_PRIOR_WEIGHT = 10.0  # tokens that the mean counts for in a token's own rate

SIGNALS, SURVIVAL, TARGET, PRIOR, MATCH = "signals", "survival", "target", "prior", "match"
ENTROPY, CONFIDENCE = "entropy", "confidence"

INFORMATION: Mapping[str, tuple[str, ...]] = {
    "the draft's entropy": (ENTROPY,),
    "the draft's confidence": (CONFIDENCE,),
    "the draft's signals": (SIGNALS,),
    "signals, product of confidences": (SIGNALS, SURVIVAL),
    "signals, target's entropy and margin": (SIGNALS, TARGET),
    "signals, acceptance after each token id": (SIGNALS, PRIOR),
    "signals, agreement with a match": (SIGNALS, MATCH),
    "all of these": (SIGNALS, SURVIVAL, TARGET, PRIOR, MATCH),
}
"""Information by name; all are judged with the rule of the next token."""

_OURS = (SIGNALS, MATCH)


@dataclass(frozen=True)
class Try:
    """One try in one cell.

    Attributes
    ----------
    name : str
    over_static : float
        Tokens per second over those of the best fixed γ.
    over_static_95 : tuple of two floats
        Its interval, over prompts.
    gap_closed : float
        Share of the way from the best fixed γ to the oracle.
    bits : float
        Log loss of what the model predicts, that the next token and all before it are accepted,
        on the judged prompts; nan for a rule that needs no such prediction.
    """

    name: str
    over_static: float
    over_static_95: tuple[float, float]
    gap_closed: float
    bits: float


@dataclass(frozen=True)
class Known:
    """What is known in each row of a trace after j = 0.._MOST draft tokens.

    Attributes
    ----------
    columns : mapping of str to float32 [_MOST + 1, R, C]
    accepted : int64 [R]
    """

    columns: Mapping[str, np.ndarray]
    accepted: np.ndarray

    @classmethod
    def of(cls, trace: Trace, rates: np.ndarray, *, own: bool) -> Known:
        """``rates``: see `_rates`; ``own`` says whether they were counted on these rows."""
        rows = trace.rows
        first = np.zeros(len(rows), dtype=bool)
        first[trace.first[:-1]] = True

        def before(values: np.ndarray) -> np.ndarray:
            """What the committed token that a row begins after has; 0 where there is none."""
            return np.where(first, 0, np.roll(values, 1))

        running = running_features(rows.signals)[:, :_MOST]
        confidence = rows.signals[:, :_MOST, at.CONFIDENCE]
        product = np.log(np.maximum(confidence, 1e-6)).cumsum(axis=1)
        tokens = np.concatenate(
            [before(rows.target_token)[:, None], rows.draft_tokens[:, :_MOST]], axis=1
        )
        counts, hits = rates[np.maximum(tokens, 0)].transpose(2, 0, 1).copy()
        if own:  # a row's own outcome is no information about it
            counts[:, 0] -= ~first
            hits[:, 0] -= ~first & (rows.accepted > 0)
        mean = rates[:, 1].sum() / max(rates[:, 0].sum(), 1)
        prior = (hits + _PRIOR_WEIGHT * mean) / (counts + _PRIOR_WEIGHT)
        target = np.stack([before(rows.target_entropy), before(rows.target_margin)], axis=1)
        columns = {
            SIGNALS: _after(running),
            ENTROPY: _after(running[:, :, at.LAST_ENTROPY, None]),
            CONFIDENCE: _after(running[:, :, at.LAST_CONFIDENCE, None]),
            SURVIVAL: _after(product[:, :, None]),
            TARGET: np.tile(target, (_MOST + 1, 1, 1)),
            PRIOR: prior.T[:, :, None],
            MATCH: trace.match[:, : _MOST + 1].T[:, :, None],
        }
        return cls(
            {name: values.astype(np.float32) for name, values in columns.items()},
            rows.accepted.astype(np.int64),
        )

    def inputs(self, names: Sequence[str]) -> np.ndarray:
        """Float32 [_MOST + 1, R, C]; the first column is the number of draft tokens."""
        count = np.arange(_MOST + 1, dtype=np.float32)[:, None, None]
        counts = np.broadcast_to(count, (_MOST + 1, len(self.accepted), 1))
        return np.concatenate([counts, *(self.columns[name] for name in names)], axis=2)


class Planned:
    """A controller that takes γ from a table.

    Parameters
    ----------
    trace : Trace
    gamma : int64 [R]
        Of a step that begins at each row.
    """

    def __init__(self, trace: Trace, gamma: np.ndarray) -> None:
        prompts = np.array([len(a.prompt_tokens) for a in trace.answers], dtype=np.int64)
        self._offset, self._gamma = trace.first[:-1] - prompts, gamma

    def start(self, answers: Sequence[Answer]) -> None:
        """Nothing to forget."""

    def begins(self, lanes: np.ndarray, length: np.ndarray, match: np.ndarray) -> np.ndarray:
        """See `Controller`."""
        more: np.ndarray = self._gamma[self._offset[lanes] + length] > 0
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
        more: np.ndarray = self._gamma[self._offset[lanes] + length] > drafted
        return more

    def learns(self, lanes: np.ndarray, gamma: np.ndarray, accepted: np.ndarray) -> None:
        """It learns nothing."""


def tries(train: Trace, judged: Trace, compression: str, cost: CostTable) -> list[Try]:
    """Everything that is tried, in one cell.

    Parameters
    ----------
    train, judged : Trace
        Answers of one compression and temperature, to learn from and to judge on.

    Raises
    ------
    SpeckvError
        scikit-learn is not installed.
    """
    try:
        ensemble: Any = import_module("sklearn.ensemble")
    except ImportError:
        raise SpeckvError("tries need scikit-learn: pip install 'speckv[train]'") from None
    rates = _rates(train, max(_largest_id(train), _largest_id(judged)) + 1)
    seen, held = Known.of(train, rates, own=True), Known.of(judged, rates, own=False)
    static = replay(judged, tune(STATIC, train, compression, cost).controller, cost)
    oracle = replay(judged, Oracle(judged, cost), cost)
    confident = replay(train, tune("hf-confidence", train, compression, cost).controller, cost)
    rate = confident.tokens_per_second / 1e3
    context = np.mean([len(a.prompt_tokens) + a.limit / 2 for a in train.answers])
    ms = np.array(cost.step_ms) + np.array(cost.step_ms_per_context_token) * context
    price = rate * np.diff(ms)[:_MOST]

    def judge(name: str, gamma: np.ndarray, bits: float) -> Try:
        own = replay(judged, Planned(judged, gamma), cost)
        base = static.tokens_per_second
        return Try(
            name,
            own.tokens_per_second / base,
            speedup_interval(own.ms, static.ms),
            (own.tokens_per_second - base) / (oracle.tokens_per_second - base),
            bits,
        )

    found = []
    for name, information in INFORMATION.items():
        chance = _next_token(ensemble, seen, held, information)
        gamma = _leading(chance[:_MOST] > price[:, None])
        found.append(judge(name, gamma, _bits(chance, held.accepted)))
    found.append(judge("rule: all γ by their value", _by_value(ensemble, seen, held, price), _NONE))
    gamma = _by_induction(ensemble, seen, held, price)
    found.append(judge("rule: backward induction", gamma, _NONE))
    return found


_NONE = float("nan")


def _largest_id(trace: Trace) -> int:
    return int(max(trace.rows.target_token.max(), trace.rows.draft_tokens.max()))


def _rates(trace: Trace, size: int) -> np.ndarray:
    """How often a draft began after each token id, and how often its first token was accepted.

    Float64 [size, 2].
    """
    rows = trace.rows
    first = np.zeros(len(rows), dtype=bool)
    first[trace.first[:-1]] = True
    after, hit = np.roll(rows.target_token, 1)[~first], rows.accepted[~first] > 0
    counts = np.bincount(after, minlength=size).astype(np.float64)
    return np.stack([counts, np.bincount(after, hit, minlength=size)], axis=1)


def _after(values: np.ndarray) -> np.ndarray:
    """[_MOST + 1, R, C] of [R, _MOST, C]: zeros before the first draft token."""
    moved = values.transpose(1, 0, 2)
    return np.concatenate([np.zeros_like(moved[:1]), moved])


def _leading(goes_on: np.ndarray) -> np.ndarray:
    """γ [R] from whether to go on after j tokens, [_MOST, R]."""
    gamma: np.ndarray = np.cumprod(goes_on, axis=0).sum(axis=0)
    return gamma


def _fitted(
    kind: Any, inputs: np.ndarray, outcome: np.ndarray, asked: Sequence[np.ndarray]
) -> list[np.ndarray]:
    """A model of an outcome [J, R] of inputs [J, R, C], and what it says of other inputs."""
    model = kind(early_stopping=False, **_SETTINGS)
    model.fit(inputs.reshape(-1, inputs.shape[-1]), outcome.reshape(-1))
    said = []
    for x in asked:
        flat = x.reshape(-1, x.shape[-1])
        by_class = hasattr(model, "predict_proba")
        found = model.predict_proba(flat)[:, 1] if by_class else model.predict(flat)
        said.append(found.reshape(x.shape[:-1]))
    return said


def _next_token(ensemble: Any, seen: Known, held: Known, information: Sequence[str]) -> np.ndarray:
    """P(token j + 1 is accepted | j are drafted): [_MOST, R] of the judged rows.

    The first token has a model of its own: nothing is drafted yet.
    """
    inputs, asked = seen.inputs(information)[:_MOST], held.inputs(information)[:_MOST]
    outcome = seen.accepted > np.arange(_MOST)[:, None]
    kind = ensemble.HistGradientBoostingClassifier
    parts = [
        _fitted(kind, inputs[part], outcome[part], [asked[part]])[0]
        for part in (slice(0, 1), slice(1, _MOST))
    ]
    return np.concatenate(parts)


def _bits(chance: np.ndarray, accepted: np.ndarray) -> float:
    return float(surprise(chance, accepted > np.arange(len(chance))[:, None]).mean())


def _by_value(ensemble: Any, seen: Known, held: Known, price: np.ndarray) -> np.ndarray:
    """γ by the rule of the γ-MLP: after j tokens, the one of the highest expected value."""
    inputs, asked = seen.inputs(_OURS), held.inputs(_OURS)
    kind = ensemble.HistGradientBoostingClassifier
    gain = np.zeros((_MOST, _MOST, len(held.accepted)))  # of token k, seen from after j
    for k in range(_MOST):
        outcome = np.tile(seen.accepted > k, (_MOST, 1))
        gain[:, k] = _fitted(kind, inputs[:_MOST], outcome, [asked[:_MOST]])[0]
    value = (gain - price[:, None]).cumsum(axis=1)
    goes_on = np.zeros((_MOST, len(held.accepted)), dtype=bool)
    for j in range(_MOST):
        here = np.maximum(value[j, :j].max(axis=0, initial=-np.inf), 0.0)
        goes_on[j] = value[j, j:].max(axis=0) > here
    return _leading(goes_on)


def _by_induction(ensemble: Any, seen: Known, held: Known, price: np.ndarray) -> np.ndarray:
    """γ by optimal stopping: what going on is worth if one stops well later, from the last on."""
    inputs, asked = seen.inputs(_OURS), held.inputs(_OURS)
    goes_on = np.zeros((_MOST, len(held.accepted)), dtype=bool)
    later = np.zeros(len(seen.accepted))
    for j in reversed(range(_MOST)):
        worth = (seen.accepted > j) - price[j] + np.maximum(later, 0.0)
        kind = ensemble.HistGradientBoostingRegressor
        later, judged = _fitted(kind, inputs[j], worth, [inputs[j], asked[j]])
        goes_on[j] = judged > 0
    return _leading(goes_on)
