"""The operations of `speckv.kernels` in plain torch, fp32: the oracle of whatever is compiled.

It is the CPU path too where nothing is; see `cpu_step`. Rows are handled one after the other, in
Python, so that this file reads as the specification. On CUDA tensors every read of the state
synchronises, so there it serves tests only. `cutoff`, `decide` and what it goes by stand in
`reference_cutoff` and `reference_decision`, and are names of this module too.

Rules
-----
Ties go to the lowest id. ``-inf`` marks an impossible token. A row that holds NaN or ``+inf``, or
nothing but ``-inf``, has no token: ERROR gets a bit, DONE becomes DONE_ERROR, and the sequence is
left as it was.

Randomness is Philox4x32-10 (Salmon et al. 2011) keyed by the 64-bit seed, with the counter
``(token >> 2, position or step, request, purpose | draft index << 8)``; token ids take word
``token & 3``. A position's noise is therefore one fixed function of (seed, request, position,
token id).
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from . import layout as at
from .layout import StepState
from .reference_cutoff import cutoff as cutoff
from .reference_decision import best_gamma as best_gamma
from .reference_decision import decide as decide
from .reference_decision import latest_match as latest_match

_MASK = 0xFFFFFFFF
_MULTIPLIERS = (0xD2511F53, 0xCD9E8D57)
_WEYL = (0x9E3779B9, 0xBB67AE85)
_GUMBEL_SPREAD = 26.1
"""More than the largest Gumbel draw (22.9) minus the smallest (-3.2); 32-bit draws bound both."""

# MKL picks its exp and log at their first call; threads that meet there picked different ones in
# one process of forty, and the last bits with them. One element, on one thread, picks first.
torch.ones(1).exp_().log_()


def philox(
    seed: int, c0: Tensor, c1: int | Tensor, c2: int | Tensor, c3: int | Tensor
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Philox4x32-10 at counters ``(c0, c1, c2, c3)``.

    Parameters
    ----------
    seed : int
        64-bit key; the low word is the first key word.
    c0 : int64 [...]
        First counter word.
    c1, c2, c3 : int, or int64 that broadcasts to the shape of ``c0``
        The others.

    Returns
    -------
    tuple of four int64 [...]
        Random words in [0, 2**32).
    """
    x0 = c0.to(torch.int64) & _MASK
    zero = torch.zeros_like(x0)
    x1, x2, x3 = ((zero + c) & _MASK for c in (c1, c2, c3))
    k0, k1 = seed & _MASK, (seed >> 32) & _MASK
    for _ in range(10):
        low, high = x0 * _MULTIPLIERS[0], x2 * _MULTIPLIERS[1]
        x0 = ((high >> 32) & _MASK) ^ x1 ^ k0
        x2 = ((low >> 32) & _MASK) ^ x3 ^ k1
        x1, x3 = high.bitwise_and_(_MASK), low.bitwise_and_(_MASK)
        k0, k1 = (k0 + _WEYL[0]) & _MASK, (k1 + _WEYL[1]) & _MASK
    return x0, x1, x2, x3


def uniform(words: Tensor) -> Tensor:
    """Random words in [0, 2**32) as fp32 uniforms in (0, 1)."""
    return ((words.to(torch.float32) + 0.5) * 2.0**-32).clamp_(max=1.0 - 2.0**-24)


def gumbel(
    seed: int,
    request: int | Tensor,
    index: int | Tensor,
    tokens: Tensor,
    purpose: int | Tensor = 0,
) -> Tensor:
    """Standard Gumbel noise of token ids.

    ``-log(-log(1 - u))``; the inner logarithm is a series where u is small, because that is where
    the large draws come from and ``1 - u`` would round them to a grid.

    Parameters
    ----------
    request, index, purpose : int, or int64 that broadcasts to the shape of ``tokens``
        Request id; absolute position in the sequence (coupled noise) or step number; NOISE_* of
        `layout` with the draft index in the bits above the lowest eight.
    tokens : int64 [...]

    Returns
    -------
    float32 [...]
    """
    words = philox(seed, tokens >> 2, index, request, purpose)
    lane = tokens & 3
    word = torch.where(
        lane < 2,
        torch.where(lane == 0, words[0], words[1]),
        torch.where(lane == 2, words[2], words[3]),
    )
    u = uniform(word)
    series = u * (1.0 + u * (0.5 + u * (1.0 / 3.0)))
    return -torch.where(u < 2.0**-7, series, -torch.log(1.0 - u)).log_()


