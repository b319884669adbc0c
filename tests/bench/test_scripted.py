"""What a scripted pair says has the recorded signals, and the loop takes what was right."""

from __future__ import annotations

import math

import pytest
import torch

from bench.scripted import ScriptedDraft, ScriptedTarget, logits_of, scripts
from speckv.decoding.eager import EagerLoop
from speckv.decoding.requests import RequestBatch
from speckv.policies import parse_policy
from speckv.sampling import SamplingParams
from tests.decoding.tiny import wrapped
from tests.traces.synthetic import made_up_trace

VOCABULARY = 4001


@pytest.mark.parametrize(
    ("confidence", "margin", "entropy"),
    [(0.5, 0.25, 2.5), (0.9, 0.85, 0.8), (0.2, 0.05, 6.0), (0.999, 0.9985, 0.015), (0.4, 0.1, 3.3)],
)
def test_rows_have_their_signals(confidence: float, margin: float, entropy: float) -> None:
    p = logits_of(confidence, entropy, margin, 7, VOCABULARY).double().softmax(0)
    top = p.topk(2).values
    assert int(p.argmax()) == 7
    assert top[0] == pytest.approx(confidence, rel=1e-5)
    assert top[0] - top[1] == pytest.approx(margin, rel=1e-4)
    found = -torch.special.xlogy(p, p).sum() / math.log(2)
    assert found == pytest.approx(entropy, rel=0.02, abs=0.01)


def test_rows_at_the_edges() -> None:
    certain = logits_of(1.0, 0.0, 1.0, 3, VOCABULARY).softmax(0)
    assert certain[3] == 1.0 and certain.sum() == 1.0
    two = logits_of(0.6, 0.97, 0.2, 3, VOCABULARY).softmax(0)
    assert two[3] == pytest.approx(0.6) and two[4] == pytest.approx(0.4, abs=1e-3)
    flat = logits_of(1e-3, 20.0, 0.0, VOCABULARY - 1, VOCABULARY).softmax(0)
    assert flat.sum() == pytest.approx(1.0, rel=1e-4) and flat.max() == flat[VOCABULARY - 1]


def test_scripts_of_a_trace() -> None:
    trace = made_up_trace(prompts=6, length=20, compressions=("fp32",), temperatures=(0.0,))
    said = scripts(trace, "fp32", 16, 2, 50)
    for script in said:
        assert len(script.answer) == len(script.proposed) == len(script.margin) == 16
    index = next(i for i, n in enumerate(trace.lengths) if n >= 16)
    rows = slice(int(trace.first[index]), int(trace.first[index]) + 16)
    right = trace.rows.accepted[rows] > 0
    pairs = zip(said[0].answer, said[0].proposed, strict=True)
    assert [a == b for a, b in pairs] == right.tolist()
    with pytest.raises(ValueError, match="expected 99 greedy answers of 16 positions in fp32"):
        scripts(trace, "fp32", 16, 99, 50)


def test_a_loop_takes_what_was_right() -> None:
    """The text is the recorded one, and a step accepts up to the first recorded error."""
    trace = made_up_trace(prompts=6, length=20, compressions=("fp32",), temperatures=(0.0,))
    models = wrapped("llama", "target", "fp32"), wrapped("llama", "perturbed", "fp32")
    (script,) = scripts(trace, "fp32", 16, 1, 50)
    target, draft = ScriptedTarget(models[0], 64), ScriptedDraft(models[1], 64)
    target.follow(script)
    draft.follow(script)
    requests = RequestBatch.build(
        [script.prompt],
        [SamplingParams(max_new_tokens=16, ignore_eos=True)],
        eos_ids=[],
        max_length=64,
        device=torch.device("cpu"),
    )
    loop = EagerLoop(target, draft, batch=1, capacity=64)
    records = [r for told in loop.run(requests, parse_policy("fixed:4").pack()) for r in told]
    assert [t for r in records for t in r.tokens] == script.answer
    place = 1
    for record in records[1:]:
        drafted = script.proposed[place : place + record.gamma]
        agreed = [a == b for a, b in zip(drafted, script.answer[place:], strict=False)]
        assert record.accepted == [*agreed, False].index(False)
        place += len(record.tokens)
