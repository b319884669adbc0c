"""Hand-worked cases of `reference.verify`, `reference.verify_rejection` and `reference.cutoff`."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor

from speckv.kernels import layout as at
from speckv.kernels import reference
from speckv.kernels.layout import StepState
from tests.kernels.steps import fixed_policy

pytestmark = pytest.mark.interpreter

PROMPT = [9, 9, 9]
COUNTERS = (
    "LENGTH",
    "DRAFTED",
    "STOP",
    "DONE",
    "GAMMA",
    "ACCEPTED",
    "COMMITTED",
    "STEP",
    "PLAIN_RUN",
    "ERROR",
)


def one_row(drafts: list[int], limit: int = 20, **words: int) -> StepState:
    """A row after ``PROMPT`` with draft tokens; further words of its counters by name."""
    state = StepState.allocate(1, 32)
    state.reset(0, PROMPT, limit=limit, request=5)
    length = len(PROMPT)
    state.sequence[0, length : length + len(drafts)] = torch.tensor(drafts, dtype=torch.int32)
    state.rows[0, at.DRAFTED] = len(drafts)
    for name, value in words.items():
        state.rows[0, getattr(at, name)] = value
    return state


def choosing(*tokens: int, vocabulary: int = 12) -> Tensor:
    """Logits [1, W, V] whose argmax is ``tokens``."""
    logits = torch.zeros(1, len(tokens), vocabulary)
    logits[0, torch.arange(len(tokens)), torch.tensor(tokens)] = 4.0
    return logits


def run(state: StepState, logits: Tensor, eos: list[int] | None = None, **words: float) -> dict:
    """Verify greedily; the counters by name, and the sequence up to LENGTH."""
    policy = fixed_policy(int(words.get("gamma", 4)), words.get("ema", 0.1))
    reference.verify(logits, state, policy, eos=torch.tensor([eos or [-1]], dtype=torch.int32))
    row = state.rows[0].tolist()
    result = {name.lower(): row[getattr(at, name)] for name in COUNTERS}
    result["new"] = state.sequence[0, len(PROMPT) : row[at.LENGTH]].tolist()
    return result


@pytest.mark.parametrize(
    ("drafts", "chosen", "new", "accepted"),
    [
        ([], [7], [7], 0),
        ([1, 2, 3], [8, 2, 3, 4], [8], 0),
        ([1, 2, 3], [1, 8, 3, 4], [1, 8], 1),
        ([1, 2, 3], [1, 2, 8, 4], [1, 2, 8], 2),
        ([1, 2, 3], [1, 2, 3, 4], [1, 2, 3, 4], 3),
    ],
)
def test_acceptance(drafts: list[int], chosen: list[int], new: list[int], accepted: int) -> None:
    after = run(one_row(drafts, STEP=6), choosing(*chosen))
    assert after == {
        "length": 3 + len(new),
        "drafted": 0,
        "stop": 0,
        "done": at.RUNNING,
        "gamma": len(drafts),
        "accepted": accepted,
        "committed": len(new),
        "step": 7,
        "plain_run": 0 if drafts else 1,
        "error": 0,
        "new": new,
    }


def test_positions_beyond_drafted_are_not_read() -> None:
    logits = torch.cat([choosing(1, 5), torch.full((1, 2, 12), torch.nan)], 1)
    assert run(one_row([1]), logits)["new"] == [1, 5]


@pytest.mark.parametrize(
    ("chosen", "eos", "new", "accepted"),
    [
        ([1, 2, 3, 4], [2], [1, 2], 2),
        ([1, 2, 3, 4], [4, 1], [1], 1),
        ([1, 2, 3, 4], [11, 4, -1], [1, 2, 3, 4], 3),
        ([1, 8, 3, 4], [8], [1, 8], 1),
    ],
)
def test_commitment_ends_with_the_first_eos(
    chosen: list[int], eos: list[int], new: list[int], accepted: int
) -> None:
    after = run(one_row([1, 2, 3]), choosing(*chosen), eos)
    assert after["new"] == new and after["committed"] == len(new)
    assert after["accepted"] == accepted and after["gamma"] == 3
    assert after["done"] == at.DONE_STOP and after["stop"] == 1


def test_eos_behind_the_accepted_run_does_not_count() -> None:
    after = run(one_row([1, 2, 3]), choosing(1, 8, 3, 4), [3, 4])
    assert after["new"] == [1, 8] and after["done"] == at.RUNNING


@pytest.mark.parametrize(
    ("limit", "new", "accepted", "done"),
    [
        (4, [1], 1, at.DONE_LENGTH),
        (6, [1, 2, 3], 3, at.DONE_LENGTH),
        (7, [1, 2, 3, 4], 3, at.DONE_LENGTH),
        (8, [1, 2, 3, 4], 3, at.RUNNING),
    ],
)
def test_commitment_ends_at_the_limit(limit: int, new: list[int], accepted: int, done: int) -> None:
    after = run(one_row([1, 2, 3], limit), choosing(1, 2, 3, 4))
    assert after["new"] == new and after["accepted"] == accepted and after["done"] == done
    # One token is left at a limit of 8: there is no room for a draft token beside the target's.
    assert after["stop"] == 1


def test_eos_at_the_limit_is_a_stop_and_behind_it_is_not_seen() -> None:
    assert run(one_row([1, 2], 5), choosing(1, 2, 3), [2])["done"] == at.DONE_STOP
    after = run(one_row([1, 2], 4), choosing(1, 2, 3), [2])
    assert after["done"] == at.DONE_LENGTH and after["new"] == [1]


@pytest.mark.parametrize("done", [at.DONE_STOP, at.DONE_LENGTH, at.DONE_ERROR])
def test_rows_that_are_done_only_lose_their_committed_count(done: int) -> None:
    state = one_row([1, 2], DONE=done, COMMITTED=3, STEP=2)
    before, running = state.rows.clone(), state.running.clone()
    reference.verify(
        torch.full((1, 3, 12), torch.nan), state, fixed_policy(4), eos=torch.tensor([[1]])
    )
    before[0, at.COMMITTED] = 0
    assert torch.equal(state.rows, before) and torch.equal(state.running, running)


def test_acceptance_average_sees_drafting_steps_only() -> None:
    state = one_row([1, 2, 3, 4])
    run(state, choosing(1, 2, 3, 8, 8), ema=0.25)
    # 0.5 + 0.25 * (3 / 4 - 0.5)
    assert state.running[0, at.ACCEPTANCE].item() == pytest.approx(0.5625)
    run(state, choosing(6), ema=0.25)
    assert state.running[0, at.ACCEPTANCE].item() == pytest.approx(0.5625)


def test_acceptance_average_ignores_truncation() -> None:
    """What the limit or an EOS cut off was accepted all the same."""
    state = one_row([1, 2], limit=4)
    run(state, choosing(1, 2, 3), ema=0.5)
    assert state.running[0, at.ACCEPTANCE].item() == pytest.approx(0.75)


def test_plain_steps_are_counted_until_a_step_drafts() -> None:
    state = one_row([], PLAIN_RUN=4)
    assert run(state, choosing(6))["plain_run"] == 5
    assert run(state, choosing(6))["plain_run"] == 6
    state.rows[0, at.DRAFTED] = 1
    assert run(state, choosing(6, 7))["plain_run"] == 0


def test_next_step_stops_at_once_under_plain_decoding() -> None:
    assert run(one_row([]), choosing(6), gamma=0)["stop"] == 1
    assert run(one_row([]), choosing(6), gamma=1)["stop"] == 0


@pytest.mark.parametrize("bad", [math.nan, math.inf])
def test_a_spoilt_position_matters_only_where_it_is_used(bad: float) -> None:
    logits = choosing(1, 8, 3, 4)
    logits[0, 2, 7] = bad
    assert run(one_row([1, 2, 3]), logits)["new"] == [1, 8]

    logits = choosing(1, 2, 3, 4)
    logits[0, 2, 7] = bad
    state = one_row([1, 2, 3], COMMITTED=2)
    before = state.sequence.clone()
    after = run(state, logits)
    assert after["error"] == at.ERROR_TARGET and after["done"] == at.DONE_ERROR
    assert after["length"] == 3 and after["committed"] == 0 and after["drafted"] == 3
    assert torch.equal(state.sequence, before)


def test_ties_go_to_the_lowest_id() -> None:
    logits = torch.zeros(1, 1, 12)
    logits[0, 0, [4, 7, 11]] = 1.0
    assert run(one_row([]), logits)["new"] == [4]


def test_gumbel_coupling_commits_what_plain_sampling_yields() -> None:
    """Whatever is drafted: every length of draft, each accepted up to its first difference."""
    generator = torch.Generator().manual_seed(3)
    logits = torch.randn(1, 4, 12, generator=generator)
    inv, seeds = torch.tensor([0.8]), torch.tensor([77])
    eos = torch.tensor([[-1]], dtype=torch.int32)
    plain: list[int] = []
    for j in range(4):
        noise = reference.gumbel(77, 5, 3 + j, torch.arange(12))
        plain.append(int((logits[0, j] * 0.8 + noise).argmax()))
    for accepted in range(4):
        drafts = plain[:3].copy()
        if accepted < 3:
            drafts[accepted] = (drafts[accepted] + 1) % 12
        state = one_row(drafts)
        reference.verify(logits, state, fixed_policy(4), eos=eos, inv_temperature=inv, seeds=seeds)
        assert state.sequence[0, 3 : 4 + accepted].tolist() == plain[: accepted + 1]
        assert int(state.rows[0, at.ACCEPTED]) == accepted


def rejection(
    p: list[list[float]], q: list[list[float]], drafts: list[int], draft_ids: Tensor | None = None
) -> list[int]:
    """New tokens of one sampled row, from probabilities."""
    logits = torch.tensor([p]).log()
    draft_logits = torch.zeros(1, at.GAMMA_MAX, len(q[0]))
    draft_logits[0, : len(q)] = torch.tensor(q).log()
    state = one_row(drafts)
    width = logits.shape[1]
    reference.verify_rejection(
        logits,
        state,
        fixed_policy(4),
        eos=torch.tensor([[-1]], dtype=torch.int32),
        inv_temperature=torch.ones(1),
        seeds=torch.tensor([1234]),
        cutoffs=torch.full((1, width), -math.inf),
        lse=logits.logsumexp(-1),
        draft_logits=draft_logits,
        draft_cutoffs=torch.full((1, at.GAMMA_MAX), -math.inf),
        draft_lse=draft_logits.logsumexp(-1),
        draft_ids=draft_ids,
    )
    return state.sequence[0, 3 : int(state.rows[0, at.LENGTH])].tolist()


def test_rejection_accepts_what_the_target_likes_better_and_ends_with_the_bonus() -> None:
    assert rejection([[0.2, 0.8, 0.0], [0.0, 0.0, 1.0]], [[0.5, 0.5, 0.0]], [1]) == [1, 2]


def test_rejection_replaces_from_the_residual() -> None:
    """p of the draft token is 0, and only token 2 has more of p than of q."""
    assert rejection([[0.5, 0.0, 0.5], [1.0, 0.0, 0.0]], [[0.5, 0.5, 0.0]], [1]) == [2]


def test_rejection_maps_target_ids_to_draft_ids() -> None:
    """The draft's id 0 is target id 2, its id 1 target id 0; token 1 it does not know."""
    ids = torch.tensor([1, -1, 0], dtype=torch.int32)
    assert rejection([[0.5, 0.5, 0.0], [1.0, 0.0, 0.0]], [[0.5, 0.5]], [2], ids) == [1]
    assert rejection([[0.0, 0.0, 1.0], [1.0, 0.0, 0.0]], [[0.5, 0.5]], [2], ids) == [2, 0]