def _best_token(x: Tensor, inv: float, low: float, noise: tuple[int, int, int, int] | None) -> int:
    """argmax of ``x * inv + gumbel`` over ``x >= low``; of ``x`` where ``inv`` is 0.

    Only tokens near enough to the top for any noise to lift them get a draw. Returns -1 for a row
    without a token.
    """
    top, index = x.max(0)
    if not math.isfinite(top):
        return -1
    if inv == 0.0 or noise is None:
        return int(index)
    y = x * inv
    ids = torch.nonzero((x >= low) & (y >= float(top) * inv - _GUMBEL_SPREAD)).flatten()
    if not ids.numel():
        return -1
    seed, request, position, purpose = noise
    return int(ids[(y[ids] + gumbel(seed, request, position, ids, purpose)).argmax()])


def draft_step(
    logits: Tensor,
    state: StepState,
    policy: Tensor,
    *,
    inv_temperature: Tensor | None = None,
    seeds: Tensor | None = None,
    id_map: Tensor | None = None,
    cutoffs: Tensor | None = None,
    coupling: str = "gumbel",
) -> None:
    """Choose a draft token, take its signals, and decide whether to draft another.

    For each row that is neither done nor stopped: appends the token at
    ``sequence[LENGTH + DRAFTED]``, writes its signals, folds them into ``running``, increments
    DRAFTED, follows the match and sets STOP to the decision. Other rows are left alone.

    Parameters
    ----------
    logits : fp32 | fp16 | bf16 [B, V]
        Draft logits, unit stride in V, any row stride. V is at most 262,144.
    state : StepState
        Mutated.
    policy : float32 [POLICY_WORDS]
    inv_temperature : float32 [B], optional
        1 / temperature, 0 for a greedy row. None: all rows greedy.
    seeds : int64 [B], optional
        Needed with ``inv_temperature``.
    id_map : int32 [V], optional
        Target id of each draft id; noise is keyed by target ids.
    cutoffs : float32 [B], optional
        Keep ``logits >= cutoff`` when sampling (from `cutoff`). Signals do not see it.
    coupling : "gumbel" | "rejection"
        How the noise is keyed: by position, or by (step, draft index).
    """
    for b in range(logits.shape[0]):
        rows = state.rows[b].tolist()
        if rows[at.DONE] or rows[at.STOP]:
            continue
        running = state.running[b].tolist()
        drafted = rows[at.DRAFTED]
        x = logits[b].float()
        inv = 0.0 if inv_temperature is None else float(inv_temperature[b])
        noise = None
        if seeds is not None:
            noise = _draft_noise(rows, int(seeds[b]), coupling)
        low = -math.inf if cutoffs is None else float(cutoffs[b])
        token = _draft_token(x, inv, low, noise, id_map)
        if token < 0:
            state.rows[b, at.ERROR] |= at.ERROR_DRAFT
            state.rows[b, at.STOP], state.rows[b, at.DONE] = 1, at.DONE_ERROR
            continue
        signals = token_signals(x, token)
        state.signals[b, drafted] = torch.tensor(signals)
        # What is decided from is what is kept: a replay of kept signals decides alike.
        signals = state.signals[b, drafted].tolist()
        running = fold_signals(running, signals, drafted)
        state.running[b] = torch.tensor(running)
        token = token if id_map is None else int(id_map[token])
        rows[at.MATCH_LENGTH] = follow_match(state, b, rows, token)
        state.sequence[b, rows[at.LENGTH] + drafted] = token
        rows[at.DRAFTED] = drafted + 1
        state.rows[b, at.DRAFTED] = drafted + 1
        state.rows[b, at.MATCH_LENGTH] = rows[at.MATCH_LENGTH]
        state.rows[b, at.STOP] = int(decide(policy, rows, running))


