"""The draft's cache holds what was committed, whatever happened before; and how rows end.

With the draft equal to the target, one stale or missing entry would make it propose something else:
acceptance must be exactly 1, step by step. (With another draft an incoherent cache costs acceptance
only, and no comparison of tokens would notice.)
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import replace
from functools import cache

import pytest

from speckv.kernels import layout as at
from speckv.models.base import CausalModel
from speckv.sampling import SamplingParams
from tests.decoding.loops import Decoded, acceptance, decode, hugging_face, plain, scripted

PROMPTS = [[5, 9, 3], [7, 1, 2, 3, 4, 5, 6, 7, 8], [11], [2, 4] * 12]
GREEDY = SamplingParams(max_new_tokens=150)
SAMPLED = SamplingParams(max_new_tokens=150, temperature=1.2, seed=3)
TRUNCATED = SamplingParams(max_new_tokens=150, temperature=1.2, top_k=30, top_p=0.9, seed=3)
SCRIPTS = {
    "full-then-plain": [15, 0],
    "plain-runs-longer-than-a-block": [0] * 17 + [15],
    "plain-runs-of-a-block": [0] * 16 + [3],
    "plain-runs-of-several-blocks": [0] * 40 + [4],
    "ragged": [1, 0, 15, 2, 0, 0, 7, 15, 15, 0, 3],
}

FULL, PARTIAL, NONE = "full", "partial", "none"
"""What became of a step's draft tokens: all were accepted, not all, or γ was 0."""

Models = Callable[[str], CausalModel]
Drafts = Callable[[str, str], CausalModel]


def longest_plain_run(row: Decoded) -> int:
    """Most steps with γ=0 in a row that a step with γ>0 followed."""
    longest = run = 0
    for gamma, _ in row.steps:
        longest, run = (max(longest, run), 0) if gamma else (longest, run + 1)
    return longest


def count_runs(rows: Iterable[Decoded], *wanted: str) -> int:
    """How often steps of these kinds follow one another."""
    kinds = [
        [
            NONE if not gamma else FULL if accepted == gamma else PARTIAL
            for gamma, accepted in row.steps
        ]
        for row in rows
    ]
    return sum(tuple(row[i : i + len(wanted)]) == wanted for row in kinds for i in range(len(row)))


@cache
def plain_rows(model: CausalModel, params: SamplingParams) -> list[list[int]]:
    """Plain decoding of every prompt; the scripts share it."""
    return plain(model, PROMPTS, [params] * 4)


def assert_always_right(model: CausalModel, params: SamplingParams, script: Sequence[int]) -> None:
    """As its own draft, the model is accepted whole, whatever γ it drafted before."""
    with scripted(script):
        rows = decode(model, model, "fixed:15", PROMPTS, [params] * 4)
        alone = decode(model, model, "fixed:15", [PROMPTS[3]], [params], first_request=3)
    assert all(accepted == gamma for row in [*rows, *alone] for gamma, accepted in row.steps)
    assert [row.tokens for row in rows] == plain_rows(model, params)
    assert alone[0] == rows[3]
    for row in [*rows, *alone]:
        gammas = {gamma for gamma, _ in row.steps}
        assert {0, max(script)} <= gammas
        assert longest_plain_run(row) >= min(script.count(0), 16) or len(script) == 11
        assert count_runs([row], FULL, NONE), "full acceptance followed by γ=0"
        assert count_runs([row], NONE, FULL), "and drafting again"


@pytest.mark.parametrize("compression", ["fp32", "bf16"])
@pytest.mark.parametrize("params", [GREEDY, SAMPLED, TRUNCATED], ids=["greedy", "t1.2", "top"])
@pytest.mark.parametrize("script", SCRIPTS.values(), ids=SCRIPTS)
def test_a_draft_that_is_the_target_is_always_right(
    target: Models, compression: str, params: SamplingParams, script: list[int]
) -> None:
    assert_always_right(target(compression), params, script)


@pytest.mark.parametrize("params", [GREEDY, TRUNCATED], ids=["greedy", "top"])
@pytest.mark.parametrize("script", ["full-then-plain", "plain-runs-longer-than-a-block"])
@pytest.mark.parametrize("family", ["mistral-window", "gpt2"])
def test_so_is_one_with_a_window_or_in_the_adapter(
    target: Models, params: SamplingParams, script: str
) -> None:
    assert_always_right(target("fp32"), replace(params, max_new_tokens=70), SCRIPTS[script])


@pytest.mark.parametrize(
    ("family", "kind"), [("llama", "llama-adapter:target"), ("llama-adapter", "llama:target")]
)
def test_so_is_the_same_model_where_one_side_is_in_the_adapter(
    target: Models, draft: Drafts, kind: str
) -> None:
    """The same weights; their logits differ by rounding, which greedy tokens here survive."""
    model, short = target("fp32"), replace(GREEDY, max_new_tokens=70)
    with scripted(SCRIPTS["full-then-plain"]):
        rows = decode(model, draft(kind, "fp32"), "fixed:15", PROMPTS, [short] * 4)
    assert all(accepted == gamma for row in rows for gamma, accepted in row.steps)
    assert [row.tokens for row in rows] == plain_rows(model, short)
    assert count_runs(rows, FULL, NONE, FULL) > 4


@pytest.mark.parametrize("kind", ["random", "perturbed"])
@pytest.mark.parametrize("params", [GREEDY, SAMPLED], ids=["greedy", "sampled"])
@pytest.mark.parametrize("script", SCRIPTS.values(), ids=SCRIPTS)
def test_lossless_through_plain_runs(
    target: Models, draft: Drafts, kind: str, params: SamplingParams, script: list[int]
) -> None:
    model, short = target("fp32"), replace(params, max_new_tokens=70)
    with scripted(script):
        rows = decode(model, draft(kind, "fp32"), "fixed:15", PROMPTS, [short] * 4)
    assert [row.tokens for row in rows] == plain_rows(model, short)


