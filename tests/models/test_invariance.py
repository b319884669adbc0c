"""A row of logits has the same bits at every width, offset, batch, slot and cache capacity."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from speckv.kernels import cpu
from speckv.models.base import CausalModel
from tests.models.conftest import FAMILY

PREFIX = 499
SPAN = 32


def decoded(
    model: CausalModel, ids: Tensor, prefix: int, width: int, batch: int, capacity: int
) -> Tensor:
    """Logits [span, vocab] of the tokens after the prefix, ``width`` at a time.

    The sequence is row ``batch - 1`` of a batch whose other rows hold other tokens at other
    positions.
    """
    cache = model.new_cache(batch, capacity)
    row = batch - 1
    model.prefill(ids[:prefix], cache, row, want_logits=False)
    rows = []
    for at in range(prefix, ids.shape[0], width):
        piece = ids[at : at + width]
        block = ids.repeat(4)[: batch * width].view(batch, width).clone()
        block[row] = 0
        block[row, : piece.shape[0]] = piece
        starts = [7 * i for i in range(batch)]
        starts[row] = at
        rows.append(model.forward(block, starts, cache)[row, : piece.shape[0]])
    return torch.cat(rows)


def assert_invariant(
    model: CausalModel, ids: Tensor, prefix: int, cases: list[tuple[int, int, int]]
) -> None:
    cache = model.new_cache(1, ids.shape[0])
    model.prefill(ids[:prefix], cache, 0)
    expected = model.forward(ids[None, prefix:], [prefix], cache)[0]
    for width, batch, capacity in cases:
        actual = decoded(model, ids, prefix, width, batch, capacity)
        wrong = (actual != expected).any(-1).nonzero().flatten().tolist()
        assert not wrong, f"width {width}, batch {batch}, capacity {capacity}: rows {wrong}"


@pytest.mark.parametrize("compression", ["fp32", "bf16", "fp16"])
@pytest.mark.parametrize("name", FAMILY)
def test_tiny_models(name: str, compression: str, decoder: Any, tokens: Tensor) -> None:
    # The span crosses a context block (position 512) at every width and offset.
    widths = [(width, 1, 700) for width in range(1, 17)]
    batches = [(width, batch, 1500) for width in (1, 5, 16) for batch in range(2, 9)]
    assert_invariant(decoder(name, compression), tokens[: PREFIX + SPAN], PREFIX, widths + batches)


def test_tiny_models_after_a_change_of_threads(decoder: Any, tokens: Tensor) -> None:
    threads = torch.get_num_threads()
    try:
        torch.set_num_threads(1 if threads > 1 else 2)
        cases = [(width, 1, 700) for width in (1, 2, 7, 16)]
        assert_invariant(decoder("llama-biased", "bf16"), tokens[: PREFIX + SPAN], PREFIX, cases)
    finally:
        torch.set_num_threads(threads)


def test_prefill_has_the_bits_of_decoding(decoder: Any, tokens: Tensor) -> None:
    model = decoder("llama-tied-llama3", "bf16")
    whole, parts = model.new_cache(1, 400), model.new_cache(1, 400)
    ids = tokens[:300]
    last = model.prefill(ids, whole, 0)
    model.prefill(ids[:37], parts, 0, want_logits=False)
    assert torch.equal(model.prefill(ids[37:], parts, 0, start=37), last)
    for one, other in zip(whole.kv, parts.kv, strict=True):
        assert torch.equal(one[:, :300], other[:, :300])


def test_row_by_row_where_nothing_is_proven(
    family: Any, tokens: Tensor, monkeypatch: pytest.MonkeyPatch
) -> None:
    """On a machine where every probe fails the contract still holds, by another way."""
    from speckv.kernels import cpu_attention
    from speckv.models.loading import wrap_model

    def nothing(*_: object, **__: object) -> tuple[int, ...]:
        return ()

    monkeypatch.setattr(cpu, "_proven", {})
    for module in (cpu, cpu_attention):
        monkeypatch.setattr(module, "prove_counts", nothing)
    model = wrap_model(family("mistral-window"), compression="bf16", device="cpu")
    ids = tokens[:40]
    assert_invariant(model, ids, 24, [(1, 1, 64), (3, 2, 64), (16, 1, 600)])
    with torch.no_grad():
        expected = family("mistral-window")(ids[None]).logits[0]
    actual = model.forward(ids[None], [0], model.new_cache(1, 40))[0].float()
    assert (actual - expected).abs().max() <= 8e-2 * expected.abs().max()


@pytest.mark.model
@pytest.mark.parametrize("compression", ["fp32", "bf16"])
def test_smollm2(compression: str, smollm2: Any) -> None:
    model, tokenizer = smollm2(compression)
    text = "The steam engine changed how goods were made, moved and sold. " * 3
    ids = torch.tensor(tokenizer(text)["input_ids"])[:36]
    widths = [(width, 1, 64) for width in range(1, 17)]
    batches = [(5, batch, 600) for batch in (2, 4, 8)]
    assert_invariant(model, ids, 20, widths + batches)


@pytest.mark.slow
@pytest.mark.model
@pytest.mark.parametrize("compression", ["bf16", "int8", "nf4"])
def test_smollm2_at_every_context(compression: str, smollm2: Any) -> None:
    """Attention sums a context block by block: no number of rows in the last one is special."""
    model, tokenizer = smollm2(compression)
    text = "The steam engine changed how goods were made, moved and sold. " * 60
    ids = torch.tensor(tokenizer(text)["input_ids"])[:656]
    cache = model.new_cache(1, ids.shape[0])
    alone = [model.forward(ids[None, i : i + 1], [i], cache)[0, 0] for i in range(ids.shape[0])]
    widths = (2, 3, 5, 9, 16, 4, 7, 12)
    for at in range(ids.shape[0] - max(widths)):
        width = widths[at % len(widths)]
        block = model.forward(ids[None, at : at + width], [at], cache)[0]
        assert torch.equal(block, torch.stack(alone[at : at + width])), f"{width} rows at {at}"
