"""The `verify` kernel in the interpreter equals `reference.verify`."""

from __future__ import annotations

import copy
from dataclasses import replace

import pytest
import torch
from torch import Tensor

from speckv.kernels import layout as at
from speckv.kernels import reference
from speckv.kernels.layout import StepState
from speckv.kernels.split import ChoiceScratch, SplitConfig, split_row
from speckv.kernels.verify import Verify, _select_config, verify, verify_out
from tests.kernels.steps import (
    MODES,
    Guards,
    adopt_target_tokens,
    assert_same_state,
    fixed_policy,
    guarded,
    mlp_policy,
    random_state,
    verify_case,
)

pytestmark = pytest.mark.interpreter

DTYPES = [torch.float32, torch.float16, torch.bfloat16]


def launch(
    logits: Tensor,
    state: StepState,
    policy: Tensor,
    config: SplitConfig | None = None,
    **arguments: Tensor | None,
) -> StepState:
    """The state after `verify_out` on guarded copies and poisoned scratch."""
    guards = Guards()
    batch, width, vocabulary = logits.shape
    config = config or _select_config(vocabulary)
    scratch = ChoiceScratch.allocate(batch, width, config, "cpu")
    scratch = replace(
        scratch,
        score=guards.around(scratch.score.fill_(torch.nan)),
        token=guards.around(scratch.token.fill_(-7)),
        counter=guards.around(scratch.counter),
    )
    after = guarded(state, guards)
    verify_out(logits, after, policy, scratch=scratch, **arguments)
    guards.check()
    assert not scratch.counter.any()
    return after


