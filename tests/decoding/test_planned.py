"""The loop that follows a plan gives the eager loop's steps and tokens; plans by hand."""

from __future__ import annotations

import importlib
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor

from speckv.decoding import EagerLoop, RequestBatch, plan, works
from speckv.decoding.choice import Loop
from speckv.decoding.eager import StepRecord
from speckv.decoding.planned import PlannedLoop
from speckv.decoding.signals import KeepingEagerLoop
from speckv.errors import NumericsError
from speckv.kernels import layout as at
from speckv.policies import parse_policy
from tests.decoding import grid
from tests.decoding.loops import COST
from tests.decoding.tiny import wrapped

CPU = torch.device("cpu")
CAPACITY = max(len(p) + n for p, n in zip(grid.PROMPTS, grid.NEW_TOKENS, strict=True))


REJECTION = "rejection "
"""Ahead of a sampling: by rejection instead of by coupling."""


def batch_of(
    sampling: str, rows: list[int], eos: list[int], most: int = 99, keep_signals: bool = False
) -> RequestBatch:
    coupling = "rejection" if sampling.startswith(REJECTION) else "gumbel"
    params = [
        replace(p, max_new_tokens=min(p.max_new_tokens, most), coupling=coupling)
        for p in grid.params(sampling.removeprefix(REJECTION))
    ]
    return RequestBatch.build(
        [grid.PROMPTS[i] for i in rows],
        [params[i] for i in rows],
        eos_ids=eos,
        max_length=CAPACITY,
        device=CPU,
        keep_signals=keep_signals,
    )


def packed(policy: str) -> Tensor:
    return parse_policy(policy).pack(cost=COST)


def by_row(records: Iterator[list[StepRecord]]) -> dict[int, list[StepRecord]]:
    """Records in order, row by row: loops may tell several rows' steps apart differently."""
    found: dict[int, list[StepRecord]] = {}
    for step in records:
        for record in step:
            found.setdefault(record.row, []).append(record)
    return found


def ended_early(
    loop: Loop, requests: RequestBatch, policy: Tensor, *, row: int, records: int
) -> Iterator[list[StepRecord]]:
    """A run in which the host ends row ``row`` once it has given so many records."""
    for step in loop.run(requests, policy):
        for record in step:
            yield [record]
            records -= record.row == row
            if record.row == row and records == 0:
                loop.finish(row)


POLICIES = ["fixed:0", *grid.POLICIES]
REJECTIONS = [REJECTION + sampling for sampling in ("sampled", "truncated", "mixed")]


@pytest.mark.parametrize(
    ("policy", "sampling", "draft"),
    [
        *((p, s, "perturbed") for p in POLICIES for s in sorted(grid.SAMPLINGS)),
        *((p, "mixed", "random") for p in grid.ONE_OF_EACH_MODE),
        *((p, s, "perturbed") for p in ("fixed:0", *grid.ONE_OF_EACH_MODE) for s in REJECTIONS),
        ("fixed:15", REJECTION + "mixed", "random"),
    ],
)
@pytest.mark.parametrize("rows", [[1], [0, 1, 2, 3]], ids=["B1", "B4"])
def test_steps_of_the_eager_loop(policy: str, sampling: str, rows: list[int], draft: str) -> None:
    target, model = wrapped("llama", "target", "fp32"), wrapped("llama", draft, "fp32")
    size = {"batch": len(rows), "capacity": CAPACITY}
    planned = PlannedLoop(target, model, **size)
    for eos in ([], grid.EOS):
        requests = batch_of(sampling, rows, eos)
        eager = EagerLoop(target, model, **size)
        expected = by_row(eager.run(requests, packed(policy)))
        assert by_row(planned.run(requests, packed(policy))) == expected


@pytest.mark.parametrize("compression", ["bf16", "int8", "nf4"])
@pytest.mark.parametrize("sampling", ["greedy", "mixed", REJECTION + "mixed"])
def test_compressed_targets(compression: str, sampling: str) -> None:
    target = wrapped("llama", "target", compression)
    draft = wrapped("llama", "perturbed", compression)
    requests = batch_of(sampling, [0, 1, 2, 3], grid.EOS)
    loops = [kind(target, draft, batch=4, capacity=CAPACITY) for kind in (EagerLoop, PlannedLoop)]
    eager, planned = (by_row(loop.run(requests, packed("confidence:0.6"))) for loop in loops)
    assert planned == eager


