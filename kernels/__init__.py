"""Tensor functions of speckv: Triton kernels, and the plain-torch reference that is their oracle.

Imported as ``speckv.kernels`` only: Hugging Face distributes an unrelated top-level package named
``kernels``, so under any other name nothing here can be used.

The names of `PUBLIC` are attributes of this package. They are imported on first use, so that the
CPU path (`cpu_step`, `reference`, `layout`) never imports triton.
"""

from __future__ import annotations

import importlib
import sys
from types import ModuleType
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from .argmax import argmax as argmax
    from .attention import attention as attention
    from .cutoff import Cutoff as Cutoff
    from .cutoff import cutoff as cutoff
    from .draft_step import DraftStep as DraftStep
    from .draft_step import draft_step as draft_step
    from .expand import expand as expand
    from .linear import Linear as Linear
    from .linear import linear as linear
    from .loop_step import close_step as close_step
    from .loop_step import keep_draft as keep_draft
    from .loop_step import publish_conditions as publish_conditions
    from .loop_step import step_inputs as step_inputs
    from .rejection import VerifyRejection as VerifyRejection
    from .rejection import verify_rejection as verify_rejection
    from .rms_norm import rms_norm as rms_norm
    from .rope_append import rope_append as rope_append
    from .verify import Verify as Verify
    from .verify import verify as verify

PUBLIC = {
    "Cutoff": "cutoff",
    "DraftStep": "draft_step",
    "Linear": "linear",
    "Verify": "verify",
    "VerifyRejection": "rejection",
    "argmax": "argmax",
    "attention": "attention",
    "close_step": "loop_step",
    "cutoff": "cutoff",
    "draft_step": "draft_step",
    "expand": "expand",
    "keep_draft": "loop_step",
    "linear": "linear",
    "publish_conditions": "loop_step",
    "rms_norm": "rms_norm",
    "rope_append": "rope_append",
    "step_inputs": "loop_step",
    "verify": "verify",
    "verify_rejection": "rejection",
}
"""Module of each public name."""


class _Public:
    """A public name of the package, read from its module.

    Most functions are called like their module, and importing a submodule assigns it to the
    package: that assignment is dropped, so the name means the function whatever came first.
    """

    def __init__(self, name: str, module: str) -> None:
        self._name, self._module = name, f"{__name__}.{module}"

    def __get__(self, package: ModuleType, owner: type | None = None) -> Any:
        return getattr(importlib.import_module(self._module), self._name)

    def __set__(self, package: ModuleType, value: object) -> None:
        pass


if __name__ == "speckv.kernels":
    sys.modules[__name__].__class__ = type(
        "Package", (ModuleType,), {name: _Public(name, module) for name, module in PUBLIC.items()}
    )
else:
    # From the repository root this folder answers to `kernels` too, and transformers looks whether
    # that distribution is there by importing it. An error here would break transformers; a version
    # older than any it accepts makes it go on without. Using anything by this name is refused.
    __version__ = "0.0.0"
    __path__ = []

    def __getattr__(name: str) -> Any:
        if name.startswith("__"):
            raise AttributeError(name)
        raise ImportError(
            f"{__name__}.{name}: this package must be imported as speckv.kernels "
            "(the name 'kernels' belongs to an unrelated Hugging Face distribution)"
        )
