"""End-to-end rows: tokens per second of every loop, on models of real size with random weights.

Policies are measured on a recorded trace (`bench.scripted`): its text, its draft's signals and what
the target accepted of them are injected, which every such row says. Without a trace there are rows
of fixed γ alone, with the acceptance of random models, which is none. Tokens other than those that
plain decoding says are a failure.
"""

from __future__ import annotations

import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from bench import roofline
from bench.lab import COST, Lab, Row, isolated, one_request, quantiles
from bench.scripted import Script, ScriptedDraft, ScriptedTarget, scripts
from bench.shares import loop_kinds
from speckv.decoding.requests import RequestBatch
from speckv.decoding.trained import trained_policy
from speckv.models.base import CausalModel
from speckv.models.llama import LlamaDecoder
from speckv.policies import CostTable, Policy, parse_policy
from speckv.sampling import SamplingParams

if TYPE_CHECKING:
    from speckv.traces.schema import Trace

FIXED = tuple(f"fixed:{gamma}" for gamma in (0, 2, 4, 6, 8))
LOOKING = ("entropy:2", "confidence:0.5", "speckv")
SOME = ("fixed:0", "fixed:4", "speckv")
"""Of the loops that are not the best one."""
COMPRESSIONS = ("bf16", "nf4", "int8")
DRAFT = "Llama-3.2-1B"
_CAPACITY = 512


def random_decoder(lab: Lab, name: str, compression: str) -> LlamaDecoder:
    """A decoder of a shape of `bench.roofline`, with random weights."""
    torch.manual_seed(0)
    config = roofline.shape(roofline.TINY if lab.dry else roofline.MODELS[name])
    return LlamaDecoder.from_tensors(
        config,
        roofline.RandomTensors(config, lab.device),
        name=name,
        compression=compression,
        dtype=torch.bfloat16,
        device=lab.device,
        invariant=lab.dry,
    )


def e2e_rows(lab: Lab, target: str = "Llama-3.2-3B") -> Iterator[Row]:
    """A target in every compression, every loop and policy."""
    names = ("tiny", "tiny") if lab.dry else (DRAFT, target)
    draft = random_decoder(lab, names[0], "bf16")
    trace: Trace | None = None
    if lab.trace is not None:
        try:
            trace = _read(lab.trace)
        except ModuleNotFoundError as error:
            yield {"name": "recorded signals", "skipped": str(error)}
    for compression in COMPRESSIONS[: 1 if lab.quick else None]:
        facts: Row = {"target": names[1], "draft": names[0], "compression": compression}
        facts |= {"dtype": "bf16", "batch": 1, "vocabulary": draft.vocab_size}
        rows = partial(_compression_rows, lab, draft, trace, facts)
        yield from isolated({"name": "pair", **facts}, rows)


def _compression_rows(
    lab: Lab, draft: LlamaDecoder, trace: Trace | None, facts: Row
) -> Iterator[Row]:
    target = random_decoder(lab, facts["target"], facts["compression"])
    kinds = list(loop_kinds(lab).items())
    kinds = [*kinds[1:], kinds[0]]  # the best one first, the eager one last
    if trace is not None:
        cost = measured_cost(lab, target, draft)
        said = scripts(
            trace,
            facts["compression"],
            16 if lab.dry else 100,
            1 if lab.quick else 4,
            min(target.vocab_size, draft.vocab_size),
        )
        for index, (kind, make) in enumerate(kinds):
            answers, names = (said, (*FIXED, *LOOKING)) if index == 0 else (said[:2], SOME)
            policies = {name: policy_of(name, trace) for name in names}
            pair = _Pair(ScriptedTarget(target, _CAPACITY), ScriptedDraft(draft, _CAPACITY))
            rows = partial(_scripted_rows, lab, facts, kind, make, pair, answers, policies, cost)
            yield from isolated({"name": f"{kind} scripted", **facts}, rows)
            del pair, rows
    plain: list[int] = []
    for kind, make in kinds:
        names = ("fixed:0", "fixed:4") if trace is not None else FIXED
        rows = partial(_random_rows, lab, facts, kind, make, (target, draft), names, plain)
        yield from isolated({"name": f"{kind} random", **facts}, rows)


def _read(path: Path) -> Trace:
    from speckv.traces.schema import read_trace  # needs pyarrow, which nothing else here does

    return read_trace(path)


