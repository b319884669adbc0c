"""The kernels' prepared objects behind the signatures of their functions."""

from __future__ import annotations

from collections.abc import Callable, Hashable
from types import ModuleType
from typing import Any

from torch import Tensor

from ..kernels.layout import StepState


class PreparedOperations:
    """`draft_step`, `cutoff`, `verify` and `verify_rejection` for one run of a loop.

    The first call with given tensors validates them and allocates what the kernel needs besides;
    calls with the same ones then only launch. Tensors are the same if they lie at the same place,
    which cannot be mistaken, because what is prepared keeps its tensors. The logits may lie
    anywhere; tensors that are new in every step would be prepared, and kept, in every step.

    Parameters
    ----------
    kernels : module
        `speckv.kernels`.
    """

    def __init__(self, kernels: ModuleType) -> None:
        self._kernels: Any = kernels
        self._prepared: dict[Hashable, Any] = {}

    def draft_step(
        self, logits: Tensor, state: StepState, policy: Tensor, **arguments: Tensor | str | None
    ) -> None:
        """As `speckv.kernels.draft_step`."""
        self._get(self._kernels.DraftStep, logits, state, policy, **arguments)(logits)

    def verify(
        self, logits: Tensor, state: StepState, policy: Tensor, **arguments: Tensor | None
    ) -> None:
        """As `speckv.kernels.verify`."""
        self._get(self._kernels.Verify, logits, state, policy, **arguments)(logits)

    def verify_rejection(
        self, logits: Tensor, state: StepState, policy: Tensor, **arguments: Tensor | None
    ) -> None:
        """As `speckv.kernels.verify_rejection`."""
        self._get(self._kernels.VerifyRejection, logits, state, policy, **arguments)(logits)

    def cutoff(
        self, logits: Tensor, *columns: Tensor | None, rows: Tensor | None = None
    ) -> tuple[Tensor, Tensor]:
        """As `speckv.kernels.cutoff`; a later call with these tensors overwrites the results."""
        prepared = self._get(self._kernels.Cutoff, logits, *columns, rows=rows)
        prepared(logits)
        return prepared.cutoffs, prepared.lse

    def _get(self, kind: Callable[..., Any], logits: Tensor, *arguments: Any, **named: Any) -> Any:
        form = (logits.shape, logits.stride(), logits.dtype)
        places = (_place(value) for value in (*arguments, *named.values()))
        key = (kind, form, *named, *places)
        if key not in self._prepared:
            self._prepared[key] = kind(logits, *arguments, **named)
        return self._prepared[key]


def prepared(operations: Any) -> Any:
    """``operations`` for one run: prepared ones if they are the kernels, else themselves."""
    return PreparedOperations(operations) if hasattr(operations, "DraftStep") else operations


def _place(value: Any) -> Hashable:
    """What tells an argument from others as long as it lives."""
    if isinstance(value, Tensor):
        return value.data_ptr(), value.shape, value.stride(), value.dtype
    return id(value) if isinstance(value, StepState) else value
