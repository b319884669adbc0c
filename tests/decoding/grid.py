"""What the tests of losslessness on tiny models decode: prompts, samplings, policies, drafts."""

from __future__ import annotations

from typing import Any

from speckv.sampling import SamplingParams

PROMPTS = [
    [5, 9, 3],
    [7, 1, 2, 3, 4, 5, 6, 7, 8],
    [11],
    [(i * i + 3 * i) % 199 for i in range(17)],
]
NEW_TOKENS = [24, 17, 30, 11]
EOS = [90, 117, 160]  # end some rows of every family in every sampling below, and not the others

COMPRESSIONS = ["fp32", "fp16", "bf16", "int8", "nf4"]
DTYPES = ["fp32", "fp16", "bf16"]
POLICIES = ["fixed:1", "fixed:4", "fixed:15", "entropy:1.5", "confidence:0.6", "paper", "speckv"]
ONE_OF_EACH_MODE = ["fixed:4", "entropy:1.5", "confidence:0.6", "paper", "speckv"]
DRAFTS = ["random", "perturbed", "target"]
ACCEPTANCE = {"random": (0.0, 0.15), "perturbed": (0.25, 0.75), "target": (1.0, 1.0)}

_GREEDY = [{"temperature": 0.0}] * 4
_SAMPLED = [{"temperature": t} for t in (0.7, 1.2, 0.7, 1.2)]
_TRUNCATED = [
    {"temperature": 0.7, "top_k": 8},
    {"temperature": 1.2, "top_p": 0.8},
    {"temperature": 1.2, "top_k": 20, "top_p": 0.9},
    {"temperature": 0.7, "top_p": 0.95},
]
SAMPLINGS: dict[str, list[dict[str, Any]]] = {
    "greedy": _GREEDY,
    "sampled": _SAMPLED,
    "truncated": _TRUNCATED,
    "mixed": [_GREEDY[0], _TRUNCATED[1], _GREEDY[2], _SAMPLED[3]],
}


def params(sampling: str) -> list[SamplingParams]:
    """The four rows' parameters, each with its own seed."""
    return [
        SamplingParams(max_new_tokens=count, seed=100 + i, **row)
        for i, (count, row) in enumerate(zip(NEW_TOKENS, SAMPLINGS[sampling], strict=True))
    ]
