"""One policy for all compressions of a pair beside one trained for each, by replay.

    python -m bench.specialists trace.parquet --out FILE

Both are trained on the same prompts, with the costs of the trace, and judged on the others. A
policy for one compression has a third of the rows to learn from, where there are three.
"""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

import numpy as np

from bench.environment import command, environment, write_json
from speckv._cli_output import Progressing, stderr_console
from speckv.policies.mlp import Mlp
from speckv.policies.policy import mlp_policy
from speckv.reporter import Reporter
from speckv.traces.compare import speedup_interval, split_prompts
from speckv.traces.packed import PackedController
from speckv.traces.replay import replay
from speckv.traces.schema import Trace, read_trace
from speckv.training.gamma import Cell, GammaRecipe, cells_of, train_policy


def measure(trace: Trace, recipe: GammaRecipe, report: Reporter) -> dict[str, Any]:
    """Train and judge.

    Raises
    ------
    ValueError
        The trace has no costs, or too few prompts.
    """
    costs = trace.info.costs
    training = split_prompts(trace, 0.5, 0)
    judged = cells_of(trace.where(lambda a: a.prompt_id not in training), costs)
    one = train_policy(trace, costs, recipe, report).mlp
    ms: dict[float, list[tuple[np.ndarray, np.ndarray]]] = {}
    cells = []
    for compression in dict.fromkeys(cell.compression for cell in judged):
        part = trace.where(lambda a, name=compression: a.compression == name)  # type: ignore[misc]
        own = train_policy(part, costs, recipe, report).mlp
        for cell in judged:
            if cell.compression == compression:
                pair = _ms(one, cell), _ms(own, cell)
                ms.setdefault(cell.temperature, []).append(pair)
                cells.append({"compression": compression, **_row(cell.temperature, *pair)})
    pooled = [
        _row(temperature, *(np.sum(side, axis=0) for side in zip(*pairs, strict=True)))
        for temperature, pairs in ms.items()
    ]
    return {
        "benchmark": "specialists",
        "cells": cells,
        "pooled": pooled,
        "positions": len(trace.rows),
        "command": command(),
        "environment": environment(),
    }


def _ms(mlp: Mlp, cell: Cell) -> np.ndarray:
    """Milliseconds of each judged answer."""
    policy = mlp_policy("speckv", mlp)
    packed = policy.pack(cell.compression, cell.cost, temperature=cell.temperature)
    return replay(cell.trace, PackedController(packed), cell.cost).ms


def _row(temperature: float, one: np.ndarray, own: np.ndarray) -> dict[str, Any]:
    return {
        "temperature": temperature,
        "prompts": len(one),
        "one_over_own": float(own.sum() / one.sum()),
        "one_over_own_95": speedup_interval(one, own),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("trace", type=Path)
    parser.add_argument("--rounds", type=int, default=GammaRecipe.rounds)
    parser.add_argument("--seeds", type=int, default=len(GammaRecipe.seeds))
    parser.add_argument("--out", type=Path, help="JSON file to write")
    arguments = parser.parse_args()
    recipe = GammaRecipe(rounds=arguments.rounds, seeds=tuple(range(arguments.seeds)))
    with Progressing(stderr_console()) as report:
        document = measure(read_trace(arguments.trace), recipe, report)
    for row in (*document["cells"], *document["pooled"]):
        low, high = row["one_over_own_95"]
        print(
            f"{row.get('compression', 'all'):5} at {row['temperature']:g}: one policy over its own "
            f"{row['one_over_own']:.4f} [{low:.4f}, {high:.4f}]"
        )
    if arguments.out:
        write_json(arguments.out, document)


if __name__ == "__main__":
    main()