def _draft_noise(rows: list[int], seed: int, coupling: str) -> tuple[int, int, int, int]:
    if coupling == "gumbel":
        return seed, rows[at.REQUEST], rows[at.LENGTH] + rows[at.DRAFTED], at.NOISE_COUPLED
    return seed, rows[at.REQUEST], rows[at.STEP], at.NOISE_DRAFT | rows[at.DRAFTED] << 8


def _draft_token(
    x: Tensor,
    inv: float,
    low: float,
    noise: tuple[int, int, int, int] | None,
    id_map: Tensor | None,
) -> int:
    """`_best_token` of a draft row; ties go to the lowest *draft* id, noise goes by target id."""
    if id_map is None or inv == 0.0 or noise is None:
        return _best_token(x, inv, low, noise)
    if not math.isfinite(x.max()):
        return -1
    seed, request, index, purpose = noise
    y = x * inv + gumbel(seed, request, index, id_map.long(), purpose)
    score, index_of_best = y.masked_fill(~(x >= low), -math.inf).max(0)
    return int(index_of_best) if score > -math.inf else -1


def token_signals(x: Tensor, token: int) -> list[float]:
    """[entropy in bits, confidence, margin, probability of ``token``] of fp32 logits ``x`` [V].

    Entropy is ``(log s - t / s) / log 2`` with ``s = sum(exp(d))``, ``t = sum(d * exp(d))``,
    ``d = x - max``. The margin of a vocabulary of one is its confidence.
    """
    top, index = x.max(0)
    d = (x - top).clamp_(min=-1e4)  # exp is 0 long before; keeps 0 * -inf out of t
    e = d.exp()
    s = float(e.sum())
    t = float(e.mul_(d).sum())
    confidence = 1.0 / s
    rest = d.index_fill(0, index, -1e4)
    second = math.exp(float(rest.max())) / s
    entropy = max(math.log(s) - t / s, 0.0) / math.log(2.0)
    return [entropy, confidence, confidence - second, math.exp(float(d[token])) / s]


def follow_match(state: StepState, b: int, rows: list[int], token: int) -> int:
    """MATCH_LENGTH after draft token DRAFTED: 0 unless ``token`` is what came in the match too."""
    place = rows[at.MATCH] + rows[at.DRAFTED]
    agrees = place < rows[at.LENGTH] and int(state.sequence[b, place]) == token
    return rows[at.MATCH_LENGTH] if agrees else 0


def fold_signals(running: list[float], signals: list[float], drafted: int) -> list[float]:
    """One row of `StepState.running` with the signals of draft token ``drafted`` of the step."""
    entropy, confidence, margin, _ = signals
    if drafted == 0:
        step = [entropy, entropy, confidence, confidence]
    else:
        share = 1.0 / (drafted + 1)
        step = [
            running[at.MEAN_ENTROPY] + (entropy - running[at.MEAN_ENTROPY]) * share,
            max(running[at.MAX_ENTROPY], entropy),
            running[at.MEAN_CONFIDENCE] + (confidence - running[at.MEAN_CONFIDENCE]) * share,
            min(running[at.MIN_CONFIDENCE], confidence),
        ]
    return [*step, entropy, confidence, margin, *running[at.ACCEPTANCE :]]


