"""Rows of the kernels: each one launch, checked against the reference before it is timed.

Sampled rows have temperature 0.8; truncated ones top-k 50 and top-p 0.9. Logits are bf16, normal
with a standard deviation of 3. The floor of a launch in a graph, and the same work in PyTorch,
stand beside them.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict
from functools import partial
from typing import Any

import torch
from torch import Tensor

from bench.lab import COST, Calls, Lab, Row, States, isolated, nothing
from speckv import kernels
from speckv.kernels import layout as at
from speckv.kernels import reference
from speckv.kernels.layout import StepState
from speckv.policies import parse_policy

_VOCABULARIES = (128_256, 262_144, 49_152, 32_000)
_BATCHES = (1, 4, 8)
_WIDTHS = (5, 1, 9, 16, 3)
_PROMPT = [1, 2, 3]
_CAPACITY = 64

Tensors = dict[str, Tensor]
Operation = tuple[Callable[..., Any], Callable[..., None]]
"""A prepared class of `speckv.kernels` and its twin in the reference."""


def draft_rows(lab: Lab) -> Iterator[Row]:
    """`draft_step` beside torch.argmax and the unfused PyTorch way."""
    for batch, vocabulary in shapes(lab):
        facts = {"name": "draft", "batch": batch, "vocabulary": vocabulary}
        yield from isolated(facts, partial(_draft_shape, lab, batch, vocabulary))


def verify_rows(lab: Lab) -> Iterator[Row]:
    """`cutoff`, `verify` and `verify_rejection` over widths."""
    for batch, vocabulary in shapes(lab):
        for width in (1, 5) if lab.quick or lab.dry else _WIDTHS:
            facts = {"name": "verify", "batch": batch, "width": width, "vocabulary": vocabulary}
            rows = partial(_verify_shape, lab, batch, width, vocabulary)
            yield from isolated(facts, rows)


def shapes(lab: Lab) -> list[tuple[int, int]]:
    """Batches and vocabularies, those first that must not be cut."""
    if lab.dry:
        return [(2, 1031)]
    if lab.quick:
        return [(1, 128_256)]
    return [(batch, vocabulary) for batch in _BATCHES for vocabulary in _VOCABULARIES]


def _draft_shape(lab: Lab, batch: int, vocabulary: int) -> Iterator[Row]:
    logits = _logits(lab, batch, vocabulary)
    count = lab.launches(len(logits))
    shape = {"batch": batch, "vocabulary": vocabulary, "dtype": "bf16", "copies": len(logits)}

    def plain(name: str, work: Callable[[Tensor], Any]) -> Row:
        calls: Calls = [partial(work, logits[i % len(logits)]) for i in range(count)]
        return {"name": name, **shape, **lab.time(calls, nothing)}

    word = torch.zeros(1, device=lab.device)
    yield plain("floor: fill of one word", lambda x: word.zero_())
    yield plain("torch.argmax", lambda x: torch.argmax(x, -1))
    yield plain("unfused signals", _unfused)

    sampled = _sampling(lab, batch)
    truncation = _truncation(lab, batch)
    truncated = [{**sampled, "cutoffs": kernels.cutoff(x, *truncation)[0]} for x in logits]
    operation: Operation = (kernels.DraftStep, reference.draft_step)
    starts = [_state(lab, batch)]
    for name in ("fixed:15", "entropy:2.0", "paper", "speckv"):
        policy = parse_policy(name).pack(cost=COST).to(lab.device)
        forms: dict[str, list[Tensors]] = {"greedy": [{}], "sampled": [sampled]}
        if name == "fixed:15":
            forms["truncated"] = truncated
        for form, options in forms.items():
            row = {"name": f"draft_step {form}", "policy": name, **shape}
            yield row | _step_row(lab, operation, logits, starts, policy, options)


def _verify_shape(lab: Lab, batch: int, width: int, vocabulary: int) -> Iterator[Row]:
    logits = _logits(lab, batch, width, vocabulary)
    count = lab.launches(len(logits))
    shape = {
        "batch": batch,
        "width": width,
        "vocabulary": vocabulary,
        "dtype": "bf16",
        "copies": len(logits),
    }
    yield from _cutoff_rows(lab, logits, count, shape)

    policy = parse_policy("fixed:4").pack().to(lab.device)
    eos = {"eos": torch.full((batch, 1), -1, dtype=torch.int32, device=lab.device)}
    sampled = {**eos, **_sampling(lab, batch)}
    columns = _truncation(lab, batch * width)
    own = [x.argmax(-1)[:, : width - 1] for x in logits]
    low = [kernels.cutoff(x.flatten(0, 1), *columns)[0].view(batch, width) for x in logits]
    starts = [_state(lab, batch, drafts) for drafts in own]
    operation: Operation = (kernels.Verify, reference.verify)
    for form, options in (
        ("greedy", [eos]),
        ("sampled", [sampled]),
        ("truncated", [{**sampled, "cutoffs": each} for each in low]),
    ):
        row = {"name": f"verify {form}", **shape}
        yield row | _step_row(lab, operation, logits, starts, policy, options)

    # A draft equal to the target is accepted throughout, so that a draw from the target follows. Of
    # another the likeliest token is nearly always rejected, and a draw from the residual follows.
    operation = (kernels.VerifyRejection, reference.verify_rejection)
    for form in ("bonus", "residual") if width > 1 else ("bonus",):
        options = [
            {**sampled, **_rejection(lab, x, seed=i, draft_is_target=form == "bonus")}
            for i, x in enumerate(logits)
        ]
        if form == "residual":
            likeliest = [each["draft_logits"].argmax(-1)[:, : width - 1] for each in options]
            starts = [_state(lab, batch, drafts) for drafts in likeliest]
        row = {"name": f"verify_rejection {form}", **shape}
        yield row | _step_row(lab, operation, logits, starts, policy, options)


def _step_row(
    lab: Lab,
    operation: Operation,
    logits: Tensor,
    starts: Sequence[StepState],
    policy: Tensor,
    options: Sequence[Tensors],
) -> Row:
    """Config, gate and times of an operation that changes a state.

    ``starts`` and ``options`` belong to the copies of the logits, or are the same for all.
    """
    prepared, twin = operation
    count = lab.launches(len(logits))
    states = States(starts, count)
    steps = []
    for i, state in enumerate(states.each):
        copy = i % len(logits)
        steps.append(prepared(logits[copy], state, policy, **options[copy % len(options)]))
    calls: Calls = [partial(step, logits[i % len(logits)]) for i, step in enumerate(steps)]
    arguments = {name: tensor.cpu() for name, tensor in options[0].items()}
    same = states.gives(
        calls[0], lambda state: twin(logits[0].cpu(), state, policy.cpu(), **arguments)
    )
    config = steps[0].config
    return {
        "config": config and asdict(config),
        **_gated(lab, same, calls, states.restore),
    }


def _cutoff_rows(lab: Lab, logits: Tensor, count: int, shape: Row) -> Iterator[Row]:
    """`cutoff` with top-k and top-p (two launches), and for the log-sum-exp alone (one)."""
    flat = logits.flatten(1, 2)  # [copies, B * W, V]
    columns = _truncation(lab, flat.shape[1])
    for form, arguments in (("truncated", columns), ("lse", columns[:1])):
        prepared = kernels.Cutoff(flat[0], *arguments)
        calls: Calls = [partial(prepared, flat[i % len(flat)]) for i in range(count)]
        calls[0]()
        want = reference.cutoff(flat[0].cpu(), *(column.cpu() for column in arguments))
        got = prepared.cutoffs.cpu(), prepared.lse.cpu()
        # Sums in another order may move a cutoff to the next bf16 value.
        same = torch.allclose(got[0], want[0], rtol=2.0**-7) and torch.allclose(
            got[1], want[1], rtol=1e-4
        )
        yield {
            "name": f"cutoff {form}",
            **shape,
            "config": prepared.config and asdict(prepared.config),
            **_gated(lab, same, calls, nothing),
        }


def _gated(lab: Lab, same: bool, calls: Calls, restore: Callable[[], None]) -> Row:
    """Times, if the result is right: a wrong one has no speed."""
    return {"matches_reference": same, **(lab.time(calls, restore) if same else {})}


def _logits(lab: Lab, *shape: int) -> Tensor:
    """[copies, *shape] in bf16."""
    return _normal(lab, lab.copies(2 * math.prod(shape)), *shape, seed=0)


def _normal(lab: Lab, *shape: int, seed: int) -> Tensor:
    generator = torch.Generator(lab.device).manual_seed(seed)
    noise = torch.randn(shape, device=lab.device, dtype=torch.bfloat16, generator=generator)
    return noise.mul_(3.0)


def _state(lab: Lab, batch: int, drafts: Tensor | None = None) -> StepState:
    """Rows that draft their first token, or that verify ``drafts`` [B, γ]."""
    state = StepState.allocate(batch, _CAPACITY, lab.device)
    for row in range(batch):
        state.reset(row, _PROMPT, limit=_CAPACITY - 4, request=row)
    if drafts is None:
        state.rows[:, at.STOP] = 0
        return state
    state.rows[:, at.DRAFTED] = drafts.shape[1]
    state.sequence[:, len(_PROMPT) : len(_PROMPT) + drafts.shape[1]] = drafts
    return state


def _sampling(lab: Lab, batch: int) -> Tensors:
    return {
        "inv_temperature": torch.full((batch,), 1.25, device=lab.device),
        "seeds": torch.arange(batch, dtype=torch.int64, device=lab.device),
    }


def _truncation(lab: Lab, rows: int) -> tuple[Tensor, Tensor, Tensor]:
    return (
        torch.full((rows,), 1.25, device=lab.device),
        torch.full((rows,), 50, dtype=torch.int32, device=lab.device),
        torch.full((rows,), 0.9, device=lab.device),
    )


def _rejection(lab: Lab, logits: Tensor, *, seed: int, draft_is_target: bool) -> Tensors:
    """Arguments of `verify_rejection` for logits [B, W, V]; nothing is truncated."""
    batch, width, vocabulary = logits.shape
    draft = _normal(lab, batch, at.GAMMA_MAX, vocabulary, seed=1000 + seed)
    if draft_is_target:
        draft[:, : width - 1] = logits[:, : width - 1]

    def untruncated(x: Tensor) -> tuple[Tensor, Tensor]:
        inverse = torch.full((x.shape[0] * x.shape[1],), 1.25, device=lab.device)
        low, lse = kernels.cutoff(x.flatten(0, 1), inverse)
        return low.view(x.shape[:2]), lse.view(x.shape[:2])

    (low, lse), (draft_low, draft_lse) = untruncated(logits), untruncated(draft)
    return {
        "cutoffs": low,
        "lse": lse,
        "draft_logits": draft,
        "draft_cutoffs": draft_low,
        "draft_lse": draft_lse,
    }


def _unfused(logits: Tensor) -> None:
    """Signals and token in separate PyTorch operations, all on the device."""
    log_p = torch.log_softmax(logits.float(), -1)
    p = log_p.exp()
    (p * log_p).sum(-1)
    p.topk(2, -1)
    logits.argmax(-1)
