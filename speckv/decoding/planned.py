"""The loop that follows a plan from the host: what the loops on the device are held to.

It runs the works of `works` in the order that `plan` gives, reading the published conditions in
between, and the step records as they are told. On the CPU the works are plain calls.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from ..kernels import layout as at
from ..kernels.layout import LoopState, StepState
from ..models.base import CausalModel
from . import plan as of
from .draft_rows import DraftRows
from .eager import Seconds, StepRecord, missing_draft, not_finite
from .requests import RequestBatch
from .vocabulary import draft_vocabulary
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
    drafts : "while" | "chain" | "switch"
        How the plan of a step drafts; see `plan.DRAFTS`. Tokens and steps are the same; what it
        costs differs. With ``switch``, which fixes γ before drafting, policies must be of fixed γ.

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
        drafts: str = "while",
    ) -> None:
        of.generation_plan(0, drafts)  # refuses what there is none of
        self.target, self.draft, self.drafts = target, draft, drafts
        self.batch, self.capacity = batch, capacity
        self.seconds = Seconds()
        device = target.device
        self._state = StepState.allocate(batch, capacity + at.WIDTH_MAX, device)
        self._shared = LoopState.allocate(
            batch, capacity, device, conditions_on_host=self._reads_conditions
        )
        target_cache = target.new_cache(batch, capacity)
        self._models = Models(target, target_cache, None, None)
        if draft is not None:
            cache = draft.new_cache(batch, min(capacity, draft.max_positions))
            ids = draft_vocabulary(target, draft, id_map)
            self._models = Models(target, target_cache, draft, cache, id_map, *ids)
        self._draft_rows: DraftRows | None = None
        self._signals: Tensor | None = None
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
            More rows or tokens than there is room for; a policy that drafts, without a draft; one
            that decides after each token, where the plan does so before the first.
        NumericsError
            A row of logits held NaN or +inf, or nothing but -inf.
        """
        policy = policy.cpu()
        form = Form.of(requests, policy)
        self._check(requests, form, policy)
        self._drain()
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

    @torch.inference_mode()
    def finish(self, row: int) -> None:
        """End row ``row`` after the records it has given (a stop text was found on the host)."""
        self._shared.cancel[row] = 1
        if self._reader is not None:
            self._reader.forget(row)

    def signals(self, row: int, steps: int) -> Tensor:
        """Draft signals of the first ``steps`` steps of row ``row`` of a run that kept them.

        Reads the device, which waits for it: call it once the row's last record is there.

        Returns
        -------
        float32 [steps, GAMMA_MAX, SIGNALS], on the CPU
            Of a step with γ draft tokens, the first γ.

        Raises
        ------
        ValueError
            The requests did not ask for them.
        """
        if self._signals is None:
            raise ValueError("signals: expected requests with keep_signals")
        return self._signals[row, 1 : 1 + steps].cpu()  # the first record is the prefill's

    @torch.inference_mode()
    def close(self) -> None:
        """Give everything back; the loop cannot be used again."""
        self._shared.cancel.fill_(1)
        self._works.clear()

    def _drain(self) -> None:
        """Wait for the end of what an abandoned generation has left running."""

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

    def _check(self, requests: RequestBatch, form: Form, policy: Tensor) -> None:
        requests.check_room(self.batch, self.capacity)
        if form.gamma_cap and self.draft is None:
            raise missing_draft()
        if self.drafts == "switch" and policy[at.MODE] != at.MODE_FIXED:
            raise ValueError(
                "policy: expected a fixed γ where it is decided before drafting (drafts='switch')"
            )

    def _works_for(self, form: Form) -> Works:
        if form not in self._works:
            state, loop = self._state.narrow(form.batch), self._shared.narrow(form.batch)
            if form.signals:
                loop = replace(loop, signals=self._kept_signals()[: form.batch])
            kept = self._kept_drafts(form) if form.rejection else None
            works = Works(form, self._models, state, loop, kept, drafts=self.drafts)
            try:
                self._prepare(works)
            except BaseException:  # an interruption too: what is half prepared must not be found
                self._forget(form)
                raise
            self._works[form] = works
        return self._works[form]

    def _prepare(self, works: Works) -> None:
        """Whatever is to be done once for works of a new form."""

    def _forget(self, form: Form) -> None:
        """Give back what works of a form were prepared into."""

    def _kept_signals(self) -> Tensor:
        if self._signals is None:
            shape = (self.batch, self.capacity, at.GAMMA_MAX, at.SIGNALS)
            self._signals = torch.zeros(shape, device=self.target.device)
        return self._signals

    def _kept_drafts(self, form: Form) -> DraftRows:
        """Where rejection sampling keeps what a step's tokens were drawn from.

        One place for all forms; of steps that draft nothing, none is read.
        """
        model = self.draft or self.target
        if not form.gamma_cap:
            one = DraftRows.allocate(1, model.vocab_size, model).logits[:, :1]
            none = DraftRows.allocate(form.batch, 1, model)
            return replace(none, logits=one.expand(form.batch, at.GAMMA_MAX, -1))
        if self._draft_rows is None:
            self._draft_rows = DraftRows.allocate(self.batch, model.vocab_size, model)
        return self._draft_rows.narrow(form.batch)

    def _begin(self, requests: RequestBatch, works: Works) -> None:
        """Put the requests where the kernels find them."""
        self._generation += 1
        state, loop = works.state, works.loop
        requests.start(state)
        for row, prompt in enumerate(requests.prompts):
            state.rows[row, at.DRAFT_LENGTH] = self._fed(prompt)
        new = [limit - len(p) for limit, p in zip(requests.limits, requests.prompts, strict=True)]
        words = [0] * at.CONTROL_WORDS
        words[at.GENERATION], words[at.MOST_STEPS] = self._generation, max(new) + 1
        words[at.TICKET] = self._ticket  # never behind the device's: no old word can match
        loop.control.copy_(torch.tensor(words, dtype=torch.int32))
        loop.cancel.zero_()

    def _fed(self, prompt: list[int]) -> int:
        """Tokens of a prompt that the draft is fed: none where it cannot draft after it."""
        reached = self.draft is not None and len(prompt) + at.GAMMA_MAX < self.draft.max_positions
        return len(prompt) - 1 if reached else 0

    def _prefill(self, requests: RequestBatch, works: Works) -> None:
        works.accept(requests.prefill(self.target, works.state, self._models.target_cache))
        self._run(works, of.CLOSE)

    def _prefill_draft(self, requests: RequestBatch) -> None:
        draft, cache, ids = self.draft, self._models.draft_cache, self._models.input_ids
        assert draft is not None and cache is not None
        for row, prompt in enumerate(requests.prompts):
            if fed := self._fed(prompt):
                tokens = self._state.sequence[row, :fed]
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
