"""Policies: who chooses γ. Every policy is a mode of one packed buffer that `draft_step` reads."""

from __future__ import annotations

from .cost import CostTable, StepParts
from .mlp import Mlp
from .policy import Policy, parse_policy

__all__ = ["CostTable", "Mlp", "Policy", "StepParts", "parse_policy"]
