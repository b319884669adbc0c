"""Device functions that kernels share: rounding, noise, matches, the γ decision, early launches.

The twins of `_gumbel_run`, `_latest_match` and `_decide` are `reference.gumbel`,
`latest_match` and `decide`.
"""

from __future__ import annotations

import triton
import triton.language as tl

from . import layout as at


@triton.jit
def _round(y, dtype: tl.constexpr, EMULATED: tl.constexpr):
    """``y`` in ``dtype``, to nearest even; the interpreter truncates to bf16 what it is given."""
    if EMULATED and dtype == tl.bfloat16:
        bits = y.to(tl.int32, bitcast=True)
        bits += 0x7FFF + ((bits >> 16) & 1)
        y = (bits & -0x10000).to(tl.float32, bitcast=True)
    return y.to(dtype)


EMULATED = not hasattr(_round, "cache_key")
"""Whether kernels run in Triton's interpreter."""


@triton.jit
def _wait(PDL: tl.constexpr):
    """Wait for the kernels before, and let the next one start and wait; nothing without ``PDL``.

    With programmatic dependent launch a kernel starts before the one it follows has ended. Nothing
    that another kernel writes may be read before this, and nothing written that another reads. The
    next kernel's programs take what room is left once all of this one's have come here.
    """
    if PDL:
        tl.inline_asm_elementwise(
            "griddepcontrol.wait; // $0", "=r,~{memory}", [], tl.int32, is_pure=False, pack=1
        )
        tl.inline_asm_elementwise(
            "griddepcontrol.launch_dependents; // $0",
            "=r,~{memory}",
            [],
            tl.int32,
            is_pure=False,
            pack=1,
        )


@triton.jit
def _uniform(words):
    """uint32 words as fp32 uniforms in (0, 1)."""
    u = (words.to(tl.float32) + 0.5) * 2.3283064365386963e-10  # 2**-32
    return tl.minimum(u, 0.9999999403953552)  # 1 - 2**-24


@triton.jit
def _gumbel_of(words):
    u = _uniform(words)
    series = u * (1.0 + u * (0.5 + u * (1.0 / 3.0)))
    return -tl.log(tl.where(u < 0.0078125, series, -tl.log(1.0 - u)))


