"""The kernels that run between the models: interpreter = reference, and the reference by hand."""

from __future__ import annotations

import importlib
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor

from speckv import kernels
from speckv.kernels import layout as at
from speckv.kernels import reference_step as reference
from speckv.kernels.layout import LoopState, StepState
from tests.kernels.steps import Guards, assert_same_state, guarded, random_state

KERNELS: Any = importlib.import_module("speckv.kernels.loop_step")
VOCAB = 211
CAPACITY = 64
DRAFT_POSITIONS = 45
PURPOSES = [
    *((purpose, at.INPUT_WIDTHS[purpose]) for purpose in range(at.INPUTS_VERIFY)),
    *((at.INPUTS_VERIFY, width) for width in (1, 5, 16)),
]


def states(batch: int, seed: int) -> StepState:
    """Rows amid requests, 1 to 30 tokens behind with their drafts; some failed, some reported."""
    generator = torch.Generator().manual_seed(seed)
    state = random_state(batch, at.WIDTH_MAX, VOCAB, generator)
    for b in range(batch):
        row = state.rows[b]
        length = max(int(row[at.LENGTH]), 2)
        row[at.LENGTH] = length
        row[at.DRAFTED] = min(int(row[at.DRAFTED]), CAPACITY - 16 - length)
        lag = int(torch.randint(1, 31, (), generator=generator))
        row[at.DRAFT_LENGTH] = max(length - lag, 0)
        row[at.GAMMA] = int(torch.randint(0, 16, (), generator=generator))
        row[at.ACCEPTED] = int(torch.randint(0, int(row[at.GAMMA]) + 1, (), generator=generator))
        row[at.COMMITTED] = 0 if row[at.DONE] else min(int(row[at.ACCEPTED]) + 1, length - 1)
        row[at.STEP] = 1 + int(row[at.STEP]) % (CAPACITY - 2)
        row[at.ERROR] = at.ERROR_DRAFT if row[at.DONE] == at.DONE_ERROR else 0
        row[at.REPORTED] = int(torch.randint(0, 2, (), generator=generator))
    return state


def loop_state(batch: int, seed: int, *, signals: bool = False) -> LoopState:
    """Poisoned but for what the kernels read."""
    loop = LoopState.allocate(batch, CAPACITY, signals=signals)
    loop.control.copy_(torch.tensor([seed + 1, 7, 7 + seed % 2, 40], dtype=torch.int32))
    loop.cancel.copy_(torch.arange(batch, dtype=torch.int32) % 3 == 1)
    loop.passes.copy_(torch.tensor([3 + seed % 3, 5], dtype=torch.int32))
    for tensor in (loop.tokens, loop.records, loop.conditions, loop.ended):
        tensor.fill_(-77)
    if loop.signals is not None:
        loop.signals.fill_(torch.nan)
    return loop


def copy(state: StepState) -> StepState:
    return StepState(*(tensor.clone() for tensor in vars(state).values()))


def copied(loop: LoopState) -> LoopState:
    return replace(loop, **{n: t.clone() for n, t in vars(loop).items() if t is not None})


def assert_same_loop(actual: LoopState, expected: LoopState) -> None:
    for name, value in vars(expected).items():
        if value is not None:
            found: Tensor = getattr(actual, name)
            assert torch.equal(found.nan_to_num(-1), value.nan_to_num(-1)), name


@pytest.mark.parametrize("batch", [0, 1, 3, 17])
@pytest.mark.parametrize(("purpose", "width"), PURPOSES)
@pytest.mark.parametrize("mapped", [False, True])
def test_inputs(batch: int, purpose: int, width: int, mapped: bool) -> None:
    expected, guards = states(batch, 10 * purpose + width), Guards()
    actual = guarded(expected, guards)
    ids = torch.arange(VOCAB, dtype=torch.int32).flip(0) if mapped else None
    results = []
    for state, step in ((actual, KERNELS.step_inputs_out), (expected, reference.step_inputs)):
        tokens = guards.around(torch.full((batch, width), -1, dtype=torch.int32))
        positions = guards.around(torch.full((batch, width), -1))
        step(state, purpose, tokens=tokens, positions=positions, input_ids=ids)
        results.append((tokens, positions))
    assert torch.equal(results[0][0], results[1][0])
    assert torch.equal(results[0][1], results[1][1])
    assert_same_state(actual, expected)
    guards.check()


@pytest.mark.parametrize("batch", [0, 1, 3, 17])
@pytest.mark.parametrize("signals", [False, True])
@pytest.mark.parametrize("draft_positions", [0, DRAFT_POSITIONS, 4096])
def test_the_close_of_a_step(batch: int, signals: bool, draft_positions: int) -> None:
    expected, guards = states(batch, batch), Guards()
    actual = guarded(expected, guards)
    told = loop_state(batch, batch, signals=signals)
    seen = copied(told)
    KERNELS.close_step_out(actual, seen, draft_positions=draft_positions)
    reference.close_step(expected, told, draft_positions=draft_positions)
    if batch == 0:  # nothing is launched, and no loop has no rows
        return
    assert_same_state(actual, expected)
    assert_same_loop(seen, told)
    guards.check()


