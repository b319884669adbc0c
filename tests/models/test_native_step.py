"""The compiled `draft_step` and `verify` equal the reference's, over its kernels' own cases."""

from __future__ import annotations

import copy
import math
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

from speckv.kernels import cpu_step, native, reference
from speckv.kernels import layout as at
from tests.kernels.cases import POLICIES, GuardedState, fixed, random_logits, sampling
from tests.kernels.steps import (
    MODES,
    Guards,
    fixed_policy,
    guarded,
    mlp_policy,
    verify_case,
)
from tests.tolerances import assert_close

DTYPES = (torch.float32, torch.float16, torch.bfloat16)


@pytest.fixture(autouse=True)
def library(request: pytest.FixtureRequest) -> None:
    """Skips visibly where the library is switched off or there is no compiler."""
    if native.library() is None and "without_a_compiler" not in request.node.name:
        pytest.skip(f"data: no native library ({native.status()})")


def check(
    logits: Tensor, start: GuardedState, policy: Tensor, steps: int = 1, **options: Any
) -> GuardedState:
    """Compiled and plain from ``start`` agree, beside what they may not touch too."""
    ours, expected = start.clone(), start.clone()
    for _ in range(steps):
        cpu_step.draft_step(logits, ours.state, policy, **options)
        reference.draft_step(logits, expected.state, policy, **options)
    for got, wanted in zip(ours.whole, expected.whole, strict=True):
        if got.dtype == torch.int32:
            assert torch.equal(got, wanted)
        else:
            assert_close(got, wanted, torch.float32)
    return ours


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("vocabulary", [1, 7, 111, 1031, 8192])
@pytest.mark.parametrize("sampled", [False, True], ids=["greedy", "sampled"])
def test_draft_step(vocabulary: int, dtype: torch.dtype, sampled: bool) -> None:
    for batch in (1, 3, 17):
        start = GuardedState(batch)
        start.state.rows[:, at.DRAFTED] = torch.arange(batch).int() % 3
        start.state.rows[:, at.STOP] = (torch.arange(batch).int() % 7 == 3).int()
        start.state.rows[:, at.DONE] = (torch.arange(batch).int() % 7 == 5).int()
        options = sampling(batch) if sampled else {}
        check(random_logits(batch, vocabulary, dtype), start, fixed(), **options)


@pytest.mark.parametrize("name", POLICIES)
@pytest.mark.parametrize("sampled", [False, True], ids=["greedy", "sampled"])
def test_a_whole_step_under_every_policy(name: str, sampled: bool) -> None:
    options = sampling(4) if sampled else {}
    start = GuardedState(4)
    start.state.rows[2, at.LIMIT] = 7  # unequal ends: room for one draft token
    check(random_logits(4, 111, torch.float32), start, POLICIES[name], 5, **options)


@pytest.mark.parametrize("coupling", ["gumbel", "rejection"])
@pytest.mark.parametrize("mapped", [False, True], ids=["same ids", "id map"])
@pytest.mark.parametrize("cutoffs", [False, True], ids=["all", "cutoffs"])
def test_sampling_options(coupling: str, mapped: bool, cutoffs: bool) -> None:
    logits = random_logits(5, 257, torch.bfloat16, seed=4)
    options: dict[str, Any] = {**sampling(5), "coupling": coupling}
    if mapped:
        ids = torch.randperm(49_152, generator=torch.Generator().manual_seed(1))[:257]
        options["id_map"] = ids.to(torch.int32)
    if cutoffs:
        options["cutoffs"] = logits.float().topk(9).values[:, -1].contiguous()
    check(logits, GuardedState(5), fixed(), 2, **options)


@pytest.mark.parametrize("sampled", [False, True], ids=["greedy", "sampled"])
def test_edges(sampled: bool) -> None:
    rows = torch.full((9, 1031), -2.0)
    rows[0] = 0.0  # all equal
    rows[1, [5, 300, 1030]] = 4.0  # a tie
    rows[2] = -math.inf
    rows[2, 1030] = 1.0  # one-hot in the tail
    rows[3, :515] = -math.inf
    rows[4, 0], rows[4, 1] = 3e38, -3e38
    rows[5] = torch.finfo(torch.float32).min
    rows[6, 700] = math.nan
    rows[7, 1030] = math.inf
    rows[8] = -math.inf
    options = sampling(9) if sampled else {}
    out = check(rows, GuardedState(9), fixed(), **options)
    assert out.state.rows[:, at.ERROR].tolist() == [0] * 6 + [at.ERROR_DRAFT] * 3
    if not sampled:
        first = [int(out.state.sequence[b, 3 + b % 5]) for b in range(5)]
        assert first == [0, 5, 1030, 515, 0]


