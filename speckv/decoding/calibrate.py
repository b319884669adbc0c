"""Measured costs of a step, for the rate objective, cached per machine and pair of models."""

from __future__ import annotations

import hashlib
import json
import os
import platform
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from statistics import median

import torch

from ..kernels.layout import WIDTH_MAX
from ..models.base import CausalModel
from ..models.hub import cache_root
from ..policies.cost import CostTable

_VERSION = 1
_WIDTHS = (1, 2, 3, 5, 9, 16)
_CONTEXTS = (64, 1024)
_REPEATS = 5


def calibrated(target: CausalModel, draft: CausalModel) -> CostTable:
    """The cost table of this pair on this machine: from the cache, else measured (seconds)."""
    path = cache_root() / "costs" / f"{_key(target, draft)}.json"
    table = _read(path)
    if table is None:
        table = measure(target, draft)
        _write(path, table)
    return table


@torch.inference_mode()
def measure(target: CausalModel, draft: CausalModel) -> CostTable:
    """Time forwards of both models and fit `CostTable`: medians, linear between widths.

    Context slopes come from two lengths; where noise makes one negative it is zero.
    """
    contexts = [c for c in _CONTEXTS if c + WIDTH_MAX <= _longest(target, draft)] or [1]
    verify = [[_forward_ms(target, width, c) for width in _WIDTHS] for c in contexts]
    drafted = [_forward_ms(draft, 1, c) for c in contexts]
    span = contexts[-1] - contexts[0]
    verify_slope = draft_slope = 0.0
    if span:
        slopes = [(far - near) / span for near, far in zip(verify[0], verify[-1], strict=True)]
        verify_slope = max(median(slopes), 0.0)
        draft_slope = max((drafted[-1] - drafted[0]) / span, 0.0)
    return CostTable.from_parts(
        draft_ms=max(drafted[0] - draft_slope * contexts[0], 1e-3),
        verify_ms=[
            max(ms - verify_slope * contexts[0], 1e-3) for ms in _interpolate(_WIDTHS, verify[0])
        ],
        draft_ms_per_context_token=draft_slope,
        verify_ms_per_context_token=verify_slope,
    )


def _forward_ms(model: CausalModel, width: int, context: int) -> float:
    cache = model.new_cache(1, context + WIDTH_MAX)
    tokens = torch.zeros(1, width, dtype=torch.int32, device=model.device)

    def forward() -> None:
        model.forward(tokens, [context], cache)

    return _median_ms(forward, model.device)


def _median_ms(call: Callable[[], None], device: torch.device) -> float:
    times = []
    for repeat in range(_REPEATS + 1):
        start = time.perf_counter()
        call()
        if device.type == "cuda":
            torch.cuda.synchronize(device)
        if repeat:
            times.append((time.perf_counter() - start) * 1e3)
    return median(times)


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


def _longest(*models: CausalModel) -> int:
    return min(model.max_positions for model in models)


def _key(target: CausalModel, draft: CausalModel) -> str:
    """Costs change with any of these."""
    device = target.device
    name = torch.cuda.get_device_name(device) if device.type == "cuda" else platform.processor()
    facts = [
        _VERSION,
        torch.__version__,
        name or platform.machine(),
        torch.get_num_threads(),
        torch.backends.cpu.get_cpu_capability(),
        *([m.name, m.compression, str(m.dtype), m.vocab_size] for m in (target, draft)),
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
    path.parent.mkdir(parents=True, exist_ok=True)
    data = {
        "step_ms": table.step_ms,
        "step_ms_per_context_token": table.step_ms_per_context_token,
    }
    with tempfile.NamedTemporaryFile("w", dir=path.parent, suffix=".tmp", delete=False) as file:
        json.dump(data, file)
    os.replace(file.name, path)
