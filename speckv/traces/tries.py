"""What else a controller could go by: other information, training targets and stopping rules.

Each try is a model of scikit-learn on what is known after each number of draft tokens
(`speckv.traces.known`), of the answers of one temperature in all compressions, the compression
being among what is known. γ of a row does not depend on the steps before it; a try therefore says
what its information or its target is worth beside the other tries', and the policies of
`speckv.traces.compare` how far one gets.

The training prompts are in folds, and a model decides on prompts that it has not learned from: on
each fold those of the other folds, on the judged prompts the mean of all. So there are two figures,
both of unseen prompts. That of the training prompts (``validated``) is what to choose by; that of
the judged ones chose nothing. λ of each try and compression is solved to its fixed point on the
training prompts, out of fold.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from importlib import import_module
from typing import Any

import numpy as np

from ..errors import SpeckvError
from ..policies import CostTable
from .adaptive import Adaptive
from .calibration import surprise
from .compare import speedup_interval
from .known import INFORMATION, MATCH, MOST, SIGNALS, Known, Rates
from .replay import Controller, Oracle, Planned, replay
from .schema import Trace
from .tuning import STATIC, tune

_SETTINGS = {
    "learning_rate": 0.1,
    "max_iter": 40,
    "max_leaf_nodes": 12,
    "min_samples_leaf": 100,
    "l2_regularization": 10.0,
    "early_stopping": False,
    "random_state": 0,
}
_FOLDS = 3
_OURS = (SIGNALS, MATCH)
_ADAPTATION = (0.005, 0.01, 0.02, 0.05, 0.1)
_LEAST_CHANCES = (0.02, 0.05, 0.1, 0.2, 0.3, 0.4, 0.5)
_NAN = float("nan")

Pair = tuple[np.ndarray, np.ndarray]
"""Something of the rows of both sides: of training prompts, out of fold, and of judged ones."""


@dataclass(frozen=True)
class Try:
    """One try at one temperature, over all compressions.

    Attributes
    ----------
    name : str
    validated : float
        Tokens per second over those of the best fixed γ of each compression, on training prompts,
        each decided on by models that have not seen it.
    over_static : float
        The same on judged prompts.
    over_static_95 : tuple of two floats
        Its interval, over prompts.
    gap_closed : float
        Share of the way from the best fixed γ to the oracle.
    bits : float
        Log loss of what the model predicts, that the next token and all before it are accepted,
        on the judged prompts; nan for a rule that needs no such prediction.
    """

    name: str
    validated: float
    over_static: float
    over_static_95: tuple[float, float]
    gap_closed: float
    bits: float


@dataclass(frozen=True)
class _Side:
    """Answers that models learn from, or that they are judged on, with what is known of each row.

    Attributes
    ----------
    trace : Trace
        Of one temperature.
    known : Known
    fold : int64 [R]
        Of each row; -1 on the judged side.
    costs : mapping of str to CostTable
    """

    trace: Trace
    known: Known
    fold: np.ndarray
    costs: Mapping[str, CostTable]

    @cached_property
    def compression(self) -> np.ndarray:
        """Of each row, str [R]."""
        return np.repeat([a.compression for a in self.trace.answers], self.trace.lengths)

    @cached_property
    def ms(self) -> np.ndarray:
        """Cost of a step of γ = 0..MOST at each row, float64 [MOST + 1, R]."""
        answers = np.repeat(np.arange(len(self.trace.answers)), self.trace.lengths)
        prompts = np.array([len(a.prompt_tokens) for a in self.trace.answers])[answers]
        length = prompts + np.arange(len(answers)) - self.trace.first[answers]
        found = np.empty((MOST + 1, len(answers)))
        for name, cost in self.costs.items():
            own = self.compression == name
            near, slope = np.array(cost.step_ms), np.array(cost.step_ms_per_context_token)
            found[:, own] = (near[:, None] + slope[:, None] * length[own])[: MOST + 1]
        return found

    def per_row(self, rates: Mapping[str, float]) -> np.ndarray:
        """λ of each row, float64 [R]."""
        found = np.zeros(len(self.compression))
        for name, rate in rates.items():
            found[self.compression == name] = rate
        return found

    def price(self, rates: Mapping[str, float]) -> np.ndarray:
        """What token j + 1 costs, in tokens: float64 [MOST, R]."""
        price: np.ndarray = self.per_row(rates) * np.diff(self.ms, axis=0)
        return price

    def run(self, build: Callable[[str, Trace, np.ndarray], Controller]) -> _Run:
        """Replay controllers of each compression, its answers and its rows, bool [R]."""
        prompts = np.array([a.prompt_id for a in self.trace.answers])
        names, place = np.unique(prompts, return_inverse=True)
        ms, rates = np.zeros(len(names)), {}
        for name, cost in self.costs.items():
            rows = self.compression == name
            kept = np.array([a.compression == name for a in self.trace.answers])
            own = self.trace.where(lambda a, name=name: a.compression == name)  # type: ignore[misc]
            if not len(own.rows):
                continue
            found = replay(own, build(name, own, rows), cost)
            rates[name] = found.tokens_per_second / 1e3
            ms += np.bincount(place[kept], found.ms, minlength=len(names))
        return _Run(ms, rates)


@dataclass(frozen=True)
class _Run:
    """Milliseconds of each prompt, over all compressions, and the rate reached in each."""

    ms: np.ndarray
    rates: Mapping[str, float]


Decide = Callable[[int, Mapping[str, float]], Callable[[str, Trace, np.ndarray], Controller]]
"""Controllers of a side (0: training prompts, out of fold; 1: judged) with a λ by compression."""


def tries(
    train: Trace,
    judged: Trace,
    costs: Mapping[str, CostTable],
    advance: Callable[[], None] = lambda: None,
) -> list[Try]:
    """Everything that is tried, at one temperature.

    Parameters
    ----------
    train, judged : Trace
        Answers of one temperature and any compressions, to learn from and to judge on.
    costs : mapping of str to CostTable
        By compression.
    advance : callable
        Called after each of `COUNT` tries.

    Raises
    ------
    SpeckvError
        scikit-learn is not installed.
    """
    try:
        ensemble: Any = import_module("sklearn.ensemble")
    except ImportError:
        raise SpeckvError("tries need scikit-learn: pip install 'speckv[train]'") from None
    table = _Table(train, judged, costs, ensemble, advance)
    ours: Pair | None = None
    for name, information in INFORMATION.items():
        chance = table.next_token(information)
        if information == _OURS:
            ours = chance
        table.add(name, table.by_chance(chance), table.bits(chance))
    assert ours is not None
    table.add("rule: all γ by their value", table.by_survival())
    table.add("rule: backward induction", table.by_induction(ours))
    table.add("target: acceptance rate, as the paper's", table.by_acceptance_rate())
    table.add_best("target: the oracle's γ, chance {:g}", _LEAST_CHANCES, table.by_oracle())
    table.add("target: tokens of each γ, least squares", table.by_tokens())
    adaptive = table.by_adaptation(ours)
    table.add_best("online: a bias for each answer, rate {:g}", _ADAPTATION, adaptive)
    return table.found


COUNT = len(INFORMATION) + 6
"""Tries at each temperature."""


class _Table:
    """Tries, as they are added."""

    def __init__(
        self,
        train: Trace,
        judged: Trace,
        costs: Mapping[str, CostTable],
        ensemble: Any,
        advance: Callable[[], None],
    ) -> None:
        prompts = sorted({a.prompt_id for a in train.answers})
        by_prompt = {prompt: place % _FOLDS for place, prompt in enumerate(prompts)}
        fold = np.repeat([by_prompt[a.prompt_id] for a in train.answers], train.lengths)
        rates = Rates(train, fold, max(_largest_id(train), _largest_id(judged)) + 1)
        none = np.full(len(judged.rows), -1)
        there = {a.compression for a in (*train.answers, *judged.answers)}
        costs = {name: cost for name, cost in costs.items() if name in there}
        self._sides = (
            _Side(train, Known.of(train, rates, fold), fold, costs),
            _Side(judged, Known.of(judged, rates), none, costs),
        )
        self._by_class = ensemble.HistGradientBoostingClassifier
        self._by_value = ensemble.HistGradientBoostingRegressor
        self._advance = advance
        tuned: dict[str, Controller] = {}
        for name, cost in costs.items():
            own = train.where(lambda a, name=name: a.compression == name)  # type: ignore[misc]
            tuned[name] = tune(STATIC, own, name, cost).controller

        def static(name: str, own: Trace, rows: np.ndarray) -> Controller:
            return tuned[name]

        self._static = [side.run(static) for side in self._sides]
        self._oracle = self._sides[1].run(lambda name, own, _: Oracle(own, costs[name]))
        self.found: list[Try] = []

    def add(self, name: str, decide: Decide, bits: float = _NAN) -> None:
        """Solve λ of a try, and judge it."""
        self.found.append(self._judged(name, decide, bits))
        self._advance()

    def add_best(
        self, name: str, settings: Sequence[float], decide_at: Callable[[float], Decide]
    ) -> None:
        """The setting of the best validation; ``name`` has a place for it."""
        tried = [self._judged(name.format(each), decide_at(each), _NAN) for each in settings]
        self.found.append(max(tried, key=lambda each: each.validated))
        self._advance()

    def _solved(self, decide: Decide) -> tuple[Mapping[str, float], _Run]:
        """λ by compression, within 0.2% of the rate reached with it, and what is reached."""
        rates = self._static[0].rates
        for _ in range(6):
            found = self._sides[0].run(decide(0, rates))
            before, rates = rates, found.rates
            if all(abs(rates[c] - before[c]) <= 2e-3 * before[c] for c in rates):
                break
        return rates, found

    def _judged(self, name: str, decide: Decide, bits: float) -> Try:
        rates, validated = self._solved(decide)
        own = self._sides[1].run(decide(1, rates)).ms
        base, best = self._static[1].ms, self._oracle.ms
        over = base.sum() / own.sum()
        return Try(
            name,
            float(self._static[0].ms.sum() / validated.ms.sum()),
            float(over),
            speedup_interval(own, base),
            float((over - 1) / (base.sum() / best.sum() - 1)) if base.sum() > best.sum() else _NAN,
            bits,
        )

    def bits(self, chance: Pair) -> float:
        """Of `Try`."""
        outcome = self._sides[1].known.accepted > np.arange(MOST)[:, None]
        return float(surprise(chance[1], outcome).mean())

    def next_token(self, information: Sequence[str]) -> Pair:
        """P(token j + 1 is accepted | j are drafted): [MOST, R] of each side.

        The first token has a model of its own: nothing is drafted yet.
        """
        x = self._inputs(information)
        outcome = self._sides[0].known.accepted > np.arange(MOST)[:, None]
        parts = [
            self._crossed(self._by_class, [side[part] for side in x], outcome[part])
            for part in (slice(0, 1), slice(1, MOST))
        ]
        return _joined(parts)

    def by_chance(self, chance: Pair) -> Decide:
        """Go on while the next token is worth its price."""
        return self._planned(lambda side, rates: chance[side] > self._sides[side].price(rates))

    def by_survival(self) -> Decide:
        """The rule of the γ-MLP: after j tokens, go on if a γ beyond has the highest value."""
        x, accepted = self._inputs(_OURS), self._sides[0].known.accepted
        outcomes = [np.tile(accepted > k, (MOST, 1)) for k in range(MOST)]
        survival = [self._crossed(self._by_class, x, outcome) for outcome in outcomes]
        return self._by_values(_totalled(survival))

    def by_tokens(self) -> Decide:
        """The same rule, from direct regressions of the tokens that each γ yields.

        The value of γ is that less λ·cost(γ), which is known: a regression of the value itself
        would be the same but for that.
        """
        x, accepted = self._inputs(_OURS), self._sides[0].known.accepted
        outcomes = [np.tile(np.minimum(accepted, g), (MOST, 1)) for g in range(1, MOST + 1)]
        return self._by_values([self._crossed(self._by_value, x, each) for each in outcomes])

    def by_acceptance_rate(self) -> Decide:
        """The same rule, from a regression of the accepted share, with γ among the inputs."""
        x, accepted = self._inputs(_OURS), self._sides[0].known.accepted
        asked = np.random.default_rng(0).integers(1, MOST + 1, x[0].shape[:2])
        share = np.minimum(accepted, asked) / asked

        def beside(values: np.ndarray, gamma: np.ndarray | int) -> np.ndarray:
            column = np.broadcast_to(np.asarray(gamma, dtype=np.float32), values.shape[:2])
            return np.concatenate([values, column[:, :, None]], axis=2)

        models = self._models(self._by_value, beside(x[0], asked), share)
        tokens = []
        for gamma in range(1, MOST + 1):
            rate = self._said(models, [beside(side, gamma) for side in x])
            tokens.append((gamma * np.clip(rate[0], 0, 1), gamma * np.clip(rate[1], 0, 1)))
        return self._by_values(tokens)

    def by_oracle(self) -> Callable[[float], Decide]:
        """Go on if the chance that the oracle does is above a bound: a classification of its γ.

        At one half that is the likelier of the two, which does not weigh what a mistake costs.
        """
        side = self._sides[0]
        goes_on = np.zeros((MOST, len(side.compression)), dtype=bool)
        for name, cost in side.costs.items():
            own = side.trace.where(lambda a, name=name: a.compression == name)  # type: ignore[misc]
            goes_on[:, side.compression == name] = _oracle_goes_on(own, cost)
        chance = self._crossed(self._by_class, self._inputs(_OURS), goes_on)
        return lambda least: self._planned(lambda side, rates: chance[side] > least)

    def by_adaptation(self, chance: Pair) -> Callable[[float], Decide]:
        """The rule of the next token by `Adaptive`, at a rate."""

        def decide_at(rate: float) -> Decide:
            def decide(side: int, rates: Mapping[str, float]) -> Any:
                price = self._sides[side].price(rates)
                return lambda _, own, rows: Adaptive(
                    own, chance[side][:, rows], price[:, rows], rate
                )

            return decide

        return decide_at

    def by_induction(self, chance: Pair) -> Decide:
        """Optimal stopping: what going on is worth if one stops well later, from the last on.

        What is learned depends on λ: that of the rule of the next token, with these chances.
        """
        x, accepted = self._inputs(_OURS), self._sides[0].known.accepted
        price = self._sides[0].price(self._solved(self.by_chance(chance))[0])
        goes_on: list[Pair] = []
        later = np.zeros(len(accepted))
        for j in reversed(range(MOST)):
            worth = (accepted > j) - price[j] + np.maximum(later, 0.0)
            said = self._crossed(self._by_value, [side[j : j + 1] for side in x], worth[None])
            later = said[0][0]
            goes_on.insert(0, (said[0] > 0, said[1] > 0))
        found = _joined(goes_on)
        return self._planned(lambda side, rates: found[side])

    def _inputs(self, information: Sequence[str]) -> list[np.ndarray]:
        return [side.known.inputs(information)[:MOST] for side in self._sides]

    def _planned(self, goes_on: Callable[[int, Mapping[str, float]], np.ndarray]) -> Decide:
        """From whether to go on after j tokens, bool [MOST, R] of a side with a λ."""

        def decide(side: int, rates: Mapping[str, float]) -> Any:
            gamma = np.cumprod(goes_on(side, rates), axis=0).sum(axis=0)
            return lambda _, own, rows: Planned(own, gamma[rows])

        return decide

    def _by_values(self, tokens: Sequence[Pair]) -> Decide:
        """From accepted tokens to be expected of γ = 1..MOST after j tokens, [MOST, R] each."""

        def goes_on(side: int, rates: Mapping[str, float]) -> np.ndarray:
            each = self._sides[side]
            value = np.zeros((MOST + 1, *tokens[0][side].shape), dtype=np.float32)
            value[1:] = [pair[side] for pair in tokens]
            value -= (each.per_row(rates) * each.ms)[:, None]
            found = np.zeros(tokens[0][side].shape, dtype=bool)
            for j in range(MOST):
                found[j] = value[j + 1 :, j].max(axis=0) > value[: j + 1, j].max(axis=0)
            return found

        return self._planned(goes_on)

    def _crossed(self, kind: Any, x: Sequence[np.ndarray], outcome: np.ndarray) -> Pair:
        """What models of an outcome [J, R] say of rows of training prompts and of judged ones."""
        return self._said(self._models(kind, x[0], outcome), x)

    def _models(self, kind: Any, x: np.ndarray, outcome: np.ndarray) -> list[Any]:
        """A model for each fold, which learns from the others."""
        models = []
        for own in range(_FOLDS):
            rest = self._sides[0].fold != own
            inputs, known = x[:, rest].reshape(-1, x.shape[-1]), outcome[:, rest].reshape(-1)
            same = len(known) and (known == known[0]).all()
            models.append(float(known[0]) if same else kind(**_SETTINGS).fit(inputs, known))
        return models

    def _said(self, models: Sequence[Any], x: Sequence[np.ndarray]) -> Pair:
        train = np.empty(x[0].shape[:2])
        judged = np.zeros(x[1].shape[:2])
        for own, model in enumerate(models):
            held = self._sides[0].fold == own
            train[:, held] = _predicted(model, x[0][:, held])
            judged += _predicted(model, x[1]) / len(models)
        return train, judged


def _predicted(model: Any, x: np.ndarray) -> np.ndarray:
    """Of inputs [J, R, C], float64 [J, R]; a number is its own prediction."""
    flat = x.reshape(-1, x.shape[-1])
    if isinstance(model, float):
        return np.full(x.shape[:2], model)
    if not len(flat):
        return np.zeros(x.shape[:2])
    by_class = hasattr(model, "predict_proba")
    found: np.ndarray = model.predict_proba(flat)[:, 1] if by_class else model.predict(flat)
    return found.reshape(x.shape[:2])


def _joined(parts: Sequence[Pair]) -> Pair:
    """One after the other, along the numbers of draft tokens."""
    train, judged = (np.concatenate(side) for side in zip(*parts, strict=True))
    return train, judged


def _totalled(survival: Sequence[Pair]) -> list[Pair]:
    """Accepted tokens of γ = 1, 2, ... from the chances of each token."""
    train, judged = (np.cumsum(side, axis=0) for side in zip(*survival, strict=True))
    return list(zip(train, judged, strict=True))


def _oracle_goes_on(trace: Trace, cost: CostTable) -> np.ndarray:
    """Whether the oracle drafts another token after j at each row: bool [MOST, R]."""
    oracle = Oracle(trace, cost)
    lanes = np.repeat(np.arange(len(trace.answers)), trace.lengths)
    prompts = np.array([len(a.prompt_tokens) for a in trace.answers])[lanes]
    length = prompts + np.arange(len(lanes)) - trace.first[lanes]
    nothing = np.zeros(0)
    return np.stack([oracle.goes_on(lanes, length, j, nothing, nothing) for j in range(MOST)])


def _largest_id(trace: Trace) -> int:
    return int(max(trace.rows.target_token.max(), trace.rows.draft_tokens.max()))
