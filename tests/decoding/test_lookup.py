"""Prompt lookup: what it finds, how sure it is of it, and that it changes no token."""

from __future__ import annotations

import itertools
import math
import random
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Any
from unittest.mock import patch

import pytest
import torch

from speckv import Engine, SamplingParams
from speckv.decoding import EagerLoop, RequestBatch, calibrate, eager
from speckv.decoding.lookup import Lookup, Lookups, Match, NgramIndex, parse_draft
from speckv.errors import NumericsError
from speckv.kernels import layout as at
from speckv.models.base import CausalModel
from speckv.policies import parse_policy
from tests.decoding.grid import EOS, SAMPLINGS
from tests.decoding.grid import params as sampling_params
from tests.decoding.loops import COST, Decoded, decode, decode_with, plain, scripted
from tests.tabular import TabularModel, random_table

POLICIES = ["fixed:1", "fixed:4", "fixed:15", "entropy:1.2", "confidence:0.5", "paper", "speckv"]
PROMPTS = [
    [5, 9, 3, 7, 5, 9, 3, 7, 5, 9],
    [7, 1, 2, 3, 4, 5, 6, 7, 8] * 3,
    [11],
    [(i * i + 3 * i) % 199 for i in range(17)],
]
LONG = SamplingParams(max_new_tokens=100)
CIRCLING = TabularModel(random_table(8, 8, seed=5, phases=1))
"""Greedy, it goes round in a circle: the last two of its eight tokens are all it knows."""
EIGHTHS = [[token % 8 for token in prompt] for prompt in PROMPTS]

Models = Callable[[str], CausalModel]
Drafts = Callable[[str, str], CausalModel]


def oracle(sequence: Sequence[int], drafted: Sequence[int], lookup: Lookup) -> Match | None:
    """By going through the whole sequence."""
    text = [*sequence, *drafted]
    for n in range(min(lookup.max_ngram, len(text)), lookup.min_ngram - 1, -1):
        places = [
            i for i in range(n, len(sequence)) if list(sequence[i - n : i]) == text[len(text) - n :]
        ]
        if not places:
            continue
        counts = Counter(sequence[i] for i in places)
        most = max(counts.values())
        token = next(sequence[i] for i in reversed(places) if counts[sequence[i]] == most)
        shares = [count / (len(places) + 2 / n) for count in counts.values()]
        shares.sort(reverse=True)
        entropy = -sum(p * math.log2(p) for p in [*shares, 1 - sum(shares)])
        margin = shares[0] - (shares[1] if len(shares) > 1 else 0.0)
        return Match(token, n, len(places), most, (entropy, shares[0], margin, shares[0]))
    return None


def assert_same_match(found: Match | None, expected: Match | None) -> None:
    if found is None or expected is None:
        assert found is expected
        return
    assert found[:4] == expected[:4]
    assert found.signals == pytest.approx(expected.signals, abs=1e-12)


@pytest.mark.parametrize("ngrams", [(1, 1), (2, 1), (3, 2), (3, 3), (5, 1)], ids=str)
@pytest.mark.parametrize("vocab", [2, 3, 12])
def test_the_index_finds_what_a_scan_finds(vocab: int, ngrams: tuple[int, int]) -> None:
    lookup = Lookup(*ngrams)
    rng = random.Random(vocab)
    for _ in range(20):
        sequence = [rng.randrange(vocab) for _ in range(rng.randrange(1, 60))]
        index, length = NgramIndex(lookup), 0
        while length < len(sequence):  # a block at a time, as steps commit
            block = sequence[length : length + rng.randrange(1, 9)]
            index.extend(block)
            length += len(block)
            drafted = [rng.randrange(vocab) for _ in range(rng.randrange(4))]
            assert_same_match(index.find(drafted), oracle(sequence[:length], drafted, lookup))


def test_a_proposal_goes_on_from_what_it_proposed() -> None:
    index = NgramIndex(Lookup(3, 2), [1, 2, 3, 4, 5, 6, 1, 2])
    assert [match.token for match in index.propose(15)] == [
        3,
        4,
        5,
        6,
        1,
        2,
        3,
        4,
        5,
        6,
        1,
        2,
        3,
        4,
        5,
    ]
    assert [match.length for match in index.propose(3)] == [2, 3, 3]
    assert [match.token for match in index.propose(2)] == [3, 4]
    assert index.propose(15, at_least=3) == []
    index.extend([3])
    assert [match.token for match in index.propose(2, at_least=3)] == [4, 5]


def test_nothing_is_found_in_a_text_without_repetition() -> None:
    assert NgramIndex(Lookup(), range(50)).propose(15) == []
    assert NgramIndex(Lookup(3, 2), [7, 8, 7]).find() is None
    assert NgramIndex(Lookup(3, 1), [7, 8, 7]).find() is not None


