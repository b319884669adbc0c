"""A trace as the step table of SpecKV's released data (arXiv 2605.02888), one row a step.

The paper decodes every prompt greedily with each of a few fixed γ. A trace tells what such runs
would have done. Signals are those of the block drafted in the step; a block is shorter than γ where
its run ends, and steps without a draft token, which have no signals, are left out. Compressions
have their own names; `speckv.paper.data.read_steps` counts bf16 and fp32 as fp16.
"""

from __future__ import annotations

import csv
import io
from collections.abc import Iterator, Sequence
from pathlib import Path

import numpy as np

from ..files import write_atomically
from ..kernels import layout as at
from ..kernels.layout import WIDTH_MAX
from ..policies import CostTable
from .baselines import Static
from .replay import replay
from .schema import Trace

COLUMNS = (
    "compression",
    "gamma",
    "task",
    "step",
    "accepted",
    "acceptance_rate",
    "tokens_produced",
    "mean_draft_entropy",
    "mean_draft_confidence",
    "max_draft_entropy",
    "min_draft_confidence",
)
GAMMAS = (2, 4, 6, 8)
_NO_COST = CostTable((1.0,) * WIDTH_MAX, (0.0,) * WIDTH_MAX)  # steps do not depend on costs


def write_steps(path: Path, trace: Trace, gammas: Sequence[int] = GAMMAS) -> int:
    """Write the table as CSV, in the paper's columns; the number of rows.

    Rows are in the order of compression, γ, answer, step. Entropies are in bits.

    Raises
    ------
    ValueError
        The trace has no greedy answers.
    """
    greedy = trace.where(lambda a: a.temperature == 0)
    if not greedy.answers:
        raise ValueError("trace: expected greedy answers, which the table is of, got none")
    text = io.StringIO()
    writer = csv.writer(text, lineterminator="\n")
    writer.writerow(COLUMNS)
    count = 0
    for compression in dict.fromkeys(a.compression for a in greedy.answers):
        for gamma in gammas:
            for row in step_rows(greedy, compression, gamma):
                writer.writerow((compression, gamma, *row))
                count += 1
    write_atomically(path, lambda temporary: temporary.write_text(text.getvalue(), "utf-8"))
    return count


def step_rows(
    trace: Trace, compression: str, gamma: int
) -> Iterator[tuple[str | int | float, ...]]:
    """`COLUMNS` from ``task`` on of all steps of a compression at a fixed γ."""
    trace = trace.where(lambda a: a.compression == compression)
    found = replay(trace, Static({}, gamma), _NO_COST)
    for i, answer in enumerate(trace.answers):
        place = 1
        for step, (drafted, accepted) in enumerate(found.steps_of(i)):
            produced = min(accepted + 1, int(trace.lengths[i]) - place)
            if drafted:
                signals = trace.rows.signals[trace.first[i] + place, :drafted].astype(np.float64)
                entropy, confidence = signals[:, at.ENTROPY], signals[:, at.CONFIDENCE]
                figures = (entropy.mean(), confidence.mean(), entropy.max(), confidence.min())
                yield (
                    answer.task,
                    step,
                    accepted,
                    round(accepted / drafted, 4),
                    produced,
                    *(round(float(value), 4) for value in figures),
                )
            place += produced