def compare(
    logits: Tensor,
    state: StepState,
    policy: Tensor,
    config: SplitConfig | None = None,
    **arguments: Tensor | None,
) -> StepState:
    """Run kernel and reference on copies of ``state``; they agree, and the result is returned."""
    expected = copy.deepcopy(state)
    reference.verify(logits, expected, policy, **arguments)
    actual = launch(logits, state, policy, config, **arguments)
    assert_same_state(actual, expected)
    return expected


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("vocabulary", [1, 7, 111, 257])
@pytest.mark.parametrize("gamma", [1, 3, 7])
@pytest.mark.parametrize("batch", [0, 1, 3, 17])
def test_grid(batch: int, gamma: int, vocabulary: int, mode: str) -> None:
    """The data type varies along, so that each meets every batch, γ, vocabulary and mode."""
    dtype = DTYPES[(batch + gamma // 2 + vocabulary // 7 + MODES.index(mode)) % 3]
    seed = vocabulary + batch
    logits, state, arguments = verify_case(
        batch, gamma + 1, vocabulary, dtype, mode, share=0.8, seed=seed
    )
    if batch == 1:
        state.rows[:, at.DRAFTED] = gamma
    compare(logits, state, fixed_policy(gamma), **arguments)


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("vocabulary", [257, 1031])
def test_dtypes(vocabulary: int, dtype: torch.dtype, mode: str) -> None:
    logits, state, arguments = verify_case(3, 4, vocabulary, dtype, mode, share=0.8, seed=13)
    compare(logits, state, fixed_policy(4), **arguments)


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("share", [0.0, 0.7, 1.0])
def test_batch_of_17_with_unequal_gamma_and_ends(mode: str, share: float) -> None:
    logits, state, arguments = verify_case(17, 8, 111, torch.bfloat16, mode, share, seed=3)
    state.rows[0, at.LIMIT] = state.rows[0, at.LENGTH] + 1
    after = compare(logits, state, fixed_policy(7), **arguments)
    assert len(set(after.rows[:, at.GAMMA].tolist())) > 4
    running = state.rows[:, at.DONE] == at.RUNNING
    assert (after.rows[running, at.DONE] != at.RUNNING).any()


@pytest.mark.parametrize("width", [1, 2, 16])
@pytest.mark.parametrize("mode", MODES)
def test_widths(mode: str, width: int) -> None:
    logits, state, arguments = verify_case(2, width, 257, torch.float16, mode, 1.0, seed=width)
    state.rows[:, at.DRAFTED] = width - 1
    compare(logits, state, fixed_policy(15), **arguments)


@pytest.mark.parametrize("mode", ["greedy", "cutoffs"])
@pytest.mark.parametrize("vocabulary", [128, 1031])
@pytest.mark.parametrize("max_splits", [1, 3, 64])
def test_splits_do_not_matter(max_splits: int, vocabulary: int, mode: str) -> None:
    logits, state, arguments = verify_case(3, 4, vocabulary, torch.float32, mode, 0.9, seed=11)
    config = split_row(vocabulary, block=128, max_splits=max_splits)
    split = launch(logits, state, fixed_policy(3), config, **arguments)
    compare(logits, state, fixed_policy(3), config, **arguments)
    whole = launch(logits, state, fixed_policy(3), **arguments)
    assert torch.equal(split.rows, whole.rows)
    assert torch.equal(split.sequence, whole.sequence)
    assert torch.equal(split.running, whole.running)


@pytest.mark.parametrize("mode", MODES)
def test_large_vocabulary(mode: str) -> None:
    logits, state, arguments = verify_case(1, 3, 49_152, torch.bfloat16, mode, 1.0, seed=5)
    state.rows[:, at.DRAFTED] = 2
    compare(logits, state, fixed_policy(2), **arguments)


@pytest.mark.parametrize("layout", [at.LAYOUT_SURVIVAL, at.LAYOUT_PAPER])
@pytest.mark.parametrize("objective", [at.OBJECTIVE_TOKENS, at.OBJECTIVE_RATE])
@pytest.mark.parametrize("expected_acceptance", [0.0, 0.7])
def test_decision_of_the_next_step(layout: int, objective: int, expected_acceptance: float) -> None:
    logits, state, arguments = verify_case(17, 4, 7, torch.float32, "greedy", 0.8, seed=8)
    state.running[::4, at.LAST_ENTROPY] = -1.0
    generator = torch.Generator().manual_seed(21)
    policy = mlp_policy(generator, layout, objective)
    policy[at.EXPECTED_ACCEPTANCE] = expected_acceptance
    compare(logits, state, policy, **arguments)


def test_ties_go_to_the_lowest_id_across_lanes_blocks_and_splits() -> None:
    config = SplitConfig(block=128, blocks=2, splits=3, num_warps=4)
    logits = torch.zeros(5, 1, 700)
    for b, ids in enumerate([(3, 4), (130, 259), (5, 133), (300, 699), (699, 255)]):
        logits[b, 0, list(ids)] = 2.0
    state = random_state(5, 1, 700, torch.Generator().manual_seed(0))
    state.rows[:, at.DONE] = 0
    after = compare(
        logits, state, fixed_policy(4), config, eos=torch.full((5, 1), -1, dtype=torch.int32)
    )
    lengths = state.rows[:, at.LENGTH].long()
    tokens = after.sequence.gather(1, lengths[:, None])[:, 0]
    assert tokens.tolist() == [3, 130, 5, 300, 255]


@pytest.mark.parametrize("sampled", [False, True])
def test_impossible_tokens_and_one_hot_rows(sampled: bool) -> None:
    logits = torch.full((3, 2, 257), -torch.inf)
    logits[:, 0, 200], logits[0, 1, 0], logits[1, 1, 256], logits[2, 1, 128:] = 1.0, -9.0, 5.0, 0.0
    state = random_state(3, 2, 257, torch.Generator().manual_seed(2))
    state.rows[:, at.DRAFTED], state.rows[:, at.LIMIT] = 1, 60
    state.sequence.scatter_(1, state.rows[:, at.LENGTH : at.LENGTH + 1].long(), 200)
    inv = torch.full((3,), 0.7) if sampled else None
    seeds = torch.arange(3) if sampled else None
    eos = torch.full((3, 1), -1, dtype=torch.int32)
    config = split_row(257, block=128)
    after = compare(
        logits, state, fixed_policy(4), config, eos=eos, inv_temperature=inv, seeds=seeds
    )
    assert after.rows[:, at.ACCEPTED].tolist() == [1, 1, 1]


@pytest.mark.parametrize("bad", [torch.nan, torch.inf, None])
@pytest.mark.parametrize("mode", MODES)
def test_rows_without_a_token(mode: str, bad: float | None) -> None:
    """Position 1 is spoilt: it decides in row 0 alone, which ends; the others do not look at it."""
    logits, state, arguments = verify_case(3, 3, 257, torch.float32, mode, 1.0, seed=4)
    state.rows[:, at.DONE], state.rows[:, at.LIMIT] = 0, 60
    state.rows[:, at.DRAFTED] = torch.tensor([2, 2, 0])
    arguments["eos"].fill_(-1)
    clean = {k: arguments[k] for k in ("inv_temperature", "seeds", "cutoffs")}
    generator = torch.Generator().manual_seed(1)
    adopt_target_tokens(logits, state, **clean, share=1.0, generator=generator)
    first = int(state.rows[1, at.LENGTH])
    state.sequence[1, first] = (state.sequence[1, first] + 1) % 257
    if bad is None:
        logits[:, 1] = -torch.inf
    else:
        logits[:, 1, 200] = bad
    after = compare(logits, state, fixed_policy(4), split_row(257, block=128), **arguments)
    assert after.rows[:, at.ERROR].tolist() == [at.ERROR_TARGET, 0, 0]
    assert after.rows[:, at.DONE].tolist() == [at.DONE_ERROR, at.RUNNING, at.RUNNING]
    assert after.rows[:, at.COMMITTED].tolist() == [0, 1, 1]
    assert torch.equal(after.sequence[0], state.sequence[0])


@pytest.mark.parametrize("ids", [0, 1, 5])
def test_any_number_of_eos_ids(ids: int) -> None:
    logits, state, arguments = verify_case(3, 4, 7, torch.float32, "greedy", 1.0, seed=6)
    arguments["eos"] = torch.randint(-1, 7, (3, ids)).int()
    compare(logits, state, fixed_policy(4), **arguments)


def test_scratch_serves_launch_after_launch() -> None:
    logits, state, arguments = verify_case(3, 4, 257, torch.float32, "sampled", 0.8, seed=7)
    config = split_row(257, block=128)
    scratch = ChoiceScratch.allocate(3, 4, config, "cpu")
    first, second = copy.deepcopy(state), copy.deepcopy(state)
    for after in (first, second):
        verify_out(logits, after, fixed_policy(4), scratch=scratch, **arguments)
    assert torch.equal(first.rows, second.rows)
    assert torch.equal(first.sequence, second.sequence)


def test_public_call_and_prepared_form_use_the_reference_on_the_cpu() -> None:
    logits, state, arguments = verify_case(3, 4, 111, torch.float32, "cutoffs", 0.8, seed=9)
    public, prepared, expected = (copy.deepcopy(state) for _ in range(3))
    reference.verify(logits, expected, fixed_policy(4), **arguments)
    verify(logits, public, fixed_policy(4), **arguments)
    Verify(logits, prepared, fixed_policy(4), **arguments)(logits)
    for after in (public, prepared):
        assert torch.equal(after.rows, expected.rows)
        assert torch.equal(after.sequence, expected.sequence)


@pytest.mark.parametrize(
    ("name", "value", "error", "message"),
    [
        ("logits", torch.zeros(3, 4), ValueError, r"logits: expected floating \[any, any, any\]"),
        ("logits", torch.zeros(3, 4, 9).int(), TypeError, "logits: expected floating .*got int32"),
        ("logits", torch.zeros(3, 17, 9), ValueError, "logits: expected 1 to 16 positions, got 17"),
        ("logits", torch.zeros(3, 4, 0), ValueError, "logits: expected a vocabulary"),
        ("logits", torch.zeros(3, 9, 4).mT, ValueError, "logits: expected unit stride"),
        ("policy", torch.zeros(5), ValueError, r"policy: expected float32 \[.*got float32 \[5\]"),
        ("eos", torch.zeros(2, 1).int(), ValueError, r"eos: expected int32 \[3, any\]"),
        ("eos", torch.zeros(3, 1), TypeError, "eos: expected int32 .*got float32"),
        ("seeds", None, TypeError, "seeds: expected a tensor of int64, got NoneType"),
        ("cutoffs", torch.zeros(3, 5), ValueError, r"cutoffs: expected float32 \[3, 4\]"),
        ("cutoffs", torch.zeros(4, 3).T, ValueError, "cutoffs: expected a contiguous tensor"),
    ],
)
def test_bad_arguments(name: str, value: object, error: type[Exception], message: str) -> None:
    arguments: dict[str, object] = {
        "logits": torch.zeros(3, 4, 9),
        "state": StepState.allocate(3, 8),
        "policy": fixed_policy(1),
        "eos": torch.zeros(3, 1, dtype=torch.int32),
        "inv_temperature": torch.ones(3),
        "seeds": torch.zeros(3, dtype=torch.int64),
        "cutoffs": torch.zeros(3, 4),
    }
    arguments[name] = value
    with pytest.raises(error, match=message):
        verify(**arguments)  # type: ignore[arg-type]


def test_config_gives_every_program_tokens() -> None:
    for vocabulary in (1, 2047, 2048, 2049, 49_152, 128_256, 131_073, 262_144, 500_001):
        config = _select_config(vocabulary)
        span = config.blocks * config.block
        assert (config.splits - 1) * span < vocabulary <= config.splits * span
        assert config.splits <= config.padded_splits <= 64