def test_among_equals_the_latest_wins_and_more_often_beats_later() -> None:
    assert NgramIndex(Lookup(1, 1), [1, 2, 1, 3, 1]).propose(1)[0].token == 3
    found = NgramIndex(Lookup(1, 1), [1, 2, 1, 2, 1, 3, 1]).propose(1)[0]
    assert (found.token, found.occurrences, found.agreeing) == (2, 3, 2)


def test_signals_worked_by_hand() -> None:
    """One occurrence of three tokens: p = 1 / (1 + 2/3); of one token, twice 2 and once 3."""
    once = NgramIndex(Lookup(3, 2), [1, 2, 3, 4, 1, 2, 3]).find()
    assert once is not None and once[:4] == (4, 3, 1, 1)
    assert once.signals == pytest.approx((0.9709506, 0.6, 0.6, 0.6))
    thrice = NgramIndex(Lookup(1, 1), [1, 2, 1, 2, 1, 3, 1]).find()
    assert thrice is not None
    # 2, 1 and the 2 of what has not followed, of 5: 0.4, 0.2, 0.4
    assert thrice.signals == pytest.approx((1.5219281, 0.4, 0.2, 0.4))


@pytest.mark.parametrize(
    ("draft", "lookup", "model"),
    [
        (None, None, None),
        ("first:4", None, "first:4"),
        ("./lookup", None, "./lookup"),
        ("lookups", None, "lookups"),
        ("lookup", Lookup(3, 2), "none"),
        ("lookup:5", Lookup(5, 2), "none"),
        ("lookup:1", Lookup(1, 1), "none"),
        ("lookup+first:4", Lookup(3, 2), "first:4"),
        ("lookup:4+some/model+x", Lookup(4, 2), "some/model+x"),
    ],
)
def test_names(draft: str | None, lookup: Lookup | None, model: str | None) -> None:
    assert parse_draft(draft) == (lookup, model)


@pytest.mark.parametrize("draft", ["lookup:", "lookup:0", "lookup:16", "lookup:x", "lookup:-1",
                                   "lookup:1.5", "lookup+", "lookup:3+", "lookup:+x",
                                   "lookup+lookup", "lookup:2+lookup:3+first:4"])  # fmt: skip
def test_bad_names_are_refused(draft: str) -> None:
    with pytest.raises(ValueError, match=r"^draft: expected .*, got 'lookup") as caught:
        parse_draft(draft)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("ngrams", [(0, 0), (2, 3), (16, 1), (3, 0)], ids=str)
def test_bad_settings_are_refused(ngrams: tuple[int, int]) -> None:
    with pytest.raises(ValueError, match="lookup: expected 1 <= min_ngram <= max_ngram <= 15"):
        Lookup(*ngrams)


def accepted(rows: Sequence[Decoded]) -> int:
    return sum(count for row in rows for _, count in row.steps)


@pytest.mark.parametrize("policy", POLICIES)
def test_tokens_are_those_of_plain_decoding(
    target: Models, policy: str, lossless: Callable[..., None]
) -> None:
    model, lookup = target("fp32"), Lookup(3, 1)
    for sampling in SAMPLINGS:
        whole = sampling_params(sampling)
        expected = plain(model, PROMPTS, whole, eos=EOS)
        rows = decode(model, None, policy, PROMPTS, whole, eos=EOS, lookup=lookup)
        alone = [
            decode(model, None, policy, [p], [q], eos=EOS, first_request=i, lookup=lookup)[0]
            for i, (p, q) in enumerate(zip(PROMPTS, whole, strict=True))
        ]
        for batch, some in (("4", rows), ("1", alone)):
            lossless(
                policy=policy,
                compression="fp32",
                draft="lookup",
                sampling=sampling,
                batch=batch,
                model="tiny llama",
                sequences=4,
                tokens=sum(map(len, expected)),
            )
            assert [row.tokens for row in some] == expected
        assert rows == alone, "steps too: a row's index is its own"
        assert len({len(row.tokens) for row in rows}) > 1
        assert any(gamma for row in rows for gamma, _ in row.steps)


@pytest.mark.parametrize("compression", ["fp16", "bf16", "int8", "nf4"])
def test_so_they_are_in_every_compression(target: Models, compression: str) -> None:
    model, whole = target(compression), sampling_params("mixed")
    rows = decode(model, None, "fixed:4", PROMPTS, whole, eos=EOS, lookup=Lookup(3, 1))
    assert [row.tokens for row in rows] == plain(model, PROMPTS, whole, eos=EOS)


