"""The paper's γ-MLP, trained by its protocol on its released step data (arXiv 2605.02888).

`speckv.paper.protocol` has the protocol; this module packs what it yields for the kernels.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch

from ..kernels import layout as at
from ..policies.mlp import Mlp
from .data import COMPRESSIONS, GAMMAS, read_steps
from .protocol import evaluate

# Where the paper's inputs stand among the packed ones; the compression's index is a weight of
# 0, 1 or 2 on its one-hot.
_INPUTS = (at.MEAN_ENTROPY, at.MEAN_CONFIDENCE, at.MAX_ENTROPY, at.MIN_CONFIDENCE)


def train(path: Path) -> Mlp:
    """Train the paper's MLP on a step table and pack it in the ``paper`` layout.

    Raises
    ------
    SpeckvError
        scikit-learn is not installed.
    ValueError
        As `speckv.paper.data.read_steps`, or too few steps.
    """
    steps = read_steps(path)
    found = evaluate(steps)
    card = {
        "source": "arXiv 2605.02888, released step data",
        "rows": len(steps),
        "held_out_correlation": found.correlation,
        "mean_acceptance": float(steps.acceptance.mean()),
        "random_state": 42,
    }
    return pack(found.regressor.coefs_, found.regressor.intercepts_, card)


def pack(weights: Sequence[np.ndarray], biases: Sequence[np.ndarray], card: dict[str, Any]) -> Mlp:
    """The regressor's weights ([6, 16] and [16, 1], biases [16] and [1]) as an `Mlp`."""
    hidden = np.zeros((at.HIDDEN, at.FEATURES))
    first = weights[0].T  # [16, 6]
    for source, place in enumerate(_INPUTS):
        hidden[:, place] = first[:, source]
    for index in range(len(COMPRESSIONS)):
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
