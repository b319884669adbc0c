"""End-to-end rows of the default pair, and of transformers' assisted generation beside the engine.

The default pair is measured where its target is in the cache: nothing is fetched, and a machine
without a network says what it lacks.
"""

from __future__ import annotations

import time
from collections.abc import Iterator
from functools import partial
from typing import Any

import torch

from bench import roofline
from bench.e2e_rows import COMPRESSIONS, DRAFT, FIXED, SOME
from bench.lab import COST, PROMPT, Lab, Row, isolated, one_request, quantiles
from bench.shares import loop_kinds
from bench.sides import transformers_side
from speckv.models import hub
from speckv.models.llama import LlamaDecoder
from speckv.policies import parse_policy
from speckv.prompts import evaluation_prompts
from speckv.sampling import SamplingParams

POLICIES = (*FIXED, "entropy:2", "confidence:0.35", "speckv")
SETTINGS: dict[str, dict[str, Any]] = {
    "default": {},
    "fixed:4": {
        "num_assistant_tokens": 4,
        "num_assistant_tokens_schedule": "constant",
        "assistant_confidence_threshold": 0.0,
    },
}
"""Of assisted generation: its own, and four draft tokens a step at any confidence."""


def default_pair_rows(lab: Lab) -> Iterator[Row]:
    """The pair that comes with the package: a few real prompts, every compression and policy."""
    facts: Row = {"target": "SmolLM2-135M-Instruct", "draft": "shipped", "dtype": "bf16"}
    facts |= {"batch": 1, "vocabulary": 49_152, "signals_and_acceptance": "the draft's"}
    if not hub.is_cached():
        missing = {"n": 0, "tokens_per_second": None, "compression": "bf16"}
        problem = "the default model is not in the cache"
        yield {"name": "default pair", **facts, **missing, "skipped": problem}
        return
    for compression in COMPRESSIONS[: 1 if lab.quick or lab.dry else None]:
        row = {"name": "default pair", **facts, "compression": compression}
        yield from isolated(row, partial(_engine_rows, lab, row))
    if not lab.dry:
        row = {"name": "default pair, assisted", **facts, "compression": "bf16"}
        yield from isolated(row, partial(_assisted_default, lab, row), vital=False)


def _engine_rows(lab: Lab, facts: Row) -> Iterator[Row]:
    from speckv import Engine

    params = SamplingParams(max_new_tokens=8 if lab.dry else 128)
    prompts = evaluation_prompts(1)[: 1 if lab.dry else None]
    plain: list[list[int]] = []

    def rows_of(kind: str) -> Iterator[Row]:
        engine = Engine.from_pretrained(
            compression=facts["compression"], device=lab.device, loop=kind, progress=False
        )
        for name in POLICIES if kind == "device" else SOME:
            rates, produced = [], []
            for prompt in prompts:
                engine.generate(prompt.text, params, chat=True, policy=name)  # captures
                result = engine.generate(prompt.text, params, chat=True, policy=name)
                produced.append(list(result.token_ids))
                rates.append(result.stats.tokens_per_second)
            plain.extend([] if plain else produced)
            row = {**facts, "name": f"default pair {kind} {name}", "n": len(rates)}
            row |= {"tokens": sum(map(len, produced)), "loop": str(engine.loop)}
            row["identical_to_plain"] = produced == plain
            timed = produced == plain and not lab.dry
            yield row | {"tokens_per_second": quantiles(rates) if timed else None}

    for kind in ("eager",) if lab.dry else ("device", "graphed", "eager"):
        yield from isolated({**facts, "name": f"default pair {kind}"}, partial(rows_of, kind))


def _assisted_default(lab: Lab, facts: Row) -> Iterator[Row]:
    """The same pair as transformers runs it."""
    from transformers import AutoModelForCausalLM

    from bench.assisted import transformers_draft
    from speckv import Engine
    from speckv.models.slice_draft import shipped_draft

    engine = Engine.from_pretrained(device=lab.device, progress=False)
    assert isinstance(engine.target, LlamaDecoder)
    folder = shipped_draft(engine.target.fingerprint)
    assert folder is not None
    prompts = [engine.encode(p.text, chat=True) for p in evaluation_prompts(1)]
    del engine
    target = AutoModelForCausalLM.from_pretrained(hub.fetch(), dtype=torch.bfloat16)
    draft = transformers_draft(folder, torch.bfloat16)
    target, draft = target.to(lab.device).eval(), draft.to(lab.device)
    yield from _transformers_rows(lab, target, draft, prompts, facts)


