"""Microbenchmarks of a decision, with pytest-benchmark: what drafting a token costs besides its
forward, and what verifying a draft does.

    python -m pytest bench/test_decision.py                       # here, on the CPU
    python -m pytest bench/test_decision.py --benchmark-disable   # that it runs at all

On a GPU, where a call only enqueues, kernels are timed by
``python -m bench.gpu --part kernels`` and ``--part loop``.
"""

from __future__ import annotations

from typing import Any

import pytest
import torch

from bench.lab import COST
from speckv.kernels import layout as at
from speckv.kernels import reference
from speckv.kernels.layout import StepState
from speckv.policies import parse_policy

VOCABULARIES = (32_000, 49_152, 128_256, 262_144)
POLICIES = ("fixed:4", "entropy:2", "paper", "speckv")


def drafting(batch: int) -> StepState:
    state = StepState.allocate(batch, 64)
    for row in range(batch):
        state.reset(row, [1, 2, 3], limit=60, request=row)
    return state


@pytest.mark.parametrize("batch", [1, 4, 8])
@pytest.mark.parametrize("vocabulary", VOCABULARIES)
def test_draft_step(benchmark: Any, vocabulary: int, batch: int) -> None:
    """Signals, token and decision of a row of logits."""
    state = drafting(batch)
    logits = 3.0 * torch.randn(batch, vocabulary, generator=torch.Generator().manual_seed(0))
    policy = parse_policy("speckv").pack(cost=COST)

    def start() -> tuple[tuple[Any, ...], dict[str, Any]]:
        state.rows[:, at.STOP] = state.rows[:, at.DRAFTED] = 0
        return (logits, state, policy), {}

    benchmark.pedantic(reference.draft_step, setup=start, rounds=20, warmup_rounds=2)
    assert (state.rows[:, at.DRAFTED] == 1).all()


@pytest.mark.parametrize("width", [1, 5, 16])
@pytest.mark.parametrize("vocabulary", VOCABULARIES)
def test_verify(benchmark: Any, vocabulary: int, width: int) -> None:
    """Acceptance of a whole draft of ``width - 1`` tokens, and the decision after it."""
    generator = torch.Generator().manual_seed(0)
    logits = 3.0 * torch.randn(1, width, vocabulary, generator=generator)
    state, policy = drafting(1), parse_policy("speckv").pack(cost=COST)
    eos = torch.full((1, 1), -1, dtype=torch.int32)
    start = [tensor.clone() for tensor in vars(state).values()]
    said = logits[0, : width - 1].argmax(-1).int()

    def begin() -> tuple[tuple[Any, ...], dict[str, Any]]:
        for tensor, value in zip(vars(state).values(), start, strict=True):
            tensor.copy_(value)
        state.rows[0, at.DRAFTED] = width - 1
        state.sequence[0, 3 : 3 + width - 1] = said
        return (logits, state, policy), {"eos": eos}

    benchmark.pedantic(reference.verify, setup=begin, rounds=10, warmup_rounds=1)
    assert int(state.rows[0, at.ACCEPTED]) == width - 1


@pytest.mark.parametrize("name", POLICIES)
def test_decide(benchmark: Any, name: str) -> None:
    """The decision alone."""
    policy = parse_policy(name).pack(cost=COST)
    rows, running = [0] * at.ROW_WORDS, [1.0, 1.5, 0.6, 0.5, 1.2, 0.6, 0.3, 0.5]
    rows[at.LENGTH], rows[at.LIMIT], rows[at.DRAFTED] = 100, 200, 1
    assert benchmark(reference.decide, policy, rows, running) in (True, False)


@pytest.mark.parametrize("vocabulary", VOCABULARIES)
def test_argmax(benchmark: Any, vocabulary: int) -> None:
    """What choosing a token costs without signals and decision."""
    logits = torch.randn(1, vocabulary, generator=torch.Generator().manual_seed(0))
    assert benchmark(logits.argmax, -1).shape == (1,)


def test_four_predictions(benchmark: Any) -> None:
    """The paper's four ``predict`` calls."""
    network = pytest.importorskip("sklearn.neural_network")
    data = torch.rand(200, 7, generator=torch.Generator().manual_seed(0)).numpy()
    regressor = network.MLPRegressor(hidden_layer_sizes=(16,), max_iter=500, random_state=42)
    regressor.fit(data[:, :6], data[:, 6])

    def choose() -> list[float]:
        return [float(regressor.predict(data[:1, :6])[0]) for _ in range(4)]

    assert len(benchmark(choose)) == 4
