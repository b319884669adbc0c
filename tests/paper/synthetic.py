"""A release like the paper's, made up: two CSV files whose costs and signals are known."""

from __future__ import annotations

import csv
from pathlib import Path
from typing import Any

import numpy as np

from speckv.paper.data import COMPRESSIONS, GAMMAS, RUN_FILE, STEP_FILE

TASKS = ("code", "math", "chat", "summarization")
PROMPTS_PER_TASK = 3
TOKENS = 40
# (t_draft, t_verify) in ms
COSTS = {"fp16": (10.0, 20.0), "int8": (10.0, 90.0), "nf4": (10.0, 35.0)}
DISTURBED = 5  # times the seconds of the disturbed runs, one of each compression

STEP_COLUMNS = (
    "compression", "gamma", "task", "step", "accepted", "acceptance_rate", "tokens_produced",
    "mean_draft_entropy", "mean_draft_confidence", "max_draft_entropy", "min_draft_confidence",
)  # fmt: skip
RUN_COLUMNS = (
    "compression", "gamma", "task", "prompt", "num_tokens", "elapsed_sec", "num_steps",
)  # fmt: skip

Row = dict[str, Any]


def make_release(seed: int = 0) -> tuple[list[Row], list[Row]]:
    """Rows of the step file and of the run file.

    A token is accepted with a probability that falls with its entropy; the last step of a run
    drafts no more than the run still needs. The first run of each compression is disturbed.
    """
    generator = np.random.default_rng(seed)
    steps: list[Row] = []
    runs: list[Row] = []
    for compression in COMPRESSIONS:
        for gamma in GAMMAS:
            for number in range(len(TASKS) * PROMPTS_PER_TASK):
                task = TASKS[number % len(TASKS)]
                label = {"compression": compression, "gamma": gamma, "task": task}
                blocks = _generate(generator, gamma, hardness=0.6 + 0.1 * (number % len(TASKS)))
                steps += [{**label, "step": i, **block} for i, block in enumerate(blocks)]
                draft, verify = COSTS[compression]
                seconds = len(blocks) * (verify + gamma * draft) / 1e3
                seconds *= generator.normal(1, 0.005)
                if gamma == GAMMAS[-1] and number == 0:
                    seconds *= DISTURBED
                runs.append(
                    {
                        **label,
                        "prompt": f"Prompt {number}, in two parts",
                        "num_tokens": sum(block["tokens_produced"] for block in blocks),
                        "elapsed_sec": round(seconds, 3),
                        "num_steps": len(blocks),
                    }
                )
    return steps, runs


def write_release(folder: Path, steps: list[Row], runs: list[Row]) -> Path:
    """Write both files; returns the folder."""
    folder.mkdir(parents=True, exist_ok=True)
    for name, columns, rows in (
        (STEP_FILE, STEP_COLUMNS, steps),
        (RUN_FILE, RUN_COLUMNS, runs),
    ):
        with (folder / name).open("w", newline="", encoding="utf-8") as file:
            writer = csv.DictWriter(file, columns)
            writer.writeheader()
            writer.writerows(rows)
    return folder


def _generate(generator: np.random.Generator, gamma: int, hardness: float) -> list[Row]:
    blocks: list[Row] = []
    made = 0
    while made < TOKENS:
        drafted = min(gamma, TOKENS - made)
        entropy = generator.exponential(hardness) + generator.exponential(0.2, drafted)
        confidence = np.exp2(-entropy)
        kept = generator.random(drafted) < np.clip(1.1 - 0.35 * entropy, 0, 1)
        accepted = drafted if kept.all() else int(kept.argmin())
        made += accepted + 1
        blocks.append(
            {
                "accepted": accepted,
                "acceptance_rate": accepted / drafted,
                "tokens_produced": accepted + 1,
                "mean_draft_entropy": round(float(entropy.mean()), 4),
                "mean_draft_confidence": round(float(confidence.mean()), 4),
                "max_draft_entropy": round(float(entropy.max()), 4),
                "min_draft_confidence": round(float(confidence.min()), 4),
            }
        )
    return blocks
