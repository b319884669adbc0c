"""Losslessness on a real model: SmolLM2-135M-Instruct in every compression, with four drafts.

`make test` decodes 4 prompts x 32 tokens with some policies, `make test-full` 20 prompts x 64 with
all of them. The whole grid of policies, compressions and drafts is that of the tiny models.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import cache
from typing import Any, NamedTuple

import pytest
import torch

from speckv.models import hub
from speckv.models.base import CausalModel
from speckv.models.llama import LlamaDecoder
from speckv.models.loading import load_model, wrap_model
from speckv.models.pairing import eos_token_ids, load_draft
from speckv.sampling import SamplingParams
from tests.decoding.loops import Decoded, acceptance, decode, hugging_face, plain
from tests.decoding.tiny import perturbed

pytestmark = pytest.mark.model

TEXTS = [
    "The capital of France is",
    "def fibonacci(n):\n    if n",
    "Once upon a time, in a small village by the sea, there lived",
    "Q: What is 12 times 7?\nA:",
    "Water boils at 100 degrees Celsius because",
    "Dear Sir or Madam,\n\nI am writing to",
    "The three primary colours are",
    "SELECT name, age FROM users WHERE",
    "In 1969, the first human being",
    "To make a good cup of tea, first",
    "The opposite of hot is",
    "import numpy as np\n\n# the mean of each row\n",
    "A haiku about autumn leaves:\n",
    "Photosynthesis is the process by which",
    "List of the planets of the solar system:\n1.",
    "If all cats are mammals and Tom is a cat, then",
    "French: Bonjour, comment allez-vous?\nEnglish:",
    "The stock market fell sharply on Monday after",
    "Once",
    "x^2 + 5x + 6 = 0, hence x =",
]
POLICIES = ["fixed:1", "fixed:4", "fixed:15", "entropy:1.5", "confidence:0.5", "paper", "speckv"]
COMPRESSIONS = ["fp32", "fp16", "bf16", "int8", "nf4"]
SAMPLINGS: dict[str, list[dict[str, Any]]] = {
    "greedy": [{}],
    "sampled": [
        {"temperature": 0.7},
        {"temperature": 1.2, "top_k": 50, "top_p": 0.9},
        {"temperature": 0.7, "top_k": 20},
        {"temperature": 1.2},
    ],
}
DRAFTS = {
    "first:4": (0.0, 0.25),
    "default": (0.1, 0.75),
    "perturbed": (0.3, 0.75),
    "target": (1.0, 1.0),
}
"""Bounds of the acceptance by draft; ``default`` is the one that comes with the package."""
PERTURBATION = 0.12


class Size(NamedTuple):
    """How many prompts, and new tokens of each at most."""

    prompts: int
    tokens: int


QUICK, FULL = Size(4, 32), Size(20, 64)
BATCH = 4
Draft = tuple[CausalModel, torch.Tensor | None]
"""A draft model and its map of ids."""


@pytest.fixture(scope="module")
def transformer() -> Any:
    """The target as transformers has it, fp32."""
    from transformers import AutoModelForCausalLM

    folder = hub.fetch(progress=False)
    return AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()


@pytest.fixture(scope="module")
def smollm2() -> Callable[[str], tuple[LlamaDecoder, Any]]:
    """The target and its tokenizer by compression."""
    return cache(lambda compression: load_model("smollm2", compression=compression, device="cpu"))


@pytest.fixture(scope="module")
def draft(
    transformer: Any, smollm2: Callable[[str], tuple[LlamaDecoder, Any]]
) -> Callable[[str, str], Draft]:
    """The draft by kind and the target's compression."""

    @cache
    def get(kind: str, compression: str) -> Draft:
        if kind == "perturbed":
            noisy = perturbed(transformer, PERTURBATION)
            return wrap_model(noisy, compression="bf16", device="cpu"), None
        target, tokenizer = smollm2(compression)
        if kind == "default":
            model, id_map = load_draft(None, target, tokenizer)
            assert model is not None and id_map is not None
            return model, id_map
        return target if kind == "target" else target.first_layers(4), None

    return lambda kind, compression: get(kind, "" if kind == "perturbed" else compression)


