"""The joint law of six consecutive tokens equals the target's, whatever the policy does.

The policy drafts 0 to 3 tokens by the draft's entropy and confidence and by past acceptance, so it
reacts to its own random past, which is what a wrong key of the noise or a wrong trim would betray.
"""

from __future__ import annotations

from unittest.mock import patch

import pytest
import torch

from speckv.kernels import layout as at
from speckv.kernels import reference
from speckv.policies import parse_policy
from tests.statistical.law import ACCEPT_ABOVE, law_p_value
from tests.statistical.runs import (
    NoiseTable,
    Runs,
    Setting,
    history_policy,
    plain_tokens,
    run,
)
from tests.statistical.vectorised import Operations

RUNS = 200_000
FEWER = 20_000

GUMBEL, REJECTION = Setting("gumbel"), Setting("rejection")
OTHERS = {
    "gumbel-truncated": Setting("gumbel", temperature=1.3, top_k=4, top_p=0.85),
    "gumbel-trimmed": Setting("gumbel", temperature=1.2, trimmed=True),
    "rejection-truncated": Setting("rejection", temperature=1.3, top_k=4, top_p=0.85),
    "rejection-trimmed": Setting("rejection", temperature=1.2, trimmed=True),
    "rejection-trimmed-truncated": Setting("rejection", top_k=3, top_p=0.9, trimmed=True),
}
CASES = [
    pytest.param(GUMBEL, RUNS, id="gumbel"),
    pytest.param(REJECTION, RUNS, id="rejection"),
    *(pytest.param(setting, FEWER, id=name) for name, setting in OTHERS.items()),
]


def assert_lawful(setting: Setting, runs: Runs) -> None:
    """The tokens follow the law, and the policy did what makes that worth testing."""
    count = len(runs.steps)
    assert len({len(steps) for steps in runs.steps}) > 2
    assert runs.steps_with(0) > 0.2 * count
    assert runs.steps_with(1) > 0.1 * count
    assert runs.steps_with(2, 3) > 0.2 * count
    assert 0.2 < runs.acceptance < 0.8
    if not setting.trimmed:  # a draft of three tokens is too sure of itself for the policy to stop
        assert runs.full_then_plain() > 0.005 * count
    assert law_p_value(runs.tokens, setting.law) > ACCEPT_ABOVE
    if setting.coupling == "gumbel":
        assert torch.equal(runs.tokens, plain_tokens(setting, count))


@pytest.mark.parametrize(("setting", "runs"), CASES)
def test_joint_law(setting: Setting, runs: int) -> None:
    assert_lawful(setting, run(setting, runs, Operations()))


@pytest.mark.slow
@pytest.mark.parametrize("setting", [GUMBEL, REJECTION], ids=["gumbel", "rejection"])
def test_joint_law_of_the_reference(setting: Setting) -> None:
    with patch.object(reference, "philox", NoiseTable()):
        runs = run(setting, RUNS)
    assert_lawful(setting, runs)


@pytest.mark.slow
@pytest.mark.parametrize("setting", OTHERS.values(), ids=OTHERS)
def test_joint_law_at_full_size(setting: Setting) -> None:
    assert_lawful(setting, run(setting, RUNS, Operations()))


@pytest.mark.parametrize("setting", [GUMBEL, OTHERS["gumbel-truncated"]], ids=["all", "truncated"])
def test_plain_decoding_by_the_loop_is_plain_sampling(setting: Setting) -> None:
    runs = run(setting, 512, policy=parse_policy("fixed:0").pack())
    assert runs.steps_with(0) == sum(map(len, runs.steps))
    assert torch.equal(runs.tokens, plain_tokens(setting, 512))


@pytest.mark.parametrize("unit", range(3), ids=["entropy", "confidence", "acceptance"])
def test_policy_listens_to_its_history(unit: int) -> None:
    """Without any one of its three inputs the policy takes other steps."""
    deaf = history_policy()
    weights = deaf[at.OUTPUT_WEIGHT : at.OUTPUT_WEIGHT + at.OUTPUTS * at.HIDDEN]
    weights.view(at.HIDDEN, at.OUTPUTS)[unit] = 0.0
    hearing, without = (run(REJECTION, 1024, Operations(), p) for p in (None, deaf))
    differing = sum(a != b for a, b in zip(hearing.steps, without.steps, strict=True))
    assert differing > 0.04 * 1024
