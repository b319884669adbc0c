"""Rows of the loops: what conditional nodes cost, what a decision costs, what a loop adds.

`conditional_rows` run small plans whose works are real ones that do next to nothing, beside the
same launches in one graph without conditions. `decision_rows` chain launches in one graph over
buffers that together exceed the L2 cache. `loop_rows` decode.
"""

from __future__ import annotations

import time
import warnings
from collections.abc import Callable, Iterator, Sequence
from functools import partial
from typing import Any

import numpy as np
import torch
from torch import Tensor

from bench.lab import COST, Lab, Row, States, nothing, one_request, quantiles
from speckv import kernels
from speckv.decoding import plan
from speckv.decoding.eager import EagerLoop
from speckv.decoding.plan import Plan, Set, Switch, While, Work
from speckv.decoding.planned import PlannedLoop
from speckv.decoding.works import Form, step_operations
from speckv.kernels import layout as at
from speckv.kernels.layout import LoopState, StepState
from speckv.models.base import CausalModel
from speckv.policies import parse_policy

_ITERATIONS = 10_000
_CHAINED = 1_000
_VOCABULARIES = (32_000, 49_152, 128_256, 262_144)
_BATCHES = (1, 4, 8)


def conditional_plans() -> dict[str, Plan]:
    """Plans of one launch an iteration, and of what stands beside it in the loop's own."""
    running = (plan.RUNNING, at.RUNNING_ROWS)
    inner, width = (plan.MORE, at.RUNNING_ROWS), (plan.WIDTH, at.MOST_DRAFTED)
    begin = Work(plan.BEGIN)
    tick = Work("tick")
    four: tuple[Plan, ...] = tuple((Work("tick"),) for _ in range(4))
    # The inner loop runs while rows do; so the outer one runs once.
    again = While(plan.MORE, (tick, Set((inner,))))
    return {
        "WHILE": (begin, Set((running,)), While(plan.RUNNING, (tick, Set((running,))))),
        "WHILE + SWITCH(4)": (
            begin,
            Set((running, width)),
            While(plan.RUNNING, (Switch(plan.WIDTH, four), Set((running, width)))),
        ),
        "nested WHILE": (
            begin,
            Set((running, inner)),
            While(plan.RUNNING, (again, Set((running,)))),
        ),
    }


def conditional_rows(lab: Lab) -> Iterator[Row]:
    """Time of an iteration of each plan, beside that of its launches in one graph, unrolled."""
    iterations = 10 if lab.dry else _ITERATIONS
    state = StepState.allocate(1, 64, lab.device)
    loop = LoopState.allocate(1, 64, lab.device, conditions_on_host=False)
    between = step_operations(lab.device)

    def tick() -> None:
        between.close_step(state, loop)
        between.publish_conditions(state, loop)

    def restart() -> None:
        state.reset(0, [1, 2], limit=32, request=0)
        control = torch.tensor([1, 0, iterations, 0], dtype=torch.int32)
        loop.control.copy_(control)

    works: dict[str, Callable[[], None]] = {
        "tick": tick,
        plan.BEGIN: lambda: between.publish_conditions(state, loop),
    }
    restart()
    unrolled = min(_CHAINED, iterations)
    base = lab.time([tick] * unrolled, restart)
    yield {"name": f"unrolled, {unrolled} iterations", "iterations": unrolled, **base}
    for name, each in conditional_plans().items():
        restart()
        row: Row = {"name": name, "iterations": iterations, "n": 0, "iteration_us": None}
        if lab.dry:
            for _ in plan.follow(each, lambda work: works[work](), partial(_read, loop)):
                pass
        else:
            seconds = _device_times(each, works, loop, restart, 3 if lab.quick else 10)
            row |= {"n": len(seconds), "iteration_us": quantiles(seconds)}
        row["counted"] = int(loop.control[at.STEPS])
        yield row | {"matches_reference": row["counted"] == iterations}


def _read(loop: LoopState, conditions: list[int]) -> list[int]:
    words = loop.conditions.tolist()
    return [words[condition] & 0xFFFFFFFF for condition in conditions]


