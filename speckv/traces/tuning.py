"""Which policies a comparison knows, and their settings, found by search on training prompts."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass
from itertools import product

from ..decoding.trained import trained_policy
from ..kernels import layout as at
from ..kernels.layout import GAMMA_MAX
from ..policies import CostTable, Policy, parse_policy
from .baselines import AdaEdl, Heuristic, OnlineLogistic, Prior, Static, Threshold
from .boosted import boosted_controller
from .packed import PackedController
from .replay import Controller, replay
from .schema import Trace

Settings = Mapping[str, float]

_GAMMAS = tuple(range(GAMMA_MAX + 1))
_PROBABILITIES = tuple(round(0.05 * i, 2) for i in range(1, 20))
_ROOTS = tuple(round(0.1 * i, 1) for i in range(1, 21))
_CAPS = (2, 4, 8, GAMMA_MAX)


@dataclass(frozen=True)
class Family:
    """Controllers that differ in their settings.

    Attributes
    ----------
    search : mapping of str to tuple of float
        Values tried of each setting.
    build : callable
        The controller of some settings, from training answers and the costs of a step.
    """

    search: Mapping[str, tuple[float, ...]]
    build: Callable[[Settings, Trace, CostTable], Controller]


def _hf_confidence(settings: Settings, train: Trace, cost: CostTable) -> Controller:
    cap = int(settings["num_assistant_tokens"])
    return Threshold(at.TOKEN_PROBABILITY, settings["threshold"], cap)


def _confidence(settings: Settings, train: Trace, cost: CostTable) -> Controller:
    return Threshold(at.CONFIDENCE, settings["threshold"], int(settings["cap"]))


def _svip(settings: Settings, train: Trace, cost: CostTable) -> Controller:
    bits = settings["root_of_nats"] ** 2 / math.log(2)
    return Threshold(at.ENTROPY, bits, int(settings["cap"]))


def _adaedl(settings: Settings, train: Trace, cost: CostTable) -> Controller:
    return AdaEdl(settings["scale"], settings["threshold"], settings["aim"])


def _online_logistic(settings: Settings, train: Trace, cost: CostTable) -> Controller:
    return OnlineLogistic(Prior.fit(train), settings["rate"], cost)


FAMILIES: Mapping[str, Family] = {
    "static": Family(
        {"gamma": _GAMMAS}, lambda settings, train, cost: Static({}, int(settings["gamma"]))
    ),
    "hf-confidence": Family(
        {"threshold": _PROBABILITIES, "num_assistant_tokens": _CAPS}, _hf_confidence
    ),
    "hf-heuristic": Family(
        {"first": _GAMMAS[1:]}, lambda settings, train, cost: Heuristic(int(settings["first"]))
    ),
    "adaedl": Family(
        {
            "scale": (0.05, 0.1, 0.2, 0.4),
            "threshold": (0.1, 0.3, 0.5, 0.7),
            "aim": (0.5, 0.7, 0.9),
        },
        _adaedl,
    ),
    "svip": Family({"root_of_nats": _ROOTS, "cap": _CAPS}, _svip),
    "confidence": Family({"threshold": _PROBABILITIES, "cap": _CAPS}, _confidence),
    "online-logistic": Family({"rate": (0.0, 0.003, 0.01, 0.03, 0.1)}, _online_logistic),
}
"""Policies whose settings are searched for, by name."""

STATIC, BY_TASK, ORACLE = "static", "static-by-task", "oracle"
BOOSTED = "boosted"
"""The information ceiling; it takes a minute or two, and is not replayed unless asked for."""
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

OTHERS = (BY_TASK, ORACLE, BOOSTED)


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
    """

    controller: Controller
    settings: Settings
    search: Mapping[str, tuple[float, ...]]


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


def tune(name: str, train: Trace, compression: str, cost: CostTable) -> Tuned:
    """A policy by name, with the settings of the most tokens per second on training answers.

    Parameters
    ----------
    name : str
        Anything that `check_policy` accepts but the oracle.
    train : Trace
        Of that compression.
    """
    if name == BY_TASK:
        return _tuned_by_task(train, cost)
    if name == BOOSTED:
        return Tuned(boosted_controller(train, compression, cost), {}, {})
    family = FAMILIES.get(name)
    if family is None:
        policy = resolve(name, train)
        packed = policy.pack(compression, cost, temperature=train.mean_temperature)
        return Tuned(PackedController(packed), {}, {})
    settings = _best(family, train, cost)
    controller = family.build(settings, train, cost)
    if isinstance(controller, OnlineLogistic):
        settings = {**settings, **asdict(controller.prior)}
    return Tuned(controller, settings, family.search)


def _best(family: Family, train: Trace, cost: CostTable) -> Settings:
    """The first settings of the least time: the tokens are the same."""
    tried = [
        dict(zip(family.search, values, strict=True)) for values in product(*family.search.values())
    ]
    times = [replay(train, family.build(s, train, cost), cost).ms.sum() for s in tried]
    return tried[times.index(min(times))]


def _tuned_by_task(train: Trace, cost: CostTable) -> Tuned:
    family = FAMILIES[STATIC]

    def best_of(task: str) -> int:
        return int(_best(family, train.where(lambda a: a.task == task), cost)["gamma"])

    gammas = {task: best_of(task) for task in dict.fromkeys(a.task for a in train.answers)}
    otherwise = int(_best(family, train, cost)["gamma"])
    search = {task: family.search["gamma"] for task in gammas}
    return Tuned(Static(gammas, otherwise), gammas, search)
