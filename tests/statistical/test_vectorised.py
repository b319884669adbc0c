"""What the law tests run is the reference: the same tokens and the same steps, run by run."""

from __future__ import annotations

from unittest.mock import patch

import pytest
import torch

from speckv.kernels import layout as at
from speckv.kernels import reference
from tests.statistical.runs import BATCH, VOCAB, NoiseTable, Setting, run
from tests.statistical.test_law import GUMBEL, OTHERS, REJECTION
from tests.statistical.vectorised import Operations

CASES = [
    pytest.param(GUMBEL, 4096, id="gumbel"),
    pytest.param(REJECTION, 4096, id="rejection"),
    *(pytest.param(setting, 1024, id=name) for name, setting in OTHERS.items()),
]


@pytest.mark.parametrize(("setting", "runs"), CASES)
def test_every_run_equals_the_reference_s(setting: Setting, runs: int) -> None:
    with patch.object(reference, "philox", NoiseTable()):
        expected = run(setting, runs)
    actual = run(setting, runs, Operations())
    assert torch.equal(actual.tokens, expected.tokens)
    assert actual.steps == expected.steps


@pytest.mark.parametrize("setting", [GUMBEL, REJECTION], ids=["gumbel", "rejection"])
def test_noise_table_changes_nothing(setting: Setting) -> None:
    expected = run(setting, 256)
    with patch.object(reference, "philox", NoiseTable()):
        actual = run(setting, 256)
    assert torch.equal(actual.tokens, expected.tokens)
    assert actual.steps == expected.steps


def test_noise_table_equals_philox() -> None:
    table, tokens = NoiseTable(), torch.arange(VOCAB)
    for request in (0, 1, BATCH - 1, BATCH, 3 * BATCH + 7):
        for index, purpose in ((2, at.NOISE_COUPLED), (5, at.NOISE_ACCEPT | 3 << 8)):
            for word, expected in zip(
                table(-5, tokens >> 2, index, request, purpose),
                reference.philox(-5, tokens >> 2, index, request, purpose),
                strict=True,
            ):
                assert torch.equal(word, expected)


def test_noise_of_a_batch_equals_noise_one_by_one() -> None:
    requests, indices, purposes = torch.arange(4) * 1000, torch.arange(4) + 3, torch.arange(4) << 8
    tokens = torch.arange(VOCAB).expand(4, -1)
    together = reference.gumbel(9, requests[:, None], indices[:, None], tokens, purposes[:, None])
    for row, noise in enumerate(together):
        where = (int(requests[row]), int(indices[row]))
        assert torch.equal(
            noise, reference.gumbel(9, *where, torch.arange(VOCAB), int(purposes[row]))
        )
