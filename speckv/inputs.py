"""What may be passed as a prompt."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from numbers import Integral
from typing import Any

from torch import Tensor

Prompt = str | Sequence[int] | Sequence[Mapping[str, str]]
"""Text, token ids, or (with ``chat=True``) chat messages."""


def is_ids(prompt: Any) -> bool:
    """Whether a prompt is token ids."""
    if isinstance(prompt, Tensor):
        return prompt.dim() == 1
    return (
        isinstance(prompt, Sequence)
        and not isinstance(prompt, str)
        and all(isinstance(token, Integral) and not isinstance(token, bool) for token in prompt)
    )


def is_one(prompt: Sequence[Any]) -> bool:
    """Whether a sequence is one prompt: token ids, or chat messages."""
    return is_ids(prompt) or all(isinstance(message, Mapping) for message in prompt)
