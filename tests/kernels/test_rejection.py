"""The `verify_rejection` kernel in the interpreter equals `reference.verify_rejection`.

Both see the same Philox draws, so tokens and counts agree exactly.
"""

from __future__ import annotations

import copy
from dataclasses import replace

import pytest
import torch
from torch import Tensor

from speckv.kernels import layout as at
from speckv.kernels import reference
from speckv.kernels.layout import StepState
from speckv.kernels.rejection import (
    VerifyRejection,
    _select_config,
    verify_rejection,
    verify_rejection_out,
)
from speckv.kernels.split import ChoiceScratch, SplitConfig, split_row
from tests.kernels.steps import (
    Guards,
    RejectionCase,
    assert_same_state,
    fixed_policy,
    guarded,
    rejection_case,
    truncation,
)

pytestmark = [
    pytest.mark.interpreter,
    # The interpreter's numpy warns of NaN in rows that are invalid anyhow.
    pytest.mark.filterwarnings("ignore:invalid value encountered:RuntimeWarning"),
]

DTYPES = [torch.float32, torch.float16, torch.bfloat16]


def launch(case: RejectionCase, config: SplitConfig | None = None) -> StepState:
    """The state after `verify_rejection_out` on guarded copies and poisoned scratch."""
    guards = Guards()
    batch, width, vocabulary = case.logits.shape
    config = config or _select_config(vocabulary)
    scratch = ChoiceScratch.allocate(batch, width, config, "cpu", channels=2)
    scratch = replace(
        scratch,
        score=guards.around(scratch.score.fill_(torch.nan)),
        token=guards.around(scratch.token.fill_(-7)),
        counter=guards.around(scratch.counter),
    )
    after = guarded(case.state, guards)
    policy = fixed_policy(4)
    verify_rejection_out(case.logits, after, policy, scratch=scratch, **case.arguments)
    guards.check()
    assert not scratch.counter.any()
    return after


def compare(case: RejectionCase, config: SplitConfig | None = None) -> StepState:
    """Run kernel and reference on copies of the state; they agree, and the result is returned."""
    expected = copy.deepcopy(case.state)
    reference.verify_rejection(case.logits, expected, fixed_policy(4), **case.arguments)
    assert_same_state(launch(case, config), expected)
    return expected


