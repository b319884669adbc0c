"""The eager loop: draft, verify, commit, one operation after the other, the host deciding nothing.

This is the specification of every faster loop. State is on the device (`StepState`); the host
reads it after each operation to know whom to draft for and when to end.

Coherence of the draft's KV cache. Let L be a row's committed length at the start of a step. The
last committed token is in neither cache. The target's cache holds L - 1 tokens at every step. The
draft's holds ``draft_length`` of them: after a step with γ > 0 and a accepted tokens it holds L +
min(a, γ - 1), because its last token was never fed to it; after steps with γ = 0 it lags by one
more each, and after steps drafted by a lookup by as many as they committed. The first draft forward
of a step feeds what is missing. Rollback is a smaller length.
"""

from __future__ import annotations

import time
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from ..errors import NumericsError
from ..kernels import cpu_step
from ..kernels import layout as at
from ..kernels.layout import StepState
from ..models.base import CausalModel
from ..models.cache import KVCache
from .draft_rows import DraftRows
from .lookup import Lookup, Lookups, draft_matches
from .prepared import prepared
from .requests import RequestBatch
from .vocabulary import draft_vocabulary

_NARROW = 8 * at.WIDTH_MAX
"""Rows of a piece whose bits depend on no other row's, on a GPU too."""


@dataclass(frozen=True)
class StepRecord:
    """What one row did in one step.

    Attributes
    ----------
    row : int
    gamma, accepted : int
        Draft tokens verified and kept. The token that prefill yields has ``gamma`` -1: it is no
        step.
    tokens : list of int
        The tokens committed.
    done : int
        ``RUNNING``, ``DONE_STOP`` or ``DONE_LENGTH`` of `speckv.kernels.layout`.
    """

    row: int
    gamma: int
    accepted: int
    tokens: list[int]
    done: int


@dataclass(frozen=True)
class _Run:
    """One call of `EagerLoop.run`.

    draft_length: per row, the committed tokens that the draft's cache holds. operations: see
    `operations`. lookups: the rows' texts; looked_up: the rows that drafted from theirs in the step
    under way. columns: what `cutoff_columns` has made.
    """

    requests: RequestBatch
    state: StepState
    policy: Tensor
    draft_length: list[int]
    operations: Any
    lookups: Lookups | None = None
    looked_up: set[int] = field(default_factory=set)
    columns: dict[int, list[Tensor]] = field(default_factory=dict)

    def cutoff_columns(self, width: int) -> list[Tensor]:
        """Parameters of `cutoff` [B * width], the same tensors each time: they are prepared for."""
        if width not in self.columns:
            requests = self.requests
            columns = [requests.inv_temperature]
            if requests.truncated:
                columns += [requests.top_k, requests.top_p]
            each = [column.repeat_interleave(width) for column in columns if column is not None]
            self.columns[width] = each
        return self.columns[width]


@dataclass
class Seconds:
    """Host wall time by part, in seconds; ``prefill`` is of the prompt, in either model."""

    prefill: float = 0.0
    draft: float = 0.0
    verify: float = 0.0
    decision: float = 0.0


