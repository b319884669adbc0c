"""The γ decision: hand-worked cases of the reference, and the device function against it."""

from __future__ import annotations

import pytest
import torch
import triton
import triton.language as tl
from torch import Tensor

from speckv.kernels import layout as at
from speckv.kernels import reference
from speckv.kernels.device import _decide, _load_policy
from tests.kernels.cases import POLICIES, fixed, mlp, threshold

pytestmark = [
    pytest.mark.interpreter,
    pytest.mark.filterwarnings("ignore:overflow encountered in exp:RuntimeWarning"),  # sigmoid
]


@triton.jit
def _decide_kernel(policy_ptr, rows_ptr, running_ptr, stop_ptr):
    stop = _decide(
        _load_policy(policy_ptr),
        tl.load(rows_ptr + at.LENGTH),
        tl.load(rows_ptr + at.LIMIT),
        tl.load(rows_ptr + at.DRAFTED),
        tl.load(rows_ptr + at.PLAIN_RUN),
        tl.load(running_ptr + at.MEAN_ENTROPY),
        tl.load(running_ptr + at.MAX_ENTROPY),
        tl.load(running_ptr + at.MEAN_CONFIDENCE),
        tl.load(running_ptr + at.MIN_CONFIDENCE),
        tl.load(running_ptr + at.LAST_ENTROPY),
        tl.load(running_ptr + at.LAST_CONFIDENCE),
        tl.load(running_ptr + at.LAST_MARGIN),
        tl.load(running_ptr + at.ACCEPTANCE),
        tl.load(rows_ptr + at.MATCH_LENGTH),
    )
    tl.store(stop_ptr, stop)


def row(drafted: int, *, length: int = 10, limit: int = 100, plain_run: int = 0) -> list[int]:
    words = [0] * at.ROW_WORDS
    words[at.DRAFTED], words[at.LENGTH], words[at.LIMIT] = drafted, length, limit
    words[at.PLAIN_RUN] = plain_run
    return words


def features(entropy: float = 1.0, confidence: float = 0.5) -> list[float]:
    return [entropy, entropy, confidence, confidence, entropy, confidence, 0.2, 0.5]


def decide(policy: Tensor, rows: list[int], running: list[float]) -> bool:
    """The reference's decision, after checking that the device function makes the same one."""
    expected = reference.decide(policy, rows, running)
    stop = torch.full((1,), -1, dtype=torch.int32)
    _decide_kernel[(1,)](policy, torch.tensor(rows, dtype=torch.int32), torch.tensor(running), stop)
    assert int(stop) == int(expected)
    return expected


def survival(probabilities: list[float]) -> Tensor:
    """An MLP that predicts these P(accepted >= k), k = 1.., whatever it sees."""
    policy = mlp(at.LAYOUT_SURVIVAL, at.OBJECTIVE_TOKENS, 0)
    policy[at.HEADER_WORDS :] = 0.0
    p = torch.tensor([*probabilities, *[1e-6] * (at.OUTPUTS - len(probabilities))])
    policy[at.OUTPUT_BIAS :] = torch.logit(p)
    policy[at.CANDIDATES] = 2**at.WIDTH_MAX - 1
    return policy


def test_fixed_stops_at_its_gamma() -> None:
    assert [decide(fixed(2), row(j), features()) for j in range(4)] == [False, False, True, True]
    assert decide(fixed(0), row(0), features())


def test_the_limit_leaves_room_for_the_targets_token() -> None:
    near = {"length": 10, "limit": 13}
    assert [decide(fixed(), row(j, **near), features()) for j in range(3)] == [False, False, True]
    assert decide(fixed(), row(0, length=10, limit=11), features())


