"""Batches against the sequences that they are made of, vocabularies, and what is not trained on."""

from __future__ import annotations

from collections import Counter

import pytest
import torch

from speckv.prompts import TASKS
from speckv.training.corpus import Shard
from speckv.training.examples import Batch, Examples
from tests.training.conftest import VOCAB


def numbered(lengths: list[int], prompts: list[int], first: int = 0) -> Shard:
    """A shard whose tokens are all different, and whose likeliest ids are the tokens themselves."""
    tokens = torch.arange(first, first + sum(lengths), dtype=torch.int32)
    parts = tokens.split(lengths)
    responses = torch.cat([part[p:] for part, p in zip(parts, prompts, strict=True)])
    return Shard(
        tokens=tokens,
        lengths=torch.tensor(lengths, dtype=torch.int32),
        prompt_lengths=torch.tensor(prompts, dtype=torch.int32),
        tasks=[TASKS[i % len(TASKS)] for i in range(len(lengths))],
        temperatures=torch.zeros(len(lengths)),
        top_ids=torch.stack((responses, responses + 1), dim=1),
        top_probs=torch.tensor([[0.5, 0.25]]).expand(len(responses), 2).half(),
        seconds=1.0,
    )


def random_examples(count: int, longest: int = 40) -> Examples:
    draw = torch.Generator().manual_seed(count)
    prompts = torch.randint(1, 8, (count,), generator=draw)
    lengths = prompts + torch.randint(1, longest - 8, (count,), generator=draw)
    shards = []
    offset = 0
    for part in torch.arange(count).split(max(count // 2, 1)):
        shards.append(numbered(lengths[part].tolist(), prompts[part].tolist(), offset))
        offset += int(lengths[part].sum())
    return Examples.from_shards(shards)


def every_sequence(batch: Batch) -> list[list[int]]:
    return [row[mask.bool()].tolist() for row, mask in zip(batch.tokens, batch.mask, strict=True)]


def in_order(examples: Examples) -> list[list[int]]:
    return [part.tolist() for part in examples.tokens.split(examples.lengths.tolist())]


def test_a_batch_by_hand() -> None:
    shard = numbered([5, 3], [2, 2], first=10)
    (batch,) = Examples.from_shards([shard]).batches([0, 1], 10)
    assert batch.tokens.tolist() == [[15, 16, 17, 0, 0], [10, 11, 12, 13, 14]]
    assert batch.mask.tolist() == [[1, 1, 1, 0, 0], [1, 1, 1, 1, 1]]
    assert batch.rows.tolist() == [1, 6, 7, 8]
    assert batch.top_ids.tolist() == [[17, 18], [12, 13], [13, 14], [14, 15]]
    assert batch.top_probs.tolist() == [[0.5, 0.25]] * 4
    moved = batch.to(torch.device("cpu"))
    assert all(torch.equal(getattr(moved, n), getattr(batch, n)) for n in vars(batch))


def test_rows_predict_the_next_token() -> None:
    examples = random_examples(50)
    for batch in examples.batches(range(50), 200, torch.Generator().manual_seed(0)):
        flat = batch.tokens.flatten()
        assert torch.equal(batch.top_ids[:, 0], flat[batch.rows + 1])
        assert bool(batch.mask.flatten()[batch.rows + 1].all())


def test_greedy_responses_are_their_own_likeliest_tokens(shard: Shard, examples: Examples) -> None:
    greedy = (shard.temperatures == 0).nonzero().flatten().tolist()
    for batch in examples.batches(greedy, 300):
        assert torch.equal(batch.top_ids[:, 0], batch.tokens.flatten()[batch.rows + 1])
    sampled = (shard.temperatures == 1).nonzero().flatten().tolist()
    (batch,) = examples.batches(sampled, 10**6)
    same = (batch.top_ids[:, 0] == batch.tokens.flatten()[batch.rows + 1]).float().mean()
    assert 0.1 < same < 0.9


@pytest.mark.parametrize("count", [1, 2, 7, 300])
@pytest.mark.parametrize("shuffled", [False, True])
def test_an_epoch_has_every_sequence_once_within_the_budget(count: int, shuffled: bool) -> None:
    examples, budget = random_examples(count), 100
    generator = torch.Generator().manual_seed(3) if shuffled else None
    batches = list(examples.batches(range(count), budget, generator))
    assert all(batch.tokens.numel() <= budget for batch in batches)
    seen = Counter(tuple(s) for batch in batches for s in every_sequence(batch))
    assert seen == Counter(map(tuple, in_order(examples)))
    if shuffled and count == 300:
        used = sum(int(batch.mask.sum()) for batch in batches)
        assert used / sum(batch.tokens.numel() for batch in batches) > 0.85, "little is padding"


def test_a_sequence_beyond_the_budget_is_a_batch_of_its_own() -> None:
    examples = Examples.from_shards([numbered([30, 4, 40, 4], [1, 1, 1, 1])])
    sizes = [tuple(b.tokens.shape) for b in examples.batches(range(4), 20)]
    assert sizes == [(2, 4), (1, 30), (1, 40)]


def test_the_order_is_the_generators() -> None:
    examples = random_examples(120)

    def order(seed: int | None) -> list[list[list[int]]]:
        generator = None if seed is None else torch.Generator().manual_seed(seed)
        return [every_sequence(b) for b in examples.batches(range(120), 90, generator)]

    assert order(0) == order(0) != order(1)
    assert order(None) == order(None)
    lengths = [len(s) for batch in order(0) for s in batch]
    assert lengths != sorted(lengths), "batches of like lengths, in no order"


def test_an_epoch_has_about_as_many_batches_as_counted() -> None:
    examples = random_examples(300)
    counted = examples.count_batches(range(300), 100)
    batches = list(examples.batches(range(300), 100, torch.Generator().manual_seed(0)))
    assert counted <= len(batches) <= 1.4 * counted
    assert random_examples(1).count_batches([0], 10**6) == 1
    assert list(examples.batches([], 100)) == []


def test_the_vocabulary_is_by_probability_then_by_number() -> None:
    shard = numbered([4, 4], [1, 2])
    shard.top_ids[:] = torch.tensor([[7, 3], [3, 9], [7, 3], [5, 7], [9, 5]])
    shard.top_probs[:] = torch.tensor([[0.5, 0.25]])
    examples = Examples.from_shards([shard])
    # 7: 0.5 + 0.5 + 0.25, 3: 0.25 + 0.5 + 0.25, 9: 0.25 + 0.5, 5: 0.5 + 0.25.
    assert examples.vocabulary(6, [0, 1], 12).tolist() == [7, 3, 5, 9, 0, 1]
    assert examples.vocabulary(2, [0, 1], 12).tolist() == [7, 3]
    assert examples.vocabulary(4, [0], 12).tolist() == [3, 7, 9, 0]
    assert sorted(examples.vocabulary(99, [0, 1], 12).tolist()) == list(range(12))


def test_smaller_vocabularies_begin_larger_ones(examples: Examples) -> None:
    train, *_ = examples.split()
    largest = examples.vocabulary(VOCAB, train, VOCAB)
    assert largest.dtype == torch.int64 and sorted(largest.tolist()) == list(range(VOCAB))
    for size in (1, 50, 150):
        assert torch.equal(examples.vocabulary(size, train, VOCAB), largest[:size])


@pytest.mark.parametrize("count", [3, 7, 8, 159, 160, 161, 162, 163, 400, 1000])
def test_every_sequence_has_one_use(count: int) -> None:
    examples = random_examples(count)
    train, validation, held_out = examples.split()
    assert train and validation and held_out
    assert sorted(train + validation + held_out) == list(range(count))
    kept = sorted(validation + held_out)
    if count >= 8:
        assert kept == [i for i in range(count) if i % 160 < 4]
    if count > 160:
        assert validation == [i for i in range(count) if i % 320 < 4]


def test_what_is_not_trained_on_is_greedy(shard: Shard, examples: Examples) -> None:
    _, *halves = examples.split()
    for half in halves:
        assert shard.temperatures[half].unique().tolist() == [0.0]
        assert Counter(shard.tasks[i] for i in half) == dict.fromkeys(TASKS, 1)
