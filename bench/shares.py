"""Rows of whole generations: what a loop adds to its forwards, and what it takes of the host."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from typing import Any
from unittest.mock import patch

import torch

from bench.lab import COST, Lab, Row, isolated, nothing, one_request, quantiles
from speckv.decoding.choice import Loop
from speckv.decoding.eager import EagerLoop
from speckv.decoding.planned import PlannedLoop
from speckv.decoding.works import Form
from speckv.models.base import CausalModel
from speckv.policies import parse_policy

_CAPACITY = 512


def loop_kinds(lab: Lab) -> dict[str, Any]:
    """The loops there are here, the eager one first."""
    if lab.dry:
        return {"eager": EagerLoop, "planned": PlannedLoop}
    from speckv.decoding.device import DeviceLoop
    from speckv.decoding.graphed import GraphedLoop

    return {"eager": EagerLoop, "device": DeviceLoop, "graphed": GraphedLoop}


def on_graphs(lab: Lab) -> dict[str, Any]:
    """`loop_kinds` without the eager loop."""
    return {kind: make for kind, make in loop_kinds(lab).items() if kind != "eager"}


def with_loop(
    make: Any,
    target: CausalModel,
    draft: CausalModel,
    rows: Callable[[Any], Iterator[Row]],
    *,
    batch: int = 1,
) -> Iterator[Row]:
    """Rows of a loop of so many sequences, which is closed behind them."""
    loop = make(target, draft, batch=batch, capacity=_CAPACITY)
    try:
        yield from rows(loop)
    finally:
        loop.close()


def share_rows(
    lab: Lab, target: CausalModel, draft: CausalModel, names: dict[str, Any]
) -> Iterator[Row]:
    """Time of a generation of each loop beside the sum of the forwards in it.

    Forwards are timed alone, each captured in a graph. Tokens other than those of plain decoding
    in the eager loop are a failure. Of the loop with the fewest launches, at a fixed γ, the other
    ways of drafting too.
    """
    plain: list[int] = []
    for policy in ("fixed:0", "fixed:4"):
        kinds = loop_kinds(lab)
        if policy != "fixed:0":
            kind = "planned" if lab.dry else "device"
            for drafts in ("chain", "switch"):
                kinds[f"{kind} ({drafts})"] = partial(kinds[kind], drafts=drafts)
        for kind, make in kinds.items():
            facts: Row = {"name": f"{kind} {policy}", **names, "batch": 1}
            facts["dtype"] = str(target.dtype).removeprefix("torch.")
            rows = partial(_share_row, lab, policy, facts, plain)
            yield from isolated(facts, partial(with_loop, make, target, draft, rows))


def _share_row(lab: Lab, name: str, facts: Row, plain: list[int], loop: Any) -> Iterator[Row]:
    """``plain``: what plain decoding said; filled by the first."""
    requests = one_request(lab, 24 if lab.dry else 256)
    policy = parse_policy(name).pack(cost=COST)
    found: list[float] = []
    steps: list[tuple[int, list[int]]] = []
    for repeat in range(2 if lab.dry else 3 if lab.quick else 6):
        began = time.perf_counter()
        running = iter(loop.run(requests, policy))
        next(running)
        first = time.perf_counter()
        with _timed_prefill(loop) as fed:
            steps = [(r.gamma, r.tokens) for records in running for r in records]
        if repeat:
            found.append(time.perf_counter() - first - sum(fed))
        prefill = first - began
    produced = [t for _, tokens in steps for t in tokens]
    plain += [] if plain else produced
    same = produced == plain
    row: Row = {**facts, "n": len(found), "steps": len(steps), "identical_to_plain": same}
    row |= {"decode_seconds": None, "prefill_seconds": None, "above_forwards": None}
    if same:
        forwards = _forward_times(lab, loop.target, loop.draft, Form.of(requests, policy))
        if not lab.dry:
            spent = quantiles(found)
            total = sum(forwards[g] for g, _ in steps) * 1e-6
            row |= {"decode_seconds": spent, "prefill_seconds": prefill}
            row |= {"forwards_seconds": total, "above_forwards": spent["p50"] / total - 1.0}
    yield row


@contextmanager
def _timed_prefill(loop: Any) -> Iterator[list[float]]:
    """Seconds in which the draft is fed the prompt, after the first token: no step's."""
    seconds: list[float] = []
    name = "_prefill_draft" if hasattr(loop, "_prefill_draft") else "_feed_prompts"
    feed = getattr(loop, name)

    def timed(*arguments: Any) -> None:
        start = time.perf_counter()
        feed(*arguments)
        if loop.target.device.type == "cuda":
            torch.cuda.synchronize()
        seconds.append(time.perf_counter() - start)

    with patch.object(loop, name, timed):
        yield seconds


