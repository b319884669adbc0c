"""Decode with the eager loop, without an engine around it: what the tests of losslessness share."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from types import SimpleNamespace
from unittest.mock import patch

import torch
from torch import Tensor

from speckv.decoding import EagerLoop, RequestBatch
from speckv.decoding.lookup import Lookup
from speckv.kernels import cpu_step, reference
from speckv.kernels import layout as at
from speckv.models.base import CausalModel
from speckv.policies import CostTable, parse_policy
from speckv.sampling import SamplingParams

COST = CostTable.from_parts(draft_ms=0.2, verify_ms=[1.0 + 0.02 * g for g in range(at.WIDTH_MAX)])
"""A synthetic table: a draft forward costs a fifth of a plain step."""

PLAIN = "fixed:0"


@dataclass(frozen=True)
class Decoded:
    """What one row gave.

    Attributes
    ----------
    tokens : list of int
        New tokens.
    steps : list of (gamma, accepted)
    done : int
        ``DONE_STOP`` or ``DONE_LENGTH``.
    """

    tokens: list[int]
    steps: list[tuple[int, int]]
    done: int


def decode(
    target: CausalModel,
    draft: CausalModel | None,
    policy: str | Tensor,
    prompts: Sequence[Sequence[int]],
    params: Sequence[SamplingParams],
    *,
    eos: Sequence[int] = (),
    first_request: int = 0,
    lookup: Lookup | None = None,
    id_map: Tensor | None = None,
) -> list[Decoded]:
    """Decode the prompts as one batch.

    Parameters
    ----------
    policy : str or float32 [POLICY_WORDS]
        A policy's name, or a packed one.
    first_request : int
        Request id of the first row: keys its noise.
    """
    capacity = max(len(p) + q.max_new_tokens for p, q in zip(prompts, params, strict=True))
    if isinstance(policy, str):
        policy = parse_policy(policy).pack(target.compression, COST)
    loop = EagerLoop(
        target, draft, batch=len(prompts), capacity=capacity, id_map=id_map, lookup=lookup
    )
    batch = RequestBatch.build(
        prompts,
        params,
        eos_ids=eos,
        max_length=capacity,
        device=target.device,
        first_request=first_request,
    )
    return decode_with(loop, batch, policy)


def decode_with(loop: EagerLoop, batch: RequestBatch, policy: Tensor) -> list[Decoded]:
    """Decode a batch with a loop that may have decoded others before."""
    rows = [Decoded([], [], at.RUNNING) for _ in batch.prompts]
    for records in loop.run(batch, policy):
        for record in records:
            old = rows[record.row]
            step = [] if record.gamma < 0 else [(record.gamma, record.accepted)]
            rows[record.row] = Decoded(old.tokens + record.tokens, old.steps + step, record.done)
    return rows


def plain(
    target: CausalModel,
    prompts: Sequence[Sequence[int]],
    params: Sequence[SamplingParams],
    *,
    eos: Sequence[int] = (),
) -> list[list[int]]:
    """New tokens of plain decoding, each prompt alone and without a draft model."""
    return [
        decode(target, None, PLAIN, [prompt], [param], eos=eos, first_request=i)[0].tokens
        for i, (prompt, param) in enumerate(zip(prompts, params, strict=True))
    ]


def acceptance(rows: Sequence[Decoded]) -> float:
    """Share of steps whose first draft token was accepted; nan where none drafted.

    It depends on the pair, and little on the policy.
    """
    first = [accepted > 0 for row in rows for gamma, accepted in row.steps if gamma]
    return sum(first) / len(first) if first else float("nan")


@contextmanager
def scripted(script: Sequence[int]) -> Iterator[None]:
    """γ of each step from a list that repeats; request i begins i entries later.

    Stands in for the decision of `reference`, which then serves instead of what is compiled, so it
    holds whatever policy the loop is given.
    """

    def decide(policy: Tensor, rows: list[int], running: list[float]) -> bool:
        step = rows[at.STEP] - 1 + rows[at.REQUEST]  # step 0 is the verification after prefill
        cap = rows[at.LIMIT] - rows[at.LENGTH] - 1
        return rows[at.DRAFTED] >= min(script[step % len(script)], cap)

    nothing_compiled = SimpleNamespace(library=lambda: None)
    with (
        patch.object(cpu_step, "native", nothing_compiled),
        patch.object(reference, "decide", decide),
    ):
        yield


def hugging_face(
    model: torch.nn.Module, prompts: Sequence[Sequence[int]], new: Sequence[int], eos: Sequence[int]
) -> list[list[int]]:
    """New tokens of ``transformers``' greedy ``generate``, each prompt alone."""
    results = []
    for prompt, count in zip(prompts, new, strict=True):
        ids = torch.tensor([prompt])
        with torch.inference_mode():
            output = model.generate(
                ids,
                attention_mask=torch.ones_like(ids),
                max_new_tokens=count,
                do_sample=False,
                num_beams=1,
                repetition_penalty=1.0,
                temperature=None,
                top_p=None,
                top_k=None,
                eos_token_id=list(eos) or None,
                pad_token_id=0,
            )
        results.append(output[0, len(prompt) :].tolist())
    return results
