"""The operations of `speckv.kernels.reference` for sampled rows, all rows of a batch at once.

The reference takes rows one after the other, milliseconds a request; hundreds of thousands of
requests need this. It is written from the reference's rules, not from its code, and
test_vectorised.py holds it to the reference: the same tokens, γ and accepted counts in every step
of thousands of requests. A law that holds here then holds there.

`Operations.residual` and `Operations.noise_key` are what test_wrong_acceptors.py breaks.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from speckv.kernels import layout as at
from speckv.kernels import reference
from speckv.kernels.layout import StepState


class Operations:
    """`draft_step`, `cutoff`, `verify` and `verify_rejection`, with the reference's signatures.

    Every row must be sampled (no greedy rows), all with one seed; no row ends before its limit.
    """

    def cutoff(
        self,
        logits: Tensor,
        inv_temperature: Tensor,
        top_k: Tensor | None = None,
        top_p: Tensor | None = None,
        *,
        rows: Tensor,
    ) -> tuple[Tensor, Tensor]:
        """That of positions that nobody draws from, which ``rows`` would tell, is not skipped."""
        x, vocab = logits.sort(-1, descending=True).values, logits.shape[-1]
        kept = torch.ones_like(x, dtype=torch.bool)
        if top_k is not None:
            k = torch.where(top_k > 0, top_k, vocab).long().clamp(max=vocab)
            kept = x >= x.gather(-1, k[:, None] - 1)
        if top_p is not None:
            weight = torch.where(kept, x * inv_temperature[:, None], -math.inf).softmax(-1)
            ahead = torch.nn.functional.pad(weight.cumsum(-1)[:, :-1], (1, 0))
            kept &= (ahead < top_p[:, None]) | (top_p[:, None] >= 1.0)
        low = torch.where(kept, x, math.inf).amin(-1)
        y = torch.where(x >= low[:, None], x * inv_temperature[:, None], -math.inf)
        return low, y.logsumexp(-1)

    def draft_step(
        self,
        logits: Tensor,
        state: StepState,
        policy: Tensor,
        *,
        inv_temperature: Tensor,
        seeds: Tensor,
        id_map: Tensor | None = None,
        cutoffs: Tensor | None = None,
        coupling: str = "gumbel",
    ) -> None:
        words = state.rows
        active = ((words[:, at.DONE] == at.RUNNING) & (words[:, at.STOP] == 0)).nonzero()[:, 0]
        rows, x = words[active].long(), logits[active]
        drafted = rows[:, at.DRAFTED].clone()
        if coupling == "gumbel":
            index = rows[:, at.LENGTH] + drafted
            purpose = torch.full_like(drafted, at.NOISE_COUPLED)
        else:
            index, lane = self.noise_key(rows, drafted)
            purpose = at.NOISE_DRAFT | lane << 8
        ids = torch.arange(x.shape[-1]) if id_map is None else id_map.long()
        noise = _gumbel(seeds, rows, index, ids, purpose)
        y = x * inv_temperature[active, None] + noise
        if cutoffs is not None:
            y = torch.where(x < cutoffs[active, None], -math.inf, y)
        token = y.argmax(-1)
        signals = _signals(x, token)
        running = _fold(state.running[active], signals, drafted)
        rows[:, at.DRAFTED] += 1
        rows[:, at.STOP] = decide(policy, rows, running).long()
        state.sequence[active, rows[:, at.LENGTH] + drafted] = ids[token].int()
        state.signals[active, drafted] = signals
        state.running[active] = running
        state.rows[active] = rows.int()

    def verify(
        self,
        logits: Tensor,
        state: StepState,
        policy: Tensor,
        *,
        eos: Tensor,
        inv_temperature: Tensor,
        seeds: Tensor,
        cutoffs: Tensor | None = None,
    ) -> None:
        rows = state.rows.long()
        columns = torch.arange(logits.shape[1])
        ids = torch.arange(logits.shape[2])
        purpose = torch.full_like(rows[:, 0], at.NOISE_COUPLED)
        y = logits * inv_temperature[:, None, None]
        if cutoffs is not None:
            y = torch.where(logits < cutoffs[..., None], -math.inf, y)
        noise = [_gumbel(seeds, rows, rows[:, at.LENGTH] + j, ids, purpose) for j in columns]
        own = (y + torch.stack(noise, 1)).argmax(-1)
        drafts = _drafts(state, rows, logits.shape[1])
        agree = (own == drafts) & (columns < rows[:, at.DRAFTED, None])
        accepted = agree.long().cumprod(-1).sum(-1)
        _commit(state, rows, policy, own, accepted)

    def verify_rejection(
        self,
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
        rows = state.rows.long()
        batch, width, vocab = logits.shape
        inverse, ids = inv_temperature[:, None, None], torch.arange(vocab)
        p = _probabilities(logits, inverse, cutoffs, lse)
        q = _probabilities(draft_logits[:batch], inverse, draft_cutoffs[:batch], draft_lse[:batch])
        if draft_ids is not None:
            q = torch.where(draft_ids >= 0, q[..., draft_ids.clamp(min=0).long()], 0.0)
        drafts = _drafts(state, rows, width)
        going = torch.ones(batch, dtype=torch.bool)
        accepted = torch.zeros(batch, dtype=torch.int64)
        tokens = drafts.clone()
        for j in range(width):
            index, lane = self.noise_key(rows, torch.full_like(accepted, j))
            is_draft = rows[:, at.DRAFTED] > j
            bonus = going & (rows[:, at.DRAFTED] == j)
            noise = _gumbel(seeds, rows, index, ids, at.NOISE_BONUS | lane << 8)
            y = logits[:, j] * inverse[:, 0]
            y = torch.where(logits[:, j] < cutoffs[:, j, None], -math.inf, y) + noise
            tokens[:, j] = torch.where(bonus, y.argmax(-1), tokens[:, j])
            if j == width - 1:
                break
            drawn = drafts[:, j, None]
            words = reference.philox(
                int(seeds[0]), 0 * index, index, rows[:, at.REQUEST], at.NOISE_ACCEPT | lane << 8
            )
            q_drawn, p_drawn = q[:, j].gather(1, drawn)[:, 0], p[:, j].gather(1, drawn)[:, 0]
            keep = reference.uniform(words[0]) * q_drawn < p_drawn
            residual = self.residual(p[:, j], q[:, j])
            weight = torch.where(residual.amax(-1, keepdim=True) > 0, residual, p[:, j])
            noise = _gumbel(seeds, rows, index, ids, at.NOISE_RESIDUAL | lane << 8)
            instead = (weight.log() + noise).argmax(-1)
            tokens[:, j] = torch.where(going & is_draft & ~keep, instead, tokens[:, j])
            going = going & is_draft & keep
            accepted += going.long()
        _commit(state, rows, policy, tokens, accepted)

    def residual(self, p: Tensor, q: Tensor) -> Tensor:
        """What a rejected token is redrawn from, not normalised: [B, V] of p and q [B, V]."""
        return (p - q).clamp(min=0.0)

    def noise_key(self, rows: Tensor, index: Tensor) -> tuple[Tensor, Tensor]:
        """Second Philox counter word, and the lane beside the purpose, of draft token ``index``."""
        return rows[:, at.STEP], index


def decide(policy: Tensor, rows: Tensor, running: Tensor) -> Tensor:
    """Whether drafting stops, bool [B]: MLP in survival layout with the rate objective."""
    drafted, length = rows[:, at.DRAFTED], rows[:, at.LENGTH]
    cap = (rows[:, at.LIMIT] - length - 1).clamp(max=int(policy[at.GAMMA_CAP]))
    look = (drafted == 0) & (
        (running[:, at.LAST_ENTROPY] < 0) | (rows[:, at.PLAIN_RUN] >= int(policy[at.PROBE_EVERY]))
    )
    features = torch.zeros(len(rows), at.FEATURES)
    features[:, : at.FEATURE_DRAFTED] = running[:, : at.FEATURE_DRAFTED]
    features[:, at.FEATURE_DRAFTED] = drafted.float()
    features[:, at.FEATURE_COMPRESSION + int(policy[at.COMPRESSION])] = 1.0
    features[:, at.FEATURE_ACCEPTANCE] = running[:, at.ACCEPTANCE]
    features[:, at.FEATURE_TEMPERATURE] = policy[at.TEMPERATURE]

    def words(start: int, size: int) -> Tensor:
        return policy[start : start + size]

    x = (features - words(at.FEATURE_MEAN, at.FEATURES)) * words(at.FEATURE_SCALE, at.FEATURES)
    weight = words(at.HIDDEN_WEIGHT, at.HIDDEN * at.FEATURES).view(at.FEATURES, at.HIDDEN)
    hidden = (x @ weight + words(at.HIDDEN_BIAS, at.HIDDEN)).relu()
    weight = words(at.OUTPUT_WEIGHT, at.OUTPUTS * at.HIDDEN).view(at.HIDDEN, at.OUTPUTS)
    survival = (hidden @ weight + words(at.OUTPUT_BIAS, at.OUTPUTS)).sigmoid()
    survival = survival[:, : at.GAMMA_MAX]
    tokens = torch.cat([torch.ones(len(rows), 1), survival], 1).cumsum(1)
    cost = words(at.COST, at.WIDTH_MAX) + words(at.COST_PER_TOKEN, at.WIDTH_MAX) * length[:, None]
    value = tokens - policy[at.RATE] * cost
    allowed = (int(policy[at.CANDIDATES]) >> torch.arange(at.WIDTH_MAX)) & 1 == 1
    best = torch.where(allowed, value, -math.inf).argmax(1)
    return (drafted >= cap) | (~look & (drafted >= best))


def _gumbel(seeds: Tensor, rows: Tensor, index: Tensor, ids: Tensor, purpose: Tensor) -> Tensor:
    """Noise [B, len(ids)] of each row's request, index and purpose."""
    tokens = ids.expand(len(rows), -1)
    request = rows[:, at.REQUEST, None]
    return reference.gumbel(int(seeds[0]), request, index[:, None], tokens, purpose[:, None])