def test_rejection_of_a_greedy_row_compares_with_the_argmax() -> None:
    state = one_row([1, 2])
    reference.verify_rejection(
        choosing(1, 8, 3),
        state,
        fixed_policy(4),
        eos=torch.tensor([[-1]], dtype=torch.int32),
        inv_temperature=torch.zeros(1),
        seeds=torch.zeros(1, dtype=torch.int64),
        cutoffs=torch.full((1, 3), -math.inf),
        lse=torch.zeros(1, 3),
        draft_logits=torch.zeros(1, at.GAMMA_MAX, 12),
        draft_cutoffs=torch.full((1, at.GAMMA_MAX), -math.inf),
        draft_lse=torch.zeros(1, at.GAMMA_MAX),
    )
    assert state.sequence[0, 3 : int(state.rows[0, at.LENGTH])].tolist() == [1, 8]


PROBABILITIES = torch.tensor([0.05, 0.4, 0.1, 0.3, 0.15])


@pytest.mark.parametrize(
    ("k", "p", "kept"),
    [
        (0, 1.0, [0, 1, 2, 3, 4]),
        (5, 1.0, [0, 1, 2, 3, 4]),
        (1, 1.0, [1]),
        (3, 1.0, [1, 3, 4]),
        (0, 0.39, [1]),
        (0, 0.41, [1, 3]),
        (0, 0.69, [1, 3]),
        (0, 0.71, [1, 3, 4]),
        (3, 0.8, [1, 3]),  # 0.4 + 0.3 of 0.85
        (3, 0.83, [1, 3, 4]),
        (2, 0.5, [1]),  # 0.4 of 0.7
    ],
)
def test_cutoff(k: int, p: float, kept: list[int]) -> None:
    logits = PROBABILITIES.log()[None]
    low, lse = reference.cutoff(
        logits, torch.ones(1), torch.tensor([k], dtype=torch.int32), torch.tensor([p])
    )
    assert torch.nonzero(logits[0] >= low).flatten().tolist() == kept
    assert lse.item() == pytest.approx(math.log(float(PROBABILITIES[kept].sum())), abs=1e-6)


def test_cutoff_applies_the_temperature_first() -> None:
    """Squared, 0.4 weighs 0.16 of 0.295 (0.54), with 0.3 it is 0.25 of 0.295 (0.85)."""
    logits = PROBABILITIES.log()[None]
    low, _ = reference.cutoff(logits, torch.tensor([2.0]), None, torch.tensor([0.5]))
    assert torch.nonzero(logits[0] >= low).flatten().tolist() == [1]
    low, _ = reference.cutoff(logits, torch.tensor([0.0]), None, torch.tensor([0.5]))
    assert torch.nonzero(logits[0] >= low).flatten().tolist() == [1, 3]


def test_cutoff_of_a_row_without_a_token() -> None:
    logits = torch.tensor([[0.0, math.nan], [0.0, math.inf], [-math.inf, -math.inf], [0.0, 0.0]])
    low, lse = reference.cutoff(logits, torch.ones(4), None, torch.full((4,), 0.9))
    assert low.tolist() == [-math.inf] * 3 + [0.0]
    assert lse.isnan().tolist() == [True, True, True, False]
