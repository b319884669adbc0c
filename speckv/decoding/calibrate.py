"""Measured costs of a step, for the rate objective, cached per machine and pair of models.

On a GPU the eager loop's forwards are bound by their launches, those of the loops on graphs are
not: the latter are priced as they run, as replays of CUDA graphs.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Sequence
from pathlib import Path
from statistics import median
from time import perf_counter

import numpy as np
import torch
from torch import Tensor

from ..files import write_atomically
from ..kernels import layout as at
from ..kernels import native
from ..kernels.layout import GAMMA_MAX, WIDTH_MAX, StepState
from ..machine import device_name, package_version
from ..models.base import CausalModel
from ..models.hub import cache_root
from ..models.progress import SlowProgress
from ..policies import CostTable, StepParts, parse_policy
from .current import on_targets_device
from .eager import operations
from .graphed import capture, synchronize
from .lookup import Lookup, Lookups, draft_matches
from .prepared import prepared
from .trained import identify

_VERSION = 7
_GAMMAS = tuple(range(WIDTH_MAX))
_SLOPE_GAMMAS = (0, 1, 2, 4, 8, 15)
_CONTEXTS = (64, 1024)
_REPEATS = 7
_PART_REPEATS = 3
_CATCH_UP_REPEATS = 21  # a small difference of whole steps
_PACKAGES = ("speckv", "torch", "triton", "bitsandbytes")
_REPLAYS = 10  # of a graph, for one time


def calibrated(
    target: CausalModel,
    draft: CausalModel | None,
    *,
    graphs: bool = False,
    anew: bool = False,
) -> CostTable:
    """The cost table of this pair on this machine: from the cache, else measured (seconds).

    Without a draft model it is that of a lookup. With ``anew`` it is measured in any case.
    ``graphs`` says whether the loop that decodes is one on graphs.
    """
    path = cache_root() / "costs" / f"{_key(target, draft, graphs)}.json"
    table = None if anew else _read(path)
    if table is None:
        table = measure(target, draft, graphs=graphs)
        _write(path, table)
    return table


@on_targets_device
@torch.inference_mode()
def measure(target: CausalModel, draft: CausalModel | None, *, graphs: bool = False) -> CostTable:
    """Time whole steps at every γ, in the order of the loop, and fit `CostTable`.

    A part alone would find its own weights in the processor's caches, where in a step the other
    model's were last; so parts are differences of steps with and without them. Without a draft
    model a draft token costs what a lookup takes. With ``graphs`` steps are captured first, and
    their replays are timed.

    Medians, the γ taking turns. Context slopes, linear in γ, come from two lengths; where noise
    makes one negative it is zero. The draft's first forward of a step is priced at the two rows
    that it has after a full acceptance. One that catches up is wider in the eager loop: each row
    more takes its share of what sixteen take more. In the loops on graphs forwards of sixteen rows
    come before it.
    """
    models = [target] if draft is None else [target, draft]
    longest = min(model.max_positions for model in models) - WIDTH_MAX
    contexts = [context for context in _CONTEXTS if context <= longest] or [1]
    steps = _Steps(target, draft, contexts[-1] + WIDTH_MAX)
    turns = _REPEATS + 1
    rows = min(WIDTH_MAX, contexts[0])
    catches_up = draft is not None and rows > 2
    rounds = turns * len(contexts) + _PART_REPEATS + 1 + catches_up * (_CATCH_UP_REPEATS + 1)
    with SlowProgress("Measuring costs", rounds) as progress:

        def medians(calls: Sequence[Callable[[], None]], repeats: int = _REPEATS) -> list[float]:
            timed = [_timed(call, target.device, graphs) for call in calls]
            return _medians_ms(timed, progress.advance, repeats)

        near = medians([steps.of(gamma, contexts[0]) for gamma in _GAMMAS])
        slope = [0.0] * WIDTH_MAX
        if len(contexts) > 1:
            far = medians([steps.of(gamma, contexts[1]) for gamma in _SLOPE_GAMMAS])
            span = contexts[1] - contexts[0]
            slope = _slopes(
                [(ms - near[g]) / span for g, ms in zip(_SLOPE_GAMMAS, far, strict=True)]
            )
        without = [steps.of(g, contexts[0], drafting=False) for g in _GAMMAS]
        bare = [steps.of(g, contexts[0], drafting=False, verifying=False) for g in _GAMMAS]
        parts = medians([*without, *bare], _PART_REPEATS)
        catch_up_ms, block = 0.0, WIDTH_MAX if graphs else 1
        if catches_up:
            usual = steps.of(1, contexts[0])
            if graphs:
                late = steps.of(1, contexts[0], catching_up=rows)
            else:
                late = steps.of(1, contexts[0], first_rows=rows)
            few, many = medians([usual, late], _CATCH_UP_REPEATS)
            catch_up_ms = max(many - few, 0.0) / (1 if graphs else rows - 2)
    lookup_ms = _lookup_ms(target) if draft is None else 0.0
    at_zero = [
        max(ms - slope[gamma] * contexts[0], 1e-3) + lookup_ms * gamma
        for gamma, ms in zip(_GAMMAS, near, strict=True)
    ]
    return CostTable(
        tuple(float(ms) for ms in np.maximum.accumulate(at_zero)),
        tuple(slope),
        catch_up_ms,
        block,
        _parts(near, parts[:WIDTH_MAX], parts[WIDTH_MAX:], lookup_ms),
    )


def _parts(
    whole: list[float], without_drafts: list[float], bare: list[float], lookup_ms: float
) -> StepParts:
    """From steps by γ: whole ones, those without draft forwards, those without any forward."""
    drafts = [(whole[g] - without_drafts[g]) / g for g in _GAMMAS[1:]]
    return StepParts(
        draft_ms=max(median(drafts), 0.0) + lookup_ms,
        verify_ms=tuple(max(a - b, 0.0) for a, b in zip(without_drafts, bare, strict=True)),
        overhead_ms=tuple(bare),
    )


class _Steps:
    """Steps of one greedy row, each a call without arguments, on caches of their own."""

    def __init__(self, target: CausalModel, draft: CausalModel | None, capacity: int) -> None:
        self.target, self.draft, device = target, draft, target.device
        self.caches = {id(m): m.new_cache(1, capacity) for m in (target, draft) if m is not None}
        self.state, self.policy = StepState.allocate(1, 64, device), _deciding_policy(device)
        self.operations = prepared(operations(device))
        self.eos = torch.full((1, 1), -1, dtype=torch.int32, device=device)
        _begin_step(self.state, [0])
        self.rows = self.state.rows.clone()

    def of(
        self,
        gamma: int,
        context: int,
        *,
        first_rows: int = 2,
        catching_up: int = 0,
        drafting: bool = True,
        verifying: bool = True,
    ) -> Callable[[], None]:
        """A step that drafts and verifies ``gamma`` tokens after ``context`` others.

        The draft's first forward has ``first_rows`` rows; with ``catching_up``, one of so many rows
        comes before it. Without ``drafting`` the draft's
        forwards are left out, without ``verifying`` the target's: their logits are kept ones.
        """
        drafts: list[Callable[[], Tensor]] = []
        if self.draft is not None:
            first = (first_rows, context + 1 - first_rows)
            places = [first, *((1, context + i) for i in range(1, gamma))]
            drafts = [self._forward(self.draft, *place) for place in places[:gamma]]
            if not drafting:
                drafts = [_kept(forward) for forward in drafts]
        before: list[Callable[[], Tensor]] = []
        if self.draft is not None and catching_up:
            before = [self._forward(self.draft, catching_up, context - catching_up)]
        verify = self._forward(self.target, gamma + 1, context)
        if not verifying:
            verify = _kept(verify)

        def step() -> None:
            self.state.rows.copy_(self.rows)
            for forward in before:
                forward()
            for forward in drafts:
                logits = forward()[:, -1]
                self.state.rows[0, at.STOP].fill_(0)  # an assignment would copy from the host
                self.operations.draft_step(logits, self.state, self.policy)
            self.operations.verify(verify(), self.state, self.policy, eos=self.eos)

        return step

    def _forward(self, model: CausalModel, width: int, start: int) -> Callable[[], Tensor]:
        """A forward of ``width`` tokens after ``start`` others."""
        device, cache = model.device, self.caches[id(model)]
        tokens = torch.zeros(1, width, dtype=torch.int32, device=device)
        if device.type != "cuda":
            return lambda: model.forward(tokens, [start], cache)
        slots = torch.zeros(1, dtype=torch.int64, device=device)
        positions = torch.arange(start, start + width, device=device)[None]
        return lambda: model.forward(tokens, positions, cache, slots=slots)


def _kept(forward: Callable[[], Tensor]) -> Callable[[], Tensor]:
    """Gives what one call of ``forward`` gave."""
    logits = forward()
    return lambda: logits


def _timed(call: Callable[[], object], device: torch.device, graphs: bool) -> Callable[[], float]:
    """What times one call in milliseconds; with ``graphs``, its replay among others of the same."""
    count, run = 1, call
    if graphs:
        for _ in range(2):  # compiled, and what is allocated once
            call()
        synchronize(device)
        graph, _ = capture(call, None)
        count, run = _REPLAYS, graph.replay

    def time() -> float:
        start = perf_counter()
        for _ in range(count):
            run()
        if device.type == "cuda":
            synchronize(device)
        return (perf_counter() - start) * 1e3 / count

    return time


def _medians_ms(
    timed: Sequence[Callable[[], float]],
    advance: Callable[[], None] = lambda: None,
    repeats: int = _REPEATS,
) -> list[float]:
    """The median of each, taking turns, after one that does not count."""
    times: list[list[float]] = []
    for _ in range(repeats + 1):
        times.append([time() for time in timed])
        advance()
    return [median(each) for each in zip(*times[1:], strict=True)]


def _slopes(measured: list[float]) -> list[float]:
    """Milliseconds a context token at γ 0..15: the line through those of ``_SLOPE_GAMMAS``."""
    rise, base = np.polyfit(_SLOPE_GAMMAS, measured, 1)
    if rise < 0 or base < 0:
        rise, base = 0.0, max(median(measured), 0.0)
    return [float(base + rise * gamma) for gamma in range(WIDTH_MAX)]


def _lookup_ms(target: CausalModel) -> float:
    """Milliseconds of a draft token that is looked up, decision included."""
    device, text = target.device, [*range(8)] * 8
    state, policy = StepState.allocate(1, len(text) + 64, device), _deciding_policy(device)
    lookups = Lookups(Lookup(), [text], GAMMA_MAX, alone=True)

    def run() -> None:
        _begin_step(state, text)
        lookups.extend(0, text[:8])
        draft_matches(lookups.find([0]), state, policy)

    (ms,) = _medians_ms([_timed(run, device, graphs=False)])
    return ms / int(state.rows[0, at.DRAFTED])


def _deciding_policy(device: torch.device) -> torch.Tensor:
    return parse_policy("paper").pack().to(device)


def _begin_step(state: StepState, text: list[int]) -> None:
    """The only row drafts after ``text``, and may for 31 tokens more."""
    state.reset(0, text, limit=len(text) + 31, request=0)
    state.rows[0, at.STOP] = 0


def _key(target: CausalModel, draft: CausalModel | None, graphs: bool) -> str:
    """Costs change with any of these."""
    models = [target] if draft is None else [target, draft]
    facts = [
        _VERSION,
        *(package_version(name) for name in _PACKAGES),
        device_name(target.device),
        torch.get_num_threads(),
        torch.backends.cpu.get_cpu_capability(),
        native.library() is not None,
        graphs,
        *([*identify(m).values(), m.compression, str(m.dtype)] for m in models),
    ]
    return hashlib.sha256(json.dumps(facts).encode()).hexdigest()[:16]


def _read(path: Path) -> CostTable | None:
    """The table in ``path``; None if there is none or it is not whole, so that it is remade."""
    try:
        return CostTable.from_dict(json.loads(path.read_text()))
    except (OSError, ValueError, KeyError, TypeError):
        return None


def _write(path: Path, table: CostTable) -> None:
    text = json.dumps(table.to_dict())
    try:
        write_atomically(path, lambda temporary: temporary.write_text(text))
    except OSError:
        return  # a cache that cannot be written to: measured again next time
