"""The works of a `plan`: each a fixed sequence of launches on buffers that never move.

What differs between requests is copied into the buffers; what differs between steps the kernels
read from the state. So a work can be captured in a CUDA graph once, and replayed for every step of
every request of its form.
"""

from __future__ import annotations

from dataclasses import dataclass
from types import ModuleType, SimpleNamespace
from typing import Any

import torch
from torch import Tensor

from ..kernels import layout as at
from ..kernels import reference_step
from ..kernels.layout import LoopState, StepState
from ..models.base import CausalModel
from ..models.cache import KVCache
from . import plan as of
from .draft_rows import DraftRows
from .eager import operations
from .prepared import prepared
from .requests import RequestBatch

_EOS_MULTIPLE = 8


@dataclass(frozen=True)
class Form:
    """What tells captured works apart.

    Attributes
    ----------
    batch : int
    gamma_cap : int
        Most draft tokens of a step.
    sampled, truncated : bool
        Whether any row samples, and whether any has a top-k or top-p.
    eos : int
        Columns of ids that end a row.
    rejection : bool
        Whether drafts are accepted by rejection sampling.
    signals : bool
        Whether the draft signals of every step are kept.
    """

    batch: int
    gamma_cap: int
    sampled: bool
    truncated: bool
    eos: int
    rejection: bool = False
    signals: bool = False

    @classmethod
    def of(cls, requests: RequestBatch, policy: Tensor) -> Form:
        """The form of a batch under a packed policy, which is on the CPU."""
        return cls(
            batch=requests.size,
            gamma_cap=int(policy[at.GAMMA_CAP]),
            sampled=requests.inv_temperature is not None,
            truncated=requests.truncated,
            eos=-(-requests.eos.shape[1] // _EOS_MULTIPLE) * _EOS_MULTIPLE,
            rejection=requests.rejection,
            signals=requests.keep_signals,
        )


@dataclass(frozen=True)
class Models:
    """The pair, its caches, and how a target id becomes the draft's and back.

    Attributes
    ----------
    id_map : int32 [V_draft] or None
        Target id of each draft id.
    draft_ids, input_ids : int32 [V] or None
        As of `draft_vocabulary`.
    """

    target: CausalModel
    target_cache: KVCache
    draft: CausalModel | None
    draft_cache: KVCache | None
    id_map: Tensor | None = None
    draft_ids: Tensor | None = None
    input_ids: Tensor | None = None

    @property
    def draft_positions(self) -> int:
        """Longest sequence of the draft; 0 without one."""
        return 0 if self.draft is None else self.draft.max_positions


class Works:
    """The works of requests of one form, by name.

    Parameters
    ----------
    form : Form
    models : Models
    state : StepState
        Of as many rows as the form's batch.
    loop : LoopState
        Likewise; with signals if the form has them.
    kept : DraftRows, optional
        Likewise; for rejection sampling.
    drafts : str
        How the plan drafts: one of `plan.DRAFTS`.

    Attributes
    ----------
    plan : Plan
        Of a generation of this form.
    """

    def __init__(
        self,
        form: Form,
        models: Models,
        state: StepState,
        loop: LoopState,
        kept: DraftRows | None = None,
        *,
        drafts: str = "while",
    ) -> None:
        self.form, self.state, self.loop = form, state, loop
        self.plan = of.generation_plan(form.gamma_cap, drafts)
        self._models, self._kept = models, kept
        device, batch = state.rows.device, form.batch
        self._operations = prepared(operations(device))
        self._between = step_operations(device)
        self._policy = torch.zeros(at.POLICY_WORDS, device=device)
        self._slots = torch.arange(batch, device=device)
        self._eos = torch.full((batch, form.eos), -1, dtype=torch.int32, device=device)
        self._inv_temperature = self._seeds = self._top_k = self._top_p = None
        if form.sampled:
            self._inv_temperature = torch.zeros(batch, device=device)
            self._seeds = torch.zeros(batch, dtype=torch.int64, device=device)
        if form.truncated:
            self._top_k = torch.zeros(batch, dtype=torch.int32, device=device)
            self._top_p = torch.ones(batch, device=device)
        self._columns: dict[int, list[Tensor]] = {}
        widths = range(1, form.gamma_cap + 2)
        self._verifies = {of.verify_work(width): self._inputs(width) for width in widths}
        self._drafts: dict[str, tuple[int, tuple[Tensor, Tensor]]] = {}
        if form.gamma_cap:
            for purpose, name in enumerate((of.CATCH_UP, of.FIRST, of.NEXT)):
                self._drafts[name] = purpose, self._inputs(at.INPUT_WIDTHS[purpose])

    def __call__(self, name: str) -> None:
        """Run, or enqueue, a work."""
        if name in self._verifies:
            self._verify(*self._verifies[name])
        elif name in self._drafts:
            purpose, inputs = self._drafts[name]
            self._draft(purpose, *inputs)
        elif name == of.CLOSE:
            self._close()
        elif name == of.BEGIN:
            self._publish()
        else:
            raise KeyError(name)

    @property
    def names(self) -> list[str]:
        """The works there are."""
        return [of.BEGIN, *self._drafts, *self._verifies, of.CLOSE]

    def load(self, requests: RequestBatch, policy: Tensor) -> None:
        """Take over requests of the form, and a packed policy."""
        self._policy.copy_(policy)
        self._eos.fill_(-1)
        self._eos[:, : requests.eos.shape[1]] = requests.eos
        pairs = (
            (self._inv_temperature, requests.inv_temperature),
            (self._seeds, requests.seeds),
            (self._top_k, requests.top_k),
            (self._top_p, requests.top_p),
        )
        for kept, new in pairs:
            if kept is not None and new is not None:
                kept.copy_(new)
        for width, columns in self._columns.items():
            for column, repeated in zip(columns, self._repeated(width), strict=True):
                column.copy_(repeated)

    def _publish(self) -> None:
        cap = self.form.gamma_cap
        self._between.publish_conditions(self.state, self.loop, gamma_cap=cap)

    def accept(self, logits: Tensor) -> None:
        """Commit what the target says; logits [B, W, V]."""
        batch, width, _ = logits.shape
        shared = {
            "eos": self._eos,
            "inv_temperature": self._inv_temperature,
            "seeds": self._seeds,
        }
        cutoffs = lse = None
        if self._needs_cutoffs:
            found = self._cutoff(logits.flatten(0, 1), width)
            cutoffs, lse = (column.view(batch, width) for column in found)
        if not self.form.rejection:
            self._operations.verify(logits, self.state, self._policy, **shared, cutoffs=cutoffs)
            return
        assert self._kept is not None
        self._operations.verify_rejection(
            logits,
            self.state,
            self._policy,
            **shared,
            cutoffs=cutoffs,
            lse=lse,
            draft_logits=self._kept.logits,
            draft_cutoffs=self._kept.cutoffs,
            draft_lse=self._kept.lse,
            draft_ids=self._models.draft_ids,
        )

    @property
    def _needs_cutoffs(self) -> bool:
        return self.form.truncated or self.form.rejection

    def _inputs(self, width: int) -> tuple[Tensor, Tensor]:
        batch, device = self.form.batch, self.state.rows.device
        return (
            torch.zeros(batch, width, dtype=torch.int32, device=device),
            torch.zeros(batch, width, dtype=torch.int64, device=device),
        )

    def _verify(self, tokens: Tensor, positions: Tensor) -> None:
        target, cache = self._models.target, self._models.target_cache
        self._between.step_inputs(self.state, at.INPUTS_VERIFY, tokens=tokens, positions=positions)
        self.accept(target.forward(tokens, positions, cache, slots=self._slots))

    def _draft(self, purpose: int, tokens: Tensor, positions: Tensor) -> None:
        models = self._models
        draft, cache = models.draft, models.draft_cache
        assert draft is not None and cache is not None
        self._between.step_inputs(
            self.state, purpose, tokens=tokens, positions=positions, input_ids=models.input_ids
        )
        last = tokens.shape[1] - 1
        logits = draft.forward(tokens, positions, cache, slots=self._slots, select=last)
        if purpose != at.INPUTS_CATCH_UP:
            self._choose(logits)
        self._publish()

    def _choose(self, logits: Tensor) -> None:
        """Every row's next draft token; logits [B, V_draft]."""
        cutoffs = None
        if self._needs_cutoffs:
            cutoffs, lse = self._cutoff(logits, 1)
            if self._kept is not None:
                kept = (self._kept.logits, self._kept.cutoffs, self._kept.lse)
                self._between.keep_draft(self.state, logits, cutoffs, lse, kept=kept)
        self._operations.draft_step(
            logits,
            self.state,
            self._policy,
            inv_temperature=self._inv_temperature,
            seeds=self._seeds,
            id_map=self._models.id_map,
            cutoffs=cutoffs,
            coupling="rejection" if self.form.rejection else "gumbel",
        )

    def _close(self) -> None:
        positions = self._models.draft_positions if self.form.gamma_cap else 0
        self._between.close_step(self.state, self.loop, draft_positions=positions)
        self._publish()

    def _cutoff(self, logits: Tensor, width: int) -> tuple[Tensor, Tensor]:
        """Cutoffs and log-sum-exps [B * width] of logits [B * width, V]."""
        if width not in self._columns:
            self._columns[width] = self._repeated(width)
        columns = self._columns[width]
        cutoffs, lse = self._operations.cutoff(logits, *columns, rows=self.state.rows)
        return cutoffs, lse

    def _repeated(self, width: int) -> list[Tensor]:
        columns = (self._inv_temperature, self._top_k, self._top_p)
        return [c.repeat_interleave(width) for c in columns if c is not None]


def step_operations(device: torch.device) -> Any:
    """Where `step_inputs`, `close_step`, `publish_conditions` and `keep_draft` come from: bare
    launches on CUDA, on arguments that are prepared once and never change."""
    if device.type != "cuda":
        return reference_step
    from ..kernels import loop_step

    return launches(loop_step)


def launches(module: ModuleType) -> SimpleNamespace:
    """The launches of `speckv.kernels.loop_step` by the names of their functions."""
    names = ("step_inputs", "close_step", "publish_conditions", "keep_draft")
    return SimpleNamespace(**{name: getattr(module, f"{name}_out") for name in names})