@pytest.mark.parametrize("seed", range(8))
def test_draws_of_many_positions(seed: int) -> None:
    """What is skipped, because no draw could lift it, is never the best."""
    logits = random_logits(64, 1500, torch.float32, seed) * (0.1 + seed)
    options = {
        "inv_temperature": torch.full((64,), 1.0),
        "seeds": torch.arange(64) * 7919 + seed,
    }
    check(logits, GuardedState(64), fixed(), **options)


def compare(logits: Tensor, state: at.StepState, policy: Tensor, **arguments: Any) -> at.StepState:
    expected, guards = copy.deepcopy(state), Guards()
    actual = guarded(state, guards)
    reference.verify(logits, expected, policy, **arguments)
    cpu_step.verify(logits, actual, policy, **arguments)
    guards.check()
    for name in ("rows", "sequence", "signals"):
        assert torch.equal(getattr(actual, name), getattr(expected, name))
    assert_close(actual.running, expected.running, torch.float32)
    return expected


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("gamma", [1, 3, 7, 15])
def test_verify(gamma: int, dtype: torch.dtype, mode: str) -> None:
    for vocabulary in (1, 7, 257, 1031):
        for batch, share in ((1, 0.9), (3, 0.0), (17, 0.8), (17, 1.0)):
            logits, state, arguments = verify_case(
                batch, gamma + 1, vocabulary, dtype, mode, share, seed=vocabulary + batch
            )
            compare(logits, state, fixed_policy(gamma), **arguments)


@pytest.mark.parametrize("objective", [at.OBJECTIVE_TOKENS, at.OBJECTIVE_RATE])
@pytest.mark.parametrize("layout", [at.LAYOUT_SURVIVAL, at.LAYOUT_PAPER])
def test_what_a_verification_decides(layout: int, objective: int) -> None:
    stops = set()
    for seed in range(40):
        policy = mlp_policy(torch.Generator().manual_seed(seed), layout, objective)
        policy[at.EXPECTED_ACCEPTANCE] = 0.7 * (seed % 2)
        logits, state, arguments = verify_case(5, 4, 111, torch.float32, "sampled", 0.7, seed)
        stops |= set(compare(logits, state, policy, **arguments).rows[:, at.STOP].tolist())
    assert stops == {0, 1} or layout == at.LAYOUT_PAPER


def test_text_that_repeats_itself() -> None:
    generator = torch.Generator().manual_seed(3)
    lengths = set()
    for seed in range(60):
        logits, state, arguments = verify_case(4, 4, 3, torch.float32, "greedy", 0.7, seed)
        policy = mlp_policy(generator, at.LAYOUT_SURVIVAL, at.OBJECTIVE_RATE)
        after = compare(logits, state, policy, **arguments)
        lengths |= set(after.rows[:, at.MATCH_LENGTH].tolist())
    assert lengths >= {1, 2, 3, 4}


def test_a_bad_row_of_the_target_ends_it() -> None:
    logits, state, arguments = verify_case(3, 4, 111, torch.float32, "greedy", 1.0, seed=2)
    state.rows[:, at.DONE] = at.RUNNING
    logits[1, 0, 110] = math.nan
    after = compare(logits, state, fixed_policy(3), **arguments)
    assert int(after.rows[1, at.ERROR]) == at.ERROR_TARGET


def test_the_best_gamma() -> None:
    chosen = set()
    for seed in range(60):
        generator = torch.Generator().manual_seed(seed)
        policy = mlp_policy(generator, seed % 2, seed // 2 % 2)
        rows = [0] * at.ROW_WORDS
        rows[at.LENGTH], rows[at.DRAFTED], rows[at.MATCH_LENGTH] = 40, seed % 4, seed % 5
        running = torch.rand(at.RUNNING_WORDS, generator=generator).tolist()
        ours = cpu_step.best_gamma(policy, rows, running)
        assert ours == reference.best_gamma(policy, rows, running)
        chosen.add(ours)
    assert len(chosen) > 5


@pytest.mark.parametrize("name", ["draft_step", "verify", "best_gamma"])
def test_without_a_compiler_the_reference_serves(
    name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    called: list[str] = []

    def noted(*arguments: Any, **named: Any) -> None:
        called.append(name)

    monkeypatch.setattr(native, "library", lambda: None)
    monkeypatch.setattr(reference, name, noted)
    operation: Callable[..., Any] = getattr(cpu_step, name)
    operation(None, None, None)
    assert called == [name]