@triton.jit
def _gumbel_run(seed, request, index, purpose, o_first, BLOCK: tl.constexpr):
    """Noise of ``BLOCK`` token ids from ``o_first``, a multiple of 4: one Philox per 4 ids."""
    o_quad = (o_first // 4 + tl.arange(0, BLOCK // 4)).to(tl.uint32)
    zero = o_quad * 0
    w0, w1, w2, w3 = tl.philox(
        seed,
        o_quad,
        zero + index.to(tl.uint32),
        zero + request.to(tl.uint32),
        zero + purpose.to(tl.uint32),
    )
    return _gumbel_of(tl.interleave(tl.interleave(w0, w2), tl.interleave(w1, w3)))


@triton.jit
def _gumbel_at(seed, request, index, purpose, b_token):
    """Noise of arbitrary token ids: one Philox each."""
    quad = (b_token // 4).to(tl.uint32)
    zero = quad * 0
    w0, w1, w2, w3 = tl.philox(
        seed,
        quad,
        zero + index.to(tl.uint32),
        zero + request.to(tl.uint32),
        zero + purpose.to(tl.uint32),
    )
    lane = b_token % 4
    return _gumbel_of(tl.where(lane < 2, tl.where(lane == 0, w0, w1), tl.where(lane == 2, w2, w3)))


_PLACES: tl.constexpr = tl.constexpr(1 << 27)  # more than a text has, beside a number up to 4


@triton.jit
def _latest_match(sequence_ptr, length):
    """(place, number of tokens) of `reference.latest_match` for the first ``length`` tokens."""
    o = tl.arange(0, 1024)
    t0 = tl.load(sequence_ptr + length - 1)
    t1 = tl.load(sequence_ptr + length - 2, mask=length > 1, other=-1)
    t2 = tl.load(sequence_ptr + length - 3, mask=length > 2, other=-1)
    t3 = tl.load(sequence_ptr + length - 4, mask=length > 3, other=-1)
    best = tl.zeros([1024], tl.int32)
    for first in range(0, length - 1, 1024):
        end = first + o
        m = end < length - 1
        p = sequence_ptr + end
        one = tl.load(p, mask=m, other=-2) == t0
        two = one & (tl.load(p - 1, mask=m & (end > 0), other=-2) == t1)
        three = two & (tl.load(p - 2, mask=m & (end > 1), other=-2) == t2)
        four = three & (tl.load(p - 3, mask=m & (end > 2), other=-2) == t3)
        count = one.to(tl.int32) + two.to(tl.int32) + three.to(tl.int32) + four.to(tl.int32)
        best = tl.maximum(best, tl.where(one, count * _PLACES + end + 1, 0))
    found = tl.max(best, 0)
    return found % _PLACES, found // _PLACES


@triton.jit
def _load_columns(ptr):
    """The columns of a matrix [16, 16] that are stored one after the other."""
    o = tl.arange(0, 16)
    columns = (tl.load(ptr + o),)
    for i in tl.static_range(1, 16):
        columns = columns + (tl.load(ptr + 16 * i + o),)
    return columns


@triton.jit
def _load_policy(policy_ptr):
    """What `_decide` needs of a policy, to be asked for well before it is needed."""
    o = tl.arange(0, 16)
    rule = (
        tl.load(policy_ptr + at.MODE).to(tl.int32),
        tl.load(policy_ptr + at.THRESHOLD),
        tl.load(policy_ptr + at.GAMMA_CAP).to(tl.int32),
        tl.load(policy_ptr + at.PROBE_EVERY).to(tl.int32),
    )
    inputs = (
        tl.load(policy_ptr + at.COMPRESSION).to(tl.int32),
        tl.load(policy_ptr + at.TEMPERATURE),
        tl.load(policy_ptr + at.FEATURE_MEAN + o),
        tl.load(policy_ptr + at.FEATURE_SCALE + o),
    )
    mlp = (
        tl.load(policy_ptr + at.MLP_LAYOUT),
        _load_columns(policy_ptr + at.HIDDEN_WEIGHT),  # of each feature
        tl.load(policy_ptr + at.HIDDEN_BIAS + o),
        _load_columns(policy_ptr + at.OUTPUT_WEIGHT),  # of each hidden unit, for k - 1
        tl.load(policy_ptr + at.OUTPUT_BIAS + o),
        tl.load(policy_ptr + at.EXPECTED_ACCEPTANCE),
    )
    value = (
        tl.load(policy_ptr + at.OBJECTIVE),
        tl.load(policy_ptr + at.COST + o),
        tl.load(policy_ptr + at.COST_PER_TOKEN + o),
        tl.load(policy_ptr + at.RATE),
        tl.load(policy_ptr + at.CANDIDATES).to(tl.int32),
    )
    return rule, inputs, mlp, value


@triton.jit
def _everywhere(b_x, i: tl.constexpr):
    """Element ``i`` of [16] in every place: a shuffle, where a sum would be four."""
    return tl.gather(b_x, tl.full([16], i, tl.int32), 0)


@triton.jit
def _times(columns, b_x):
    """A matrix [16, 16] times a vector; no warp waits for another, as it would for a reduction."""
    even = columns[0] * _everywhere(b_x, 0)
    odd = columns[1] * _everywhere(b_x, 1)
    for i in tl.static_range(2, 16, 2):
        even += columns[i] * _everywhere(b_x, i)
        odd += columns[i + 1] * _everywhere(b_x, i + 1)
    return even + odd


@triton.jit
def _best_gamma(
    policy,
    length,
    drafted,
    mean_entropy,
    max_entropy,
    mean_confidence,
    min_confidence,
    last_entropy,
    last_confidence,
    last_margin,
    acceptance,
    match_length,
):
    """The candidate γ of the highest value, lowest among equals (`reference.best_gamma`)."""
    _, inputs, mlp, worth = policy
    compression, temperature, feature_mean, feature_scale = inputs
    mlp_layout, hidden_weight, hidden_bias, output_weight, output_bias, expected = mlp
    objective, cost, cost_per_token, rate, candidates = worth
    o = tl.arange(0, 16)
    f = tl.where(o == at.MEAN_ENTROPY, mean_entropy, 0.0)
    f = tl.where(o == at.MAX_ENTROPY, max_entropy, f)
    f = tl.where(o == at.MEAN_CONFIDENCE, mean_confidence, f)
    f = tl.where(o == at.MIN_CONFIDENCE, min_confidence, f)
    f = tl.where(o == at.LAST_ENTROPY, last_entropy, f)
    f = tl.where(o == at.LAST_CONFIDENCE, last_confidence, f)
    f = tl.where(o == at.LAST_MARGIN, last_margin, f)
    f = tl.where(o == at.FEATURE_DRAFTED, drafted.to(tl.float32), f)
    f = tl.where(o == at.FEATURE_COMPRESSION + compression, 1.0, f)
    f = tl.where(o == at.FEATURE_ACCEPTANCE, acceptance, f)
    f = tl.where(o == at.FEATURE_MATCH, match_length.to(tl.float32), f)
    f = tl.where(o == at.FEATURE_TEMPERATURE, temperature, f)
    f = (f - feature_mean) * feature_scale

    hidden = _times(hidden_weight, f) + hidden_bias
    gamma = o.to(tl.float32)
    if mlp_layout == at.LAYOUT_PAPER:
        step = gamma * _everywhere(feature_scale, at.FEATURE_GAMMA)
        share = _everywhere(output_bias, 0)
        for i in tl.static_range(16):
            of_gamma = step * _everywhere(hidden_weight[at.FEATURE_GAMMA], i)
            by_gamma = tl.maximum(_everywhere(hidden, i) + of_gamma, 0.0)
            share += by_gamma * _everywhere(output_weight[i], 0)
        tokens = tl.minimum(tl.maximum(share, 0.0), 1.0) * gamma + 1.0
    else:
        logit = _times(output_weight, tl.maximum(hidden, 0.0)) + output_bias
        survival = 1.0 / (1.0 + tl.exp(-logit))
        tokens = 1.0 + (tl.cumsum(survival, 0) - survival)
    if expected > 0.0:
        tokens = 1.0 + (tokens - 1.0) * tl.minimum(acceptance / expected, 1.0)
    value = tokens
    if objective == at.OBJECTIVE_RATE:
        value = tokens - rate * (cost + cost_per_token * length.to(tl.float32))
    value = tl.where((candidates >> o) & 1 == 1, value, float("-inf"))
    return tl.argmax(value, 0)


@triton.jit
def _decide(
    policy,
    length,
    limit,
    drafted,
    plain_run,
    mean_entropy,
    max_entropy,
    mean_confidence,
    min_confidence,
    last_entropy,
    last_confidence,
    last_margin,
    acceptance,
    match_length,
):
    """1 if drafting stops now, else 0 (`reference.decide`); ``policy`` is of `_load_policy`."""
    mode, threshold, gamma_cap, probe_every = policy[0]
    stop = drafted >= tl.minimum(gamma_cap, limit - length - 1)
    if mode == at.MODE_ENTROPY:
        stop = stop | ((drafted > 0) & (last_entropy > threshold))
    elif mode == at.MODE_CONFIDENCE:
        stop = stop | ((drafted > 0) & (last_confidence < threshold))
    elif mode == at.MODE_MLP:
        probe = (probe_every > 0) & (plain_run >= probe_every)
        look = (drafted == 0) & (probe | (last_entropy < 0.0))
        best = _best_gamma(
            policy,
            length,
            drafted,
            mean_entropy,
            max_entropy,
            mean_confidence,
            min_confidence,
            last_entropy,
            last_confidence,
            last_margin,
            acceptance,
            match_length,
        )
        stop = stop | ((drafted >= best) & (look == 0))
    return stop.to(tl.int32)
