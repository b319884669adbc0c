"""Any transformers model: the same logits, the same guarantee, or a clear refusal."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

from speckv.models.adapter import TransformersAdapter
from speckv.models.loading import wrap_model
from tests.models.conftest import VOCAB, seeded

_SIZES = {"vocab_size": VOCAB, "max_position_embeddings": 1024, "initializer_range": 0.2}
_WIDE = {
    **_SIZES,
    "hidden_size": 64,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "intermediate_size": 96,
}


def _gpt2() -> Any:
    from transformers import GPT2Config, GPT2LMHeadModel

    return GPT2LMHeadModel(GPT2Config(**_SIZES, n_embd=64, n_layer=3, n_head=4, eos_token_id=2))


def _neox() -> Any:
    from transformers import GPTNeoXConfig, GPTNeoXForCausalLM

    return GPTNeoXForCausalLM(GPTNeoXConfig(**_WIDE))


def _phi() -> Any:
    from transformers import PhiConfig, PhiForCausalLM

    return PhiForCausalLM(PhiConfig(**_WIDE))


def _gemma2() -> Any:
    from transformers import Gemma2Config, Gemma2ForCausalLM

    config = Gemma2Config(**_WIDE, num_key_value_heads=2, head_dim=16, sliding_window=9)
    return Gemma2ForCausalLM(config)


def _mixtral() -> Any:
    from transformers import MixtralConfig, MixtralForCausalLM

    return MixtralForCausalLM(MixtralConfig(**_WIDE, num_key_value_heads=2, num_local_experts=4))


MODELS: dict[str, Callable[[], Any]] = {
    "gpt2": _gpt2,
    "gpt-neox": _neox,
    "phi": _phi,
    "gemma2-window": _gemma2,
}
PREFIX = 499
LENGTH = 530


@pytest.fixture(scope="module")
def adapted() -> Callable[[str, str], tuple[Any, TransformersAdapter]]:
    sources: dict[str, Any] = {}
    built: dict[tuple[str, str], TransformersAdapter] = {}

    def get(name: str, compression: str) -> tuple[Any, TransformersAdapter]:
        if name not in sources:
            sources[name] = seeded(MODELS[name])
        if (name, compression) not in built:
            model = wrap_model(sources[name], compression=compression, device="cpu")
            assert isinstance(model, TransformersAdapter)
            built[name, compression] = model
        return sources[name], built[name, compression]

    return get


@pytest.mark.parametrize("name", MODELS)
@pytest.mark.parametrize(("compression", "bound"), [("fp32", 1e-5), ("bf16", 5e-2)])
def test_logits_are_those_of_transformers_at_every_width(
    name: str, compression: str, bound: float, adapted: Any, tokens: Tensor
) -> None:
    source, model = adapted(name, compression)
    with torch.no_grad():
        expected = source(tokens[None, :LENGTH]).logits[0, PREFIX - 1 :]
    ids = tokens[:LENGTH]
    cache = model.new_cache(1, LENGTH)
    last = model.prefill(ids[:PREFIX], cache, 0)
    rest = model.forward(ids[None, PREFIX:], [PREFIX], cache)[0]
    actual = torch.cat((last[None], rest)).float()
    assert (actual - expected).abs().max() <= bound * expected.abs().max()
    for width, batch, capacity in ((1, 1, 600), (3, 2, 900), (7, 3, 600), (16, 1, 600)):
        other = model.new_cache(batch, capacity)
        model.prefill(ids[:PREFIX], other, batch - 1, want_logits=False)
        for at in range(PREFIX, LENGTH, width):
            piece = ids[at : at + width]
            block = tokens[: batch * width].view(batch, width).clone()
            block[-1, : piece.shape[0]] = piece
            starts = torch.tensor([5 * i for i in range(batch)])
            starts[-1] = at
            logits = model.forward(block, starts, other)[-1, : piece.shape[0]]
            assert torch.equal(logits, rest[at - PREFIX : at - PREFIX + width])


def test_rollback_slots_and_select(adapted: Any, tokens: Tensor) -> None:
    _, model = adapted("gpt2", "fp32")
    cache, clean = model.new_cache(3, 64), model.new_cache(3, 64)
    for each in (cache, clean):
        model.prefill(tokens[:10], each, 2, want_logits=False)
    model.forward(tokens[None, 100:116], [10], cache, slots=[2])
    block = tokens[None, 20:24]
    expected = model.forward(block, [10], clean, slots=[2])
    assert torch.equal(model.forward(block, [10], cache, slots=[2]), expected)
    chosen = model.forward(block, [10], cache, slots=[2], select=[1])
    assert torch.equal(chosen, expected[:, 1])
    assert model.eos_ids == (2,) and model.vocab_size == VOCAB
    with pytest.raises(ValueError, match="start: expected 1 positions"):
        model.forward(block, [510], cache)
    with pytest.raises(ValueError, match="capacity: expected at most 1024 positions"):
        model.new_cache(1, 1025)


@pytest.mark.parametrize("compression", ["int8", "nf4"])
@pytest.mark.parametrize("name", ["gpt2", "phi"])
def test_compressed_weights(name: str, compression: str, adapted: Any, tokens: Tensor) -> None:
    from speckv.models.quantize import compress

    source, _ = adapted(name, "fp32")
    before = {key: tensor.clone() for key, tensor in source.state_dict().items()}
    model = wrap_model(source, compression=compression, dtype="fp32", device="cpu")
    assert isinstance(model, TransformersAdapter)
    for key, tensor in source.state_dict().items():
        assert torch.equal(tensor, before[key]), "the caller's model was changed"
    key = {
        "gpt2": "transformer.h.1.mlp.c_fc.weight",
        "phi": "model.layers.1.mlp.fc1.weight",
    }[name]
    weight = before[key].T.contiguous() if name == "gpt2" else before[key]
    packed = compress(weight, compression, torch.float32)
    assert not isinstance(packed, Tensor)
    expanded = packed.expand(torch.float32)
    used = model._model.state_dict()
    assert torch.equal(used[key], expanded.T if name == "gpt2" else expanded)
    assert torch.equal(used["lm_head.weight"], before["lm_head.weight"])


def test_experts_run_position_by_position(tokens: Tensor) -> None:
    source = seeded(_mixtral)
    with pytest.warns(UserWarning, match="positions are computed one by one"):
        model = wrap_model(source, compression="fp32", device="cpu")
    ids = tokens[:40]
    with torch.no_grad():
        expected = source(ids[None]).logits[0]
    wide = model.forward(ids[None], [0], model.new_cache(1, 40))[0]
    assert (wide - expected).abs().max() <= 1e-5 * expected.abs().max()
    cache = model.new_cache(1, 40)
    for at in range(40):
        assert torch.equal(model.forward(ids[None, at : at + 1], [at], cache)[0, 0], wide[at])


def _mamba() -> Any:
    from transformers import MambaConfig, MambaForCausalLM

    return MambaForCausalLM(MambaConfig(vocab_size=VOCAB, hidden_size=32, num_hidden_layers=1))


def _bloom() -> Any:
    from transformers import BloomConfig, BloomForCausalLM

    return BloomForCausalLM(BloomConfig(vocab_size=VOCAB, hidden_size=32, n_layer=1, n_head=2))


def _falcon_alibi() -> Any:
    from transformers import FalconConfig, FalconForCausalLM

    config = FalconConfig(
        vocab_size=VOCAB, hidden_size=32, num_hidden_layers=1, num_attention_heads=2, alibi=True
    )
    return FalconForCausalLM(config)


def _t5() -> Any:
    from transformers import T5Config, T5ForConditionalGeneration

    config = T5Config(vocab_size=VOCAB, d_model=32, d_ff=32, d_kv=8, num_layers=1, num_heads=2)
    return T5ForConditionalGeneration(config)


@pytest.mark.parametrize(
    ("build", "message"),
    [
        (_mamba, "keeps a recurrent state, which cannot be rolled back"),
        (_bloom, "states no max_position_embeddings"),
        (_falcon_alibi, "cannot run over a static cache"),
        (_t5, "is an encoder-decoder"),
    ],
)
def test_what_cannot_be_honoured_is_refused(build: Callable[[], Any], message: str) -> None:
    with pytest.raises(ValueError, match=f"model: .*{message}"):
        wrap_model(seeded(build), compression="fp32", device="cpu")
