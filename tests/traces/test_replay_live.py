"""Replay against the live loop: every step of every policy, exactly."""

from __future__ import annotations

import copy
from collections.abc import Callable

import numpy as np
import pytest

from speckv.kernels.layout import GAMMA_MAX
from speckv.models.base import CausalModel
from speckv.policies import Policy
from speckv.sampling import SamplingParams
from speckv.traces.packed import PackedController
from speckv.traces.record import record
from speckv.traces.replay import Replayed, replay
from speckv.traces.schema import Trace, join
from tests.decoding.grid import EOS
from tests.decoding.loops import COST, Decoded, decode
from tests.decoding.tiny import wrapped
from tests.traces.conftest import POLICIES, TEMPERATURES, answers
from tests.traces.synthetic import INFO

Recorded = Callable[[str, str, str, int], Trace]


def live(trace: Trace, draft: str | CausalModel, policy: Policy) -> list[Decoded]:
    """The loop on each prompt alone."""
    compression = trace.answers[0].compression
    target = wrapped("llama", "target", compression)
    model = wrapped("llama", draft, "fp32") if isinstance(draft, str) else draft
    packed = policy.pack(compression, COST)
    rows = []
    for a in trace.answers:
        params = SamplingParams(max_new_tokens=a.limit, temperature=a.temperature, seed=a.seed)
        rows += decode(target, model, packed, [a.prompt_tokens], [params], eos=EOS)
    return rows


def replayed(trace: Trace, policy: Policy) -> Replayed:
    packed = policy.pack(trace.answers[0].compression, COST)
    return replay(trace, PackedController(packed), COST)


@pytest.mark.parametrize("name", POLICIES)
@pytest.mark.parametrize("sampling", TEMPERATURES)
@pytest.mark.parametrize(("draft", "compression"), [("perturbed", "fp32"), ("random", "int8")])
def test_steps_are_those_of_the_loop(
    recorded: Recorded, draft: str, compression: str, sampling: str, name: str
) -> None:
    for seed in (100, 7) if draft == "perturbed" else (100,):
        trace = recorded(draft, compression, sampling, seed)
        found = replayed(trace, POLICIES[name])
        for i, row in enumerate(live(trace, draft, POLICIES[name])):
            texts = trace.rows.target_token[trace.first[i] : trace.first[i + 1]]
            assert row.tokens == texts.tolist()
            assert found.steps_of(i) == row.steps, f"answer {i}, seed {seed}"


def test_a_perfect_draft(recorded: Recorded) -> None:
    """All accepted, up to an end-of-sequence token that was drafted too."""
    trace = recorded("target", "fp32", "greedy", 100)
    found = replayed(trace, POLICIES["fixed:15"])
    for i, row in enumerate(live(trace, "target", POLICIES["fixed:15"])):
        assert found.steps_of(i) == row.steps
    left = np.concatenate([np.arange(n, 0, -1) for n in trace.lengths])
    np.testing.assert_array_equal(trace.rows.accepted, np.minimum(left, GAMMA_MAX))


def test_policies_differ(recorded: Recorded) -> None:
    """The comparison with the loop would mean little if policies all did the same."""
    trace = recorded("perturbed", "fp32", "cool", 100)
    did = {name: tuple(replayed(trace, p).gamma.tolist()) for name, p in POLICIES.items()}
    assert len(set(did.values())) >= len(did) - 3
    for name in ("survival", "survival-2", "survival-even"):
        assert len(set(did[name])) >= 6, f"{name}: {set(did[name])}"


@pytest.mark.parametrize("name", ["fixed:4", "survival"])
def test_a_draft_with_a_short_context(name: str) -> None:
    target = wrapped("llama", "target", "fp32")
    draft = copy.copy(wrapped("llama", "perturbed", "fp32"))
    draft.max_positions = 36
    asked = answers("fp32", 0.0, 0)
    trace = join(INFO, zip(asked, record(target, draft, asked, eos=EOS), strict=True))
    assert set(trace.rows.drafted.tolist()) == {0, GAMMA_MAX}
    found = replayed(trace, POLICIES[name])
    for i, row in enumerate(live(trace, draft, POLICIES[name])):
        assert found.steps_of(i) == row.steps
