"""`draft_step` and `verify` of the CPU path: compiled if there is a compiler, else the reference.

Between two forwards of a model, whose weights fill the caches, interpreted code and torch's calls
on small tensors run several times slower than in a loop of their own. Compiled, a decision is one
call. Every policy, plain decoding among them, goes through the same operations, so the tokens do
not depend on the policy either way. The last bits of signals and of noise may differ from the
reference's: where nothing is compiled, a seed may give other tokens.
"""

from __future__ import annotations

from typing import Any

from torch import Tensor

from . import native, reference
from .layout import StepState
from .reference import cutoff as cutoff
from .reference import verify_rejection as verify_rejection

__all__ = ["best_gamma", "cutoff", "draft_step", "verify", "verify_rejection"]


def draft_step(logits: Tensor, state: StepState, policy: Tensor, **arguments: Any) -> None:
    """`reference.draft_step`."""
    (native.library() or reference).draft_step(logits, state, policy, **arguments)


def verify(logits: Tensor, state: StepState, policy: Tensor, **arguments: Any) -> None:
    """`reference.verify`."""
    (native.library() or reference).verify(logits, state, policy, **arguments)


def best_gamma(policy: Tensor, rows: list[int], running: list[float]) -> int:
    """`reference.best_gamma`."""
    return (native.library() or reference).best_gamma(policy, rows, running)
