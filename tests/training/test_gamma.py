"""Training the γ-MLP: it learns what signals tell, beats a fixed γ, and sees no other prompts."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from speckv.kernels import layout as at
from speckv.policies import CostTable
from speckv.policies.mlp import Mlp
from speckv.policies.policy import mlp_policy
from speckv.traces.baselines import Static
from speckv.traces.calibration import survival
from speckv.traces.decisions import decisions
from speckv.traces.packed import PackedController
from speckv.traces.replay import replay
from speckv.traces.schema import Trace
from speckv.training.gamma import (
    Cell,
    GammaRecipe,
    Trained,
    best_static,
    cells_of,
    fit,
    reach,
    train_gamma,
)
from speckv.training.gamma import _explored as explored
from tests.traces.synthetic import made_up_trace

RECIPE = GammaRecipe(rounds=2, epochs=30, seeds=(0, 1))
COST = CostTable.from_parts(0.12, [1.0 + 0.02 * w for w in range(16)])
TRAINING = frozenset(range(40))


class Quiet:
    """A reporter that counts."""

    def __init__(self) -> None:
        self.units = self.total = 0

    def stage(self, name: str, total: int) -> None:
        self.total += total

    def advance(self, units: int, note: str) -> None:
        self.units += units

    def line(self, text: str) -> None: ...


@pytest.fixture(scope="module")
def trace() -> Trace:
    return made_up_trace(prompts=64, length=60)


@pytest.fixture(scope="module")
def cells(trace: Trace) -> list[Cell]:
    return cells_of(trace, {"fp32": COST, "int8": COST})


@pytest.fixture(scope="module")
def trained(cells: list[Cell]) -> Trained:
    quiet = Quiet()
    found = train_gamma(cells, TRAINING, RECIPE, quiet)
    assert quiet.units == quiet.total == 4
    return found


def test_it_beats_the_best_fixed_gamma_on_other_prompts(
    trained: Trained, cells: list[Cell]
) -> None:
    policy = mlp_policy("trained", trained.mlp)
    gains = []
    for cell in cells:
        train, other = cell.where(TRAINING), cell.where(frozenset(range(40, 64)))
        packed = policy.pack(cell.compression, cell.cost)
        own = replay(other.trace, PackedController(packed), cell.cost)
        base = replay(other.trace, Static({}, best_static(train)), cell.cost)
        gains.append(own.tokens_per_second / base.tokens_per_second)
    assert min(gains) > 1.05


def test_other_prompts_change_nothing(trained: Trained, trace: Trace, cells: list[Cell]) -> None:
    rng = np.random.default_rng(5)
    rows = trace.rows
    theirs = np.repeat([a.prompt_id not in TRAINING for a in trace.answers], trace.lengths)
    poisoned = replace(
        rows,
        accepted=np.where(theirs, 0, rows.accepted),
        signals=np.where(
            theirs[:, None, None], rng.random(rows.signals.shape, np.float32), rows.signals
        ),
    )
    other = cells_of(replace(trace, rows=poisoned), {"fp32": COST, "int8": COST})
    again = train_gamma(other, TRAINING, RECIPE, Quiet())
    for name, tensor in trained.mlp.tensors.items():
        assert tensor.equal(again.mlp.tensors[name]), name
    assert again.mlp.card == trained.mlp.card and again.mlp.records == trained.mlp.records


def test_the_file_keeps_everything(trained: Trained, tmp_path: Path) -> None:
    path = tmp_path / "policy.safetensors"
    trained.mlp.save(path)
    read = Mlp.load(path)
    assert read.card == trained.mlp.card
    assert set(read.records) == set(trained.mlp.records)
    for place, record in trained.mlp.records.items():
        assert read.records[place].survival == pytest.approx(record.survival, rel=1e-6)
        assert read.records[place].gain == pytest.approx(record.gain, rel=1e-6)


def test_the_record_gives_the_rate_that_was_reached(trained: Trained, cells: list[Cell]) -> None:
    policy = mlp_policy("trained", trained.mlp)
    cell = cells[0].where(TRAINING)
    rate, reached = reach(policy, cell)
    assert reached.tokens_per_second / 1e3 == pytest.approx(rate, rel=2e-3)
    packed = policy.pack(cell.compression, cell.cost)
    assert float(packed[at.RATE]) == pytest.approx(rate, rel=5e-3)
    twice = CostTable(tuple(2 * ms for ms in COST.step_ms), COST.step_ms_per_context_token)
    slow = policy.pack(cell.compression, twice)
    assert float(slow[at.RATE]) == pytest.approx(rate / 2, rel=5e-3)


def test_what_it_takes_for_granted_of_acceptance_is_in_the_card(
    trained: Trained, cells: list[Cell]
) -> None:
    policy = mlp_policy("trained", trained.mlp)
    own = [cell.where(TRAINING) for cell in cells]
    kept = [decisions(c.trace, reach(policy, c)[1]).features[:, at.FEATURE_ACCEPTANCE] for c in own]
    above = np.concatenate(kept) >= trained.mlp.card["acceptance_lower_quartile"]
    assert above.mean() == pytest.approx(0.75, abs=0.02)


def test_the_validation_is_in_the_card(trained: Trained) -> None:
    found = trained.mlp.card["validation"]
    assert found["over_static"] == trained.over_static
    assert all(gain > 1 for gain in trained.over_static.values())
    bins = found["calibration"]
    assert [b["predicted"] for b in bins] == sorted(b["predicted"] for b in bins)
    for b in bins:
        assert b["actual"] == pytest.approx(b["predicted"], abs=0.15)


def test_a_fit_learns_from_the_signals(cells: list[Cell]) -> None:
    train = explored([cell.where(TRAINING) for cell in cells])
    held = explored([cell.where(frozenset(range(40, 64))) for cell in cells])
    mlp = fit(train, held, RECIPE, seed=3)
    predicted = survival(mlp, held.features)
    first = held.features[:, at.FEATURE_DRAFTED] == 1
    outcome = held.survived[first, 0].astype(float)
    assert np.corrcoef(predicted[first, 0], outcome)[0, 1] > 0.3
    shuffled = replace(train, survived=np.random.default_rng(0).permutation(train.survived))
    blind = survival(fit(shuffled, held, RECIPE, seed=3), held.features)
    assert np.corrcoef(blind[first, 0], outcome)[0, 1] < 0.15


def test_a_compression_it_has_not_seen_changes_no_prediction(cells: list[Cell]) -> None:
    own = [cell for cell in cells if cell.compression == "fp32"]
    train = explored([cell.where(TRAINING) for cell in own])
    mlp = fit(train, train.take(train.prompt < 10), RECIPE, seed=0)
    other = train.features.copy()
    columns = slice(at.FEATURE_COMPRESSION, at.FEATURE_COMPRESSION + 3)
    assert (other[:, columns] == [1, 0, 0]).all()
    other[:, columns] = [0, 1, 0]
    assert (survival(mlp, other) == survival(mlp, train.features)).all()


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"rounds": 0}, "rounds: expected at least 1, got 0"),
        ({"epochs": 0}, "epochs: expected at least 1, got 0"),
        ({"learning_rate": 0.0}, "learning_rate: expected more than 0, got 0.0"),
        ({"validation_share": 1.0}, "validation_share: expected a number between 0 and 1, got 1.0"),
        ({"seeds": ()}, r"seeds: expected some from 0 to 4294967295, got \(\)"),
    ],
)
def test_bad_recipes(change: dict[str, object], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        GammaRecipe(**change)  # type: ignore[arg-type]


def test_too_few_prompts(cells: list[Cell], trace: Trace) -> None:
    with pytest.raises(ValueError, match="expected enough to fit on and to validate on, got 1"):
        train_gamma(cells, frozenset({0}), RECIPE, Quiet())
    with pytest.raises(ValueError, match="cells: expected at least one, got none"):
        train_gamma([], TRAINING, RECIPE, Quiet())
    with pytest.raises(ValueError, match="costs: expected a table for int8, got none"):
        cells_of(trace, {"fp32": COST})
