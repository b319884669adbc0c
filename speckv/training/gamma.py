"""``speckv train``: the γ-MLP on exact traces, for the most tokens per second.

A decision's features depend on the decisions before it. So examples are gathered in rounds: first
under γ drawn at random, then under the policy of the round before, whose λ is solved to a fixed
point on the training answers: λ is the rate that the policy reaches with it. Several MLPs, of
different seeds, are fitted on the likelihood of what survives; the one that replays fastest on
validation prompts is kept.
"""

from __future__ import annotations

import math
import time
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, replace

import numpy as np
import torch
from torch import Tensor

from ..decoding.trained import pair_key
from ..kernels import layout as at
from ..kernels.layout import GAMMA_MAX, WIDTH_MAX
from ..policies import CostTable, Policy
from ..policies.mlp import Mlp, Record
from ..policies.policy import COMPRESSION_INDEX, mlp_policy
from ..reporter import Reporter
from ..traces.baselines import Static
from ..traces.calibration import calibration, log_loss, survival_logits
from ..traces.compare import split_prompts
from ..traces.decisions import Decisions, Explorer, decisions, join_decisions
from ..traces.packed import PackedController
from ..traces.replay import Controller, Replayed, replay, solve_rate
from ..traces.schema import Trace

_AHEAD = 2
"""Decisions learned from beyond those that a policy took, in each step."""

_likelihood = torch.nn.functional.binary_cross_entropy_with_logits


@dataclass(frozen=True)
class GammaRecipe:
    """How the γ-MLP is trained.

    Attributes
    ----------
    rounds : int
        Of gathering examples and fitting.
    epochs : int
        Most passes over the examples of a fit.
    batch : int
        Examples of a step.
    learning_rate : float
    patience : int
        Epochs without a better likelihood on the validation prompts before a fit stops.
    seeds : tuple of int
        Of the fits of a round.
    validation_share : float
        Of the training prompts.
    """

    rounds: int = 3
    epochs: int = 60
    batch: int = 2048
    learning_rate: float = 5e-3
    patience: int = 6
    seeds: tuple[int, ...] = (0, 1, 2)
    validation_share: float = 0.25

    def __post_init__(self) -> None:
        for name in ("rounds", "epochs", "batch", "patience"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name}: expected at least 1, got {getattr(self, name)}")
        if not 0 < self.learning_rate < math.inf:
            raise ValueError(f"learning_rate: expected more than 0, got {self.learning_rate}")
        if not 0 < self.validation_share < 1:
            raise ValueError(
                f"validation_share: expected a number between 0 and 1, got {self.validation_share}"
            )
        if not self.seeds or not all(0 <= seed < 2**32 for seed in self.seeds):
            raise ValueError(f"seeds: expected some from 0 to {2**32 - 1}, got {self.seeds}")


@dataclass(frozen=True)
class Cell:
    """The answers of one compression and temperature, with the costs of a step."""

    compression: str
    temperature: float
    trace: Trace
    cost: CostTable

    def where(self, prompts: frozenset[int]) -> Cell:
        """The answers to these prompts."""
        return replace(self, trace=self.trace.where(lambda a: a.prompt_id in prompts))


@dataclass(frozen=True)
class Trained:
    """A policy and how it came about.

    Attributes
    ----------
    mlp : Mlp
        With its training card and its record.
    over_static : mapping of str to float
        Tokens per second on the validation prompts over those of the best fixed γ of the training
        prompts, by ``"compression at temperature"``.
    """

    mlp: Mlp
    over_static: Mapping[str, float]


def cells_of(trace: Trace, costs: Mapping[str, CostTable]) -> list[Cell]:
    """The cells of a trace.

    Raises
    ------
    ValueError
        No costs for one of its compressions.
    """
    found = []
    for key in dict.fromkeys((a.compression, a.temperature) for a in trace.answers):
        if key[0] not in costs:
            raise ValueError(f"costs: expected a table for {key[0]}, got none")
        own = trace.where(lambda a, key=key: (a.compression, a.temperature) == key)  # type: ignore[misc]
        found.append(Cell(*key, own, costs[key[0]]))
    return found


def train_policy(
    trace: Trace,
    costs: Mapping[str, CostTable],
    recipe: GammaRecipe,
    report: Reporter,
    *,
    train_share: float = 0.5,
    seed: int = 0,
) -> Trained:
    """The γ-MLP of the pair of a trace, trained on some of its prompts.

    Parameters
    ----------
    costs : mapping of str to CostTable
        By compression.
    train_share, seed : float, int
        As for `speckv.traces.compare.compare`, which judges on the other prompts.

    Raises
    ------
    ValueError
        No costs for a compression, or too few prompts.
    """
    prompts = split_prompts(trace, train_share, seed)
    found = train_gamma(cells_of(trace, costs), prompts, recipe, report)
    info = trace.info
    card = {
        **found.mlp.card,
        "pair": pair_key(info.target, info.draft),
        "target": info.target["name"],
        "draft": info.draft["name"],
        "device": info.device,
        "versions": dict(info.versions),
        "prompts_sha256": info.recipe.get("prompts_sha256"),
        "split": {"train_share": train_share, "seed": seed},
        "positions": len(trace.rows),
        "costs": {name: asdict(cost) for name, cost in costs.items()},
        "date": time.strftime("%Y-%m-%d", time.gmtime()),
    }
    return replace(found, mlp=replace(found.mlp, card=card))


