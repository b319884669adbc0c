"""Random verification steps for the kernels' tests: states, drafts, logits, guarded buffers."""

from __future__ import annotations

from dataclasses import dataclass, field

import torch
from torch import Tensor

from speckv.kernels import layout as at
from speckv.kernels import reference
from speckv.kernels.layout import StepState
from tests.tolerances import assert_close

MODES = ["greedy", "sampled", "cutoffs"]
"""What `verify_case` can set up."""

_GUARD = 64
_SENTINEL = 77


@dataclass
class Guards:
    """Allocates tensors inside larger buffers, and tells whether anything wrote beside them."""

    buffers: list[tuple[Tensor, int]] = field(default_factory=list)

    def around(self, tensor: Tensor) -> Tensor:
        """A contiguous copy of ``tensor`` with guard words on both sides."""
        size = tensor.numel()
        buffer = torch.full((size + 2 * _GUARD,), _SENTINEL, dtype=tensor.dtype)
        buffer[_GUARD : _GUARD + size] = tensor.flatten()
        self.buffers.append((buffer, size))
        return buffer[_GUARD : _GUARD + size].view(tensor.shape)

    def check(self) -> None:
        for buffer, size in self.buffers:
            assert (buffer[:_GUARD] == _SENTINEL).all()
            assert (buffer[_GUARD + size :] == _SENTINEL).all()


def guarded(state: StepState, guards: Guards) -> StepState:
    """A copy of ``state`` with guard words around each tensor."""
    return StepState(
        rows=guards.around(state.rows),
        running=guards.around(state.running),
        sequence=guards.around(state.sequence),
        signals=guards.around(state.signals),
    )


def assert_same_state(actual: StepState, expected: StepState) -> None:
    """Integers and signals exactly, features within the tolerance of fp32."""
    assert torch.equal(actual.rows, expected.rows)
    assert torch.equal(actual.sequence, expected.sequence)
    assert torch.equal(actual.signals, expected.signals)
    assert_close(actual.running, expected.running, torch.float32)


def strided(logits: Tensor) -> Tensor:
    """``logits`` as a view with gaps of NaN between its rows, unit stride in the last dimension."""
    *outer, last = logits.shape
    padded = torch.full((*(n + 1 for n in outer), last + 3), torch.nan, dtype=logits.dtype)
    view = padded[tuple(slice(0, n) for n in logits.shape)]
    view.copy_(logits)
    return view


def fixed_policy(gamma: int, ema_weight: float = 0.1) -> Tensor:
    """A packed policy that always drafts ``gamma`` tokens."""
    policy = torch.zeros(at.POLICY_WORDS)
    policy[at.MODE], policy[at.GAMMA_CAP] = at.MODE_FIXED, gamma
    policy[at.EMA_WEIGHT] = ema_weight
    return policy


def mlp_policy(generator: torch.Generator, layout: int, objective: int) -> Tensor:
    """A packed policy with a random MLP and random costs."""
    policy = 0.5 * torch.randn(at.POLICY_WORDS, generator=generator)
    policy[: at.HEADER_WORDS] = 0.0
    policy[at.MODE], policy[at.MLP_LAYOUT], policy[at.OBJECTIVE] = at.MODE_MLP, layout, objective
    policy[at.GAMMA_CAP], policy[at.RATE], policy[at.PROBE_EVERY] = at.GAMMA_MAX, 0.3, 3
    policy[at.CANDIDATES], policy[at.EMA_WEIGHT] = 0xFFFF, 0.2
    policy[at.MATCHES], policy[at.TEMPERATURE] = 1.0, 0.7
    return policy


def random_state(batch: int, width: int, vocabulary: int, generator: torch.Generator) -> StepState:
    """Rows amid a request: unequal γ below ``width``, every fifth done, some stopped."""

    def draw(high: int, low: int = 0) -> int:
        return int(torch.randint(low, high, (), generator=generator))

    state = StepState.allocate(batch, 64)
    for b in range(batch):
        length = draw(30, 1)
        prompt = torch.randint(0, vocabulary, (length,), generator=generator).tolist()
        state.reset(b, prompt, limit=length + draw(30, 1), request=draw(1 << 20))
        drafted = draw(width)
        state.rows[b, at.DRAFTED] = drafted
        state.rows[b, at.STOP] = draw(2)
        state.rows[b, at.STEP], state.rows[b, at.PLAIN_RUN] = draw(1000), draw(5)
        state.rows[b, at.COMMITTED] = 9
        state.rows[b, at.MATCH], state.rows[b, at.MATCH_LENGTH] = draw(length), draw(5)
        state.sequence[b, length : length + drafted] = torch.randint(
            0, vocabulary, (drafted,), generator=generator
        ).int()
        if b % 5 == 3:
            state.rows[b, at.DONE] = draw(4, 1)
    state.running.copy_(torch.rand(batch, at.RUNNING_WORDS, generator=generator))
    state.signals.copy_(torch.rand(batch, at.GAMMA_MAX, at.SIGNALS, generator=generator))
    return state


def adopt_target_tokens(
    logits: Tensor,
    state: StepState,
    inv_temperature: Tensor | None,
    seeds: Tensor | None,
    cutoffs: Tensor | None,
    share: float,
    generator: torch.Generator,
) -> None:
    """Replace a share of the draft tokens by what the target chooses there."""
    for b in range(logits.shape[0]):
        length, drafted = (int(state.rows[b, w]) for w in (at.LENGTH, at.DRAFTED))
        inv = 0.0 if inv_temperature is None else float(inv_temperature[b])
        for j in range(drafted):
            low = float("-inf") if cutoffs is None else float(cutoffs[b, j])
            noise = None
            if seeds is not None:
                request = int(state.rows[b, at.REQUEST])
                noise = (int(seeds[b]), request, length + j, at.NOISE_COUPLED)
            token = reference._best_token(logits[b, j].float(), inv, low, noise)
            if token >= 0 and float(torch.rand((), generator=generator)) < share:
                state.sequence[b, length + j] = token