def _signals(x: Tensor, token: Tensor) -> Tensor:
    """[B, SIGNALS] of raw draft logits [B, V] and the tokens chosen."""
    log_p = x.double().log_softmax(-1)
    p = log_p.exp()
    entropy = -torch.where(p > 0, p * log_p, 0.0).sum(-1) / math.log(2.0)
    top = p.topk(2).values
    chosen = p.gather(1, token[:, None])[:, 0]
    signals = torch.stack([entropy, top[:, 0], top[:, 0] - top[:, 1], chosen], 1)
    return signals.float()


def _fold(running: Tensor, signals: Tensor, drafted: Tensor) -> Tensor:
    """Running features [B, RUNNING_WORDS] with one more draft token's signals."""
    entropy, confidence = signals[:, at.ENTROPY], signals[:, at.CONFIDENCE]
    first, share = drafted == 0, 1.0 / (drafted + 1)
    new = running.clone()
    for mean, extreme, value, furthest in (
        (at.MEAN_ENTROPY, at.MAX_ENTROPY, entropy, torch.maximum),
        (at.MEAN_CONFIDENCE, at.MIN_CONFIDENCE, confidence, torch.minimum),
    ):
        old = running[:, mean]
        new[:, mean] = torch.where(first, value, old + (value - old) * share)
        new[:, extreme] = torch.where(first, value, furthest(running[:, extreme], value))
    new[:, at.LAST_ENTROPY], new[:, at.LAST_CONFIDENCE] = entropy, confidence
    new[:, at.LAST_MARGIN] = signals[:, at.MARGIN]
    return new


