"""Bootstrap intervals of sums and of what is computed from them."""

from __future__ import annotations

import numpy as np
from numpy.typing import ArrayLike

from .data import Floats, Ints

RESAMPLES = 10_000
LEVEL = 0.95
_CHUNK = 500


def cluster_sums(values: ArrayLike, cluster: Ints) -> Floats:
    """Sums of the rows of each cluster, which are then resampled whole.

    Parameters
    ----------
    values : float [N, K]
    cluster : int64 [N]
        Which cluster a row belongs to.

    Returns
    -------
    float64 [clusters, K]
    """
    values = np.asarray(values, dtype=np.float64)
    members, index = np.unique(cluster, return_inverse=True)
    sums = np.zeros((len(members), values.shape[1]))
    np.add.at(sums, index, values)
    return sums


def resampled_sums(sums: Floats, seed: int = 42) -> Floats:
    """Column sums of `RESAMPLES` samples of the rows, drawn with replacement.

    Columns stay together, so whatever is computed from one resample is paired.

    Parameters
    ----------
    sums : float64 [units, K]
        A row for each unit of resampling: a step, or a prompt's sums.

    Returns
    -------
    float64 [RESAMPLES, K]
    """
    generator = np.random.default_rng(seed)
    units = len(sums)
    chances = np.full(units, 1 / units)
    found = np.empty((RESAMPLES, sums.shape[1]))
    for start in range(0, RESAMPLES, _CHUNK):
        times = generator.multinomial(units, chances, size=min(_CHUNK, RESAMPLES - start))
        found[start : start + _CHUNK] = times @ sums
    return found


def interval(resampled: Floats) -> tuple[float, float]:
    """The percentile interval at `LEVEL`."""
    tail = (1 - LEVEL) / 2
    low, high = np.quantile(resampled, [tail, 1 - tail])
    return float(low), float(high)


def p_value(differences: Floats) -> float:
    """One-sided: the share of resamples in which the difference is not above zero.

    The sample itself counts as one resample, so the value is never 0.
    """
    return float((1 + np.count_nonzero(differences <= 0)) / (1 + len(differences)))
