"""A pair of models under several policies against plain decoding with the same engine.

    python -m bench.pair --dtype bf16 --policies fixed:3,confidence:0.4

Every prompt runs once under each policy and plainly, in an order that rotates from prompt to
prompt, after a warm-up of all. Token ids must be those of plain decoding, or no number is printed.
A figure is the median over prompts of the ratio of tokens per second (the whole call, prefill
included), with a bootstrap interval over prompts. Policies are to be chosen on other prompts than
those reported: ``--skip`` leaves out the first of each task, and ``--held-out`` those that the
pair's trained policy has learned from.
"""

from __future__ import annotations

import argparse
import time
from pathlib import Path
from typing import Any

import numpy as np

from bench.environment import command, environment, write_json
from bench.sides import bootstrap_median
from speckv import Engine, Result, SamplingParams
from speckv.prompts import Prompt, evaluation_prompts

PLAIN = "fixed:0"


def measure(
    engine: Engine, policies: list[str], prompts: list[Prompt], tokens: int
) -> dict[str, Any]:
    """Run the prompts.

    Raises
    ------
    RuntimeError
        A policy's token ids are not those of plain decoding.
    """
    params = SamplingParams(max_new_tokens=tokens)
    names = [PLAIN, *policies]
    encoded = [engine.encode(prompt.text, chat=True) for prompt in prompts]
    for name in names:
        engine.generate(encoded[0], SamplingParams(max_new_tokens=16), policy=name)
    rows = []
    for i, (prompt, ids) in enumerate(zip(prompts, encoded, strict=True)):
        results = {}
        shift = i % len(names)
        for name in names[shift:] + names[:shift]:
            start = time.perf_counter()
            results[name] = engine.generate(ids, params, policy=name), time.perf_counter() - start
        expected = results[PLAIN][0].token_ids
        for name, (result, _) in results.items():
            if result.token_ids != expected:
                raise RuntimeError(f"{name}: token ids differ from plain decoding's on prompt {i}")
        rows.append(
            {
                "task": prompt.task,
                "tokens": len(expected),
                "runs": {name: _row(*run) for name, run in results.items()},
            }
        )
    return {
        "benchmark": "pair",
        "engine": engine.describe(),
        "tokens": tokens,
        "prompts": rows,
        "policies": {name: summary(rows, name) for name in policies},
        "command": command(),
        "environment": environment(),
    }


def _learned_from(engine: Engine) -> set[int]:
    """Places, among the built-in prompts, of those that the pair's policy was trained on."""
    policy = engine._trained
    if policy is None or policy.mlp is None:
        raise ValueError("--held-out: expected a pair with a trained policy, got none")
    return {place for part in policy.mlp.card["prompts"].values() for place in part}


def _row(result: Result, seconds: float) -> dict[str, Any]:
    stats = result.stats
    return {
        "seconds": seconds,
        "steps": len(stats.steps),
        "drafted": sum(gamma for gamma, _ in stats.steps),
        "accepted": sum(accepted for _, accepted in stats.steps),
        "parts": stats.to_dict()["seconds"],
    }


def summary(rows: list[dict[str, Any]], name: str) -> dict[str, Any]:
    """A policy's median ratio over all prompts and by task, with its acceptance."""
    return {
        "all": _ratio(rows, name),
        **{
            task: _ratio([row for row in rows if row["task"] == task], name)
            for task in dict.fromkeys(row["task"] for row in rows)
        },
    }


def _ratio(rows: list[dict[str, Any]], name: str) -> dict[str, Any]:
    ratios = np.array([r["runs"][PLAIN]["seconds"] / r["runs"][name]["seconds"] for r in rows])
    drafted = sum(r["runs"][name]["drafted"] for r in rows)
    accepted = sum(r["runs"][name]["accepted"] for r in rows)
    steps = sum(r["runs"][name]["steps"] for r in rows)
    return {
        "ratio": float(np.median(ratios)),
        "ratio_95": list(bootstrap_median(ratios)),
        "tokens_per_second": sum(r["tokens"] for r in rows)
        / sum(r["runs"][name]["seconds"] for r in rows),
        "acceptance": accepted / drafted if drafted else None,
        "tokens_per_step": (accepted + steps) / steps if steps else None,
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--dtype", choices=["fp32", "bf16"], default="bf16")
    parser.add_argument("--draft", help="as for speckv generate")
    parser.add_argument("--policies", default="fixed:3,speckv", help="separated by commas")
    parser.add_argument("--per-task", type=int, default=5)
    parser.add_argument("--skip", type=int, default=0, help="prompts of each task to leave out")
    parser.add_argument("--tokens", type=int, default=128)
    parser.add_argument("--out", type=Path, help="JSON file to write")
    parser.add_argument(
        "--held-out", action="store_true", help="only prompts that the policy has not learned from"
    )
    arguments = parser.parse_args()
    engine = Engine.from_pretrained(draft=arguments.draft, compression=arguments.dtype)
    prompts = evaluation_prompts(arguments.per_task, skip=arguments.skip)
    if arguments.held_out:
        known = _learned_from(engine)
        every = [prompt for i, prompt in enumerate(evaluation_prompts()) if i not in known]
        prompts = [prompt for prompt in every if prompt in prompts]
    document = measure(engine, arguments.policies.split(","), prompts, arguments.tokens)
    for name, parts in document["policies"].items():
        for part, row in parts.items():
            low, high = row["ratio_95"]
            acceptance = "-" if row["acceptance"] is None else f"{row['acceptance']:.1%}"
            print(
                f"{name:18} {part:14} {row['ratio']:.3f}x plain, 95% [{low:.3f}, {high:.3f}], "
                f"{row['tokens_per_second']:.1f} tokens/s, acceptance {acceptance}, "
                f"{row['tokens_per_step']:.2f} tokens a step"
            )
    if arguments.out:
        write_json(arguments.out, document)


if __name__ == "__main__":
    main()
