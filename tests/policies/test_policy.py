"""Policies by name, their packed form, and policy files."""

from __future__ import annotations

import json
import math
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor

from speckv.errors import PolicyError
from speckv.kernels import layout as at
from speckv.kernels import reference
from speckv.policies import CostTable, Mlp, parse_policy
from speckv.policies.mlp import FORMAT, VERSION, Record
from speckv.policies.policy import mlp_policy, shipped_mlp

COST = CostTable.from_parts(0.5, [2.0 + 0.1 * width for width in range(16)], 0.25, 0.001, 0.002)


@pytest.mark.parametrize(
    ("name", "mode", "cap", "threshold"),
    [
        ("fixed:0", at.MODE_FIXED, 0, 0.0),
        ("fixed:15", at.MODE_FIXED, 15, 0.0),
        ("entropy:1.5", at.MODE_ENTROPY, 15, 1.5),
        ("confidence:0.25", at.MODE_CONFIDENCE, 15, 0.25),
    ],
)
def test_simple_policies_pack_their_number(
    name: str, mode: int, cap: int, threshold: float
) -> None:
    policy = parse_policy(name)
    packed = policy.pack()
    assert packed.shape == (at.POLICY_WORDS,) and packed.dtype == torch.float32
    assert packed[at.MODE] == mode
    assert packed[at.GAMMA_CAP] == cap
    assert packed[at.THRESHOLD] == threshold
    assert policy.never_drafts == (name == "fixed:0")
    assert not policy.needs_cost


@pytest.mark.parametrize(
    "name",
    [
        "",
        "fixed",
        "fixed:",
        "fixed:-1",
        "fixed:16",
        "fixed:2.5",
        "entropy:-1",
        "entropy:inf",
        "entropy:nan",
        "confidence:1.5",
        "confidence:high",
        "magic",
        "file:",
        "paper:3",
    ],
)
def test_bad_names_are_refused(name: str) -> None:
    with pytest.raises(ValueError, match="policy"):
        parse_policy(name)


def test_a_policy_is_a_name_or_a_policy() -> None:
    policy = parse_policy("fixed:2")
    assert parse_policy(policy) is policy
    with pytest.raises(TypeError, match="expected a name .* got int"):
        parse_policy(3)  # type: ignore[arg-type]


def test_the_paper_chooses_among_its_gammas_by_tokens() -> None:
    packed = parse_policy("paper").pack("int8")
    assert packed[at.MODE] == at.MODE_MLP and packed[at.MLP_LAYOUT] == at.LAYOUT_PAPER
    assert packed[at.OBJECTIVE] == at.OBJECTIVE_TOKENS
    assert int(packed[at.CANDIDATES]) == 0b1_0101_0100
    assert packed[at.GAMMA_CAP] == 8 and packed[at.COMPRESSION] == 1


def test_speckv_maximises_the_rate_and_may_choose_nothing() -> None:
    policy = parse_policy("speckv")
    assert policy.needs_cost
    with pytest.raises(ValueError, match="needs a cost table"):
        policy.pack()
    packed = policy.pack("nf4", COST)
    assert packed[at.OBJECTIVE] == at.OBJECTIVE_RATE and packed[at.COMPRESSION] == 2
    assert int(packed[at.CANDIDATES]) == 0xFFFF
    assert packed[at.RATE] == pytest.approx(1.25 / 2.0)
    assert packed[at.COST].item() == pytest.approx(2.0)
    assert packed[at.COST + 3].item() == pytest.approx(1.5 + 2.3 + 0.25)
    assert packed[at.COST_PER_TOKEN + 3].item() == pytest.approx(0.003 + 0.002)


def test_an_untrained_pair_has_no_record_and_what_was_learned_of_another() -> None:
    policy, other = parse_policy("speckv"), shipped_mlp("speckv")
    assert not policy.trained and policy.mlp is not None and not policy.mlp.records
    assert not policy.mlp.card, "its prompts were another pair's: none is refused for them"
    assert other.records and policy.mlp.tensors.keys() == other.tensors.keys()
    for name, tensor in other.tensors.items():
        assert torch.equal(policy.mlp.tensors[name], tensor)


