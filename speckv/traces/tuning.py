"""Which policies a comparison knows, and their settings, found by search on training prompts."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass, field
from functools import cached_property
from itertools import product

from ..decoding.trained import trained_policy
from ..kernels import layout as at
from ..kernels.layout import GAMMA_MAX
from ..policies import CostTable, Policy, parse_policy
from .baselines import AdaEdl, Heuristic, OnlineLogistic, Prior, Static, Threshold
from .boosted import Ceiling
from .fitted import PAPER_FITTED, paper_fitted
from .packed import PackedController
from .replay import Controller, replay
from .schema import Trace

Settings = Mapping[str, float]
Values = tuple[float, ...]

_GAMMAS = tuple(range(GAMMA_MAX + 1))
_PROBABILITIES = tuple(round(0.05 * i, 2) for i in range(21))
_ROOTS = tuple(round(0.1 * i, 1) for i in range(36))
_CAPS = (*range(1, 9), GAMMA_MAX)
_SCALES = (3e-5, 1e-4, 3e-4, 1e-3, 3e-3, 0.01, 0.03, 0.1, 0.3, 1.0, 3.0, 10.0, 30.0)
_AIMS = tuple(round(0.1 * i, 1) for i in range(11))
_RATES = (0.0, 0.003, 0.01, 0.03, 0.1, 0.3, 1.0, 3.0, 10.0)
_EXHAUSTIVE = 400  # settings that are all tried; of more, one setting is changed at a time


@dataclass(frozen=True)
class Family:
    """Controllers that differ in their settings.

    Attributes
    ----------
    search : mapping of str to tuple of float
        Values tried of each setting, in order.
    build : callable
        The controller of some settings, from training answers and the costs of a step.
    bounds : mapping of str to tuple of float
        Ends of ranges beyond which there is nothing that could be tried.
    """

    search: Mapping[str, tuple[float, ...]]
    build: Callable[[Settings, Trace, CostTable], Controller]
    bounds: Mapping[str, tuple[float, ...]] = field(default_factory=dict)

    def on_edge(self, settings: Settings) -> tuple[str, ...]:
        """Settings that stand at an end of their range where more could be tried beyond it."""
        return tuple(
            name
            for name, values in self.search.items()
            if settings[name] in (values[0], values[-1])
            and settings[name] not in self.bounds.get(name, ())
        )


def _hf_confidence(settings: Settings, train: Trace, cost: CostTable) -> Controller:
    cap = int(settings["num_assistant_tokens"])
    return Threshold(at.TOKEN_PROBABILITY, settings["threshold"], cap)


def _confidence(settings: Settings, train: Trace, cost: CostTable) -> Controller:
    return Threshold(at.CONFIDENCE, settings["threshold"], int(settings["cap"]))


def _svip(settings: Settings, train: Trace, cost: CostTable) -> Controller:
    bits = settings["root_of_nats"] ** 2 / math.log(2)
    return Threshold(at.ENTROPY, bits, int(settings["cap"]))


def _adaedl(settings: Settings, train: Trace, cost: CostTable) -> Controller:
    scale = settings["scale"]
    threshold = 1 - math.sqrt(scale) * settings["root_of_nats"]
    return AdaEdl(scale, threshold, settings["aim"], int(settings["cap"]))


def _online_logistic(settings: Settings, train: Trace, cost: CostTable) -> Controller:
    carries = bool(settings["carries"])
    return OnlineLogistic(Prior.fit(train), settings["rate"], cost, carries=carries)


_CAP_BOUNDS, _UNIT = (1, GAMMA_MAX), (0.0, 1.0)

FAMILIES: Mapping[str, Family] = {
    "static": Family(
        {"gamma": _GAMMAS},
        lambda settings, train, cost: Static({}, int(settings["gamma"])),
        {"gamma": (0, GAMMA_MAX)},
    ),
    "hf-confidence": Family(
        {"threshold": _PROBABILITIES, "num_assistant_tokens": _CAPS},
        _hf_confidence,
        {"threshold": _UNIT, "num_assistant_tokens": _CAP_BOUNDS},
    ),
    "hf-heuristic": Family(
        {"first": _GAMMAS[1:]},
        lambda settings, train, cost: Heuristic(int(settings["first"])),
        {"first": (1, GAMMA_MAX)},
    ),
    "adaedl": Family(
        {"root_of_nats": _ROOTS, "scale": _SCALES, "aim": _AIMS, "cap": _CAPS},
        _adaedl,
        {"root_of_nats": (0.0,), "scale": _SCALES[-1:], "aim": _UNIT, "cap": _CAP_BOUNDS},
    ),
    "svip": Family(
        {"root_of_nats": _ROOTS, "cap": _CAPS},
        _svip,
        {"root_of_nats": (0.0,), "cap": _CAP_BOUNDS},
    ),
    "confidence": Family(
        {"threshold": _PROBABILITIES, "cap": _CAPS},
        _confidence,
        {"threshold": _UNIT, "cap": _CAP_BOUNDS},
    ),
    "online-logistic": Family(
        {"rate": _RATES, "carries": (0, 1)},
        _online_logistic,
        {"rate": (0.0,), "carries": (0, 1)},
    ),
}
"""Policies whose settings are searched for, by name.

