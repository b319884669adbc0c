"""``speckv profile``: what it records, that it goes on after a kill, and what it refuses."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from dataclasses import replace
from importlib.metadata import version
from importlib.util import find_spec
from pathlib import Path

import numpy as np
import pytest
import torch

from speckv import cli
from speckv.prompts import Prompt
from speckv.traces import profile as profiling
from speckv.traces.profile import ProfileRecipe, profile
from speckv.traces.schema import TraceInfo, read_parts, read_trace, write_trace
from tests.models.conftest import seeded
from tests.traces.synthetic import COST
from tests.training.conftest import EOS, make_prompts, save_target, tiny_llama

ROOT = Path(__file__).resolve().parents[2]
RECIPE = ProfileRecipe(("fp32", "int8"), (0.0, 1.0), max_new_tokens=12, seed=3)
PROMPTS = make_prompts(5)


class Quiet:
    def __init__(self) -> None:
        self.stages: list[tuple[str, int]] = []
        self.done = 0

    def stage(self, name: str, total: int) -> None:
        self.stages.append((name, total))
        self.done = 0

    def advance(self, units: int, note: str) -> None:
        self.done += units
        assert 0 <= self.done <= self.stages[-1][1]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_target(seeded(tiny_llama), tmp_path_factory.mktemp("tiny"))


@pytest.fixture(autouse=True)
def without_timing(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(profiling, "calibrated", lambda *pair, graphs: COST)


@pytest.fixture(scope="module")
def whole(folder: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A recording that nothing disturbed."""
    out = tmp_path_factory.mktemp("whole") / "trace.parquet"
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(profiling, "calibrated", lambda *pair, graphs: COST)
        profile(str(folder), "first:2", out, PROMPTS, RECIPE, Quiet(), device="cpu")
    return out


def assert_same_file(actual: Path, expected: Path) -> None:
    a, b = read_trace(actual), read_trace(expected)
    assert a.info == b.info and a.answers == b.answers
    for name, values in vars(b.rows).items():
        np.testing.assert_array_equal(getattr(a.rows, name), values, err_msg=name)


def test_what_is_recorded(whole: Path) -> None:
    trace = read_trace(whole)
    assert [file.name for file in whole.parent.iterdir()] == [whole.name]
    assert len(trace.answers) == 2 * 2 * len(PROMPTS)
    assert [a.prompt_id for a in trace.answers[:5]] == list(range(5))
    assert {a.task for a in trace.answers} == {p.task for p in PROMPTS}
    assert {(a.compression, a.temperature) for a in trace.answers} == {
        (c, t) for c in RECIPE.compressions for t in RECIPE.temperatures
    }
    assert all(a.seed == 3 + a.prompt_id and a.limit == 12 for a in trace.answers)
    ends = trace.rows.target_token[trace.first[1:] - 1]
    assert ((ends == EOS) | (trace.lengths == 12)).all()
    info = trace.info
    assert info.target["fingerprint"] and info.target["fingerprint"] == info.draft["fingerprint"]
    assert info.target["dtype"] == {"fp32": "float32", "int8": "bfloat16"}
    assert info.costs == {"fp32": COST, "int8": COST}
    assert info.recipe["prompts"] == 5 and info.versions["torch"] and info.device
    for package in ("triton", "bitsandbytes"):
        installed = version(package) if find_spec(package) else None
        assert info.versions.get(package) == installed


def test_a_package_that_is_not_there_has_no_version(whole: Path, tmp_path: Path) -> None:
    assert list(profiling._versions_of("torch", "no-such-package-of-speckv")) == ["torch"]
    trace = read_trace(whole)
    older = replace(trace.info, versions={"speckv": "0.1.0", "torch": "2", "transformers": "5"})
    write_trace(tmp_path / "older.parquet", older, read_parts(whole))
    assert read_trace(tmp_path / "older.parquet").info == older


def test_signals_are_probabilities(whole: Path) -> None:
    rows = read_trace(whole).rows
    entropy, confidence, margin, probability = np.moveaxis(rows.signals, -1, 0)
    assert (entropy >= 0).all() and (entropy <= np.log2(200)).all()
    assert (margin <= confidence).all() and (probability <= confidence).all()
    assert (confidence > 0).all() and (confidence <= 1).all()
    assert (rows.target_entropy >= 0).all() and (rows.target_margin <= 1).all()
    assert (rows.draft_tokens >= 0).all() and (rows.draft_tokens < 200).all()


