"""The profiling data released with SpecKV (arXiv 2605.02888): steps and runs, read strictly.

Two CSV files. A row of `STEP_FILE` is one speculation step: its block's signals and what the target
accepted. A row of `RUN_FILE` is one generation: tokens, steps and seconds. The steps stand in the
order of the runs, so each step's run, and with it its prompt, is known. The step table of a trace
(`speckv.traces.steps`) is read as well: there bf16 and fp32, which count as fp16, are compressions
too, and a run may end with a draft token, after which the target adds none.
"""

from __future__ import annotations

import csv
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from ..policies.policy import COMPRESSION_INDEX

Floats = NDArray[np.float64]
Ints = NDArray[np.int64]

STEP_FILE = "phase2_step_results.csv"
RUN_FILE = "phase2_experiment_results.csv"
COMPRESSIONS = ("fp16", "int8", "nf4")
GAMMAS = (2, 4, 6, 8)
SIGNALS = (
    "mean_draft_entropy",
    "mean_draft_confidence",
    "max_draft_entropy",
    "min_draft_confidence",
)
_ROUNDING = 1e-3


@dataclass(frozen=True, eq=False)
class Steps:
    """N speculation steps.

    Attributes
    ----------
    compression : int64 [N]
        Index into `COMPRESSIONS`; bf16 and fp32 count as fp16.
    task : int64 [N]
        Index into ``tasks``.
    gamma, step, accepted, tokens : int64 [N]
        Draft tokens of the block, the step's number in its run, draft tokens kept, tokens produced.
    acceptance : float64 [N]
        Accepted over drafted tokens. A block is shorter than γ where its run ends, so this may
        exceed accepted / γ.
    signals : float64 [N, 4]
        `SIGNALS` of the block drafted in this step; entropies in bits.
    tasks : tuple of str
        In the order of their first step.
    """

    compression: Ints
    task: Ints
    gamma: Ints
    step: Ints
    accepted: Ints
    tokens: Ints
    acceptance: Floats
    signals: Floats
    tasks: tuple[str, ...]

    def __len__(self) -> int:
        return len(self.gamma)

    @property
    def inputs(self) -> Floats:
        """The predictor's inputs, float64 [N, 6]: the signals, the compression's index, γ."""
        return np.column_stack([self.signals, self.compression, self.gamma])

    @property
    def strata(self) -> list[str]:
        """``compression/task`` of each step."""
        pairs = zip(self.compression, self.task, strict=True)
        return [f"{COMPRESSIONS[c]}/{self.tasks[t]}" for c, t in pairs]


@dataclass(frozen=True, eq=False)
class Runs:
    """R generations.

    Attributes
    ----------
    compression, task, prompt, gamma, steps, tokens : int64 [R]
        As in `Steps`; ``prompt`` numbers the different prompts, from 0.
    seconds : float64 [R]
        Wall time.
    """

    compression: Ints
    task: Ints
    prompt: Ints
    gamma: Ints
    steps: Ints
    tokens: Ints
    seconds: Floats

    def __len__(self) -> int:
        return len(self.gamma)


@dataclass(frozen=True, eq=False)
class Released:
    """Both files, joined.

    Attributes
    ----------
    steps, runs : Steps, Runs
    run_of_step : int64 [N]
        Index into ``runs``.
    """

    steps: Steps
    runs: Runs
    run_of_step: Ints

    @property
    def prompt_of_step(self) -> Ints:
        """Prompt of each step, int64 [N]."""
        return self.runs.prompt[self.run_of_step]


def load(folder: Path) -> Released:
    """Read and join both files.

    Parameters
    ----------
    folder : Path
        Where `STEP_FILE` and `RUN_FILE` are.

    Raises
    ------
    ValueError
        A missing file or column, a value that is not what its column holds, steps that do not
        follow the runs, or a γ that a compression was never run at.
    """
    if not folder.is_dir():
        raise ValueError(f"DIR: expected a folder with {STEP_FILE} and {RUN_FILE}, got {folder}")
    steps = read_steps(folder / STEP_FILE)
    runs = _read_runs(folder / RUN_FILE, steps.tasks)
    for index, compression in enumerate(COMPRESSIONS):
        for gamma in GAMMAS:
            if not ((runs.compression == index) & (runs.gamma == gamma)).any():
                raise ValueError(
                    f"{folder / RUN_FILE}: expected runs of {compression} at γ={gamma}, got none"
                )
    return Released(steps, runs, _join(steps, runs, folder))


def read_steps(path: Path) -> Steps:
    """Read the step file.

    Raises
    ------
    ValueError
        A missing file or column, or a value that is not what its column holds.
    """
    rows = _read(
        path,
        {
            "compression": _one_of(tuple(COMPRESSION_INDEX)),
            "gamma": _gamma,
            "task": _name,
            "step": _count,
            "accepted": _count,
            "acceptance_rate": _number(0, 1),
            "tokens_produced": _count,
            **{name: _number(0, 1 if "confidence" in name else math.inf) for name in SIGNALS},
        },
    )
    tasks = tuple(dict.fromkeys(rows["task"]))
    steps = Steps(
        compression=_counted_as(rows["compression"]),
        task=_indices(rows["task"], tasks),
        gamma=np.array(rows["gamma"], dtype=np.int64),
        step=np.array(rows["step"], dtype=np.int64),
        accepted=np.array(rows["accepted"], dtype=np.int64),
        tokens=np.array(rows["tokens_produced"], dtype=np.int64),
        acceptance=np.array(rows["acceptance_rate"], dtype=np.float64),
        signals=np.array([rows[name] for name in SIGNALS], dtype=np.float64).T,
        tasks=tasks,
    )
    wrong = np.flatnonzero(
        (steps.accepted > steps.gamma)
        | ~_adds_up(steps.accepted, steps.tokens)
        | (steps.acceptance < steps.accepted / steps.gamma - _ROUNDING)
        | ((steps.acceptance > 0) != (steps.accepted > 0))
    )
    if len(wrong):
        i = wrong[0]
        raise ValueError(
            f"{path}: row {i + 1}: expected accepted <= gamma, tokens_produced = accepted + 1 and"
            f" acceptance_rate >= accepted / gamma, got {steps.accepted[i]}, {steps.gamma[i]},"
            f" {steps.tokens[i]} and {steps.acceptance[i]:g}"
        )
    return steps


