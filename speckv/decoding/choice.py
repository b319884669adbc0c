"""Which loop decodes: the device loop where driver and models allow, else the graphed, else eager.

All three give the same tokens; what differs is how much of a step the host has a hand in.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any, Protocol

import torch
from torch import Tensor

from ..models.base import CausalModel
from ..models.llama import LlamaDecoder
from .conditional import DRIVER_MIN, CudaError, Driver
from .current import on_device
from .device import DeviceLoop
from .eager import Seconds, StepRecord
from .graphed import GraphedLoop
from .lookup import Lookup
from .requests import RequestBatch
from .signals import KeepingEagerLoop
from .trial import try_conditionals

LOOPS = ("auto", "device", "graphed", "eager")
"""What a user may ask for."""

_LENGTH_MULTIPLE = 512
_NO_GPU = "CUDA graphs need a GPU"


class Loop(Protocol):
    """What all loops offer; see `EagerLoop` and `PlannedLoop`."""

    batch: int
    capacity: int
    seconds: Seconds

    def run(self, requests: RequestBatch, policy: Tensor) -> Iterator[list[StepRecord]]: ...

    def finish(self, row: int) -> None: ...

    def signals(self, row: int, steps: int) -> Tensor: ...

    def close(self) -> None: ...


@dataclass(frozen=True)
class Choice:
    """A loop, and why not one with less of the host in it; empty for the device loop."""

    kind: str
    reason: str = ""

    @property
    def on_graphs(self) -> bool:
        """Whether its forwards are CUDA graphs."""
        return self.kind != "eager"

    def __str__(self) -> str:
        return f"{self.kind} loop" + (f" ({self.reason})" if self.reason else "")


def choose_loop(
    target: CausalModel,
    draft: CausalModel | None,
    lookup: Lookup | None = None,
    wanted: str = "auto",
    *,
    driver: Callable[[], Driver] = Driver,
) -> Choice:
    """The loop for a pair.

    Parameters
    ----------
    wanted : str
        One of `LOOPS`.
    driver : callable
        Opens the CUDA driver.

    Raises
    ------
    ValueError
        A loop that there is none of, or that this pair cannot have.
    """
    if wanted not in LOOPS:
        raise ValueError(f"loop: expected one of {', '.join(LOOPS)}, got {wanted!r}")
    if wanted == "eager":
        return Choice("eager", "as asked for")
    problem = _not_capturable(target, draft, lookup)
    if problem:
        best = Choice("eager", problem)
    elif wanted == "graphed":
        return Choice("graphed", "as asked for")
    else:
        best = best_loop(target.device, driver)
    if wanted not in ("auto", best.kind):
        raise ValueError(f"loop: expected a pair and a device for {wanted!r}, got: {best.reason}")
    return best


def best_loop(device: torch.device, driver: Callable[[], Driver] = Driver) -> Choice:
    """The loop on a device, for a pair whose forwards can all be captured."""
    if device.type != "cuda":
        return Choice("eager", _NO_GPU)
    problem = _driver_problem(driver, device)
    return Choice("graphed", problem) if problem else Choice("device")


def _not_capturable(
    target: CausalModel, draft: CausalModel | None, lookup: Lookup | None
) -> str | None:
    """Why a pair's forwards cannot stand in a CUDA graph."""
    if target.device.type != "cuda":
        return _NO_GPU
    if lookup is not None:
        return "a lookup searches on the host"
    for model in (target, draft):
        if model is not None and not isinstance(model, LlamaDecoder):
            return f"{model.name} runs in transformers"
    return None


def _driver_problem(driver: Callable[[], Driver], device: torch.device) -> str | None:
    """Why the driver cannot run conditional nodes; it has run some before this says None."""
    try:
        opened = driver()
        version = opened.version
    except ImportError:
        return "conditional graphs need cuda-bindings: pip install 'speckv[graphs]'"
    except (CudaError, RuntimeError, OSError) as error:
        return f"the CUDA driver cannot be asked: {error}"
    if version < DRIVER_MIN:
        needed, found = (f"{v // 1000}.{v % 1000 // 10}" for v in (DRIVER_MIN, version))
        return f"conditional graphs need a driver of CUDA {needed}, found {found}"
    try:
        with on_device(device):
            try_conditionals(opened, device)
    except (CudaError, RuntimeError, TypeError, AttributeError) as error:
        return f"a conditional graph does not run: {error}"
    return None


class Loops:
    """The loop of a pair, made when first needed, kept, and made anew where it is too small.

    Parameters
    ----------
    target, draft, id_map, lookup
        As of `EagerLoop`.
    max_length : int
        Most tokens of a row.
    wanted : str
        One of `LOOPS`.

    Attributes
    ----------
    choice : Choice
    """

    def __init__(
        self,
        target: CausalModel,
        draft: CausalModel | None,
        *,
        id_map: Tensor | None,
        lookup: Lookup | None,
        max_length: int,
        wanted: str = "auto",
    ) -> None:
        self.choice = choose_loop(target, draft, lookup, wanted)
        self._pair, self._lookup, self._max_length = (target, draft), lookup, max_length
        self._id_map = id_map
        self._loop: Loop | None = None

    def take(self, requests: RequestBatch) -> Loop:
        """The loop, with room for the requests."""
        return self._grown(requests.size, max(requests.limits))

    def reserve(self, batch: int, length: int) -> None:
        """Make room for requests of up to this size."""
        self._grown(batch, length)

    def drop(self) -> None:
        """Forget the loop: what stands in its caches must not reach later requests."""
        loop, self._loop = self._loop, None
        if loop is not None:
            loop.close()

    def _grown(self, batch: int, length: int) -> Loop:
        loop = self._loop
        if loop is None or loop.batch < batch or loop.capacity < length:
            batch = max(batch, loop.batch if loop else 0)
            length = max(length, loop.capacity if loop else 0)
            length = min(-(-length // _LENGTH_MULTIPLE) * _LENGTH_MULTIPLE, self._max_length)
            del loop
            self.drop()  # its memory goes before the new one's comes
            self._loop = loop = self._make(batch, length)
        return loop

    def _make(self, batch: int, length: int) -> Loop:
        size: dict[str, Any] = {"batch": batch, "capacity": length, "id_map": self._id_map}
        if self.choice.kind == "eager":
            return KeepingEagerLoop(*self._pair, **size, lookup=self._lookup)
        return (DeviceLoop if self.choice.kind == "device" else GraphedLoop)(*self._pair, **size)
