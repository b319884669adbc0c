"""Tiny random models of every family, and the default target."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch

from speckv.models.base import CausalModel
from speckv.models.loading import load_model, wrap_model

VOCAB = 211
_SIZES = {
    "vocab_size": VOCAB,
    "hidden_size": 48,
    "intermediate_size": 80,
    "num_hidden_layers": 3,
    "num_attention_heads": 6,
    "num_key_value_heads": 2,
    "max_position_embeddings": 2048,
    "initializer_range": 0.2,
}
_ROPE = {"rope_theta": 10000.0, "factor": 4.0, "original_max_position_embeddings": 512}


def _llama_biased() -> Any:
    from transformers import LlamaConfig, LlamaForCausalLM

    return LlamaForCausalLM(LlamaConfig(**_SIZES, attention_bias=True, mlp_bias=True))


def _llama_tied() -> Any:
    from transformers import LlamaConfig, LlamaForCausalLM

    rope = {"rope_type": "llama3", "low_freq_factor": 1.0, "high_freq_factor": 4.0, **_ROPE}
    return LlamaForCausalLM(LlamaConfig(**_SIZES, tie_word_embeddings=True, rope_parameters=rope))


def _llama_linear() -> Any:
    from transformers import LlamaConfig, LlamaForCausalLM

    rope = {"rope_type": "linear", "rope_theta": 10000.0, "factor": 2.0}
    return LlamaForCausalLM(LlamaConfig(**_SIZES, rope_parameters=rope))


def _mistral() -> Any:
    from transformers import MistralConfig, MistralForCausalLM

    return MistralForCausalLM(MistralConfig(**_SIZES, sliding_window=7, head_dim=12))


def _qwen2() -> Any:
    from transformers import Qwen2Config, Qwen2ForCausalLM

    config = Qwen2Config(**_SIZES, use_sliding_window=True, sliding_window=5, max_window_layers=1)
    return Qwen2ForCausalLM(config)


def _qwen3() -> Any:
    from transformers import Qwen3Config, Qwen3ForCausalLM

    rope = {"rope_type": "yarn", **_ROPE}
    return Qwen3ForCausalLM(Qwen3Config(**_SIZES, head_dim=20, rope_parameters=rope))


FAMILY: dict[str, Callable[[], Any]] = {
    "llama-biased": _llama_biased,
    "llama-tied-llama3": _llama_tied,
    "llama-linear": _llama_linear,
    "mistral-window": _mistral,
    "qwen2-window": _qwen2,
    "qwen3-yarn": _qwen3,
}


def seeded(build: Callable[[], Any]) -> Any:
    """A model with reproducible weights whose vectors (norms, biases) are not trivial either."""
    torch.manual_seed(0)
    model = build().eval()
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.ndim == 1:
                parameter.add_(torch.randn_like(parameter) * 0.1)
    return model


@pytest.fixture(scope="session")
def family() -> Callable[[str], Any]:
    """The transformers model of a name in ``FAMILY``, built once."""
    built: dict[str, Any] = {}

    def get(name: str) -> Any:
        if name not in built:
            built[name] = seeded(FAMILY[name])
        return built[name]

    return get


@pytest.fixture(scope="session")
def decoder(family: Callable[[str], Any]) -> Callable[..., CausalModel]:
    """The decoder of a family member in a weight format (and type), built once."""
    built: dict[tuple[str, str, Any], CausalModel] = {}

    def get(name: str, compression: str = "fp32", dtype: torch.dtype | None = None) -> CausalModel:
        key = (name, compression, dtype)
        if key not in built:
            built[key] = wrap_model(
                family(name), compression=compression, dtype=dtype, device="cpu"
            )
        return built[key]

    return get


@pytest.fixture(scope="session")
def tokens() -> torch.Tensor:
    """A random sequence [700] of ids below ``VOCAB``."""
    return torch.randint(0, VOCAB, (700,), generator=torch.Generator().manual_seed(1))


@pytest.fixture(scope="session")
def smollm2() -> Callable[[str], tuple[CausalModel, Any]]:
    """The default target and its tokenizer in a weight format, fetched and loaded once."""
    built: dict[str, tuple[CausalModel, Any]] = {}

    def get(compression: str) -> tuple[CausalModel, Any]:
        if compression not in built:
            built[compression] = load_model("smollm2", compression=compression, device="cpu")
        return built[compression]

    return get


def tiny_tokenizer(words: list[str], template: str | None = None) -> Any:
    """A word-level tokenizer with ``<unk>``, ``<s>`` and ``</s>`` as ids 0, 1 and 2."""
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    vocab = {word: i for i, word in enumerate(["<unk>", "<s>", "</s>", *words])}
    backend = Tokenizer(models.WordLevel(vocab, unk_token="<unk>"))
    backend.pre_tokenizer = pre_tokenizers.Whitespace()
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=backend, unk_token="<unk>", bos_token="<s>", eos_token="</s>"
    )
    tokenizer.chat_template = template
    return tokenizer
