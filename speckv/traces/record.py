"""Recording the rows of a trace: the target's texts, then the draft from every place of them.

The draft is fed exactly as the decoding loop feeds it. A place's rows overwrite those of the place
before in the draft's cache, so going on by one place costs one forward more than the draft tokens
themselves, and no copy of a cache.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace

import numpy as np
import torch
from torch import Tensor

from ..decoding.current import on_targets_device
from ..decoding.eager import (
    EagerLoop,
    gather,
    operations,
    read_rows,
    scatter,
)
from ..decoding.prepared import prepared
from ..decoding.requests import RequestBatch
from ..decoding.vocabulary import draft_vocabulary
from ..kernels import layout as at
from ..kernels import reference
from ..kernels.layout import GAMMA_MAX, SIGNALS, WIDTH_MAX, StepState
from ..models.base import CausalModel
from ..policies import parse_policy
from ..sampling import SamplingParams
from .schema import Answer, Rows


@on_targets_device
@torch.inference_mode()
def record(
    target: CausalModel,
    draft: CausalModel,
    answers: Sequence[Answer],
    *,
    eos: Sequence[int],
    id_map: Tensor | None = None,
    advance: Callable[[int], None] = lambda tokens: None,
) -> list[Rows]:
    """The rows of some answers, which are decoded together.

    Parameters
    ----------
    answers : sequence of Answer
        At least one; their ``compression`` is the target's.
    eos : sequence of int
        Ids that end a text.
    id_map : int32 [V_draft], optional
        Target id of each draft id.
    advance : callable
        Called with so many tokens of the answers that were recorded.

    Raises
    ------
    NumericsError
        A model's logits held NaN.
    """
    texts = _texts(target, answers, eos)
    certainty = [
        _certainty(target, answer, text) for answer, text in zip(answers, texts, strict=True)
    ]
    drafted = _Drafting(target, draft, answers, texts, id_map).run(advance)
    return [
        Rows(
            target_token=np.array(text, dtype=np.int32),
            target_entropy=sure[:, 0],
            target_margin=sure[:, 1],
            drafted=reached,
            draft_tokens=tokens,
            signals=signals,
            accepted=count_accepted(text, tokens, reached),
        )
        for text, sure, (reached, tokens, signals) in zip(texts, certainty, drafted, strict=True)
    ]


def count_accepted(text: Sequence[int], tokens: np.ndarray, drafted: np.ndarray) -> np.ndarray:
    """How many of each place's draft tokens [N, GAMMA_MAX] are the text's own: int8 [N]."""
    padded = np.concatenate((np.asarray(text), np.full(GAMMA_MAX, -1)))
    windows = np.lib.stride_tricks.sliding_window_view(padded, GAMMA_MAX)[: len(text)]
    agreed = (windows == tokens) & (np.arange(GAMMA_MAX) < drafted[:, None])
    counts: np.ndarray = np.cumprod(agreed, axis=1).sum(axis=1).astype(np.int8)
    return counts


def _texts(target: CausalModel, answers: Sequence[Answer], eos: Sequence[int]) -> list[list[int]]:
    """New tokens of plain decoding."""
    prompts = [list(answer.prompt_tokens) for answer in answers]
    params = [
        SamplingParams(max_new_tokens=a.limit, temperature=a.temperature, seed=a.seed)
        for a in answers
    ]
    capacity = max(len(a.prompt_tokens) + a.limit for a in answers)
    loop = EagerLoop(target, None, batch=len(answers), capacity=capacity)
    batch = RequestBatch.build(
        prompts, params, eos_ids=eos, max_length=capacity, device=target.device
    )
    batch = replace(batch, request_ids=[0] * len(answers))
    texts: list[list[int]] = [[] for _ in answers]
    for records in loop.run(batch, parse_policy("fixed:0").pack()):
        for step in records:
            texts[step.row] += step.tokens
    return texts


def _certainty(target: CausalModel, answer: Answer, text: list[int]) -> np.ndarray:
    """Entropy in bits and margin of the distribution of each token: float32 [N, 2]."""
    prompt = list(answer.prompt_tokens)
    cache = target.new_cache(1, len(prompt) + len(text))
    tokens = torch.tensor([prompt + text], dtype=torch.int32, device=target.device)
    last = target.prefill(tokens[0, : len(prompt)], cache, 0)
    assert last is not None
    found = np.empty((len(text), 2), dtype=np.float32)
    place = 0
    logits = last[None]
    while True:
        for x in logits.float():
            signals = reference.token_signals(x, text[place])
            found[place] = signals[at.ENTROPY], signals[at.MARGIN]
            place += 1
        if place == len(text):
            return found
        start = len(prompt) + place - 1
        end = min(start + WIDTH_MAX, len(prompt) + len(text) - 1)
        logits = target.forward(tokens[:, start:end], [start], cache)[0]


class _Drafting:
    """The draft's continuations of some texts, place by place, all texts at once."""

    def __init__(
        self,
        target: CausalModel,
        draft: CausalModel,
        answers: Sequence[Answer],
        texts: Sequence[list[int]],
        id_map: Tensor | None,
    ) -> None:
        self._draft, self._id_map = draft, id_map
        self._prompt_lengths = [len(answer.prompt_tokens) for answer in answers]
        self._lengths = [len(text) for text in texts]
        size = len(answers)
        longest = max(p + n for p, n in zip(self._prompt_lengths, self._lengths, strict=True))
        device = target.device
        self._state = StepState.allocate(size, longest + WIDTH_MAX, device)
        self._cache = draft.new_cache(size, min(longest + GAMMA_MAX, draft.max_positions))
        self._policy = parse_policy(f"fixed:{GAMMA_MAX}").pack().to(device)
        self._operations = prepared(operations(device))
        _, self._input_ids = draft_vocabulary(target, draft, id_map)
        self._inverse = self._seeds = None
        if any(answer.temperature > 0 for answer in answers):
            inverse = [1 / a.temperature if a.temperature > 0 else 0.0 for a in answers]
            self._inverse = torch.tensor(inverse, dtype=torch.float32, device=device)
            seeds = [answer.seed for answer in answers]
            self._seeds = torch.tensor(seeds, dtype=torch.int64, device=device)
        for row, (answer, text) in enumerate(zip(answers, texts, strict=True)):
            self._state.reset(row, [*answer.prompt_tokens, *text], limit=0, request=0)
        self._own_text = self._state.sequence.clone()

    def run(
        self, advance: Callable[[int], None]
    ) -> list[tuple[np.ndarray, np.ndarray, np.ndarray]]:
        """Per text: drafted int8 [N], tokens int32 and signals float32 [N, GAMMA_MAX, ...]."""
        found = [
            (
                np.zeros(n, dtype=np.int8),
                np.full((n, GAMMA_MAX), -1, dtype=np.int32),
                np.zeros((n, GAMMA_MAX, SIGNALS), dtype=np.float32),
            )
            for n in self._lengths
        ]
        for row, length in enumerate(self._prompt_lengths):
            if length > 1:
                fed = self._known(self._own_text[row, : length - 1])
                self._draft.prefill(fed, self._cache, row, want_logits=False)
        for place in range(max(self._lengths)):
            rows = [row for row, length in enumerate(self._lengths) if place < length]
            reached = [row for row in rows if self._in_reach(row, place)]
            if reached:
                self._draft_from(place, reached)
            for row in reached:
                drafted, tokens, signals = found[row]
                start = self._prompt_lengths[row] + place
                drafted[place] = GAMMA_MAX
                block = self._state.sequence[row, start : start + GAMMA_MAX]
                tokens[place] = block.cpu().numpy()
                signals[place] = self._state.signals[row].cpu().numpy()
            advance(len(rows))
        return found

    def _in_reach(self, row: int, place: int) -> bool:
        """As the loop has it: whether the draft's context holds a whole block more."""
        return self._prompt_lengths[row] + place + GAMMA_MAX <= self._draft.max_positions

    def _draft_from(self, place: int, slots: list[int]) -> None:
        """Draft a whole block of each of ``slots`` after the first ``place`` tokens of its text."""
        state = self._state
        state.sequence.copy_(self._own_text)
        state.rows[:, at.DONE] = at.DONE_LENGTH
        lengths = [self._prompt_lengths[row] + place for row in slots]
        columns = torch.tensor(lengths, dtype=torch.int32, device=state.rows.device)
        state.rows[slots, at.LENGTH] = columns
        state.rows[slots, at.LIMIT] = columns + 2 * WIDTH_MAX  # no end of the text in sight
        for word in (at.DRAFTED, at.STOP, at.DONE):
            state.rows[slots, word] = 0
        for drafted in range(GAMMA_MAX):
            position = [length + drafted - 1 for length in lengths]
            tokens = self._known(gather(state.sequence, slots, position, 1))
            logits = self._draft.forward(tokens, position, self._cache, slots=slots)[:, 0]
            self._operations.draft_step(
                scatter(logits, slots, len(self._lengths)),
                state,
                self._policy,
                inv_temperature=self._inverse,
                seeds=self._seeds,
                id_map=self._id_map,
            )
        read_rows(state)

    def _known(self, tokens: Tensor) -> Tensor:
        """Target ``tokens`` as the draft embeds them."""
        return tokens if self._input_ids is None else self._input_ids[tokens.long()]
