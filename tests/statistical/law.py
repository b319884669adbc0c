"""The exact law of a tabular model's output, in float64, and the test that compares samples to it.

Nothing here shares code with the package: warpers and probabilities are written out again.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from scipy.stats import chi2
from torch import Tensor

from tests.tabular import BEFORE_FIRST

ACCEPT_ABOVE = 1e-3
"""A right sampler passes with a p-value above this.

Seeds are fixed, so the outcome is too. The bound is the chance that a right sampler fails when a
seed is chosen: low enough to hold for the handful of laws tested here, high enough that a sampler
which is only slightly wrong is not waved through.
"""

REJECT_BELOW = 1e-6
"""A wrong sampler fails with a p-value below this: three orders of magnitude clear of the other."""

_SMALLEST_EXPECTATION = 10.0


@dataclass(frozen=True)
class Warp:
    """Temperature, then top-k (0: all), then top-p (1: all)."""

    temperature: float = 1.0
    top_k: int = 0
    top_p: float = 1.0

    def __call__(self, logits: Sequence[float]) -> list[float]:
        """Probabilities of one row of logits."""
        scaled = np.asarray(logits, dtype=np.float64) / self.temperature
        order = np.argsort(-scaled, kind="stable")
        kept = order[: self.top_k or None]
        weight = np.exp(scaled[kept] - scaled[order[0]])
        weight /= weight.sum()
        if self.top_p < 1.0:
            ahead = np.cumsum(weight) - weight
            kept, weight = kept[ahead < self.top_p], weight[ahead < self.top_p]
        probabilities = np.zeros(len(scaled))
        probabilities[kept] = weight / weight.sum()
        return probabilities.tolist()


def exact_joint(table: Tensor, prompt: Sequence[int], length: int, warp: Warp) -> np.ndarray:
    """Probability of each continuation of ``prompt``: float64, ``length`` axes of V tokens."""
    phases, vocab = table.shape[0], table.shape[-1]
    rows = table.double().flatten(0, -2).tolist()
    step = np.array([warp(row) for row in rows]).reshape(phases, vocab, vocab, vocab)
    before, last = [BEFORE_FIRST, *prompt][-2:]
    law = np.ones(1)  # by tokens so far
    state = np.zeros((1, vocab, vocab))  # by tokens so far, token before the last, last token
    state[0, before, last] = 1.0
    for position in range(len(prompt) - 1, len(prompt) - 1 + length):
        grown = np.einsum("hbl,bln->hln", state, step[position % phases])
        law = grown.sum(1).reshape(-1)
        state = np.einsum("hln,nm->hnlm", grown, np.eye(vocab)).reshape(-1, vocab, vocab)
    return law.reshape([vocab] * length)


def count(samples: Tensor, vocab: int) -> np.ndarray:
    """How often each sequence occurs in ``samples`` [N, length]: int64, ``length`` axes."""
    length = samples.shape[1]
    index = np.ravel_multi_index(samples.numpy().T, [vocab] * length)
    return np.bincount(index, minlength=vocab**length).reshape([vocab] * length)


def chi_square(observed: np.ndarray, law: np.ndarray) -> float:
    """Pearson's p-value of counts against probabilities of the same shape.

    Cells are taken from the least probable up and merged until each bin expects ten, where the
    chi-square approximation is good. An impossible cell that occurred gives 0.
    """
    observed, law = observed.reshape(-1), law.reshape(-1)
    if observed[law == 0.0].any():
        return 0.0
    order = np.argsort(law, kind="stable")
    expectation = law[order] * observed.sum()
    bins = [[0.0, 0.0]]  # observed, expected
    for seen, expected in zip(observed[order], expectation, strict=True):
        if bins[-1][1] >= _SMALLEST_EXPECTATION:
            bins.append([0.0, 0.0])
        bins[-1][0] += seen
        bins[-1][1] += expected
    if len(bins) > 1 and bins[-1][1] < _SMALLEST_EXPECTATION:
        seen, expected = bins.pop()
        bins[-1][0] += seen
        bins[-1][1] += expected
    statistic = sum((seen - expected) ** 2 / expected for seen, expected in bins)
    return float(chi2.sf(statistic, len(bins) - 1))


def law_p_value(samples: Tensor, law: np.ndarray) -> float:
    """p-value that ``samples`` [N, length] come from the joint law ``law``.

    The joint of all tokens, the joint of each two neighbours and each token's marginal are tested;
    the smallest of their p-values counts, times their number (Bonferroni).
    """
    length = law.ndim
    counts = count(samples, law.shape[0])
    windows = [range(length), *(range(i, i + 2) for i in range(length - 1))]
    windows += [range(i, i + 1) for i in range(length)]
    values = []
    for window in windows:
        others = tuple(i for i in range(length) if i not in window)
        values.append(chi_square(counts.sum(others), law.sum(others)))
    return min(1.0, len(values) * min(values))
