"""``speckv train``: the policy file, where an engine finds it, and who may judge it."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest

from speckv import cli
from speckv.decoding.trained import pair_key, policy_path, trained_policy
from speckv.errors import PolicyError
from speckv.models.hub import CACHE_VARIABLE
from speckv.policies import mlp, parse_policy
from speckv.policies.mlp import Mlp
from speckv.traces.compare import compare
from speckv.traces.schema import Trace, write_trace
from tests.traces.synthetic import INFO, made_up_trace
from tests.traces.test_schema import parts_of

FEW = ["--rounds", "1", "--seeds", "1"]


@pytest.fixture(scope="module")
def trace() -> Trace:
    made = made_up_trace(prompts=32, length=30, temperatures=(0.0,))
    recipe = {"prompts_sha256": "these"}
    return replace(made, info=replace(INFO, recipe=recipe))


@pytest.fixture(scope="module")
def path(trace: Trace, tmp_path_factory: pytest.TempPathFactory) -> Path:
    file = tmp_path_factory.mktemp("trace") / "trace.parquet"
    write_trace(file, trace.info, parts_of(trace))
    return file


@pytest.fixture
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv(CACHE_VARIABLE, str(tmp_path / "cache"))
    return tmp_path / "cache"


def test_the_policy_of_a_pair_is_found_by_its_models(
    path: Path, cache: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    target, draft = INFO.target, INFO.draft
    assert trained_policy(target, draft) is None
    assert cli.run(["train", str(path), *FEW]) == 0
    shown = capsys.readouterr().err
    assert "fp32 at 0: +" in shown and "int8 at 0: +" in shown
    own = policy_path(pair_key(target, draft))
    assert own.is_relative_to(cache) and str(own) in shown.replace("\n", "")
    policy = trained_policy(target, draft)
    assert policy is not None and policy.trained and policy.name == "speckv"
    assert trained_policy(target, {"name": "another", "fingerprint": None}) is None
    assert policy.mlp is not None and set(policy.mlp.records) == {(0, 0.0), (1, 0.0)}
    own.write_bytes(own.read_bytes()[:-8])
    with pytest.raises(PolicyError, match="not a safetensors file"):
        trained_policy(target, draft)


def test_a_policy_of_another_pair_is_not_taken(path: Path, cache: Path) -> None:
    assert cli.run(["train", str(path), *FEW]) == 0
    own = policy_path(pair_key(INFO.target, INFO.draft))
    other = {"name": "u", "fingerprint": "cd"}
    own.rename(policy_path(pair_key(other, INFO.draft)))
    assert trained_policy(other, INFO.draft) is None


def test_only_prompts_it_has_not_seen_judge_it(
    path: Path, trace: Trace, tmp_path: Path, cache: Path
) -> None:
    out = tmp_path / "policy.safetensors"
    assert cli.run(["train", str(path), "--out", str(out), *FEW]) == 0
    policies = ["static", f"file:{out}"]
    (cell, _) = compare(trace, trace.info.costs, policies).cells
    assert cell.rows[1].over_static > 1.0
    for split in ({"seed": 1}, {"train_share": 0.25}):
        with pytest.raises(ValueError, match="of the prompts that it would be judged on"):
            compare(trace, trace.info.costs, policies, **split)  # type: ignore[arg-type]
    others = replace(trace, info=replace(trace.info, recipe={"prompts_sha256": "others"}))
    assert compare(others, trace.info.costs, policies, seed=1).cells


def test_replay_takes_the_trained_policy(path: Path, trace: Trace, cache: Path) -> None:
    (before, _) = compare(trace, trace.info.costs, ["speckv"]).cells
    assert cli.run(["train", str(path), *FEW]) == 0
    (after, _) = compare(trace, trace.info.costs, ["speckv"]).cells
    assert after.rows[0].tokens_per_second != before.rows[0].tokens_per_second


def test_one_compression_alone(path: Path, tmp_path: Path) -> None:
    out = tmp_path / "policy.safetensors"
    arguments = ["--compression", "int8", "--out", str(out), *FEW]
    assert cli.run(["train", str(path), *arguments]) == 0
    found = Mlp.load(out)
    assert set(found.records) == {(1, 0.0)} and list(found.card["validation"]["over_static"]) == [
        "int8 at 0"
    ]
    assert parse_policy(f"file:{out}").mlp is not None


def test_mistakes_are_one_line(
    path: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    for arguments, message in (
        ([str(path), "--compression", "nf4"], "expected some of fp32, int8; got 'nf4'"),
        ([str(path), "--rounds", "0"], "rounds: expected at least 1, got 0"),
        ([str(path), "--train-share", "1"], "train_share: expected a number between 0 and 1"),
        ([str(tmp_path / "none")], "no such trace file"),
    ):
        assert cli.run(["train", *arguments, "--out", str(tmp_path / "p")]) != 0
        assert message in capsys.readouterr().err
    assert not list(tmp_path.iterdir())


def test_a_failed_save_leaves_the_old_policy(
    path: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def torn(tensors: object, where: Path, metadata: object) -> None:
        Path(where).write_bytes(b"half")
        raise OSError("no space left")

    out = tmp_path / "policy.safetensors"
    out.write_text("the old one")
    monkeypatch.setattr(mlp, "save_file", torn)
    assert cli.run(["train", str(path), "--out", str(out), *FEW]) == 1
    assert out.read_text() == "the old one" and list(tmp_path.iterdir()) == [out]