def _probabilities(logits: Tensor, inverse: Tensor, low: Tensor, lse: Tensor) -> Tensor:
    kept = (logits * inverse - lse[..., None]).exp()
    return torch.where(logits >= low[..., None], kept, 0.0)


def _drafts(state: StepState, rows: Tensor, width: int) -> Tensor:
    """Draft tokens [B, width]; columns past a row's own hold whatever stands there."""
    columns = rows[:, at.LENGTH, None] + torch.arange(width)
    return state.sequence.gather(1, columns).long()


def _commit(
    state: StepState, rows: Tensor, policy: Tensor, tokens: Tensor, accepted: Tensor
) -> None:
    """Append the first ``accepted + 1`` of ``tokens`` [B, W] to the rows that are not done."""
    live = (rows[:, at.DONE] == at.RUNNING).nonzero()[:, 0]
    state.rows[:, at.COMMITTED] = 0
    rows, accepted = rows[live], accepted[live]
    gamma = rows[:, at.DRAFTED].clone()
    new = torch.arange(tokens.shape[1]) <= accepted[:, None]
    row, column = new.nonzero().T
    state.sequence[live[row], rows[row, at.LENGTH] + column] = tokens[live][row, column].int()
    running = state.running[live]
    rate = (accepted.double() / gamma.clamp(min=1)).float()
    moved = running[:, at.ACCEPTANCE] + policy[at.EMA_WEIGHT] * (rate - running[:, at.ACCEPTANCE])
    running[:, at.ACCEPTANCE] = torch.where(gamma > 0, moved, running[:, at.ACCEPTANCE])
    state.running[live] = running
    rows[:, at.GAMMA], rows[:, at.ACCEPTED], rows[:, at.DRAFTED] = gamma, accepted, 0
    rows[:, at.COMMITTED] = accepted + 1
    rows[:, at.LENGTH] += accepted + 1
    rows[:, at.STEP] += 1
    rows[:, at.PLAIN_RUN] = torch.where(gamma > 0, 0, rows[:, at.PLAIN_RUN] + 1)
    full = rows[:, at.LENGTH] == rows[:, at.LIMIT]
    rows[:, at.DONE] = torch.where(full, at.DONE_LENGTH, at.RUNNING)
    rows[:, at.STOP] = (full | decide(policy, rows, running)).long()
    state.rows[live] = rows.int()