def _adds_up(accepted: Ints, tokens: Ints) -> NDArray[np.bool_]:
    own: NDArray[np.int64] = tokens - accepted
    return np.asarray((own == 1) | ((own == 0) & (accepted > 0)))


def _read_runs(path: Path, tasks: tuple[str, ...]) -> Runs:
    rows = _read(
        path,
        {
            "compression": _one_of(tuple(COMPRESSION_INDEX)),
            "gamma": _gamma,
            "task": _one_of(tasks),
            "prompt": _name,
            "num_tokens": _positive,
            "elapsed_sec": _seconds,
            "num_steps": _positive,
        },
    )
    prompts = tuple(dict.fromkeys(rows["prompt"]))
    return Runs(
        compression=_counted_as(rows["compression"]),
        task=_indices(rows["task"], tasks),
        prompt=_indices(rows["prompt"], prompts),
        gamma=np.array(rows["gamma"], dtype=np.int64),
        steps=np.array(rows["num_steps"], dtype=np.int64),
        tokens=np.array(rows["num_tokens"], dtype=np.int64),
        seconds=np.array(rows["elapsed_sec"], dtype=np.float64),
    )


def _join(steps: Steps, runs: Runs, folder: Path) -> Ints:
    """The run of each step; the runs' step counts, labels and tokens must agree with the steps."""
    run = np.repeat(np.arange(len(runs)), runs.steps)
    starts = np.cumsum(runs.steps) - runs.steps
    same = len(run) == len(steps) and all(
        (
            np.array_equal(steps.compression, runs.compression[run]),
            np.array_equal(steps.gamma, runs.gamma[run]),
            np.array_equal(steps.task, runs.task[run]),
            np.array_equal(steps.step, np.arange(len(run)) - starts[run]),
            np.array_equal(np.bincount(run, steps.tokens, len(runs)), runs.tokens),
        )
    )
    if not same:
        raise ValueError(
            f"{folder}: expected the rows of {STEP_FILE} to be the steps of the runs of"
            f" {RUN_FILE}, in their order; got {len(steps)} steps that differ from the"
            f" {len(run)} of the runs"
        )
    return run


def _read(path: Path, columns: Mapping[str, Callable[[str], Any]]) -> dict[str, list[Any]]:
    """The named columns of a CSV file, each value parsed."""
    values: dict[str, list[Any]] = {name: [] for name in columns}
    try:
        with path.open(newline="", encoding="utf-8") as file:
            reader = csv.DictReader(file)
            missing = [name for name in columns if name not in (reader.fieldnames or ())]
            if missing:
                raise ValueError(f"{path}: expected a column {missing[0]!r}, got none")
            for number, row in enumerate(reader, start=1):
                for name, parse in columns.items():
                    text = row[name]
                    try:
                        if text is None:
                            raise ValueError("a value")
                        values[name].append(parse(text))
                    except ValueError as error:
                        raise ValueError(
                            f"{path}: row {number}: {name}: expected {error}, got {text!r}"
                        ) from None
    except OSError as error:
        raise ValueError(f"{path}: cannot be read ({error.strerror})") from None
    except (UnicodeDecodeError, csv.Error) as error:
        raise ValueError(f"{path}: expected a CSV file in UTF-8 ({error})") from None
    if not next(iter(values.values())):
        raise ValueError(f"{path}: expected at least one row, got none")
    return values


def _counted_as(compressions: Sequence[str]) -> Ints:
    return np.array([COMPRESSION_INDEX[name] for name in compressions], dtype=np.int64)


def _indices(names: Sequence[str], known: tuple[str, ...]) -> Ints:
    place = {name: index for index, name in enumerate(known)}
    return np.array([place[name] for name in names], dtype=np.int64)


# Parsers of a value: their ValueError says what was expected.


def _name(text: str) -> str:
    if not text.strip():
        raise ValueError("some text")
    return text


def _one_of(known: tuple[str, ...]) -> Callable[[str], str]:
    def parse(text: str) -> str:
        if text not in known:
            raise ValueError(f"one of {', '.join(known)}")
        return text

    return parse


def _gamma(text: str) -> int:
    return int(_one_of(tuple(map(str, GAMMAS)))(text))


def _count(text: str) -> int:
    if not (text.isascii() and text.isdigit() and len(text) < 10):
        raise ValueError("a whole number of at least 0")
    return int(text)


def _positive(text: str) -> int:
    if not text.strip("0"):
        raise ValueError("a whole number of at least 1")
    return _count(text)


def _seconds(text: str) -> float:
    value = _number(0, math.inf)(text)
    if value == 0:
        raise ValueError("a number above 0")
    return value


def _number(low: float, high: float) -> Callable[[str], float]:
    def parse(text: str) -> float:
        bounds = f"from {low:g} to {high:g}" if high < math.inf else f"of at least {low:g}"
        try:
            value = float(text)
        except ValueError:
            value = math.nan
        if not (low <= value <= high and math.isfinite(value)):
            raise ValueError(f"a number {bounds}")
        return value

    return parse
