"""What makes the host wait for the device between the first and the last token of a generation.

`SyncAudit` notes every call that synchronises or copies to the host: entry points of torch are
patched while it is entered, and what reaches torch's dispatcher some other way is seen there.
`audited` runs a generation under it. `trace_syncs` finds the same in a profiler's events, which
also show calls that do not go through torch.
"""

from __future__ import annotations

import resource
import traceback
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any
from unittest.mock import patch

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from bench.lab import COST, Lab, Row, one_request
from bench.loop_rows import loop_kinds
from speckv.decoding.choice import Loop
from speckv.decoding.eager import StepRecord
from speckv.decoding.requests import RequestBatch
from speckv.models.base import CausalModel
from speckv.policies import parse_policy

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
_SPAN = "generation"
_HOST_SLACK = 16 << 20
"""Bytes that the allocator of the host may still spread over."""


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
        if name in ("_to_copy", "copy_") and audit._watched(result):
            source = arguments[1] if name == "copy_" else arguments[0]
            if source.device.type == "cpu" != audit._device_type and not source.is_pinned():
                audit.note(f"{name} from pageable memory")
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


def within(events: Iterable[Any], span: str) -> Iterator[str]:
    """Names of the events inside the one named ``span``: the profiler waits too, once it ends."""
    every = list(events)
    outer = next(event.time_range for event in every if event.name == span)
    for event in every:
        inside = outer.start <= event.time_range.start and event.time_range.end <= outer.end
        if inside and event.name != span:
            yield event.name


def audit_rows(lab: Lab, target: CausalModel, draft: CausalModel) -> Iterator[Row]:
    """Syncs of each loop on graphs, then what many generations leave behind."""
    kinds = {kind: make for kind, make in loop_kinds(lab).items() if kind != "eager"}
    requests = one_request(lab, 16 if lab.dry else 64)
    policy = parse_policy("fixed:3").pack(cost=COST)
    for kind, make in kinds.items():
        loop = make(target, draft, batch=1, capacity=512)
        for _ in loop.run(requests, policy):  # compiles and captures
            pass
        yield audit_row(kind, loop, requests, policy)
        yield growth_row(lab, kind, loop, requests, policy)
        del loop


def resident_bytes() -> int:
    """Memory of this process that is in RAM."""
    pages = Path("/proc/self/statm").read_text().split()[1]
    return int(pages) * resource.getpagesize()


def growth_row(lab: Lab, kind: str, loop: Loop, requests: RequestBatch, policy: Tensor) -> Row:
    """Memory before and after many generations, the first few left out: they fill caches."""
    count = 20 if lab.dry else 200 if lab.quick else 1000
    readings = []
    for i in range(count):
        for _ in loop.run(requests, policy):
            pass
        if i in (count // 10, count - 1):
            device = 0 if lab.dry else torch.cuda.memory_allocated()
            readings.append((device, resident_bytes()))
    (device, host), (device_later, host_later) = readings
    grown = {"device_bytes": device_later - device, "host_bytes": host_later - host}
    grew = grown["device_bytes"] > 0 or grown["host_bytes"] > _HOST_SLACK
    return {
        "name": f"memory of the {kind} loop",
        "generations": count,
        **grown,
        "grew": grew and not lab.dry,
    }


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
        profiled = torch.profiler.profile(activities=activities)
        with profiled as profiler, torch.profiler.record_function(_SPAN):
            for _ in running:
                pass
        waits, launched = trace_syncs(within(profiler.events(), _SPAN))
        row |= {"traced_syncs": waits, "launches_per_step": launched / count}
    return row