@pytest.mark.parametrize("policy", POLICIES)
def test_repetition_is_accepted(policy: str) -> None:
    rows = decode(CIRCLING, None, policy, EIGHTHS, [LONG] * 4, lookup=Lookup())
    assert [row.tokens for row in rows] == plain(CIRCLING, EIGHTHS, [LONG] * 4)
    assert accepted(rows) > 0.3 * sum(len(row.tokens) for row in rows)


def test_without_a_match_the_step_is_plain() -> None:
    """A model that counts: it says nothing twice before it begins again."""
    table = torch.full((1, 20, 20, 20), -1.0)
    for token in range(20):
        table[:, :, token, (token + 1) % 20] = 9.0
    params = SamplingParams(max_new_tokens=41)
    (row,) = decode(TabularModel(table), None, "fixed:4", [[0]], [params], lookup=Lookup(3, 2))
    assert row.tokens == [(i + 1) % 20 for i in range(41)]
    # 0 to 19, then 0 and 1: two tokens that stood there before, and from then on all is known
    assert row.steps == [(0, 0)] * 20 + [(4, 4)] * 4


@pytest.mark.parametrize(
    ("policy", "sure"),
    [
        ("confidence:0.45", lambda signals: signals[at.CONFIDENCE] >= 0.45),
        ("entropy:1.4", lambda signals: signals[at.ENTROPY] <= 1.4),
    ],
)
def test_thresholds_stop_after_the_first_unsure_match(
    policy: str, sure: Callable[[Sequence[float]], bool]
) -> None:
    params = SamplingParams(max_new_tokens=100, temperature=0.7, seed=1)
    with patch.object(eager, "draft_matches", wraps=eager.draft_matches) as drafted:
        (row,) = decode(CIRCLING, None, policy, EIGHTHS[:1], [params], lookup=Lookup())
    gammas, cuts = [gamma for gamma, _ in row.steps if gamma], []
    for call in drafted.call_args_list:
        each = [sure(match.signals) for match in call.args[0][0]]
        cuts.append(each.index(False) + 1 if False in each else len(each))
    assert gammas[:25] == cuts[:25], "the length limit cuts none of them"
    assert len(set(cuts[:25])) > 2


class Spy:
    """Tells which (row, step) were drafted by lookup."""

    def __init__(self) -> None:
        self.steps: set[tuple[int, int]] = set()

    def __call__(self, matches: dict[int, list[Match]], state: at.StepState, *rest: object) -> None:
        self.steps |= {(b, int(state.rows[b, at.STEP]) - 1) for b in matches}
        _draft_matches(matches, state, *rest)


_draft_matches = eager.draft_matches


@pytest.mark.parametrize("params", [LONG, replace(LONG, temperature=0.5, seed=3)],
                         ids=["greedy", "sampled"])  # fmt: skip
@pytest.mark.parametrize("script", [[4], [15, 0], [1, 0, 15, 2, 0, 0, 7, 15, 15, 0, 3]], ids=str)
def test_the_model_s_cache_keeps_up_with_the_lookup(
    target: Models, params: SamplingParams, script: list[int]
) -> None:
    """The draft is the target: what the lookup leaves to it must be accepted, every time."""
    model, spy = target("fp32"), Spy()
    with scripted(script), patch.object(eager, "draft_matches", spy):
        rows = decode(model, model, "fixed:15", PROMPTS, [params] * 4, lookup=Lookup(1, 1))
    assert [row.tokens for row in rows] == plain(model, PROMPTS, [params] * 4)
    by_model = [
        (any((b, k) in spy.steps for k in range(i)), gamma, kept)
        for b, row in enumerate(rows)
        for i, (gamma, kept) in enumerate(row.steps)
        if gamma and (b, i) not in spy.steps
    ]
    assert all(gamma == kept for _, gamma, kept in by_model)
    assert spy.steps and any(after_lookup for after_lookup, _, _ in by_model)


@pytest.mark.parametrize("policy", POLICIES)
@pytest.mark.parametrize("kind", ["perturbed", "random"])
def test_both_together_change_no_token(
    target: Models, draft: Drafts, policy: str, kind: str
) -> None:
    model, spy = target("fp32"), Spy()
    for sampling in ("greedy", "mixed"):
        whole = [replace(p, max_new_tokens=50) for p in sampling_params(sampling)]
        with patch.object(eager, "draft_matches", spy):
            rows = decode(model, draft(kind, "fp32"), policy, PROMPTS, whole, lookup=Lookup(2, 1))
        assert [row.tokens for row in rows] == plain(model, PROMPTS, whole)
    assert spy.steps or policy == "speckv", "which gives a poor draft up"


def requests(prompts: Sequence[Sequence[int]], count: int = 40) -> RequestBatch:
    params = [SamplingParams(max_new_tokens=count)] * len(prompts)
    return RequestBatch.build(
        prompts, params, eos_ids=[], max_length=128, device=torch.device("cpu")
    )


