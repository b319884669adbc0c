"""What a γ-MLP of the ``survival`` layout predicts, beside what came."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor

from ..kernels import layout as at
from ..kernels.layout import GAMMA_MAX
from ..policies.mlp import Mlp
from .decisions import Decisions

_BINS = 10


def calibration(mlp: Mlp, examples: Decisions) -> list[dict[str, float]]:
    """Predicted and actual acceptance of the next draft token, in bins of equal counts.

    Returns
    -------
    list of dict
        ``predicted``, ``actual`` (means) and ``count``.
    """
    drafted = examples.features[:, at.FEATURE_DRAFTED].astype(np.int64)
    asked = np.flatnonzero(drafted < GAMMA_MAX)
    asked = asked[examples.known[asked, drafted[asked]]]
    predicted = survival(mlp, examples.features[asked])[np.arange(len(asked)), drafted[asked]]
    actual = examples.survived[asked, drafted[asked]]
    return [
        {
            "predicted": float(predicted[part].mean()),
            "actual": float(actual[part].mean()),
            "count": len(part),
        }
        for part in np.array_split(np.argsort(predicted, kind="stable"), _BINS)
        if len(part)
    ]


def survival(mlp: Mlp, features: np.ndarray) -> np.ndarray:
    """P(accepted >= k), k = 1..15, by an MLP of that layout: float32 [N, GAMMA_MAX]."""
    x = (torch.from_numpy(features) - mlp.tensors["feature_mean"]) * mlp.tensors["feature_scale"]
    names = ("hidden_weight", "hidden_bias", "output_weight", "output_bias")
    logits = survival_logits(x, [mlp.tensors[name] for name in names])
    found: np.ndarray = torch.sigmoid(logits).numpy()
    return found


def log_loss(mlp: Mlp, examples: Decisions) -> float:
    """Bits per known outcome."""
    bits = surprise(survival(mlp, examples.features), examples.survived)
    return float(bits[examples.known].mean())


def surprise(p: np.ndarray, outcome: np.ndarray) -> np.ndarray:
    """Bits of each outcome, bool, that was given probability ``p``."""
    clipped = np.clip(p, 1e-7, 1 - 1e-7)
    bits: np.ndarray = -np.log2(np.where(outcome, clipped, 1 - clipped))
    return bits


def survival_logits(x: Tensor, parameters: Sequence[Tensor]) -> Tensor:
    """Logits [N, GAMMA_MAX] of standardised inputs [N, FEATURES].

    ``parameters`` are the hidden layer's weight and bias and the output's, as `Mlp` has them.
    """
    hidden_weight, hidden_bias, output_weight, output_bias = parameters
    hidden = (x @ hidden_weight.T + hidden_bias).relu()
    return (hidden @ output_weight.T + output_bias)[:, :GAMMA_MAX]