@pytest.mark.parametrize("trimmed", [False, True], ids=["same-ids", "id-map"])
@pytest.mark.parametrize("vocabulary", [1, 7, 111, 257])
@pytest.mark.parametrize("gamma", [1, 3, 7])
@pytest.mark.parametrize("batch", [0, 1, 3, 17])
def test_grid(batch: int, gamma: int, vocabulary: int, trimmed: bool) -> None:
    """The data type varies along, so that each meets every batch, γ and vocabulary."""
    dtype = DTYPES[(batch + gamma // 2 + vocabulary // 7 + trimmed) % 3]
    seed = vocabulary + batch
    case = rejection_case(batch, gamma + 1, vocabulary, dtype, seed=seed, trimmed=trimmed)
    compare(case)


@pytest.mark.parametrize("trimmed", [False, True], ids=["same-ids", "id-map"])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("vocabulary", [257, 1031])
def test_dtypes(vocabulary: int, dtype: torch.dtype, trimmed: bool) -> None:
    compare(rejection_case(3, 4, vocabulary, dtype, seed=13, trimmed=trimmed))


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_a_certain_draft(dtype: torch.dtype) -> None:
    """A token that was looked up, not drawn: the rest of its row is -inf."""
    case = rejection_case(17, 5, 257, dtype, seed=3)
    draft_logits = torch.full((17, at.GAMMA_MAX, 257), -torch.inf, dtype=dtype)
    for b, row in enumerate(case.state.rows.tolist()):
        for j in range(row[at.DRAFTED]):
            draft_logits[b, j, int(case.state.sequence[b, row[at.LENGTH] + j])] = 0.0
    certain = torch.zeros(17, at.GAMMA_MAX)
    case.arguments |= {
        "draft_logits": draft_logits, "draft_cutoffs": certain, "draft_lse": certain,
    }  # fmt: skip
    after = compare(case)
    live = after.rows[:, at.COMMITTED] > 0
    assert (after.rows[live, at.ACCEPTED] > 0).any()
    assert (after.rows[live, at.ACCEPTED] < after.rows[live, at.GAMMA]).any()


@pytest.mark.parametrize("trimmed", [False, True], ids=["same-ids", "id-map"])
@pytest.mark.parametrize(
    ("top_k", "top_p"), [(0, 1.0), (20, 1.0), (0, 0.8), (30, 0.7)], ids=["all", "k", "p", "kp"]
)
@pytest.mark.parametrize("similarity", [0.0, 1.0])
def test_batch_of_17_with_unequal_gamma(
    similarity: float, top_k: int, top_p: float, trimmed: bool
) -> None:
    case = rejection_case(
        17, 8, 111, torch.bfloat16, seed=31, similarity=similarity, trimmed=trimmed,
        top_k=top_k, top_p=top_p,
    )  # fmt: skip
    after = compare(case)
    live = case.state.rows[:, at.DONE] == at.RUNNING
    sampled = live & (case.arguments["inv_temperature"] > 0)
    accepted, gamma = after.rows[sampled, at.ACCEPTED], after.rows[sampled, at.GAMMA]
    if similarity == 1.0 and not trimmed:
        ended = after.rows[sampled, at.DONE] != at.RUNNING
        assert ((accepted == gamma) | ended).all()
    if similarity == 0.0:
        assert (accepted < gamma).any()


@pytest.mark.parametrize("width", [1, 2, 16])
def test_widths(width: int) -> None:
    case = rejection_case(3, width, 257, torch.float16, seed=width, similarity=0.97)
    case.state.rows[:, at.DRAFTED] = 0
    compare(case)
    case = rejection_case(3, width, 257, torch.float16, seed=width, similarity=1.0)
    compare(case)


@pytest.mark.parametrize("trimmed", [False, True], ids=["same-ids", "id-map"])
@pytest.mark.parametrize("vocabulary", [128, 1031])
@pytest.mark.parametrize("max_splits", [1, 3, 64])
def test_splits_do_not_matter(max_splits: int, vocabulary: int, trimmed: bool) -> None:
    case = rejection_case(4, 4, vocabulary, torch.float32, seed=17, trimmed=trimmed, similarity=0.5)
    split = launch(case, split_row(vocabulary, block=128, max_splits=max_splits))
    whole = compare(case)
    assert torch.equal(split.rows, whole.rows)
    assert torch.equal(split.sequence, whole.sequence)


def test_large_vocabulary() -> None:
    case = rejection_case(
        3, 4, 49_152, torch.bfloat16, seed=2, similarity=0.9, top_p=0.9, trimmed=True
    )
    compare(case)


def test_target_is_drawn_from_where_rounding_leaves_no_residual() -> None:
    """The draft is the target, but its token is not accepted: q of it is too large by intent."""
    case = rejection_case(2, 2, 257, torch.float32, seed=3, similarity=1.0)
    case.state.rows[:, at.DONE], case.state.rows[:, at.LIMIT] = 0, 60
    case.state.rows[:, at.DRAFTED] = 1
    case.arguments["eos"].fill_(-1)
    case.arguments["draft_lse"] -= 30.0
    after = compare(case, split_row(257, block=128))
    assert after.rows[:, at.ACCEPTED].tolist() == [0, 0]
    assert after.rows[:, at.COMMITTED].tolist() == [1, 1]
    assert after.rows[:, at.ERROR].tolist() == [0, 0]


@pytest.mark.parametrize("bad", [torch.nan, torch.inf, None])
@pytest.mark.parametrize("position", [0, 1, 2])
def test_rows_without_a_token(position: int, bad: float | None) -> None:
    """A spoilt position is flagged if it is reached, whether it decides, closes or is passed."""
    case = rejection_case(6, 3, 257, torch.float32, seed=5, similarity=1.0)
    case.state.rows[:, at.DONE], case.state.rows[:, at.LIMIT] = 0, 60
    case.state.rows[:, at.DRAFTED] = torch.tensor([2, 2, 2, 1, 0, 2])
    case.arguments["eos"].fill_(-1)
    if bad is None:
        case.logits[:, position] = -torch.inf
    else:
        case.logits[:, position, 200] = bad
    inv = case.arguments["inv_temperature"]
    case.arguments["cutoffs"], case.arguments["lse"] = truncation(case.logits, inv, 0, 1.0)
    after = compare(case, split_row(257, block=128))
    if position == 0:
        assert (after.rows[:, at.ERROR] == at.ERROR_TARGET).all()
        assert torch.equal(after.sequence, case.state.sequence)


def test_scratch_serves_launch_after_launch() -> None:
    case = rejection_case(3, 4, 257, torch.float32, seed=7)
    scratch = ChoiceScratch.allocate(3, 4, split_row(257, block=128), "cpu", channels=2)
    first, second = copy.deepcopy(case.state), copy.deepcopy(case.state)
    for after in (first, second):
        verify_rejection_out(case.logits, after, fixed_policy(4), scratch=scratch, **case.arguments)
    assert torch.equal(first.rows, second.rows)
    assert torch.equal(first.sequence, second.sequence)


def test_public_call_and_prepared_form_use_the_reference_on_the_cpu() -> None:
    case = rejection_case(3, 4, 111, torch.float32, seed=9, trimmed=True)
    public, prepared, expected = (copy.deepcopy(case.state) for _ in range(3))
    policy = fixed_policy(4)
    reference.verify_rejection(case.logits, expected, policy, **case.arguments)
    verify_rejection(case.logits, public, policy, **case.arguments)
    VerifyRejection(case.logits, prepared, policy, **case.arguments)(case.logits)
    for after in (public, prepared):
        assert torch.equal(after.rows, expected.rows)
        assert torch.equal(after.sequence, expected.sequence)


@pytest.mark.parametrize(
    ("name", "value", "error", "message"),
    [
        ("seeds", torch.zeros(3).int(), TypeError, "seeds: expected int64 .*got int32"),
        ("lse", torch.zeros(3, 5), ValueError, r"lse: expected float32 \[3, 4\]"),
        ("draft_logits", torch.zeros(3, 15, 8), ValueError, r"draft_logits: .*\[3, 15, 9\]"),
        ("draft_logits", torch.zeros(3, 4, 9), ValueError, r"draft_logits: .*\[3, 15, 9\]"),
        ("draft_lse", None, TypeError, "draft_lse: expected a tensor of float32"),
        ("draft_ids", torch.zeros(8).int(), ValueError, r"draft_ids: expected int32 \[9\]"),
    ],
)
def test_bad_arguments(
    name: str, value: Tensor | None, error: type[Exception], message: str
) -> None:
    case = rejection_case(3, 4, 9, torch.float32, seed=1)
    arguments = {**case.arguments, name: value}
    with pytest.raises(error, match=message):
        verify_rejection(case.logits, case.state, fixed_policy(1), **arguments)
