"""speckv: lossless speculative decoding that decides, token by token, how far to speculate."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from ._version import __version__

if TYPE_CHECKING:
    from .engine import Engine
    from .policies import Policy
    from .results import Chunk, GenerationInterrupted, Result
    from .sampling import SamplingParams

__all__ = [
    "Chunk",
    "Engine",
    "GenerationInterrupted",
    "Policy",
    "Result",
    "SamplingParams",
    "__version__",
]

_HOMES = {
    "Chunk": "results",
    "Engine": "engine",
    "GenerationInterrupted": "results",
    "Policy": "policies",
    "Result": "results",
    "SamplingParams": "sampling",
}


def __getattr__(name: str) -> Any:
    """Import public names on first use: ``import speckv`` alone loads no torch."""
    if name not in _HOMES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    from importlib import import_module

    return getattr(import_module(f".{_HOMES[name]}", __name__), name)