A threshold of AdaEDL is searched for as the entropy at which it first stops, whose root in nats
SVIP has as its threshold: so ``scale`` says only how far the threshold then moves. At the largest
that is less than 0.02 in 100 steps, so nothing is left to try beyond it: it is SVIP.
"""

STATIC, BY_TASK, ORACLE = "static", "static-by-task", "oracle"
BOOSTED = "boosted"
"""The information ceiling; it takes minutes, and is not replayed unless asked for."""
DEFAULT = (
    *(f"fixed:{gamma}" for gamma in _GAMMAS),
    STATIC,
    BY_TASK,
    *(name for name in FAMILIES if name != STATIC),
    "paper",
    "speckv",
    ORACLE,
)
"""Policies of a comparison, unless others are asked for."""

OTHERS = (BY_TASK, ORACLE, PAPER_FITTED, BOOSTED)


class Training:
    """Answers to learn from, of every compression and temperature.

    What is fitted on all of them is fitted once, when it is first asked for.

    Parameters
    ----------
    trace : Trace
    costs : mapping of str to CostTable
        By compression.
    """

    def __init__(self, trace: Trace, costs: Mapping[str, CostTable]) -> None:
        self._trace, self._costs = trace, costs
        self._paper: dict[float, Policy] = {}

    @cached_property
    def ceiling(self) -> Ceiling:
        """Boosted models."""
        return Ceiling(self._trace, self._costs)

    def paper(self, temperature: float) -> Policy:
        """The paper's policy, fitted on the answers of a temperature, which it is not told."""
        if temperature not in self._paper:
            own = self._trace.where(lambda a: a.temperature == temperature)
            self._paper[temperature] = paper_fitted(own)
        return self._paper[temperature]


@dataclass(frozen=True)
class Tuned:
    """A policy ready to be replayed.

    Attributes
    ----------
    controller : Controller
    settings : mapping of str to float
        What the search found, and what was fitted; empty for a policy that has no settings.
    search : mapping of str to tuple of float
        What it tried.
    on_edge : tuple of str
        Settings found at an end of their range where it could be wider.
    """

    controller: Controller
    settings: Settings = field(default_factory=dict)
    search: Mapping[str, tuple[float, ...]] = field(default_factory=dict)
    on_edge: tuple[str, ...] = ()


