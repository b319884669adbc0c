"""What makes the host wait for the device between the first and the last token of a generation.

`SyncAudit` notes every call that synchronises or copies to the host: entry points of torch are
patched while it is entered, and what reaches torch's dispatcher some other way is seen there.
`audited` runs a generation under it. `trace_syncs` finds the same in a profiler's events, which
also show calls that do not go through torch.
"""

from __future__ import annotations

import traceback
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from typing import Any
from unittest.mock import patch

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from bench.lab import Row
from speckv.decoding.choice import Loop
from speckv.decoding.eager import StepRecord
from speckv.decoding.requests import RequestBatch

_WAITERS: tuple[Any, ...] = (torch.cuda, torch.cuda.Stream, torch.cuda.Event)
_READS = ("item", "tolist", "cpu", "numpy", "__bool__", "__int__", "__float__", "__index__")
_READING_OPERATIONS = ("_local_scalar_dense", "nonzero", "equal", "masked_select", "is_nonzero")
_TRACED_WAITS = (
    "cudaDeviceSynchronize",
    "cudaStreamSynchronize",
    "cudaEventSynchronize",
    "cuCtxSynchronize",
    "cuStreamSynchronize",
    "cuEventSynchronize",
    "Memcpy DtoH",
)
_TRACED_LAUNCHES = ("cudaLaunchKernel", "cuLaunchKernel", "cudaGraphLaunch", "cuGraphLaunch")


class SyncAudit:
    """Notes what makes the host wait, while entered; may be entered again and again.

    Parameters
    ----------
    device_type : str
        Tensors of this device are not to be read.

    Attributes
    ----------
    found : list of str
        A line each: what was called, and from where.
    """

    def __init__(self, device_type: str = "cuda") -> None:
        self.found: list[str] = []
        self._device_type = device_type
        self._paused = 0

    def __enter__(self) -> SyncAudit:
        self._stack = ExitStack()
        for owner in _WAITERS:
            self._replace(owner, "synchronize", lambda *_: True)
        for name in _READS:
            self._replace(Tensor, name, lambda tensor, *_: self._watched(tensor))
        self._stack.enter_context(_Dispatched(self))
        return self

    def __exit__(self, *details: object) -> None:
        self._stack.close()

    @contextmanager
    def paused(self) -> Iterator[None]:
        """Note nothing: this stands for work of the device."""
        self._paused += 1
        try:
            yield
        finally:
            self._paused -= 1

    def note(self, what: str) -> None:
        """Note a wait, with the caller outside torch and this module."""
        if self._paused:
            return
        frames = [f for f in traceback.extract_stack() if not _is_inner(f.filename)]
        where = f"{frames[-1].filename}:{frames[-1].lineno}" if frames else "unknown"
        self.found.append(f"{what} at {where}")

    def _watched(self, tensor: Any) -> bool:
        return isinstance(tensor, Tensor) and tensor.device.type == self._device_type

    def _replace(self, owner: Any, name: str, counts: Callable[..., bool]) -> None:
        whole = getattr(owner, name)

        def noted(*arguments: Any, **options: Any) -> Any:
            if counts(*arguments):
                self.note(f"{owner.__name__}.{name}")
            with self.paused():  # what it is made of was not asked for
                return whole(*arguments, **options)

        self._stack.enter_context(patch.object(owner, name, noted))


class _Dispatched(TorchDispatchMode):
    """Operations that give the host a value of the device."""

    def __init__(self, audit: SyncAudit) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self._audit = audit

    def __torch_dispatch__(
        self,
        operation: Any,
        types: Any,
        arguments: tuple[Any, ...] = (),
        options: Mapping[str, Any] | None = None,
    ) -> Any:
        result = operation(*arguments, **(options or {}))
        name, audit = operation.overloadpacket.__name__, self._audit
        watched = [a for a in arguments if audit._watched(a)]
        if watched and name in _READING_OPERATIONS:
            audit.note(name)
        elif name in ("_to_copy", "copy_") and audit._device_type != "cpu":
            source = arguments[1] if name == "copy_" else arguments[0]
            if audit._watched(source) and result.device.type == "cpu":
                audit.note(f"{name} to the host")
        return result


def _is_inner(filename: str) -> bool:
    return filename == __file__ or "/torch/" in filename or filename.endswith("contextlib.py")


def audited(
    loop: Loop, requests: RequestBatch, policy: Tensor, audit: SyncAudit
) -> list[list[StepRecord]]:
    """Decode under an audit that begins with the first token and ends with the last."""
    running = iter(loop.run(requests, policy))
    steps = [next(running)]
    with audit:
        steps += running
    return steps


def trace_syncs(names: Iterable[str]) -> tuple[list[str], int]:
    """The names of a profiler's events that make the host wait, and how many launch something."""
    every = list(names)
    waits = [n for n in every if any(wait in n for wait in _TRACED_WAITS)]
    return waits, sum(any(launch in n for launch in _TRACED_LAUNCHES) for n in every)


def audit_row(kind: str, loop: Loop, requests: RequestBatch, policy: Tensor) -> Row:
    """One generation under the audit, and one under the profiler where there is a GPU."""
    audit = SyncAudit()
    steps = audited(loop, requests, policy, audit)
    count = max(len(steps) - 1, 1)
    row: Row = {
        "name": f"syncs of the {kind} loop",
        "steps": len(steps) - 1,
        "syncs": len(audit.found),
        "first": audit.found[:3],
        "traced_syncs": None,
        "launches_per_step": None,
    }
    if torch.cuda.is_available():
        running = iter(loop.run(requests, policy))
        next(running)
        activities = [torch.profiler.ProfilerActivity.CPU, torch.profiler.ProfilerActivity.CUDA]
        with torch.profiler.profile(activities=activities) as profiler:
            for _ in running:
                pass
        waits, launched = trace_syncs(event.name for event in profiler.events())
        # The profiler itself waits for the device once it ends.
        row |= {"traced_syncs": waits, "launches_per_step": launched / count}
    return row
