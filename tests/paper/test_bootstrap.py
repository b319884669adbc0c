"""Resampling: sums, pairing, clusters, and the law of a mean."""

from __future__ import annotations

import numpy as np
import pytest

from speckv.paper.bootstrap import RESAMPLES, cluster_sums, interval, p_value, resampled_sums


def test_sums_of_clusters() -> None:
    values = [[1.0, 1.0], [2.0, 1.0], [4.0, 1.0], [8.0, 1.0]]
    sums = cluster_sums(values, np.array([7, 3, 7, 7]))
    assert sums.tolist() == [[2.0, 1.0], [13.0, 3.0]]


def test_a_resampled_mean_has_the_spread_of_a_mean() -> None:
    values = np.random.default_rng(1).normal(3, 2, (400, 1))
    means = resampled_sums(values)[:, 0] / len(values)
    assert means.shape == (RESAMPLES,)
    assert means.mean() == pytest.approx(values.mean(), abs=0.01)
    assert means.std() == pytest.approx(values.std() / np.sqrt(len(values)), rel=0.03)
    low, high = interval(means)
    assert high - low == pytest.approx(2 * 1.96 * means.std(), rel=0.05)


def test_columns_stay_together() -> None:
    column = np.random.default_rng(2).random(50)
    drawn = resampled_sums(np.column_stack([column, 3 * column, np.ones(50)]))
    np.testing.assert_allclose(drawn[:, 1], 3 * drawn[:, 0])
    assert np.all(drawn[:, 2] == 50)


def test_rows_of_one_cluster_are_drawn_together() -> None:
    cluster = np.repeat(np.arange(10), 20)
    values = np.column_stack([cluster.astype(float), np.ones(len(cluster))])
    by_row = resampled_sums(values)
    by_cluster = resampled_sums(cluster_sums(values, cluster))
    spread = [np.ptp(interval(drawn[:, 0] / drawn[:, 1])) for drawn in (by_row, by_cluster)]
    assert spread[1] == pytest.approx(np.sqrt(20) * spread[0], rel=0.1)


def test_p_values() -> None:
    assert p_value(np.array([1.0] * 99)) == 0.01
    assert p_value(np.array([1.0, 0.0, -1.0])) == 0.75