@pytest.mark.parametrize(("draft_ms", "steps"), [(0.1, 32), (1.0, 125), (10.0, 1250)])
def test_a_dear_draft_is_tried_again_less_often(draft_ms: float, steps: int) -> None:
    """A draft token in so many plain steps takes at most 0.4% of the time."""
    cost = CostTable.from_parts(draft_ms, [2.0] * 16)
    packed = parse_policy("speckv").pack("fp32", cost)
    assert packed[at.PROBE_EVERY] == steps
    assert parse_policy("paper").pack()[at.PROBE_EVERY] == 32


def test_a_cost_table_is_whole_and_positive() -> None:
    with pytest.raises(ValueError, match="step_ms: expected 16 values, got 2"):
        CostTable((1.0, 2.0), (0.0,) * 16)
    for bad in (0.0, -1.0, math.nan, math.inf):
        with pytest.raises(ValueError, match=f"step_ms: expected positive, finite .* got {bad}"):
            CostTable((1.0, bad, *(1.0,) * 14), (0.0,) * 16)
    for bad in (-1e-9, math.nan, math.inf):
        with pytest.raises(ValueError, match=f"_token: expected finite .* got {bad}"):
            CostTable((1.0,) * 16, (*(0.0,) * 15, bad))
        with pytest.raises(ValueError, match=f"catch_up_ms: expected a finite .* got {bad}"):
            CostTable((1.0,) * 16, (0.0,) * 16, catch_up_ms=bad)


def tensors() -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(0)
    shapes = {
        "feature_mean": (16,),
        "feature_scale": (16,),
        "hidden_weight": (16, 16),
        "hidden_bias": (16,),
        "output_weight": (16, 16),
        "output_bias": (16,),
    }
    return {name: torch.randn(shape, generator=generator) for name, shape in shapes.items()}


@pytest.fixture
def saved(tmp_path: Path) -> Path:
    path = tmp_path / "deep" / "policy.safetensors"
    Mlp(at.LAYOUT_SURVIVAL, (1, 2, 3, 4), tensors(), {"rows": 7}).save(path)
    return path


def test_a_policy_file_survives_the_round_trip(saved: Path) -> None:
    mlp = Mlp.load(saved)
    assert mlp.layout == at.LAYOUT_SURVIVAL
    assert mlp.gammas == (1, 2, 3, 4) and mlp.card == {"rows": 7}
    assert all(torch.equal(mlp.tensors[name], value) for name, value in tensors().items())
    assert [p.name for p in saved.parent.iterdir()] == [saved.name], "no temporary file is left"
    packed = parse_policy(f"file:{saved}").pack(cost=COST)
    weight = packed[at.HIDDEN_WEIGHT : at.HIDDEN_WEIGHT + 256].view(16, 16)
    assert torch.equal(weight.T, tensors()["hidden_weight"])
    assert packed[at.OBJECTIVE] == at.OBJECTIVE_RATE, "survival sums never fall with γ"


def rewrite(path: Path, **changes: str) -> None:
    metadata = {
        "format": FORMAT,
        "version": VERSION,
        "layout": "survival",
        "gammas": json.dumps([1]),
        "sha256": "0" * 64,
        "card": "{}",
    }
    save_file(tensors(), path, metadata | changes)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"version": "99"}, "expected version 3, got 99; train it again"),
        ({"version": "2"}, "expected version 3, got 2; train it again with this version of speckv"),
        ({"format": "something"}, "expected the format 'speckv-policy'"),
        ({}, "corrupt, its checksum does not match"),
    ],
)
def test_foreign_files_are_refused(saved: Path, changes: dict[str, str], message: str) -> None:
    rewrite(saved, **changes)
    with pytest.raises(PolicyError, match=message):
        Mlp.load(saved)


