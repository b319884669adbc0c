"""Policies side by side on one trace, tuned on some of its prompts and judged on the others.

Each pair of a compression and a temperature is a cell of its own: policies are tuned for it. The
figure is tokens per second of decoding steps: tokens over the summed costs of the steps. Intervals
are bootstrapped over prompts, not over steps, and paired: both policies on the same prompts. Pooled
over compressions, a prompt's time under a policy is the sum of its times in their cells.
"""

from __future__ import annotations

import random
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from typing import Any

import numpy as np

from ..policies import CostTable
from .replay import Oracle, Replayed, replay
from .schema import Trace
from .tuning import (
    DEFAULT,
    FAMILIES,
    ORACLE,
    OTHERS,
    STATIC,
    Settings,
    Training,
    Tuned,
    check_policy,
    resolve,
    tune,
)

OURS = "speckv"
POOLED = "all"
"""Stands for the compressions of a cell that was pooled over them."""
_PLAIN = "fixed:0"
_RESAMPLES = 4000
_NAN = float("nan")


@dataclass(frozen=True)
class Row:
    """A policy in one cell.

    Attributes
    ----------
    policy : str
    settings, search : mapping
        What the tuning found and what it tried.
    on_edge : list of str
        Settings found at an end of what was tried, where it could have gone on: empty if the search
        was wide enough.
    tokens_per_second, tokens_per_step : float
    over_plain, over_static : float
        Ratios of tokens per second.
    over_static_95 : tuple of two floats
        Interval of the latter.
    ours_over_it : float
        Tokens per second of the policy ``speckv`` over those of this one; nan where the former is
        not among the policies.
    ours_over_it_95 : tuple of two floats
        Its interval.
    gap_closed : float
        Share of the way from the tuned static γ to the oracle; nan where there is no way.
    regret : float
        Share of the oracle's tokens per second that is lost.
    histogram : list of int
        Steps by γ.
    tasks : mapping of str to mapping
        Tokens per second and per step, the histogram, ``over_static`` and ``regret`` by task.
    """

    policy: str
    settings: Settings
    search: Mapping[str, Sequence[float]]
    on_edge: Sequence[str]
    tokens_per_second: float
    tokens_per_step: float
    over_plain: float
    over_static: float
    over_static_95: tuple[float, float]
    ours_over_it: float
    ours_over_it_95: tuple[float, float]
    gap_closed: float
    regret: float
    histogram: list[int]
    tasks: Mapping[str, Mapping[str, Any]]


@dataclass(frozen=True)
class Cell:
    """All policies at one compression and temperature.

    Attributes
    ----------
    compression : str
        `POOLED` where it is all of them.
    temperature : float
    prompts, tokens : int
        That policies were judged on.
    rows : list of Row
    """

    compression: str
    temperature: float
    prompts: int
    tokens: int
    rows: list[Row]


@dataclass(frozen=True)
class Comparison:
    """What `compare` found.

    Attributes
    ----------
    cells : list of Cell
        By compression and temperature.
    pooled : list of Cell
        By temperature, over the compressions; those of two or more with the same prompts.
    """

    cells: list[Cell]
    pooled: list[Cell]


@dataclass(frozen=True)
class _Judged:
    """Replays of one cell, or of several added up.

    ``found`` has each policy's replay, and how it was tuned; ``prompts`` has the id, the seed and
    the task of each lane.
    """

    compression: str
    temperature: float
    prompts: tuple[tuple[int, int, str], ...]
    found: Mapping[str, tuple[Replayed, Tuned | None]]


