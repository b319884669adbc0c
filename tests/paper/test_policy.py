"""The paper's MLP: its protocol, its packing, and the weights that ship."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch

from speckv.kernels import layout as at
from speckv.kernels import reference
from speckv.paper import policy
from speckv.paper.data import GAMMAS, STEP_FILE, read_steps
from speckv.paper.protocol import new_regressor
from speckv.policies import parse_policy
from speckv.policies.mlp import Mlp
from speckv.policies.policy import shipped_mlp
from tests.paper.synthetic import make_release, write_release

RELEASED = Path(__file__).resolve().parents[3] / "shared" / "paper" / STEP_FILE


@pytest.fixture(scope="module")
def steps(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_release(tmp_path_factory.mktemp("release"), *make_release()) / STEP_FILE


def test_training_learns_and_packs_what_it_learned(steps: Path) -> None:
    mlp = policy.train(steps)
    data = read_steps(steps)
    assert mlp.card["rows"] == len(data) and mlp.card["held_out_correlation"] > 0.5
    regressor = new_regressor().fit(data.inputs, data.acceptance)
    packed = torch.zeros(at.POLICY_WORDS)
    packed[at.CANDIDATES], packed[at.MODE] = 0b1_0101_0100, at.MODE_MLP
    mlp.pack_into(packed)
    for row in data.inputs[::50]:
        entropy, confidence, max_entropy, min_confidence, compression, _ = row
        packed[at.COMPRESSION] = compression
        rates = regressor.predict([[*row[:5], gamma] for gamma in GAMMAS])
        tokens = np.clip(rates, 0, 1) * GAMMAS + 1
        running = [entropy, max_entropy, confidence, min_confidence, 0.3, 0.6, 0.2, 0.5]
        rows = [0] * at.ROW_WORDS
        rows[at.DRAFTED] = 3
        gamma = reference.best_gamma(packed, rows, running)
        best = float(np.max(tokens))
        assert tokens[GAMMAS.index(gamma)] == pytest.approx(best, abs=1e-4)


def test_the_shipped_weights_say_where_they_come_from() -> None:
    mlp = shipped_mlp("paper")
    assert mlp.layout == at.LAYOUT_PAPER and mlp.gammas == (2, 4, 6, 8)
    assert mlp.card["rows"] == 5112
    assert mlp.card["held_out_correlation"] == pytest.approx(0.685, abs=0.02)


def test_the_shipped_weights_are_those_of_the_released_data() -> None:
    if not RELEASED.exists():
        pytest.skip("data: the paper's released step table")
    trained, shipped = policy.train(RELEASED), shipped_mlp("paper")
    for gamma in GAMMAS:
        features = torch.zeros(at.FEATURES)
        features[[0, 1, 2, 3]] = torch.tensor([1.0, 2.0, 0.7, 0.4])
        features[at.FEATURE_COMPRESSION], features[at.FEATURE_GAMMA] = 1.0, float(gamma)
        ours, theirs = (_rate(m, features) for m in (trained, shipped))
        assert ours == pytest.approx(theirs, abs=0.05), "scikit-learn versions differ a little"


def _rate(mlp: Mlp, features: torch.Tensor) -> float:
    t = mlp.tensors
    hidden = (t["hidden_weight"] @ features + t["hidden_bias"]).relu()
    return float(t["output_weight"][0] @ hidden + t["output_bias"][0])


def test_more_entropy_never_means_more_speculation() -> None:
    packed = parse_policy("paper").pack()
    rows = [0] * at.ROW_WORDS
    sure = [0.1, 0.2, 0.98, 0.95, 0.1, 0.98, 0.97, 0.9]
    unsure = [6.0, 8.0, 0.1, 0.05, 6.0, 0.1, 0.02, 0.1]
    assert reference.best_gamma(packed, rows, unsure) <= reference.best_gamma(packed, rows, sure)
