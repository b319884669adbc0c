"""Loops that decode speculatively. `eager` is the readable specification of all of them."""

from __future__ import annotations

from .eager import EagerLoop, StepRecord
from .requests import RequestBatch
from .stats import Stats

__all__ = ["EagerLoop", "RequestBatch", "Stats", "StepRecord"]