def policy_of(name: str, trace: Trace) -> Policy:
    """The policy of a name; ``speckv`` is the one that was trained for the trace's pair."""
    if name == "speckv":
        identity = {"name": None, "fingerprint": None, "vocab_size": None}
        pair = [{**identity, **model} for model in (trace.info.target, trace.info.draft)]
        if (trained := trained_policy(*pair)) is not None:
            return trained
    return parse_policy(name)


@dataclass(frozen=True)
class _Pair:
    target: ScriptedTarget
    draft: ScriptedDraft

    def follow(self, script: Script) -> None:
        self.target.follow(script)
        self.draft.follow(script)


@dataclass
class _Measured:
    """Of a policy, over all answers."""

    rates: list[float] = field(default_factory=list)
    steps: int = 0
    tokens: int = 0
    same: bool = True

    def add(
        self, seconds: Sequence[float], steps: Sequence[Sequence[int]], want: list[int]
    ) -> None:
        produced = [t for step in steps for t in step]
        self.rates += [len(produced) / s for s in seconds]
        self.steps += len(steps)
        self.tokens += len(produced)
        self.same &= produced == want

    def row(self, lab: Lab, facts: Row) -> Row:
        row: Row = {**facts, "tokens": self.tokens, "tokens_per_step": self.tokens / self.steps}
        row |= {"identical_to_plain": self.same, "n": len(self.rates), "tokens_per_second": None}
        if self.same and not lab.dry:
            row["tokens_per_second"] = quantiles(self.rates)
        return row


def _scripted_rows(
    lab: Lab,
    facts: Row,
    kind: str,
    make: Any,
    pair: _Pair,
    answers: Sequence[Script],
    policies: dict[str, Policy],
    cost: CostTable,
) -> Iterator[Row]:
    """Policies on recorded answers, which stand in for the pair's own."""
    loop = make(pair.target, pair.draft, batch=1, capacity=_CAPACITY)
    found = {name: _Measured() for name in policies}
    try:
        for script in answers:
            pair.follow(script)
            requests = RequestBatch.build(
                [script.prompt],
                [SamplingParams(max_new_tokens=len(script.answer), ignore_eos=True)],
                eos_ids=[],
                max_length=_CAPACITY,
                device=lab.device,
            )
            for name, policy in policies.items():
                packed = policy.pack(facts["compression"], cost)
                seconds, steps = _decoded(lab, loop, requests, packed, repeats=2)
                found[name].add(seconds, steps, script.answer)
    finally:
        loop.close()
    for name, measured in found.items():
        row = measured.row(lab, {"name": f"{kind} {name}", **facts, "answers": len(answers)})
        row["signals_and_acceptance"] = "recorded, injected"
        yield row | {"trained": policies[name].trained}


def _random_rows(
    lab: Lab,
    facts: Row,
    kind: str,
    make: Any,
    models: tuple[LlamaDecoder, LlamaDecoder],
    names: Sequence[str],
    plain: list[int],
) -> Iterator[Row]:
    """Fixed γ on the random pair itself; ``plain`` is what the first of all rows said."""
    loop = make(*models, batch=1, capacity=_CAPACITY)
    requests = one_request(lab, 16 if lab.dry else 128, _CAPACITY)
    try:
        for name in names:
            packed = parse_policy(name).pack(cost=COST)
            seconds, steps = _decoded(lab, loop, requests, packed)
            plain += [] if plain else [t for step in steps for t in step]
            measured = _Measured()
            measured.add(seconds, steps, plain)
            row = measured.row(lab, {"name": f"{kind} {name}", **facts})
            yield row | {"signals_and_acceptance": "the draft's"}
    finally:
        loop.close()


def measured_cost(lab: Lab, target: CausalModel, draft: CausalModel) -> CostTable:
    """The pair's cost table: measured where times mean something, and there is time."""
    if lab.dry or lab.quick:
        return COST
    from speckv.decoding.calibrate import measure

    return measure(target, draft, graphs=True)


def _decoded(
    lab: Lab, loop: Any, requests: RequestBatch, policy: Tensor, repeats: int = 3
) -> tuple[list[float], list[list[int]]]:
    """Seconds of whole generations, and the tokens of each step, prefill's first."""
    seconds, steps = [], []
    for repeat in range(2 if lab.dry else repeats + 1):
        start = time.perf_counter()
        steps = [r.tokens for records in loop.run(requests, policy) for r in records]
        if repeat:  # the first compiles and captures
            seconds.append(time.perf_counter() - start)
    return seconds, steps
