"""The paper's predictor (arXiv 2605.02888) fitted to the pair of a trace: policy ``paper-fitted``.

The shipped ``paper`` is trained on the paper's data, of other models on another machine. This one
asks what the paper's method gives where it has the data of the very pair: its inputs and its target
(the acceptance rate of a block, from the block's own signals, the compression and γ), its regressor
and its objective, most predicted tokens a step over γ = 2, 4, 6, 8. As the paper does, the steps
are those of runs with each of these γ, here of training prompts alone, by exact replay. The
decision is causal, as that of ``paper`` is: before a step and after each of its draft tokens, with
the signals that are known by then.
"""

from __future__ import annotations

import numpy as np

from ..paper.data import GAMMAS
from ..paper.policy import pack
from ..paper.protocol import new_regressor
from ..policies import Policy
from ..policies.policy import COMPRESSION_INDEX, mlp_policy
from .schema import Trace
from .steps import step_rows

PAPER_FITTED = "paper-fitted"


def paper_fitted(trace: Trace) -> Policy:
    """The paper's MLP fitted on the answers of a trace, of any compressions.

    Raises
    ------
    SpeckvError
        scikit-learn is not installed.
    ValueError
        The trace has no step.
    """
    inputs, rates = paper_steps(trace)
    if not len(rates):
        raise ValueError("trace: expected steps to fit on, got none")
    found = new_regressor().fit(inputs, rates)
    card = {"rows": len(rates), "mean_acceptance": float(rates.mean())}
    return mlp_policy(PAPER_FITTED, pack(found.coefs_, found.intercepts_, card))


def paper_steps(trace: Trace) -> tuple[np.ndarray, np.ndarray]:
    """Steps of runs with the paper's γ: its six inputs, float64 [N, 6], and acceptance rates [N].

    Inputs are in the order of `speckv.paper.data.Steps.inputs`.
    """
    inputs, rates = [], []
    for compression in dict.fromkeys(answer.compression for answer in trace.answers):
        for gamma in GAMMAS:
            for _, _, _, rate, _, *signals in step_rows(trace, compression, gamma):
                inputs.append((*signals, COMPRESSION_INDEX[compression], gamma))
                rates.append(rate)
    return np.array(inputs, dtype=np.float64), np.array(rates, dtype=np.float64)