def test_one_loop_for_many_requests() -> None:
    """Forms, batches and policies in turn; what a former request left is of no effect."""
    target, draft = wrapped("llama", "target", "fp32"), wrapped("llama", "perturbed", "fp32")
    planned = PlannedLoop(target, draft, batch=4, capacity=CAPACITY)
    eager = EagerLoop(target, draft, batch=4, capacity=CAPACITY)
    turns = [("greedy", [0, 1, 2, 3], "fixed:4"), ("sampled", [2], "entropy:1.5")]
    turns += [("truncated", [3, 1], "fixed:4"), ("greedy", [3, 0, 1, 2], "fixed:0")]
    turns += [("truncated", [0, 2], "fixed:4")]  # the form of those before, other parameters
    turns += [(REJECTION + "sampled", [1, 3], p) for p in ("fixed:3", "fixed:0", "fixed:5")]
    for sampling, rows, policy in turns + turns[:3] + turns[-2:]:
        requests = batch_of(sampling, rows, grid.EOS)
        expected = by_row(eager.run(requests, packed(policy)))
        assert by_row(planned.run(requests, packed(policy))) == expected


@pytest.mark.parametrize("reach", [8, 24, 40])
def test_a_draft_of_a_short_context(reach: int) -> None:
    """Rows that the draft cannot reach go on without it."""
    target, draft = wrapped("llama", "target", "fp32"), wrapped("llama", "perturbed", "fp32")
    requests = batch_of("sampled", [0, 1, 2, 3], [])
    steps = []
    for kind in (EagerLoop, PlannedLoop):
        loop = kind(target, _Short(draft, reach), batch=4, capacity=CAPACITY)
        steps.append(by_row(loop.run(requests, packed("fixed:3"))))
    assert steps[0] == steps[1]
    gammas = {record.gamma for rows in steps[1].values() for record in rows}
    assert gammas >= ({0} if reach == 8 else {0, 3})


class _Short:
    """A model of a shorter context."""

    def __init__(self, model: Any, reach: int) -> None:
        self._model, self.max_positions = model, reach

    def __getattr__(self, name: str) -> Any:
        return getattr(self._model, name)


def test_a_row_that_the_host_ends() -> None:
    target, draft = wrapped("llama", "target", "fp32"), wrapped("llama", "perturbed", "fp32")
    requests = batch_of("greedy", [0, 1, 2, 3], [])
    loop = PlannedLoop(target, draft, batch=4, capacity=CAPACITY)
    whole = by_row(loop.run(requests, packed("fixed:2")))
    cut = by_row(ended_early(loop, requests, packed("fixed:2"), row=2, records=3))
    ended = loop._state.rows[2]
    assert ended[at.DONE] == at.DONE_STOP and ended[at.LENGTH] < ended[at.LIMIT] - 8
    assert len(whole[2]) > 4 and cut[2] == whole[2][:3]
    assert {row: cut[row] for row in (0, 1, 3)} == {row: whole[row] for row in (0, 1, 3)}


@pytest.mark.parametrize("sampling", ["truncated", REJECTION + "mixed"])
def test_a_draft_of_its_own_ids(sampling: str) -> None:
    target, draft = wrapped("llama", "target", "fp32"), wrapped("llama", "perturbed", "fp32")
    id_map = torch.arange(draft.vocab_size, dtype=torch.int32)
    id_map[1::3] = id_map[1::3].flip(0)
    requests, size = batch_of(sampling, [0, 1, 2, 3], grid.EOS), {"batch": 4, "capacity": CAPACITY}
    for policy in ("fixed:0", "fixed:3"):
        eager, planned = (
            by_row(kind(target, draft, **size, id_map=id_map).run(requests, packed(policy)))
            for kind in (EagerLoop, PlannedLoop)
        )
        assert planned == eager
    accepted = [record.accepted for rows in eager.values() for record in rows]
    assert 0 < sum(accepted) < len(accepted) * 3


@pytest.mark.parametrize("drafts", ["chain", "switch"])
@pytest.mark.parametrize("rows", [[1], [0, 1, 2, 3]], ids=["B1", "B4"])
def test_other_ways_of_drafting(drafts: str, rows: list[int]) -> None:
    target, draft = wrapped("llama", "target", "fp32"), wrapped("llama", "perturbed", "fp32")
    size = {"batch": len(rows), "capacity": CAPACITY}
    loop = PlannedLoop(target, draft, **size, drafts=drafts)
    policies = [p for p in POLICIES if p.startswith("fixed") or drafts == "chain"]
    for policy in policies:
        for sampling in ("greedy", "truncated", REJECTION + "mixed"):
            requests = batch_of(sampling, rows, grid.EOS)
            expected = by_row(EagerLoop(target, draft, **size).run(requests, packed(policy)))
            assert by_row(loop.run(requests, packed(policy))) == expected, (policy, sampling)
    if drafts == "switch":
        with pytest.raises(ValueError, match="policy: expected a fixed γ"):
            next(loop.run(requests, packed("entropy:1")))
    with pytest.raises(ValueError, match="drafts: expected one of while, chain, switch, got 'if'"):
        PlannedLoop(target, draft, **size, drafts="if")


