"""Replay against the loop for pairs of other kinds: vocabularies of their own, other families."""

from __future__ import annotations

import pytest
import torch

from speckv.decoding import EagerLoop, RequestBatch
from speckv.models.base import CausalModel
from speckv.sampling import SamplingParams
from speckv.traces.packed import PackedController
from speckv.traces.record import record
from speckv.traces.replay import replay
from speckv.traces.schema import Answer, join
from tests.decoding.loops import COST, decode_with
from tests.decoding.tiny import FAMILIES, wrapped
from tests.tabular import TabularModel, random_table
from tests.traces.conftest import POLICIES
from tests.traces.synthetic import INFO

VOCAB, EOS = 31, 27
CHOSEN = ("fixed:4", "entropy:1.5", "speckv", "survival", "survival-2", "survival-even")


def assert_steps_are_those_of_the_loop(
    target: CausalModel,
    draft: CausalModel,
    asked: list[Answer],
    eos: list[int],
    id_map: torch.Tensor | None = None,
) -> list[int]:
    """For every chosen policy; γ of all steps of all of them."""
    trace = join(
        INFO, zip(asked, record(target, draft, asked, eos=eos, id_map=id_map), strict=True)
    )
    capacity = max(len(a.prompt_tokens) + a.limit for a in asked)
    loop = EagerLoop(target, draft, batch=1, capacity=capacity, id_map=id_map)
    gammas = []
    for name in CHOSEN:
        packed = POLICIES[name].pack(target.compression, COST)
        found = replay(trace, PackedController(packed), COST)
        gammas += found.gamma.tolist()
        for i, a in enumerate(asked):
            params = SamplingParams(max_new_tokens=a.limit, temperature=a.temperature, seed=a.seed)
            batch = RequestBatch.build(
                [list(a.prompt_tokens)],
                [params],
                eos_ids=eos,
                max_length=capacity,
                device=target.device,
            )
            (row,) = decode_with(loop, batch, packed)
            text = trace.rows.target_token[trace.first[i] : trace.first[i + 1]]
            assert row.tokens == text.tolist()
            assert found.steps_of(i) == row.steps, f"{name}, answer {i}"
    return gammas


def tabular(table: torch.Tensor) -> CausalModel:
    model = TabularModel(table)
    model.eos_ids = (EOS,)
    return model  # type: ignore[return-value]


def many(count: int, limit: int) -> list[Answer]:
    """Answers of every temperature."""
    temperatures = (0.0, 0.7, 1.0)
    return [
        Answer(i, "t", "fp32", temperatures[i % 3], 50 + i, limit - i, tuple(range(1, 2 + i)))
        for i in range(count)
    ]


@pytest.mark.parametrize("kind", ["same", "renamed", "trimmed"])
def test_vocabularies(kind: str) -> None:
    table = random_table(VOCAB, VOCAB, seed=0, scale=2.0)
    table[..., EOS] -= 1.0
    noisy = table + torch.randn(table.shape, generator=torch.Generator().manual_seed(1)) * 0.5
    # Nothing stands before the first position: id 0, which it is looked up by, keeps its place.
    others = 1 + torch.randperm(VOCAB - 1, generator=torch.Generator().manual_seed(3))
    kept = torch.cat((torch.tensor([0]), others[:-4]))
    id_map = None if kind == "same" else kept.int()
    if kind == "renamed":
        noisy = noisy[:, kept][:, :, kept][..., kept]
    if kind == "trimmed":
        noisy = noisy[..., kept]
    gammas = assert_steps_are_those_of_the_loop(
        tabular(table), tabular(noisy), many(9, 50), [EOS], id_map
    )
    assert len(set(gammas)) > 8


@pytest.mark.parametrize("family", [family for family in FAMILIES if family != "llama"])
def test_families(family: str) -> None:
    pair = wrapped(family, "target", "bf16"), wrapped(family, "perturbed", "fp32")
    asked = [
        Answer(a.prompt_id, a.task, "bf16", a.temperature, a.seed, 24, a.prompt_tokens)
        for a in many(3, 24)
    ]
    assert_steps_are_those_of_the_loop(*pair, asked, [90, 117, 160])


def test_a_random_draft_costs_little() -> None:
    """Under ``speckv``, against plain decoding."""
    asked = [Answer(i, "t", "fp32", (0.0, 0.7, 1.0)[i % 3], i, 200, (3 + i, 5)) for i in range(3)]
    pair = wrapped("llama", "target", "fp32"), wrapped("llama", "random", "fp32")
    trace = join(INFO, zip(asked, record(*pair, asked, eos=[]), strict=True))
    ours, plain = (
        replay(trace, PackedController(POLICIES[name].pack("fp32", COST)), COST)
        for name in ("speckv", "fixed:0")
    )
    assert ours.tokens_per_second > 0.98 * plain.tokens_per_second
    assert (ours.gamma > 0).sum() > 10, "it goes on trying"
