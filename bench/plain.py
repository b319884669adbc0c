"""Plain decoding (γ=0) against transformers' greedy ``generate``, same dtype, interleaved.

    python -m bench.plain --dtype fp32 --pairs 20 --tokens 32

Each pair runs one prompt on both, in alternating order, after a warm-up of both; a red gate (token
ids that differ in fp32) prints no number. The figure is the median over pairs of the ratio of
tokens per second, with a bootstrap interval over pairs.
"""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

import numpy as np

from bench.environment import command, environment, write_json
from bench.sides import (
    DTYPES,
    bootstrap_median,
    compare,
    differing,
    engine_side,
    transformers_side,
)
from speckv import Engine, SamplingParams
from speckv.models.hub import fetch
from speckv.prompts import evaluation_prompts


def measure(dtype: str, pairs: int, tokens: int) -> dict[str, Any]:
    """Run the pairs.

    Raises
    ------
    RuntimeError
        fp32 token ids differ: no number is worth having.
    """
    from transformers import AutoModelForCausalLM

    engine = Engine.from_pretrained(compression=dtype, policy="fixed:0")
    model = AutoModelForCausalLM.from_pretrained(fetch(), dtype=DTYPES[dtype])
    model.eval()
    model.generation_config.eos_token_id = None  # as ignore_eos: both go the whole length
    params = SamplingParams(max_new_tokens=tokens, ignore_eos=True)
    prompts = [engine.encode(prompt.text, chat=True) for prompt in evaluation_prompts(5)]

    sides = {
        "speckv": engine_side(engine, params),
        "transformers": transformers_side(model, tokens),
    }
    for run in sides.values():
        run(prompts[0])
    turns = [prompts[pair % len(prompts)] for pair in range(pairs)]
    found = compare(sides, turns, exact=dtype == "fp32")
    rows = [{f"{name}_s": row[name]["seconds"] for name in sides} for row in found]
    ratios = np.array([row["transformers_s"] / row["speckv_s"] for row in rows])
    low, high = bootstrap_median(ratios)
    return {
        "benchmark": "plain",
        "dtype": dtype,
        "tokens": tokens,
        "pairs": rows,
        "differing_prompts": differing(found, "transformers"),
        "speckv_tokens_per_second": tokens / float(np.median([r["speckv_s"] for r in rows])),
        "transformers_tokens_per_second": tokens
        / float(np.median([r["transformers_s"] for r in rows])),
        "median_ratio": float(np.median(ratios)),
        "ratio_95": [low, high],
        "command": command(),
        "environment": environment(),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--dtype", choices=sorted(DTYPES), default="fp32")
    parser.add_argument("--pairs", type=int, default=20)
    parser.add_argument("--tokens", type=int, default=32)
    parser.add_argument("--out", type=Path, help="JSON file to write")
    arguments = parser.parse_args()
    row = measure(arguments.dtype, arguments.pairs, arguments.tokens)
    print(
        f"{row['dtype']}: speckv {row['speckv_tokens_per_second']:.1f} tokens/s, transformers "
        f"{row['transformers_tokens_per_second']:.1f}; median paired ratio "
        f"{row['median_ratio']:.3f}, 95% [{row['ratio_95'][0]:.3f}, {row['ratio_95'][1]:.3f}] "
        f"over {len(row['pairs'])} pairs of {row['tokens']} tokens"
    )
    if arguments.out:
        write_json(arguments.out, row)


if __name__ == "__main__":
    main()