@pytest.mark.parametrize("sampling", ["greedy", "mixed", REJECTION + "mixed"])
def test_signals_are_kept(sampling: str) -> None:
    target, draft = wrapped("llama", "target", "fp32"), wrapped("llama", "perturbed", "fp32")
    requests = batch_of(sampling, [0, 1, 2, 3], grid.EOS, keep_signals=True)
    kept = []
    for kind in (KeepingEagerLoop, PlannedLoop):
        loop = kind(target, draft, batch=4, capacity=CAPACITY)
        with pytest.raises(ValueError, match="signals: expected requests with keep_signals"):
            loop.signals(0, 0)
        for policy in ("fixed:0", "entropy:1.5"):  # what the first has left is of no effect
            steps = by_row(loop.run(requests, packed(policy)))
        kept.append(
            [
                [each[: record.gamma] for record, each in zip(records[1:], signals, strict=True)]
                for row, records in sorted(steps.items())
                for signals in [loop.signals(row, len(records) - 1)]
            ]
        )
    assert [len(row) for row in kept[0]] == [len(row) for row in kept[1]]
    for eager, planned in zip(*kept, strict=True):
        for expected, found in zip(eager, planned, strict=True):
            assert torch.equal(found, expected)
            assert (found[:, at.CONFIDENCE] > 0).all() and (found[:, at.CONFIDENCE] <= 1).all()
    assert sum(len(each) for row in kept[0] for each in row) > 20


@contextmanager
def broken_works(never: str) -> Iterator[Counter[str]]:
    """Works on rows that never end, nor do what ``never`` says; yields how often each runs."""
    whole = works.Works.__call__
    ran: Counter[str] = Counter()

    def broken(each: works.Works, name: str) -> None:
        ran[name] += 1
        whole(each, name)
        rows = each.state.rows
        rows[:, at.DONE] = 0
        if name == plan.CLOSE:
            rows[:, at.LENGTH] = 9
        if name == plan.CLOSE or never == "stop":
            rows[:, at.STOP] = rows[:, at.DRAFTED] = 0
        rows[:, at.DRAFT_LENGTH] = 0 if never == "catch up" else 9
        if plan.publishes(name):
            each.loop.control[at.TICKET] -= 1
            each.loop.passes[at.PASSES] -= 1
            each._publish()

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(works.Works, "__call__", broken)
        yield ran


def assert_bounded(ran: Counter[str], never: str, most_passes: int, new_tokens: int) -> None:
    steps = ran[plan.CLOSE]
    assert steps == new_tokens + 1
    often = plan.CATCH_UP if never == "catch up" else plan.NEXT
    assert 2 * at.GAMMA_MAX < ran[often] <= steps * most_passes


@pytest.mark.parametrize("never", ["stop", "catch up"])
def test_a_step_that_never_stops(never: str) -> None:
    """A kernel that forgets to stop, or to catch up, costs a bounded number of works."""
    target, draft = wrapped("llama", "target", "fp32"), wrapped("llama", "perturbed", "fp32")
    loop = PlannedLoop(target, draft, batch=1, capacity=CAPACITY)
    requests = batch_of("greedy", [1], [], most=4)
    list(loop.run(requests, packed("fixed:15")))
    with broken_works(never) as ran, pytest.raises(RuntimeError, match="has not written"):
        list(loop.run(requests, packed("fixed:15")))
    assert_bounded(ran, never, int(loop._shared.passes[at.MOST_PASSES]), 4)


def test_logits_without_a_token() -> None:
    target, draft = wrapped("llama", "target", "fp32"), wrapped("llama", "perturbed", "fp32")
    for model, name in ((target, "target"), (draft, "draft")):
        broken = _Broken(model, after=2)
        pair = (broken, draft) if name == "target" else (target, broken)
        loop = PlannedLoop(*pair, batch=1, capacity=CAPACITY)  # type: ignore[arg-type]
        with pytest.raises(NumericsError, match=f"the {name} model's logits hold NaN"):
            list(loop.run(batch_of("greedy", [0], []), packed("fixed:3")))


