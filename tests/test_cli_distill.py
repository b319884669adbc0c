"""`speckv distill` up to the distillation: its options, their mistakes, its progress."""

from __future__ import annotations

import io
from pathlib import Path
from typing import Any

import pytest
from rich.console import Console

from speckv import cli
from speckv._cli_distill import command_line
from speckv._cli_output import Progressing
from speckv.training import distill as module


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ([], "out: expected a folder, got none"),
        (["--out", "d", "--prompts", "0"], "--prompts: expected 1 to 100000, got 0"),
        (["--out", "d", "--prompts", "100001"], "--prompts: expected 1 to 100000, got 100001"),
        (["--out", "d", "--prompts", "-3"], "--prompts: expected a number or a file, got '-3'"),
        (["--out", "d", "--prompts", "x.txt"], "--prompts: expected a number or a file, got 'x.t"),
        (["--out", "d", "--prompts", "2"], "prompts: expected at least 3"),
        (["--out", "d", "--layers", "a"], "--layers: expected rising numbers such as 0,1,29, got"),
        (["--out", "d", "--layers", ""], "--layers: expected rising numbers such as 0,1,29, got"),
        (["--out", "d", "--layers", "1,0"], "--layers: expected rising numbers such as 0,1,29, g"),
        (["--out", "d", "--layers", "1,1"], "--layers: expected rising numbers such as 0,1,29, g"),
        (["--out", "d", "--layers", "-1"], "--layers: expected rising numbers such as 0,1,29, go"),
        (["--out", "d", "--head", "0"], "heads: expected sizes from 1 on, got [0]"),
        (["--out", "d", "--head", "many"], "Invalid value for '--head'"),
        (["--out", "d", "--epochs", "0"], "epochs: expected more than 0, got 0.0"),
        (["--out", "d", "--epochs", "nan"], "epochs: expected more than 0, got nan"),
        (["--out", "d", "--learning-rate", "-1"], "learning_rate: expected more than 0, got -1.0"),
        (["--out", "d", "--max-new-tokens", "0"], "max_new_tokens: expected at least 1, got 0"),
        (["--out", "d", "--seed", "-1"], "seed: expected 0 to 4294967295, got -1"),
    ],
)
def test_bad_arguments_of_distill(
    capsys: pytest.CaptureFixture[str],
    arguments: list[str],
    message: str,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.chdir(tmp_path)
    short = ["--prompts", "4"] if "--prompts" not in arguments else []
    assert cli.run(["distill", *short, *arguments]) == 2
    out, err = capsys.readouterr()
    assert out == "" and not list(tmp_path.iterdir()), "refused before anything is read or written"
    assert err.startswith("error: ") and err.count("\n") == 1
    assert message in err


def test_options_reach_the_distillation(
    capsys: pytest.CaptureFixture[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    calls: list[Any] = []
    monkeypatch.setattr(module, "distill", lambda *given, **options: calls.append((given, options)))
    options = (
        f"--out {tmp_path} --target t --prompts 5 --max-new-tokens 7 --epochs 2.5 --layers 0,2 "
        "--layers 1 --head 30 --head 60 --learning-rate 0.01 --seed 4 --compression int8 "
        "--device cpu --corpus-only"
    )
    assert cli.run(["distill", *options.split()]) == 0
    ((source, out, prompts, recipe, _), named), *rest = calls
    assert not rest and (source, out, len(prompts)) == ("t", tmp_path, 5)
    assert (recipe.epochs, recipe.layers, recipe.heads) == (2.5, ((0, 2), (1,)), (30, 60))
    assert (recipe.corpus.max_new_tokens, recipe.corpus.seed) == (7, 4)
    assert (recipe.training.learning_rate, recipe.training.seed) == (0.01, 4)
    assert (named["compression"], named["device"], named["corpus_only"]) == ("int8", "cpu", True)
    assert cli.run(["distill", "--out", str(tmp_path), "--prompts", "5"]) == 0
    (source, _, _, recipe, _), named = calls[1]
    assert source is None and recipe == module.DistillRecipe() and not named["corpus_only"]


@pytest.mark.parametrize("terminal", [False, True])
def test_progress_of_distill(terminal: bool) -> None:
    shown = io.StringIO()
    console = Console(file=shown, force_terminal=terminal, width=100, highlight=False)
    with Progressing(console) as reporter:
        reporter.stage("Corpus", 2000)
        reporter.advance(1500, "9 tokens")
        reporter.line("step 1: [all]")
        reporter.stage("Training", 7)
        reporter.advance(5, "loss 0.5")
    assert "step 1: [all]\n" in shown.getvalue()
    for text in ("Corpus", "Training", "5 of 7", "loss 0.5"):
        assert (text in shown.getvalue()) == terminal
    if not terminal:
        assert shown.getvalue() == "step 1: [all]\n"


@pytest.mark.parametrize(
    ("arguments", "shown"),
    [
        ("distill --out /home/a/drafts/mine", "speckv distill --out mine"),
        (
            "distill --out=drafts/mine --prompts my/own.txt",
            "speckv distill --out=mine --prompts own.txt",
        ),
        ("distill --prompts 20480 --head 4096", "speckv distill --prompts 20480 --head 4096"),
        ("distill --target some/model --out d", "speckv distill --target some/model --out d"),
        ("distill --target /srv/some/model", "speckv distill --target model"),
        ("distill --target=../model --out ~/d", "speckv distill --target=model --out d"),
        ("distill --target here/model", "speckv distill --target model"),
    ],
)
def test_a_card_shows_no_paths(
    arguments: str, shown: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "here" / "model").mkdir(parents=True)
    monkeypatch.chdir(tmp_path)
    assert command_line(arguments.split()) == shown


def test_a_corpus_alone_needs_no_folder(monkeypatch: pytest.MonkeyPatch) -> None:
    given: list[Any] = []
    monkeypatch.setattr(module, "distill", lambda *arguments, **options: given.append(arguments))
    assert cli.run(["distill", "--prompts", "5", "--corpus-only"]) == 0
    assert given[0][1] is None