@pytest.mark.parametrize("family", ["llama", "mistral-window", "gpt2"])
def test_full_acceptance_then_plain_then_drafting_again(target: Models, draft: Drafts) -> None:
    """The transitions that the scripts are for do occur, with a draft that is sometimes wrong."""
    model, params = target("fp32"), replace(GREEDY, max_new_tokens=100)
    with scripted([2, 0, 1, 0, 0, 4]):
        rows = decode(model, draft("perturbed", "fp32"), "fixed:15", PROMPTS, [params] * 4)
    assert [row.tokens for row in rows] == plain_rows(model, params)
    assert count_runs(rows, FULL, NONE) > 5 and count_runs(rows, PARTIAL, NONE) > 5
    assert count_runs(rows, NONE, FULL) > 5 and count_runs(rows, FULL, NONE, FULL) > 0


@pytest.mark.parametrize("coupling", ["gumbel", "rejection"])
@pytest.mark.parametrize("policy", ["fixed:0", "fixed:4", "paper", "speckv"])
def test_a_single_token_takes_no_step(target: Models, policy: str, coupling: str) -> None:
    model = target("fp32")
    params = [
        SamplingParams(max_new_tokens=count, temperature=t, seed=i, coupling=coupling)
        for i, (count, t) in enumerate([(1, 0.0), (1, 0.9), (2, 0.0), (9, 0.9)])
    ]
    rows = decode(model, model, policy, PROMPTS, params)
    assert [len(row.tokens) for row in rows] == [1, 1, 2, 9]
    assert [len(row.steps) for row in rows[:3]] == [0, 0, 1]
    assert rows[2].steps == [(0, 0)], "there is no room for a draft token beside the target's own"
    assert all(row.done == at.DONE_LENGTH for row in rows)


@pytest.mark.parametrize("params", [GREEDY, SAMPLED], ids=["greedy", "sampled"])
def test_an_end_inside_an_accepted_run_ends_the_row_there(
    target: Models, params: SamplingParams
) -> None:
    model = target("fp32")
    free = plain(model, PROMPTS, [params] * 4)
    for end in {tokens[20] for tokens in free}:
        rows = decode(model, model, "fixed:15", PROMPTS, [params] * 4, eos=[end])
        for row, tokens in zip(rows, free, strict=True):
            length = tokens.index(end) + 1 if end in tokens else len(tokens)
            assert row.tokens == tokens[:length]
            assert row.done == (at.DONE_STOP if end in tokens else at.DONE_LENGTH)
            if end in tokens and length > 1 and (length - 1) % 16:
                gamma, accepted = row.steps[-1]
                assert gamma == 15 and accepted == (length - 1) % 16, "all it keeps was drafted"


def test_the_first_token_may_end_a_row(target: Models) -> None:
    model = target("fp32")
    first = [tokens[0] for tokens in plain(model, PROMPTS, [GREEDY] * 4)]
    rows = decode(model, model, "fixed:4", PROMPTS, [GREEDY] * 4, eos=first[:2])
    assert [row.tokens for row in rows[:2]] == [[first[0]], [first[1]]]
    assert all(not row.steps and row.done == at.DONE_STOP for row in rows[:2])


MIXED = [
    SamplingParams(max_new_tokens=40, coupling="rejection"),
    SamplingParams(max_new_tokens=25, temperature=0.7, seed=1, coupling="rejection"),
    SamplingParams(max_new_tokens=33, coupling="rejection"),
    SamplingParams(
        max_new_tokens=40, temperature=1.2, top_k=20, top_p=0.9, seed=2, coupling="rejection"
    ),
]


@pytest.mark.parametrize("kind", ["random", "perturbed", "target"])
@pytest.mark.parametrize("policy", ["fixed:1", "fixed:15", "confidence:0.6", "speckv"])
def test_rejection_sampling_leaves_greedy_rows_alone(
    tiny: object, target: Models, draft: Drafts, policy: str, kind: str
) -> None:
    model, other = target("fp32"), draft(kind, "fp32")
    rows = decode(model, other, policy, PROMPTS, MIXED, eos=[91])
    again = decode(model, other, policy, PROMPTS, MIXED, eos=[91])
    assert rows == again, "the same seed gives the same tokens"
    wanted = hugging_face(tiny, PROMPTS, [q.max_new_tokens for q in MIXED], [91])
    assert [rows[i].tokens for i in (0, 2)] == [wanted[i] for i in (0, 2)]
    for row, params in zip(rows, MIXED, strict=True):
        assert len(row.tokens) <= params.max_new_tokens
        assert 91 not in row.tokens[:-1]
        stopped = row.tokens[-1] == 91
        assert row.done == (at.DONE_STOP if stopped else at.DONE_LENGTH)
        assert stopped or len(row.tokens) == params.max_new_tokens
    if kind == "target":
        steps = [step for row in rows for step in row.steps[:-1]]
        assert all(accepted == gamma for gamma, accepted in steps), "p / q is 1"


def test_rejection_sampling_does_reject(target: Models, draft: Drafts) -> None:
    params = [SamplingParams(max_new_tokens=150, temperature=0.8, seed=4, coupling="rejection")]
    rows = decode(target("fp32"), draft("perturbed", "fp32"), "fixed:2", PROMPTS, params * 4)
    assert 0.3 < acceptance(rows) < 0.85
