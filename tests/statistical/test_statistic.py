"""The exact law and the test statistic themselves, before they judge anything."""

from __future__ import annotations

from itertools import product

import numpy as np
import pytest
import torch

from tests.statistical.law import Warp, chi_square, exact_joint, law_p_value
from tests.statistical.runs import LENGTH, PROMPT, TARGET, VOCAB
from tests.tabular import TabularModel

LOGITS = [0.0, float(np.log(2.0)), float(np.log(4.0)), float(np.log(3.0)), -np.inf]


@pytest.mark.parametrize(
    ("warp", "expected"),
    [
        (Warp(), [0.1, 0.2, 0.4, 0.3, 0.0]),
        (Warp(temperature=0.5), [1 / 30, 4 / 30, 16 / 30, 9 / 30, 0.0]),
        (Warp(top_k=2), [0.0, 0.0, 4 / 7, 3 / 7, 0.0]),
        (Warp(top_p=0.65), [0.0, 0.0, 4 / 7, 3 / 7, 0.0]),
        (Warp(top_p=0.75), [0.0, 2 / 9, 4 / 9, 3 / 9, 0.0]),
        (Warp(top_k=3, top_p=0.75), [0.0, 0.0, 4 / 7, 3 / 7, 0.0]),
        (Warp(top_p=0.01), [0.0, 0.0, 1.0, 0.0, 0.0]),
    ],
)
def test_warp_by_hand(warp: Warp, expected: list[float]) -> None:
    np.testing.assert_allclose(warp(LOGITS), expected, rtol=1e-12, atol=1e-15)


def test_exact_joint_is_the_product_of_the_model_s_own_steps() -> None:
    warp = Warp(temperature=0.8)
    law = exact_joint(TARGET, PROMPT, LENGTH, warp)
    assert law.shape == (VOCAB,) * LENGTH
    assert abs(law.sum() - 1.0) < 1e-12
    model = TabularModel(TARGET)
    for sequence in list(product(range(VOCAB), repeat=LENGTH))[::97]:
        cache = model.new_cache(1, len(PROMPT) + LENGTH)
        logits = model.forward(torch.tensor([[*PROMPT, *sequence]]), [0], cache)[0]
        steps = [warp(row.tolist()) for row in logits[len(PROMPT) - 1 : -1]]
        expected = np.prod([p[token] for p, token in zip(steps, sequence, strict=True)])
        assert law[sequence] == pytest.approx(expected, rel=1e-12)


def test_p_values_of_right_samples_are_uniform() -> None:
    law = exact_joint(TARGET, PROMPT, LENGTH, Warp(temperature=0.8))
    random = np.random.default_rng(11)
    values = [chi_square(random.multinomial(20_000, law.reshape(-1)), law) for _ in range(200)]
    below = [sum(v < level for v in values) for level in (0.1, 0.5, 0.9)]
    for count, level in zip(below, (0.1, 0.5, 0.9), strict=True):
        assert abs(count - 200 * level) < 4 * np.sqrt(200 * level * (1 - level))


def test_a_shift_of_one_conditional_is_seen() -> None:
    """Total variation 0.01, marginals of the first tokens untouched."""
    law = exact_joint(TARGET, PROMPT, LENGTH, Warp(temperature=0.8))
    last = law[0, 0, :, :].sum((0, 1, 2))
    a, b = np.argsort(last)[-2:]
    wrong = law.copy()
    moved = 0.05 * wrong[..., a]
    wrong[..., a] -= moved
    wrong[..., b] += moved
    index = np.random.default_rng(5).choice(law.size, 200_000, p=wrong.reshape(-1))
    samples = torch.from_numpy(np.stack(np.unravel_index(index, law.shape), 1))
    assert law_p_value(samples, law) < 1e-6


def test_an_impossible_sequence_is_fatal() -> None:
    law = np.array([0.5, 0.5, 0.0])
    assert chi_square(np.array([500, 500, 0]), law) > 0.9
    assert chi_square(np.array([500, 499, 1]), law) == 0.0
