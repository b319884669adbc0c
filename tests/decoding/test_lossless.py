"""Speculative output is token-identical to plain decoding, for every policy and every draft.

Greedy fp32 output is that of ``transformers``' generate too. Each comparison is of a batch with
unequal prompts, limits and ends, decoded together, against its rows decoded alone without a draft.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import cache
from typing import Any

import pytest

from speckv.kernels import layout as at
from speckv.models.base import CausalModel
from speckv.sampling import SamplingParams
from tests.decoding.loops import acceptance, decode, hugging_face, plain

PROMPTS = [
    [5, 9, 3],
    [7, 1, 2, 3, 4, 5, 6, 7, 8],
    [11],
    [(i * i + 3 * i) % 199 for i in range(17)],
]
NEW_TOKENS = [24, 17, 30, 11]
EOS = [90, 91]  # end some rows of every sampling below, and not the others

POLICIES = ["fixed:1", "fixed:4", "fixed:15", "entropy:1.5", "confidence:0.6", "paper", "speckv"]
DRAFTS = ["random", "perturbed", "target"]
ACCEPTANCE = {"random": (0.0, 0.15), "perturbed": (0.25, 0.75), "target": (1.0, 1.0)}

GREEDY = [{"temperature": 0.0}] * 4
SAMPLED = [{"temperature": t} for t in (0.7, 1.2, 0.7, 1.2)]
TRUNCATED = [
    {"temperature": 0.7, "top_k": 8},
    {"temperature": 1.2, "top_p": 0.8},
    {"temperature": 1.2, "top_k": 20, "top_p": 0.9},
    {"temperature": 0.7, "top_p": 0.95},
]
MIXED = [GREEDY[0], TRUNCATED[1], GREEDY[2], SAMPLED[3]]
SAMPLINGS: dict[str, list[dict[str, Any]]] = {
    "greedy": GREEDY,
    "sampled": SAMPLED,
    "truncated": TRUNCATED,
    "mixed": MIXED,
}

Plain = Callable[[str, str], list[list[int]]]


def params(sampling: str) -> list[SamplingParams]:
    """The four rows' parameters, each with its own seed."""
    return [
        SamplingParams(max_new_tokens=count, seed=100 + i, **row)
        for i, (count, row) in enumerate(zip(NEW_TOKENS, SAMPLINGS[sampling], strict=True))
    ]


@pytest.fixture(scope="module")
def expected(target: Callable[[str], CausalModel]) -> Plain:
    """Plain decoding by compression and sampling."""

    @cache
    def tokens(compression: str, sampling: str) -> list[list[int]]:
        return plain(target(compression), PROMPTS, params(sampling), eos=EOS)

    return tokens


@pytest.fixture
def check(
    target: Callable[[str], CausalModel],
    draft: Callable[[str, str], CausalModel],
    expected: Plain,
    lossless: Callable[..., None],
) -> Callable[[str, str, str], None]:
    """Decode every sampling, all rows at once and the first ones alone, and compare."""

    def run(compression: str, policy: str, kind: str) -> None:
        pair = target(compression), draft(kind, compression)
        for sampling in SAMPLINGS:
            whole = params(sampling)
            tokens = expected(compression, sampling)
            together = decode(*pair, policy, PROMPTS, whole, eos=EOS)
            alone = [
                decode(*pair, policy, [PROMPTS[i]], [whole[i]], eos=EOS, first_request=i)[0]
                for i in (0, 2)
            ]
            for batch, rows, wanted in (
                ("4", together, tokens),
                ("1", alone, [tokens[0], tokens[2]]),
            ):
                lossless(
                    policy=policy,
                    compression=compression,
                    draft=kind,
                    sampling=sampling,
                    batch=batch,
                    model="tiny",
                    sequences=len(rows),
                    tokens=sum(map(len, wanted)),
                )
                assert [row.tokens for row in rows] == wanted
            for row, one in zip((together[0], together[2]), alone, strict=True):
                assert row.done == one.done
            if policy != "speckv":  # which drafts where it is sure of itself, if at all
                low, high = ACCEPTANCE[kind]
                assert low <= acceptance(together) <= high
    return run