def check_policy(name: str) -> None:
    """Refuse a name that `tune` does not know.

    Raises
    ------
    ValueError
        Neither a policy of `speckv.policies` nor one of this module.
    PolicyError
        A policy file that cannot be used.
    """
    if name in FAMILIES or name in OTHERS:
        return
    try:
        parse_policy(name)
    except ValueError as error:
        known = ", ".join((*FAMILIES, *OTHERS))
        raise type(error)(f"{error}; or one of {known}") from None


def resolve(name: str, trace: Trace) -> Policy:
    """The policy of that name for the pair of a trace: ``speckv`` is the one trained for it."""
    policy = parse_policy(name)
    if policy.name == "speckv":
        policy = trained_policy(trace.info.target, trace.info.draft) or policy
    return policy


def tune(
    name: str, train: Trace, compression: str, cost: CostTable, whole: Training | None = None
) -> Tuned:
    """A policy by name, with the settings of the most tokens per second on training answers.

    Parameters
    ----------
    name : str
        Anything that `check_policy` accepts but the oracle.
    train : Trace
        Of that compression, and of one temperature.
    whole : Training, optional
        What policies that are fitted on all compressions learn from; ``train``, by default.
    """
    whole = whole or Training(train, {compression: cost})
    temperature = train.answers[0].temperature
    if name == BY_TASK:
        return _tuned_by_task(train, cost)
    if name == BOOSTED:
        return Tuned(whole.ceiling.controller(compression, temperature))
    family = FAMILIES.get(name)
    if family is None:
        policy = whole.paper(temperature) if name == PAPER_FITTED else resolve(name, train)
        packed = policy.pack(compression, cost, temperature=train.mean_temperature)
        return Tuned(PackedController(packed))
    settings = best_settings(family, train, cost)
    controller = family.build(settings, train, cost)
    on_edge = family.on_edge(settings)
    if isinstance(controller, OnlineLogistic):
        settings = {**settings, **asdict(controller.prior)}
    elif isinstance(controller, AdaEdl):
        settings = {**settings, "threshold": controller.threshold}
    return Tuned(controller, settings, family.search, on_edge)


def best_settings(family: Family, train: Trace, cost: CostTable) -> Settings:
    """The first settings of the least time: the tokens are the same.

    Where there are many, the search goes from a few of them to better ones, by the best value of
    one setting after the other, until none has a better one.
    """
    names, ranges = tuple(family.search), tuple(family.search.values())
    times: dict[Values, float] = {}

    def time_of(values: Values) -> float:
        if values not in times:
            settings = dict(zip(names, values, strict=True))
            times[values] = float(replay(train, family.build(settings, train, cost), cost).ms.sum())
        return times[values]

    def improved(values: Values) -> Values:
        for place, choices in enumerate(ranges):
            near: list[Values] = [
                (*values[:place], choice, *values[place + 1 :]) for choice in choices
            ]
            values = min([values, *near], key=time_of)
        return values

    tried: list[Values] = []
    if math.prod(map(len, ranges)) <= _EXHAUSTIVE:
        tried += product(*ranges)
    else:
        for start in range(_STARTS):
            values: Values = tuple(
                choices[int((start / _STARTS + _GOLDEN * place) % 1 * len(choices))]
                for place, choices in enumerate(ranges)
            )
            while (better := improved(values)) != values:
                values = better
            tried.append(values)
    best = min(tried, key=time_of)
    return dict(zip(names, best, strict=True))


_STARTS, _GOLDEN = 6, 0.618  # starts that are spread over all settings together


def _tuned_by_task(train: Trace, cost: CostTable) -> Tuned:
    family = FAMILIES[STATIC]

    def best_of(task: str) -> int:
        return int(best_settings(family, train.where(lambda a: a.task == task), cost)["gamma"])

    gammas = {task: best_of(task) for task in dict.fromkeys(a.task for a in train.answers)}
    otherwise = int(best_settings(family, train, cost)["gamma"])
    search = {task: family.search["gamma"] for task in gammas}
    return Tuned(Static(gammas, otherwise), gammas, search)