def _device_times(
    each: Plan,
    works: dict[str, Callable[[], None]],
    loop: LoopState,
    restart: Callable[[], None],
    repeats: int,
) -> list[float]:
    """Microseconds of an iteration, one value a launch of the whole plan."""
    from speckv.decoding.conditional import Driver, PlanGraph
    from speckv.decoding.graphed import capture

    for work in works.values():
        work()
    pool, graphs = None, {}
    for name, work in works.items():
        graphs[name], pool = capture(work, pool)
    addresses = {name: graph.raw_cuda_graph() for name, graph in graphs.items()}
    built = PlanGraph(each, addresses, loop.conditions.data_ptr(), Driver())
    stream = torch.cuda.current_stream()
    found = []
    for repeat in range(repeats + 1):
        restart()
        start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        start.record()
        built.launch(stream.cuda_stream)
        end.record()
        torch.cuda.synchronize()
        if repeat:
            found.append(start.elapsed_time(end) * 1e3 / int(loop.control[at.STEPS]))
    built.close()
    return found


def decision_rows(lab: Lab) -> Iterator[Row]:
    """`draft_step` less a bare argmax, both chained, in one run with torch.argmax."""
    shapes = [(batch, vocabulary) for vocabulary in _VOCABULARIES for batch in _BATCHES]
    if lab.quick:
        shapes = [(1, 128_256)]
    if lab.dry:
        shapes = [(2, 1031)]
    for batch, vocabulary in shapes:
        yield from _decision_shape(lab, batch, vocabulary)


def _decision_shape(lab: Lab, batch: int, vocabulary: int) -> Iterator[Row]:
    generator = torch.Generator(lab.device).manual_seed(0)
    copies = lab.copies(2 * batch * vocabulary)
    logits = torch.randn(
        copies, batch, vocabulary, device=lab.device, dtype=torch.bfloat16, generator=generator
    )
    logits *= 3.0
    count = 2 * copies if lab.dry else max(copies, _CHAINED)
    shape: Row = {"batch": batch, "vocabulary": vocabulary, "dtype": "bf16", "copies": copies}
    calls: Sequence[Callable[[], Any]] = [
        partial(torch.argmax, logits[i % copies], -1) for i in range(count)
    ]
    argmax = {"name": "chained torch.argmax", **shape, **lab.time(calls, nothing)}
    yield argmax
    tokens = torch.zeros(batch, dtype=torch.int32, device=lab.device)
    bare = _bare_argmax(lab, logits, tokens)
    bare(logits[0])
    right = torch.equal(tokens, logits[0].argmax(-1).int())
    timed: Row = lab.time([partial(bare, logits[i % copies]) for i in range(count)], nothing)
    gate = {"name": "chained bare argmax", **shape, "matches_reference": right}
    yield gate | (timed if right else {})
    start = StepState.allocate(batch, 64, lab.device)
    for b in range(batch):
        start.reset(b, [1, 2, 3], limit=60, request=b)
    start.rows[:, at.STOP] = 0
    for name in ("fixed:15", "speckv"):
        policy = parse_policy(name).pack(cost=COST).to(lab.device)
        states = States([start], count)
        steps = [
            partial(kernels.DraftStep(logits[i % copies], state, policy), logits[i % copies])
            for i, state in enumerate(states.each)
        ]
        row: Row = {"name": "chained draft_step", "policy": name, **shape}
        row |= lab.time(steps, states.restore)
        row["above_bare_argmax_us"] = None
        if row["kernel_us"] and right:
            row["above_bare_argmax_us"] = row["kernel_us"]["p50"] - timed["kernel_us"]["p50"]
        yield row


def unfused_rows(lab: Lab) -> Iterator[Row]:
    """Wall time of a decision as the paper makes it: PyTorch operations, then the host.

    Softmax, entropy, confidence and token on the device, each brought to the host, then four
    ``predict`` calls of a scikit-learn MLP of the paper's size.
    """
    vocabulary = 1031 if lab.dry else 128_256
    row: Row = {"name": "unfused decision on the host", "batch": 1, "vocabulary": vocabulary}
    row |= {"dtype": "bf16", "n": 0, "host_us": None}
    try:
        from sklearn.neural_network import MLPRegressor
    except ImportError:
        yield row | {"problem": "scikit-learn is not installed"}
        return
    rng = np.random.default_rng(0)
    regressor = MLPRegressor(hidden_layer_sizes=(16,), max_iter=20, random_state=42)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # whether it has converged is of no effect on its cost
        regressor.fit(rng.random((200, 6)), rng.random(200))
    logits = torch.randn(1, vocabulary, device=lab.device, dtype=torch.bfloat16)
    found = []
    for i in range(3 if lab.dry else 220):
        began = time.perf_counter_ns()
        p = torch.softmax(logits.float(), -1)
        entropy = float(-(p * (p + 1e-12).log2()).sum(-1).item())
        confidence, token = p.max(-1)
        signals = [entropy, float(confidence.item()), entropy, float(confidence.item()), 0.0]
        token.item()
        for gamma in (2, 4, 6, 8):
            regressor.predict(np.array([[*signals, gamma]]))
        if i >= 20:
            found.append((time.perf_counter_ns() - began) / 1e3)
    yield row | ({} if lab.dry else {"n": len(found), "host_us": quantiles(found)})


