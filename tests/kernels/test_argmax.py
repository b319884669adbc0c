"""`argmax`: interpreter = torch.argmax, ties included."""

from __future__ import annotations

import importlib
from typing import Any

import pytest
import torch

from speckv import kernels
from speckv.kernels.draft_step import Config, Scratch
from tests.kernels.steps import Guards, strided

ARGMAX: Any = importlib.import_module("speckv.kernels.argmax")


@pytest.mark.parametrize("batch", [0, 1, 3, 17])
@pytest.mark.parametrize("vocabulary", [1, 7, 111, 257, 1031])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
@pytest.mark.parametrize("splits", [1, 3])
def test_the_highest_logit(batch: int, vocabulary: int, dtype: torch.dtype, splits: int) -> None:
    generator = torch.Generator().manual_seed(vocabulary)
    values = torch.randint(-9, 9, (batch, vocabulary), generator=generator).to(dtype)  # ties
    values[:, ::5] = -torch.inf
    values[:1] = -torch.inf
    logits, guards = strided(values), Guards()
    tokens = guards.around(torch.full((batch,), -5, dtype=torch.int32))
    scratch = Scratch.allocate(batch, Config(block=128, splits=splits, num_warps=4), "cpu")
    scratch.partials.fill_(torch.nan)
    for _ in range(2):
        ARGMAX.argmax_out(logits, tokens=tokens, scratch=scratch)
        assert torch.equal(tokens, logits.float().argmax(-1).int())
        assert not scratch.counters.any()
    guards.check()


def test_bad_arguments_are_refused() -> None:
    logits = torch.zeros(2, 5)
    assert kernels.argmax(logits).tolist() == [0, 0]
    with pytest.raises(TypeError, match="tokens: expected int32"):
        kernels.argmax(logits, tokens=torch.zeros(2))
    with pytest.raises(ValueError, match="tokens: expected int32 .2."):
        kernels.argmax(logits, tokens=torch.zeros(3, dtype=torch.int32))
    with pytest.raises(ValueError, match="vocabulary of at least 1"):
        kernels.argmax(logits[:, :0])
    with pytest.raises(TypeError, match="logits: expected floating"):
        kernels.argmax(logits.int())