def train_gamma(
    cells: Sequence[Cell],
    prompts: frozenset[int],
    recipe: GammaRecipe,
    report: Reporter,
) -> Trained:
    """Train the γ-MLP on the answers to ``prompts``; it sees no others.

    Parameters
    ----------
    cells : sequence of Cell
        With answers to at least four of the prompts in each.

    Raises
    ------
    ValueError
        No cells, or too few prompts.
    """
    if not cells:
        raise ValueError("cells: expected at least one, got none")
    fitting, validation = _split(prompts, recipe)
    train = [cell.where(fitting) for cell in cells]
    held = [cell.where(validation) for cell in cells]
    if not all(len(cell.trace.rows) for cell in (*train, *held)):
        raise ValueError(
            f"prompts: expected enough to fit on and to validate on, got {len(prompts)}"
        )
    static = [best_static(cell) for cell in train]
    seen, checked = _explored(train), _explored(held)
    report.stage("Training the policy", recipe.rounds * len(recipe.seeds))
    best: tuple[float, Mlp] | None = None
    for round_number in range(recipe.rounds):
        own: tuple[float, Mlp] | None = None
        for seed in recipe.seeds:
            mlp = fit(seen, checked, recipe, seed)
            gains = _gains(mlp, train, held, static)
            score = float(np.mean(np.log(gains)))
            if own is None or score > own[0]:
                own = score, mlp
            report.advance(1, f"round {round_number + 1}: {math.exp(score) - 1:+.1%} over fixed γ")
        assert own is not None
        if best is None or own[0] > best[0]:
            best = own
        if round_number + 1 < recipe.rounds:
            seen = join_decisions([seen, *_under(own[1], train)])
            checked = join_decisions([checked, *_under(own[1], held)])
    assert best is not None
    mlp = best[1]
    gains = _gains(mlp, train, held, static)
    over = {
        f"{cell.compression} at {cell.temperature:g}": gain
        for cell, gain in zip(cells, gains, strict=True)
    }
    card = {
        "recipe": asdict(recipe) | {"seeds": list(recipe.seeds)},
        "examples": len(seen),
        "prompts": {"fitted": sorted(fitting), "validated": sorted(validation)},
        "validation": {
            "log_loss": log_loss(mlp, checked),
            "over_static": over,
            "calibration": calibration(mlp, checked),
        },
    }
    policy, cells = mlp_policy("trained", mlp), [cell.where(prompts) for cell in cells]
    runs = [(cell, reach(policy, cell)[1]) for cell in cells]
    card["acceptance_lower_quartile"] = _acceptance_quartile(runs)
    return Trained(replace(mlp, card=card, records=_records(runs)), over)


def fit(train: Decisions, validation: Decisions, recipe: GammaRecipe, seed: int) -> Mlp:
    """One MLP of the ``survival`` layout, by maximum likelihood with early stopping."""
    generator = torch.Generator().manual_seed(seed)
    x, y, w = _tensors(train)
    mean, scale = x.mean(dim=0), _reciprocal(x.std(dim=0))
    x = (x - mean) * scale
    held_x, held_y, held_w = _tensors(validation)
    held_x = (held_x - mean) * scale
    bound = 1 / math.sqrt(at.FEATURES)
    hidden_weight = torch.empty(at.HIDDEN, at.FEATURES).uniform_(
        -2 * bound, 2 * bound, generator=generator
    )
    output_weight = torch.empty(at.OUTPUTS, at.HIDDEN).uniform_(-bound, bound, generator=generator)
    rate = ((y * w).sum(dim=0) / w.sum(dim=0).clamp(min=1)).clamp(1e-4, 1 - 1e-4)
    output_bias = torch.zeros(at.OUTPUTS)
    output_bias[:GAMMA_MAX] = rate.logit()
    parameters = [hidden_weight, torch.zeros(at.HIDDEN), output_weight, output_bias]
    for parameter in parameters:
        parameter.requires_grad_(True)
    optimizer = torch.optim.Adam(parameters, lr=recipe.learning_rate)
    steps = math.ceil(len(x) / recipe.batch)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, recipe.epochs * steps)
    best, kept, waited = math.inf, [p.detach().clone() for p in parameters], 0
    for _ in range(recipe.epochs):
        for index in torch.randperm(len(x), generator=generator).split(recipe.batch):
            optimizer.zero_grad()
            loss = _likelihood(survival_logits(x[index], parameters), y[index], weight=w[index])
            loss.backward()
            optimizer.step()
            schedule.step()
        with torch.no_grad():
            found = float(_likelihood(survival_logits(held_x, parameters), held_y, weight=held_w))
        if found < best:
            best, kept, waited = found, [p.detach().clone() for p in parameters], 0
        else:
            waited += 1
            if waited >= recipe.patience:
                break
    names = ("hidden_weight", "hidden_bias", "output_weight", "output_bias")
    tensors = dict(zip(names, kept, strict=True))
    tensors |= {"feature_mean": mean, "feature_scale": scale}
    return Mlp(at.LAYOUT_SURVIVAL, tuple(range(1, GAMMA_MAX + 1)), tensors)