def _bare_argmax(lab: Lab, logits: Tensor, tokens: Tensor) -> Callable[[Tensor], Any]:
    """The bare argmax of one of ``logits`` [copies, B, V] into ``tokens``."""
    if lab.dry:
        return partial(kernels.argmax, tokens=tokens)
    from speckv.kernels.argmax import argmax_out
    from speckv.kernels.draft_step import Scratch, _select_config, _sm_count

    config = _select_config(logits.shape[-1], _sm_count(lab.device))
    scratch = Scratch.allocate(logits.shape[1], config, lab.device)
    return partial(argmax_out, tokens=tokens, scratch=scratch)


def loop_kinds(lab: Lab) -> dict[str, Any]:
    """The loops there are here, the eager one first."""
    if lab.dry:
        return {"eager": EagerLoop, "planned": PlannedLoop}
    from speckv.decoding.device import DeviceLoop
    from speckv.decoding.graphed import GraphedLoop

    return {"eager": EagerLoop, "graphed": GraphedLoop, "device": DeviceLoop}


def share_rows(
    lab: Lab, target: CausalModel, draft: CausalModel, names: dict[str, Any]
) -> Iterator[Row]:
    """Time of a generation of each loop beside the sum of the forwards in it.

    Forwards are timed alone, each captured in a graph. Tokens other than those of plain decoding
    in the eager loop are a failure.
    """
    requests = one_request(lab, 24 if lab.dry else 256)
    plain: list[int] | None = None
    for policy_name in ("fixed:0", "fixed:4"):
        policy = parse_policy(policy_name).pack(cost=COST)
        forwards = _forward_times(lab, target, draft, Form.of(requests, policy))
        for kind, make in loop_kinds(lab).items():
            loop = make(target, draft, batch=1, capacity=512)
            found: list[float] = []
            steps: list[tuple[int, list[int]]] = []
            for repeat in range(2 if lab.dry else 5):
                began = time.perf_counter()
                running = iter(loop.run(requests, policy))
                next(running)
                first = time.perf_counter()
                steps = [(r.gamma, r.tokens) for records in running for r in records]
                if repeat:
                    found.append(time.perf_counter() - first)
                prefill = first - began
            produced = [t for _, tokens in steps for t in tokens]
            plain = plain or produced
            same = produced == plain
            row: Row = {
                "name": f"{kind} {policy_name}",
                **names,
                "batch": 1,
                "dtype": str(target.dtype).removeprefix("torch."),
                "n": len(found),
                "steps": len(steps),
                "identical_to_plain": same,
                "decode_seconds": None,
                "prefill_seconds": None,
                "launch_us": None,
                "forwards_seconds": None,
                "above_forwards": None,
            }
            if same and not lab.dry:
                spent = quantiles(found)
                total = sum(forwards[g] for g, _ in steps) * 1e-6
                row |= {
                    "decode_seconds": spent,
                    "prefill_seconds": prefill,
                    "launch_us": 1e6 * loop.launch_seconds if kind == "device" else None,
                    "forwards_seconds": total,
                    "above_forwards": spent["p50"] / total - 1.0,
                }
            yield row
            del loop


def _forward_times(
    lab: Lab, target: CausalModel, draft: CausalModel, form: Form
) -> dict[int, float]:
    """Microseconds of the forwards of a step, by γ; zero in a dry run."""
    slots = torch.zeros(1, dtype=torch.int64, device=lab.device)
    caches = {id(m): m.new_cache(1, 512) for m in (target, draft)}

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

    first, again = micros(draft, 2, 1), micros(draft, 1, 0)
    found = {}
    for gamma in range(form.gamma_cap + 1):
        drafts = first + (gamma - 1) * again if gamma else 0.0
        found[gamma] = drafts + micros(target, gamma + 1, None)
    return found
