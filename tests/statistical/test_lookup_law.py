"""The joint law of six tokens equals the target's when they are drafted by lookup.

A looked-up token is certain: under rejection sampling it is kept with the target's probability of
it, and replaced by a draw from the target's other tokens.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from unittest.mock import patch

import pytest
import torch

from speckv.decoding.draft_rows import DraftRows
from speckv.decoding.lookup import Lookup
from tests.statistical.law import ACCEPT_ABOVE, REJECT_BELOW, law_p_value
from tests.statistical.runs import Runs, Setting, plain_tokens, run
from tests.statistical.vectorised import Operations

RUNS = 10_000
FULL_SIZE = 200_000
PROMPT = (1, 3, 4, 2, 1, 1, 4, 4, 3, 1, 2, 0, 1, 1, 4, 4)
"""What the target says after 1 3, so that looking up in it is right now and then."""

REJECTION = Setting("rejection", lookup=Lookup(2, 1), model=False, prompt=PROMPT)
SETTINGS = {
    "rejection": REJECTION,
    "rejection-truncated": replace(REJECTION, temperature=1.3, top_k=4, top_p=0.85),
    "rejection-beside-a-trimmed-model": replace(REJECTION, model=True, trimmed=True),
    "gumbel": replace(REJECTION, coupling="gumbel"),
}


def assert_varied(runs: Runs) -> None:
    """The policy drafted this much and that, and was right now and then."""
    assert len({len(steps) for steps in runs.steps}) > 2
    for gammas in ((0,), (1,), (2, 3)):
        assert runs.steps_with(*gammas) > 0.1 * len(runs.steps)
    assert 0.1 < runs.acceptance < 0.8


def assert_lawful(setting: Setting, count: int) -> None:
    runs = run(setting, count, Operations())
    assert_varied(runs)
    assert law_p_value(runs.tokens, setting.law) > ACCEPT_ABOVE
    if setting.coupling == "gumbel":
        assert torch.equal(runs.tokens, plain_tokens(setting, count))


@pytest.mark.parametrize("setting", SETTINGS.values(), ids=SETTINGS)
def test_joint_law(setting: Setting) -> None:
    assert_lawful(setting, RUNS)


@pytest.mark.slow
@pytest.mark.parametrize("setting", SETTINGS.values(), ids=SETTINGS)
def test_joint_law_at_full_size(setting: Setting) -> None:
    assert_lawful(setting, FULL_SIZE)


def test_a_lookup_that_passes_for_unsure_is_caught() -> None:
    """As if the found token had been drawn from a distribution over all of them."""

    def unsure(self: DraftRows, row: int, tokens: Sequence[int]) -> None:
        self.logits[row, : len(tokens)] = 0.0
        self.cutoffs[row, : len(tokens)] = 0.0
        self.lse[row, : len(tokens)] = torch.tensor(5.0).log()

    with patch.object(DraftRows, "store_certain", unsure):
        runs = run(REJECTION, RUNS, Operations())
    assert_varied(runs)
    assert law_p_value(runs.tokens, REJECTION.law) < REJECT_BELOW
