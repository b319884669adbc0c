"""The sides of a comparison, the engine and transformers, and prompts run on all of them."""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np
import torch

from speckv import Engine, SamplingParams

DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16}

Run = Callable[[list[int]], tuple[float, list[int]]]
"""Seconds and new token ids of a prompt."""


def engine_side(engine: Engine, params: SamplingParams) -> Run:
    """The engine, timed from the prompt's ids to the last token."""

    def run(prompt: list[int]) -> tuple[float, list[int]]:
        start = time.perf_counter()
        result = engine.generate(prompt, params)
        return time.perf_counter() - start, result.token_ids

    return run


def transformers_side(
    model: Any,
    tokens: int,
    *,
    before: Callable[[], None] = lambda: None,
    **options: Any,
) -> Run:
    """Transformers' greedy ``generate``, timed likewise.

    Parameters
    ----------
    before : callable
        Called ahead of each run, untimed.
    options
        For ``generate``.
    """

    def run(prompt: list[int]) -> tuple[float, list[int]]:
        before()
        ids = torch.tensor([prompt], device=model.device)
        start = time.perf_counter()
        with torch.inference_mode():
            output = model.generate(
                ids,
                attention_mask=torch.ones_like(ids),
                do_sample=False,
                max_new_tokens=tokens,
                **options,
            )
        return time.perf_counter() - start, output[0, len(prompt) :].tolist()

    return run


def compare(
    sides: Mapping[str, Run], prompts: Sequence[list[int]], *, exact: bool
) -> list[dict[str, Any]]:
    """Run every prompt on every side, in an order that rotates from prompt to prompt.

    Returns
    -------
    list of dict
        For each prompt and side, ``seconds``, ``tokens`` and ``identical``: whether its token ids
        are those of the first side.

    Raises
    ------
    RuntimeError
        With ``exact``, if they are not: no number is worth having.
    """
    names = list(sides)
    rows = []
    for i, prompt in enumerate(prompts):
        shift = i % len(names)
        runs = {name: sides[name](prompt) for name in names[shift:] + names[:shift]}
        expected = runs[names[0]][1]
        for name in names:
            if exact and runs[name][1] != expected:
                raise RuntimeError(f"{name}: token ids differ from {names[0]}'s on prompt {i}")
        rows.append(
            {
                name: {"seconds": seconds, "tokens": len(ids), "identical": ids == expected}
                for name, (seconds, ids) in runs.items()
            }
        )
    return rows


def differing(rows: Sequence[Mapping[str, Any]], name: str) -> int:
    """Prompts of `compare` on which a side's token ids are not those of the first side."""
    return sum(not row[name]["identical"] for row in rows)


def bootstrap_median(values: np.ndarray, resamples: int = 10_000) -> tuple[float, float]:
    """95% percentile bootstrap interval of the median."""
    draws = np.random.default_rng(0).choice(values, (resamples, len(values)))
    low, high = np.quantile(np.median(draws, axis=1), [0.025, 0.975])
    return float(low), float(high)
