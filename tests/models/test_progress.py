"""Bars for work that lasts, and for nothing else."""

from __future__ import annotations

import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from speckv.models import adapter, loading, progress
from speckv.models.loading import load_model
from speckv.models.progress import SlowProgress
from tests.models.conftest import seeded, tiny_tokenizer
from tests.models.test_adapter import MODELS

_DELAY = 0.05
_SLOW = 0.5


@pytest.fixture(autouse=True)
def _terminal(monkeypatch: pytest.MonkeyPatch) -> None:
    """stderr passes for a terminal, and work is slow after a twentieth of a second."""
    monkeypatch.setenv("FORCE_COLOR", "1")
    monkeypatch.setattr(progress, "_DELAY_SECONDS", _DELAY)


def slow(function: Callable[..., Any]) -> Callable[..., Any]:
    def slowly(*args: Any, **options: Any) -> Any:
        time.sleep(_SLOW)
        return function(*args, **options)

    return slowly


def test_work_that_lasts_has_a_bar(capsys: pytest.CaptureFixture[str]) -> None:
    with SlowProgress("Counting sheep", 2) as bar:
        bar.advance()
        time.sleep(_SLOW)
        bar.advance()
    assert "Counting sheep" in capsys.readouterr().err


def test_quick_work_has_none(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(progress, "_DELAY_SECONDS", 60.0)
    with SlowProgress("Counting sheep", 1) as bar:
        bar.advance()
    assert capsys.readouterr().err == ""


def test_a_bar_ends_with_its_work_also_by_an_error(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(RuntimeError), SlowProgress("Counting sheep"):
        time.sleep(_SLOW)
        raise RuntimeError
    assert "Counting sheep" in capsys.readouterr().err
    time.sleep(3 * _DELAY)
    assert capsys.readouterr().err == ""


@pytest.mark.parametrize("shown", [True, False])
def test_a_gguf_file_that_takes_long_to_read(
    shown: bool,
    family: Any,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    read = (family("qwen3-yarn"), tiny_tokenizer(["red"]))
    monkeypatch.setattr(loading, "load_gguf", slow(lambda path: read))
    file = tmp_path / "tiny.gguf"
    file.write_bytes(b"GGUF")
    load_model(file, device="cpu", progress=shown)
    printed = capsys.readouterr().err
    assert "Reading tiny.gguf" in printed if shown else printed == ""


@pytest.mark.parametrize("shown", [True, False])
def test_a_model_of_another_family_that_takes_long_to_load(
    shown: bool,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    from transformers import AutoModelForCausalLM

    seeded(MODELS["gpt2"]).save_pretrained(tmp_path)
    tiny_tokenizer(["red"]).save_pretrained(tmp_path)
    capsys.readouterr()
    read = AutoModelForCausalLM.from_pretrained
    monkeypatch.setattr(AutoModelForCausalLM, "from_pretrained", slow(read))
    monkeypatch.setattr(adapter, "_discover", slow(adapter._discover))
    load_model(tmp_path, device="cpu", progress=shown)
    printed = capsys.readouterr().err
    if shown:
        assert "Reading " in printed and "Loading " in printed
    else:
        assert printed == ""
