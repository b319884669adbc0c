"""The fused decoder on a GPU: its logits, the bits of a row at every width, no waiting."""

from __future__ import annotations

from functools import cache
from typing import Any

import pytest
import torch
from torch import Tensor

from bench import roofline
from speckv.models.fused import ROWS_MAX, can_launch_early
from speckv.models.llama import LlamaDecoder
from tests.models.conftest import VOCAB
from tests.models.test_fused import BOUND, FAMILY, build, distance, logits_of

pytestmark = pytest.mark.gpu

SIZES = {
    "vocab_size": 4099,
    "hidden_size": 1024,
    "intermediate_size": 2816,
    "num_hidden_layers": 4,
    "num_attention_heads": 16,
    "num_key_value_heads": 4,
    "head_dim": 64,
}
FORMATS = ("fp16", "bf16", "int8", "nf4")


@cache
def model(compression: str) -> LlamaDecoder:
    torch.manual_seed(0)
    device = torch.device("cuda")
    config = roofline.shape(SIZES)
    return LlamaDecoder.from_tensors(
        config,
        roofline.RandomTensors(config, device),
        name="random",
        compression=compression,
        dtype=torch.float16 if compression == "fp16" else torch.bfloat16,
        device=device,
    )


def ids(count: int) -> Tensor:
    generator = torch.Generator().manual_seed(1)
    return torch.randint(0, SIZES["vocab_size"], (count,), generator=generator).cuda()


def run(compression: str, widths: list[int], batch: int = 1, offset: int = 300) -> Tensor:
    """Logits of 64 tokens after a prompt, in blocks of these widths; those of the last sequence."""
    decoder, text = model(compression), ids(offset + 64)
    cache_ = decoder.new_cache(batch, offset + 80)
    for slot in range(batch):
        decoder.prefill(text[:offset], cache_, slot, want_logits=False)
    found, place = [], offset
    for width in widths:
        block = text[place : place + width].repeat(batch, 1)
        if batch > 1:
            block[:-1] = block[:-1].flip(1)
        start = torch.full((batch,), place, device="cuda")
        found.append(decoder.forward(block, start, cache_)[-1])
        place += width
    return torch.cat(found)


@pytest.mark.parametrize("compression", FORMATS)
@pytest.mark.parametrize("width", range(2, 17))
def test_the_bits_of_a_row_do_not_depend_on_the_width(compression: str, width: int) -> None:
    count = 48 // width * width
    alone = run(compression, [1] * count)
    assert torch.equal(run(compression, [width] * (count // width)), alone)


PLACES = (300, 287, 256, 255, 64, 31, 2, 1)
"""Where each of eight sequences stands; some on both sides of a chunk of the attention."""


@cache
def texts() -> Tensor:
    """Tokens [8, 400] of as many sequences."""
    generator = torch.Generator().manual_seed(2)
    return torch.randint(0, SIZES["vocab_size"], (8, 400), generator=generator).cuda()


def prefilled(decoder: LlamaDecoder) -> Any:
    """A cache that holds each sequence up to its place."""
    cache_ = decoder.new_cache(8, 400)
    for slot, place in enumerate(PLACES):
        decoder.prefill(texts()[slot, :place], cache_, slot, want_logits=False)
    return cache_


@cache
def alone(compression: str) -> Tensor:
    """Logits [8, 16, V] of the next tokens of each sequence, one row at a time."""
    decoder = model(compression)
    cache_, found = prefilled(decoder), []
    for slot, place in enumerate(PLACES):
        slots = torch.tensor([slot], device="cuda")
        rows = []
        for at in range(place, place + 16):
            start = torch.tensor([at], device="cuda")
            token = texts()[slot, at : at + 1][None]
            rows.append(decoder.forward(token, start, cache_, slots=slots)[0, 0])
        found.append(torch.stack(rows))
    return torch.stack(found)


@pytest.mark.parametrize("compression", FORMATS)
@pytest.mark.parametrize("width", range(1, 17))
def test_nor_on_the_batch_at_any_width(compression: str, width: int) -> None:
    """Every row of every sequence, from one sequence to eight at places of their own."""
    decoder, expected = model(compression), alone(compression)
    cache_ = prefilled(decoder)
    places = torch.tensor(PLACES, device="cuda")
    offsets = torch.arange(width, device="cuda")
    for batch in range(1, 9):
        for first in {0, 8 - batch}:
            slots = torch.arange(first, first + batch, device="cuda")
            start = places[slots]
            block = texts()[slots].gather(1, start[:, None] + offsets)
            logits = decoder.forward(block, start, cache_, slots=slots)
            assert torch.equal(logits, expected[first : first + batch, :width]), (batch, first)


@pytest.mark.parametrize("compression", FORMATS)
def test_nor_on_more_rows_than_a_tile(compression: str) -> None:
    widths = [1, 5, 16, 9, 17]
    assert torch.equal(run(compression, widths, 8), run(compression, [1] * 48))


@pytest.mark.parametrize("name", FAMILY)
@pytest.mark.parametrize("compression", FORMATS)
def test_logits_are_those_of_the_references(name: str, compression: str) -> None:
    tokens = torch.randint(0, VOCAB, (400,), generator=torch.Generator().manual_seed(1))
    dtype = torch.float16 if compression == "fp16" else torch.bfloat16
    expected = logits_of(build(name, compression, dtype), tokens)
    actual = logits_of(build(name, compression, dtype, device="cuda"), tokens.cuda())
    assert distance(actual.cpu(), expected) <= BOUND[dtype]


@pytest.mark.parametrize("compression", FORMATS)
def test_a_forward_is_captured_and_replayed(compression: str) -> None:
    decoder, text = model(compression), ids(200)
    cache_ = decoder.new_cache(1, 300)
    decoder.prefill(text, cache_, 0, want_logits=False)
    block, start = text[None, :5].contiguous(), torch.tensor([200], device="cuda")
    slots = torch.zeros(1, dtype=torch.int64, device="cuda")

    def forward() -> Tensor:
        return decoder.forward(block, start, cache_, slots=slots)

    expected = forward().clone()
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        captured = forward()
    block.copy_(text[None, 7:12])
    graph.replay()
    other = captured.clone()
    block.copy_(text[None, :5])
    graph.replay()
    assert torch.equal(captured, expected) and not torch.equal(other, expected)


def test_more_rows_than_the_kernels_take() -> None:
    decoder, text = model("bf16"), ids(ROWS_MAX + 20)
    cache_ = decoder.new_cache(1, 300)
    whole = decoder.forward(text[None], torch.tensor([0], device="cuda"), cache_)
    assert whole.shape == (1, ROWS_MAX + 20, SIZES["vocab_size"]) and whole.isfinite().all()


@pytest.mark.parametrize("compression", FORMATS)
def test_early_launches_change_no_bit(compression: str) -> None:
    """In a graph, where kernels follow each other closely enough to overlap."""
    decoder, text = model(compression), ids(316)
    if not can_launch_early(decoder.device):
        pytest.skip("needs compute capability 9.0")
    cache_ = decoder.new_cache(1, 400)
    decoder.prefill(text[:300], cache_, 0, want_logits=False)
    start = torch.tensor([300], device="cuda")
    slots = torch.zeros(1, dtype=torch.int64, device="cuda")

    def forward() -> Tensor:
        return decoder.forward(text[None, 300:], start, cache_, slots=slots)

    expected = forward().clone()
    decoder.pdl = True
    try:
        forward()
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            found = [forward() for _ in range(4)]
        for _ in range(1000):
            graph.replay()
            assert all(torch.equal(each, expected) for each in found)
    finally:
        decoder.pdl = False