class _Broken:
    """A model whose forwards give NaN after a few."""

    def __init__(self, model: Any, after: int) -> None:
        self._model, self._left = model, after

    def __getattr__(self, name: str) -> Any:
        return getattr(self._model, name)

    def forward(self, *arguments: Any, **options: Any) -> Tensor:
        self._left -= 1
        logits: Tensor = self._model.forward(*arguments, **options)
        return logits if self._left >= 0 else torch.full_like(logits, torch.nan)


def test_what_a_planned_loop_refuses() -> None:
    target, draft = wrapped("llama", "target", "fp32"), wrapped("llama", "perturbed", "fp32")
    loop = PlannedLoop(target, draft, batch=1, capacity=CAPACITY)
    with pytest.raises(ValueError, match="expected at most 1 rows"):
        next(loop.run(batch_of("greedy", [0, 1], []), packed("fixed:2")))
    alone = PlannedLoop(target, None, batch=1, capacity=CAPACITY)
    with pytest.raises(ValueError, match="draft: expected a model"):
        next(alone.run(batch_of("greedy", [0], []), packed("fixed:2")))
    assert by_row(alone.run(batch_of("greedy", [0], []), packed("fixed:0")))


def followed(gamma_cap: int, steps: list[int], lags: list[int], drafts: str) -> list[str]:
    """The works of a generation whose steps draft ``steps`` tokens, after catching up ``lags``."""
    state = {"step": 0, "drafted": 0, "lag": lags[0]}

    def run(name: str) -> None:
        if name == plan.CATCH_UP:
            state["lag"] -= 1
        elif name in (plan.FIRST, plan.NEXT):
            state["drafted"] += 1
        elif name == plan.CLOSE:
            state["step"] += 1
            state["drafted"] = 0
            state["lag"] = lags[state["step"]] if state["step"] < len(steps) else 0

    def read(conditions: list[int]) -> list[int]:
        running = state["step"] < len(steps)
        wanted = steps[state["step"]] if running else 0
        values = {
            at.RUNNING_ROWS: int(running),
            at.DRAFTING_ROWS: int(state["drafted"] < wanted),
            at.LAGGING_ROWS: int(state["lag"] > 0),
            at.MOST_DRAFTED: state["drafted"],
            at.FIXED_GAMMA: wanted,
        }
        return [values[c] for c in conditions]

    begin, *names = plan.follow(plan.generation_plan(gamma_cap, drafts), run, read)
    assert begin == plan.BEGIN
    return names


@pytest.mark.parametrize("drafts", plan.DRAFTS)
def test_works_in_order(drafts: str) -> None:
    assert followed(0, [0, 0], [0, 0], drafts) == ["verify-1", "close"] * 2
    assert followed(3, [2, 0, 1], [0, 0, 2], drafts) == (
        ["first", "next", "verify-3", "close", "verify-1", "close"]
        + ["catch-up", "catch-up", "first", "verify-2", "close"]
    )
    assert followed(1, [1], [0], drafts) == ["first", "verify-2", "close"]


def test_what_a_plan_needs() -> None:
    whole = plan.generation_plan(2)
    assert plan.works(whole) == [
        *("begin", "catch-up", "first", "next", "verify-1", "verify-2", "verify-3", "close")
    ]
    assert plan.handles(whole) == ["running", "lagging", "drafting", "more", "width"]
    chain = ["running", "lagging", "drafting", "more-2", "more-3", "width"]
    assert plan.handles(plan.generation_plan(3, "chain")) == chain
    switch = ["running", "lagging", "length", "width"]
    assert plan.handles(plan.generation_plan(3, "switch")) == switch
    assert plan.works(plan.generation_plan(0)) == ["begin", "verify-1", "close"]
    with pytest.raises(ValueError, match="gamma_cap: expected 0 to 15, got 16"):
        plan.generation_plan(16)
    with pytest.raises(ValueError, match="drafts: expected one of while, chain, switch, got 'if'"):
        plan.generation_plan(2, "if")