def verify(
    logits: Tensor,
    state: StepState,
    policy: Tensor,
    *,
    eos: Tensor,
    inv_temperature: Tensor | None = None,
    seeds: Tensor | None = None,
    cutoffs: Tensor | None = None,
) -> None:
    """Accept draft tokens while they are the target's own choice, then commit.

    The target's token at each position is the argmax of its logits (greedy rows), or of
    ``logits / T + noise`` over the tokens at or above the cutoff, with the noise of that position
    that the draft used too (Gumbel coupling: Daliri, Musco and Suresh 2024). Draft token j is
    accepted while it equals the target's token j; the first that differs is replaced by it, and
    after γ matches the target adds its own. So the committed tokens are the target's, whatever was
    drafted.

    For each row that is not done: the sequence, LENGTH, GAMMA, ACCEPTED, COMMITTED, STEP,
    PLAIN_RUN, DONE and ACCEPTANCE are updated, DRAFTED becomes 0, and STOP becomes the decision "no
    draft at all" for the next step; MATCH and MATCH_LENGTH are those of the text so far, for a
    policy that goes by them. Commitment ends with the first EOS, and at LIMIT; ACCEPTED counts
    committed draft tokens only, ACCEPTANCE all that matched. Rows that are done get
    COMMITTED = 0.

    Parameters
    ----------
    logits : fp32 | fp16 | bf16 [B, W, V]
        Target logits after the last committed token and each draft token; unit stride in V. Row b
        uses its first DRAFTED + 1 positions; W must be at least that.
    state : StepState
        Mutated.
    policy : float32 [POLICY_WORDS]
    eos : int32 [B, E]
        Ids that end a row; -1 pads.
    inv_temperature, seeds
        As in `draft_step`.
    cutoffs : float32 [B, W], optional
    """
    for b in range(logits.shape[0]):
        rows = state.rows[b].tolist()
        if rows[at.DONE]:
            state.rows[b, at.COMMITTED] = 0
            continue
        inv = 0.0 if inv_temperature is None else float(inv_temperature[b])
        drafts = _drafts(state, b, rows)
        tokens: list[int] = []
        for j in range(rows[at.DRAFTED] + 1):
            position = rows[at.LENGTH] + j
            noise = None
            if seeds is not None:
                noise = (int(seeds[b]), rows[at.REQUEST], position, at.NOISE_COUPLED)
            low = -math.inf if cutoffs is None else float(cutoffs[b, j])
            tokens.append(_best_token(logits[b, j].float(), inv, low, noise))
            if tokens[j] != (drafts[j] if j < len(drafts) else None):
                break
        _commit(state, b, rows, policy, tokens, eos[b].tolist())


def verify_rejection(
    logits: Tensor,
    state: StepState,
    policy: Tensor,
    *,
    eos: Tensor,
    inv_temperature: Tensor,
    seeds: Tensor,
    cutoffs: Tensor,
    lse: Tensor,
    draft_logits: Tensor,
    draft_cutoffs: Tensor,
    draft_lse: Tensor,
    draft_ids: Tensor | None = None,
) -> None:
    """Rejection sampling with residual resampling, then commit (Leviathan 2023, Chen 2023).

    Draft token x_j, drawn from q_j, is accepted with probability min(1, p_j(x)/q_j(x)); the first
    rejected one is replaced by a draw from norm(max(p_j - q_j, 0)); after γ acceptances a draw from
    p_γ follows. All noise is keyed by (step, draft index, purpose). Greedy rows
    (``inv_temperature`` 0) accept what equals the argmax. State updates are those of `verify`.

    Parameters
    ----------
    logits, state, policy, eos, inv_temperature, seeds
        As in `verify`.
    cutoffs, lse : float32 [B, W]
        Of the target's rows, from `cutoff`.
    draft_logits : floating [B, GAMMA_MAX, V_draft]
        The rows that the draft tokens were drawn from.
    draft_cutoffs, draft_lse : float32 [B, GAMMA_MAX]
    draft_ids : int32 [V], optional
        Draft id of each target id, -1 where the draft has none. None: the same ids.
    """
    for b in range(logits.shape[0]):
        rows = state.rows[b].tolist()
        if rows[at.DONE]:
            state.rows[b, at.COMMITTED] = 0
            continue
        inv, seed = float(inv_temperature[b]), int(seeds[b])
        key = (rows[at.REQUEST], rows[at.STEP])
        drafts = _drafts(state, b, rows)
        tokens: list[int] = []
        for j in range(len(drafts) + 1):
            x, low = logits[b, j].float(), float(cutoffs[b, j])
            if inv == 0.0 or j == len(drafts):
                noise = (seed, *key, at.NOISE_BONUS | j << 8)
                tokens.append(_best_token(x, inv, low, noise))
                if j < len(drafts) and tokens[j] == drafts[j]:
                    continue
                break
            if not math.isfinite(x.max()):
                tokens.append(-1)
                break
            p = _probabilities(x, inv, low, float(lse[b, j]))
            q = _probabilities(
                draft_logits[b, j].float(), inv, float(draft_cutoffs[b, j]), float(draft_lse[b, j])
            )
            if draft_ids is not None:
                q = torch.where(draft_ids >= 0, q[draft_ids.clamp(min=0).long()], 0.0)
            purpose = at.NOISE_ACCEPT | j << 8
            word = philox(seed, torch.zeros(1, dtype=torch.int64), key[1], key[0], purpose)[0]
            u = float(uniform(word))
            if u * float(q[drafts[j]]) < float(p[drafts[j]]):
                tokens.append(drafts[j])
                continue
            residual = (p - q).clamp_(min=0.0)
            weight = residual if float(residual.max()) > 0.0 else p
            ids = torch.nonzero(weight).flatten()
            noise_of = gumbel(seed, key[0], key[1], ids, at.NOISE_RESIDUAL | j << 8)
            tokens.append(int(ids[(weight[ids].log() + noise_of).argmax()]))
            break
        _commit(state, b, rows, policy, tokens, eos[b].tolist())


