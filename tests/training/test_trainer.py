"""Training: it learns, stops, goes on where it was interrupted, and ends on its best weights."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from speckv.training import trainer as module
from speckv.training.acceptance import count_accepted
from speckv.training.corpus import Shard
from speckv.training.examples import Examples
from speckv.training.trainer import Measurement, Trainer, TrainingRecipe
from tests.training.conftest import HEAD, TRAINING

STEPS = 60
NewTrainer = Callable[..., Trainer]


def weights(trainer: Trainer) -> dict[str, Tensor]:
    return {name: t.detach().clone() for name, t in trainer.student.trainable().items()}


def assert_same(actual: dict[str, Tensor], expected: dict[str, Tensor]) -> None:
    assert actual.keys() == expected.keys()
    assert all(torch.equal(actual[name], expected[name]) for name in expected)


@pytest.fixture(scope="module")
def whole(new_trainer: NewTrainer) -> tuple[Trainer, list[float], Measurement]:
    """A training without interruption, its losses, and what the draft was before."""
    trainer = new_trainer()
    before = trainer.measure()
    losses: list[float] = []
    trainer.run(STEPS, advance=lambda step, loss: losses.append(loss))
    return trainer, losses, before


def test_it_learns(whole: tuple[Trainer, list[float], Measurement], folder: Path) -> None:
    trainer, losses, before = whole
    assert len(losses) == STEPS and [m.step for m in trainer.measurements] == [20, 40, 60]
    assert np.mean(losses[-10:]) < np.mean(losses[:10]) - 0.03
    after = trainer.measurements[-1]
    assert after.overlap > before.overlap + 0.02
    assert after.agreement > before.agreement + 0.02
    assert set(after.acceptance) == {"1", "4", "8"}


def test_the_embedding_stays_the_targets(
    whole: tuple[Trainer, list[float], Measurement], new_trainer: NewTrainer
) -> None:
    student = whole[0].student
    assert not any("embed" in name for name in student.trainable())
    fresh = new_trainer().student
    assert torch.equal(student.body.embed_tokens.weight, fresh.body.embed_tokens.weight)
    changed = [
        not torch.equal(t, fresh.trainable()[name]) for name, t in student.trainable().items()
    ]
    assert all(changed)


@pytest.mark.parametrize("at", [7, 20, 33, 60])
def test_an_interrupted_training_ends_as_an_uninterrupted_one(
    at: int,
    whole: tuple[Trainer, list[float], Measurement],
    new_trainer: NewTrainer,
    tmp_path: Path,
) -> None:
    def interrupt(step: int, loss: float) -> None:
        if step == at:
            raise KeyboardInterrupt

    checkpoint = tmp_path / "state.pt"
    with pytest.raises(KeyboardInterrupt):
        new_trainer().run(STEPS, checkpoint=checkpoint, advance=interrupt)
    steps: list[int] = []
    resumed = new_trainer()
    resumed.run(STEPS, checkpoint=checkpoint, advance=lambda step, loss: steps.append(step))
    assert steps == list(range((at - 1) // 20 * 20 + 1, STEPS + 1))
    assert_same(weights(resumed), weights(whole[0]))
    assert resumed.measurements == whole[0].measurements
    assert [path.name for path in tmp_path.iterdir()] == ["state.pt"]


def measure_as(monkeypatch: pytest.MonkeyPatch, scores: dict[int, float]) -> None:
    monkeypatch.setattr(
        Trainer, "measure", lambda self: Measurement(self.step, 0.0, scores[self.step], {})
    )


def test_training_stops_without_patience_and_keeps_the_best(
    new_trainer: NewTrainer, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    measure_as(monkeypatch, {4: 0.5, 8: 0.7, 12: 0.6, 16: 0.7, 20: 0.9})
    recipe = replace(TRAINING, evaluate_every=4, patience=2)
    trainer = new_trainer(recipe)
    kept: list[dict[str, Tensor]] = []
    checkpoint = tmp_path / "state.pt"
    trainer.run(40, checkpoint=checkpoint, measured=lambda m: kept.append(weights(trainer)))
    assert [m.step for m in trainer.measurements] == [4, 8, 12, 16] and trainer.step == 16
    assert_same(weights(trainer), kept[1])
    # Interrupted after it stopped, before the draft was written.
    again = new_trainer(recipe)
    again.run(40, checkpoint=checkpoint)
    assert again.step == 16
    assert_same(weights(again), kept[1])


def test_a_training_that_never_gets_better_ends_on_its_first_measurement(
    new_trainer: NewTrainer, monkeypatch: pytest.MonkeyPatch
) -> None:
    measure_as(monkeypatch, {2: 0.5, 4: 0.4, 5: 0.3})
    trainer = new_trainer(replace(TRAINING, evaluate_every=2))
    kept: list[dict[str, Tensor]] = []
    trainer.run(5, measured=lambda m: kept.append(weights(trainer)))
    assert len(kept) == 3
    assert_same(weights(trainer), kept[0])


def test_measurements_are_those_of_the_validation_text(
    whole: tuple[Trainer, list[float], Measurement], examples: Examples, in_fp32: None
) -> None:
    trainer = whole[0]
    measured = trainer.measure()
    (agreed,), shared = trainer.agreements()
    assert measured.overlap == shared
    assert measured.agreement == pytest.approx(np.concatenate(agreed).mean())
    assert measured.acceptance == {str(g): count_accepted(agreed, g).acceptance for g in (1, 4, 8)}
    _, first, second = examples.split()
    responses = (examples.lengths - examples.prompt_lengths)[first + second].tolist()
    assert [len(bits) for bits in agreed] == responses


def test_smaller_heads_agree_as_if_they_were_cut_off(
    whole: tuple[Trainer, list[float], Measurement],
    shard: Shard,
    examples: Examples,
    id_map: Tensor,
    in_fp32: None,
) -> None:
    student = whole[0].student
    heads = [1, 40, HEAD]
    agreed, _ = whole[0].agreements(heads, [0, 9])
    for place, i in enumerate((0, 9)):
        (batch,) = examples.batches([i], 1)
        with torch.no_grad():
            logits = student(batch.tokens, batch.mask, batch.rows)
        for size, found in zip(heads, agreed, strict=True):
            chosen = id_map[logits[:, :size].argmax(dim=1)]
            assert found[place].tolist() == (chosen == batch.top_ids[:, 0]).tolist()


def test_the_learning_rate_warms_up_and_falls() -> None:
    rates = [module._schedule(step, 100) for step in range(100)]
    assert rates[:5] == pytest.approx([0.25, 0.5, 0.75, 1.0, 1.0])
    assert all(a > b for a, b in zip(rates[4:], rates[5:], strict=False))
    assert rates[52] == pytest.approx(0.05 + 0.95 / 2)
    assert 0.05 < rates[-1] < 0.06
    assert module._schedule(0, 1) == 1.0


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"batch_tokens": 0}, "batch_tokens: expected at least 1, got 0"),
        ({"evaluate_every": 0}, "evaluate_every: expected at least 1, got 0"),
        ({"patience": 0}, "patience: expected at least 1, got 0"),
        ({"learning_rate": 0.0}, "learning_rate: expected more than 0, got 0.0"),
        ({"learning_rate": float("nan")}, "learning_rate: expected more than 0, got nan"),
        ({"likelihood": -1.0}, "likelihood: expected a weight from 0 on, got -1.0"),
        ({"seed": -1}, "seed: expected 0 to 4294967295, got -1"),
    ],
)
def test_bad_recipes(options: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        TrainingRecipe(**options)
