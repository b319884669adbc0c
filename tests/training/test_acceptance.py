"""The training loss against a naive oracle, and counts of acceptance against real decoding."""

from __future__ import annotations

import math
from collections.abc import Callable

import numpy as np
import pytest
import torch
from torch import Tensor

from speckv import SamplingParams
from speckv.decoding import EagerLoop, RequestBatch
from speckv.models.llama import LlamaDecoder
from speckv.models.slice_draft import rounded
from speckv.policies import CostTable, parse_policy
from speckv.training.acceptance import Counts, count_accepted, overlap, predict_speedup
from speckv.training.corpus import Shard
from speckv.training.examples import Examples
from speckv.training.trainer import Trainer
from tests.tolerances import assert_close
from tests.training.conftest import EOS, HEAD, LAYERS


def naive_overlap(logits: Tensor, rows: Tensor, probs: Tensor) -> tuple[list[float], list[float]]:
    shared, likelihood = [], []
    for scores, ids, p in zip(logits.tolist(), rows.tolist(), probs.tolist(), strict=True):
        total = math.fsum(math.exp(s) for s in scores)
        q = [math.exp(scores[i]) / total if i >= 0 else 0.0 for i in ids]
        shared.append(math.fsum(map(min, p, q)))
        known = [(a, b) for a, b, i in zip(p, q, ids, strict=True) if i >= 0]
        likelihood.append(math.fsum(a * math.log(b) for a, b in known))
    return shared, likelihood


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_overlap_is_that_of_a_naive_sum(dtype: torch.dtype) -> None:
    draw = torch.Generator().manual_seed(0)
    logits = (torch.randn(37, 50, generator=draw) * 3).to(dtype)
    target = torch.randn(37, 90, generator=draw).mul(3).softmax(dim=1)
    probs, ids = target.topk(16, dim=1)
    rows = torch.where(ids < 50, ids, -1)
    assert bool((rows < 0).any(dim=1).all()), "every row has tokens that the draft lacks"
    shared, likelihood = overlap(logits, rows, probs)
    expected = [torch.tensor(v) for v in naive_overlap(logits.double(), rows, probs.double())]
    assert_close(shared, expected[0], torch.float32)
    assert_close(likelihood, expected[1], torch.float32)


def test_overlap_of_whole_distributions_is_one_minus_total_variation() -> None:
    logits = torch.tensor([[0.0, math.log(2.0), math.log(5.0)]] * 3)  # 1/8, 2/8, 5/8
    probs = torch.tensor([[0.125, 0.25, 0.625], [0.5, 0.5, 0.0], [1.0, 0.0, 0.0]])
    shared, likelihood = overlap(logits, torch.arange(3).expand(3, 3), probs)
    torch.testing.assert_close(shared, torch.tensor([1.0, 0.375, 0.125]))
    assert float(likelihood[2]) == pytest.approx(math.log(0.125))


def test_tokens_that_the_draft_lacks_give_no_gradient() -> None:
    logits = torch.randn(2, 5, requires_grad=True)
    shared, likelihood = overlap(logits, torch.full((2, 3), -1), torch.full((2, 3), 0.3))
    (shared + likelihood).sum().backward()
    assert shared.tolist() == [0.0, 0.0] and likelihood.tolist() == [0.0, 0.0]
    assert logits.grad is not None and not logits.grad.any()


def bits(text: str) -> np.ndarray:
    return np.array([c == "1" for c in text])


@pytest.mark.parametrize(
    ("text", "gamma", "expected"),
    [
        # The first token comes from the prompt; then [11]0, [11]1.
        ("0110111", 2, Counts(2, 4, 4)),
        # [1] 1, [0], [1] 1, and the last token needs no draft.
        ("1110111", 1, Counts(4, 3, 2)),
        ("0000", 8, Counts(3, 3, 0)),  # blocks of 2, 1 and 0 tokens
        ("1111", 8, Counts(1, 2, 2)),
        ("111", 0, Counts(2, 0, 0)),
        ("1", 4, Counts(0, 0, 0)),
    ],
)
def test_counts_by_hand(text: str, gamma: int, expected: Counts) -> None:
    counts = count_accepted([bits(text)], gamma)
    assert counts == expected and counts.tokens == len(text) - 1
    assert counts.acceptance == (expected.accepted / (expected.drafted or 1))


def step_by_step(agreed: list[bool], gamma: int) -> Counts:
    """Every token on its own."""
    steps = drafted = accepted = 0
    produced = 1
    while produced < len(agreed):
        steps += 1
        room = len(agreed) - produced
        block = agreed[produced : produced + gamma][: room - 1]
        drafted += len(block)
        for agrees in block:
            if not agrees:
                break
            accepted += 1
            produced += 1
        produced += 1
    return Counts(steps, drafted, accepted)


@pytest.mark.parametrize("gamma", [0, 1, 3, 8, 15])
def test_counts_of_many_sequences_add_up(gamma: int) -> None:
    draw = np.random.default_rng(gamma)
    texts = [draw.random(int(n)) < 0.7 for n in draw.integers(1, 60, size=200)]
    each = [step_by_step(text.tolist(), gamma) for text in texts]
    expected = Counts(*(sum(getattr(c, n) for c in each) for n in ("steps", "drafted", "accepted")))
    assert count_accepted(texts, gamma) == expected


