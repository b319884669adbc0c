"""Tiny random targets of several families, and drafts that agree with them more or less."""

from __future__ import annotations

import copy
from functools import cache
from typing import Any

import torch

from speckv.models.adapter import TransformersAdapter
from speckv.models.base import CausalModel
from speckv.models.loading import wrap_model
from speckv.models.quantize import resolve_formats

VOCAB = 199
WINDOW = 8
PERTURBATION = {"llama": 0.04, "llama-adapter": 0.04, "mistral-window": 0.04, "gpt2": 0.08}
"""Standard deviation of the perturbed draft's weights around the target's, over theirs."""
FAMILIES = list(PERTURBATION)

_SIZES: dict[str, Any] = {
    "vocab_size": VOCAB,
    "hidden_size": 32,
    "intermediate_size": 64,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 512,
    "initializer_range": 0.6,
    "bos_token_id": 1,
    "eos_token_id": None,
}


@cache
def transformer(family: str, seed: int = 0) -> Any:
    """The model as transformers has it, fp32, sharp enough that two seeds seldom agree.

    ``mistral-window`` has the weights of ``llama``, and layers that see the last ``WINDOW`` tokens.
    """
    from transformers import (
        GPT2Config,
        GPT2LMHeadModel,
        LlamaConfig,
        LlamaForCausalLM,
        MistralConfig,
        MistralForCausalLM,
    )

    torch.manual_seed(seed)
    if family == "gpt2":
        return GPT2LMHeadModel(
            GPT2Config(
                vocab_size=VOCAB,
                n_positions=512,
                n_embd=32,
                n_layer=2,
                n_head=4,
                initializer_range=0.6,
                bos_token_id=1,
                eos_token_id=None,
            )
        ).eval()
    if family == "mistral-window":
        model = MistralForCausalLM(MistralConfig(**_SIZES, sliding_window=WINDOW)).eval()
        model.load_state_dict(transformer("llama", seed).state_dict())
        return model
    return LlamaForCausalLM(LlamaConfig(**_SIZES)).eval()


def perturbed(model: Any, scale: float) -> Any:
    """A copy with noise on every weight, in units of that weight's standard deviation."""
    result = copy.deepcopy(model)
    generator = torch.Generator().manual_seed(7)
    with torch.no_grad():
        for weight in result.parameters():
            noise = torch.randn(weight.shape, generator=generator)
            weight += scale * weight.std(correction=0) * noise
    return result


@cache
def wrapped(family: str, kind: str, compression: str) -> CausalModel:
    """A model of a family behind speckv's interface.

    Parameters
    ----------
    family : str
        One of ``FAMILIES``; ``llama-adapter`` is a llama that the adapter for other models runs.
    kind : str
        ``target``, ``perturbed`` (the target with noise) or ``random`` (other weights).
    compression : str
        A weight format, or one and a type of activations, such as ``int8/bf16``.
    """
    compression, _, chosen = compression.partition("/")
    dtype: Any = chosen or None
    source = transformer(family, seed=int(kind == "random"))
    if kind == "perturbed":
        source = perturbed(source, PERTURBATION[family])
    if family != "llama-adapter":
        return wrap_model(source, compression=compression, dtype=dtype, device="cpu")
    device = torch.device("cpu")
    compression, dtype = resolve_formats(compression, dtype, device)
    return TransformersAdapter(
        source, name=family, compression=compression, dtype=dtype, device=device
    )