def _forward_times(
    lab: Lab, target: CausalModel, draft: CausalModel, form: Form
) -> dict[int, float]:
    """Microseconds of the forwards of a step, by γ; zero in a dry run."""
    slots = torch.zeros(1, dtype=torch.int64, device=lab.device)
    caches = {id(m): m.new_cache(1, _CAPACITY) for m in (target, draft)}

    def micros(model: CausalModel, width: int, select: int | None) -> float:
        tokens = torch.ones(1, width, dtype=torch.int32, device=lab.device)
        positions = torch.arange(100, 100 + width, device=lab.device)[None]
        call = partial(
            model.forward, tokens, positions, caches[id(model)], slots=slots, select=select
        )
        if not lab.dry:
            model.prefill(tokens.new_ones(100), caches[id(model)], 0, want_logits=False)
        row = lab.time([call] * 4, nothing)
        return 0.0 if lab.dry else float(row["kernel_us"]["p50"])

    first = again = 0.0
    if form.gamma_cap:
        first, again = micros(draft, 2, 1), micros(draft, 1, 0)
    found = {}
    for gamma in range(form.gamma_cap + 1):
        drafts = first + (gamma - 1) * again if gamma else 0.0
        found[gamma] = drafts + micros(target, gamma + 1, None)
    return found


def host_rows(
    lab: Lab, target: CausalModel, draft: CausalModel, names: dict[str, Any]
) -> Iterator[Row]:
    """What a generation takes of the host: its time less that in which it waits for a word.

    Of the device loop, the time of its one launch too.
    """
    for policy in ("fixed:4", "speckv"):
        for kind, make in on_graphs(lab).items():
            facts: Row = {"name": f"host of the {kind} loop", **names, "policy": policy, "batch": 1}
            rows = partial(_host_row, lab, policy, facts)
            yield from isolated(facts, partial(with_loop, make, target, draft, rows))


def _host_row(lab: Lab, name: str, facts: Row, loop: Any) -> Iterator[Row]:
    requests = one_request(lab, 16 if lab.dry else 64)
    policy = parse_policy(name).pack(cost=COST)
    count = 2 if lab.dry else 10 if lab.quick else 50
    busy, launches, tokens = [], [], 0
    for repeat in range(count + 1):
        took, tokens = _host_us(loop, partial(loop.run, requests, policy))
        if repeat:
            busy.append(took)
            launches.append(1e6 * getattr(loop, "launch_seconds", 0.0))
    row: Row = {**facts, "tokens": tokens, "n": count, "host_us": None, "launch_us": None}
    if not lab.dry:
        row["host_us"] = quantiles(busy)
        row["launch_us"] = quantiles(launches) if launches[0] else None
    yield row


def _host_us(loop: Loop, run: Callable[[], Any]) -> tuple[float, int]:
    """Microseconds of a generation without its waits, prefill included, and its tokens."""
    waits = 0.0
    whole = loop._wait  # type: ignore[attr-defined]

    def timed(ready: Callable[[], bool]) -> None:
        nonlocal waits
        start = time.perf_counter()
        whole(ready)
        waits += time.perf_counter() - start

    with patch.object(loop, "_wait", timed):
        start = time.perf_counter()
        tokens = sum(len(r.tokens) for records in run() for r in records)
        total = time.perf_counter() - start
    return 1e6 * (total - waits), tokens
