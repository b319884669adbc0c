"""What makes the host wait for the device between the first and the last token of a generation.

`SyncAudit` notes every call that synchronises or copies to the host: entry points of torch are
patched while it is entered, and what reaches torch's dispatcher some other way is seen there.
`audited` runs a generation under it. `trace_syncs` finds the same in a profiler's events, which
also show calls that do not go through torch.
"""

from __future__ import annotations

import ctypes
import gc
import resource
import traceback
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from functools import partial
from itertools import zip_longest
from pathlib import Path
from typing import Any
from unittest.mock import patch

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from bench.lab import COST, Lab, Row, isolated, one_request
from bench.shares import on_graphs, with_loop
from speckv.decoding.choice import Loop
from speckv.decoding.eager import StepRecord
from speckv.decoding.plan import launches_per_step
from speckv.decoding.requests import RequestBatch
from speckv.decoding.works import Form
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
_HOST_SLACK = 4 << 20
"""Bytes that the allocator of the host may still spread over: 4 KiB a generation."""
_DEVICE_SLACK = 2 << 20
"""Bytes that the driver may still take: one of its own blocks."""


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


def wait_rows(
    lab: Lab, target: CausalModel, draft: CausalModel, names: dict[str, Any]
) -> Iterator[Row]:
    """Waits and launches of each loop on graphs: greedy and sampled, one sequence and four."""
    for kind, make in on_graphs(lab).items():
        for batch in (1, 4):
            facts: Row = {"name": f"syncs of the {kind} loop", **names, "batch": batch}
            rows = partial(_ways, lab, facts)
            yield from isolated(facts, partial(with_loop, make, target, draft, rows, batch=batch))


def _ways(lab: Lab, facts: Row, loop: Any) -> Iterator[Row]:
    for way, temperature in (("greedy", 0.0), ("sampled", 0.8)):
        for policy in ("fixed:3", "speckv"):
            row = {**facts, "way": way, "policy": policy}
            tokens, batch = 16 if lab.dry else 64, facts["batch"]
            requests = one_request(lab, tokens, batch=batch, temperature=temperature)
            yield from isolated(row, partial(_wait_row, row, loop, requests))


def _wait_row(facts: Row, loop: Any, requests: RequestBatch) -> Iterator[Row]:
    policy = parse_policy(facts["policy"]).pack(cost=COST)
    for _ in loop.run(requests, policy):  # compiles and captures
        pass
    audit = SyncAudit()
    gammas = gammas_of_steps(audited(loop, requests, policy, audit))
    row: Row = {**facts, "steps": len(gammas), "syncs": len(audit.found), "first": audit.found[:3]}
    row["launches_per_step"] = None
    form = Form.of(requests, policy)
    counts = captured_launches(loop, form)
    if counts and gammas:
        launches = partial(launches_per_step, loop._works[form].plan, counts)
        total = sum(times * launches(gamma) for gamma, times in Counter(gammas).items())
        row |= {"launches_per_step": total / len(gammas), "launches_of_works": counts}
    yield row


def gammas_of_steps(told: Iterable[Iterable[StepRecord]]) -> list[int]:
    """The longest draft of each step, prefill's left out."""
    rows: dict[int, list[int]] = {}
    for record in (record for records in told for record in records):
        rows.setdefault(record.row, []).append(record.gamma)
    return [max(gammas) for gammas in zip_longest(*rows.values(), fillvalue=-1)][1:]


def captured_launches(loop: Any, form: Form) -> dict[str, int]:
    """Nodes of the captured graph of each work of a loop; none where nothing is captured."""
    graphs = getattr(loop, "_graphs", {}).get(form, {})
    return {name: node_count(graph.raw_cuda_graph()) for name, graph in graphs.items()}


def node_count(graph: int, library: Any = None) -> int:
    """Nodes of the CUDA graph at an address.

    Raises
    ------
    RuntimeError
        If the driver refuses.
    """
    library = library or ctypes.CDLL("libcuda.so.1")
    count = ctypes.c_size_t(0)
    code = library.cuGraphGetNodes(ctypes.c_void_p(graph), None, ctypes.byref(count))
    if code != 0:
        raise RuntimeError(f"cuGraphGetNodes: CUDA error {code}")
    return count.value


def memory_rows(
    lab: Lab, target: CausalModel, draft: CausalModel, names: dict[str, Any]
) -> Iterator[Row]:
    """What many generations of each loop on graphs leave behind."""
    for kind, make in on_graphs(lab).items():
        facts: Row = {"name": f"memory of the {kind} loop", **names, "policy": "fixed:3"}
        rows = partial(_memory_row, lab, facts)
        yield from isolated(facts, partial(with_loop, make, target, draft, rows))


def resident_bytes() -> int:
    """Memory of this process that is in RAM."""
    pages = Path("/proc/self/statm").read_text().split()[1]
    return int(pages) * resource.getpagesize()


def _memory(lab: Lab) -> tuple[int, int, int]:
    """Bytes in tensors, bytes taken from the device, and bytes of the host."""
    gc.collect()
    if lab.dry:
        return 0, 0, resident_bytes()
    torch.cuda.synchronize()
    free, total = torch.cuda.mem_get_info()
    return torch.cuda.memory_allocated(), total - free, resident_bytes()


def _memory_row(lab: Lab, facts: Row, loop: Any) -> Iterator[Row]:
    """Before and after many generations, the first tenth left out: they fill caches."""
    requests = one_request(lab, 16 if lab.dry else 64)
    policy = parse_policy(facts["policy"]).pack(cost=COST)
    count = 20 if lab.dry else 100 if lab.quick else 1000
    readings = []
    for i in range(count):
        for _ in loop.run(requests, policy):
            pass
        if i in (count // 10, count - 1):
            readings.append(_memory(lab))
    allocated, taken, host = (after - before for before, after in zip(*readings, strict=True))
    grew = allocated > 0 or taken > _DEVICE_SLACK or host > _HOST_SLACK
    yield {
        **facts,
        "generations": count,
        "device_bytes": allocated,
        "grown": {"taken": float(taken), "host": float(host)},
        "grew": grew and not lab.dry,
    }


def traced_rows(
    lab: Lab, target: CausalModel, draft: CausalModel, names: dict[str, Any]
) -> Iterator[Row]:
    """Waits in a profiler's trace, which also has the calls that do not go through torch.

    The profiler may not survive conditional nodes: this is in a process of its own.
    """
    requests = one_request(lab, 16 if lab.dry else 64)
    for kind, make in sorted(on_graphs(lab).items(), reverse=True):  # the device loop last
        facts: Row = {"name": f"trace of the {kind} loop", **names, "policy": "fixed:3"}
        rows = partial(_traced_row, facts, requests)
        yield from isolated(facts, partial(with_loop, make, target, draft, rows))


def _traced_row(facts: Row, requests: RequestBatch, loop: Any) -> Iterator[Row]:
    policy = parse_policy(facts["policy"]).pack(cost=COST)
    row: Row = {**facts, "traced_syncs": None}
    for _ in loop.run(requests, policy):
        pass
    if torch.cuda.is_available():
        running = iter(loop.run(requests, policy))
        next(running)
        activities = [torch.profiler.ProfilerActivity.CPU, torch.profiler.ProfilerActivity.CUDA]
        profiled = torch.profiler.profile(activities=activities)
        with profiled as profiler, torch.profiler.record_function(_SPAN):
            for _ in running:
                pass
        waits, launched = trace_syncs(within(profiler.events(), _SPAN))
        row |= {"traced_syncs": waits, "host_launches": {"n": launched}}
    yield row
