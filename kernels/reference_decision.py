"""`reference.decide` and `reference.best_gamma`: whether to draft another token, on the CPU.

`reference.latest_match` finds what the text repeats, of which the decision may be told.

The loop decides after every draft token. Torch's calls on a few words each would cost several times
the arithmetic, so this is NumPy, in fp32, on the policy's own memory.
"""

from __future__ import annotations

import math

import numpy as np
from numpy.typing import NDArray
from torch import Tensor

from . import layout as at

__all__ = ["best_gamma", "decide", "latest_match"]

_GAMMAS = np.arange(at.WIDTH_MAX, dtype=np.float32)
_BITS = 1 << np.arange(at.WIDTH_MAX)


def decide(policy: Tensor, rows: list[int], running: list[float]) -> bool:
    """Whether drafting stops now, with ``rows[DRAFTED]`` tokens drafted in this step.

    The rule, in order: stop at the cap ``min(GAMMA_CAP, remaining - 1)``; fixed: never before;
    thresholds: stop *after* the first uncertain token, which is still verified, so never at 0; MLP:
    with g the candidate γ of the highest value, stop if ``DRAFTED >= g``. The value of γ is
    E[tokens] (objective tokens) or E[tokens] - λ·cost(γ) (objective rate), where E[tokens(γ)] is 1
    + the sum of P(accepted >= k) for k <= γ (survival layout), or clip(rate(γ), 0, 1)·γ + 1 (paper
    layout); an MLP trained on another pair is held to this one's record: where EXPECTED_ACCEPTANCE
    is positive, the predicted accepted tokens are scaled by min(ACCEPTANCE / EXPECTED_ACCEPTANCE,
    1). At DRAFTED = 0 the features are those of the last step that drafted; where there is none, or
    after PROBE_EVERY steps with γ=0, one token is drafted to find out.

    Parameters
    ----------
    policy : float32 [POLICY_WORDS]
        Of any device; the host waits for one elsewhere.
    rows, running : lists
        One row of `StepState.rows` and of `StepState.running`.
    """
    header = policy[: at.HEADER_WORDS].tolist()
    drafted = rows[at.DRAFTED]
    if drafted >= min(int(header[at.GAMMA_CAP]), rows[at.LIMIT] - rows[at.LENGTH] - 1):
        return True
    mode = int(header[at.MODE])
    if mode == at.MODE_FIXED:
        return False
    if mode == at.MODE_ENTROPY:
        return drafted > 0 and running[at.LAST_ENTROPY] > header[at.THRESHOLD]
    if mode == at.MODE_CONFIDENCE:
        return drafted > 0 and running[at.LAST_CONFIDENCE] < header[at.THRESHOLD]
    if drafted == 0:
        probe = int(header[at.PROBE_EVERY])
        if running[at.LAST_ENTROPY] < 0 or 0 < probe <= rows[at.PLAIN_RUN]:
            return False
    return drafted >= best_gamma(policy, rows, running)


def best_gamma(policy: Tensor, rows: list[int], running: list[float]) -> int:
    """The candidate γ of the highest value (lowest γ among equals); see `decide`."""
    words: NDArray[np.float32] = policy.cpu().numpy()
    header = words[: at.HEADER_WORDS].tolist()
    features = np.zeros(at.FEATURES, dtype=np.float32)
    features[: at.FEATURE_DRAFTED] = running[: at.FEATURE_DRAFTED]
    features[at.FEATURE_DRAFTED] = rows[at.DRAFTED]
    features[at.FEATURE_COMPRESSION + int(header[at.COMPRESSION])] = 1.0
    features[at.FEATURE_ACCEPTANCE] = running[at.ACCEPTANCE]
    features[at.FEATURE_MATCH] = rows[at.MATCH_LENGTH]
    features[at.FEATURE_TEMPERATURE] = header[at.TEMPERATURE]

    def block(start: int, *shape: int) -> NDArray[np.float32]:
        return words[start : start + math.prod(shape)].reshape(shape)

    mean, scale = block(at.FEATURE_MEAN, at.FEATURES), block(at.FEATURE_SCALE, at.FEATURES)
    weight = block(at.HIDDEN_WEIGHT, at.FEATURES, at.HIDDEN).T
    hidden = weight @ ((features - mean) * scale) + block(at.HIDDEN_BIAS, at.HIDDEN)
    output = block(at.OUTPUT_WEIGHT, at.HIDDEN, at.OUTPUTS).T
    if int(header[at.MLP_LAYOUT]) == at.LAYOUT_PAPER:
        by_gamma = hidden + np.multiply.outer(_GAMMAS * scale[-1], weight[:, -1])  # [16, HIDDEN]
        rate = np.maximum(by_gamma, 0.0) @ output[0] + words[at.OUTPUT_BIAS]
        tokens = np.minimum(np.maximum(rate, 0.0), 1.0) * _GAMMAS + 1.0
    else:
        logit = output @ np.maximum(hidden, 0.0) + block(at.OUTPUT_BIAS, at.OUTPUTS)
        tokens = np.ones(at.WIDTH_MAX, dtype=np.float32)
        # The logistic function; exp would overflow.
        tokens[1:] = 0.5 + 0.5 * np.tanh(0.5 * logit[: at.GAMMA_MAX])
        tokens = tokens.cumsum()
    expected = header[at.EXPECTED_ACCEPTANCE]
    if expected > 0.0:
        tokens = 1.0 + (tokens - 1.0) * min(running[at.ACCEPTANCE] / expected, 1.0)
    value = tokens
    if int(header[at.OBJECTIVE]) == at.OBJECTIVE_RATE:
        cost = block(at.COST, at.WIDTH_MAX)
        slope = block(at.COST_PER_TOKEN, at.WIDTH_MAX)
        value = tokens - header[at.RATE] * (cost + slope * rows[at.LENGTH])
    allowed = int(header[at.CANDIDATES]) & _BITS != 0
    return int(np.where(allowed, value, -math.inf).argmax())


def latest_match(text: NDArray[np.int32]) -> tuple[int, int]:
    """Where the last tokens of a text stood before, and how many of them.

    Of the earlier places where the most last tokens stand, up to ``MATCH_MAX``, the latest.

    Parameters
    ----------
    text : int32 [n]
        n is at least 1.

    Returns
    -------
    tuple of int
        The place after them, below n, and their number; (0, 0) if the last token is new.
    """
    ends = np.flatnonzero(text[:-1] == text[-1])
    if not len(ends):
        return 0, 0
    length = 1
    while length < at.MATCH_MAX:
        longer = ends[ends >= length]
        longer = longer[text[longer - length] == text[-1 - length]]
        if not len(longer):
            break
        ends, length = longer, length + 1
    return int(ends[-1]) + 1, length
