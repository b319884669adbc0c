"""Philox and Gumbel noise: known answers, range, distribution, and kernel against reference."""

from __future__ import annotations

import math

import pytest
import torch
import triton
import triton.language as tl

from speckv.kernels import reference
from speckv.kernels.device import _gumbel_at, _gumbel_run
from tests.tolerances import assert_close

pytestmark = pytest.mark.interpreter

# Counter, key and output of the known-answer tests that Salmon et al. distribute.
KNOWN = [
    ((0,) * 4, (0, 0), (0x6627E8D5, 0xE169C58D, 0xBC57AC4C, 0x9B00DBD8)),
    (
        (0xFFFFFFFF,) * 4,
        (0xFFFFFFFF, 0xFFFFFFFF),
        (0x408F276D, 0x41C83B0E, 0xA20BC7C6, 0x6D5451FD),
    ),
    (
        (0x243F6A88, 0x85A308D3, 0x13198A2E, 0x03707344),
        (0xA4093822, 0x299F31D0),
        (0xD16CFE09, 0x94FDCCEB, 0x5001E420, 0x24126EA1),
    ),
]


@triton.jit
def _noise_kernel(seed_ptr, index_ptr, token_ptr, run_ptr, at_ptr, first, BLOCK: tl.constexpr):
    seed = tl.load(seed_ptr)
    request = tl.load(index_ptr)
    index = tl.load(index_ptr + 1)
    purpose = tl.load(index_ptr + 2)
    o = tl.arange(0, BLOCK)
    tl.store(run_ptr + o, _gumbel_run(seed, request, index, purpose, first, BLOCK))
    token = tl.load(token_ptr + o)
    tl.store(at_ptr + o, _gumbel_at(seed, request, index, purpose, token))


@pytest.mark.parametrize(("counter", "key", "words"), KNOWN)
def test_philox_known_answers(
    counter: tuple[int, ...], key: tuple[int, int], words: tuple[int, ...]
) -> None:
    c0, c1, c2, c3 = counter
    got = reference.philox(key[0] | key[1] << 32, torch.tensor([c0]), c1, c2, c3)
    assert tuple(int(word) for word in got) == words


def test_uniform_is_inside_the_open_unit_interval() -> None:
    low, high = reference.uniform(torch.tensor([0, 2**32 - 1])).tolist()
    assert low == 2.0**-33
    assert high == 1.0 - 2.0**-24


@pytest.mark.parametrize("seed", [0, 1, -1, 2**40 + 3, -(2**63)])
@pytest.mark.parametrize("purpose", [0, 3 | 14 << 8])
def test_kernel_noise_equals_reference(seed: int, purpose: int) -> None:
    first, block, request, index = 4096, 64, 2**31 - 1, 777
    token = torch.arange(first, first + block, dtype=torch.int32)
    run, each = torch.full((block,), math.nan), torch.full((block,), math.nan)
    words = torch.tensor([request, index, purpose], dtype=torch.int32)
    _noise_kernel[(1,)](torch.tensor([seed]), words, token, run, each, first, BLOCK=block)
    expected = reference.gumbel(seed, request, index, token.long(), purpose)
    assert_close(run, expected, torch.float32)
    assert torch.equal(run, each)


def test_noise_is_keyed_by_everything() -> None:
    base = (5, 6, 7)
    token = torch.arange(64)
    draws = [reference.gumbel(*base, token)]
    for other in ((4, 6, 7), (5 + 2**32, 6, 7), (5, 5, 7), (5, 6, 8)):
        draws.append(reference.gumbel(*other, token))
    draws.append(reference.gumbel(*base, token, purpose=1))
    draws.append(reference.gumbel(*base, token, purpose=1 << 8))
    draws.append(reference.gumbel(*base, token + 64))
    for i, one in enumerate(draws):
        for other_draw in draws[:i]:
            assert not (one == other_draw).any()


def test_noise_is_standard_gumbel() -> None:
    draws = reference.gumbel(3, 1, 2, torch.arange(2**20)).double()
    assert abs(float(draws.mean()) - 0.5772157) < 5 * (math.pi / math.sqrt(6)) / 2**10
    below = [float((draws < x).double().mean()) for x in (-1.0, 0.0, 1.0, 3.0)]
    law = [math.exp(-math.exp(-x)) for x in (-1.0, 0.0, 1.0, 3.0)]
    assert max(abs(a - b) for a, b in zip(below, law, strict=True)) < 5 * 0.5 / 2**10


def test_spread_covers_the_most_extreme_draws() -> None:
    u = reference.uniform(torch.tensor([0, 2**32 - 1])).double()
    extremes = -torch.log(-torch.log1p(-u))
    assert float(extremes.max() - extremes.min()) < reference._GUMBEL_SPREAD
