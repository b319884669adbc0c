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

import torch

from ..files import write_atomically
from ..kernels import layout as at
from ..kernels.layout import GAMMA_MAX, WIDTH_MAX, StepState
from ..machine import device_name
from ..models.base import CausalModel
from ..models.cache import KVCache
from ..models.hub import cache_root
from ..models.progress import SlowProgress
from ..policies import CostTable, parse_policy
from .eager import operations
from .graphed import capture, synchronize
from .lookup import Lookup, Lookups, draft_matches
from .prepared import prepared

_VERSION = 3
_WIDTHS = (1, 2, 3, 5, 9, 16)
_DRAFT_WIDTHS = (1, 2)
_CONTEXTS = (64, 1024)
_REPEATS = 5
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
    """Time forwards of both models, `draft_step` and `verify`, and fit `CostTable`.

    Without a draft model a draft token costs what a lookup takes. With ``graphs`` all is captured
    first, and its replays are timed.

    Medians, linear between widths. Context slopes come from two lengths; where noise makes one
    negative it is zero. The draft's first forward of a step is priced at the two rows that it has
    after a full acceptance.
    """
    models = [target] if draft is None else [target, draft]
    longest = min(model.max_positions for model in models) - WIDTH_MAX
    contexts = [context for context in _CONTEXTS if context <= longest] or [1]
    count = len(contexts) * (len(_WIDTHS) + (0 if draft is None else len(_DRAFT_WIDTHS)))
    with SlowProgress("Measuring costs", count) as progress:

        def forward_ms(model: CausalModel, cache: KVCache, width: int, context: int) -> float:
            progress.advance()
            return _forward_ms(model, cache, width, context, graphs)

        def forwards_ms(model: CausalModel, widths: tuple[int, ...]) -> list[list[float]]:
            cache = model.new_cache(1, contexts[-1] + WIDTH_MAX)
            return [[forward_ms(model, cache, w, c) for w in widths] for c in contexts]

        verify = forwards_ms(target, _WIDTHS)
        drafted = [[0.0] * len(_DRAFT_WIDTHS) for _ in contexts]
        if draft is not None:
            drafted = forwards_ms(draft, _DRAFT_WIDTHS)
    choice_ms = _lookup_ms(target) if draft is None else _choice_ms(draft, target.device, graphs)
    commit_ms = _commit_ms(target, graphs)
    span = max(contexts[-1] - contexts[0], 1)
    slopes = [(far - near) / span for near, far in zip(verify[0], verify[-1], strict=True)]
    verify_slope = max(median(slopes), 0.0)
    draft_slope = max((drafted[-1][0] - drafted[0][0]) / span, 0.0)
    widths = _interpolate(_WIDTHS, verify[0])
    return CostTable.from_parts(
        draft_ms=max(drafted[0][0] - draft_slope * contexts[0], 0.0) + choice_ms,
        verify_ms=[max(ms - verify_slope * contexts[0], 1e-3) + commit_ms for ms in widths],
        catch_up_ms=max(drafted[0][1] - drafted[0][0], 0.0),
        draft_ms_per_context_token=draft_slope,
        verify_ms_per_context_token=verify_slope,
    )


def _forward_ms(
    model: CausalModel, cache: KVCache, width: int, context: int, graphs: bool
) -> float:
    """Milliseconds of a forward of ``width`` tokens after ``context`` others."""
    device = model.device
    tokens = torch.zeros(1, width, dtype=torch.int32, device=device)
    if not graphs:
        return _median_ms(lambda: model.forward(tokens, [context], cache), device)
    slots = torch.zeros(1, dtype=torch.int64, device=device)
    positions = torch.arange(context, context + width, device=device)[None]
    return _replay_ms(lambda: model.forward(tokens, positions, cache, slots=slots), device)


def _choice_ms(draft: CausalModel, device: torch.device, graphs: bool) -> float:
    """Milliseconds of `draft_step` on one greedy row."""
    operations_of = prepared(operations(device))
    state, policy = StepState.allocate(1, 64, device), _deciding_policy(device)
    logits = torch.randn(1, draft.vocab_size, device=device).to(draft.dtype)

    return _step_ms(lambda: operations_of.draft_step(logits, state, policy), state, graphs)


def _lookup_ms(target: CausalModel) -> float:
    """Milliseconds of a draft token that is looked up, decision included."""
    device, text = target.device, [*range(8)] * 8
    state, policy = StepState.allocate(1, len(text) + 64, device), _deciding_policy(device)
    lookups = Lookups(Lookup(), [text], GAMMA_MAX, alone=True)

    def run() -> None:
        _begin_step(state, text)
        lookups.extend(0, text[:8])
        draft_matches(lookups.find([0]), state, policy)

    return _median_ms(run, device) / int(state.rows[0, at.DRAFTED])


def _commit_ms(target: CausalModel, graphs: bool) -> float:
    """Milliseconds of `verify` on one greedy row."""
    device = target.device
    operations_of = prepared(operations(device))
    state, policy = StepState.allocate(1, 64, device), _deciding_policy(device)
    eos = torch.full((1, 1), -1, dtype=torch.int32, device=device)
    logits = torch.randn(1, 1, target.vocab_size, device=device).to(target.dtype)

    return _step_ms(lambda: operations_of.verify(logits, state, policy, eos=eos), state, graphs)


def _step_ms(operation: Callable[[], object], state: StepState, graphs: bool) -> float:
    """Milliseconds of an operation on the only row of a state, at the start of a step."""
    device = state.rows.device
    if not graphs:

        def begin_and_run() -> None:
            _begin_step(state, [0])
            operation()

        return _median_ms(begin_and_run, device)
    _begin_step(state, [0])
    rows = state.rows.clone()

    def restore_and_run() -> None:
        state.rows.copy_(rows)
        operation()

    return _replay_ms(restore_and_run, device)


def _deciding_policy(device: torch.device) -> torch.Tensor:
    return parse_policy("paper").pack().to(device)


def _begin_step(state: StepState, text: list[int]) -> None:
    """The only row drafts after ``text``, and may for 31 tokens more."""
    state.reset(0, text, limit=len(text) + 31, request=0)
    state.rows[0, at.STOP] = 0


def _median_ms(call: Callable[[], object], device: torch.device) -> float:
    times = []
    for repeat in range(_REPEATS + 1):
        start = perf_counter()
        call()
        if device.type == "cuda":
            synchronize(device)
        if repeat:
            times.append((perf_counter() - start) * 1e3)
    return median(times)


def _replay_ms(call: Callable[[], object], device: torch.device) -> float:
    """Of a replay of the call as a CUDA graph, among others of the same."""
    for _ in range(2):  # compiled, and what is allocated once
        call()
    synchronize(device)
    graph, _ = capture(call, None)

    def replay() -> None:
        for _ in range(_REPLAYS):
            graph.replay()

    return _median_ms(replay, device) / _REPLAYS


def _interpolate(widths: tuple[int, ...], values: list[float]) -> list[float]:
    """Values at widths 1..16, linear between the measured ones and never falling."""
    result: list[float] = []
    for width in range(1, WIDTH_MAX + 1):
        right = next(i for i, w in enumerate(widths) if w >= width)
        left = max(right - 1, 0)
        span = widths[right] - widths[left]
        share = (width - widths[left]) / span if span else 0.0
        value = values[left] + (values[right] - values[left]) * share
        result.append(max(value, result[-1] if result else 0.0))
    return result


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
