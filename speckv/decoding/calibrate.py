"""Measured costs of a step, for the rate objective, cached per machine and pair of models.

On a GPU the eager loop's forwards are bound by their launches, those of the loops on graphs are
not: the latter are priced as they run, as replays of CUDA graphs.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable
from pathlib import Path
from statistics import median
from time import perf_counter

import numpy as np
import torch
from torch import Tensor

from ..files import write_atomically
from ..kernels import layout as at
from ..kernels.layout import GAMMA_MAX, WIDTH_MAX, StepState
from ..machine import device_name
from ..models.base import CausalModel
from ..models.hub import cache_root
from ..models.progress import SlowProgress
from ..policies import CostTable, parse_policy
from .eager import operations
from .graphed import capture, synchronize
from .lookup import Lookup, Lookups, draft_matches
from .prepared import prepared

_VERSION = 4
_GAMMAS = (0, 1, 2, 4, 8, 15)
_CONTEXTS = (64, 1024)
_REPEATS = 7
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


@torch.inference_mode()
def measure(target: CausalModel, draft: CausalModel | None, *, graphs: bool = False) -> CostTable:
    """Time whole steps at some γ, in the order of the loop, and fit `CostTable`.

    A part alone would find its own weights in the processor's caches, where in a step the other
    model's were last. Without a draft model a draft token costs what a lookup takes. With
    ``graphs`` steps are captured first, and their replays are timed.

    Medians, the γ taking turns, linear between them. Context slopes, linear in γ, come from two
    lengths; where noise makes one negative it is zero. The draft's first forward of a step is
    priced at the two rows that it has after a full acceptance.
    """
    models = [target] if draft is None else [target, draft]
    longest = min(model.max_positions for model in models) - WIDTH_MAX
    contexts = [context for context in _CONTEXTS if context <= longest] or [1]
    steps = _Steps(target, draft, contexts[-1] + WIDTH_MAX)
    with SlowProgress("Measuring costs", len(contexts) * (_REPEATS + 1)) as progress:
        near, *others = [
            _medians_ms(
                [_timed(steps.of(gamma, context), target.device, graphs) for gamma in _GAMMAS],
                progress.advance,
            )
            for context in contexts
        ]
    far, span = others[-1] if others else near, max(contexts[-1] - contexts[0], 1)
    slope = _slopes([(f - n) / span for n, f in zip(near, far, strict=True)])
    lookup_ms = _lookup_ms(target) if draft is None else 0.0
    at_zero = _interpolate(
        _GAMMAS,
        [
            max(ms - slope[gamma] * contexts[0], 1e-3) + lookup_ms * gamma
            for gamma, ms in zip(_GAMMAS, near, strict=True)
        ],
    )
    return CostTable(tuple(at_zero), tuple(slope))


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

    def of(self, gamma: int, context: int) -> Callable[[], None]:
        """A step that drafts and verifies ``gamma`` tokens after ``context`` others."""
        drafts: list[Callable[[], Tensor]] = []
        if self.draft is not None:
            places = [(2, context - 1), *((1, context + i) for i in range(1, gamma))]
            drafts = [self._forward(self.draft, *place) for place in places[:gamma]]
        verify = self._forward(self.target, gamma + 1, context)

        def step() -> None:
            self.state.rows.copy_(self.rows)
            for forward in drafts:
                logits = forward()[:, -1]
                self.state.rows[0, at.STOP] = 0
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
    timed: list[Callable[[], float]], advance: Callable[[], None] = lambda: None
) -> list[float]:
    """The median of each, taking turns, after one that does not count."""
    times: list[list[float]] = []
    for _ in range(_REPEATS + 1):
        times.append([time() for time in timed])
        advance()
    return [median(each) for each in zip(*times[1:], strict=True)]


def _slopes(measured: list[float]) -> list[float]:
    """Milliseconds a context token at γ 0..15: the line through those of ``_GAMMAS``."""
    rise, base = np.polyfit(_GAMMAS, measured, 1)
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


def _interpolate(gammas: tuple[int, ...], values: list[float]) -> list[float]:
    """Values at γ 0..15, linear between the measured ones and never falling."""
    between = np.interp(range(WIDTH_MAX), gammas, values)
    return [float(ms) for ms in np.maximum.accumulate(between)]


def _key(target: CausalModel, draft: CausalModel | None, graphs: bool) -> str:
    """Costs change with any of these."""
    models = [target] if draft is None else [target, draft]
    facts = [
        _VERSION,
        torch.__version__,
        device_name(target.device),
        torch.get_num_threads(),
        torch.backends.cpu.get_cpu_capability(),
        graphs,
        *([m.name, m.compression, str(m.dtype), m.vocab_size] for m in models),
    ]
    return hashlib.sha256(json.dumps(facts).encode()).hexdigest()[:16]


def _read(path: Path) -> CostTable | None:
    """The table in ``path``; None if there is none or it is not whole, so that it is remade."""
    try:
        data = json.loads(path.read_text())
        return CostTable(tuple(data["step_ms"]), tuple(data["step_ms_per_context_token"]))
    except (OSError, ValueError, KeyError, TypeError):
        return None


def _write(path: Path, table: CostTable) -> None:
    text = json.dumps(vars(table))
    try:
        write_atomically(path, lambda temporary: temporary.write_text(text))
    except OSError:
        return  # a cache that cannot be written to: measured again next time