def test_reading_the_prompts_counts_as_drafting(monkeypatch: pytest.MonkeyPatch) -> None:
    """It happens before the first step."""
    now = 0.0

    def slow(*arguments: Any, **options: Any) -> Lookups:
        nonlocal now
        now += 5.0
        return Lookups(*arguments, **options)

    monkeypatch.setattr(eager, "Lookups", slow)
    monkeypatch.setattr(eager.time, "perf_counter", lambda: now)
    loop = EagerLoop(CIRCLING, None, batch=4, capacity=128, lookup=Lookup())
    for policy, seconds in (("fixed:4", 5.0), ("fixed:0", 0.0)):
        decode_with(loop, requests(EIGHTHS), parse_policy(policy).pack())
        assert loop.seconds == eager.Seconds(draft=seconds)


@pytest.mark.parametrize("end", ["finished", "abandoned", "stopped", "failed"])
def test_no_request_sees_an_earlier_one(end: str) -> None:
    policy = parse_policy("fixed:4").pack()
    used, fresh = (EagerLoop(CIRCLING, None, batch=4, capacity=128, lookup=Lookup()) for _ in "ab")
    first = used.run(requests(EIGHTHS[::-1]), policy)
    for step, records in enumerate(first):
        if end == "abandoned" and step == 5:
            first.close()
            break
        if end == "stopped" and step == 2:
            for record in records:
                used.finish(record.row)
        if end == "failed" and step == 3:
            used._state.rows[1, at.ERROR] = at.ERROR_TARGET
            with pytest.raises(NumericsError):
                next(first)
            break
    again = decode_with(used, requests(EIGHTHS), policy)
    assert again == decode_with(fresh, requests(EIGHTHS), policy)
    assert accepted(again) > 0


class Digits:
    """A tokenizer with one token a number."""

    eos_token_id = None

    def encode(self, text: str) -> list[int]:
        return [int(word) for word in text.split()]

    def decode(self, token_ids: list[int], *, skip_special_tokens: bool = False) -> str:
        return " ".join(map(str, token_ids))


@pytest.fixture
def circling(monkeypatch: pytest.MonkeyPatch) -> TabularModel:
    monkeypatch.setattr(CIRCLING, "eos_ids", (), raising=False)
    return CIRCLING


def test_an_engine_needs_no_model_to_draft(circling: TabularModel) -> None:
    engine = Engine(circling, Digits(), policy="fixed:4", lookup=Lookup(), cost=COST)
    assert "draft lookup:3, policy fixed:4" in engine.describe()
    engine.warmup(length=64)
    prompts = [" ".join(map(str, p)) for p in EIGHTHS]
    for policy in ("fixed:4", "speckv"):
        results = engine.generate(prompts, LONG, policy=policy)
        expected = engine.generate(prompts, LONG, policy="fixed:0")
        assert [r.token_ids for r in results] == [r.token_ids for r in expected]
        assert max(r.stats.acceptance_rate for r in results) > 0
    with pytest.raises(ValueError, match="no draft"):
        Engine(circling, Digits(), policy="fixed:4")


def test_an_engine_names_both_drafts(target: Models, draft: Drafts) -> None:
    model = draft("perturbed", "fp32")
    engine = Engine(target("fp32"), Digits(), model, policy="fixed:4", lookup=Lookup(4))
    assert f"draft lookup:4+{model.name}, " in engine.describe()


def test_costs_without_a_model_are_those_of_looking_up(target: Models) -> None:
    """By a clock that goes on by a millisecond between readings, of which a step takes two."""
    ticks = itertools.count()
    with patch.object(calibrate, "perf_counter", lambda: next(ticks) * 1e-3):
        table = calibrate.measure(target("fp32"), None)
    assert table.step_ms[0] == pytest.approx(1.0)
    drafted = 1.0 / (table.step_ms[1] - table.step_ms[0])
    assert drafted == pytest.approx(round(drafted)) and drafted > 1.5, "tokens in one call"
    assert table.step_ms[15] == pytest.approx(1.0 + 15 / drafted)
    assert max(table.step_ms_per_context_token) == 0.0


@pytest.mark.model
@pytest.mark.parametrize("draft", ["lookup", "lookup:4+first:1"])
def test_the_default_target_repeats_itself_losslessly(draft: str) -> None:
    engine = Engine.from_pretrained(
        draft=draft, compression="fp32", policy="confidence:0.5", progress=False
    )
    prompt = "The cat sat on the mat. The dog sat on the log. " * 6
    params = SamplingParams(max_new_tokens=24, ignore_eos=True)
    result = engine.generate(prompt, params)
    assert result.token_ids == engine.generate(prompt, params, policy="fixed:0").token_ids
    assert result.stats.tokens_per_step > 1.5