@pytest.mark.parametrize("batch", [1, 2, 3, 17])
@pytest.mark.parametrize("seed", range(6))
def test_conditions(batch: int, seed: int) -> None:
    state, expected = states(batch, seed), loop_state(batch, seed)
    if seed == 5:
        state.rows[:, at.DONE] = at.DONE_STOP
    actual = copied(expected)
    KERNELS.publish_conditions_out(state, actual, gamma_cap=4 + seed)
    reference.publish_conditions(state, expected, gamma_cap=4 + seed)
    assert_same_loop(actual, expected)


@pytest.mark.parametrize("batch", [0, 1, 3, 17])
@pytest.mark.parametrize("vocabulary", [1, 257, 4096, 5000])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_kept_drafts(batch: int, vocabulary: int, dtype: torch.dtype) -> None:
    """Rows that draft keep theirs at the next place, the others keep nothing; strided logits."""
    state, guards = states(batch, vocabulary), Guards()
    if batch == 17:
        state.rows[0, at.DRAFTED] = at.GAMMA_MAX
        state.rows[:6, at.DONE] = state.rows[:6, at.STOP] = 0
    logits = torch.randn(batch, vocabulary + 3).to(dtype)[:, :vocabulary]
    cutoffs, lse = torch.randn(batch), torch.randn(batch)
    results = []
    for keep in (KERNELS.keep_draft_out, reference.keep_draft):
        kept = [
            guards.around(torch.full((batch, at.GAMMA_MAX, vocabulary), -7.0, dtype=dtype)),
            guards.around(torch.full((batch, at.GAMMA_MAX), -7.0)),
            guards.around(torch.full((batch, at.GAMMA_MAX), -7.0)),
        ]
        keep(state, logits, cutoffs, lse, kept=kept)
        results.append(kept)
    for actual, expected in zip(*results, strict=True):
        assert torch.equal(actual, expected)
    changed = (results[0][2] != -7.0).sum(1) if batch else torch.zeros(0)
    drafting = (state.rows[:, at.DONE] == 0) & (state.rows[:, at.STOP] == 0)
    assert torch.equal(changed > 0, drafting & (state.rows[:, at.DRAFTED] < at.GAMMA_MAX))
    guards.check()


def one_row(**words: int) -> StepState:
    state = StepState.allocate(1, CAPACITY)
    state.reset(0, list(range(100, 120)), limit=40, request=0)
    for name, value in words.items():
        state.rows[0, getattr(at, name)] = value
    return state


def inputs(state: StepState, purpose: int, width: int) -> tuple[list[int], list[int]]:
    tokens, positions = torch.zeros(1, width, dtype=torch.int32), torch.zeros(1, width).long()
    reference.step_inputs(state, purpose, tokens=tokens, positions=positions)
    return tokens[0].tolist(), positions[0].tolist()


def test_inputs_by_hand() -> None:
    """20 committed tokens 100..119, of which the draft holds 3, and one drafted token."""
    state = one_row(DRAFT_LENGTH=3, STOP=0, DRAFTED=1)
    state.sequence[0, 20] = 7
    assert inputs(state, at.INPUTS_VERIFY, 3) == ([119, 7, 0], [19, 20, 21])
    assert inputs(state, at.INPUTS_NEXT, 1) == ([7], [20])
    assert inputs(state, at.INPUTS_FIRST, 2) == ([118, 119], [18, 19])
    fed = inputs(state, at.INPUTS_CATCH_UP, 16)
    assert fed == (list(range(103, 119)), list(range(3, 19)))
    assert state.rows[0, at.DRAFT_LENGTH] == 19
    inputs(state, at.INPUTS_CATCH_UP, 16)
    assert state.rows[0, at.DRAFT_LENGTH] == 20, "no further than what is committed"
    state.rows[0, at.STOP] = 1
    assert inputs(state, at.INPUTS_FIRST, 2) == ([118, 119], [18, 19]), "what the cache holds"
    state.rows[0, at.DRAFT_LENGTH] = 1
    assert inputs(state, at.INPUTS_CATCH_UP, 16)[1] == list(range(16)), "never before the start"
    assert state.rows[0, at.DRAFT_LENGTH] == 1


def test_the_close_by_hand() -> None:
    """3 of 4 drafted tokens were accepted: tokens 16 to 19 are new."""
    state = one_row(STOP=0, GAMMA=4, ACCEPTED=3, COMMITTED=4, STEP=2, DRAFT_LENGTH=14)
    loop = LoopState.allocate(1, CAPACITY)
    loop.control[at.GENERATION] = 5
    reference.close_step(state, loop, draft_positions=100)
    assert loop.records[0].tolist() == [0, 5 << 32 | 4 << 16 | 3 << 8 | 4] + [0] * 62
    assert loop.tokens[0, 15:21].tolist() == [0, *(5 << 32 | t for t in range(116, 120)), 0]
    assert state.rows[0, at.DRAFT_LENGTH] == 19
    assert (state.rows[0, at.STOP], state.rows[0, at.DONE]) == (0, at.RUNNING)
    loop.cancel[0] = 1
    reference.close_step(state, loop, draft_positions=34)
    assert (state.rows[0, at.STOP], state.rows[0, at.DONE]) == (1, at.DONE_STOP)
    assert loop.control[at.STEPS] == 2


