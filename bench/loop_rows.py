"""Rows of what a loop is made of: what conditional nodes cost, and what a decision costs.

`conditional_rows` run small plans whose works are real ones that do next to nothing, beside the
same launches in one graph without conditions. `decision_rows` chain launches in one graph over
buffers that together exceed the L2 cache; `draft_step_rows` put a forward ahead of each.
"""

from __future__ import annotations

import time
import warnings
from collections.abc import Callable, Iterator
from functools import partial
from typing import Any

import numpy as np
import torch
from torch import Tensor

from bench import roofline
from bench.kernel_rows import shapes
from bench.lab import COST, Calls, Lab, Row, States, isolated, nothing, quantiles
from speckv import kernels
from speckv.decoding import plan
from speckv.decoding.plan import Plan, Set, Switch, While, Work
from speckv.decoding.works import step_operations
from speckv.kernels import layout as at
from speckv.kernels.layout import LoopState, StepState
from speckv.models.llama import LlamaDecoder
from speckv.policies import parse_policy

Works = dict[str, Callable[[], None]]

_ITERATIONS = 10_000
_CHAINED = 1_000
_UNROLLED = 1_000
_TURNS = 4


def conditional_plans() -> dict[str, Plan]:
    """Plans of one iteration's launches, and of what stands beside it in the loop's own."""
    running = (plan.RUNNING, at.RUNNING_ROWS)
    inner, width = (plan.MORE, at.RUNNING_ROWS), (plan.WIDTH, at.MOST_DRAFTED)
    over = (plan.MORE, at.DRAFTING_ROWS)  # no row drafts: 0
    begin, tick = Work(plan.BEGIN), Work("tick")
    # The inner loop runs while rows do, so the outer one runs once; or the other way round.
    long = While(plan.MORE, (tick, Set((inner,))))
    short = While(plan.MORE, (tick, Set((over,))))
    turns: tuple[Plan, ...] = tuple((Work(f"turn-{i}"),) for i in range(_TURNS))
    last = While(plan.RUNNING, (tick, Set((running,))))
    return {
        f"{_UNROLLED:,} unrolled, conditions set": (
            begin,
            *((tick, Set((running,))) * _UNROLLED),
            last,
        ),
        "WHILE": (begin, Set((running,)), last),
        f"WHILE + SWITCH({_TURNS})": (
            begin,
            Set((running,)),
            While(plan.RUNNING, (Set((width,)), Switch(plan.WIDTH, turns), Set((running,)))),
        ),
        "nested WHILE, the inner one once": (
            begin,
            Set((running,)),
            While(plan.RUNNING, (Set((inner,)), short, Set((running,)))),
        ),
        "nested WHILE, the outer one once": (
            begin,
            Set((running,)),
            While(plan.RUNNING, (Set((inner,)), long, Set((running,)))),
        ),
    }


