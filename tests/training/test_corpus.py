"""A corpus: shards that depend on their place alone, and folders that survive interruption."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from filelock import FileLock
from scipy import stats

from speckv import Engine, SamplingParams
from speckv.models.llama import LlamaDecoder
from speckv.models.loading import load_model
from speckv.prompts import TASKS, Prompt
from speckv.training import corpus as module
from speckv.training.corpus import Corpus, CorpusRecipe, Shard, generate
from tests.training.conftest import EOS, RECIPE, make_prompts

TENSORS = ("tokens", "lengths", "prompt_lengths", "temperatures", "top_ids", "top_probs")
PROMPTS = make_prompts(20, seed=1)

Loaded = tuple[LlamaDecoder, Any]


def assert_same(actual: Shard, expected: Shard) -> None:
    assert actual.tasks == expected.tasks
    for name in TENSORS:
        left, right = getattr(actual, name), getattr(expected, name)
        assert left.dtype == right.dtype and torch.equal(left, right), name


def sequences(shard: Shard) -> list[list[int]]:
    return [part.tolist() for part in shard.tokens.split(shard.lengths.tolist())]


def responses(shard: Shard) -> list[list[int]]:
    return [
        tokens[start:]
        for tokens, start in zip(sequences(shard), shard.prompt_lengths.tolist(), strict=True)
    ]


def test_a_shard_does_not_depend_on_how_many_sequences_run_at_once(
    loaded: Loaded, monkeypatch: pytest.MonkeyPatch
) -> None:
    prompts = make_prompts(40, seed=2)
    expected = generate(*loaded, prompts, RECIPE)
    for slots in (1, 3, 7):
        monkeypatch.setattr(module, "_SLOTS", slots)
        assert_same(generate(*loaded, prompts, RECIPE), expected)


@pytest.mark.parametrize("compression", ["fp32", "bf16"])
def test_greedy_responses_are_those_of_plain_decoding(folder: Path, compression: str) -> None:
    """In bf16 the largest logit is often shared."""
    target, tokenizer = load_model(folder, compression=compression, device="cpu", progress=False)
    shard = generate(target, tokenizer, PROMPTS, RECIPE)
    likeliest = shard.top_ids[:, 0].split((shard.lengths - shard.prompt_lengths).tolist())
    engine = Engine(target, tokenizer, policy="fixed:0")
    greedy = (shard.temperatures == 0).nonzero().flatten().tolist()
    assert len(greedy) == 12
    for i in greedy:
        result = engine.generate(PROMPTS[i].text, SamplingParams(RECIPE.max_new_tokens))
        assert result.prompt_token_ids == sequences(shard)[i][: shard.prompt_lengths[i]]
        assert result.token_ids == responses(shard)[i] == likeliest[i].tolist()


def test_responses_end_at_the_end_token_or_at_the_limit(shard: Shard) -> None:
    ended = [tokens for tokens in responses(shard) if tokens[-1] == EOS]
    assert all(EOS not in tokens[:-1] for tokens in responses(shard))
    assert {len(t) for t in responses(shard) if t[-1] != EOS} == {RECIPE.max_new_tokens}
    assert 20 < len(ended) < 150


def test_the_context_limits_a_response(loaded: Loaded) -> None:
    target, _ = loaded
    long = Prompt("chat", " ".join(["w5"] * (target.max_positions - 3)))
    shard = generate(*loaded, [long, PROMPTS[0]], replace(RECIPE, temperatures=(0.0,)))
    assert shard.lengths[0] <= target.max_positions
    full = Prompt("chat", f"{long.text} w5 w5 w5")
    with pytest.raises(ValueError, match=r"prompts: expected at most 127 tokens each, got 128$"):
        generate(*loaded, [full], RECIPE)


def test_temperatures_take_turns_within_every_task(shard: Shard) -> None:
    turns = [shard.temperatures[i :: len(TASKS)].tolist() for i in range(len(TASKS))]
    expected = torch.tensor(RECIPE.temperatures).repeat(50)[:50].tolist()
    assert turns == [expected] * len(TASKS)
    assert shard.tasks == list(TASKS) * 50


def test_distributions_are_the_targets_at_temperature_1(loaded: Loaded) -> None:
    target, _ = loaded
    shard = generate(*loaded, PROMPTS, RECIPE)
    done = 0
    for tokens, start in zip(sequences(shard), shard.prompt_lengths.tolist(), strict=True):
        ids = torch.tensor([tokens[:-1]])
        logits = target.forward(ids, [0], target.new_cache(1, len(tokens)))[0, start - 1 :]
        probs, best = logits.double().softmax(dim=-1).topk(RECIPE.top, dim=-1)
        rows = slice(done, done + len(tokens) - start)
        assert torch.equal(shard.top_ids[rows], best.int())
        torch.testing.assert_close(shard.top_probs[rows].double(), probs, rtol=1e-3, atol=1e-6)
        done = rows.stop
    assert done == shard.top_ids.shape[0] == shard.top_probs.shape[0]


def test_of_equal_logits_the_first_is_the_one_that_decoding_chooses() -> None:
    draw = torch.Generator().manual_seed(0)
    logits = torch.randint(0, 5, (64, 300), generator=draw).float()
    for count in (1, 8, 300):
        ids = module._likeliest(logits, count)
        first = [row.index(max(row)) for row in logits.tolist()]
        assert ids[:, 0].tolist() == first
        assert torch.equal(logits.gather(1, ids), logits.topk(count, dim=1).values)
        assert all(len(set(row)) == count for row in ids.tolist())


def test_sampled_responses_depend_on_the_seed_and_the_place_alone(loaded: Loaded) -> None:
    recipe = replace(RECIPE, temperatures=(1.0,))
    whole = generate(*loaded, PROMPTS, recipe)
    part = generate(*loaded, PROMPTS[9:14], recipe, first=9)
    assert responses(part) == responses(whole)[9:14]
    moved = generate(*loaded, PROMPTS[9:14], recipe, first=10)
    other = generate(*loaded, PROMPTS[9:14], replace(recipe, seed=1), first=9)
    assert responses(moved) != responses(part) != responses(other)


@pytest.mark.parametrize("temperature", [0.7, 1.0])
def test_the_law_of_sampled_tokens(loaded: Loaded, temperature: float) -> None:
    target, tokenizer = loaded
    recipe = CorpusRecipe(max_new_tokens=1, top=1, temperatures=(temperature,))
    count = 1500
    shard = generate(*loaded, [Prompt("chat", "w9 w40")] * count, recipe)
    ids = torch.tensor(tokenizer.encode("w9 w40"))
    logits = target.prefill(ids, target.new_cache(1, len(ids)), 0)
    assert logits is not None
    observed = torch.bincount(torch.tensor([r[0] for r in responses(shard)]), minlength=200)

    def p_value(temperature: float) -> float:
        expected = count * (logits.double() / temperature).softmax(dim=-1)
        common = expected >= 5
        pairs = [(t[common].tolist(), float(t[~common].sum())) for t in (observed, expected)]
        seen, wanted = ([*many, rest] for many, rest in pairs)
        return float(stats.chisquare(seen, wanted).pvalue)

    assert p_value(temperature) > 1e-3
    assert p_value(temperature * 1.3) < 1e-6


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"max_new_tokens": 0}, "max_new_tokens: expected at least 1, got 0"),
        ({"top": 0}, "top: expected at least 1, got 0"),
        ({"temperatures": ()}, r"temperatures: expected numbers from 0 on, got \[\]"),
        ({"temperatures": (0.5, -1.0)}, r"temperatures: expected .*, got \[0.5, -1.0\]"),
        ({"seed": -1}, "seed: expected 0 to 4294967295, got -1"),
        ({"seed": 2**32}, "seed: expected 0 to 4294967295, got 4294967296"),
    ],
)
def test_bad_recipes(options: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        CorpusRecipe(**options)


def test_a_shard_is_read_as_it_was_written(shard: Shard, tmp_path: Path) -> None:
    shard.save(tmp_path / "shard.safetensors")
    read = Shard.load(tmp_path / "shard.safetensors")
    assert_same(read, shard)
    assert read.seconds == pytest.approx(shard.seconds, abs=1e-3) and shard.seconds > 0
    assert [path.name for path in tmp_path.iterdir()] == ["shard.safetensors"]


def _truncate(path: Path) -> None:
    path.write_bytes(path.read_bytes()[:-100])


def _drop_metadata(path: Path) -> None:
    from safetensors.torch import load_file, save_file

    save_file(load_file(path), path)


def _drop_tensor(path: Path) -> None:
    from safetensors.torch import load_file, save_file

    tensors = load_file(path)
    del tensors["top_ids"]
    save_file(tensors, path, {"tasks": "[]", "seconds": "1"})


def _drop_seconds(path: Path) -> None:
    from safetensors.torch import load_file, save_file

    save_file(load_file(path), path, {"tasks": "[]"})


@pytest.mark.parametrize(
    "damage",
    [
        _truncate,
        _drop_metadata,
        _drop_tensor,
        _drop_seconds,
        lambda path: path.write_bytes(b""),
        lambda path: path.write_text("not a shard at all"),
    ],
    ids=["truncated", "no metadata", "no tensor", "no seconds", "empty", "text"],
)
def test_a_damaged_shard_is_refused(
    damage: Callable[[Path], object], shard: Shard, tmp_path: Path
) -> None:
    path = tmp_path / "shard.safetensors"
    shard.save(path)
    damage(path)
    message = f"^{path}: expected a corpus shard; delete it to remake it$"
    with pytest.raises(ValueError, match=message):
        Shard.load(path)


@pytest.fixture
def made(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """Shards of eight prompts; the list gets the first prompt of each that is generated."""
    firsts: list[int] = []

    def counted(*arguments: Any, first: int, **options: Any) -> Shard:
        firsts.append(first)
        return generate(*arguments, first=first, **options)

    monkeypatch.setattr(module, "_SHARD_PROMPTS", 8)
    monkeypatch.setattr(module, "generate", counted)
    return firsts


def test_a_corpus_is_the_shards_of_its_prompts(
    loaded: Loaded, tmp_path: Path, made: list[int]
) -> None:
    corpus = Corpus(tmp_path, *loaded, PROMPTS, RECIPE)
    with pytest.raises(ValueError, match="expected shard 0, found none"):
        list(corpus.shards())
    grown: list[tuple[int, int]] = []
    corpus.complete(lambda *units: grown.append(units))
    shards = list(corpus.shards())
    assert made == [0, 8, 16] and [len(s.tasks) for s in shards] == [8, 8, 4]
    for first, shard in zip(made, shards, strict=True):
        assert_same(shard, generate(*loaded, PROMPTS[first : first + 8], RECIPE, first=first))
    assert sum(sequences for sequences, _ in grown) == len(PROMPTS)
    assert sum(tokens for _, tokens in grown) == sum(s.top_ids.shape[0] for s in shards)


def test_what_is_there_is_not_made_again(loaded: Loaded, tmp_path: Path, made: list[int]) -> None:
    Corpus(tmp_path, *loaded, PROMPTS, RECIPE).complete()
    grown: list[tuple[int, int]] = []
    Corpus(tmp_path, *loaded, PROMPTS, RECIPE).complete(lambda *units: grown.append(units))
    assert grown == [(8, 0), (8, 0), (4, 0)]
    longer = Corpus(tmp_path, *loaded, make_prompts(24, seed=1), RECIPE)
    longer.complete()
    assert made == [0, 8, 16, 16], "full shards serve a longer list, the partial one does not"
    assert sum(len(shard.tasks) for shard in longer.shards()) == 24


def test_an_interrupted_generation_goes_on_at_its_shard(
    loaded: Loaded, tmp_path: Path, made: list[int]
) -> None:
    tokens = 0

    def interrupt(_: int, new: int) -> None:
        nonlocal tokens
        tokens += new
        if len(made) == 2 and new:
            raise KeyboardInterrupt

    corpus = Corpus(tmp_path / "a", *loaded, PROMPTS, RECIPE)
    with pytest.raises(KeyboardInterrupt):
        corpus.complete(interrupt)
    assert [path.name for path in corpus.folder.glob("shard*s")] == [corpus.path(0).name]
    assert not list(corpus.folder.glob("*.tmp"))
    corpus.complete()
    whole = Corpus(tmp_path / "b", *loaded, PROMPTS, RECIPE)
    whole.complete()
    assert made == [0, 8, 8, 16, 0, 8, 16]
    for index in range(corpus.size):
        assert_same(Shard.load(corpus.path(index)), Shard.load(whole.path(index)))


def test_a_shard_that_another_process_makes_is_waited_for(
    loaded: Loaded, tmp_path: Path, made: list[int]
) -> None:
    whole = Corpus(tmp_path / "other", *loaded, PROMPTS, RECIPE)
    whole.complete()
    made.clear()
    corpus = Corpus(tmp_path / "shared", *loaded, PROMPTS, RECIPE)
    path = corpus.path(0)
    worker = threading.Thread(target=corpus.complete)
    with FileLock(path.with_suffix(".lock")):
        worker.start()
        deadline = time.monotonic() + 30
        while not corpus.path(2).is_file() and time.monotonic() < deadline:
            time.sleep(0.01)
        assert made == [8, 16] and worker.is_alive()
        path.write_bytes(whole.path(0).read_bytes())
    worker.join(timeout=30)
    assert not worker.is_alive() and made == [8, 16]


def test_a_shard_whose_maker_died_is_made(loaded: Loaded, tmp_path: Path, made: list[int]) -> None:
    corpus = Corpus(tmp_path, *loaded, PROMPTS[:8], RECIPE)
    worker = threading.Thread(target=corpus.complete)
    with FileLock(corpus.path(0).with_suffix(".lock")):
        worker.start()
        time.sleep(0.2)
        assert not made and worker.is_alive()
    worker.join(timeout=30)
    assert made == [0] and len(list(corpus.shards())) == 1


def test_corpora_of_other_targets_recipes_and_prompts_are_others(
    folder: Path, loaded: Loaded, tmp_path: Path
) -> None:
    def corpus(loaded: Any = loaded, prompts: Any = PROMPTS, recipe: Any = RECIPE) -> Corpus:
        return Corpus(tmp_path, *loaded, prompts, recipe)

    in_bf16 = load_model(folder, dtype="bf16", device="cpu", progress=False)
    recipes = [
        replace(RECIPE, seed=1),
        replace(RECIPE, top=4),
        replace(RECIPE, max_new_tokens=9),
        replace(RECIPE, temperatures=(0.0,)),
    ]
    others = [corpus(recipe=recipe) for recipe in recipes] + [corpus(loaded=in_bf16)]
    assert len({c.folder for c in [corpus(), *others]}) == 6
    renamed = corpus(prompts=make_prompts(20, seed=3))
    assert renamed.folder == corpus().folder and renamed.path(0) != corpus().path(0)
    retold = corpus(prompts=[replace(prompt, task="user") for prompt in PROMPTS])
    assert retold.path(0) != corpus().path(0), "a shard tells the tasks of its prompts"
    with pytest.raises(ValueError, match="prompts: expected at least one, got none"):
        corpus(prompts=[])
