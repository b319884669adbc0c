"""The paper's γ-MLP, trained by its protocol on its released step data (arXiv 2605.02888).

Inputs: mean draft entropy (bits), mean confidence, max entropy, min confidence of the block, the
compression's index, and γ; output: the acceptance rate. scikit-learn's `MLPRegressor` with 16 ReLU
units, not standardised, 500 iterations, ``random_state=42``; scored on a held-out fifth, stratified
by compression and task, then refitted on all rows.
"""

from __future__ import annotations

import csv
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch

from ..kernels import layout as at
from ..policies.mlp import Mlp

STEP_FILE = "phase2_step_results.csv"
GAMMAS = (2, 4, 6, 8)
_COMPRESSIONS = ("fp16", "int8", "nf4")
_COLUMNS = (
    "mean_draft_entropy",
    "mean_draft_confidence",
    "max_draft_entropy",
    "min_draft_confidence",
)
# Where the paper's inputs stand among the packed ones; the compression's index is a weight of
# 0, 1 or 2 on its one-hot.
_INPUTS = (at.MEAN_ENTROPY, at.MEAN_CONFIDENCE, at.MAX_ENTROPY, at.MIN_CONFIDENCE)


def read_steps(path: Path) -> tuple[np.ndarray, np.ndarray, list[str]]:
    """The paper's step table.

    Returns
    -------
    inputs : float64 [N, 6]
        In the paper's order.
    acceptance : float64 [N]
    strata : list of str
        ``compression/task`` of each row.

    Raises
    ------
    ValueError
        A missing column, or a value that is not what the column holds.
    """
    with path.open(newline="") as file:
        rows = list(csv.DictReader(file))
    try:
        inputs = [
            [*(float(row[c]) for c in _COLUMNS), _COMPRESSIONS.index(row["compression"]),
             int(row["gamma"])]
            for row in rows
        ]
        acceptance = [float(row["acceptance_rate"]) for row in rows]
        strata = [f"{row['compression']}/{row['task']}" for row in rows]
    except KeyError as error:
        raise ValueError(f"{path}: expected a column {error}") from None
    if not rows:
        raise ValueError(f"{path}: expected at least one row")
    return np.array(inputs), np.array(acceptance), strata


def train(path: Path) -> Mlp:
    """Train the paper's MLP on a step table and pack it in the ``paper`` layout."""
    from sklearn.model_selection import train_test_split

    inputs, acceptance, strata = read_steps(path)
    fit, held_out = train_test_split(
        np.arange(len(inputs)), test_size=0.2, random_state=42, stratify=strata
    )
    predictor = _regressor().fit(inputs[fit], acceptance[fit])
    correlation = float(
        np.corrcoef(predictor.predict(inputs[held_out]), acceptance[held_out])[0, 1]
    )
    final = _regressor().fit(inputs, acceptance)
    card = {
        "source": "arXiv 2605.02888, released step data",
        "rows": len(inputs),
        "held_out_correlation": correlation,
        "mean_acceptance": float(acceptance.mean()),
        "random_state": 42,
    }
    return pack(final.coefs_, final.intercepts_, card)


def pack(
    weights: Sequence[np.ndarray], biases: Sequence[np.ndarray], card: dict[str, Any]
) -> Mlp:
    """The regressor's weights ([6, 16] and [16, 1], biases [16] and [1]) as an `Mlp`."""
    hidden = np.zeros((at.HIDDEN, at.FEATURES))
    first = weights[0].T  # [16, 6]
    for source, place in enumerate(_INPUTS):
        hidden[:, place] = first[:, source]
    for index in range(len(_COMPRESSIONS)):
        hidden[:, at.FEATURE_COMPRESSION + index] = first[:, len(_INPUTS)] * index
    hidden[:, at.FEATURE_GAMMA] = first[:, len(_INPUTS) + 1]
    output = np.zeros((at.OUTPUTS, at.HIDDEN))
    output[0] = weights[1][:, 0]
    output_bias = np.zeros(at.OUTPUTS)
    output_bias[0] = biases[1][0]
    arrays = {
        "feature_mean": np.zeros(at.FEATURES),
        "feature_scale": np.ones(at.FEATURES),
        "hidden_weight": hidden,
        "hidden_bias": biases[0],
        "output_weight": output,
        "output_bias": output_bias,
    }
    tensors = {name: torch.from_numpy(a).to(torch.float32) for name, a in arrays.items()}
    return Mlp(at.LAYOUT_PAPER, GAMMAS, tensors, card)


def _regressor() -> Any:
    from sklearn.neural_network import MLPRegressor

    return MLPRegressor(hidden_layer_sizes=(16,), max_iter=500, random_state=42)
