"""The loop that follows a plan from the host: what the loops on the device are held to.

It runs the works of `works` in the order that `plan` gives, reading the published conditions in
between, and the step records as they are told. On the CPU the works are plain calls.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from ..kernels import layout as at
from ..kernels.layout import LoopState, StepState
from ..models.base import CausalModel
from . import plan as of
from .eager import Seconds, StepRecord, draft_vocabulary, missing_draft, not_finite
from .requests import RequestBatch
from .works import Form, Models, Works

_HALF = 32
_LOW = (1 << _HALF) - 1
_BYTE = 0xFF


class PlannedLoop:
    """Speculative decoding of one batch at a time, without reading the state on the host.

    Parameters
    ----------
    target : CausalModel
    draft : CausalModel or None
        None allows policies that never draft only.
    batch, capacity : int
        Most rows, and most tokens of a row.
    id_map : int32 [V_draft], optional
        Target id of each draft id.
    keep_signals : bool
        Keep every step's draft signals on the device (`LoopState.signals`).

    Attributes
    ----------
    seconds : Seconds
        Host wall time of the prefill; NaN for what is not told apart.
    """

    def __init__(
        self,
        target: CausalModel,
        draft: CausalModel | None,
        *,
        batch: int,
        capacity: int,
        id_map: Tensor | None = None,
        keep_signals: bool = False,
    ) -> None:
        self.target, self.draft = target, draft
        self.batch, self.capacity = batch, capacity
        self.seconds = Seconds()
        device = target.device
        self._state = StepState.allocate(batch, capacity + at.WIDTH_MAX, device)
        self._shared = LoopState.allocate(
            batch,
            capacity,
            device,
            conditions_on_host=self._reads_conditions,
            signals=keep_signals,
        )
        draft_cache = None
        input_ids = None
        if draft is not None:
            draft_cache = draft.new_cache(batch, min(capacity, draft.max_positions))
            input_ids = draft_vocabulary(target, draft, id_map)[1]
        self._models = Models(
            target, target.new_cache(batch, capacity), draft, draft_cache, id_map, input_ids
        )
        self._works: dict[Form, Works] = {}
        self._generation = 0
        self._reader: Reader | None = None
        self._ticket = 0
        self._words: NDArray[np.int64] = np.zeros(0, np.int64)
        if self._reads_conditions:
            self._words = self._shared.conditions.numpy()

    _reads_conditions = True
    """Whether the host follows the plan, and so reads the conditions."""

    @torch.inference_mode()
    def run(self, requests: RequestBatch, policy: Tensor) -> Iterator[list[StepRecord]]:
        """Decode ``requests``; yields the records of the prefill, then of each step.

        Parameters
        ----------
        policy : float32 [POLICY_WORDS]
            A packed policy.

        Raises
        ------
        ValueError
            Rejection sampling, or more rows or tokens than there is room for.
        NumericsError
            A row of logits held NaN or +inf, or nothing but -inf.
        """
        policy = policy.cpu()
        form = Form.of(requests, policy)
        self._check(requests, form)
        works = self._works_for(form)
        start = time.perf_counter()
        self.seconds = Seconds(draft=math.nan, verify=math.nan, decision=math.nan)
        works.load(requests, policy)
        self._begin(requests, works)
        reader = self._reader = Reader(requests, works.loop, self._generation)
        self._prefill(requests, works)
        told = self._await_records(reader)
        self.seconds.prefill += time.perf_counter() - start
        try:
            yield told
            if form.gamma_cap and not reader.done:
                self._prefill_draft(requests)
            yield from self._decode(works, reader)
        finally:
            if not reader.done:  # nobody waits for the rest
                works.loop.cancel.fill_(1)

    def finish(self, row: int) -> None:
        """End row ``row`` after the records it has given (a stop text was found on the host)."""
        self._shared.cancel[row] = 1
        if self._reader is not None:
            self._reader.forget(row)

    def close(self) -> None:
        """Give everything back; the loop cannot be used again."""
        self._shared.cancel.fill_(1)
        self._release()
        for works in self._works.values():
            works.close()
        self._works.clear()

    def _release(self) -> None:
        """Give back what works were prepared into; what runs has been cancelled."""

    def _decode(self, works: Works, reader: Reader) -> Iterator[list[StepRecord]]:
        """Every step after the prefill's."""
        for _ in of.follow(works.plan, lambda name: self._run(works, name), self._read):
            if records := reader.poll():
                yield records
        while not reader.done:
            yield self._await_records(reader)

    def _await_records(self, reader: Reader) -> list[StepRecord]:
        """The next records, at least one."""
        found: list[StepRecord] = []

        def ready() -> bool:
            found.extend(reader.poll())
            return bool(found)

        self._wait(ready)
        return found

    def _run(self, works: Works, name: str) -> None:
        """Run, or enqueue, a work."""
        self._ticket += of.publishes(name)  # first: an interruption may come in between
        works(name)

    def _read(self, conditions: list[int]) -> list[int]:
        """The conditions as the last work has published them."""
        words = self._words
        ticket = self._ticket & _LOW
        self._wait(lambda: all(int(words[c]) >> _HALF & _LOW == ticket for c in conditions))
        return [int(words[condition]) & _LOW for condition in conditions]

    def _wait(self, ready: Callable[[], bool]) -> None:
        """Wait for what the works write for the host; they have run when they return."""
        if not ready():
            raise RuntimeError("a work has not written what it was to write")

    def _check(self, requests: RequestBatch, form: Form) -> None:
        if requests.rejection:
            raise ValueError("coupling: expected 'gumbel' in this loop, got 'rejection'")
        requests.check_room(self.batch, self.capacity)
        if form.gamma_cap and self.draft is None:
            raise missing_draft()

    def _works_for(self, form: Form) -> Works:
        if form not in self._works:
            state, loop = self._state.narrow(form.batch), self._shared.narrow(form.batch)
            self._works[form] = self._prepare(Works(form, self._models, state, loop))
        return self._works[form]

    def _prepare(self, works: Works) -> Works:
        """Whatever is to be done once for works of a new form."""
        return works

    def _begin(self, requests: RequestBatch, works: Works) -> None:
        """Put the requests where the kernels find them."""
        self._generation += 1
        state, loop = works.state, works.loop
        requests.start(state)
        for row, prompt in enumerate(requests.prompts):
            state.rows[row, at.DRAFT_LENGTH] = len(prompt) if self._can_reach(prompt) else 0
        new = [limit - len(p) for limit, p in zip(requests.limits, requests.prompts, strict=True)]
        words = [0] * at.CONTROL_WORDS
        words[at.GENERATION], words[at.MOST_STEPS] = self._generation, max(new) + 1
        words[at.TICKET] = self._ticket  # never behind the device's: no old word can match
        loop.control.copy_(torch.tensor(words, dtype=torch.int32))
        loop.cancel.zero_()

    def _can_reach(self, prompt: list[int]) -> bool:
        """Whether the draft can draft after a prompt."""
        return self.draft is not None and len(prompt) + at.GAMMA_MAX < self.draft.max_positions

    def _prefill(self, requests: RequestBatch, works: Works) -> None:
        works.accept(requests.prefill(self.target, works.state, self._models.target_cache))
        self._run(works, of.CLOSE)

    def _prefill_draft(self, requests: RequestBatch) -> None:
        draft, cache, ids = self.draft, self._models.draft_cache, self._models.input_ids
        assert draft is not None and cache is not None
        for row, prompt in enumerate(requests.prompts):
            if self._can_reach(prompt):
                tokens = self._state.sequence[row, : len(prompt)]
                tokens = tokens if ids is None else ids[tokens.long()]
                draft.prefill(tokens, cache, row, want_logits=False)


