"""Lanes are merged alike by a reduction of tuples, as on a GPU, and value by value."""

from __future__ import annotations

import math

import pytest
import torch
import triton
import triton.language as tl
from torch import Tensor

from speckv.kernels.draft_step_kernel import _merge, _merge_draws

pytestmark = [
    pytest.mark.interpreter,
    pytest.mark.filterwarnings("ignore::RuntimeWarning"),  # -inf - -inf, which is discarded
]

LANES = 16
INF = math.inf


@triton.jit
def _merge_kernel(
    lanes_ptr,
    tokens_ptr,
    found_ptr,
    LANES: tl.constexpr,
    WARPS: tl.constexpr,
    RUN: tl.constexpr,
    EMULATED: tl.constexpr,
):
    o = tl.arange(0, LANES)
    top = tl.load(lanes_ptr + o)
    second = tl.load(lanes_ptr + LANES + o)
    total = tl.load(lanes_ptr + 2 * LANES + o)
    weighted = tl.load(lanes_ptr + 3 * LANES + o)
    token = tl.load(tokens_ptr + o)
    best, runner_up, total, weighted, first = _merge(
        top, second, total, weighted, token, WARPS, RUN, EMULATED
    )
    tl.store(found_ptr, best)
    tl.store(found_ptr + 1, runner_up)
    tl.store(found_ptr + 2, total)
    tl.store(found_ptr + 3, weighted)
    tl.store(found_ptr + 4, first.to(tl.float32))
    score, drawn, logit = _merge_draws(top, token, second, EMULATED)
    tl.store(found_ptr + 5, score)
    tl.store(found_ptr + 6, drawn.to(tl.float32))
    tl.store(found_ptr + 7, logit)


def merge(lanes: Tensor, tokens: Tensor, *, emulated: bool, warps: int = 2, run: int = 4) -> Tensor:
    found = torch.full((8,), -1.0)
    cut = {"LANES": LANES, "WARPS": warps, "RUN": run}
    _merge_kernel[(1,)](lanes, tokens, found, **cut, EMULATED=emulated)
    return found


def each_alone(logits: list[float]) -> Tensor:
    """Lanes of one logit each, -inf from the last on."""
    lanes = torch.full((4, LANES), -INF)
    lanes[0, : len(logits)] = torch.tensor(logits)
    lanes[2], lanes[3] = 1.0, 0.0
    return lanes


def assert_alike(lanes: Tensor, tokens: Tensor) -> Tensor:
    """What both make of the lanes: the sums to rounding, all else exactly."""
    apart = merge(lanes, tokens, emulated=True)
    exact = [0, 1, 4, 5, 6, 7]
    for warps, run in ((2, 4), (4, 4), (4, 1)):  # a warp loads twice, once, and very little
        together = merge(lanes, tokens, emulated=False, warps=warps, run=run)
        assert torch.equal(together[exact], apart[exact])
        torch.testing.assert_close(together, apart, rtol=1e-5, atol=1e-5)
    return apart


CASES = {
    "one": each_alone([0.5]),
    "ties": each_alone([1.0, 2.0, 2.0, -INF, 2.0, 0.0]),
    "tie with a second": each_alone([3.0, 1.0]).index_fill(0, torch.tensor(1), 3.0),
    "nothing": each_alone([]),
    "infinite": each_alone([1.0, INF, 2.0]),
    "far apart": each_alone([-3e38, 3e38]),
}


@pytest.mark.parametrize("name", CASES)
def test_edges(name: str) -> None:
    tokens = torch.randperm(LANES, generator=torch.Generator().manual_seed(0)).int()
    assert_alike(CASES[name], tokens)


def test_nan_reaches_the_total() -> None:
    lanes = each_alone([1.0, math.nan, 2.0])
    tokens = torch.arange(LANES, dtype=torch.int32)
    for emulated in (False, True):
        found = merge(lanes, tokens, emulated=emulated)
        assert math.isnan(found[2]), emulated


@pytest.mark.parametrize("seed", range(5))
def test_random_lanes(seed: int) -> None:
    generator = torch.Generator().manual_seed(seed)
    lanes = 4 * torch.randn(4, LANES, generator=generator)
    lanes[1] = lanes[0] - lanes[1].abs()
    lanes[2] = 1 + lanes[2].abs()
    tokens = torch.randperm(LANES, generator=generator).int()
    together = assert_alike(lanes, tokens)
    place = int(lanes[0].argmax())
    others = torch.cat([lanes[0, :place], lanes[0, place + 1 :], lanes[1]])
    assert together[[0, 1, 4]].tolist() == [lanes[0, place], others.max(), tokens[place]]
