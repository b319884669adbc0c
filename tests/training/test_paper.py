"""The paper's MLP: its protocol, its packing, and the weights that ship."""

from __future__ import annotations

import csv
from pathlib import Path

import numpy as np
import pytest
import torch

from speckv.kernels import layout as at
from speckv.kernels import reference
from speckv.policies import parse_policy
from speckv.policies.policy import shipped_mlp
from speckv.training import paper

RELEASED = Path(__file__).resolve().parents[3] / "shared" / "paper" / paper.STEP_FILE


def write_steps(path: Path, rows: int) -> None:
    """Steps whose acceptance falls with entropy and γ."""
    generator = np.random.default_rng(0)
    with path.open("w", newline="") as file:
        writer = csv.writer(file)
        writer.writerow(
            ["compression", "gamma", "task", "step", "accepted", "acceptance_rate",
             "tokens_produced", "mean_draft_entropy", "mean_draft_confidence",
             "max_draft_entropy", "min_draft_confidence"]
        )
        for i in range(rows):
            entropy, gamma = generator.exponential(1.5), (2, 4, 6, 8)[i % 4]
            rate = float(np.clip(1.1 - 0.2 * entropy - 0.03 * gamma, 0, 1))
            writer.writerow(
                [("fp16", "int8", "nf4")[i % 3], gamma, ("code", "math")[i % 2], i,
                 round(rate * gamma), rate, round(rate * gamma) + 1, entropy,
                 np.exp(-entropy / 2), entropy * 1.5, np.exp(-entropy)]
            )


@pytest.fixture
def steps(tmp_path: Path) -> Path:
    path = tmp_path / paper.STEP_FILE
    write_steps(path, 600)
    return path


def test_training_learns_and_packs_what_it_learned(steps: Path) -> None:
    mlp = paper.train(steps)
    assert mlp.card["rows"] == 600 and mlp.card["held_out_correlation"] > 0.9
    inputs, _, _ = paper.read_steps(steps)
    regressor = paper._regressor().fit(inputs, paper.read_steps(steps)[1])
    packed = torch.zeros(at.POLICY_WORDS)
    packed[at.CANDIDATES], packed[at.MODE] = 0b1_0101_0100, at.MODE_MLP
    mlp.pack_into(packed)
    for row in inputs[::50]:
        entropy, confidence, max_entropy, min_confidence, compression, _ = row
        packed[at.COMPRESSION] = compression
        rates = regressor.predict([[*row[:5], gamma] for gamma in paper.GAMMAS])
        tokens = np.clip(rates, 0, 1) * paper.GAMMAS + 1
        running = [entropy, max_entropy, confidence, min_confidence, 0.3, 0.6, 0.2, 0.5]
        rows = [0] * at.ROW_WORDS
        rows[at.DRAFTED] = 3
        gamma = reference.best_gamma(packed, rows, running)
        best = float(np.max(tokens))
        assert tokens[paper.GAMMAS.index(gamma)] == pytest.approx(best, abs=1e-4)


def test_bad_tables_are_refused(steps: Path, tmp_path: Path) -> None:
    empty = tmp_path / "empty.csv"
    empty.write_text(steps.read_text().splitlines()[0] + "\n")
    with pytest.raises(ValueError, match="at least one row"):
        paper.read_steps(empty)
    other = tmp_path / "other.csv"
    other.write_text("a,b\n1,2\n")
    with pytest.raises(ValueError, match="expected a column"):
        paper.read_steps(other)


def test_the_shipped_weights_say_where_they_come_from() -> None:
    mlp = shipped_mlp("paper")
    assert mlp.layout == at.LAYOUT_PAPER and mlp.gammas == (2, 4, 6, 8)
    assert mlp.card["rows"] == 5112
    assert mlp.card["held_out_correlation"] == pytest.approx(0.685, abs=0.02)


def test_the_shipped_weights_are_those_of_the_released_data() -> None:
    if not RELEASED.exists():
        pytest.skip("data: the paper's released step table")
    trained, shipped = paper.train(RELEASED), shipped_mlp("paper")
    for gamma in paper.GAMMAS:
        features = torch.zeros(at.FEATURES)
        features[[0, 1, 2, 3]] = torch.tensor([1.0, 2.0, 0.7, 0.4])
        features[at.FEATURE_COMPRESSION], features[at.FEATURE_GAMMA] = 1.0, float(gamma)
        ours, theirs = (_rate(m, features) for m in (trained, shipped))
        assert ours == pytest.approx(theirs, abs=0.05), "scikit-learn versions differ a little"


def _rate(mlp: paper.Mlp, features: torch.Tensor) -> float:
    t = mlp.tensors
    hidden = (t["hidden_weight"] @ features + t["hidden_bias"]).relu()
    return float(t["output_weight"][0] @ hidden + t["output_bias"][0])


def test_more_entropy_never_means_more_speculation() -> None:
    packed = parse_policy("paper").pack()
    rows = [0] * at.ROW_WORDS
    sure = [0.1, 0.2, 0.98, 0.95, 0.1, 0.98, 0.97, 0.9]
    unsure = [6.0, 8.0, 0.1, 0.05, 6.0, 0.1, 0.02, 0.1]
    assert reference.best_gamma(packed, rows, unsure) <= reference.best_gamma(packed, rows, sure)