@pytest.mark.parametrize(
    ("name", "value"),
    [("layout", "paper"), ("gammas", "[1, 2, 3]"), ("card", '{"rows": 8}'), ("more", "1")],
)
def test_whatever_changes_a_files_meaning_is_in_its_checksum(
    saved: Path, name: str, value: str
) -> None:
    with safe_open(str(saved), framework="pt") as file:
        metadata, kept = file.metadata(), {n: file.get_tensor(n) for n in file.keys()}  # noqa: SIM118
    save_file(kept, saved, metadata)
    Mlp.load(saved)
    save_file(kept, saved, metadata | {name: value})
    with pytest.raises(PolicyError, match="corrupt, its checksum does not match"):
        Mlp.load(saved)


def test_a_record_that_was_changed_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "policy.safetensors"
    records = {(0, 0.0): Record(tuple(0.5**k for k in range(1, at.WIDTH_MAX)), 100.0, 1.1)}
    Mlp(at.LAYOUT_SURVIVAL, (1, 2), tensors(), records=records).save(path)
    assert Mlp.load(path).record(0, 0.0) is not None
    with safe_open(str(path), framework="pt") as file:
        metadata, kept = file.metadata(), {n: file.get_tensor(n) for n in file.keys()}  # noqa: SIM118
    save_file({n: t for n, t in kept.items() if n != "record"}, path, metadata)
    with pytest.raises(PolicyError, match="checksum"):
        Mlp.load(path)


def test_damaged_and_missing_files_are_refused(saved: Path) -> None:
    saved.write_bytes(saved.read_bytes()[:100])
    with pytest.raises(PolicyError, match="not a safetensors file"):
        Mlp.load(saved)
    saved.unlink()
    with pytest.raises(PolicyError, match="no such file"):
        Mlp.load(saved)


def test_weights_of_another_shape_or_kind_are_refused() -> None:
    for name, value in (
        ("hidden_weight", torch.zeros(16, 8)),
        ("hidden_bias", torch.zeros(16, dtype=torch.float64)),
        ("output_bias", torch.full((16,), torch.nan)),
    ):
        with pytest.raises(PolicyError, match=f"policy tensor {name}"):
            Mlp(at.LAYOUT_PAPER, (2,), tensors() | {name: value})
    with pytest.raises(PolicyError, match="gammas"):
        Mlp(at.LAYOUT_PAPER, (), tensors())


def decision(packed: Tensor, acceptance: float) -> int:
    rows = [0] * at.ROW_WORDS
    rows[at.LENGTH], rows[at.LIMIT] = 50, 500
    confident = [0.2, 0.3, 0.95, 0.9, 0.2, 0.95, 0.93, acceptance]
    return reference.best_gamma(packed, rows, confident)


def test_speckv_does_not_trust_signals_that_the_record_belies() -> None:
    policy = parse_policy("speckv")
    packed = policy.pack("fp16", COST)
    assert 0.1 < policy.expected_acceptance < 0.4
    assert decision(packed, acceptance=0.6) >= 2
    assert decision(packed, acceptance=0.01) == 0
    believing = replace(policy, expected_acceptance=0.0).pack("fp16", COST)
    assert decision(believing, acceptance=0.01) > 0
    paper = parse_policy("paper").pack("fp16")
    assert decision(paper, acceptance=0.01) == decision(paper, acceptance=0.9) == 8


def test_lambda_is_that_of_the_nearest_temperature() -> None:
    mlp = shipped_mlp("speckv")
    curve = tuple(0.5**k for k in range(1, at.WIDTH_MAX))
    records = {
        (place, temperature): Record(curve, 100.0, 1.0 + temperature + 10 * place)
        for place in (0, 2)
        for temperature in (0.0, 0.7, 1.0)
    }
    policy = mlp_policy("trained", replace(mlp, records=records))
    for asked, found in ((0.0, 0.0), (0.3, 0.0), (0.35, 0.0), (0.4, 0.7), (0.9, 1.0), (2.0, 1.0)):
        for compression, place in (("bf16", 0), ("nf4", 2)):
            packed = policy.pack(compression, COST, temperature=asked)
            expected = records[place, found].rate(COST)
            assert float(packed[at.RATE]) == pytest.approx(expected)
            assert float(packed[at.TEMPERATURE]) == pytest.approx(asked)
    plain = 1 / COST.step_ms[0]
    assert float(policy.pack("int8", COST)[at.RATE]) == pytest.approx(plain)  # of no record
