"""Losslessness where a window hides old tokens, outside the Llama family, and of mixed pairs.

The grid of ``test_lossless``, for the ways in which these models can differ: keys that fall out of
a window between a draft token and its verification, forwards of whole blocks by the adapter, and a
draft whose cache is laid out otherwise than its target's.
"""

from __future__ import annotations

from collections.abc import Callable

import pytest

from speckv.models.adapter import TransformersAdapter
from speckv.models.base import CausalModel
from speckv.models.llama import LlamaDecoder
from tests.decoding.grid import NEW_TOKENS, ONE_OF_EACH_MODE, POLICIES, PROMPTS, params
from tests.decoding.loops import acceptance, decode, plain
from tests.decoding.tiny import WINDOW, wrapped

MIXED_PAIRS = {  # target, draft: share of first draft tokens accepted
    ("llama", "llama-adapter:target"): (0.97, 1.0),
    ("llama", "llama-adapter:perturbed"): (0.25, 0.75),
    ("llama", "mistral-window:target"): (0.05, 0.5),
    ("llama", "gpt2:target"): (0.0, 0.15),
    ("llama-adapter", "llama:target"): (0.97, 1.0),
    ("mistral-window", "llama:target"): (0.05, 0.5),
    ("gpt2", "llama:target"): (0.0, 0.15),
}
"""``llama-adapter`` and ``mistral-window`` have the weights of ``llama``."""


@pytest.mark.parametrize("kind", ["perturbed", "target"])
@pytest.mark.parametrize("policy", POLICIES)
@pytest.mark.parametrize("family", ["mistral-window"])
def test_every_policy_with_a_window(check: Callable[..., None], policy: str, kind: str) -> None:
    check("fp32", policy, kind)


@pytest.mark.parametrize("kind", ["perturbed", "target"])
@pytest.mark.parametrize("policy", ONE_OF_EACH_MODE)
@pytest.mark.parametrize("family", ["gpt2"])
def test_every_mode_through_the_adapter(check: Callable[..., None], policy: str, kind: str) -> None:
    check("fp32", policy, kind)


@pytest.mark.parametrize("compression", ["fp16", "bf16", "int8", "nf4"])
@pytest.mark.parametrize("family", ["mistral-window", "gpt2"])
def test_every_compression(check: Callable[..., None], compression: str) -> None:
    check(compression, "fixed:4", "perturbed")


@pytest.mark.parametrize(("family", "kind"), MIXED_PAIRS)
def test_mixed_pairs(check: Callable[..., None], family: str, kind: str) -> None:
    check("fp32", "fixed:4", kind, MIXED_PAIRS[family, kind])


@pytest.mark.parametrize("policy", ONE_OF_EACH_MODE[1:])
def test_every_mode_with_an_adapter_s_draft(check: Callable[..., None], policy: str) -> None:
    kind = "llama-adapter:perturbed"
    check("fp32", policy, kind, MIXED_PAIRS["llama", kind])


def test_the_window_is_shorter_than_the_sequences_and_matters() -> None:
    windowed, whole = (
        plain(wrapped(family, "target", "fp32"), PROMPTS, params("greedy"))
        for family in ("mistral-window", "llama")
    )
    for prompt, count, short, long in zip(PROMPTS, NEW_TOKENS, windowed, whole, strict=True):
        assert len(prompt) + count > WINDOW
        same = max(WINDOW - len(prompt) + 1, 0)
        assert short[:same] == long[:same], "nothing has left the window yet"
        assert short != long


@pytest.mark.parametrize(
    ("family", "runs_in"),
    [
        ("llama", LlamaDecoder),
        ("mistral-window", LlamaDecoder),
        ("gpt2", TransformersAdapter),
        ("llama-adapter", TransformersAdapter),
    ],
)
def test_each_family_runs_where_it_is_meant_to(
    target: Callable[[str], CausalModel], runs_in: type
) -> None:
    assert isinstance(target("fp32"), runs_in)


@pytest.mark.parametrize("family", ["mistral-window", "gpt2"])
def test_drafts_are_wrong_sometimes(
    target: Callable[[str], CausalModel], draft: Callable[[str, str], CausalModel]
) -> None:
    """The perturbed draft of these families has steps that are accepted whole, in part, never."""
    rows = decode(target("fp32"), draft("perturbed", "fp32"), "fixed:4", PROMPTS, params("sampled"))
    steps = [accepted for row in rows for gamma, accepted in row.steps if gamma == 4]
    assert 0 in steps and 4 in steps and {1, 2, 3} & set(steps)
    assert 0.25 < acceptance(rows) < 0.75