@dataclass
class _Row:
    """What the host knows of a row."""

    position: int
    step: int = 0
    done: bool = False


class Reader:
    """Reads records as they are told; a record whose tokens have not all arrived waits."""

    def __init__(self, requests: RequestBatch, loop: LoopState, generation: int) -> None:
        self._records: NDArray[np.int64] = loop.records.numpy()
        self._tokens: NDArray[np.int64] = loop.tokens.numpy()
        self._generation = generation
        self._rows = [_Row(len(prompt)) for prompt in requests.prompts]

    @property
    def done(self) -> bool:
        """Whether every row has ended."""
        return all(row.done for row in self._rows)

    def forget(self, row: int) -> None:
        """Take no more of a row."""
        self._rows[row].done = True

    def poll(self) -> list[StepRecord]:
        """At most one record of each row, of those that are there."""
        rows = (b for b, row in enumerate(self._rows) if not row.done)
        return [record for b in rows if (record := self._next(b)) is not None]

    def _next(self, b: int) -> StepRecord | None:
        row = self._rows[b]
        word = int(self._records[b, row.step])
        if word >> _HALF != self._generation:
            return None
        error = (word & _LOW) >> at.RECORD_ERROR
        if error:
            raise not_finite(b, row.position, error)
        count = word >> at.RECORD_COMMITTED & _BYTE
        words = self._tokens[b, row.position : row.position + count]
        if (words >> _HALF != self._generation).any():
            return None
        gamma = -1 if row.step == 0 else word & _BYTE
        done = word >> at.RECORD_DONE & 0xF
        row.position += count
        row.step += 1
        row.done = done != at.RUNNING
        accepted = word >> at.RECORD_ACCEPTED & _BYTE
        return StepRecord(b, gamma, accepted, (words & _LOW).tolist(), done)