class EagerLoop:
    """Speculative decoding of one batch at a time.

    Parameters
    ----------
    target : CausalModel
    draft : CausalModel or None
        None, without a lookup, allows policies that never draft only.
    batch, capacity : int
        Most rows, and most tokens of a row.
    id_map : int32 [V_draft], optional
        Target id of each draft id.
    lookup : Lookup, optional
        Draft from the row's own text where it repeats itself, and with the model elsewhere.
    """

    def __init__(
        self,
        target: CausalModel,
        draft: CausalModel | None,
        *,
        batch: int,
        capacity: int,
        id_map: Tensor | None = None,
        lookup: Lookup | None = None,
    ) -> None:
        self.target, self.draft, self.lookup = target, draft, lookup
        self.batch, self.capacity = batch, capacity
        self.seconds = Seconds()
        self._ops = operations(target.device)
        # Blocks are gathered at a common width, so the last one may reach past a row's end.
        self._state = StepState.allocate(batch, capacity + at.WIDTH_MAX, target.device)
        self._target_cache = target.new_cache(batch, capacity)
        self._draft_cache = None
        if draft is not None:
            self._draft_cache = draft.new_cache(batch, min(capacity, draft.max_positions))
        self._id_map = id_map
        self._draft_ids = self._draft_input_ids = None
        if draft is not None:
            self._draft_ids, self._draft_input_ids = draft_vocabulary(target, draft, id_map)
        self._rejection_rows: DraftRows | None = None

    @torch.inference_mode()
    def run(self, requests: RequestBatch, policy: Tensor) -> Iterator[list[StepRecord]]:
        """Decode ``requests``; yields the records of the prefill, then of each step.

        Parameters
        ----------
        policy : float32 [POLICY_WORDS]
            A packed policy.

        Raises
        ------
        NumericsError
            A row of logits held NaN or +inf, or nothing but -inf.
        """
        policy = policy.to(self.target.device)
        state = self._begin(requests)
        lookups, most = None, int(policy[at.GAMMA_CAP])
        if self.lookup is not None and most > 0:
            start, alone = self._now(), self.draft is None
            lookups = Lookups(self.lookup, requests.prompts, most, alone=alone)
            self.seconds.draft += self._now() - start
        held = [0] * requests.size
        run = _Run(requests, state, policy, held, prepared(self._ops), lookups)
        yield self._prefill(run)
        while not all(row[at.DONE] for row in read_rows(run.state)):
            self._draft(run)
            yield self._verify(run)

    def _now(self) -> float:
        """Host seconds, after what was launched is done."""
        if self.target.device.type == "cuda":
            torch.cuda.synchronize(self.target.device)
        return time.perf_counter()

    @torch.inference_mode()
    def finish(self, row: int) -> None:
        """End row ``row`` after the records it has given (a stop text was found on the host)."""
        self._state.rows[row, at.DONE] = at.DONE_STOP

    def close(self) -> None:
        """Nothing: what the loop holds goes with it."""

    def _begin(self, requests: RequestBatch) -> StepState:
        requests.check_room(self.batch, self.capacity)
        self.seconds = Seconds()
        state = self._state.narrow(requests.size)
        requests.start(state)
        return state

    def _prefill(self, run: _Run) -> list[StepRecord]:
        start = self._now()
        self._accept(run, run.requests.prefill(self.target, run.state, self._target_cache))
        records = self._committed(run, list(range(run.requests.size)))
        self.seconds.prefill += self._now() - start
        return [StepRecord(r.row, -1, 0, r.tokens, r.done) for r in records]

    def _draft(self, run: _Run) -> None:
        """Draft until every row has stopped."""
        rows = read_rows(run.state)
        run.looked_up.clear()
        if run.lookups is not None:
            rows = self._look_up(run, run.lookups, rows)
        for b in drafting(rows):
            if self._out_of_reach(rows[b]):
                run.state.rows[b, at.STOP] = rows[b][at.STOP] = 1
        slots = drafting(rows)
        forward = self._catch_up
        self._feed_prompts(run, rows, slots)
        while slots:
            start = self._now()
            logits = forward(run, rows, slots)
            forward = self._draft_forward
            drafted = self._now()
            self._choose(run, rows, slots, scatter(logits, slots, len(rows)))
            rows = read_rows(run.state)
            slots = drafting(rows)
            self.seconds.draft += drafted - start
            self.seconds.decision += self._now() - drafted

    def _look_up(self, run: _Run, lookups: Lookups, rows: list[list[int]]) -> list[list[int]]:
        """Draft the whole step of the rows whose text repeats itself; the rows after it."""
        start = self._now()
        found = lookups.find(drafting(rows))
        searched = self._now()
        self.seconds.draft += searched - start
        if not found:
            return rows
        draft_matches(found, run.state, run.policy)
        rows = read_rows(run.state)
        run.looked_up.update(found)
        if run.requests.rejection:
            for b, matches in found.items():
                self._drafts.store_certain(b, [m.token for m in matches][: rows[b][at.DRAFTED]])
        self.seconds.decision += self._now() - searched
        return rows

    def _out_of_reach(self, row: list[int]) -> bool:
        """Whether the draft model cannot draft for a row: there is none, or its context is full."""
        if self.draft is None:
            return self.lookup is not None
        return row[at.LENGTH] + at.GAMMA_MAX > self.draft.max_positions

    def _feed_prompts(self, run: _Run, rows: list[list[int]], slots: list[int]) -> None:
        """Feed the draft the texts of which it has seen nothing, but for their last token.

        The prompt by itself, and but for its last token, as the other loops and a trace do: where
        the last bits of a wide piece depend on how wide it is, those of the draft agree.
        """
        new = [b for b in slots if not run.draft_length[b]]
        if new:
            start = self._now()
            for b in new:
                self._feed_row(run, b, len(run.requests.prompts[b]) - 1)
            self._feed(run, rows, new, left=1)
            self.seconds.prefill += self._now() - start

    def _feed(self, run: _Run, rows: list[list[int]], slots: list[int], left: int) -> None:
        """Feed the draft the committed tokens that it lacks, but for the last ``left``."""
        for b in slots:
            while run.draft_length[b] < (end := rows[b][at.LENGTH] - left):
                self._feed_row(run, b, min(end, run.draft_length[b] + _NARROW))

    def _feed_row(self, run: _Run, b: int, end: int) -> None:
        draft, cache = self._require_draft()
        held = run.draft_length[b]
        if held < end:
            tokens = self._known(run.state.sequence[b, held:end])
            draft.prefill(tokens, cache, b, start=held, want_logits=False)
            run.draft_length[b] = end

    def _catch_up(self, run: _Run, rows: list[list[int]], slots: list[int]) -> Tensor:
        """Feed the draft the committed tokens it lacks; logits [len(slots), V_draft]."""
        draft, cache = self._require_draft()
        sequence, held = run.state.sequence, run.draft_length
        self._feed(run, rows, slots, left=at.WIDTH_MAX)
        start = [held[b] for b in slots]
        lag = [rows[b][at.LENGTH] - held[b] for b in slots]
        for b in slots:
            held[b] = rows[b][at.LENGTH]
        tokens = self._known(gather(sequence, slots, start, max(lag)))
        last = [n - 1 for n in lag]
        return draft.forward(tokens, start, cache, slots=slots, select=last)

    def _draft_forward(self, run: _Run, rows: list[list[int]], slots: list[int]) -> Tensor:
        """Feed the draft its own last tokens; logits [len(slots), V_draft]."""
        draft, cache = self._require_draft()
        position = [rows[b][at.LENGTH] + rows[b][at.DRAFTED] - 1 for b in slots]
        tokens = self._known(gather(run.state.sequence, slots, position, 1))
        return draft.forward(tokens, position, cache, slots=slots)[:, 0]

    def _known(self, tokens: Tensor) -> Tensor:
        """Target ``tokens`` as the draft embeds them."""
        ids = self._draft_input_ids
        return tokens if ids is None else ids[tokens.long()]

    def _choose(self, run: _Run, rows: list[list[int]], slots: list[int], logits: Tensor) -> None:
        """`draft_step` of the rows ``slots``; logits [B, V_draft]."""
        requests = run.requests
        cutoffs = None
        if requests.truncated or requests.rejection:
            cutoffs, lse = self._cutoff(run, logits)
            if requests.rejection:
                index = [rows[b][at.DRAFTED] for b in slots]
                self._drafts.store(slots, index, self._as_kept(logits), cutoffs, lse)
        run.operations.draft_step(
            logits,
            run.state,
            run.policy,
            inv_temperature=requests.inv_temperature,
            seeds=requests.seeds,
            id_map=self._id_map,
            cutoffs=cutoffs,
            coupling=requests.coupling,
        )

    def _verify(self, run: _Run) -> list[StepRecord]:
        """One target pass over [last committed, draft tokens], then commit."""
        start = self._now()
        rows = read_rows(run.state)
        slots = [b for b, row in enumerate(rows) if not row[at.DONE]]
        position = [rows[b][at.LENGTH] - 1 for b in slots]
        width = max(rows[b][at.DRAFTED] for b in slots) + 1
        tokens = gather(run.state.sequence, slots, position, width)
        logits = self.target.forward(tokens, position, self._target_cache, slots=slots)
        self._accept(run, scatter(logits, slots, len(rows)))
        records = self._committed(run, slots)
        for record in records:
            if record.gamma > 0 and record.row not in run.looked_up:
                before = rows[record.row][at.LENGTH]
                run.draft_length[record.row] = before + min(record.accepted, record.gamma - 1)
        self.seconds.verify += self._now() - start
        return records

    @staticmethod
    def _committed(run: _Run, slots: list[int]) -> list[StepRecord]:
        """What the rows ``slots`` just committed, which may be looked up from now on."""
        records = committed(run.state, slots)
        if run.lookups is not None:
            for record in records:
                run.lookups.extend(record.row, record.tokens)
        return records

    def _accept(self, run: _Run, logits: Tensor) -> None:
        """Commit by coupling or by rejection sampling; target logits [B, W, V]."""
        requests = run.requests
        batch, width, _ = logits.shape
        cutoffs = lse = None
        if requests.truncated or requests.rejection:
            flat = self._cutoff(run, logits.flatten(0, 1), width)
            cutoffs, lse = (t.view(batch, width) for t in flat)
        if not requests.rejection:
            run.operations.verify(
                logits,
                run.state,
                run.policy,
                eos=requests.eos,
                inv_temperature=requests.inv_temperature,
                seeds=requests.seeds,
                cutoffs=cutoffs,
            )
            return
        drafts = self._drafts.narrow(batch)
        run.operations.verify_rejection(
            logits,
            run.state,
            run.policy,
            eos=requests.eos,
            inv_temperature=requests.inv_temperature,
            seeds=requests.seeds,
            cutoffs=cutoffs,
            lse=lse,
            draft_logits=drafts.logits,
            draft_cutoffs=drafts.cutoffs,
            draft_lse=drafts.lse,
            draft_ids=None if self.lookup is not None else self._draft_ids,
        )

    def _cutoff(self, run: _Run, logits: Tensor, width: int = 1) -> tuple[Tensor, Tensor]:
        """Cutoffs and log-sum-exps [B * width] of logits [B * width, V]."""
        columns = run.cutoff_columns(width)
        cutoffs, lse = run.operations.cutoff(logits, *columns, rows=run.state.rows)
        return cutoffs, lse

    @property
    def _drafts(self) -> DraftRows:
        if self._rejection_rows is None:
            model = self.draft or self.target
            width = model.vocab_size if self.lookup is None else self.target.vocab_size
            self._rejection_rows = DraftRows.allocate(self.batch, width, model)
        return self._rejection_rows

    def _as_kept(self, logits: Tensor) -> Tensor:
        """Draft logits [B, V_draft] as `_drafts` keeps them.

        A lookup may find any token of the target, so beside one they are kept by target id.
        """
        if self.lookup is None or self._draft_ids is None:
            return logits
        known = self._draft_ids >= 0
        by_target = logits.new_full((len(logits), self.target.vocab_size), -torch.inf)
        by_target[:, known] = logits[:, self._draft_ids[known].long()]
        return by_target

    def _require_draft(self) -> tuple[CausalModel, KVCache]:
        if self.draft is None or self._draft_cache is None:
            raise missing_draft()
        return self.draft, self._draft_cache