def reach(policy: Policy, cell: Cell) -> tuple[float, Replayed]:
    """`solve_rate` of a policy of the rate objective."""

    def build(rate: float) -> Controller:
        return PackedController(_packed(policy, cell, rate))

    return solve_rate(build, cell.trace, cell.cost)


def _packed(policy: Policy, cell: Cell, rate: float) -> Tensor:
    return policy.pack(cell.compression, cell.cost, temperature=cell.temperature, rate=rate)


def best_static(cell: Cell) -> int:
    """The fixed γ of the least time."""
    times = [
        replay(cell.trace, Static({}, gamma), cell.cost).ms.sum() for gamma in range(WIDTH_MAX)
    ]
    return int(np.argmin(times))


def _split(prompts: frozenset[int], recipe: GammaRecipe) -> tuple[frozenset[int], frozenset[int]]:
    shuffled = np.random.default_rng(recipe.seeds[0]).permutation(sorted(prompts)).tolist()
    count = round(recipe.validation_share * len(shuffled))
    return frozenset(shuffled[count:]), frozenset(shuffled[:count])


def _explored(cells: Sequence[Cell]) -> Decisions:
    return join_decisions(
        [
            decisions(cell.trace, replay(cell.trace, Explorer(seed), cell.cost))
            for seed, cell in enumerate(cells)
        ]
    )


def _under(mlp: Mlp, cells: Sequence[Cell]) -> list[Decisions]:
    policy = mlp_policy("trained", mlp)
    return [decisions(c.trace, reach(policy, c)[1], ahead=_AHEAD) for c in cells]


def _gains(
    mlp: Mlp, train: Sequence[Cell], held: Sequence[Cell], static: Sequence[int]
) -> list[float]:
    """Tokens per second on held-out answers over those of a fixed γ, by cell, with λ of train."""
    policy = mlp_policy("trained", mlp)
    gains = []
    for cell, other, gamma in zip(train, held, static, strict=True):
        packed = _packed(policy, cell, reach(policy, cell)[0])
        own = replay(other.trace, PackedController(packed), other.cost)
        base = replay(other.trace, Static({}, gamma), other.cost)
        gains.append(own.tokens_per_second / base.tokens_per_second)
    return gains


def _records(runs: Sequence[tuple[Cell, Replayed]]) -> dict[tuple[int, float], Record]:
    """Of each compression and temperature, from what the policy did on its answers."""
    records: dict[tuple[int, float], Record] = {}
    for cell, own in runs:
        place = COMPRESSION_INDEX[cell.compression], cell.temperature
        if place in records:  # of a weight format that counts as another
            continue
        trace = cell.trace
        accepted = trace.rows.accepted[trace.rows.drafted > 0]
        places = np.concatenate([np.arange(n) for n in trace.lengths])
        prompts = np.array([len(a.prompt_tokens) for a in trace.answers])
        context = (places + np.repeat(prompts, trace.lengths)).mean()
        curve = tuple(float((accepted >= k).mean()) for k in range(1, WIDTH_MAX))
        record = Record(curve, float(context), 1.0)
        gain = own.tokens_per_second / 1e3 / record.rate(cell.cost)
        records[place] = replace(record, gain=gain)
    return records


def _acceptance_quartile(runs: Sequence[tuple[Cell, Replayed]]) -> float:
    """What the record of acceptance is above at three of four decisions."""
    found = [decisions(cell.trace, own) for cell, own in runs]
    records = np.concatenate([each.features[:, at.FEATURE_ACCEPTANCE] for each in found])
    return float(np.quantile(records, 0.25))


def _tensors(examples: Decisions) -> tuple[Tensor, Tensor, Tensor]:
    return (
        torch.from_numpy(examples.features),
        torch.from_numpy(examples.survived.astype(np.float32)),
        torch.from_numpy(examples.known.astype(np.float32)),
    )


def _reciprocal(deviation: Tensor) -> Tensor:
    """1 / deviation; 0 for an input that does not vary, of which nothing could be learned."""
    return torch.where(deviation > 1e-6, 1 / deviation.clamp(min=1e-6), 0.0)
