"""The draft that transformers runs is the engine's, and what a comparison sums up to."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from bench import assisted
from speckv.models.llama import LlamaDecoder
from speckv.models.loading import load_model
from speckv.models.slice_draft import load_slice_draft, save_slice_draft
from tests.models.conftest import seeded
from tests.training.conftest import VOCAB, new_student, save_target, tiny_llama

LAYERS, HEAD = (0, 2), 50


@pytest.fixture(scope="module")
def target(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_target(seeded(tiny_llama), tmp_path_factory.mktemp("target"))


@pytest.fixture(scope="module")
def draft(target: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A draft whose tensors are no longer the target's."""
    model, _ = load_model(target, device="cpu", progress=False)
    assert isinstance(model, LlamaDecoder)
    draw = torch.Generator().manual_seed(0)
    id_map = torch.randperm(VOCAB, generator=draw)[:HEAD]
    tensors = {
        name: t.detach() + 0.1 * torch.randn(t.shape, generator=draw)
        for name, t in new_student(target, LAYERS, id_map).trainable().items()
    }
    folder = tmp_path_factory.mktemp("draft")
    save_slice_draft(folder, tensors, id_map, target=model, layers=LAYERS, card={})
    return folder


def test_transformers_runs_the_same_draft(target: Path, draft: Path) -> None:
    model, _ = load_model(target, device="cpu", progress=False)
    assert isinstance(model, LlamaDecoder)
    ours, id_map = load_slice_draft(draft, model)
    ids = torch.randint(0, VOCAB, (1, 24), generator=torch.Generator().manual_seed(1))
    expected = ours.forward(ids.int(), [0], ours.new_cache(1, 24))
    theirs = assisted.transformers_draft(draft, torch.float32, str(target))
    with torch.inference_mode():
        logits = theirs(ids).logits
    assert logits.shape == (1, 24, VOCAB)
    proposed = logits[..., id_map.long()]
    torch.testing.assert_close(proposed, expected.float(), rtol=1e-4, atol=1e-4)
    others = torch.ones(VOCAB, dtype=torch.bool)
    others[id_map.long()] = False
    assert bool((logits[..., others] == torch.finfo(torch.float32).min).all())


def test_transformers_generates_with_it(target: Path, draft: Path) -> None:
    """Assisted greedy generation says what the target says alone."""
    from transformers import AutoModelForCausalLM

    from bench.sides import compare, transformers_side

    model = AutoModelForCausalLM.from_pretrained(target).eval()
    assistant = assisted.transformers_draft(draft, torch.float32, str(target))
    options: dict[str, Any] = {"assistant_model": assistant}
    sides = {
        "plain": transformers_side(model, 12),
        "assisted": transformers_side(model, 12, **options),
    }
    rows = compare(sides, [[5, 9, 30], [7, 8]], exact=True)
    assert all(0 < row["assisted"]["tokens"] <= 12 for row in rows)


def test_the_fastest_setting_is_found() -> None:
    asked: list[tuple[int, float]] = []

    def run(setting: assisted.Setting) -> assisted.Run:
        length = setting["num_assistant_tokens"]
        threshold = setting["assistant_confidence_threshold"]

        def call(prompt: list[int]) -> tuple[float, list[int]]:
            asked.append((length, threshold))
            return 1.0 + abs(length - 5) + abs(threshold - 0.3) * len(prompt), prompt

        return call

    best, tried = assisted.tune(run, [[1, 2], [3]])
    assert best["num_assistant_tokens"] == 5 and best["assistant_confidence_threshold"] == 0.3
    assert best["num_assistant_tokens_schedule"] == "constant"
    assert len(asked) == 2 * len(tried) == 2 * len(set(asked))
    assert max(row["tokens_per_second"] for row in tried) == pytest.approx(1.5)


def test_a_summary_by_hand() -> None:
    def side(seconds: float, tokens: int, identical: bool = True) -> dict[str, Any]:
        return {"seconds": seconds, "tokens": tokens, "identical": identical}

    rows = [
        {"speckv": side(1.0, 10), "tuned": side(2.0, 10)},
        {"speckv": side(1.0, 20), "tuned": side(2.0, 10, identical=False)},
        {"speckv": side(2.0, 10), "tuned": side(2.0, 10)},
    ]
    assert assisted.summary(rows, "tuned") == {
        "differing_prompts": 1,
        "median_ratio": 2.0,
        "ratio_95": [1.0, 4.0],
        "transformers_tokens_per_second": 5.0,
        "speckv_tokens_per_second": 10.0,
    }
