"""The engine's interface, on a tabular pair whose every token is a letter."""

from __future__ import annotations

import math
import warnings
from collections.abc import Callable
from dataclasses import replace
from functools import partial
from typing import Any

import pytest
import torch
from torch import Tensor

import speckv.kernels
from speckv import Engine, GenerationInterrupted, Policy, SamplingParams
from speckv import engine as engine_module
from speckv.decoding import EagerLoop, trained
from speckv.errors import NumericsError, PolicyError, SpeckvError, UntrainedPolicyWarning
from speckv.kernels import layout as at
from speckv.policies import CostTable, parse_policy
from tests.tabular import TabularModel, random_table

LETTERS = "abcdefghijklmnopqrstuvwxyz .!?é"
VOCAB = len(LETTERS)
EOS = LETTERS.index("!")
COST = CostTable.from_parts(0.2, [1.0 + 0.05 * width for width in range(16)])


class Letters:
    """A tokenizer with one token a letter."""

    eos_token_id = EOS

    def encode(self, text: str) -> list[int]:
        return [LETTERS.index(letter) for letter in text]

    def decode(self, token_ids: list[int], *, skip_special_tokens: bool = False) -> str:
        return "".join(LETTERS[i] for i in token_ids if not (skip_special_tokens and i == EOS))


def table(seed: int) -> Tensor:
    """Logits under which the end of the sequence is rare."""
    logits = random_table(VOCAB, VOCAB, seed=seed, scale=2.0)
    logits[..., EOS] -= 1.0
    return logits


def model(logits: Tensor) -> TabularModel:
    result = TabularModel(logits)
    result.eos_ids = (EOS,)
    return result


@pytest.fixture(scope="module")
def pair() -> tuple[TabularModel, TabularModel]:
    target = table(seed=0)
    noise = torch.randn(target.shape, generator=torch.Generator().manual_seed(1))
    return model(target), model(target + noise)


@pytest.fixture
def engine(pair: tuple[TabularModel, TabularModel]) -> Engine:
    return Engine(pair[0], Letters(), pair[1], policy="fixed:4", cost=COST)


GREEDY = SamplingParams(max_new_tokens=40, ignore_eos=True)
SAMPLED = SamplingParams(max_new_tokens=40, temperature=0.9, seed=5, ignore_eos=True)


def test_a_result_tells_what_happened(engine: Engine) -> None:
    result = engine.generate("hello", GREEDY)
    stats = result.stats
    assert result.finish_reason == "length"
    assert result.prompt_token_ids == Letters().encode("hello")
    assert len(result.token_ids) == stats.new_tokens == 40
    assert result.text == Letters().decode(result.token_ids, skip_special_tokens=True)
    assert sum(accepted + 1 for _, accepted in stats.steps) == 39, "prefill yields the 40th"
    assert sum(stats.gamma_histogram.values()) == len(stats.steps)
    drafted = sum(g for g, _ in stats.steps)
    assert stats.acceptance_rate == sum(a for _, a in stats.steps) / drafted
    assert stats.tokens_per_step == 39 / len(stats.steps)
    assert 0 < stats.time_to_first_token <= stats.seconds["total"]
    assert stats.inter_token_p50 <= stats.inter_token_p99
    parts = ("prefill", "draft", "verify", "decision")
    assert 0 < sum(stats.seconds[part] for part in parts) <= stats.seconds["total"]


@pytest.mark.parametrize("params", [GREEDY, SAMPLED], ids=["greedy", "sampled"])
@pytest.mark.parametrize(
    "policy", ["fixed:2", "fixed:15", "entropy:1.5", "confidence:0.4", "paper", "speckv"]
)
def test_every_policy_gives_the_tokens_of_plain_decoding(
    engine: Engine, policy: str, params: SamplingParams
) -> None:
    plain = engine.generate("so it goes", params, policy="fixed:0")
    assert plain.stats.gamma_histogram == {0: 39}
    result = engine.generate("so it goes", params, policy=policy)
    assert result.token_ids == plain.token_ids
    assert result.stats.steps != plain.stats.steps, "the policy drafted"


def test_a_list_of_prompts_decodes_as_each_alone_would(engine: Engine) -> None:
    prompts = ["a", "hello there", "what is it?", "no"]
    together = engine.generate(prompts, GREEDY)
    assert [r.token_ids for r in together] == [
        engine.generate(p, GREEDY).token_ids for p in prompts
    ]