def missing_draft() -> ValueError:
    """That a policy drafts, and there is no model to."""
    return ValueError("draft: expected a model, since the policy drafts; got None")


def not_finite(row: int, position: int, error: int) -> NumericsError:
    """What the bits ``error`` of a row's ERROR say."""
    model = "draft" if error & at.ERROR_DRAFT else "target"
    return NumericsError(
        f"row {row}, position {position}: the {model} model's logits hold NaN or +inf, or nothing "
        "but -inf"
    )


def operations(device: torch.device) -> Any:
    """Where `draft_step`, `verify` and `cutoff` come from: kernels on CUDA, else `cpu_step`.

    A loop uses them through `prepared`, which validates the kernels' arguments once a run.
    """
    if device.type != "cuda":
        return cpu_step
    from .. import kernels

    return kernels


def read_rows(state: StepState) -> list[list[int]]:
    """`StepState.rows` on the host.

    Raises
    ------
    NumericsError
        A row has an error bit.
    """
    rows: list[list[int]] = state.rows.tolist()
    for b, row in enumerate(rows):
        if row[at.ERROR]:
            raise not_finite(b, row[at.LENGTH] + row[at.DRAFTED], row[at.ERROR])
    return rows


def drafting(rows: list[list[int]]) -> list[int]:
    """The rows that are neither done nor stopped."""
    return [b for b, row in enumerate(rows) if not (row[at.DONE] or row[at.STOP])]


def committed(state: StepState, slots: list[int]) -> list[StepRecord]:
    """What the rows ``slots`` just committed."""
    rows = read_rows(state)
    records = []
    for b in slots:
        row = rows[b]
        new = state.sequence[b, row[at.LENGTH] - row[at.COMMITTED] : row[at.LENGTH]]
        records.append(StepRecord(b, row[at.GAMMA], row[at.ACCEPTED], new.tolist(), row[at.DONE]))
    return records


def gather(sequence: Tensor, slots: list[int], start: list[int], width: int) -> Tensor:
    """``sequence[slots[i], start[i]:start[i] + width]`` as int32 [len(slots), width]."""
    return torch.stack([sequence[b, p : p + width] for b, p in zip(slots, start, strict=True)])


def scatter(rows: Tensor, slots: list[int], size: int) -> Tensor:
    """Rows [len(slots), ...] at their places among ``size``; the others are zero, for no reader."""
    if len(slots) == size:
        return rows
    full = rows.new_zeros(size, *rows.shape[1:])
    full[slots] = rows
    return full
