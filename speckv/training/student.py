"""The trainable form of a slice draft: transformers' layers, the target's frozen embedding."""

from __future__ import annotations

import copy
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from ..models.weights import TensorSource

if TYPE_CHECKING:
    from transformers import PreTrainedConfig

_EMBEDDING = "model.embed_tokens.weight"


class Student(nn.Module):
    """Layers, final norm and head of a draft, initialised from its target.

    Parameters
    ----------
    config : transformers configuration of the target
    source : TensorSource
        The target's tensors.
    layers : sequence of int
        The target's layers that these begin as.
    id_map : int64 [V_draft]
        Target id of each row of the head, which begins as those rows of the target's.
    """

    def __init__(
        self, config: PreTrainedConfig, source: TensorSource, layers: Sequence[int], id_map: Tensor
    ) -> None:
        from transformers import AutoModel

        super().__init__()
        self.body: Any = AutoModel.from_config(_sliced(config, layers), dtype=torch.float32)
        head = _EMBEDDING if config.tie_word_embeddings else "lm_head.weight"
        with torch.no_grad():
            for name, parameter in self.body.named_parameters():
                parameter.copy_(source[_target_name(f"model.{name}", layers)])
            weight = source[head][id_map].float()
        self.body.embed_tokens.weight.requires_grad_(False)
        self.head = nn.Linear(weight.shape[1], weight.shape[0], bias=False)
        self.head.weight = nn.Parameter(weight)

    def forward(self, tokens: Tensor, mask: Tensor, rows: Tensor) -> Tensor:
        """Logits of some positions of a padded batch.

        Parameters
        ----------
        tokens : int64 [B, T]
            Padded at the end.
        mask : int64 [B, T]
            1 for tokens, 0 for padding.
        rows : int64 [M]
            Places in the flattened batch that predict a wanted token.

        Returns
        -------
        Tensor [M, V_draft]
        """
        hidden = self.body(input_ids=tokens, attention_mask=mask, use_cache=False).last_hidden_state
        logits: Tensor = self.head(hidden.flatten(0, 1)[rows])
        return logits

    def trainable(self) -> dict[str, Tensor]:
        """What training changes, by the names that a draft's file has."""
        found = {
            f"model.{name}": parameter
            for name, parameter in self.body.named_parameters()
            if parameter.requires_grad
        }
        return {**found, "lm_head.weight": self.head.weight}


def _sliced(config: PreTrainedConfig, layers: Sequence[int]) -> PreTrainedConfig:
    sliced: Any = copy.deepcopy(config)
    sliced.num_hidden_layers = len(layers)
    sliced.attention_dropout = 0.0  # a resumed training repeats no random numbers
    kinds = getattr(sliced, "layer_types", None)
    if kinds is not None:
        sliced.layer_types = [kinds[layer] for layer in layers]
    return sliced


def _target_name(name: str, layers: Sequence[int]) -> str:
    """Name in the target of the tensor that ``name`` of the student begins as."""
    parts = name.split(".")
    if parts[:2] == ["model", "layers"]:
        parts[2] = str(layers[int(parts[2])])
    return ".".join(parts)