def sampling(mode: str, logits: Tensor, generator: torch.Generator) -> dict[str, Tensor | None]:
    """Arguments of a mode; in the sampled ones every third row is greedy."""
    if mode == "greedy":
        return {"inv_temperature": None, "seeds": None, "cutoffs": None}
    batch = logits.shape[0]
    inv = 0.3 + 2.0 * torch.rand(batch, generator=generator)
    inv[torch.arange(batch) % 3 == 2] = 0.0
    seeds = torch.randint(-(2**62), 2**62, (batch,), generator=generator)
    cutoffs = None
    if mode == "cutoffs":
        cutoffs = logits.float().sort(dim=-1).values[..., logits.shape[-1] // 2].contiguous()
    return {"inv_temperature": inv, "seeds": seeds, "cutoffs": cutoffs}


def verify_case(
    batch: int, width: int, vocabulary: int, dtype: torch.dtype, mode: str, share: float, seed: int
) -> tuple[Tensor, StepState, dict[str, Tensor | None]]:
    """Logits, state and arguments of one `verify`; ``share`` of the drafts are the target's."""
    generator = torch.Generator().manual_seed(seed)
    logits = strided((3.0 * torch.randn(batch, width, vocabulary, generator=generator)).to(dtype))
    state = random_state(batch, width, vocabulary, generator)
    arguments = sampling(mode, logits, generator)
    adopt_target_tokens(logits, state, **arguments, share=share, generator=generator)
    eos = torch.randint(-1, vocabulary, (batch, 3), generator=generator).int()
    return logits, state, {**arguments, "eos": eos}


@dataclass
class RejectionCase:
    """Logits, state and arguments of one `verify_rejection`."""

    logits: Tensor
    state: StepState
    arguments: dict[str, Tensor | None]


def truncation(logits: Tensor, inv: Tensor, top_k: int, top_p: float) -> tuple[Tensor, Tensor]:
    """Cutoffs and log-sum-exps [B, N] of logits [B, N, V]."""
    batch, width, vocabulary = logits.shape
    rows = batch * width
    low, lse = reference.cutoff(
        logits.reshape(rows, vocabulary),
        inv.repeat_interleave(width),
        torch.full((rows,), top_k, dtype=torch.int32),
        torch.full((rows,), top_p),
    )
    return low.view(batch, width), lse.view(batch, width)


def rejection_case(
    batch: int,
    width: int,
    vocabulary: int,
    dtype: torch.dtype,
    *,
    seed: int,
    similarity: float = 0.8,
    trimmed: bool = False,
    top_k: int = 0,
    top_p: float = 1.0,
) -> RejectionCase:
    """Draft tokens drawn from the draft; it knows half the vocabulary where it is trimmed.

    ``similarity`` 1 makes the draft the target itself, 0 unrelated. Every third row is greedy.
    """
    generator = torch.Generator().manual_seed(seed)
    state = random_state(batch, width, vocabulary, generator)
    logits = 2.0 * torch.randn(batch, width, vocabulary, generator=generator)
    other = 2.0 * torch.randn(batch, at.GAMMA_MAX, vocabulary, generator=generator)
    drafts = min(width, at.GAMMA_MAX)
    other[:, :drafts] += (logits[:, :drafts] - other[:, :drafts]) * similarity
    draft_ids = None
    of_draft = torch.arange(vocabulary)
    if trimmed:
        shuffled = torch.randperm(vocabulary, generator=generator)
        of_draft = shuffled[: max(vocabulary // 2, 1)]
        draft_ids = torch.full((vocabulary,), -1, dtype=torch.int32)
        draft_ids[of_draft] = torch.arange(len(of_draft), dtype=torch.int32)
    logits = strided(logits.to(dtype))
    draft_logits = strided(other[..., of_draft].to(dtype))
    inv = 0.5 + torch.rand(batch, generator=generator)
    inv[torch.arange(batch) % 3 == 2] = 0.0
    cutoffs, lse = truncation(logits, inv, top_k, top_p)
    draft_cutoffs, draft_lse = truncation(draft_logits, inv, top_k, top_p)
    for b in range(batch):
        length, drafted = (int(state.rows[b, w]) for w in (at.LENGTH, at.DRAFTED))
        for j in range(drafted):
            x = draft_logits[b, j].float()
            weight = (x * (float(inv[b]) or 20.0)).masked_fill(x < draft_cutoffs[b, j], -torch.inf)
            token = int(torch.multinomial(weight.softmax(0), 1, generator=generator))
            state.sequence[b, length + j] = of_draft[token]
    eos = torch.randint(-1, vocabulary, (batch, 2), generator=generator).int()
    arguments = {
        "eos": eos,
        "inv_temperature": inv,
        "seeds": torch.randint(-(2**62), 2**62, (batch,), generator=generator),
        "cutoffs": cutoffs,
        "lse": lse,
        "draft_logits": draft_logits,
        "draft_cutoffs": draft_cutoffs,
        "draft_lse": draft_lse,
        "draft_ids": draft_ids,
    }
    return RejectionCase(logits, state, arguments)
