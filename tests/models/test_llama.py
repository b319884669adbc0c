"""The decoder computes what transformers computes, at any start, in any slot."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from speckv.models.config import DecoderConfig
from speckv.models.llama import LlamaDecoder
from speckv.models.loading import wrap_model
from tests.models.conftest import FAMILY, VOCAB

LENGTH = 40


def reference(model: Any, tokens: Tensor) -> Tensor:
    with torch.no_grad():
        logits: Tensor = model(tokens[None]).logits[0].float()
    return logits


def relative(actual: Tensor, expected: Tensor) -> float:
    return float((actual.float() - expected).abs().max() / expected.abs().max())


@pytest.mark.parametrize("name", FAMILY)
@pytest.mark.parametrize(("compression", "bound"), [("fp32", 1e-5), ("bf16", 8e-2)])
def test_logits_are_those_of_transformers(
    name: str, compression: str, bound: float, family: Any, decoder: Any, tokens: Tensor
) -> None:
    # Beyond 512 positions, so that contexts of two blocks and old window rows are covered.
    model, ids = decoder(name, compression), tokens[:560]
    expected = reference(family(name), ids)
    cache = model.new_cache(2, 600)
    first = model.prefill(ids[:500], cache, 1)
    rest = model.forward(ids[None, 500:], [500], cache, slots=[1])
    assert first.shape == (VOCAB,) and rest.shape == (1, 60, VOCAB)
    assert relative(first, expected[499]) <= bound
    assert relative(rest[0], expected[500:]) <= bound


@pytest.mark.parametrize("name", ["mistral-window", "qwen3-yarn"])
def test_a_batch_with_unequal_starts(name: str, family: Any, decoder: Any, tokens: Tensor) -> None:
    model = decoder(name)
    starts = torch.tensor([3, 20, 11, 34])
    slots = torch.tensor([4, 0, 3, 1])
    cache = model.new_cache(5, LENGTH)
    sequences = [tokens[40 * i : 40 * i + LENGTH] for i in range(4)]
    for ids, start, slot in zip(sequences, starts, slots, strict=True):
        assert model.prefill(ids[:start], cache, int(slot), want_logits=False) is None
    block = torch.stack([ids[s : s + 5] for ids, s in zip(sequences, starts, strict=True)])
    logits = model.forward(block.int(), starts, cache, slots=slots)
    select = torch.tensor([4, 0, 2, 1])
    chosen = model.forward(block, starts.tolist(), cache, slots=slots.tolist(), select=select)
    for i, (ids, start) in enumerate(zip(sequences, starts.tolist(), strict=True)):
        expected = reference(family(name), ids)[start : start + 5]
        assert relative(logits[i], expected) <= 1e-5
        assert torch.equal(chosen[i], logits[i, select[i]])


def test_rollback_is_a_smaller_start(decoder: Any, tokens: Tensor) -> None:
    model = decoder("llama-biased")
    cache, clean = model.new_cache(1, LENGTH), model.new_cache(1, LENGTH)
    ids = tokens[:LENGTH]
    model.prefill(ids[:10], cache, 0)
    model.forward(tokens[None, 100:116], [10], cache)  # sixteen rejected positions
    model.prefill(ids[:10], clean, 0)
    for start in (10, 12):
        block = ids[None, start : start + 2]
        after = model.forward(block, [start], cache)
        assert torch.equal(after, model.forward(block, [start], clean))


def test_first_layers_share_weights_and_equal_a_truncated_model(
    family: Any, decoder: Any, tokens: Tensor
) -> None:
    model, source = decoder("qwen2-window"), family("qwen2-window")
    draft = model.first_layers(2)
    layers, config = source.model.layers, source.config
    try:
        source.model.layers = layers[:2]
        expected = reference(source, tokens[:LENGTH])
    finally:
        source.model.layers = layers
    assert config.num_hidden_layers == 3
    logits = draft.forward(tokens[None, :LENGTH], [0], draft.new_cache(1, LENGTH))
    assert relative(logits[0], expected) <= 1e-5
    assert draft._weights.embedding is model._weights.embedding
    assert draft._weights.layers[1] is model._weights.layers[1]
    assert len(draft.new_cache(1, 8).kv) == 2
    for count in (0, 4):
        with pytest.raises(ValueError, match=f"count: expected 1 to 3 layers, got {count}"):
            model.first_layers(count)


@pytest.mark.parametrize("compression", ["fp32", "int8", "nf4"])
@pytest.mark.parametrize("name", ["llama-biased", "mistral-window", "qwen3-yarn"])
def test_the_path_of_accelerators_agrees(
    name: str, compression: str, family: Any, decoder: Any, tokens: Tensor
) -> None:
    """Batched attention and packed weights, which CUDA uses, give the same model on the CPU."""
    source = family(name)
    plain = LlamaDecoder.from_tensors(
        DecoderConfig.from_transformers(source.config),
        source.state_dict(),
        name=name,
        compression=compression,
        dtype=torch.float32,
        device=torch.device("cpu"),
        invariant=False,
    )
    exact = decoder(name, compression, torch.float32)
    starts, slots = torch.tensor([9, 14]), torch.tensor([2, 0])
    outputs = []
    for model in (plain, exact):
        cache = model.new_cache(3, 64)
        for i in range(2):
            ids = tokens[50 * i : 50 * i + int(starts[i])]
            model.prefill(ids, cache, int(slots[i]), want_logits=False)
        block = torch.stack((tokens[200:204], tokens[300:304]))
        outputs.append(model.forward(block, starts, cache, slots=slots, context=20))
        in_order = model.forward(block, starts, cache, select=[3, 1])
        assert in_order.shape == (2, VOCAB)
        outputs.append(in_order)
    assert relative(outputs[0], outputs[2]) <= 1e-5
    assert relative(outputs[1], outputs[3]) <= 1e-5


def test_positions_and_slots_are_checked(decoder: Any, tokens: Tensor) -> None:
    model = decoder("llama-biased")
    cache = model.new_cache(2, LENGTH)
    block = tokens[None, :4]
    assert cache.rows == 512 and cache.nbytes == 3 * 2 * 512 * 4 * 8 * 4
    for start in ([-1], [509], [0, 1]):
        with pytest.raises(ValueError, match="start: expected 1 positions"):
            model.forward(block, start, cache)
    with pytest.raises(ValueError, match=r"slots: expected 1 of the cache's slots 0 to 1, got"):
        model.forward(block, [0], cache, slots=[2])
    with pytest.raises(ValueError, match="capacity: expected at most 2048 positions, got 2049"):
        model.new_cache(1, 2049)
    with pytest.raises(ValueError, match="batch: expected at least 1, got 0"):
        model.new_cache(0, 8)
    with pytest.raises(ValueError, match=r"tokens: expected \[length >= 1\]"):
        model.prefill(tokens[:0], cache, 0)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"hidden_act": "gelu"}, "hidden_act: expected 'silu', got 'gelu'"),
        ({"model_type": "falcon"}, "model_type: expected one of llama"),
        ({"num_key_value_heads": 4}, "num_key_value_heads: expected a divisor of 6 heads, got 4"),
        ({"rope_parameters": {"rope_type": "dynamic"}}, "rope_parameters: expected rope_type in"),
    ],
)
def test_what_is_not_supported_is_refused(
    change: dict[str, Any], message: str, family: Any
) -> None:
    import copy

    config = copy.deepcopy(family("llama-biased").config)
    for name, value in change.items():
        object.__setattr__(config, name, value)
    with pytest.raises(ValueError, match=message):
        DecoderConfig.from_transformers(config)


@pytest.mark.gpu
@pytest.mark.parametrize("compression", ["fp32", "bf16", "int8", "nf4"])
def test_on_cuda_without_a_host_synchronisation(
    compression: str, family: Any, decoder: Any, tokens: Tensor
) -> None:
    dtype = torch.bfloat16 if compression == "bf16" else torch.float32
    model = wrap_model(family("qwen3-yarn"), compression=compression, dtype=dtype, device="cuda")
    exact = decoder("qwen3-yarn", compression, dtype)
    outputs = []
    for each in (model, exact):
        cache = each.new_cache(2, 64)
        ids = tokens.to(each.device)
        each.prefill(ids[:20], cache, 0)
        start = torch.tensor([20, 0], device=each.device)
        select = torch.tensor([3, 2], device=each.device)
        block = ids[30:38].view(2, 4)
        if each is model:
            torch.cuda.set_sync_debug_mode("error")
        try:
            outputs.append(each.forward(block, start, cache, select=select, context=24))
        finally:
            torch.cuda.set_sync_debug_mode("default")
    assert relative(outputs[0].cpu(), outputs[1].float()) <= (
        8e-2 if compression == "bf16" else 1e-4
    )