def test_more_prompts_than_rows_go_in_groups_with_their_own_noise(
    pair: tuple[TabularModel, TabularModel],
) -> None:
    small = Engine(pair[0], Letters(), pair[1], policy="fixed:2", max_batch_size=2)
    large = Engine(pair[0], Letters(), pair[1], policy="fixed:2", max_batch_size=8)
    prompts = ["hello"] * 5
    results = small.generate(prompts, SAMPLED)
    assert [r.token_ids for r in results] == [r.token_ids for r in large.generate(prompts, SAMPLED)]
    assert len({tuple(r.token_ids) for r in results}) == 5, "same prompt and seed, other request"


def test_each_prompt_may_have_its_own_parameters(engine: Engine) -> None:
    params = [GREEDY, SAMPLED, SamplingParams(max_new_tokens=1)]
    results = engine.generate(["hello", "hello", "hello"], params)
    assert [len(r.token_ids) for r in results] == [40, 40, 1]
    assert results[0].token_ids == engine.generate("hello", GREEDY).token_ids
    assert results[0].seed is None and results[1].seed == 5
    assert results[2].stats.steps == []


def test_token_ids_are_a_prompt(engine: Engine) -> None:
    ids = Letters().encode("hello")
    by_text = engine.generate("hello", GREEDY).token_ids
    assert engine.generate(ids, GREEDY).token_ids == by_text
    assert engine.generate(torch.tensor(ids), GREEDY).token_ids == by_text
    assert [r.token_ids for r in engine.generate([ids, ids], GREEDY)] == [by_text] * 2


def test_a_stream_adds_up_to_the_result(engine: Engine) -> None:
    chunks = list(engine.stream("hello", GREEDY))
    result = engine.generate("hello", GREEDY)
    assert "".join(c.text for c in chunks) == result.text
    assert [t for c in chunks for t in c.token_ids] == result.token_ids
    assert [c.finish_reason for c in chunks[:-1]] == [None] * (len(chunks) - 1)
    assert chunks[-1].finish_reason == "length"
    assert chunks[-1].result is not None and chunks[-1].result.token_ids == result.token_ids


def test_an_end_token_ends_the_request_within_an_accepted_run(engine: Engine) -> None:
    free = engine.generate("hello", GREEDY)
    end = free.token_ids[17]
    cut = free.token_ids.index(end) + 1
    params = SamplingParams(max_new_tokens=40, ignore_eos=True, stop_token_ids=(end,))
    for policy in ("fixed:0", "fixed:4", "fixed:15"):
        result = engine.generate("hello", params, policy=policy)
        assert result.finish_reason == "stop"
        assert result.token_ids == free.token_ids[:cut]


def test_the_model_s_own_end_token_counts_unless_ignored(engine: Engine) -> None:
    for request in range(20):
        params = SamplingParams(max_new_tokens=200, temperature=1.2, seed=request)
        result = engine.generate("hello", params)
        if result.finish_reason == "stop":
            assert result.token_ids[-1] == EOS and EOS not in result.token_ids[:-1]
            assert not result.text.endswith("!"), "special tokens are not text"
            return
    pytest.fail("no request met the end token")


def test_a_stop_text_ends_the_request_and_is_not_part_of_it(engine: Engine) -> None:
    free = engine.generate("hello", GREEDY)
    stop = free.text[11:14]
    params = SamplingParams(max_new_tokens=40, ignore_eos=True, stop=(stop, "zzzzzz"))
    chunks = list(engine.stream("hello", params))
    result = chunks[-1].result
    assert result is not None and result.finish_reason == "stop"
    assert result.text == free.text[: free.text.index(stop)] == "".join(c.text for c in chunks)
    assert result.token_ids == free.token_ids[: len(result.token_ids)]
    assert Letters().decode(result.token_ids, skip_special_tokens=True) == result.text + stop
    row, other = engine.generate(["hello", "hello"], [params, GREEDY])
    assert (row.text, other.text) == (result.text, free.text), "the other row goes on"


def test_a_seed_is_drawn_and_told(engine: Engine) -> None:
    first, second = (
        engine.generate("hello", SamplingParams(max_new_tokens=30, temperature=1.0))
        for _ in range(2)
    )
    assert first.seed != second.seed
    again = SamplingParams(max_new_tokens=30, temperature=1.0, seed=first.seed)
    assert engine.generate("hello", again).token_ids == first.token_ids


