"""Training one draft on a corpus: batches, schedule, validation, checkpoints."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from ..files import write_atomically
from .acceptance import count_accepted, overlap
from .examples import Batch, Examples
from .student import Student

GAMMAS = (1, 4, 8)
"""Fixed γ that acceptance is measured at."""

_BETAS = (0.9, 0.98)
_WEIGHT_DECAY = 0.01
_CLIP = 1.0
_WARMUP = 0.04  # share of the steps
_FLOOR = 0.05  # the last learning rate over the highest


@dataclass(frozen=True)
class TrainingRecipe:
    """How a draft is trained.

    Attributes
    ----------
    batch_tokens : int
        Places of a batch, padding included.
    learning_rate : float
        The highest; it warms up linearly and falls along a cosine.
    likelihood : float
        Weight of the cross-entropy beside the total variation, which alone has hardly a gradient
        where the draft gives the target's tokens no probability.
    evaluate_every : int
        Steps between two measurements on the validation sequences.
    patience : int
        Measurements without a better one before training stops.
    seed : int
        Of the order of the batches.
    """

    batch_tokens: int = 2048
    learning_rate: float = 3e-3
    likelihood: float = 0.3
    evaluate_every: int = 200
    patience: int = 6
    seed: int = 0

    def __post_init__(self) -> None:
        for name in ("batch_tokens", "evaluate_every", "patience"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name}: expected at least 1, got {getattr(self, name)}")
        if not 0 < self.learning_rate < math.inf:
            raise ValueError(f"learning_rate: expected more than 0, got {self.learning_rate}")
        if not 0 <= self.likelihood < math.inf:
            raise ValueError(f"likelihood: expected a weight from 0 on, got {self.likelihood}")
        if not 0 <= self.seed < 2**32:
            raise ValueError(f"seed: expected 0 to {2**32 - 1}, got {self.seed}")


@dataclass(frozen=True)
class Measurement:
    """A draft on text that it does not learn from.

    Attributes
    ----------
    step : int
    overlap : float
        Mean share of the target's distribution at temperature 1 that the draft's covers, counting
        the target's likeliest tokens alone: see `speckv.training.acceptance.overlap`.
    agreement : float
        Share of positions at which draft and target choose the same token.
    acceptance : dict
        Accepted over drafted tokens, greedy, by fixed γ: 1, 4 and 8.
    """

    step: int
    overlap: float
    agreement: float
    acceptance: dict[str, float]


class Trainer:
    """Trains a student; stops and goes on at checkpoints, to the same result.

    Parameters
    ----------
    student : Student
        Trained in place.
    id_map : int64 [V_draft]
        Target id of each row of its head.
    examples : Examples
    train, validation : sequence of int
        Sequences to learn from, and to choose the best step by.
    recipe : TrainingRecipe
    device : torch.device
        Where the arithmetic happens; in bf16 where the autocast of that device says so.
    """

    def __init__(
        self,
        student: Student,
        id_map: Tensor,
        examples: Examples,
        train: Sequence[int],
        validation: Sequence[int],
        recipe: TrainingRecipe,
        device: torch.device,
    ) -> None:
        self.student = student.to(device)
        self.examples, self.recipe, self.device = examples, recipe, device
        self._train, self._validation = list(train), list(validation)
        total = student.body.embed_tokens.weight.shape[0]
        self._draft_id = torch.full((total,), -1, dtype=torch.int64)
        self._draft_id[id_map] = torch.arange(id_map.numel())
        self._draft_id = self._draft_id.to(device)
        self._optimizer = torch.optim.AdamW(
            [p for p in student.parameters() if p.requires_grad],
            lr=recipe.learning_rate,
            betas=_BETAS,
            weight_decay=_WEIGHT_DECAY,
            fused=True,
        )
        self.step = 0
        self.measurements: list[Measurement] = []

    @property
    def epoch_steps(self) -> int:
        """Steps of one pass over the training sequences."""
        return self.examples.count_batches(self._train, self.recipe.batch_tokens)

    def run(
        self,
        steps: int,
        *,
        checkpoint: Path | None = None,
        advance: Callable[[int, float], None] = lambda step, loss: None,
        measured: Callable[[Measurement], None] = lambda measurement: None,
    ) -> None:
        """Train up to ``steps`` steps in all, and end on the best measured weights.

        Parameters
        ----------
        checkpoint : Path, optional
            Written at each measurement; if it exists, training goes on from there.
        advance, measured : callable
            Called after each step with its number and loss, and after each measurement.
        """
        best = self._state()
        if checkpoint is not None and checkpoint.is_file():
            best = self._resume(checkpoint)
        for batch in self._batches(steps):
            if self._stalled():  # a checkpoint may be the one that training stopped at
                break
            loss = self._learn(batch, steps)
            self.step += 1
            advance(self.step, loss)
            if self.step % self.recipe.evaluate_every == 0 or self.step == steps:
                self.measurements.append(self.measure())
                measured(self.measurements[-1])
                if self._since_best() == 0:
                    best = self._state()
                if checkpoint is not None:
                    self._save(checkpoint, best)
        self.student.load_state_dict(best, strict=False)

    @torch.no_grad()
    def agreements(
        self, heads: Sequence[int] | None = None, sequences: Sequence[int] | None = None
    ) -> tuple[list[list[np.ndarray]], float]:
        """Where draft and target agree on text that the draft does not learn from.

        Parameters
        ----------
        heads : sequence of int, optional
            Heads to try: the first so many rows; the whole one if not given.
        sequences : sequence of int, optional
            The validation sequences if not given.

        Returns
        -------
        agreed : for each head a list of bool [n], one array a sequence, in the order given
        overlap : float
            Mean overlap of the distributions, with the whole head.
        """
        chosen = self._validation if sequences is None else list(sequences)
        sizes = heads or [self.student.head.out_features]
        found: list[list[np.ndarray]] = [[] for _ in sizes]
        shared = 0.0
        count = 0
        self.student.eval()
        for i in chosen:
            batch = next(self.examples.batches([i], 1)).to(self.device)
            logits = self._logits(batch)
            rows = self._draft_id[batch.top_ids]
            both, _ = overlap(logits, rows, batch.top_probs)
            shared += float(both.sum())
            count += rows.shape[0]
            for size, kept in zip(sizes, found, strict=True):
                kept.append((logits[:, :size].argmax(dim=1) == rows[:, 0]).cpu().numpy())
        return found, shared / max(count, 1)

    def measure(self) -> Measurement:
        """Measure the student as it is."""
        (agreed,), shared = self.agreements()
        return Measurement(
            self.step,
            shared,
            float(np.concatenate(agreed).mean()),
            {str(g): count_accepted(agreed, g).acceptance for g in GAMMAS},
        )

    def _batches(self, steps: int) -> Any:
        """The batches from ``self.step`` to ``steps``; an epoch's order depends on its number."""
        place = 0
        epoch = 0
        while place < steps:
            order = torch.Generator().manual_seed(self.recipe.seed * 1_000_003 + epoch)
            for batch in self.examples.batches(self._train, self.recipe.batch_tokens, order):
                if place == steps:
                    return
                if place >= self.step:
                    yield batch
                place += 1
            epoch += 1

    def _learn(self, batch: Batch, steps: int) -> float:
        self.student.train()
        rate = self.recipe.learning_rate * _schedule(self.step, steps)
        for group in self._optimizer.param_groups:
            group["lr"] = rate
        batch = batch.to(self.device)
        logits = self._logits(batch)
        shared, likelihood = overlap(logits, self._draft_id[batch.top_ids], batch.top_probs)
        loss = (1 - shared).mean() - self.recipe.likelihood * likelihood.mean()
        self._optimizer.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(self.student.parameters(), _CLIP)
        self._optimizer.step()
        return float(loss.detach())

    def _logits(self, batch: Batch) -> Tensor:
        with torch.autocast(self.device.type, torch.bfloat16):
            logits: Tensor = self.student(batch.tokens, batch.mask, batch.rows)
        return logits

    def _since_best(self) -> int:
        """Measurements since the best one; there is at least one."""
        scores = [m.agreement + m.overlap for m in self.measurements]
        return len(scores) - 1 - max(range(len(scores)), key=scores.__getitem__)

    def _stalled(self) -> bool:
        return bool(self.measurements) and self._since_best() >= self.recipe.patience

    def _state(self) -> dict[str, Tensor]:
        return {
            name: p.detach().cpu().clone()
            for name, p in self.student.named_parameters()
            if p.requires_grad
        }

    def _save(self, path: Path, best: dict[str, Tensor]) -> None:
        state = {
            "student": self._state(),
            "best": best,
            "optimizer": self._optimizer.state_dict(),
            "step": self.step,
            "measurements": [asdict(m) for m in self.measurements],
        }
        write_atomically(path, lambda temporary: torch.save(state, temporary))

    def _resume(self, path: Path) -> dict[str, Tensor]:
        state = torch.load(path, map_location="cpu", weights_only=True)
        self.student.load_state_dict(state["student"], strict=False)
        self._optimizer.load_state_dict(state["optimizer"])
        self.step = state["step"]
        self.measurements = [Measurement(**m) for m in state["measurements"]]
        best: dict[str, Tensor] = state["best"]
        return best


def _schedule(step: int, steps: int) -> float:
    """Share of the highest learning rate: linear warm-up, then half a cosine."""
    warmup = max(1, round(_WARMUP * steps))
    if step < warmup:
        return (step + 1) / warmup
    share = (step - warmup) / max(1, steps - warmup)
    return _FLOOR + (1 - _FLOOR) * 0.5 * (1 + math.cos(math.pi * share))
