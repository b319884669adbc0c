"""End-to-end rows: tokens per second of every loop, on models of real size with random weights.

Fixed γ need nothing but the models. A policy that looks at signals is measured only where these are
recorded ones: with a trace, the draft's logits are made from it (`bench.scripted`), which every
such row says. Tokens other than plain decoding's are a failure.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from bench import roofline
from bench.lab import COST, PROMPT, Lab, Row, one_request, quantiles
from bench.loop_rows import loop_kinds
from bench.scripted import ScriptedDraft, scripts
from bench.sides import transformers_side
from speckv.models.base import CausalModel
from speckv.models.llama import LlamaDecoder
from speckv.policies import CostTable, parse_policy
from speckv.prompts import evaluation_prompts
from speckv.sampling import SamplingParams

FIXED = tuple(f"fixed:{gamma}" for gamma in (0, 2, 4, 6, 8))
LOOKING = ("entropy:2", "confidence:0.5", "speckv")
PAIRS = (("Llama-3.2-1B", "Llama-3.2-3B"), ("Llama-3.2-1B", "Llama-3.1-8B"))
COMPRESSIONS = ("bf16", "int8", "nf4")


@dataclass(frozen=True)
class _Pair:
    """A random pair, and what its rows say of it."""

    target: LlamaDecoder
    draft: LlamaDecoder
    facts: Row


def e2e_rows(lab: Lab) -> Iterator[Row]:
    """Every pair, compression, loop and policy."""
    yield from default_pair_rows(lab)
    yield from assisted_rows(lab)
    pairs = [("tiny", "tiny")] if lab.dry else list(PAIRS[:1] if lab.quick else PAIRS)
    compressions = COMPRESSIONS[:1] if lab.quick or lab.dry else COMPRESSIONS
    for draft_name, target_name in pairs:
        draft = random_decoder(lab, draft_name, "bf16")
        for compression in compressions:
            target = random_decoder(lab, target_name, compression)
            facts = {"target": target_name, "draft": draft_name, "compression": compression}
            yield from _pair_rows(lab, _Pair(target, draft, {**facts, "dtype": "bf16"}), lab.trace)
            del target


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


def default_pair_rows(lab: Lab) -> Iterator[Row]:
    """The pair that comes with the package, if its target is in the cache: a few real prompts.

    Nothing is fetched: a machine without a network says what it lacks.
    """
    from speckv import Engine
    from speckv.models import hub

    row: Row = {"target": "SmolLM2-135M-Instruct", "draft": "shipped", "compression": "bf16"}
    row |= {"dtype": "bf16", "batch": 1, "vocabulary": 49_152, "n": 0, "tokens_per_second": None}
    row["signals_and_acceptance"] = "the draft's"
    if not hub.is_cached():
        yield {"name": "default pair", **row, "problem": "the default model is not in the cache"}
        return
    engine = Engine.from_pretrained(compression="bf16", device=lab.device, progress=False)
    params = SamplingParams(max_new_tokens=8 if lab.dry else 128)
    prompts = evaluation_prompts(1)
    plain: list[list[int]] = []
    for name in ("fixed:0", "fixed:2", "fixed:4", "confidence:0.35", "speckv"):
        rates, produced = [], []
        for prompt in prompts[: 1 if lab.dry else None]:
            engine.generate(prompt.text, params, chat=True, policy=name)  # captures
            result = engine.generate(prompt.text, params, chat=True, policy=name)
            produced.append(list(result.token_ids))
            rates.append(result.stats.tokens_per_second)
        plain = plain or produced
        row |= {"n": len(rates), "tokens": sum(map(len, produced))}
        row["identical_to_plain"] = produced == plain
        timed = produced == plain and not lab.dry
        row["tokens_per_second"] = quantiles(rates) if timed else None
        yield {"name": f"default pair {name}", "loop": str(engine.loop), **row}


def assisted_rows(lab: Lab) -> Iterator[Row]:
    """Transformers' assisted generation on random models of one shape, beside the engine's loops.

    Its default setting, and four draft tokens a step at any confidence, as ``fixed:4``.
    """
    from transformers import LlamaConfig, LlamaForCausalLM

    sizes = roofline.TINY if lab.dry else roofline.MODELS["Llama-3.2-1B"]
    shallow = {**sizes, "num_hidden_layers": 1}
    torch.manual_seed(0)
    with torch.device(lab.device):
        target, draft = (LlamaForCausalLM(LlamaConfig(**s)).bfloat16() for s in (sizes, shallow))
    new = 8 if lab.dry else 128
    settings: dict[str, dict[str, Any]] = {
        "default": {},
        "fixed:4": {
            "num_assistant_tokens": 4,
            "num_assistant_tokens_schedule": "constant",
            "assistant_confidence_threshold": 0.0,
        },
    }
    for name, setting in settings.items():
        draft.generation_config.update(**setting)
        run = transformers_side(target, new, assistant_model=draft, eos_token_id=None)
        times = [run(PROMPT) for _ in range(2 if lab.dry else 4)][1:]
        tokens = len(times[0][1])
        yield {
            "name": f"transformers assisted generation {name}",
            "target": "tiny" if lab.dry else "Llama-3.2-1B",
            "draft": "one layer",
            "compression": "bf16",
            "dtype": "bf16",
            "batch": 1,
            "vocabulary": target.config.vocab_size,
            "signals_and_acceptance": "the draft's",
            "tokens": tokens,
            "n": len(times),
            "tokens_per_second": None if lab.dry else quantiles([tokens / s for s, _ in times]),
        }


def _pair_rows(lab: Lab, pair: _Pair, trace: Path | None) -> Iterator[Row]:
    new = 16 if lab.dry else 128
    capacity = 64 if lab.dry else 512
    make = partial(_decoded, lab, capacity=capacity, new=new)
    plain: list[list[int]] | None = None
    for kind, loop_of in loop_kinds(lab).items():
        loop = loop_of(pair.target, pair.draft, batch=1, capacity=capacity)
        policies = FIXED if kind in ("device", "planned") else FIXED[::2]
        for name in policies:
            policy = parse_policy(name).pack(cost=COST)
            seconds, steps = make(loop, policy)
            tokens = [t for step in steps for t in step]
            plain = plain or steps
            expected = [t for step in plain for t in step]
            yield _row(lab, pair, f"{kind} {name}", seconds, steps, tokens == expected)
        del loop
    if trace is None or plain is None:
        return
    answer = [t for step in plain for t in step]
    yield from _scripted_rows(lab, pair, trace, answer, capacity, make)


def _scripted_rows(
    lab: Lab,
    pair: _Pair,
    trace: Path,
    answer: Sequence[int],
    capacity: int,
    make: Callable[[Any, Tensor], tuple[list[float], list[list[int]]]],
) -> Iterator[Row]:
    """Policies on recorded signals and acceptance, which stand in for the draft's own."""
    from speckv.traces.schema import read_trace

    said = scripts(read_trace(trace), pair.facts["compression"], len(answer) - 1, 4)
    draft = ScriptedDraft(pair.draft, first=len(PROMPT) + 1, capacity=capacity)
    cost = measured_cost(lab, pair.target, pair.draft)
    kinds = loop_kinds(lab)
    kind = list(kinds)[-1]
    loop = kinds[kind](pair.target, draft, batch=1, capacity=capacity)
    for name in (*FIXED, *LOOKING):
        policy = parse_policy(name).pack(pair.facts["compression"], cost)
        seconds: list[float] = []
        steps: list[list[int]] = []
        same = True
        for script in said:
            draft.follow(script, answer[1:])
            more, found = make(loop, policy)
            seconds += more
            steps += found
            same &= [t for step in found for t in step] == list(answer)
        row = _row(lab, pair, f"{kind} {name}", seconds, steps, same, len(said))
        yield row | {"trace": trace.name, "answers": len(said)}