def compare(
    trace: Trace,
    costs: Mapping[str, CostTable],
    policies: Sequence[str] = DEFAULT,
    *,
    train_share: float = 0.5,
    seed: int = 0,
    advance: Callable[[], None] = lambda: None,
) -> Comparison:
    """Tune and replay policies on every cell of a trace.

    Parameters
    ----------
    costs : mapping of str to CostTable
        By compression.
    policies : sequence of str
        As `check_policy` has them.
    train_share : float
        Of the prompts of each task, for tuning.
    seed : int
        Of the split.
    advance : callable
        Called after each policy of each cell.

    Raises
    ------
    ValueError
        An unknown policy, no costs for a compression, or prompts too few to be split.
    """
    for name in policies:
        check_policy(name)
    cells = list(dict.fromkeys((a.compression, a.temperature) for a in trace.answers))
    for compression, _ in cells:
        if compression not in costs:
            raise ValueError(f"costs: expected a table for {compression}, got none")
    training = split_prompts(trace, train_share, seed)
    for name in policies:
        _refuse_known(name, trace, training)
    whole = Training(trace.where(lambda a: a.prompt_id in training), costs)
    judged = [
        _judge(trace, training, (compression, temperature), whole, costs, policies, advance)
        for compression, temperature in cells
    ]
    alike: dict[Any, list[_Judged]] = {}
    for each in judged:
        alike.setdefault((each.temperature, each.prompts), []).append(each)
    pooled = [_pool(parts) for parts in alike.values() if len(parts) > 1]
    names = tuple(dict.fromkeys(policies))
    return Comparison(
        *([_cell(each, names) for each in group] for group in (judged, pooled)),
    )


def _refuse_known(name: str, trace: Trace, training: frozenset[int]) -> None:
    """Refuse a policy that was trained on prompts which it would be judged on."""
    if name in FAMILIES or name in OTHERS:
        return
    mlp = resolve(name, trace).mlp
    card = {} if mlp is None else mlp.card
    if card.get("prompts_sha256") != trace.info.recipe.get("prompts_sha256"):
        return
    known = {prompt for part in card.get("prompts", {}).values() for prompt in part}
    judged = known - training
    if judged:
        raise ValueError(
            f"policy {name!r}: it was trained on {len(judged)} of the prompts that it would be "
            f"judged on; split them as its training did, {card['split']}"
        )


def to_dict(
    trace: Trace,
    costs: Mapping[str, CostTable],
    found: Comparison,
    *,
    train_share: float,
    seed: int,
) -> dict[str, Any]:
    """A comparison as JSON values, with what it was made of; see `Comparison`."""
    info = trace.info
    return {
        "trace": {
            "target": dict(info.target),
            "draft": dict(info.draft),
            "device": info.device,
            "versions": dict(info.versions),
            "recipe": dict(info.recipe),
            "answers": len(trace.answers),
            "positions": len(trace.rows),
        },
        "costs": {cell.compression: costs[cell.compression].to_dict() for cell in found.cells},
        "split": {
            "train_share": train_share,
            "seed": seed,
            "train_prompts": sorted(split_prompts(trace, train_share, seed)),
        },
        **asdict(found),
    }


def split_prompts(trace: Trace, share: float, seed: int) -> frozenset[int]:
    """Ids of the prompts to tune on: ``share`` of each task's, at least one of any.

    Raises
    ------
    ValueError
        The share is not between 0 and 1, or it leaves no prompt on one side.
    """
    if not 0 < share < 1:
        raise ValueError(f"train_share: expected a number between 0 and 1, got {share}")
    by_task: dict[str, set[int]] = {}
    for answer in trace.answers:
        by_task.setdefault(answer.task, set()).add(answer.prompt_id)
    rng = random.Random(seed)
    chosen: set[int] = set()
    for _, prompts in sorted(by_task.items()):
        shuffled = sorted(prompts)
        rng.shuffle(shuffled)
        chosen |= set(shuffled[: round(share * len(shuffled))])
    everything = set().union(*by_task.values())
    if not chosen or chosen == everything:
        raise ValueError(
            f"trace: expected prompts to tune on and others to judge on, got {len(everything)} "
            f"prompts and a share of {share}"
        )
    return frozenset(chosen)


