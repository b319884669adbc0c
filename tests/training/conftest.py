"""A tiny target that is a folder, prompts for it, and what it writes."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import pytest
import torch

from speckv.models.llama import LlamaDecoder
from speckv.models.loading import load_model, open_checkpoint
from speckv.prompts import TASKS, Prompt
from speckv.training.corpus import CorpusRecipe, Shard, generate
from speckv.training.examples import Examples
from speckv.training.student import Student
from speckv.training.trainer import Trainer, TrainingRecipe
from tests.models.conftest import seeded, tiny_tokenizer

VOCAB = 200
EOS = 2
RECIPE = CorpusRecipe(max_new_tokens=24, top=8)


def tiny_llama() -> Any:
    """A target that is sharp, so that its likeliest token is seldom a near tie.

    Its middle layers add hardly more than a constant, which a draft without them can learn.
    """
    from transformers import LlamaConfig, LlamaForCausalLM

    model = LlamaForCausalLM(
        LlamaConfig(
            vocab_size=VOCAB,
            hidden_size=32,
            intermediate_size=64,
            num_hidden_layers=4,
            num_attention_heads=4,
            num_key_value_heads=2,
            max_position_embeddings=128,
            initializer_range=0.3,
            eos_token_id=EOS,
            attention_bias=True,
        )
    )
    with torch.no_grad():
        for layer in model.model.layers[1:3]:
            layer.self_attn.o_proj.weight *= 0.3
            layer.mlp.down_proj.weight *= 0.3
            layer.self_attn.o_proj.bias.normal_()
        model.lm_head.weight[EOS] *= 1.6  # some responses end before their limit
    return model


def save_target(model: Any, folder: Path) -> Path:
    """Write a model of ``VOCAB`` tokens with a word-level tokenizer."""
    model.save_pretrained(folder)
    tiny_tokenizer([f"w{i}" for i in range(3, VOCAB)]).save_pretrained(folder)
    return folder


def make_prompts(count: int, seed: int = 0) -> list[Prompt]:
    """Prompts of 2 to 9 words, their tasks taking turns."""
    draw = torch.Generator().manual_seed(seed)

    def text() -> str:
        length = int(torch.randint(2, 10, (1,), generator=draw))
        words = torch.randint(3, VOCAB, (length,), generator=draw).tolist()
        return " ".join(f"w{i}" for i in words)

    return [Prompt(TASKS[i % len(TASKS)], text()) for i in range(count)]


@pytest.fixture(scope="session")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The tiny target's checkpoint."""
    return save_target(seeded(tiny_llama), tmp_path_factory.mktemp("tiny"))


@pytest.fixture(scope="session")
def loaded(folder: Path) -> tuple[LlamaDecoder, Any]:
    """The tiny target and its tokenizer."""
    target, tokenizer = load_model(folder, device="cpu", progress=False)
    assert isinstance(target, LlamaDecoder)
    return target, tokenizer


@pytest.fixture(scope="session")
def target(loaded: tuple[LlamaDecoder, Any]) -> LlamaDecoder:
    return loaded[0]


@pytest.fixture(scope="session")
def tokenizer(loaded: tuple[LlamaDecoder, Any]) -> Any:
    return loaded[1]


@pytest.fixture(scope="session")
def shard(loaded: tuple[LlamaDecoder, Any]) -> Shard:
    """What the tiny target answers to 200 prompts."""
    return generate(*loaded, make_prompts(200), RECIPE)


@pytest.fixture(scope="session")
def examples(shard: Shard) -> Examples:
    return Examples.from_shards([shard])


def new_student(folder: Path, layers: Sequence[int], id_map: torch.Tensor) -> Student:
    """An untrained student of a checkpoint."""
    return Student(*open_checkpoint(folder, progress=False), layers, id_map)


LAYERS = (0, 3)
HEAD = 128
TRAINING = TrainingRecipe(batch_tokens=512, learning_rate=3e-3, evaluate_every=20, patience=50)


@pytest.fixture(scope="session")
def id_map(examples: Examples) -> torch.Tensor:
    """Target ids of the tiny draft's head."""
    return examples.vocabulary(HEAD, examples.split()[0], VOCAB)


@pytest.fixture(scope="session")
def new_trainer(folder: Path, examples: Examples, id_map: torch.Tensor) -> Callable[..., Trainer]:
    """Trainers of untrained students, always the same."""

    def build(recipe: TrainingRecipe = TRAINING) -> Trainer:
        student = new_student(folder, LAYERS, id_map)
        train, *halves = examples.split()
        # The tiny corpus keeps eight sequences from training: too few to measure on four.
        validation = [i for half in halves for i in half]
        return Trainer(student, id_map, examples, train, validation, recipe, torch.device("cpu"))

    return build


@pytest.fixture
def in_fp32(monkeypatch: pytest.MonkeyPatch) -> None:
    """Training arithmetic without autocast."""
    monkeypatch.setattr(torch, "autocast", lambda *_: nullcontext())
