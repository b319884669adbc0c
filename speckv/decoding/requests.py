"""The requests of one batch, as the tensors that a loop and its kernels read."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from ..kernels.layout import StepState
from ..models.base import CausalModel
from ..models.cache import KVCache
from ..sampling import SamplingParams


@dataclass(frozen=True)
class RequestBatch:
    """B requests that decode together.

    Attributes
    ----------
    prompts : list of list of int
        Target token ids, none empty.
    limits : list of int
        Total length, prompt included, at which each row ends.
    request_ids : list of int
        Each row's place in the call; keys its noise.
    eos : int32 [B, E]
        Ids that end a row, padded with -1.
    inv_temperature : float32 [B] or None
        1 / temperature, 0 for greedy rows; None if all rows are greedy.
    seeds : int64 [B] or None
    top_k : int32 [B] or None
    top_p : float32 [B] or None
    truncated : bool
        Whether any row's top-k or top-p drops tokens.
    coupling : "gumbel" | "rejection"
    keep_signals : bool
        Whether the loop keeps the draft signals of every step.
    """

    prompts: list[list[int]]
    limits: list[int]
    request_ids: list[int]
    eos: Tensor
    inv_temperature: Tensor | None
    seeds: Tensor | None
    top_k: Tensor | None
    top_p: Tensor | None
    truncated: bool
    coupling: str
    keep_signals: bool = False

    @classmethod
    def build(
        cls,
        prompts: Sequence[Sequence[int]],
        params: Sequence[SamplingParams],
        *,
        eos_ids: Sequence[int],
        max_length: int,
        device: torch.device,
        first_request: int = 0,
        keep_signals: bool = False,
    ) -> RequestBatch:
        """A batch from prompts and their parameters.

        Parameters have seeds, and those that sample share a coupling. A row ends at ``max_length``
        tokens at the latest.
        """
        couplings = {p.coupling for p in params if p.temperature > 0} or {"gumbel"}
        if len(couplings) != 1:
            raise ValueError(f"coupling: expected one for the whole batch, got {sorted(couplings)}")
        stops = [[*(() if p.ignore_eos else eos_ids), *p.stop_token_ids] or [-1] for p in params]
        width = max(len(ids) for ids in stops)
        sampled = any(p.temperature > 0 for p in params)

        def column(values: list[float] | list[int], dtype: torch.dtype) -> Tensor | None:
            return torch.tensor(values, dtype=dtype, device=device) if sampled else None

        inverse = [1.0 / p.temperature if p.temperature > 0 else 0.0 for p in params]
        return cls(
            prompts=[list(p) for p in prompts],
            limits=[
                min(len(ids) + p.max_new_tokens, max_length)
                for ids, p in zip(prompts, params, strict=True)
            ],
            request_ids=[first_request + i for i in range(len(params))],
            eos=torch.tensor(
                [ids + [-1] * (width - len(ids)) for ids in stops],
                dtype=torch.int32,
                device=device,
            ),
            inv_temperature=column(inverse, torch.float32),
            seeds=column([p.seed or 0 for p in params], torch.int64),
            top_k=column([p.top_k for p in params], torch.int32),
            top_p=column([p.top_p for p in params], torch.float32),
            truncated=sampled and any(p.top_k > 0 or p.top_p < 1 for p in params),
            coupling=couplings.pop(),
            keep_signals=keep_signals,
        )

    def check_room(self, batch: int, capacity: int) -> None:
        """Refuse more than ``batch`` rows, or a row of more than ``capacity`` tokens.

        Raises
        ------
        ValueError
            Naming both.
        """
        if self.size > batch or max(self.limits) > capacity:
            raise ValueError(
                f"requests: expected at most {batch} rows of {capacity} tokens, "
                f"got {self.size} of {max(self.limits)}"
            )

    def start(self, state: StepState) -> None:
        """Start every row of a state of this size on its prompt."""
        for row, prompt in enumerate(self.prompts):
            state.reset(row, prompt, self.limits[row], self.request_ids[row])

    def prefill(self, model: CausalModel, state: StepState, cache: KVCache) -> Tensor:
        """Process the prompts; logits [B, 1, V] after them."""
        logits = []
        for row, prompt in enumerate(self.prompts):
            last = model.prefill(state.sequence[row, : len(prompt)], cache, row)
            assert last is not None
            logits.append(last)
        return torch.stack(logits)[:, None]

    @property
    def size(self) -> int:
        return len(self.prompts)

    @property
    def rejection(self) -> bool:
        """Whether drafts are accepted by rejection sampling; greedy batches never need it."""
        return self.coupling == "rejection" and self.inv_temperature is not None