def test_parts_are_used_again(
    folder: Path, whole: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    out = tmp_path / "trace.parquet"
    monkeypatch.setattr(profiling, "_TOGETHER", 2)
    calls: list[int] = []

    def counted(*arguments: object, **named: object) -> list[object]:
        calls.append(len(arguments[2]))  # type: ignore[arg-type]
        if len(calls) == 4:
            raise KeyboardInterrupt
        return record(*arguments, **named)

    record: Callable[..., list[object]] = profiling.record
    monkeypatch.setattr(profiling, "record", counted)
    with pytest.raises(KeyboardInterrupt):
        profile(str(folder), "first:2", out, PROMPTS, RECIPE, Quiet(), device="cpu")
    assert not out.exists()
    (parts,) = tmp_path.iterdir()
    damaged = sorted(parts.iterdir())[0]
    damaged.write_bytes(damaged.read_bytes()[:100])
    done = sum(calls[:3])
    calls.clear()
    monkeypatch.setattr(profiling, "_TOGETHER", 100)
    profile(str(folder), "first:2", out, PROMPTS, RECIPE, Quiet(), device="cpu")
    assert sum(calls) == 20 - done + 1
    assert_same_file(out, whole)


_KILLED = """
import sys
from speckv.traces import profile as profiling
from tests.traces.synthetic import COST
from tests.traces.test_profile import PROMPTS, RECIPE, Quiet
profiling.calibrated = lambda *pair, graphs: COST
profiling._TOGETHER = 1
from pathlib import Path
profiling.profile(sys.argv[1], "first:2", Path(sys.argv[2]), PROMPTS, RECIPE, Quiet(), device="cpu")
"""


def test_a_killed_recording_goes_on(folder: Path, whole: Path, tmp_path: Path) -> None:
    out = tmp_path / "trace.parquet"
    out.write_text("an old file")
    process = subprocess.Popen(
        [sys.executable, "-c", _KILLED, str(folder), str(out)],
        cwd=ROOT,
        env=os.environ | {"OMP_NUM_THREADS": str(torch.get_num_threads())},  # part of the key
    )
    deadline = time.monotonic() + 120
    while not list(tmp_path.glob("*.parts-*/fp32-*.parquet")):
        assert process.poll() is None and time.monotonic() < deadline
        time.sleep(0.002)
    process.send_signal(signal.SIGKILL)
    process.wait()
    assert out.read_text() == "an old file"
    (parts,) = tmp_path.glob("*.parts-*")
    before = len(list(parts.glob("*.parquet")))
    assert 1 <= before < 20
    profile(str(folder), "first:2", out, PROMPTS, RECIPE, Quiet(), device="cpu")
    assert [file.name for file in tmp_path.iterdir()] == [out.name]
    assert_same_file(out, whole)


def refuses(text: str, folder: Path, out: Path, **changed: object) -> None:
    arguments: dict[str, object] = {
        "draft": "first:2",
        "prompts": PROMPTS,
        "recipe": replace(RECIPE, compressions=("fp32",)),
    }
    with pytest.raises(ValueError, match=text):
        profile(str(folder), out=out, report=Quiet(), device="cpu", **(arguments | changed))  # type: ignore[arg-type]


def test_what_is_refused(folder: Path, tmp_path: Path) -> None:
    out = tmp_path / "trace.parquet"
    refuses("prompts: expected at least one, got none", folder, out, prompts=[])
    refuses(
        "draft: expected a model, which a trace is of, got 'lookup'", folder, out, draft="lookup"
    )
    refuses("draft: expected a model, since", folder, out, draft="none")
    long = [Prompt("chat", "w5 " * 200)]
    refuses("prompts: expected at most 127 tokens each", folder, out, prompts=long)
    with pytest.raises(ValueError, match="compressions: expected some of fp32"):
        ProfileRecipe(compressions=("fp8",))
    with pytest.raises(ValueError, match="temperatures: expected different ones"):
        ProfileRecipe(temperatures=(0.7, 0.7))
    with pytest.raises(ValueError, match="temperature: expected 0 to 100"):
        ProfileRecipe(temperatures=(-1.0,))
    with pytest.raises(ValueError, match="seed: expected 0 to"):
        ProfileRecipe(seed=-1)


def test_command(folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    out, file = tmp_path / "t.parquet", tmp_path / "prompts.txt"
    file.write_text("w5 w6 w7\nw9\n")
    command = ["profile", str(out), "--target", str(folder), "--draft", "first:2"]
    options = ["--prompts", str(file), "--max-new-tokens", "6", "--temperature", "0"]
    assert cli.run([*command, *options, "--device", "cpu"]) == 0
    shown = capsys.readouterr()
    assert shown.out == "" and "2 answers" in shown.err
    info: TraceInfo = read_trace(out).info
    assert info.recipe["temperatures"] == [0.0] and info.recipe["compressions"] == ["fp32"]
    assert cli.run([*command, "--prompts", "nothing"]) == 2
    assert "--prompts: expected a number or a file" in capsys.readouterr().err