def measured_cost(lab: Lab, target: CausalModel, draft: CausalModel) -> CostTable:
    """The pair's cost table: measured where times mean something."""
    if lab.dry:
        return COST
    from speckv.decoding.calibrate import measure

    return measure(target, draft)


def _decoded(
    lab: Lab, loop: Any, policy: Tensor, *, capacity: int, new: int
) -> tuple[list[float], list[list[int]]]:
    """Seconds of whole generations, and the tokens of each step, prefill's first."""
    requests = one_request(lab, new, capacity)
    seconds, steps = [], []
    for repeat in range(2 if lab.dry else 4):
        start = time.perf_counter()
        steps = [r.tokens for records in loop.run(requests, policy) for r in records]
        if repeat:  # the first compiles and captures
            seconds.append(time.perf_counter() - start)
    return seconds, steps


def _row(
    lab: Lab,
    pair: _Pair,
    name: str,
    seconds: Sequence[float],
    steps: Sequence[Sequence[int]],
    same: bool,
    answers: int = 0,
) -> Row:
    """``answers``: over how many recorded answers; 0 where nothing is injected."""
    tokens = sum(map(len, steps))
    row: Row = {
        "name": name,
        **pair.facts,
        "batch": 1,
        "vocabulary": pair.target.vocab_size,
        "signals_and_acceptance": "recorded, injected" if answers else "the draft's",
        "tokens": tokens,
        "tokens_per_step": tokens / len(steps),
        "identical_to_plain": same,
        "n": len(seconds),
        "tokens_per_second": None,
    }
    if same and not lab.dry:
        row["tokens_per_second"] = quantiles([tokens / max(answers, 1) / s for s in seconds])
    return row