def _drafts(state: StepState, b: int, rows: list[int]) -> list[int]:
    start = rows[at.LENGTH]
    drafts: list[int] = state.sequence[b, start : start + rows[at.DRAFTED]].tolist()
    return drafts


def _probabilities(x: Tensor, inv: float, low: float, lse: float) -> Tensor:
    return torch.where(x >= low, (x * inv - lse).exp(), 0.0)


def _commit(
    state: StepState,
    b: int,
    rows: list[int],
    policy: Tensor,
    tokens: list[int],
    eos: list[int],
) -> None:
    """Append ``tokens`` (accepted draft tokens, then the target's own) and close the step."""
    if tokens[-1] < 0:
        state.rows[b, at.ERROR] |= at.ERROR_TARGET
        state.rows[b, at.DONE], state.rows[b, at.COMMITTED] = at.DONE_ERROR, 0
        return
    gamma, room = rows[at.DRAFTED], rows[at.LIMIT] - rows[at.LENGTH]
    accepted = len(tokens) - 1
    stops = [i for i, token in enumerate(tokens[:room]) if token in eos]
    count = stops[0] + 1 if stops else min(len(tokens), room)
    running = state.running[b].tolist()
    rows[at.ACCEPTED] = min(accepted, count)
    if gamma:
        weight = float(policy[at.EMA_WEIGHT])
        running[at.ACCEPTANCE] += weight * (accepted / gamma - running[at.ACCEPTANCE])
        state.running[b, at.ACCEPTANCE] = running[at.ACCEPTANCE]
    state.sequence[b, rows[at.LENGTH] : rows[at.LENGTH] + count] = torch.tensor(
        tokens[:count], dtype=torch.int32
    )
    rows[at.LENGTH] += count
    rows[at.GAMMA], rows[at.COMMITTED], rows[at.DRAFTED] = gamma, count, 0
    rows[at.STEP] += 1
    rows[at.PLAIN_RUN] = 0 if gamma else rows[at.PLAIN_RUN] + 1
    if stops:
        rows[at.DONE] = at.DONE_STOP
    elif count == room:
        rows[at.DONE] = at.DONE_LENGTH
    elif policy[at.MATCHES]:
        text = state.sequence[b, : rows[at.LENGTH]].cpu().numpy()
        rows[at.MATCH], rows[at.MATCH_LENGTH] = latest_match(text)
    rows[at.STOP] = 1 if rows[at.DONE] else int(decide(policy, rows, running))
    state.rows[b] = torch.tensor(rows, dtype=torch.int32)