@pytest.fixture(scope="module")
def prompts(smollm2: Callable[[str], tuple[LlamaDecoder, Any]]) -> list[list[int]]:
    tokenizer = smollm2("fp32")[1]
    return [tokenizer.encode(text) for text in TEXTS]


@pytest.fixture(scope="module")
def eos(smollm2: Callable[[str], tuple[LlamaDecoder, Any]]) -> list[int]:
    return eos_token_ids(*smollm2("fp32"))


Expected = Callable[[str, str, Size], list[list[int]]]


@pytest.fixture(scope="module")
def expected(
    smollm2: Callable[[str], tuple[LlamaDecoder, Any]], prompts: list[list[int]], eos: list[int]
) -> Expected:
    """Plain decoding, each prompt alone, by compression, sampling and size."""

    @cache
    def tokens(compression: str, sampling: str, size: Size) -> list[list[int]]:
        target, _ = smollm2(compression)
        return plain(target, prompts[: size.prompts], params(sampling, size), eos=eos)

    return tokens


def params(sampling: str, size: Size) -> list[SamplingParams]:
    """Parameters by prompt; limits differ, so rows of a batch end apart."""
    rows = SAMPLINGS[sampling]
    return [
        SamplingParams(max_new_tokens=size.tokens - i % 3, seed=i, **rows[i % len(rows)])
        for i in range(size.prompts)
    ]


@pytest.fixture
def check(
    smollm2: Callable[[str], tuple[LlamaDecoder, Any]],
    draft: Callable[[str, str], Draft],
    prompts: list[list[int]],
    eos: list[int],
    expected: Expected,
    lossless: Callable[..., None],
) -> Callable[..., None]:
    """Decode in batches and compare."""

    def run(
        compression: str, policy: str, kind: str, sampling: str, size: Size, batch: int = BATCH
    ) -> None:
        target, _ = smollm2(compression)
        model, id_map = draft(kind, compression)
        wanted, every = expected(compression, sampling, size), params(sampling, size)
        rows: list[Decoded] = []
        for first in range(0, size.prompts, batch):
            part = slice(first, min(first + batch, size.prompts))
            rows += decode(
                target,
                model,
                policy,
                prompts[part],
                every[part],
                eos=eos,
                first_request=first,
                id_map=id_map,
            )
        lossless(
            policy=policy,
            compression=compression,
            draft=kind,
            sampling=sampling,
            batch=str(batch),
            model="SmolLM2-135M-Instruct",
            dtype=str(target.dtype).removeprefix("torch."),
            sequences=size.prompts,
            tokens=sum(map(len, wanted)),
        )
        assert [row.tokens for row in rows] == wanted
        if policy != "speckv":  # which drafts where it is sure of itself, if at all
            low, high = DRAFTS[kind]
            assert low <= acceptance(rows) <= high

    return run


SIZES = [
    pytest.param(QUICK, id="4x32"),
    pytest.param(FULL, id="20x64", marks=pytest.mark.slow),
]


@pytest.mark.parametrize("size", SIZES)
def test_plain_greedy_is_transformers_generate(
    transformer: Any,
    prompts: list[list[int]],
    eos: list[int],
    expected: Expected,
    lossless: Callable[..., None],
    size: Size,
) -> None:
    limits = [row.max_new_tokens for row in params("greedy", size)]
    wanted = hugging_face(transformer, prompts[: size.prompts], limits, eos)
    lossless(
        policy="fixed:0",
        compression="fp32",
        draft="none",
        sampling="greedy",
        batch="1",
        model="SmolLM2-135M-Instruct",
        against="transformers",
        sequences=size.prompts,
        tokens=sum(map(len, wanted)),
    )
    assert expected("fp32", "greedy", size) == wanted


@pytest.mark.parametrize("sampling", SAMPLINGS)
@pytest.mark.parametrize(
    ("compression", "policy", "kind"),
    [
        ("fp32", "fixed:4", "first:4"),
        ("fp32", "paper", "perturbed"),
        ("fp32", "fixed:15", "target"),
        ("fp16", "fixed:4", "perturbed"),
        ("bf16", "speckv", "perturbed"),
        ("bf16", "confidence:0.5", "perturbed"),
        ("int8", "entropy:1.5", "perturbed"),
        ("nf4", "fixed:4", "perturbed"),
        ("nf4", "fixed:15", "target"),
        ("fp32", "fixed:4", "default"),
        ("fp16", "fixed:1", "default"),
        ("bf16", "confidence:0.5", "default"),
        ("bf16", "speckv", "default"),
        ("int8", "fixed:15", "default"),
        ("nf4", "entropy:1.5", "default"),
    ],
)
def test_batches_of_four(
    check: Callable[..., None], compression: str, policy: str, kind: str, sampling: str
) -> None:
    check(compression, policy, kind, sampling, QUICK)


