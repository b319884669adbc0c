"""A tiny random target and drafts that it accepts nearly never, half of the time, and always."""

from __future__ import annotations

import copy
from collections.abc import Callable
from functools import cache
from typing import Any

import pytest
import torch

from speckv.models.base import CausalModel
from speckv.models.loading import wrap_model

VOCAB = 199
PERTURBATION = 0.04
"""Standard deviation of the perturbed draft's weights around the target's, over theirs."""


def build(seed: int) -> Any:
    """A two-layer llama, sharp enough that a random draft seldom agrees with it."""
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(seed)
    config = LlamaConfig(
        vocab_size=VOCAB,
        hidden_size=32,
        intermediate_size=64,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=512,
        initializer_range=0.6,
        bos_token_id=1,
        eos_token_id=None,
    )
    return LlamaForCausalLM(config).eval()


def perturbed(model: Any, scale: float) -> Any:
    """A copy with noise on every weight, in units of that weight's standard deviation."""
    result = copy.deepcopy(model)
    generator = torch.Generator().manual_seed(7)
    with torch.no_grad():
        for weight in result.parameters():
            noise = torch.randn(weight.shape, generator=generator)
            weight += scale * weight.std(correction=0) * noise
    return result


@pytest.fixture(scope="session")
def tiny() -> Any:
    """The target as transformers has it, fp32."""
    return build(seed=0)


@pytest.fixture(scope="session")
def target(tiny: Any) -> Callable[[str], CausalModel]:
    """The target by compression."""
    return cache(lambda compression: wrap_model(tiny, compression=compression, device="cpu"))


@pytest.fixture(scope="session")
def draft(tiny: Any, target: Callable[[str], CausalModel]) -> Callable[[str, str], CausalModel]:
    """The draft by kind, ``random``, ``perturbed`` or ``target``, and the target's compression."""

    @cache
    def other(kind: str) -> CausalModel:
        model = build(seed=1) if kind == "random" else perturbed(tiny, PERTURBATION)
        return wrap_model(model, compression="fp32", device="cpu")

    return lambda kind, compression: target(compression) if kind == "target" else other(kind)
