"""Builders that the tests of kernels share: guarded buffers, states, policies."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from speckv.kernels import layout as at
from speckv.kernels.layout import StepState

GUARD = 7
"""Elements before and after every guarded tensor."""
WORD = -7777
"""What guards, and the parts of outputs that nobody wrote, hold."""


def guarded(*shape: int, dtype: torch.dtype, pad: int = 0) -> tuple[Tensor, Tensor]:
    """(whole buffer, a view [*shape] with ``pad`` elements after each row), filled with WORD."""
    strides = [shape[-1] + pad, 1]
    for size in reversed(shape[1:-1]):
        strides.insert(0, strides[0] * size)
    strides = strides[-len(shape) :] if len(shape) > 1 else [1]
    whole = torch.full((shape[0] * strides[0] + 2 * GUARD,), WORD, dtype=dtype)
    return whole, whole.as_strided(shape, strides, GUARD)


class GuardedState:
    """A `StepState` inside buffers that are compared whole, guards included."""

    def __init__(self, batch: int, capacity: int = 40) -> None:
        self.whole, views = [], []
        for shape, dtype, pad in (
            ((batch, at.ROW_WORDS), torch.int32, 0),
            ((batch, at.RUNNING_WORDS), torch.float32, 0),
            ((batch, capacity), torch.int32, 5),
            ((batch, at.GAMMA_MAX, at.SIGNALS), torch.float32, 0),
        ):
            whole, view = guarded(*shape, dtype=dtype, pad=pad)
            self.whole.append(whole)
            views.append(view)
        self.state = StepState(*views)
        for b in range(batch):
            self.state.reset(b, list(range(3, 6 + b % 5)), limit=30, request=100 + 13 * b)
            self.state.rows[b, at.STOP] = 0
            self.state.rows[b, at.STEP] = b

    def clone(self) -> GuardedState:
        other = GuardedState(self.state.rows.shape[0], self.state.sequence.shape[1])
        for mine, theirs in zip(self.whole, other.whole, strict=True):
            theirs.copy_(mine)
        return other


def random_logits(batch: int, vocabulary: int, dtype: torch.dtype, seed: int = 0) -> Tensor:
    """Random rows [B, V] of a wider buffer; what lies between the rows is NaN."""
    generator = torch.Generator().manual_seed(seed)
    wide = torch.full((batch, vocabulary + 3), math.nan)
    wide[:, :vocabulary] = torch.randn(batch, vocabulary, generator=generator) * 3.0
    return wide.to(dtype)[:, :vocabulary]


def sampling(batch: int) -> dict[str, Tensor]:
    """Temperatures with a greedy row among them, and seeds that use all 64 bits."""
    inv = torch.tensor([1.0, 0.0, 1.4, 0.7]).repeat(-(-batch // 4))[:batch]
    return {"inv_temperature": inv, "seeds": torch.arange(batch) * 2**33 - 5}


def fixed(gamma: int = at.GAMMA_MAX) -> Tensor:
    """Policy ``fixed:gamma``."""
    policy = torch.zeros(at.POLICY_WORDS)
    policy[at.MODE], policy[at.GAMMA_CAP], policy[at.EMA_WEIGHT] = at.MODE_FIXED, gamma, 0.25
    return policy


def threshold(mode: int, value: float) -> Tensor:
    """An entropy or confidence threshold."""
    policy = fixed()
    policy[at.MODE], policy[at.THRESHOLD] = mode, value
    return policy


def mlp(mlp_layout: int, objective: int, seed: int) -> Tensor:
    """An MLP policy of random weights, with candidates and costs that let several γ win."""
    generator = torch.Generator().manual_seed(seed)
    policy = fixed()
    policy[at.HEADER_WORDS :] = torch.randn(at.POLICY_WORDS - at.HEADER_WORDS, generator=generator)
    policy[at.MODE], policy[at.MLP_LAYOUT], policy[at.OBJECTIVE] = (
        at.MODE_MLP,
        mlp_layout,
        objective,
    )
    policy[at.COST : at.COST + at.WIDTH_MAX] = torch.arange(16.0)
    policy[at.RATE], policy[at.PROBE_EVERY], policy[at.COMPRESSION] = 0.3, 4, seed % 3
    policy[at.EXPECTED_ACCEPTANCE] = 0.7 * (objective == at.OBJECTIVE_RATE)
    policy[at.CANDIDATES] = float(
        sum(1 << g for g in ((2, 4, 6, 8) if mlp_layout == at.LAYOUT_PAPER else (0, 1, 3, 5)))
    )
    return policy


POLICIES = {
    "fixed": fixed(3),
    "entropy": threshold(at.MODE_ENTROPY, 2.5),
    "confidence": threshold(at.MODE_CONFIDENCE, 0.3),
    **{
        f"{layout}-{objective}": mlp(i, j, 7 * i + j)
        for i, layout in enumerate(("survival", "paper"))
        for j, objective in enumerate(("tokens", "rate"))
    },
}