class Ticking:
    """Works that count steps and do next to nothing else, on one row that never ends.

    Attributes
    ----------
    works : mapping of str to callable
        Of `conditional_plans`.
    loop : LoopState
    visits : int32 [_TURNS]
        How often each body of the SWITCH has run. The bodies choose each other in turn.
    """

    def __init__(self, lab: Lab) -> None:
        self._state = StepState.allocate(1, 64, lab.device)
        self.loop = LoopState.allocate(1, 64, lab.device, conditions_on_host=False)
        self.visits = torch.zeros(_TURNS, dtype=torch.int32, device=lab.device)
        self._between = step_operations(lab.device)
        self.turns: Works = {f"turn-{i}": partial(self._turn, i) for i in range(_TURNS)}
        self.works: Works = {plan.BEGIN: self._publish, "tick": self.tick, **self.turns}

    def restart(self, most: int) -> None:
        """Put everything back; ``most`` steps are to come."""
        self._state.reset(0, [1, 2], limit=32, request=0)
        self.loop.control.copy_(torch.tensor([1, 0, most, 0], dtype=torch.int32))
        self.visits.zero_()

    def tick(self) -> None:
        """Count a step."""
        self._between.close_step(self._state, self.loop)
        self._publish()

    def _publish(self) -> None:
        self._between.publish_conditions(self._state, self.loop)

    def _turn(self, i: int) -> None:
        self.visits[i].add_(1)
        self._state.rows[:, at.DRAFTED].fill_((i + 1) % _TURNS)
        self.tick()

    def outcome(self, row: Row) -> Row:
        """What was counted since the restart, and whether it is what the row says."""
        steps, visits = int(self.loop.control[at.STEPS]), self.visits.tolist()
        right = steps == row["iterations"]
        if "SWITCH" in row["name"]:
            right &= visits == [steps // _TURNS] * _TURNS
        return {"counted": steps, "visits": visits, "matches_reference": right}


def conditional_rows(lab: Lab) -> Iterator[Row]:
    """Time of an iteration of each plan, beside that of its launches in one graph, unrolled."""
    iterations = 12 if lab.dry else _ITERATIONS
    ticking = Ticking(lab)
    restart = partial(ticking.restart, iterations)
    for name, calls in (("tick", [ticking.tick] * _TURNS), ("turns", [*ticking.turns.values()])):
        chained = calls * (min(_CHAINED, iterations) // _TURNS)
        row: Row = {"name": f"unrolled {name}", "iterations": len(chained)}
        yield row | lab.time(chained, restart)
    for name, each in conditional_plans().items():
        facts: Row = {"name": name, "iterations": _UNROLLED if "unrolled" in name else iterations}
        yield from isolated(facts, partial(_plan_row, lab, facts, each, ticking))


def _plan_row(lab: Lab, facts: Row, each: Plan, ticking: Ticking) -> Iterator[Row]:
    restart = partial(ticking.restart, facts["iterations"])
    restart()
    row: Row = {**facts, "n": 0, "iteration_us": None}
    if lab.dry:
        run, read = (lambda work: ticking.works[work]()), partial(_read, ticking.loop)
        for _ in plan.follow(each, run, read):
            pass
    else:
        works = {name: ticking.works[name] for name in plan.works(each)}
        seconds = _device_times(each, works, ticking.loop, restart, 3 if lab.quick else 10)
        row |= {"n": len(seconds), "iteration_us": quantiles(seconds)}
    yield row | ticking.outcome(row)


def _read(loop: LoopState, conditions: list[int]) -> list[int]:
    words = loop.conditions.tolist()
    return [words[condition] & 0xFFFFFFFF for condition in conditions]


def _device_times(
    each: Plan,
    works: Works,
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
    """`draft_step` above a bare argmax, chained and by turns, in one run with torch.argmax."""
    for batch, vocabulary in shapes(lab):
        facts = {"name": "decision", "batch": batch, "vocabulary": vocabulary}
        yield from isolated(facts, partial(_decision_shape, lab, batch, vocabulary))


def _decision_shape(lab: Lab, batch: int, vocabulary: int) -> Iterator[Row]:
    generator = torch.Generator(lab.device).manual_seed(0)
    copies = lab.copies(2 * batch * vocabulary)
    logits = torch.randn(
        copies, batch, vocabulary, device=lab.device, dtype=torch.bfloat16, generator=generator
    )
    logits *= 3.0
    count = 2 * copies if lab.dry else max(copies, _CHAINED)
    turns = [logits[i % copies] for i in range(count)]
    shape: Row = {"batch": batch, "vocabulary": vocabulary, "dtype": "bf16", "copies": copies}
    tokens = torch.zeros(batch, dtype=torch.int32, device=lab.device)
    bare = _bare_argmax(lab, batch, vocabulary, tokens)
    bare(logits[0])
    right = torch.equal(tokens, logits[0].argmax(-1).int())
    names: list[Row] = [
        {"name": "chained bare argmax", **shape, "matches_reference": right},
        {"name": "chained torch.argmax", **shape},
    ]
    variants: list[tuple[Calls, Callable[[], None]]] = [
        ([partial(bare, x) for x in turns], nothing),
        ([partial(torch.argmax, x, -1) for x in turns], nothing),
    ]
    for name in ("fixed:15", "speckv"):
        policy = parse_policy(name).pack(cost=COST).to(lab.device)
        states = States([_drafting(lab, batch)], count)
        steps = [
            partial(kernels.DraftStep(x, state, policy), x)
            for x, state in zip(turns, states.each, strict=True)
        ]
        names.append({"name": "chained draft_step", "policy": name, **shape})
        variants.append((steps, states.restore))
    if not right:  # what is above it means nothing
        yield names[0]
        return
    for row, times in zip(names, lab.turns(*variants), strict=True):
        yield row | times


def draft_step_rows(lab: Lab) -> Iterator[Row]:
    """A whole draft step, its forward captured with the decision, and with a bare argmax instead.

    The draft is one layer of Llama-3.2-1B with its head of 128,256 tokens.
    """
    torch.manual_seed(0)
    sizes = roofline.TINY if lab.dry else roofline.MODELS["Llama-3.2-1B"]
    config = roofline.shape({**sizes, "num_hidden_layers": 1})
    model = LlamaDecoder.from_tensors(
        config,
        roofline.RandomTensors(config, lab.device),
        name="one layer",
        compression="bf16",
        dtype=torch.bfloat16,
        device=lab.device,
        invariant=lab.dry,
    )
    cache = model.new_cache(1, 256)
    tokens = torch.ones(1, 1, dtype=torch.int32, device=lab.device)
    positions = torch.full((1, 1), 100, device=lab.device)
    slots = torch.zeros(1, dtype=torch.int64, device=lab.device)
    forward = partial(model.forward, tokens, positions, cache, slots=slots, select=0)
    out = torch.zeros(1, dtype=torch.int32, device=lab.device)
    bare = _bare_argmax(lab, 1, model.vocab_size, out)
    count = 4 if lab.dry else 50
    policy = parse_policy("speckv").pack(cost=COST).to(lab.device)
    states = States([_drafting(lab, 1)], count)
    example = forward()
    prepared = [kernels.DraftStep(example, state, policy) for state in states.each]
    facts: Row = {"batch": 1, "vocabulary": model.vocab_size, "dtype": "bf16", "policy": "speckv"}
    times = lab.turns(
        ([lambda: bare(forward())] * count, nothing),
        ([partial(_chain, forward, step) for step in prepared], states.restore),
        ([forward] * count, nothing),
    )
    names = ("draft step with a bare argmax", "draft step with draft_step", "draft step's forward")
    for name, row in zip(names, times, strict=True):
        yield {"name": name, **facts, **row}


def _chain(forward: Callable[[], Tensor], step: Callable[[Tensor], None]) -> None:
    step(forward())


def _drafting(lab: Lab, batch: int) -> StepState:
    """Rows that draft their first token."""
    state = StepState.allocate(batch, 64, lab.device)
    for row in range(batch):
        state.reset(row, [1, 2, 3], limit=60, request=row)
    state.rows[:, at.STOP] = 0
    return state


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


def _bare_argmax(lab: Lab, batch: int, vocabulary: int, tokens: Tensor) -> Callable[[Tensor], Any]:
    """The bare argmax of logits [B, V] into ``tokens``."""
    if lab.dry:
        return partial(kernels.argmax, tokens=tokens)
    from speckv.kernels.argmax import argmax_out
    from speckv.kernels.draft_step import Scratch, _select_config, _sm_count

    config = _select_config(vocabulary, _sm_count(lab.device))
    scratch = Scratch.allocate(batch, config, lab.device)
    return partial(argmax_out, tokens=tokens, scratch=scratch)
