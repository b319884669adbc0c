"""The errors a user can cause or meet.

Bad arguments raise ``ValueError`` or ``TypeError``; everything else that is not a defect of speckv
raises one of the classes below. Each message is one line: what failed, and what to do about it.
What works, but not as well as it could, is a warning.
"""

from __future__ import annotations

__all__ = [
    "ModelError",
    "NumericsError",
    "PolicyError",
    "SpeckvError",
    "TraceError",
    "UntrainedPolicyWarning",
]


class SpeckvError(Exception):
    """Base class of every error speckv raises on purpose, bad arguments excepted."""


class ModelError(SpeckvError):
    """A model cannot be had: unknown name, no network, a missing or corrupt file."""


class NumericsError(SpeckvError, RuntimeError):
    """A model produced NaN logits, so no token can be chosen."""


class PolicyError(SpeckvError, ValueError):
    """A policy cannot be used: an unknown name, or a weight file of another format or version."""


class TraceError(SpeckvError, ValueError):
    """A trace file cannot be used: missing, damaged, or of another format or version."""


class UntrainedPolicyWarning(UserWarning):
    """The policy ``speckv`` was not trained for its pair of models, and something else decides."""