def test_thresholds_stop_after_the_uncertain_token_and_never_before_the_first() -> None:
    entropy = threshold(at.MODE_ENTROPY, 1.5)
    assert not decide(entropy, row(0), features(entropy=9.0))
    assert not decide(entropy, row(1), features(entropy=1.5))
    assert decide(entropy, row(1), features(entropy=1.6))
    confidence = threshold(at.MODE_CONFIDENCE, 0.5)
    assert not decide(confidence, row(0), features(confidence=0.1))
    assert not decide(confidence, row(1), features(confidence=0.5))
    assert decide(confidence, row(1), features(confidence=0.4))


def test_rate_weighs_tokens_against_cost() -> None:
    policy = survival([0.9, 0.6, 0.3])
    policy[at.OBJECTIVE], policy[at.RATE] = at.OBJECTIVE_RATE, 0.5
    policy[at.COST : at.COST + at.WIDTH_MAX] = torch.arange(16.0)  # 0.5 tokens per draft token
    assert [decide(policy, row(j), features()) for j in (1, 2)] == [False, True]
    policy[at.COST_PER_TOKEN : at.COST_PER_TOKEN + at.WIDTH_MAX] = torch.arange(16.0) * 0.03
    # At a context of 10 a draft token costs 1.3 ms, 0.65 tokens: only the first is worth it.
    assert [decide(policy, row(j), features()) for j in (0, 1)] == [False, True]


def test_rate_may_choose_not_to_draft() -> None:
    policy = survival([0.3])
    policy[at.OBJECTIVE], policy[at.RATE] = at.OBJECTIVE_RATE, 0.5
    policy[at.COST : at.COST + at.WIDTH_MAX] = torch.arange(16.0)
    assert decide(policy, row(0), features())
    assert not decide(policy, row(0), features(entropy=-1.0))  # nothing known yet
    assert not decide(policy, row(0, plain_run=4), features())  # time to probe
    assert decide(policy, row(0, plain_run=3), features())
    policy[at.PROBE_EVERY] = 0
    assert decide(policy, row(0, plain_run=1000), features())


def test_paper_layout_reads_gamma_as_a_feature() -> None:
    policy = mlp(at.LAYOUT_PAPER, at.OBJECTIVE_TOKENS, 0)
    policy[at.HEADER_WORDS :] = 0.0
    policy[at.FEATURE_SCALE + at.FEATURE_GAMMA] = 1.0
    policy[at.HIDDEN_WEIGHT + at.FEATURE_GAMMA * at.HIDDEN] = 1.0  # hidden 0 is γ
    policy[at.OUTPUT_WEIGHT] = -0.125
    policy[at.OUTPUT_BIAS] = 1.0
    # rate = 1 - γ/8: rate·γ is 1.5, 2, 1.5, 0 at γ = 2, 4, 6, 8.
    assert reference.best_gamma(policy, row(0), features()) == 4
    assert [decide(policy, row(j), features()) for j in (3, 4)] == [False, True]


def test_equal_values_choose_the_lowest_gamma() -> None:
    policy = survival([])
    policy[at.OBJECTIVE], policy[at.RATE] = at.OBJECTIVE_RATE, 0.0
    policy[at.OUTPUT_BIAS :] = -200.0  # every survival is exactly 0
    assert reference.best_gamma(policy, row(1), features()) == 0
    assert decide(policy, row(1), features())


@pytest.mark.parametrize("name", POLICIES)
def test_device_decision_equals_reference(name: str) -> None:
    generator = torch.Generator().manual_seed(11)
    outcomes = set()
    for _ in range(40):
        drafted = int(torch.randint(0, 9, (1,), generator=generator))
        running = torch.randn(at.RUNNING_WORDS, generator=generator).abs().mul(2).tolist()
        running[at.LAST_CONFIDENCE] = min(running[at.LAST_CONFIDENCE], 1.0)
        plain_run = int(torch.randint(0, 6, (1,), generator=generator))
        outcomes.add(decide(POLICIES[name], row(drafted, plain_run=plain_run), running))
    assert outcomes == {False, True}
