"""Very many launches of products and attention: the bits of all are those of the first."""

from __future__ import annotations

from functools import partial

import pytest
import torch

from speckv import kernels
from speckv.kernels.attention import Scratch, attention_out
from tests.gpu.repeats import count_alternating, count_differences
from tests.gpu.test_decoder_kernels_gpu import attention_case, on_device, random, weight_of

pytestmark = [pytest.mark.gpu, pytest.mark.slow]

DEVICE = "cuda"
BF16 = torch.bfloat16


@pytest.mark.parametrize(
    ("kind", "rows", "norm", "swiglu"),
    [
        ("dense", 9, False, False),
        ("dense", 9, True, False),
        ("dense", 40, True, True),
        ("int8", 9, True, False),
        ("nf4", 9, False, False),
        ("nf4", 40, True, True),
        ("nested", 9, True, False),
    ],
)
def test_a_million_products_agree_bit_for_bit(
    kind: str, rows: int, norm: bool, swiglu: bool
) -> None:
    """Forty rows are three tiles, whose programs count apart."""
    weight = on_device(weight_of(kind, 256, 2048, BF16))
    scale = random(2048, seed=7).to(BF16).to(DEVICE) if norm else None
    product = kernels.Linear(weight, dtype=BF16, swiglu=swiglu, norm=scale, eps=1e-5)
    assert product.scratch is not None and product.scratch.counters.numel()
    x = random(rows, 2048).to(BF16).to(DEVICE)
    out = torch.zeros(rows, product.columns, dtype=BF16, device=DEVICE)
    run = partial(product, x, out=out)
    assert count_differences(run, [out], [product.scratch.counters]) == 0


@pytest.mark.parametrize("kind", ["dense", "nf4"])
def test_a_million_products_back_to_back(kind: str) -> None:
    """The products of a layer share their scratch, and nobody sets its counters to zero."""
    from speckv.kernels.linear import share_scratch

    wide, narrow = (on_device(weight_of(kind, n, k, BF16)) for n, k in ((512, 1024), (256, 2048)))
    products = [
        kernels.Linear(
            wide, dtype=BF16, swiglu=True, norm=torch.ones(1024, device=DEVICE).to(BF16)
        ),
        kernels.Linear(narrow, dtype=BF16),
    ]
    share_scratch(products)
    scratch = products[0].scratch
    assert scratch is not None and scratch is products[1].scratch
    inputs = [random(9, depth).to(BF16).to(DEVICE) for depth in (1024, 2048)]
    outs = [torch.zeros(9, p.columns, dtype=BF16, device=DEVICE) for p in products]
    launches = [
        partial(product, x, out=out) for product, x, out in zip(products, inputs, outs, strict=True)
    ]
    assert count_alternating(launches, [[out] for out in outs], [scratch.counters]) == 0


@pytest.mark.parametrize("head_dim", [64, 128])
def test_a_million_attentions_agree_bit_for_bit(head_dim: int) -> None:
    case = {name: on_device(value) for name, value in attention_case(head_dim, None).items()}
    scratch = Scratch.allocate(case["queries"].shape, 4, 1024, DEVICE)
    out = torch.zeros_like(case["queries"])
    run = partial(attention_out, **case, out=out, scratch=scratch)
    assert count_differences(run, [out], [scratch.counters]) == 0


def test_a_million_attentions_back_to_back() -> None:
    """Of two widths on one scratch, as the draft's forwards and a verification are."""
    case = {name: on_device(value) for name, value in attention_case(64, None).items()}
    scratch = Scratch.allocate(case["queries"].shape, 4, 1024, DEVICE)
    launches, outs = [], []
    for width in (16, 3):
        cut = {name: case[name][:, :width].contiguous() for name in ("queries", "positions")}
        out = torch.zeros_like(cut["queries"])
        outs.append([out])
        launches.append(partial(attention_out, **{**case, **cut}, out=out, scratch=scratch))
    assert count_alternating(launches, outs, [scratch.counters]) == 0
