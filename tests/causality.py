"""That decisions are causal: `draft_step` and `verify`, in any form, read nothing still to come.

What has not been drafted yet stands in the state all the same: slots of ``signals`` beyond DRAFTED
and of ``sequence`` beyond the draft tokens, left there by whatever ran before. `assert_causal`
fills them with rubbish, or with what is truly to come in another order, before every operation.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import cache

import torch
from torch import Tensor

from speckv.decoding.trained import SHIPPED
from speckv.kernels import layout as at
from speckv.kernels.layout import GAMMA_MAX, StepState
from speckv.models.slice_draft import shipped_drafts
from speckv.policies import Mlp, Policy
from speckv.policies.policy import mlp_policy
from tests.traces.conftest import POLICIES as MADE_UP
from tests.traces.synthetic import COST

VOCABULARY = 100
_CAPACITY = 96
_DRAFTS = (6, 3)  # forwards of each step; in the first drafting goes on whatever is decided
WIDTH = max(_DRAFTS) + 1
_EOS = torch.tensor([[-1]] * 3, dtype=torch.int32)

DraftStep = Callable[[Tensor, StepState, Tensor], None]
"""Of logits [B, V], a state and a packed policy."""
Verify = Callable[[Tensor, StepState, Tensor, Tensor], None]
"""Of logits [B, W, V], a state, a packed policy and end tokens [B, 1]."""


@cache
def shipped_policy() -> Policy:
    """The trained policy that comes with the package, of the survival layout."""
    (folder,) = shipped_drafts()
    policy = mlp_policy("shipped", Mlp.load(folder / SHIPPED))
    assert policy.mlp is not None and policy.mlp.layout == at.LAYOUT_SURVIVAL
    return policy


POLICIES: dict[str, Policy] = MADE_UP | {"shipped": shipped_policy()}
"""Of every mode, with MLPs of both layouts, made up and trained."""
OF_EACH_MODE = (
    *("fixed:0", "fixed:4", "entropy:1.5", "confidence:0.6"),
    *("paper", "speckv", "survival", "shipped"),
)
THAT_LOOK = ("entropy:1.5", "confidence:0.6", "paper", "shipped")


def packed(name: str) -> Tensor:
    return POLICIES[name].pack("fp32", COST)


def draft_logits(seed: int = 3) -> list[Tensor]:
    """Of each draft forward: some sure of their token, some not."""
    draw = torch.Generator().manual_seed(seed)
    return [torch.randn(3, VOCABULARY, generator=draw) * (1 + j % 4) for j in range(max(_DRAFTS))]


def _target_logits() -> Tensor:
    draw = torch.Generator().manual_seed(4)
    return torch.randn(3, WIDTH, VOCABULARY, generator=draw)


def _begun() -> StepState:
    """Rows at their first step: one near its end, and one that repeats its text."""
    state = StepState.allocate(3, _CAPACITY)
    text = [5, 8, 1, 9, 5, 8, 1]
    for row, limit in enumerate((80, 16, 80)):
        state.reset(row, text, limit=limit, request=row)
        state.running[row, at.ACCEPTANCE] = 0.3 + 0.3 * row
    state.rows[:, at.STOP] = 0
    state.rows[2, at.MATCH], state.rows[2, at.MATCH_LENGTH] = 3, 3
    return state


def _to_come(state: StepState, signals: Tensor, sequence: Tensor) -> None:
    """Write these where nothing is drafted yet."""
    for row, words in enumerate(state.rows.tolist()):
        drafted, end = words[at.DRAFTED], words[at.LENGTH] + words[at.DRAFTED]
        state.signals[row, drafted:] = signals[row, drafted:]
        state.sequence[row, end:] = sequence[row, end:]


def _known(state: StepState) -> list[Tensor]:
    """A copy of what is committed or drafted, and nothing else."""
    ends = [(words[at.LENGTH], words[at.DRAFTED]) for words in state.rows.tolist()]
    return [
        state.rows.clone(),
        state.running.clone(),
        *(state.sequence[row, : sum(end)].clone() for row, end in enumerate(ends)),
        *(state.signals[row, : end[1]].clone() for row, end in enumerate(ends)),
    ]


def decode(
    draft_step: DraftStep,
    verify: Verify,
    policy: Tensor,
    signals: Tensor,
    sequence: Tensor,
) -> list[list[Tensor]]:
    """What is known after each operation of some steps; what is to come is overwritten before it.

    Parameters
    ----------
    signals : float32 [B, GAMMA_MAX, SIGNALS]
    sequence : int32 [B, S]
    """
    state, seen = _begun(), []

    def run(operation: Callable[[], None]) -> None:
        _to_come(state, signals, sequence)
        operation()
        seen.append(_known(state))

    target = _target_logits()
    for step, count in enumerate(_DRAFTS):
        for x in draft_logits()[:count]:
            run(lambda x=x: draft_step(x, state, policy))  # type: ignore[misc]
            assert _untouched(state, signals, sequence), "it wrote beyond the drafted tokens"
            if step == 0:
                state.rows[:, at.STOP] = 0
        run(lambda: verify(target, state, policy, _EOS))
    return seen


def _untouched(state: StepState, signals: Tensor, sequence: Tensor) -> bool:
    mine, before = state.signals.view(torch.int32), signals.view(torch.int32)  # NaN equals NaN
    return all(
        torch.equal(mine[row, words[at.DRAFTED] :], before[row, words[at.DRAFTED] :])
        and torch.equal(state.sequence[row, end:], sequence[row, end:])
        for row, words in enumerate(state.rows.tolist())
        for end in (words[at.LENGTH] + words[at.DRAFTED],)
    )


def _futures(clean: list[list[Tensor]]) -> list[tuple[Tensor, Tensor]]:
    """Signals and sequences to stand where nothing is drafted yet."""
    whole = clean[_DRAFTS[0] - 1]  # the first step, all of it drafted
    signals = torch.zeros(3, GAMMA_MAX, at.SIGNALS)
    sequence = torch.zeros(3, _CAPACITY, dtype=torch.int32)
    for row in range(3):
        signals[row, : _DRAFTS[0]] = whole[5 + row].flip(0)
        sequence[row, : len(whole[2 + row])] = whole[2 + row].flip(0)
    return [
        (signals, sequence),
        (torch.full_like(signals, torch.nan), torch.full_like(sequence, -1)),
        (torch.full_like(signals, 1e9), torch.full_like(sequence, 8)),
    ]


def assert_causal(draft_step: DraftStep, verify: Verify, policy: Tensor) -> None:
    """What is to come changes no decision, and no bit of anything else."""
    nothing = torch.zeros(3, GAMMA_MAX, at.SIGNALS), torch.zeros(3, _CAPACITY, dtype=torch.int32)
    clean = decode(draft_step, verify, policy, *nothing)
    for future in _futures(clean):
        found = decode(draft_step, verify, policy, *future)
        for place, (ours, theirs) in enumerate(zip(found, clean, strict=True)):
            for one, other in zip(ours, theirs, strict=True):
                assert torch.equal(one, other), f"operation {place}"


def assert_decisions_follow_the_logits(draft_step: DraftStep, policy: Tensor) -> None:
    """Other logits change the decision about their own token somewhere, and none before it."""

    def drafted(logits: list[Tensor]) -> list[list[Tensor]]:
        state, seen = _begun(), []
        for x in logits:
            draft_step(x, state, policy)
            seen.append(_known(state))
            state.rows[:, at.STOP] = 0
        return seen

    changed = 0
    for place in (0, 1, 3):
        first, own = draft_logits()[:place], draft_logits()[place]
        clean = drafted([*first, own])
        for factor in (0.02, 20.0):
            found = drafted([*first, factor * own])
            for ours, theirs in zip(found[:-1], clean[:-1], strict=True):
                assert all(torch.equal(a, b) for a, b in zip(ours, theirs, strict=True))
            changed += int((found[-1][0] != clean[-1][0])[:, at.STOP].sum())
    assert changed
