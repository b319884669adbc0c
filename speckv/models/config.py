"""What the Llama-family decoder needs to know about a checkpoint, and what it refuses."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

if TYPE_CHECKING:
    from transformers import PreTrainedConfig

__all__ = ["LLAMA_FAMILY", "DecoderConfig", "eos_ids_of"]

LLAMA_FAMILY = ("llama", "mistral", "qwen2", "qwen3")
"""Model types of the functional decoder."""

_ROPE_TYPES = ("default", "linear", "llama3", "yarn")


@dataclass(frozen=True)
class DecoderConfig:
    """Geometry and options of a decoder; sizes are in elements, ``rope_theta`` in radians.

    ``windows`` holds per layer the sliding window in positions, or None. ``inv_freq``
    [head_dim / 2] and ``rope_scale`` come from the checkpoint's rotary variant.
    """

    model_type: str
    vocab_size: int
    hidden: int
    intermediate: int
    heads: int
    kv_heads: int
    head_dim: int
    eps: float
    max_positions: int
    tied: bool
    qkv_bias: bool
    output_bias: bool
    mlp_bias: bool
    head_norm: bool
    windows: tuple[int | None, ...]
    inv_freq: Tensor
    rope_scale: float
    eos_ids: tuple[int, ...]

    @property
    def layers(self) -> int:
        """Number of decoder layers."""
        return len(self.windows)

    @classmethod
    def from_transformers(cls, config: PreTrainedConfig) -> DecoderConfig:
        """Read a transformers configuration.

        Raises
        ------
        ValueError
            If the model type, activation, rotary variant or head layout is not supported.
        """
        source: Any = config
        kind = str(source.model_type)
        if kind not in LLAMA_FAMILY:
            raise ValueError(f"model_type: expected one of {', '.join(LLAMA_FAMILY)}, got {kind!r}")
        if source.hidden_act not in ("silu", "swish"):
            raise ValueError(f"hidden_act: expected 'silu', got {source.hidden_act!r}")
        heads = int(source.num_attention_heads)
        kv_heads = int(source.num_key_value_heads or heads)
        if heads % kv_heads:
            raise ValueError(
                f"num_key_value_heads: expected a divisor of {heads} heads, got {kv_heads}"
            )
        head_dim = int(getattr(source, "head_dim", None) or source.hidden_size // heads)
        inv_freq, scale = _rope_frequencies(source, head_dim)
        attention_bias = bool(getattr(source, "attention_bias", False))
        return cls(
            model_type=kind,
            vocab_size=int(source.vocab_size),
            hidden=int(source.hidden_size),
            intermediate=int(source.intermediate_size),
            heads=heads,
            kv_heads=kv_heads,
            head_dim=head_dim,
            eps=float(source.rms_norm_eps),
            max_positions=int(source.max_position_embeddings),
            tied=bool(source.tie_word_embeddings),
            qkv_bias=kind == "qwen2" or attention_bias,
            output_bias=kind != "qwen2" and attention_bias,
            mlp_bias=kind == "llama" and bool(getattr(source, "mlp_bias", False)),
            head_norm=kind == "qwen3",
            windows=_layer_windows(source),
            inv_freq=inv_freq,
            rope_scale=scale,
            eos_ids=eos_ids_of(source),
        )


def eos_ids_of(source: Any) -> tuple[int, ...]:
    """The end-of-sequence ids of a transformers configuration (one, several or none)."""
    ids = getattr(source, "eos_token_id", None)
    if ids is None:
        return ()
    return tuple(ids) if isinstance(ids, list | tuple) else (int(ids),)


def _layer_windows(source: Any) -> tuple[int | None, ...]:
    layers = int(source.num_hidden_layers)
    window = getattr(source, "sliding_window", None)
    if source.model_type == "llama" or window is None:
        return (None,) * layers
    if source.model_type == "mistral":
        return (int(window),) * layers
    kinds = source.layer_types
    if len(kinds) != layers:
        raise ValueError(f"layer_types: expected {layers} entries, got {len(kinds)}")
    unknown = set(kinds) - {"full_attention", "sliding_attention"}
    if unknown:
        raise ValueError(
            f"layer_types: expected full_attention or sliding_attention, got {sorted(unknown)[0]!r}"
        )
    return tuple(int(window) if kind == "sliding_attention" else None for kind in kinds)


def _rope_frequencies(source: Any, head_dim: int) -> tuple[Tensor, float]:
    """Inverse frequencies [head_dim / 2] fp32 and the factor on cosine and sine."""
    parameters = dict(source.rope_parameters or {})
    kind = str(parameters.get("rope_type", "default"))
    if kind not in _ROPE_TYPES:
        raise ValueError(
            f"rope_parameters: expected rope_type in {', '.join(_ROPE_TYPES)}, got {kind!r}"
        )
    if float(parameters.get("partial_rotary_factor", 1.0)) != 1.0:
        raise ValueError(
            "rope_parameters: expected partial_rotary_factor 1, "
            f"got {parameters['partial_rotary_factor']}"
        )
    if kind == "default":
        exponent = torch.arange(0, head_dim, 2, dtype=torch.float32) / head_dim
        return 1.0 / (float(parameters["rope_theta"]) ** exponent), 1.0
    from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS

    inv_freq, scale = ROPE_INIT_FUNCTIONS[kind](source, torch.device("cpu"))
    return inv_freq.float(), float(scale)