def test_an_error_is_told_once() -> None:
    state = one_row(DONE=at.DONE_ERROR, ERROR=at.ERROR_TARGET, STEP=3)
    loop = LoopState.allocate(1, CAPACITY)
    for _ in range(2):
        reference.close_step(state, loop)
        told = at.ERROR_TARGET << at.RECORD_ERROR | at.DONE_ERROR << at.RECORD_DONE
        assert loop.records[0].tolist() == [0, 0, 0, told] + [0] * 60
        loop.control[at.GENERATION] = 9


def test_conditions_by_hand() -> None:
    state = StepState.allocate(2, CAPACITY)
    for b in range(2):
        state.reset(b, [1, 2, 3, 4], limit=20, request=b)
    state.rows[0, at.STOP] = 0
    state.rows[0, at.DRAFT_LENGTH] = 2
    state.rows[1, at.DRAFTED] = 5
    loop = LoopState.allocate(2, CAPACITY)
    loop.control[at.MOST_STEPS] = 1
    reference.publish_conditions(state, loop)
    assert loop.conditions.tolist() == [1 << 32 | value for value in (1, 1, 0, 5, 15)]
    assert loop.ended[0] == 0
    state.rows[0, at.DRAFT_LENGTH] = 1
    loop.control[at.STEPS], loop.control[at.GENERATION] = 1, 6
    reference.publish_conditions(state, loop, gamma_cap=4)
    assert loop.conditions.tolist() == [2 << 32 | value for value in (0, 1, 1, 5, 4)]
    assert loop.ended[0] == 6 << 32 | 1, "a bound ends the loop too"
    state.rows[0, at.LIMIT] = 7
    reference.publish_conditions(state, loop)
    assert int(loop.conditions[at.FIXED_GAMMA]) & 0xFF == 2, "the token that closes the step"


def test_the_loops_within_a_step_are_bounded() -> None:
    """64 positions are 4 chunks of catching up; 15 draft tokens; the close, and the beginning."""
    state, loop = one_row(STOP=0, DRAFT_LENGTH=1), LoopState.allocate(1, CAPACITY)
    loop.control[at.MOST_STEPS] = 9
    assert loop.passes.tolist() == [0, 4 + 15 + 2]
    for kernel in (reference.publish_conditions, KERNELS.publish_conditions_out):
        reference.close_step(state, loop, draft_positions=100)
        published = []
        for _ in range(23):
            kernel(state, loop)
            published.append((loop.conditions & 0xFF).tolist()[:3])
        assert published == [[1, 1, 1]] * 21 + [[1, 0, 0]] * 2


def refused(text: str, call: Any, *arguments: Any, **named: Any) -> None:
    with pytest.raises((TypeError, ValueError), match=text):
        call(*arguments, **named)


def test_bad_arguments_are_refused() -> None:
    state, loop = one_row(), LoopState.allocate(1, CAPACITY)
    tokens, positions = torch.zeros(1, 2, dtype=torch.int32), torch.zeros(1, 2).long()
    good: dict[str, Tensor] = {"tokens": tokens, "positions": positions}
    kernels.step_inputs(state, at.INPUTS_FIRST, **good)
    refused("purpose: expected 0 to 3", kernels.step_inputs, state, 4, **good)
    refused("tokens: expected 16 a row", kernels.step_inputs, state, at.INPUTS_CATCH_UP, **good)
    wide = {"tokens": tokens.new_zeros(1, 17), "positions": positions.new_zeros(1, 17)}
    refused("tokens: expected 1 to 16", kernels.step_inputs, state, at.INPUTS_VERIFY, **wide)
    bad = {**good, "positions": positions.int()}
    refused("positions: expected int64", kernels.step_inputs, state, at.INPUTS_FIRST, **bad)
    bad = {**good, "input_ids": positions[0]}
    refused("input_ids: expected int32", kernels.step_inputs, state, at.INPUTS_FIRST, **bad)
    kernels.close_step(state, loop)
    kernels.publish_conditions(state, loop)
    other = LoopState.allocate(2, CAPACITY)
    refused("loop.cancel: expected int32 .1.", kernels.close_step, state, other)
    refused("loop.cancel: expected int32 .1.", kernels.publish_conditions, state, other)
    logits, column = torch.zeros(1, 9), torch.zeros(1)
    kept = [torch.zeros(1, 15, 9), torch.zeros(1, 15), torch.zeros(1, 15)]
    kernels.keep_draft(state, logits, column, column, kept=kept)
    refused("kept: expected", kernels.keep_draft, state, logits, column, column, kept=kept[:2])
    kept[0] = kept[0][:, :, 1:]
    refused("kept.0.: expected", kernels.keep_draft, state, logits, column, column, kept=kept)
    short = replace(loop, records=loop.records[:, :-1].contiguous())
    refused("loop.records: expected int64", kernels.close_step, state, short)