@pytest.mark.parametrize(
    ("compression", "policy", "kind"),
    [("fp32", "fixed:15", "target"), ("bf16", "fixed:4", "perturbed")],
)
def test_one_at_a_time(
    check: Callable[..., None], compression: str, policy: str, kind: str
) -> None:
    check(compression, policy, kind, "sampled", QUICK, batch=1)


@pytest.mark.parametrize("compression", ["fp32", "bf16"])
def test_two_threads(
    lossless: Callable[..., None],
    smollm2: Callable[[str], tuple[LlamaDecoder, Any]],
    draft: Callable[[str, str], Draft],
    prompts: list[list[int]],
    eos: list[int],
    compression: str,
) -> None:
    """Rows are the same at any width with more threads too, though perhaps not those of one.

    Few tokens: beside another worker two threads wait for each other most of the time.
    """
    size = Size(2, 10)
    pair = smollm2(compression)[0], draft("perturbed", compression)[0]
    every = params("sampled", size)
    before = torch.get_num_threads()
    torch.set_num_threads(2)
    try:
        wanted = plain(pair[0], prompts[: size.prompts], every, eos=eos)
        rows = decode(*pair, "fixed:4", prompts[: size.prompts], every, eos=eos)
    finally:
        torch.set_num_threads(before)
    lossless(
        policy="fixed:4",
        compression=compression,
        draft="perturbed",
        sampling="sampled",
        batch=str(size.prompts),
        model="SmolLM2-135M-Instruct",
        threads="2",
        sequences=size.prompts,
        tokens=sum(map(len, wanted)),
    )
    assert [row.tokens for row in rows] == wanted


@pytest.mark.slow
@pytest.mark.parametrize("policy", POLICIES)
@pytest.mark.parametrize("compression", ["fp32", "bf16"])
def test_every_policy(check: Callable[..., None], compression: str, policy: str) -> None:
    check(compression, policy, "perturbed", "greedy", FULL)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("compression", "policy"),
    [
        ("fp32", "fixed:4"),
        ("fp16", "confidence:0.5"),
        ("bf16", "speckv"),
        ("int8", "fixed:4"),
        ("nf4", "paper"),
    ],
)
def test_every_compression_sampled(
    check: Callable[..., None], compression: str, policy: str
) -> None:
    check(compression, policy, "perturbed", "sampled", FULL)


@pytest.mark.slow
@pytest.mark.parametrize("compression", ["fp16", "int8", "nf4"])
def test_every_compression_greedy(check: Callable[..., None], compression: str) -> None:
    check(compression, "fixed:4", "perturbed", "greedy", FULL)


@pytest.mark.slow
@pytest.mark.parametrize("sampling", SAMPLINGS)
@pytest.mark.parametrize("policy", POLICIES)
@pytest.mark.parametrize("compression", COMPRESSIONS)
def test_the_default_draft(
    check: Callable[..., None], compression: str, policy: str, sampling: str
) -> None:
    check(compression, policy, "default", sampling, FULL)


@pytest.mark.slow
@pytest.mark.parametrize("sampling", SAMPLINGS)
@pytest.mark.parametrize(("kind", "policy"), [("first:4", "fixed:4"), ("target", "fixed:15")])
@pytest.mark.parametrize("compression", ["bf16"])
def test_drafts_that_are_always_and_hardly_ever_right(
    check: Callable[..., None], compression: str, kind: str, policy: str, sampling: str
) -> None:
    check(compression, policy, kind, sampling, FULL)


@pytest.mark.slow
@pytest.mark.parametrize("compression", ["fp32", "bf16"])
def test_every_prompt_one_at_a_time(check: Callable[..., None], compression: str) -> None:
    check(compression, "confidence:0.5", "perturbed", "greedy", FULL, batch=1)
