"""Torch's current device, which is where Triton launches, whatever device the tensors are on."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, nullcontext
from functools import wraps
from typing import Concatenate, ParamSpec, TypeVar

import torch

from ..models.base import CausalModel

T = TypeVar("T")
P = ParamSpec("P")


def on_device(device: torch.device) -> AbstractContextManager[object]:
    """Make ``device`` the current one, if it is a GPU."""
    if device.type != "cuda" or not torch.cuda.is_available():
        return nullcontext()
    return torch.cuda.device(device)


def on_targets_device(
    function: Callable[Concatenate[CausalModel, P], T],
) -> Callable[Concatenate[CausalModel, P], T]:
    """Make the device of the first argument, the target, the current one while a function runs."""

    @wraps(function)
    def run(target: CausalModel, /, *args: P.args, **kwargs: P.kwargs) -> T:
        with on_device(target.device):
            return function(target, *args, **kwargs)

    return run


class OnDevice(Iterator[T]):
    """An iterator whose every step runs on ``device``, which is not the caller's in between.

    A generator that entered `on_device` itself would leave its device to whoever it yields to.
    """

    def __init__(self, device: torch.device, steps: Iterator[T]) -> None:
        self._device, self._steps = device, steps

    def __next__(self) -> T:
        with on_device(self._device):
            return next(self._steps)

    def close(self) -> None:
        """End the iterator, if it is a generator."""
        if hasattr(self._steps, "close"):
            with on_device(self._device):
                self._steps.close()
