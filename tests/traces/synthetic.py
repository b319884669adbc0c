"""Small made-up traces: what decoding could have given, drawn at random."""

from __future__ import annotations

import numpy as np

from speckv.kernels.layout import GAMMA_MAX, SIGNALS
from speckv.policies import CostTable
from speckv.traces.schema import Answer, Rows, Trace, TraceInfo, join

COST = CostTable.from_parts(draft_ms=0.2, verify_ms=[1.0 + 0.02 * w for w in range(16)])
INFO = TraceInfo(
    target={"name": "t", "fingerprint": "ab", "dtype": {"fp32": "float32"}},
    draft={"name": "d", "fingerprint": None},
    device="a processor",
    versions={"speckv": "0"},
    recipe={"max_new_tokens": 40},
    costs={"fp32": COST, "int8": COST},
)
TASKS = ("code", "math", "chat", "summarization")


def made_up_rows(rng: np.random.Generator, length: int, skill: float = 0.7) -> Rows:
    """Rows whose signals tell something about acceptance: ``skill`` is the mean confidence."""
    confidence = rng.beta(4 * skill, 4 * (1 - skill), (length, GAMMA_MAX))
    agreed = rng.random((length, GAMMA_MAX)) < confidence
    run = np.where(agreed.all(axis=1), GAMMA_MAX, agreed.argmin(axis=1))
    accepted = np.minimum(run, length - np.arange(length))
    signals = np.zeros((length, GAMMA_MAX, SIGNALS), dtype=np.float32)
    signals[:, :, 0] = 6 * (1 - confidence) + rng.random((length, GAMMA_MAX)) * 0.5
    signals[:, :, 1] = confidence
    signals[:, :, 2] = np.maximum(2 * confidence - 1, 0)
    signals[:, :, 3] = confidence
    return Rows(
        target_token=rng.integers(0, 50, length, dtype=np.int32),
        target_entropy=rng.random(length, dtype=np.float32),
        target_margin=rng.random(length, dtype=np.float32),
        drafted=np.full(length, GAMMA_MAX, dtype=np.int8),
        draft_tokens=rng.integers(0, 50, (length, GAMMA_MAX), dtype=np.int32),
        signals=signals,
        accepted=accepted.astype(np.int8),
    )


def made_up_trace(
    prompts: int = 12,
    length: int = 40,
    *,
    seed: int = 0,
    compressions: tuple[str, ...] = ("fp32", "int8"),
    temperatures: tuple[float, ...] = (0.0, 0.7),
) -> Trace:
    """Answers of every prompt in every compression and temperature; some end themselves."""
    rng = np.random.default_rng(seed)
    parts = []
    for compression in compressions:
        for temperature in temperatures:
            for prompt in range(prompts):
                count = length if prompt % 3 else int(rng.integers(1, length))
                answer = Answer(
                    prompt_id=prompt,
                    task=TASKS[prompt % len(TASKS)],
                    compression=compression,
                    temperature=temperature,
                    seed=prompt,
                    limit=length,
                    prompt_tokens=tuple(range(3 + prompt)),
                )
                parts.append((answer, made_up_rows(rng, count, 0.4 + 0.5 * (prompt % 2))))
    return join(INFO, parts)
