"""Exact replay: what a policy would have done on the texts of a trace, and how long it would take.

All answers advance together, one step at a time, so the work is in numpy. A controller is shown
what the loop would show it and no more: the signals of a draft token once it is drafted, and the
outcome of a step once it is verified.

The loop's rules hold: γ is at most ``min(GAMMA_MAX, remaining - 1)``; nothing is drafted beyond the
draft's context; the token that prefill yields is no step; a text that ends itself ends within a
step. With the policies of `speckv.policies` the steps are those of the live loop, one by one.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Protocol

import numpy as np

from ..kernels.layout import GAMMA_MAX, WIDTH_MAX
from ..policies import CostTable
from .schema import Answer, Trace


class Controller(Protocol):
    """Chooses γ for S answers at once; ``lanes`` int64 [n] says for which of them.

    ``length`` int64 [n] is the number of committed tokens, prompt included; ``match`` int8 [n] is
    word MATCH_LENGTH of `speckv.kernels.layout`, of these and of what was drafted.
    """

    def start(self, answers: Sequence[Answer]) -> None:
        """Forget everything; these answers begin."""
        ...

    def begins(self, lanes: np.ndarray, length: np.ndarray, match: np.ndarray) -> np.ndarray:
        """Whether a step drafts at all: bool [n]."""
        ...

    def goes_on(
        self,
        lanes: np.ndarray,
        length: np.ndarray,
        drafted: int,
        signals: np.ndarray,
        match: np.ndarray,
    ) -> np.ndarray:
        """Whether to draft another token: bool [n].

        Parameters
        ----------
        drafted : int
            Tokens drafted in this step, at least 1.
        signals : float32 [n, SIGNALS]
            Of the last one of them.
        """
        ...

    def learns(self, lanes: np.ndarray, gamma: np.ndarray, accepted: np.ndarray) -> None:
        """A step is over: γ, and how many of its tokens were accepted, int64 [n]."""
        ...


@dataclass(frozen=True)
class Replayed:
    """What a controller did on S answers in T steps.

    Attributes
    ----------
    tokens : int64 [S]
        Committed in steps: all but the first of each answer.
    steps : int64 [S]
    ms : float64 [S]
        Milliseconds of the steps.
    histogram : int64 [S, WIDTH_MAX]
        Steps by γ.
    lane, gamma, accepted : int64 [T]
        Each step's answer, γ and committed draft tokens; an answer's steps are in order.
    """

    tokens: np.ndarray
    steps: np.ndarray
    ms: np.ndarray
    histogram: np.ndarray
    lane: np.ndarray
    gamma: np.ndarray
    accepted: np.ndarray

    @classmethod
    def total(cls, parts: Sequence[Replayed]) -> Replayed:
        """Replays of the same S prompts added up, lane by lane."""
        sums = {
            name: np.sum([getattr(part, name) for part in parts], axis=0)
            for name in ("tokens", "steps", "ms", "histogram")
        }
        steps = {
            name: np.concatenate([getattr(part, name) for part in parts])
            for name in ("lane", "gamma", "accepted")
        }
        return cls(**sums, **steps)

    def steps_of(self, answer: int) -> list[tuple[int, int]]:
        """(γ, accepted) of the steps of one answer."""
        own = self.lane == answer
        return list(zip(self.gamma[own].tolist(), self.accepted[own].tolist(), strict=True))

    @property
    def tokens_per_second(self) -> float:
        """Of all answers; nan where no answer has a step."""
        return float(self.tokens.sum() / self.ms.sum() * 1e3) if self.ms.sum() else float("nan")

    @property
    def tokens_per_step(self) -> float:
        """Of all answers; nan where no answer has a step."""
        return float(self.tokens.sum() / self.steps.sum()) if len(self.gamma) else float("nan")


def replay(trace: Trace, controller: Controller, cost: CostTable) -> Replayed:
    """Replay a controller on the answers of a trace.

    Parameters
    ----------
    trace : Trace
        Of one compression: that of ``cost``, and of what the controller was made for.
    controller : Controller
    cost : CostTable
        Milliseconds of a step.
    """
    rows, answers = trace.rows, trace.answers
    end = trace.lengths
    prompt = np.array([len(a.prompt_tokens) for a in answers], dtype=np.int64)
    limit = np.array([a.limit for a in answers], dtype=np.int64)
    step_ms, slope = np.array(cost.step_ms), np.array(cost.step_ms_per_context_token)
    place = np.ones(len(answers), dtype=np.int64)
    behind = np.zeros(len(answers), dtype=np.int64)  # tokens that plain steps left to the draft
    record: list[tuple[np.ndarray, np.ndarray, np.ndarray]] = []
    ms = np.zeros(len(answers))
    controller.start(answers)
    lanes = np.flatnonzero(place < end)
    while len(lanes):
        at = place[lanes]
        row = trace.first[lanes] + at
        length = prompt[lanes] + at
        room = np.minimum(rows.drafted[row], limit[lanes] - at - 1)
        gamma = _draft(trace, controller, lanes, length, row, room)
        matched = np.minimum(rows.accepted[row], gamma)
        controller.learns(lanes, gamma, matched)
        left = end[lanes] - at
        record.append((lanes, gamma, np.minimum(matched, left)))
        ms[lanes] += step_ms[gamma] + slope[gamma] * length
        blocks = -(-behind[lanes] // cost.catch_up_tokens)
        ms[lanes] += np.where(gamma > 0, cost.catch_up_ms * blocks, 0.0)
        behind[lanes] = np.where(gamma > 0, 0, behind[lanes] + 1)
        place[lanes] += np.minimum(matched + 1, left)
        lanes = lanes[place[lanes] < end[lanes]]
    none = [(np.zeros(0, dtype=np.int64),) * 3]
    lane, gamma, accepted = (np.concatenate(each) for each in zip(*record or none, strict=True))
    histogram = np.zeros((len(answers), WIDTH_MAX), dtype=np.int64)
    np.add.at(histogram, (lane, gamma), 1)
    return Replayed(end - 1, histogram.sum(axis=1), ms, histogram, lane, gamma, accepted)


def solve_rate(
    build: Callable[[float], Controller],
    trace: Trace,
    cost: CostTable,
    *,
    tolerance: float = 1e-3,
    rounds: int = 12,
) -> tuple[float, Replayed]:
    """λ of the rate objective, a fixed point: the rate that a policy reaches with it.

    Parameters
    ----------
    build : callable
        The controller with a λ, in tokens per millisecond.

    Returns
    -------
    float
        λ, from that of plain decoding on, within a relative ``tolerance`` of what it reaches.
    Replayed
        What the controller does with it.
    """
    rate = 1.0 / cost.step_ms[0]
    for _ in range(rounds):
        found = replay(trace, build(rate), cost)
        reached = found.tokens_per_second / 1e3
        if not np.isfinite(reached) or abs(reached - rate) <= tolerance * rate:
            break
        rate = reached
    return rate, found


def _draft(
    trace: Trace,
    controller: Controller,
    lanes: np.ndarray,
    length: np.ndarray,
    row: np.ndarray,
    room: np.ndarray,
) -> np.ndarray:
    """γ of a step of each of ``lanes``, int64."""
    gamma = np.zeros(len(lanes), dtype=np.int64)
    match = trace.match[row]
    going = np.flatnonzero(controller.begins(lanes, length, match[:, 0]) & (room > 0))
    for drafted in range(1, GAMMA_MAX + 1):
        if not len(going):
            break
        gamma[going] = drafted
        signals = trace.rows.signals[row[going], drafted - 1]
        told = match[going, drafted]
        more = controller.goes_on(lanes[going], length[going], drafted, signals, told)
        going = going[more & (room[going] > drafted)]
    return gamma


class Planned:
    """Takes γ from a table.

    Parameters
    ----------
    trace : Trace
    gamma : int64 [R]
        Of a step that begins at each row.
    """

    def __init__(self, trace: Trace, gamma: np.ndarray) -> None:
        prompts = np.array([len(a.prompt_tokens) for a in trace.answers], dtype=np.int64)
        self._offset, self._gamma = trace.first[:-1] - prompts, gamma

    def start(self, answers: Sequence[Answer]) -> None:
        """Nothing to forget."""

    def begins(self, lanes: np.ndarray, length: np.ndarray, match: np.ndarray) -> np.ndarray:
        """See `Controller`."""
        more: np.ndarray = self._gamma[self._offset[lanes] + length] > 0
        return more

    def goes_on(
        self,
        lanes: np.ndarray,
        length: np.ndarray,
        drafted: int,
        signals: np.ndarray,
        match: np.ndarray,
    ) -> np.ndarray:
        """See `Controller`."""
        more: np.ndarray = self._gamma[self._offset[lanes] + length] > drafted
        return more

    def learns(self, lanes: np.ndarray, gamma: np.ndarray, accepted: np.ndarray) -> None:
        """It learns nothing."""


class Oracle(Planned):
    """Knows what will be accepted and takes the least time: the ceiling of every policy.

    γ at each place is that of the shortest path through the answer, by dynamic programming from
    its end: ``T(i) = min over γ of cost(γ) + T(i + min(γ, accepted_i) + 1)``. Where plain steps
    leave the draft to catch up, each is charged for its share at once, also where no later step
    drafts: by so much it may miss the least time.
    """

    def __init__(self, trace: Trace, cost: CostTable) -> None:
        super().__init__(trace, _least_time(trace, cost))


def _least_time(trace: Trace, cost: CostTable) -> np.ndarray:
    """γ of each row on the path of the least time: int64 [R]."""
    rows, end = trace.rows, trace.lengths
    prompt = np.array([len(a.prompt_tokens) for a in trace.answers], dtype=np.int64)
    limit = np.array([a.limit for a in trace.answers], dtype=np.int64)
    gammas = np.arange(WIDTH_MAX)
    best = np.zeros(len(rows), dtype=np.int64)
    left = np.zeros((len(trace.answers), int(end.max(initial=0)) + 1))  # ms from each place on
    for place in range(left.shape[1] - 2, 0, -1):
        lanes = np.flatnonzero(end > place)
        row = trace.first[lanes] + place
        room = np.minimum(rows.drafted[row], limit[lanes] - place - 1)
        kept = np.minimum(rows.accepted[row, None], gammas)
        after = np.minimum(place + kept + 1, end[lanes, None])
        slope = np.array(cost.step_ms_per_context_token)
        caught_up = np.where(gammas > 0, 0.0, cost.catch_up_ms / cost.catch_up_tokens)
        own = np.array(cost.step_ms) + caught_up + slope * (prompt[lanes, None] + place)
        ms = np.where(gammas <= room[:, None], own + left[lanes[:, None], after], np.inf)
        best[row] = ms.argmin(axis=1)
        left[lanes, place] = ms.min(axis=1)
    return best
