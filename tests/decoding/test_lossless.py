"""Speculative output is token-identical to plain decoding, for every policy and every draft.

Greedy fp32 output is that of ``transformers``' generate too. Each comparison is of a batch with
unequal prompts, limits and ends, decoded together, against its rows decoded alone without a draft.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest

from speckv.kernels import layout as at
from speckv.models.base import CausalModel
from tests.decoding.grid import (
    ACCEPTANCE,
    COMPRESSIONS,
    DRAFTS,
    DTYPES,
    EOS,
    NEW_TOKENS,
    POLICIES,
    PROMPTS,
    SAMPLINGS,
    params,
)
from tests.decoding.loops import acceptance, decode, hugging_face
from tests.decoding.tiny import FAMILIES

Models = Callable[[str], CausalModel]
Drafts = Callable[[str, str], CausalModel]
Plain = Callable[[str, str], list[list[int]]]


@pytest.mark.parametrize("kind", DRAFTS)
@pytest.mark.parametrize("policy", POLICIES)
@pytest.mark.parametrize("compression", COMPRESSIONS)
def test_every_policy_and_draft(
    check: Callable[..., None], compression: str, policy: str, kind: str
) -> None:
    check(compression, policy, kind)


@pytest.mark.parametrize("policy", ["fixed:4", "speckv"])
@pytest.mark.parametrize(
    "compression", [f"{packed}/{dtype}" for packed in ("int8", "nf4") for dtype in DTYPES]
)
def test_packed_weights_with_every_type_of_activations(
    check: Callable[..., None], compression: str, policy: str
) -> None:
    check(compression, policy, "perturbed")


@pytest.mark.parametrize("sampling", SAMPLINGS)
@pytest.mark.parametrize("kind", DRAFTS)
@pytest.mark.parametrize("compression", COMPRESSIONS)
def test_drafts_are_accepted_as_the_grid_claims(
    target: Models, draft: Drafts, compression: str, kind: str, sampling: str
) -> None:
    pair = target(compression), draft(kind, compression)
    low, high = ACCEPTANCE[kind]
    rows = decode(*pair, "fixed:1", PROMPTS, params(sampling))
    assert sum(len(row.steps) for row in rows) > 30
    assert low <= acceptance(rows) <= high


@pytest.mark.parametrize("sampling", SAMPLINGS)
@pytest.mark.parametrize(
    ("family", "compression"),
    [("llama", compression) for compression in COMPRESSIONS]
    + [(family, "fp32") for family in FAMILIES if family != "llama"],
)
def test_plain_rows_do_not_depend_on_the_batch(
    family: str,
    target: Models,
    expected: Plain,
    lossless: Callable[..., None],
    compression: str,
    sampling: str,
) -> None:
    tokens = expected(compression, sampling)
    lossless(
        policy="fixed:0",
        compression=compression,
        draft="none",
        sampling=sampling,
        batch="4",
        model=f"tiny {family}",
        sequences=4,
        tokens=sum(map(len, tokens)),
    )
    rows = decode(target(compression), None, "fixed:0", PROMPTS, params(sampling), eos=EOS)
    assert [row.tokens for row in rows] == tokens
    assert all(gamma == 0 for row in rows for gamma, _ in row.steps)


@pytest.mark.parametrize("family", FAMILIES)
def test_plain_greedy_is_transformers_generate(
    family: str, tiny: Any, expected: Plain, lossless: Callable[..., None]
) -> None:
    wanted = hugging_face(tiny, PROMPTS, NEW_TOKENS, EOS)
    lossless(
        policy="fixed:0",
        compression="fp32",
        draft="none",
        sampling="greedy",
        batch="1",
        model=f"tiny {family}",
        against="transformers",
        sequences=4,
        tokens=sum(map(len, wanted)),
    )
    assert expected("fp32", "greedy") == wanted


@pytest.mark.parametrize("sampling", SAMPLINGS)
@pytest.mark.parametrize("family", FAMILIES)
def test_the_grid_has_rows_of_both_ends(expected: Plain, sampling: str) -> None:
    """Rows that reach their limit, and rows that an end token cuts short after a few tokens."""
    tokens = expected("fp32", sampling)
    at_limit = [len(t) == n and t[-1] not in EOS for t, n in zip(tokens, NEW_TOKENS, strict=True)]
    stopped = [t[-1] in EOS and 3 < len(t) < n for t, n in zip(tokens, NEW_TOKENS, strict=True)]
    assert any(at_limit) and any(stopped)


def test_the_grid_s_samplings_differ(expected: Plain) -> None:
    outputs = [tuple(map(tuple, expected("fp32", sampling))) for sampling in SAMPLINGS]
    assert len(set(outputs)) == len(outputs)


def test_policies_that_choose_do_choose(target: Models, draft: Drafts) -> None:
    """Each policy that looks at signals takes steps of several γ on this grid."""
    for policy in POLICIES[3:]:
        rows = decode(
            target("fp32"), draft("perturbed", "fp32"), policy, PROMPTS, params("sampled")
        )
        gammas = {gamma for row in rows for gamma, _ in row.steps[:-1]}
        assert len(gammas) > 1, policy


def test_ends_are_told_apart(target: Models, expected: Plain) -> None:
    rows = decode(target("fp32"), None, "fixed:0", PROMPTS, params("greedy"), eos=EOS)
    for row, tokens in zip(rows, expected("fp32", "greedy"), strict=True):
        assert row.done == (at.DONE_STOP if tokens[-1] in EOS else at.DONE_LENGTH)
