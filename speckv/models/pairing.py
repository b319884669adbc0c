"""A draft for a target: the target's own first layers, or a model that shares its vocabulary."""

from __future__ import annotations

import re
from typing import Any

from torch import Tensor

from .base import CausalModel
from .llama import LlamaDecoder
from .loading import load_model
from .tokenizers import check_compatible

DEFAULT_DRAFT_LAYERS = 4
"""Layers of the default draft. Few, because an untrained early exit agrees with its target about
as seldom with more of them, and costs in proportion."""


def load_draft(
    draft: str | None,
    target: CausalModel,
    tokenizer: Any,
    *,
    id_map: Tensor | None = None,
    progress: bool = True,
) -> tuple[CausalModel | None, Tensor | None]:
    """The draft model and the target id of each draft id (None: the same ids).

    Parameters
    ----------
    draft : str, optional
        ``first:N``: the target's first N layers, final norm and head, sharing its weights.
        ``none``: no draft. Else as for `load_model`. By default ``first:4`` where the target can do
        that.
    id_map : int32 [V_draft], optional
        Target id of each draft id, for a draft that is loaded.

    Raises
    ------
    ValueError
        The target has no layers to lend, or the vocabularies differ.
    ModelError
        The model cannot be had.
    """
    if draft is None:
        draft = "none"
        if isinstance(target, LlamaDecoder) and target.config.layers > DEFAULT_DRAFT_LAYERS:
            draft = f"first:{DEFAULT_DRAFT_LAYERS}"
    if draft == "none":
        return None, None
    match = re.fullmatch(r"first:(\d+)", draft)
    if match:
        if not isinstance(target, LlamaDecoder):
            raise ValueError(f"draft {draft!r}: {target.name} is not of the Llama family")
        return target.first_layers(int(match[1])), None
    model, draft_tokenizer = load_model(
        draft, dtype=target.dtype, device=target.device, progress=progress
    )
    vocabularies = target.vocab_size, model.vocab_size
    return model, check_compatible(tokenizer, draft_tokenizer, *vocabularies, id_map)


def eos_token_ids(target: CausalModel, tokenizer: Any) -> list[int]:
    """Ids that end a sequence: those of the checkpoint and that of the tokenizer."""
    ids = set(target.eos_ids)
    if tokenizer.eos_token_id is not None:
        ids.add(int(tokenizer.eos_token_id))
    return sorted(ids)