@pytest.fixture(scope="module")
def trained(new_trainer: Callable[..., Trainer]) -> Trainer:
    """A trainer whose student has the weights that a draft's file would hold."""
    trainer = new_trainer()
    trainer.run(40)
    with torch.no_grad():
        for tensor in trainer.student.trainable().values():
            tensor.copy_(rounded(tensor))
    return trainer


@pytest.fixture(scope="module")
def draft(trained: Trainer, target: LlamaDecoder) -> LlamaDecoder:
    tensors = {name: t.detach() for name, t in trained.student.trainable().items()}
    return target.slice_draft(tensors, LAYERS, HEAD, name="draft")


def sequence(examples: Examples, i: int) -> list[int]:
    start = int(examples.starts[i])
    return examples.tokens[start : start + int(examples.lengths[i])].tolist()


def said(draft: LlamaDecoder, id_map: Tensor, examples: Examples, i: int) -> np.ndarray:
    """Where the draft's likeliest token is the response's."""
    tokens, start = torch.tensor([sequence(examples, i)]), int(examples.prompt_lengths[i])
    logits = draft.forward(tokens[:, :-1], [0], draft.new_cache(1, tokens.numel()))
    choice: np.ndarray = (id_map[logits[0, start - 1 :].argmax(dim=1)] == tokens[0, start:]).numpy()
    return choice


@pytest.fixture(scope="module")
def greedy(shard: Shard) -> list[int]:
    return [i for i in range(80) if shard.temperatures[i] == 0]


def test_the_trainer_agrees_where_the_decoder_does(
    trained: Trainer,
    draft: LlamaDecoder,
    id_map: Tensor,
    examples: Examples,
    greedy: list[int],
    in_fp32: None,
) -> None:
    (agreed,), _ = trained.agreements(sequences=greedy)
    for i, found in zip(greedy, agreed, strict=True):
        assert np.array_equal(found, said(draft, id_map, examples, i))
    assert 0.2 < np.concatenate(agreed).mean() < 0.95


@pytest.mark.parametrize("gamma", [1, 4, 8])
def test_counts_are_those_of_decoding(
    gamma: int,
    target: LlamaDecoder,
    draft: LlamaDecoder,
    id_map: Tensor,
    examples: Examples,
    greedy: list[int],
) -> None:
    """Steps and tokens of every sequence; drafts too where the length limit ended it.

    A draft does not know that the target will end a sequence and drafts on past that place.
    """
    prompts = [sequence(examples, i)[: int(examples.prompt_lengths[i])] for i in greedy]
    limit = SamplingParams(max_new_tokens=int((examples.lengths - examples.prompt_lengths).max()))
    capacity = max(map(len, prompts)) + limit.max_new_tokens
    loop = EagerLoop(target, draft, batch=len(greedy), capacity=capacity, id_map=id_map.int())
    batch = RequestBatch.build(
        prompts,
        [limit] * len(greedy),
        eos_ids=[EOS],
        max_length=capacity,
        device=target.device,
    )
    found = [Counts(0, 0, 0)] * len(greedy)
    tokens = [list(prompt) for prompt in prompts]
    for records in loop.run(batch, parse_policy(f"fixed:{gamma}").pack("fp32")):
        for record in records:
            tokens[record.row] += record.tokens
            if record.gamma >= 0:
                old = found[record.row]
                found[record.row] = Counts(
                    old.steps + 1, old.drafted + record.gamma, old.accepted + record.accepted
                )
    assert tokens == [sequence(examples, i) for i in greedy]
    by_end: dict[bool, int] = {True: 0, False: 0}
    for i, counts in zip(greedy, found, strict=True):
        expected = count_accepted([said(draft, id_map, examples, i)], gamma)
        ended = sequence(examples, i)[-1] == EOS
        by_end[ended] += 1
        assert counts.steps == expected.steps
        if not ended:
            assert counts == expected
    assert min(by_end.values()) >= 5


def table(milliseconds: list[float], slopes: list[float]) -> CostTable:
    return CostTable(tuple(milliseconds), tuple(slopes))


def test_speedup_by_hand() -> None:
    agreed = [bits("0" + "1" * 8)]
    linear = [10.0 + 2 * g for g in range(16)]
    # Eight plain steps take 80 ms; γ = 7 needs one of 24 ms, γ = 3 two of 16 ms.
    assert predict_speedup(agreed, table(linear, [0.0] * 16), 100) == (7, pytest.approx(80 / 24))
    steep = [10.0 + 2 * g if g <= 3 else 100.0 for g in range(16)]
    assert predict_speedup(agreed, table(steep, [0.0] * 16), 100) == (3, pytest.approx(80 / 32))
    growing = table(linear, [0.05] * 16)  # 5 ms more at a context of 100
    assert predict_speedup(agreed, growing, 100) == (7, pytest.approx(120 / 29))
    dear = table(linear, [0.1 * g for g in range(16)])
    assert predict_speedup(agreed, dear, 100) == (0, 1.0)
    assert predict_speedup(agreed, dear, 0) == (7, pytest.approx(80 / 24))


def test_a_draft_that_is_never_right_is_not_used() -> None:
    cost = table([10.0 + 2 * g for g in range(16)], [0.0] * 16)
    assert predict_speedup([bits("0" * 20)], cost, 0) == (0, 1.0)
    assert predict_speedup([bits("1")], cost, 0) == (0, 1.0)