@pytest.mark.parametrize("drafts", plan.DRAFTS)
@pytest.mark.parametrize("gamma_cap", [0, 1, 2, 15])
def test_handles_are_set_where_their_nodes_are(gamma_cap: int, drafts: str) -> None:
    """In the same body ahead of the node, and for a WHILE as the last thing in its own; each
    handle has one node, no body is empty, and a kernel sets four handles at most."""
    seen: list[str] = []

    def check(body: plan.Plan, owner: str | None) -> None:
        assert body
        known: set[str] = set()
        for node in body:
            if isinstance(node, plan.Set):
                known |= {handle for handle, _ in node.values}
                assert len(node.values) <= 4
            elif not isinstance(node, plan.Work):
                assert node.handle in known
                seen.append(node.handle)
                bodies = node.bodies if isinstance(node, plan.Switch) else (node.body,)
                for inner in bodies:
                    check(inner, node.handle if isinstance(node, plan.While) else None)
        nodes = {n.handle for n in body if isinstance(n, plan.While | plan.If | plan.Switch)}
        assert known == nodes | ({owner} if owner else set())
        if owner:
            assert isinstance(body[-1], plan.Set) and body[-1].values[0][0] == owner

    check(plan.generation_plan(gamma_cap, drafts), None)
    assert len(seen) == len(set(seen))


@pytest.mark.parametrize("drafts", plan.DRAFTS)
def test_launches_of_a_step(drafts: str) -> None:
    launches = {"catch-up": 1000, "first": 20, "next": 10, "close": 2}
    launches |= {f"verify-{w}": 100 + w for w in range(1, 5)}
    whole = plan.generation_plan(3, drafts)
    steps = [plan.launches_per_step(whole, launches, g) for g in range(4)]
    ends = 2 + 3  # close; what the step begins with, its width, and whether another follows
    sets = {"while": [0, 1, 2, 3], "chain": [2, 2, 2, 2], "switch": [1, 0, 0, 0]}[drafts]
    works = [101, 102 + 20, 103 + 20 + 10, 104 + 20 + 20]
    assert steps == [w + s + ends for w, s in zip(works, sets, strict=True)]
    plain = plan.launches_per_step(plan.generation_plan(0, drafts), launches, 0)
    assert plain == 101 + 2 + 1


@pytest.mark.interpreter
@pytest.mark.filterwarnings("ignore::RuntimeWarning")
@pytest.mark.parametrize("rows", [[1], [0, 1, 2, 3]], ids=["B1", "B4"])
@pytest.mark.parametrize(
    ("policy", "sampling"),
    [
        *((policy, sampling) for policy in POLICIES for sampling in ("greedy", "sampled")),
        ("speckv", "truncated"),
        *((policy, REJECTION + "mixed") for policy in ("fixed:0", "fixed:4", "speckv")),
    ],
)
def test_kernels_through_the_plan(
    policy: str, sampling: str, rows: list[int], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Every kernel of a step runs in the interpreter, in the order of the device's plan."""
    from tests.kernels.test_decoding import Interpreted

    target, draft = wrapped("llama", "target", "fp32"), wrapped("llama", "perturbed", "fp32")
    requests = batch_of(sampling, rows, grid.EOS, most=9)
    size = {"batch": len(rows), "capacity": CAPACITY}
    expected = by_row(EagerLoop(target, draft, **size).run(requests, packed(policy)))
    kernels = Interpreted()
    loop_step = works.launches(importlib.import_module("speckv.kernels.loop_step"))
    launched: Counter[str] = Counter()

    def counting(name: str) -> Any:
        def launch(*arguments: Any, **options: Any) -> None:
            launched[name] += 1
            getattr(loop_step, name)(*arguments, **options)

        return launch

    between = type(loop_step)(**{name: counting(name) for name in vars(loop_step)})
    monkeypatch.setattr(works, "operations", lambda device: kernels)
    monkeypatch.setattr(works, "step_operations", lambda device: between)
    assert by_row(PlannedLoop(target, draft, **size).run(requests, packed(policy))) == expected
    steps = max(len(records) for records in expected.values())
    verify = "verify_rejection" if requests.rejection else "verify"
    assert launched["close_step"] == kernels.launches[verify] == steps
    drafts = kernels.launches["draft_step"]
    assert (drafts > 0) == (policy != "fixed:0")
    assert launched["keep_draft"] == drafts * requests.rejection
    assert launched["step_inputs"] >= steps - 1 + drafts
    assert launched["publish_conditions"] >= steps + drafts


def test_a_loop_made_in_inference_mode_ends_outside_of_it() -> None:
    pair = wrapped("llama", "target", "fp32"), wrapped("llama", "perturbed", "fp32")
    with torch.inference_mode():
        loop = PlannedLoop(*pair, batch=2, capacity=CAPACITY)
        first = by_row(loop.run(batch_of("greedy", [0, 1], []), packed("fixed:2")))
    again = by_row(loop.run(batch_of("greedy", [0, 1], []), packed("fixed:2")))
    assert again == first
    steps = loop.run(batch_of("greedy", [0, 1], []), packed("fixed:2"))
    next(steps)
    loop.finish(0)
    steps.close()
    loop.close()
