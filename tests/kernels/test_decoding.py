"""A whole decode through the kernels equals the one through the reference, step by step.

The loop uses the kernels as it does on a GPU: prepared objects, validated once, whose scratch one
launch leaves to the next. Only the launch is another, since on CPU tensors these objects would call
the reference.
"""

from __future__ import annotations

import importlib
from collections import Counter
from functools import cache
from typing import Any

import pytest
import torch
from torch import Tensor

import speckv.kernels
from speckv.decoding import EagerLoop, RequestBatch, eager
from speckv.decoding.eager import StepRecord
from speckv.decoding.prepared import PreparedOperations
from speckv.kernels.cutoff import CutoffScratch, cutoff_out
from speckv.kernels.draft_step import Config, Scratch, draft_step_out
from speckv.kernels.rejection import verify_rejection_out
from speckv.kernels.split import ChoiceScratch, split_row
from speckv.kernels.verify import verify_out
from speckv.policies import parse_policy
from speckv.sampling import SamplingParams
from tests.decoding.loops import COST
from tests.tabular import TabularModel, random_table

pytestmark = [
    pytest.mark.interpreter,
    # Impossible tokens: the interpreter's numpy warns of what the kernels discard.
    pytest.mark.filterwarnings("ignore::RuntimeWarning"),
]

VOCAB = 150  # a block and a tail
PROMPTS = [[5, 9, 3], [7, 1, 2, 3, 4, 5, 6, 7, 8], [11], [2, 4] * 12]
NEW_TOKENS = (7, 3, 9, 5)
SAMPLINGS: dict[str, dict[str, Any]] = {
    "greedy": {},
    "sampled": {"temperature": 0.9},
    "truncated": {"temperature": 1.2, "top_k": 40, "top_p": 0.9},
    "rejection": {"temperature": 0.9, "top_p": 0.95, "coupling": "rejection"},
}


class Interpreted:
    """The reference's functions, each one launch in the interpreter; scratch by shape, kept."""

    def __init__(self) -> None:
        self.launches: Counter[str] = Counter()
        self._scratch = cache(self._allocate)

    def _allocate(self, kind: str, *shape: int) -> Any:
        vocabulary = shape[-1]
        if kind == "draft_step":
            return Scratch.allocate(shape[0], Config(128, -(-vocabulary // 128), 4), "cpu")
        config = split_row(vocabulary, block=128)
        if kind == "cutoff":
            return CutoffScratch.allocate(*shape, torch.float32, config, "cpu")
        return ChoiceScratch.allocate(*shape[:2], config, "cpu", 1 + (kind != "verify"))

    def _get(self, kind: str, logits: Tensor) -> Any:
        self.launches[kind] += 1
        return self._scratch(kind, *logits.shape)

    def draft_step(self, logits: Tensor, *arguments: Any, **options: Any) -> None:
        scratch = self._get("draft_step", logits)
        draft_step_out(logits, *arguments, scratch=scratch, **options)

    def verify(self, logits: Tensor, *arguments: Any, **options: Any) -> None:
        verify_out(logits, *arguments, scratch=self._get("verify", logits), **options)

    def verify_rejection(self, logits: Tensor, *arguments: Any, **options: Any) -> None:
        scratch = self._get("verify_rejection", logits)
        verify_rejection_out(logits, *arguments, scratch=scratch, **options)

    def cutoff(self, logits: Tensor, *columns: Any, **options: Any) -> tuple[Tensor, Tensor]:
        results = tuple(torch.full((logits.shape[0],), torch.nan) for _ in range(2))
        scratch = self._get("cutoff", logits)
        cutoff_out(logits, *columns, scratch=scratch, cutoffs=results[0], lse=results[1], **options)
        return results[0], results[1]


@pytest.fixture(scope="module")
def tables() -> tuple[Tensor, Tensor]:
    """Logits of a target, and of a draft that agrees with it about half of the time."""
    target = random_table(VOCAB, VOCAB, seed=0, phases=1, scale=3.0)
    noise = torch.randn(target.shape, generator=torch.Generator().manual_seed(1))
    return target, target + noise


def records(
    models: tuple[TabularModel, TabularModel],
    policy: str,
    options: dict[str, Any],
    id_map: Tensor | None,
) -> list[list[StepRecord]]:
    """Everything that the loop yields for four prompts of unequal length and end."""
    params = [
        SamplingParams(max_new_tokens=n, **{**options, "seed": 3} if options else {})
        for n in NEW_TOKENS
    ]
    capacity = max(len(p) + n for p, n in zip(PROMPTS, NEW_TOKENS, strict=True))
    loop = EagerLoop(*models, batch=4, capacity=capacity, id_map=id_map)
    batch = RequestBatch.build(
        PROMPTS, params, eos_ids=[17], max_length=capacity, device=torch.device("cpu")
    )
    return list(loop.run(batch, parse_policy(policy).pack(cost=COST)))


@pytest.mark.parametrize(
    ("policy", "sampling", "trimmed"),
    [
        ("fixed:4", "greedy", True),
        ("speckv", "greedy", False),
        ("entropy:2.5", "sampled", True),
        ("paper", "sampled", False),
        ("speckv", "truncated", True),
        ("fixed:2", "rejection", True),
        ("speckv", "rejection", False),
    ],
)
def test_a_decode_through_the_kernels(
    policy: str,
    sampling: str,
    trimmed: bool,
    tables: tuple[Tensor, Tensor],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    options = SAMPLINGS[sampling]
    id_map = torch.arange(VOCAB - 1, -1, -2, dtype=torch.int32) if trimmed else None
    draft = tables[1] if id_map is None else tables[1][..., id_map.long()]
    models = TabularModel(tables[0]), TabularModel(draft)
    expected = records(models, policy, options, id_map)

    kernels = Interpreted()
    for name in ("cutoff", "draft_step", "rejection", "verify"):
        module = importlib.import_module(f"speckv.kernels.{name}")
        monkeypatch.setattr(module, "reference", kernels)
    used: list[PreparedOperations] = []

    def prepared(operations: Any) -> PreparedOperations:
        used.append(PreparedOperations(operations))
        return used[0]

    monkeypatch.setattr(eager, "operations", lambda device: speckv.kernels)
    monkeypatch.setattr(eager, "prepared", prepared)
    assert records(models, policy, options, id_map) == expected

    steps = [r for step in expected[1:] for r in step]
    rejection = options.get("coupling") == "rejection"
    verification = "verify_rejection" if rejection else "verify"
    assert kernels.launches[verification] == len(expected)
    assert (kernels.launches["cutoff"] > 0) == ("top_p" in options)
    assert kernels.launches["draft_step"] >= max(r.gamma for r in steps) > 0
    made = Counter(key[0].__name__ for key in used[0]._prepared)
    assert len(used) == made["DraftStep"] == 1
    widths = {max(r.gamma for r in step) + 1 for step in expected[1:]} | {1}
    assert made[verification.title().replace("_", "")] <= len(widths) + 1, "strides of prefill"
    assert made["Cutoff"] <= len(widths) + 2
