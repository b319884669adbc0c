"""Traces of tiny pairs, recorded once, and policies of every mode."""

from __future__ import annotations

from collections.abc import Callable
from functools import cache

import pytest
import torch

from speckv.kernels import layout as at
from speckv.policies import Mlp, Policy, parse_policy
from speckv.traces.record import record
from speckv.traces.schema import Answer, Trace, join
from tests.decoding.grid import EOS, PROMPTS
from tests.decoding.tiny import wrapped
from tests.traces.synthetic import INFO

NEW_TOKENS = [40, 33, 1, 37]
TEMPERATURES = {"greedy": 0.0, "cool": 0.7, "warm": 1.0}


def survival_policy(name: str, seed: int, candidates: range = range(16)) -> Policy:
    """A random MLP of the survival layout whose γ moves with every feature."""
    draw = torch.Generator().manual_seed(seed)

    def normal(*shape: int) -> torch.Tensor:
        return torch.randn(shape, generator=draw)

    bias = torch.linspace(1.0, -2.5, at.OUTPUTS)
    tensors = {
        "feature_mean": normal(at.FEATURES) * 0.2,
        "feature_scale": normal(at.FEATURES).abs() + 0.3,
        "hidden_weight": normal(at.HIDDEN, at.FEATURES) * 0.5,
        "hidden_bias": normal(at.HIDDEN),
        "output_weight": normal(at.OUTPUTS, at.HIDDEN) * 0.7,
        "output_bias": bias,
    }
    mlp = Mlp(at.LAYOUT_SURVIVAL, tuple(range(1, 16)), tensors)
    objective = at.OBJECTIVE_RATE
    return Policy(name, at.MODE_MLP, mlp=mlp, objective=objective, candidates=tuple(candidates))


POLICIES: dict[str, Policy] = {
    name: parse_policy(name)
    for name in (
        *(f"fixed:{g}" for g in (0, 1, 4, 15)),
        *("entropy:0.5", "entropy:1.5", "confidence:0.6", "confidence:0.9", "paper", "speckv"),
    )
} | {
    "survival": survival_policy("survival", 10),
    "survival-2": survival_policy("survival-2", 53),
    "survival-even": survival_policy("survival-even", 28, range(0, 16, 2)),
}


def answers(compression: str, temperature: float, seed: int) -> list[Answer]:
    return [
        Answer(i, f"task {i % 2}", compression, temperature, seed + i, limit, tuple(prompt))
        for i, (prompt, limit) in enumerate(zip(PROMPTS, NEW_TOKENS, strict=True))
    ]


@cache
def _recorded(draft: str, compression: str, sampling: str, seed: int) -> Trace:
    asked = answers(compression, TEMPERATURES[sampling], seed)
    models = wrapped("llama", "target", compression), wrapped("llama", draft, "fp32")
    return join(INFO, zip(asked, record(*models, asked, eos=EOS), strict=True))


@pytest.fixture
def recorded() -> Callable[[str, str, str, int], Trace]:
    """The trace of a tiny pair by kind of draft, compression, sampling and seed."""
    return _recorded