def test_rejection_sampling_runs_and_keeps_to_the_limit(engine: Engine) -> None:
    params = SamplingParams(
        max_new_tokens=40, temperature=1.0, top_k=9, seed=3, coupling="rejection", ignore_eos=True
    )
    result = engine.generate(["hello", "abc"], params)
    assert [len(r.token_ids) for r in result] == [40, 40]
    assert all(0 < r.stats.acceptance_rate < 1 for r in result)
    greedy = SamplingParams(max_new_tokens=40, coupling="rejection", ignore_eos=True)
    assert engine.generate("hello", greedy).token_ids == engine.generate("hello", GREEDY).token_ids


@pytest.mark.parametrize(
    ("prompt", "error", "message"),
    [
        ("", ValueError, "empty prompt"),
        ([], ValueError, "empty prompt"),
        ([1, 2, 999], ValueError, "from 0 to 30, got 999"),
        ([1] * 4096, ValueError, "at most 4095 tokens .* got 4096"),
        (3.5, TypeError, "text or token ids"),
        ([3.5], TypeError, "text or token ids"),
    ],
)
def test_bad_prompts_are_refused(
    engine: Engine, prompt: Any, error: type[Exception], message: str
) -> None:
    with pytest.raises(error, match=message):
        engine.generate(prompt, GREEDY)
    with pytest.raises(error, match=message):
        engine.stream(prompt, GREEDY)


def test_bad_parameters_and_policies_are_refused(
    engine: Engine, pair: tuple[TabularModel, TabularModel]
) -> None:
    with pytest.raises(ValueError, match="expected 1, one for each prompt, got 2"):
        engine.generate("a", [GREEDY, GREEDY])
    with pytest.raises(TypeError, match="expected SamplingParams, got int"):
        engine.generate("a", [3])  # type: ignore[list-item]
    with pytest.raises(ValueError, match="'fixed:99'.*0 to 15"):
        engine.generate("a", GREEDY, policy="fixed:99")
    with pytest.raises(PolicyError, match="no such file"):
        engine.generate("a", GREEDY, policy="file:/nowhere/policy.safetensors")
    with pytest.raises(ValueError, match="expected fixed:0, since there is no draft"):
        Engine(pair[0], Letters(), policy="fixed:4")
    with pytest.raises(ValueError, match="max_batch_size: expected at least 1"):
        Engine(*pair[:1], Letters(), pair[1], policy="fixed:1", max_batch_size=0)


def test_a_request_ends_at_the_context(pair: tuple[TabularModel, TabularModel]) -> None:
    engine = Engine(pair[0], Letters(), pair[1], policy="fixed:4")
    engine.max_length = 32
    result = engine.generate("hello", GREEDY)
    assert (len(result.token_ids), result.finish_reason) == (27, "length")


def test_plain_decoding_needs_no_draft(pair: tuple[TabularModel, TabularModel]) -> None:
    alone = Engine(pair[0], Letters(), policy="fixed:0")
    with_draft = Engine(pair[0], Letters(), pair[1], policy="fixed:4")
    assert (
        alone.generate("hello", GREEDY).token_ids == with_draft.generate("hello", GREEDY).token_ids
    )


class Interfering(TabularModel):
    """Does something at its n-th forward."""

    def __init__(self, logits: Tensor, at: int, what: Callable[[Tensor], Tensor]) -> None:
        super().__init__(logits)
        self.eos_ids = (EOS,)
        self.at, self.what, self.calls = at, what, 0

    def forward(self, *arguments: Any, **options: Any) -> Tensor:
        self.calls += 1
        logits = super().forward(*arguments, **options)
        return self.what(logits) if self.calls == self.at else logits


def interrupt(logits: Tensor) -> Tensor:
    raise KeyboardInterrupt


