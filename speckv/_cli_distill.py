"""``speckv distill``: settings from the command line, and progress on stderr."""

from __future__ import annotations

import shlex
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from ._cli_options import read_prompt_file
from ._cli_output import Progressing

if TYPE_CHECKING:
    from rich.console import Console

    from .models.slice_draft import SliceManifest
    from .prompts import Prompt

_MOST_PROMPTS = 100_000


@dataclass(frozen=True)
class DistillOptions:
    """What the command line says; see the command for each option.

    ``arguments`` is the command line itself, for the card.
    """

    target: str | None
    out: Path | None
    prompts: str
    written: int
    max_new_tokens: int
    epochs: float
    layers: list[str]
    heads: list[int]
    learning_rate: float
    seed: int
    compression: str | None
    device: str | None
    corpus_only: bool
    arguments: tuple[str, ...]


def parse_layers(text: str) -> tuple[int, ...]:
    """Layer numbers from ``0,1,29``.

    Raises
    ------
    ValueError
        Something else, or numbers that do not rise.
    """
    try:
        layers = tuple(int(part) for part in text.split(","))
    except ValueError:
        layers = ()
    if not layers or list(layers) != sorted(set(layers)) or layers[0] < 0:
        raise ValueError(f"--layers: expected rising numbers such as 0,1,29, got {text!r}")
    return layers


def read_prompts(text: str, seed: int) -> list[Prompt]:
    """``text`` built-in prompts, or those of the file it names.

    Raises
    ------
    ValueError
        It is neither a number in range nor a readable file of prompts.
    """
    from .training.prompts import training_prompts

    if text.isdecimal():
        count = int(text)
        if not 1 <= count <= _MOST_PROMPTS:
            raise ValueError(f"--prompts: expected 1 to {_MOST_PROMPTS}, got {count}")
        return training_prompts(count, seed=seed)
    return read_prompt_file(text)


def command_line(arguments: Sequence[str]) -> str:
    """A command as a draft's card shows it: of paths only the names, since the card travels."""
    shown, before = [], ""
    for argument in arguments:
        joined = argument.startswith("--") and "=" in argument
        option, sign, value = argument.partition("=") if joined else ("", "", argument)
        if (option or before) in ("--out", "--prompts") or _is_path(value):
            value = Path(value).name
        shown.append(f"{option}{sign}{value}")
        before = argument
    return shlex.join(["speckv", *shown])


def _is_path(text: str) -> bool:
    return "/" in text and (text[0] in "/.~" or Path(text).exists())


def run_distill(options: DistillOptions, console: Console) -> SliceManifest | None:
    """Distill; errors are those of `speckv.training.distill.distill`."""
    layers = tuple(parse_layers(text) for text in options.layers)
    prompts = read_prompts(options.prompts, options.seed)

    from .training.corpus import CorpusRecipe
    from .training.distill import DistillRecipe, distill
    from .training.trainer import TrainingRecipe

    recipe = DistillRecipe(
        corpus=CorpusRecipe(max_new_tokens=options.max_new_tokens, seed=options.seed),
        training=TrainingRecipe(learning_rate=options.learning_rate, seed=options.seed),
        epochs=options.epochs,
        written=options.written,
        layers=layers,
        heads=tuple(options.heads) or DistillRecipe.heads,
    )
    with Progressing(console) as reporter:
        return distill(
            options.target,
            options.out,
            prompts,
            recipe,
            reporter,
            compression=options.compression,
            device=options.device,
            corpus_only=options.corpus_only,
            command=command_line(options.arguments),
        )