def _judge(
    trace: Trace,
    training: frozenset[int],
    key: tuple[str, float],
    whole: Training,
    costs: Mapping[str, CostTable],
    policies: Sequence[str],
    advance: Callable[[], None],
) -> _Judged:
    """All policies in the cell of a compression and a temperature."""
    compression, cost = key[0], costs[key[0]]
    own = trace.where(lambda a: (a.compression, a.temperature) == key)
    train = own.where(lambda a: a.prompt_id in training)
    test = own.where(lambda a: a.prompt_id not in training)
    if not train.answers or not test.answers:
        raise ValueError(
            f"trace: expected answers in {compression} at temperature {key[1]:g} to tune on and to "
            f"judge on, got {len(train.answers)} and {len(test.answers)}"
        )
    found: dict[str, tuple[Replayed, Tuned | None]] = {}
    for name in dict.fromkeys((*policies, _PLAIN, STATIC, ORACLE)):
        if name == ORACLE:
            found[name] = replay(test, Oracle(test, cost), cost), None
        else:
            tuned = tune(name, train, compression, cost, whole)
            found[name] = replay(test, tuned.controller, cost), tuned
        if name in policies:
            advance()
    prompts = tuple((answer.prompt_id, answer.seed, answer.task) for answer in test.answers)
    return _Judged(*key, prompts, found)


def _pool(parts: Sequence[_Judged]) -> _Judged:
    """Cells with the same prompts as one; settings are left out, as they differ."""
    first = parts[0]
    found: dict[str, tuple[Replayed, Tuned | None]] = {
        name: (Replayed.total([part.found[name][0] for part in parts]), None)
        for name in first.found
    }
    return replace(first, compression=POOLED, found=found)


def _cell(judged: _Judged, policies: Sequence[str]) -> Cell:
    tasks = np.array([task for _, _, task in judged.prompts])
    rows = [_row(name, judged, tasks) for name in policies]
    tokens = int(judged.found[STATIC][0].tokens.sum())
    return Cell(judged.compression, judged.temperature, len(judged.prompts), tokens, rows)


def _row(name: str, judged: _Judged, tasks: np.ndarray) -> Row:
    own, tuned = judged.found[name]
    plain, static, oracle = (judged.found[each][0] for each in (_PLAIN, STATIC, ORACLE))
    ours = judged.found[OURS][0] if OURS in judged.found else None
    best, base = oracle.tokens_per_second, static.tokens_per_second
    way = best - base
    by_task = {}
    for task in dict.fromkeys(tasks.tolist()):
        among = tasks == task
        ms, steps = own.ms[among].sum(), own.steps[among].sum()
        tokens = own.tokens[among].sum()
        by_task[task] = {
            "tokens_per_second": _ratio(tokens * 1e3, ms),
            "tokens_per_step": _ratio(tokens, steps),
            "over_static": _ratio(static.ms[among].sum(), ms),
            "regret": 1 - _ratio(oracle.ms[among].sum(), ms),
            "histogram": own.histogram[among].sum(axis=0).tolist(),
        }
    return Row(
        policy=name,
        settings=tuned.settings if tuned else {},
        search=tuned.search if tuned else {},
        on_edge=tuned.on_edge if tuned else (),
        tokens_per_second=own.tokens_per_second,
        tokens_per_step=own.tokens_per_step,
        over_plain=own.tokens_per_second / plain.tokens_per_second,
        over_static=own.tokens_per_second / base,
        over_static_95=speedup_interval(own.ms, static.ms),
        ours_over_it=_NAN if ours is None else ours.tokens_per_second / own.tokens_per_second,
        ours_over_it_95=(_NAN, _NAN) if ours is None else speedup_interval(ours.ms, own.ms),
        gap_closed=(own.tokens_per_second - base) / way if way > 1e-9 * best else _NAN,
        regret=1 - own.tokens_per_second / best,
        histogram=own.histogram.sum(axis=0).tolist(),
        tasks=by_task,
    )


def speedup_interval(
    ms: np.ndarray, base_ms: np.ndarray, resamples: int = _RESAMPLES, seed: int = 0
) -> tuple[float, float]:
    """95% percentile bootstrap interval, over prompts, of ``sum(base_ms) / sum(ms)``.

    Parameters
    ----------
    ms, base_ms : float64 [P]
        Time of the same prompts under two policies; the tokens are the same.
    """
    rng = np.random.default_rng(seed)
    drawn = rng.multinomial(len(ms), np.full(len(ms), 1 / len(ms)), size=resamples)
    total, base = drawn @ ms, drawn @ base_ms
    ratios = base[total > 0] / total[total > 0]
    if not len(ratios):
        return _NAN, _NAN
    low, high = np.quantile(ratios, (0.025, 0.975))
    return float(low), float(high)


def _ratio(a: float, b: float) -> float:
    return float(a / b) if b else _NAN