@pytest.mark.parametrize("where", ["target", "draft"])
def test_ctrl_c_keeps_the_text(pair: tuple[TabularModel, TabularModel], where: str) -> None:
    models = list(pair)
    index = ("target", "draft").index(where)
    models[index] = Interfering(pair[index].table, 5, interrupt)
    engine = Engine(models[0], Letters(), models[1], policy="fixed:2")
    whole = Engine(pair[0], Letters(), pair[1], policy="fixed:2").generate("hello", GREEDY)
    last = list(engine.stream("hello", GREEDY))[-1]
    assert last.finish_reason == "interrupted" and last.result is not None
    kept = last.result.token_ids
    assert 0 < len(kept) < 40 and kept == whole.token_ids[: len(kept)]
    assert last.result.stats.seconds["total"] > 0
    assert engine.generate("hello", GREEDY).token_ids == whole.token_ids, "it still works"


def test_ctrl_c_in_generate_carries_the_results(pair: tuple[TabularModel, TabularModel]) -> None:
    engine = Engine(Interfering(pair[0].table, 5, interrupt), Letters(), pair[1], policy="fixed:2")
    with pytest.raises(GenerationInterrupted) as caught:
        engine.generate(["hello", "abc"], GREEDY)
    assert [r.finish_reason for r in caught.value.results] == ["interrupted"] * 2
    assert all(r.token_ids for r in caught.value.results)


def test_ctrl_c_between_chunks_ends_the_stream(engine: Engine) -> None:
    stream = engine.stream("hello", GREEDY)
    first = next(stream)
    last = stream.throw(KeyboardInterrupt())
    assert last.finish_reason == "interrupted"
    assert last.result is not None and last.result.token_ids == first.token_ids


@pytest.mark.parametrize("bad", [math.nan, math.inf])
@pytest.mark.parametrize("where", ["target", "draft"])
def test_logits_that_are_no_numbers_are_an_error(
    pair: tuple[TabularModel, TabularModel], where: str, bad: float
) -> None:
    models = list(pair)
    index = ("target", "draft").index(where)
    spoil = partial(torch.index_fill, dim=-1, index=torch.tensor(3), value=bad)
    models[index] = Interfering(pair[index].table, 4, spoil)
    engine = Engine(models[0], Letters(), models[1], policy="fixed:2")
    with pytest.raises(NumericsError, match=f"position [0-9]+: the {where} model"):
        engine.generate("hello", GREEDY)
    assert len(engine.generate("hello", GREEDY).token_ids) == 40, "it still works"


def test_one_request_at_a_time(engine: Engine) -> None:
    stream = engine.stream("hello", GREEDY)
    next(stream)
    with pytest.raises(SpeckvError, match="busy"):
        engine.generate("hello", GREEDY)
    stream.close()
    assert len(engine.generate("hello", GREEDY).token_ids) == 40


def test_after_warmup_nothing_is_allocated_again(engine: Engine) -> None:
    engine.warmup(batch_size=2, length=512)
    loop = engine._loops._loop
    assert isinstance(loop, EagerLoop)
    rejection_rows = loop._rejection_rows
    assert rejection_rows is not None
    engine.generate(["hello"] * 2, SAMPLED)
    engine.generate("hello", replace(SAMPLED, coupling="rejection"))
    assert engine._loops._loop is loop and loop._rejection_rows is rejection_rows


def test_description_names_models_and_policy(engine: Engine) -> None:
    line = engine.describe()
    assert "tabular" in line and "fixed:4" in line and "cpu" in line and "\n" not in line