@pytest.mark.parametrize("kind", DRAFTS)
@pytest.mark.parametrize("policy", POLICIES)
@pytest.mark.parametrize("compression", ["fp32", "bf16"])
def test_every_policy_and_draft(
    check: Callable[[str, str, str], None], compression: str, policy: str, kind: str
) -> None:
    check(compression, policy, kind)


@pytest.mark.parametrize("kind", DRAFTS)
@pytest.mark.parametrize(
    "policy",
    [
        pytest.param(p, marks=[] if p in ("fixed:4", "speckv") else pytest.mark.slow)
        for p in POLICIES
    ],
)
@pytest.mark.parametrize("compression", ["int8", "nf4"])
def test_every_policy_and_draft_compressed(
    check: Callable[[str, str, str], None], compression: str, policy: str, kind: str
) -> None:
    check(compression, policy, kind)


@pytest.mark.parametrize("sampling", SAMPLINGS)
@pytest.mark.parametrize("kind", DRAFTS)
@pytest.mark.parametrize("compression", ["fp32", "bf16", "int8", "nf4"])
def test_drafts_are_accepted_as_the_grid_claims(
    target: Callable[[str], CausalModel],
    draft: Callable[[str, str], CausalModel],
    compression: str,
    kind: str,
    sampling: str,
) -> None:
    pair = target(compression), draft(kind, compression)
    low, high = ACCEPTANCE[kind]
    rows = decode(*pair, "fixed:1", PROMPTS, params(sampling))
    assert sum(len(row.steps) for row in rows) > 30
    assert low <= acceptance(rows) <= high


@pytest.mark.parametrize("sampling", SAMPLINGS)
@pytest.mark.parametrize("compression", ["fp32", "bf16", "int8", "nf4"])
def test_plain_rows_do_not_depend_on_the_batch(
    target: Callable[[str], CausalModel],
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
        model="tiny",
        sequences=4,
        tokens=sum(map(len, tokens)),
    )
    rows = decode(target(compression), None, "fixed:0", PROMPTS, params(sampling), eos=EOS)
    assert [row.tokens for row in rows] == tokens
    assert all(gamma == 0 for row in rows for gamma, _ in row.steps)


def test_plain_greedy_is_transformers_generate(tiny: Any, expected: Plain) -> None:
    assert expected("fp32", "greedy") == hugging_face(tiny, PROMPTS, NEW_TOKENS, EOS)


@pytest.mark.parametrize("sampling", SAMPLINGS)
def test_the_grid_has_rows_of_both_ends(expected: Plain, sampling: str) -> None:
    """Rows that reach their limit, and rows that an end token cuts short after a few tokens."""
    tokens = expected("fp32", sampling)
    at_limit = [len(t) == n and t[-1] not in EOS for t, n in zip(tokens, NEW_TOKENS, strict=True)]
    stopped = [t[-1] in EOS and 3 < len(t) < n for t, n in zip(tokens, NEW_TOKENS, strict=True)]
    assert any(at_limit) and any(stopped)


def test_the_grid_s_samplings_differ(expected: Plain) -> None:
    outputs = [tuple(map(tuple, expected("fp32", sampling))) for sampling in SAMPLINGS]
    assert len(set(outputs)) == len(outputs)


def test_policies_that_choose_do_choose(
    target: Callable[[str], CausalModel], draft: Callable[[str, str], CausalModel]
) -> None:
    """Each policy that looks at signals takes steps of several γ on this grid."""
    for policy in POLICIES[3:]:
        rows = decode(
            target("fp32"), draft("perturbed", "fp32"), policy, PROMPTS, params("sampled")
        )
        gammas = {gamma for row in rows for gamma, _ in row.steps[:-1]}
        assert len(gammas) > 1, policy


def test_ends_are_told_apart(target: Callable[[str], CausalModel], expected: Plain) -> None:
    rows = decode(target("fp32"), None, "fixed:0", PROMPTS, params("greedy"), eos=EOS)
    for row, tokens in zip(rows, expected("fp32", "greedy"), strict=True):
        assert row.done == (at.DONE_STOP if tokens[-1] in EOS else at.DONE_LENGTH)
