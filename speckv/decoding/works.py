"""The works of a `plan`: each a fixed sequence of launches on buffers that never move.

What differs between requests is copied into the buffers; what differs between steps the kernels
read from the state. So a work can be captured in a CUDA graph once, and replayed for every step of
every request of its form.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
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
    """

    batch: int
    gamma_cap: int
    sampled: bool
    truncated: bool
    eos: int

    @classmethod
    def of(cls, requests: RequestBatch, policy: Tensor) -> Form:
        """The form of a batch under a packed policy, which is on the CPU."""
        return cls(
            batch=requests.size,
            gamma_cap=int(policy[at.GAMMA_CAP]),
            sampled=requests.inv_temperature is not None,
            truncated=requests.truncated,
            eos=-(-requests.eos.shape[1] // _EOS_MULTIPLE) * _EOS_MULTIPLE,
        )


@dataclass(frozen=True)
class Models:
    """The pair, its caches, and how a target id becomes the draft's and back."""

    target: CausalModel
    target_cache: KVCache
    draft: CausalModel | None
    draft_cache: KVCache | None
    id_map: Tensor | None
    input_ids: Tensor | None

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
        Likewise.

    Attributes
    ----------
    plan : Plan
        Of a generation of this form.
    """

    def __init__(self, form: Form, models: Models, state: StepState, loop: LoopState) -> None:
        self.form, self.state, self.loop = form, state, loop
        self.plan = of.generation_plan(form.gamma_cap)
        self._models = models
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
        self._calls: dict[str, Callable[[], None]] = {
            of.verify_work(width): partial(self._verify, *self._inputs(width)) for width in widths
        }
        self._calls[of.BEGIN] = self._publish
        self._calls[of.CLOSE] = self._close
        if form.gamma_cap:
            purposes = (of.CATCH_UP, of.FIRST, of.NEXT)
            for purpose, name in enumerate(purposes):
                inputs = self._inputs(at.INPUT_WIDTHS[purpose])
                self._calls[name] = partial(self._draft, purpose, *inputs)

    def __call__(self, name: str) -> None:
        """Run, or enqueue, a work."""
        self._calls[name]()

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

    def close(self) -> None:
        """Let go of the buffers: the calls and this object hold each other."""
        self._calls.clear()

    @property
    def names(self) -> list[str]:
        """The works there are."""
        return list(self._calls)

    def _publish(self) -> None:
        self._between.publish_conditions(self.state, self.loop)

    def accept(self, logits: Tensor) -> None:
        """Commit what the target says; logits [B, W, V]."""
        batch, width, _ = logits.shape
        cutoffs = None
        if self.form.truncated:
            cutoffs = self._cutoff(logits.flatten(0, 1), width).view(batch, width)
        self._operations.verify(
            logits,
            self.state,
            self._policy,
            eos=self._eos,
            inv_temperature=self._inv_temperature,
            seeds=self._seeds,
            cutoffs=cutoffs,
        )

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
            cutoffs = self._cutoff(logits, 1) if self.form.truncated else None
            self._operations.draft_step(
                logits,
                self.state,
                self._policy,
                inv_temperature=self._inv_temperature,
                seeds=self._seeds,
                id_map=models.id_map,
                cutoffs=cutoffs,
                coupling="gumbel",
            )
        self._publish()

    def _close(self) -> None:
        positions = self._models.draft_positions if self.form.gamma_cap else 0
        self._between.close_step(self.state, self.loop, draft_positions=positions)
        self._publish()

    def _cutoff(self, logits: Tensor, width: int) -> Tensor:
        """Cutoffs [B * width] of logits [B * width, V]."""
        if width not in self._columns:
            self._columns[width] = self._repeated(width)
        found: Tensor = self._operations.cutoff(
            logits, *self._columns[width], rows=self.state.rows
        )[0]
        return found

    def _repeated(self, width: int) -> list[Tensor]:
        columns = (self._inv_temperature, self._top_k, self._top_p)
        return [c.repeat_interleave(width) for c in columns if c is not None]


def step_operations(device: torch.device) -> Any:
    """Where `step_inputs`, `close_step` and `publish_conditions` come from: bare launches on CUDA,
    on arguments that are prepared once and never change."""
    if device.type != "cuda":
        return reference_step
    from ..kernels import loop_step

    return launches(loop_step)


def launches(module: ModuleType) -> SimpleNamespace:
    """The launches of `speckv.kernels.loop_step` by the names of their functions."""
    names = ("step_inputs", "close_step", "publish_conditions")
    return SimpleNamespace(**{name: getattr(module, f"{name}_out") for name in names})