@pytest.fixture
def nothing_warned_of(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(trained, "_warned", set())


@pytest.mark.usefixtures("nothing_warned_of")
def test_an_untrained_policy_is_told_of_once_for_each_pair(
    pair: tuple[TabularModel, TabularModel],
) -> None:
    with pytest.warns(UntrainedPolicyWarning) as caught:
        engine = Engine(pair[0], Letters(), pair[1], cost=COST)
        Engine(pair[0], Letters(), pair[1], cost=COST).generate("hello", GREEDY, policy="speckv")
    assert len(caught) == 1
    message = str(caught[0].message)
    assert "\n" not in message and "the target tabular with the draft tabular" in message
    for words in (trained.FALLBACK, "speckv profile TRACE", "speckv train TRACE"):
        assert words in message
    assert f"policy speckv (none trained for this pair: {trained.FALLBACK})" in engine.describe()
    other = model(pair[1].table)
    other.name = "another"
    with pytest.warns(UntrainedPolicyWarning, match="the draft another"):
        Engine(pair[0], Letters(), other, cost=COST)


@pytest.mark.usefixtures("nothing_warned_of")
def test_no_other_policy_is_warned_of(
    pair: tuple[TabularModel, TabularModel], monkeypatch: pytest.MonkeyPatch
) -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        for policy in ("fixed:4", "paper", "entropy:2"):
            Engine(pair[0], Letters(), pair[1], policy=policy)
        of_the_pair = replace(parse_policy("speckv"), trained=True)
        monkeypatch.setattr(engine_module, "trained_policy", lambda *models: of_the_pair)
        found = Engine(pair[0], Letters(), pair[1])
    assert "policy speckv (trained)" in found.describe()


def test_a_policy_is_what_it_says_not_what_it_is_called(engine: Engine) -> None:
    for cap in (0, 4):
        policy = Policy("mine", at.MODE_FIXED, gamma_cap=cap)
        result = engine.generate("hello", GREEDY, policy=policy)
        assert max(result.stats.gamma_histogram) == cap


def test_numbers_gone_bad_do_not_reach_the_next_request(
    pair: tuple[TabularModel, TabularModel],
) -> None:
    models = Interfering(pair[0].table, -1, lambda x: x * math.nan), pair[1]
    engine = Engine(models[0], Letters(), models[1], policy="fixed:2")
    engine.warmup(length=512)
    models[0].calls, models[0].at = 0, 4
    before = engine._loops._loop
    with pytest.raises(NumericsError):
        engine.generate("hello", GREEDY)
    assert engine._loops._loop is not before, "caches that hold NaN are dropped"


@pytest.mark.parametrize(("dropped", "at_least"), [(0, 1.0), (1, 0.2)])
def test_a_draft_of_its_own_vocabulary_is_fed_its_own_ids(
    pair: tuple[TabularModel, TabularModel], dropped: int, at_least: float
) -> None:
    """The target itself with its ids renamed, and one dropped: embedding, head and all."""
    # Nothing stands before the first position: id 0, which it is looked up by, keeps its place.
    others = 1 + torch.randperm(VOCAB - 1, generator=torch.Generator().manual_seed(3))
    kept = torch.cat((torch.tensor([0]), others[: VOCAB - 1 - dropped]))
    renamed = model(pair[0].table[:, kept][:, :, kept][..., kept])
    assert renamed.embedding_size == renamed.vocab_size == VOCAB - dropped
    engine = Engine(pair[0], Letters(), renamed, policy="fixed:4", id_map=kept.int())
    plain = engine.generate("hello", GREEDY, policy="fixed:0")
    for params in (GREEDY, SAMPLED, replace(SAMPLED, coupling="rejection")):
        assert engine.generate("hello", params).stats.acceptance_rate >= at_least
    assert engine.generate("hello", GREEDY).token_ids == plain.token_ids


def test_a_draft_of_a_short_context_stops_drafting(
    pair: tuple[TabularModel, TabularModel],
) -> None:
    short = model(pair[1].table)
    short.max_positions = 30
    engine = Engine(pair[0], Letters(), short, policy="fixed:4")
    whole = Engine(pair[0], Letters(), pair[1], policy="fixed:4").generate("hello", GREEDY)
    result = engine.generate("hello", GREEDY)
    assert result.token_ids == whole.token_ids
    assert set(result.stats.gamma_histogram) >= {0, 4}


def test_the_loop_passes_what_the_kernels_accept(
    engine: Engine, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Their public calls validate, and compute on the CPU by the reference."""
    expected = engine.generate(["hello", "ab"], SAMPLED)
    rejection = replace(SAMPLED, coupling="rejection")
    monkeypatch.setattr("speckv.decoding.eager.operations", lambda device: speckv.kernels)
    checked = Engine(engine.target, Letters(), engine.draft, policy="fixed:4")
    results = checked.generate(["hello", "ab"], replace(SAMPLED, top_k=VOCAB))
    assert [r.token_ids for r in results] == [r.token_ids for r in expected]
    checked.generate(["hello", "ab"], rejection)
    checked.generate("hello", rejection)
    checked.generate("hello", GREEDY)


def test_a_target_whose_rows_depend_on_each_other_is_told_of() -> None:
    target = model(table(seed=0))
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        Engine(target, Letters(), policy="fixed:0")
    target.width_invariant = False
    with pytest.warns(UserWarning, match="tabular: in torch.float32 on cpu the last bits of a row"):
        Engine(target, Letters(), policy="fixed:0")
