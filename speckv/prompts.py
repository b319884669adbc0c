"""Prompts: what one is, and the built-in evaluation set.

The evaluation set was written for this project. Benchmarks, profiles and losslessness tests use it;
training never sees it, which :mod:`speckv.training.prompts` enforces.
"""

from __future__ import annotations

import json
from dataclasses import dataclass
from importlib import resources

TASKS = ("code", "math", "chat", "summarization")


@dataclass(frozen=True)
class Prompt:
    """A user's message.

    Attributes
    ----------
    task : str
        One of ``TASKS``, or whatever a user's file says.
    text : str
    """

    task: str
    text: str


def _load() -> dict[str, list[str]]:
    file = resources.files("speckv").joinpath("data", "evaluation.json")
    prompts: dict[str, list[str]] = json.loads(file.read_text(encoding="utf-8"))
    return {task: prompts[task] for task in TASKS}


EVALUATION = _load()


def evaluation_prompts(per_task: int | None = None, *, skip: int = 0) -> list[Prompt]:
    """The evaluation set, its tasks taking turns.

    Parameters
    ----------
    per_task : int, optional
        The first so many of each task; all of them if not given.
    skip : int
        How many of each task are left out before.

    Raises
    ------
    ValueError
        ``skip`` is negative, or ``per_task`` below 1, or the smallest task has fewer.
    """
    smallest = min(map(len, EVALUATION.values()))
    if not 0 <= skip < smallest:
        raise ValueError(f"skip: expected 0 to {smallest - 1}, got {skip}")
    most = smallest - skip
    if per_task is not None and not 1 <= per_task <= most:
        raise ValueError(f"per_task: expected 1 to {most}, got {per_task}")
    longest = max(map(len, EVALUATION.values()))
    turns = range(skip, longest if per_task is None else skip + per_task)
    return [
        Prompt(task, texts[turn])
        for turn in turns
        for task, texts in EVALUATION.items()
        if turn < len(texts)
    ]
