"""Plain decoding (γ=0) against transformers' greedy ``generate``, same dtype, interleaved.

    python -m bench.plain --dtype fp32 --pairs 20 --tokens 32

Each pair runs one prompt on both, in alternating order, after a warm-up of both; a red gate (token
ids that differ in fp32) prints no number. The figure is the median over pairs of the ratio of
tokens per second, with a bootstrap interval over pairs.
"""

from __future__ import annotations

import argparse
import time
from pathlib import Path
from typing import Any

import numpy as np
import torch

from bench.environment import environment, write_json
from speckv import Engine, SamplingParams
from speckv.models.hub import fetch
from speckv.prompts import evaluation_prompts

_DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16}


def measure(dtype: str, pairs: int, tokens: int) -> dict[str, Any]:
    """Run the pairs.

    Raises
    ------
    RuntimeError
        fp32 token ids differ: no number is worth having.
    """
    from transformers import AutoModelForCausalLM

    engine = Engine.from_pretrained(compression=dtype, policy="fixed:0")
    model = AutoModelForCausalLM.from_pretrained(fetch(), dtype=_DTYPES[dtype])
    model.eval()
    model.generation_config.eos_token_id = None  # as ignore_eos: both go the whole length
    params = SamplingParams(max_new_tokens=tokens, ignore_eos=True)
    prompts = [engine.encode(prompt.text, chat=True) for prompt in evaluation_prompts(5)]

    def ours(prompt: list[int]) -> tuple[float, list[int]]:
        start = time.perf_counter()
        result = engine.generate(prompt, params)
        return time.perf_counter() - start, result.token_ids

    def theirs(prompt: list[int]) -> tuple[float, list[int]]:
        ids = torch.tensor([prompt])
        start = time.perf_counter()
        with torch.inference_mode():
            output = model.generate(
                ids,
                attention_mask=torch.ones_like(ids),
                do_sample=False,
                max_new_tokens=tokens,
            )
        return time.perf_counter() - start, output[0, len(prompt) :].tolist()

    ours(prompts[0])
    theirs(prompts[0])
    rows = []
    for pair in range(pairs):
        prompt = prompts[pair % len(prompts)]
        order = (ours, theirs) if pair % 2 == 0 else (theirs, ours)
        times, ids = {}, {}
        for run in order:
            times[run], ids[run] = run(prompt)
        if dtype == "fp32" and ids[ours] != ids[theirs]:
            raise RuntimeError(f"token ids differ from transformers' on prompt {pair}")
        rows.append({"speckv_s": times[ours], "transformers_s": times[theirs]})
    ratios = np.array([row["transformers_s"] / row["speckv_s"] for row in rows])
    low, high = bootstrap_median(ratios)
    return {
        "benchmark": "plain",
        "dtype": dtype,
        "tokens": tokens,
        "pairs": rows,
        "speckv_tokens_per_second": tokens / float(np.median([r["speckv_s"] for r in rows])),
        "transformers_tokens_per_second": tokens
        / float(np.median([r["transformers_s"] for r in rows])),
        "median_ratio": float(np.median(ratios)),
        "ratio_95": [low, high],
        "environment": environment(),
    }


def bootstrap_median(values: np.ndarray, resamples: int = 10_000) -> tuple[float, float]:
    """95% percentile bootstrap interval of the median."""
    draws = np.random.default_rng(0).choice(values, (resamples, len(values)))
    low, high = np.quantile(np.median(draws, axis=1), [0.025, 0.975])
    return float(low), float(high)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--dtype", choices=sorted(_DTYPES), default="fp32")
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