def _transformers_rows(
    lab: Lab, target: Any, draft: Any, prompts: list[list[int]], facts: Row
) -> Iterator[Row]:
    for name, setting in SETTINGS.items():
        draft.generation_config.update(**setting)
        new = 8 if lab.dry else 32 if lab.quick else 128
        run = transformers_side(target, new, assistant_model=draft)
        rates, tokens = [], 0
        for prompt in prompts:
            run(prompt)
            for _ in range(1 if lab.dry or lab.quick else 3):
                seconds, said = run(prompt)
                rates.append(len(said) / seconds)
            tokens += len(said)
        row: Row = {**facts, "name": f"transformers assisted generation {name}"}
        row |= {"tokens": tokens, "n": len(rates)}
        yield row | {"tokens_per_second": None if lab.dry else quantiles(rates)}


def assisted_rows(lab: Lab) -> Iterator[Row]:
    """Assisted generation on a random pair, and the engine's loops on the same weights.

    Random models accept nothing of each other, on either side.
    """
    from transformers import LlamaConfig, LlamaForCausalLM

    names = ("tiny", "tiny") if lab.dry else (DRAFT, DRAFT if lab.quick else "Llama-3.2-3B")
    torch.manual_seed(0)
    made: list[Any] = []
    for name in names:
        sizes = roofline.TINY if lab.dry else roofline.MODELS[name]
        with torch.device(lab.device):
            made.append(LlamaForCausalLM(LlamaConfig(**sizes)).bfloat16().eval())
    draft, target = made
    target.generation_config.update(eos_token_id=None, pad_token_id=0)
    facts: Row = {"target": names[1], "draft": names[0], "compression": "bf16", "dtype": "bf16"}
    facts |= {"batch": 1, "vocabulary": target.config.vocab_size}
    facts["signals_and_acceptance"] = "the draft's"
    row = {"name": "transformers assisted generation", **facts}
    theirs = partial(_transformers_rows, lab, target, draft, [PROMPT], facts)
    yield from isolated(row, theirs, vital=False)
    ours = [_same_weights(lab, model, name) for model, name in zip(made, names, strict=True)]
    yield from isolated({"name": "engine", **facts}, partial(_beside_rows, lab, ours, facts))


def _same_weights(lab: Lab, model: Any, name: str) -> LlamaDecoder:
    sizes = roofline.TINY if lab.dry else roofline.MODELS[name]
    return LlamaDecoder.from_tensors(
        roofline.shape(sizes),
        model.state_dict(),
        name=name,
        compression="bf16",
        dtype=torch.bfloat16,
        device=lab.device,
        invariant=lab.dry,
    )


def _beside_rows(lab: Lab, models: list[LlamaDecoder], facts: Row) -> Iterator[Row]:
    draft, target = models
    kind, make = list(loop_kinds(lab).items())[1]
    requests = one_request(lab, 8 if lab.dry else 128)
    loop = make(target, draft, batch=1, capacity=512)
    try:
        for name in ("fixed:0", "fixed:4"):
            policy, rates, tokens = parse_policy(name).pack(cost=COST), [], 0
            for repeat in range(2 if lab.dry else 4):
                start = time.perf_counter()
                told = [r.tokens for records in loop.run(requests, policy) for r in records]
                tokens = sum(map(len, told))
                if repeat:
                    rates.append(tokens / (time.perf_counter() - start))
            row: Row = {**facts, "name": f"beside assisted generation: {kind} {name}"}
            row |= {"tokens": tokens, "n": len(rates)}
            yield row | {"tokens_per_second": None if lab.dry else quantiles(rates)}
    finally:
        loop.close()
