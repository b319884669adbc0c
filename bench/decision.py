"""What a decision costs on the CPU: the paper's four ``predict`` calls, and the packed MLP.

    python -m bench.decision --out FILE

By turns, on one thread. The regressor is the paper's, fitted to made-up steps: what it costs does
not depend on what it has learned. Its weights, packed, are the ``paper`` layout; the ``survival``
layout is the policy that comes with the package. Both are timed as the MLP alone, with what chooses
γ from it.
"""

from __future__ import annotations

import argparse
from importlib.metadata import version
from pathlib import Path
from typing import Any

import numpy as np
import torch

from bench.environment import command, environment, write_json
from bench.lab import COST
from speckv.decoding.trained import SHIPPED
from speckv.kernels import cpu_step
from speckv.kernels import layout as at
from speckv.models.slice_draft import shipped_drafts
from speckv.paper.data import COMPRESSIONS, GAMMAS, Floats
from speckv.paper.decision import choose, paper_policy, running_features, timed
from speckv.paper.protocol import new_regressor
from speckv.policies.mlp import Mlp
from speckv.policies.policy import mlp_policy

_WARM_UP = 100
_LEAST_SAME = 0.99  # near ties fall either way in fp32 and fp64
_QUANTILES = {"p50": 0.5, "p90": 0.9, "p99": 0.99}


def made_up_steps(count: int = 2000, seed: int = 0) -> tuple[Floats, Floats]:
    """Inputs as those of `speckv.paper.data.Steps`, [N, 6], and acceptance rates that follow."""
    draw = np.random.default_rng(seed)
    mean, more = draw.exponential(1.0, count), draw.exponential(0.5, count)
    inputs = np.column_stack(
        [
            mean,
            np.exp2(-mean),
            mean + more,
            np.exp2(-mean - more),
            draw.integers(0, len(COMPRESSIONS), count),
            draw.choice(GAMMAS, count),
        ]
    )
    noise = draw.normal(0.0, 0.1, count)
    return inputs, np.clip(1.1 - 0.3 * mean - 0.04 * inputs[:, -1] + noise, 0.0, 1.0)


def measure(decisions: int) -> dict[str, Any]:
    """Time so many decisions of each kind, the order of the kinds changing from one to the next.

    Raises
    ------
    SpeckvError
        scikit-learn is not installed.
    ValueError
        The packed paper MLP does not choose as the regressor does.
    """
    inputs, rates = made_up_steps()
    regressor = new_regressor().fit(inputs, rates)
    paper = paper_policy(regressor)
    (folder,) = shipped_drafts()
    survival = mlp_policy("speckv", Mlp.load(folder / SHIPPED)).pack("fp32", COST)
    rows = [0] * at.ROW_WORDS
    rows[at.LENGTH], rows[at.LIMIT], rows[at.DRAFTED] = 100, 200, 1
    ms: dict[str, list[float]] = {"predict": [], "paper": [], "survival": []}
    same = 0
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        for i in range(_WARM_UP + decisions):
            row = inputs[i % len(inputs)]
            running = running_features(row)
            paper[at.COMPRESSION] = survival[at.COMPRESSION] = row[4]
            calls: dict[str, tuple[Any, ...]] = {
                "predict": (choose, regressor, row),
                "paper": (cpu_step.best_gamma, paper, rows, running),
                "survival": (cpu_step.best_gamma, survival, rows, running),
            }
            names = list(calls)
            turn = i % len(names)
            chosen = {}
            for name in names[turn:] + names[:turn]:
                chosen[name], taken = timed(*calls[name])
                if i >= _WARM_UP:
                    ms[name].append(taken)
            same += i >= _WARM_UP and chosen["predict"] == chosen["paper"]
        facts = environment()
    finally:
        torch.set_num_threads(threads)
    if same < _LEAST_SAME * decisions:
        raise ValueError(
            f"the packed MLP chose as the regressor in {same} of {decisions} decisions"
        )
    return summary(ms) | {
        "same_choice": same / decisions,
        "scikit-learn": version("scikit-learn"),
        "command": command(),
        "environment": facts,
    }


def summary(ms: dict[str, list[float]]) -> dict[str, Any]:
    """Quantiles in microseconds, and how many times cheaper than ``predict`` by the medians."""
    us = {
        name: {q: 1e3 * float(np.quantile(values, at)) for q, at in _QUANTILES.items()}
        for name, values in ms.items()
    }
    cheaper = {name: us["predict"]["p50"] / us[name]["p50"] for name in us if name != "predict"}
    return {
        "benchmark": "decision",
        "decisions": len(ms["predict"]),
        "us": us,
        "times_cheaper": cheaper,
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--decisions", type=int, default=5000, help="of each kind")
    parser.add_argument("--out", type=Path, help="JSON file to write")
    arguments = parser.parse_args()
    document = measure(arguments.decisions)
    for name, found in document["us"].items():
        cheaper = document["times_cheaper"].get(name)
        print(
            f"{name:9} p50 {found['p50']:7.1f} us, p90 {found['p90']:7.1f}, p99 {found['p99']:7.1f}"
            + ("" if cheaper is None else f"; {cheaper:.1f}x cheaper")
        )
    if arguments.out:
        write_json(arguments.out, document)


if __name__ == "__main__":
    main()
