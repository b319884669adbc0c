"""How the ids of a draft with a vocabulary of its own are the target's, and back."""

from __future__ import annotations

import torch
from torch import Tensor

from ..kernels.checks import check_tensor
from ..models.base import CausalModel


def draft_vocabulary(
    target: CausalModel, draft: CausalModel, id_map: Tensor | None
) -> tuple[Tensor | None, Tensor | None]:
    """How target ids become the draft's; None: they are the same.

    Returns
    -------
    draft_ids : int32 [V] or None
        Draft id of each target id, -1 where there is none.
    input_ids : int32 [V] or None
        The id that the draft is fed for each target token.
    """
    if id_map is not None:
        check_tensor("id_map", id_map, "int32", (draft.vocab_size,), target.device, dense=True)
    if id_map is None and draft.vocab_size >= target.vocab_size:
        return None, None
    known = torch.arange(draft.vocab_size, device=target.device)
    draft_ids = invert(known if id_map is None else id_map, target.vocab_size)
    # A draft with a trimmed head embeds more ids than it proposes: the target's. One with a
    # vocabulary of its own is fed its own ids, its first for a target token that it lacks.
    trimmed = draft.vocab_size < draft.embedding_size >= target.vocab_size
    return draft_ids, None if trimmed else draft_ids.clamp(min=0)


def invert(id_map: Tensor, vocab_size: int) -> Tensor:
    """Draft id of each target id, -1 where there is none: int32 [vocab_size]."""
    inverse = torch.full((vocab_size,), -1, dtype=torch.int32, device=id_map.device)
    inverse[id_map.long()] = torch.arange(id_map.numel(), dtype=torch.int32, device=id_map.device)
    return inverse
