"""A draft for a target: one distilled from it, its own first layers, or a smaller model."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

from torch import Tensor

from speckv.models.base import CausalModel
from speckv.models.llama import LlamaDecoder
from speckv.models.loading import load_model
from speckv.models.slice_draft import MANIFEST, load_slice_draft, shipped_draft
from speckv.models.tokenizers import check_compatible

UNTRAINED_LAYERS = 4
"""Layers of the draft of a target that none was distilled for. Few, because an untrained early exit
agrees with its target about as seldom with more of them, and costs in proportion."""


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
        A folder that ``speckv distill`` made for this target. ``first:N``: the target's first N
        layers, final norm and head, sharing its weights. ``none``: no draft. Else as for
        `load_model`. By default the draft that comes with the package for this target, or
        ``first:4`` where the target can do that.
    id_map : int32 [V_draft], optional
        Target id of each draft id, for a draft model of its own vocabulary.

    Raises
    ------
    ValueError
        The target has no layers to lend, the vocabularies differ, or ``id_map`` is given for a
        draft that takes none.
    ModelError
        The model cannot be had.
    """
    if draft is None:
        draft = _default_draft(target)
    if draft == "none":
        _no_id_map(id_map, "where there is no draft model")
        return None, None
    match = re.fullmatch(r"first:(\d+)", draft)
    if match:
        _no_id_map(id_map, "for the target's own layers, which have its ids")
        if not isinstance(target, LlamaDecoder):
            raise ValueError(f"draft {draft!r}: {target.name} is not of the Llama family")
        count, layers = int(match[1]), target.config.layers
        if not 1 <= count <= layers:
            raise ValueError(f"draft: expected first:1 to first:{layers}, got {draft!r}")
        return target.first_layers(count), None
    folder = Path(draft).expanduser()
    if (folder / MANIFEST).is_file():
        if not isinstance(target, LlamaDecoder):
            raise ValueError(f"draft {draft!r}: {target.name} is not of the Llama family")
        _no_id_map(id_map, "for a distilled draft, which has its own")
        return load_slice_draft(folder, target)
    model, draft_tokenizer = load_model(
        draft, dtype=target.dtype, device=target.device, progress=progress
    )
    vocabularies = target.vocab_size, model.vocab_size
    checked = check_compatible(tokenizer, draft_tokenizer, *vocabularies, id_map)
    return model, None if checked is None else checked.to(target.device)


def _no_id_map(id_map: Tensor | None, why: str) -> None:
    if id_map is not None:
        raise ValueError(f"id_map: expected none {why}, got one")


def _default_draft(target: CausalModel) -> str:
    if not isinstance(target, LlamaDecoder):
        return "none"
    shipped = shipped_draft(target.fingerprint)
    if shipped is not None:
        return str(shipped)
    return f"first:{UNTRAINED_LAYERS}" if target.config.layers > UNTRAINED_LAYERS else "none"


def eos_token_ids(target: CausalModel, tokenizer: Any) -> list[int]:
    """Ids that end a sequence: those of the checkpoint and that of the tokenizer."""
    ids = set(target.eos_ids)
    if tokenizer.eos_token_id is not None:
        ids.add(int(tokenizer.eos_token_id))
    return sorted(ids)
