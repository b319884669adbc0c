"""A pair's figures by hand, and the gate on its token ids."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest

from bench import pair
from speckv.decoding.stats import Stats
from speckv.prompts import Prompt
from speckv.results import Result


def row(task: str, plain: float, other: float, drafted: int, accepted: int) -> dict[str, Any]:
    """A prompt of ten tokens."""
    steps = 10 - accepted
    return {
        "task": task,
        "tokens": 10,
        "runs": {
            pair.PLAIN: {"seconds": plain, "steps": 10, "drafted": 0, "accepted": 0},
            "p": {"seconds": other, "steps": steps, "drafted": drafted, "accepted": accepted},
        },
    }


ROWS = [row("code", 2.0, 1.0, 8, 6), row("math", 3.0, 1.0, 8, 2), row("code", 4.0, 1.0, 4, 0)]


def test_a_summary_by_hand() -> None:
    found = pair.summary(ROWS, "p")
    assert list(found) == ["all", "code", "math"]
    assert found["all"] | {"ratio_95": None} == {
        "ratio": 3.0,
        "ratio_95": None,
        "tokens_per_second": 10.0,
        "acceptance": 0.4,
        "tokens_per_step": 30 / 22,
    }
    assert found["all"]["ratio_95"] == [2.0, 4.0]
    assert (found["code"]["ratio"], found["code"]["acceptance"]) == (3.0, 0.5)
    assert found["math"] == {
        "ratio": 3.0,
        "ratio_95": [3.0, 3.0],
        "tokens_per_second": 10.0,
        "acceptance": 0.25,
        "tokens_per_step": 1.25,
    }
    assert pair.summary(ROWS, pair.PLAIN)["all"]["acceptance"] is None


class FakeEngine:
    """Says the prompt again; under one policy another last token, from the second prompt on."""

    def __init__(self, wrong: str | None = None) -> None:
        self.wrong = wrong
        self.asked: list[str] = []

    def encode(self, text: str, chat: bool) -> list[int]:
        assert chat
        return [int(word) for word in text.split()]

    def generate(self, prompt: list[int], params: Any, policy: str) -> Result:
        self.asked.append(policy)
        ids = [*prompt[:-1], -1] if policy == self.wrong and prompt[0] > 1 else prompt
        stats = Stats(prompt_tokens=len(prompt), steps=[(4, 3), (2, 0)])
        return Result("", ids, "stop", stats, prompt, None)

    def describe(self) -> str:
        return "fake"


PROMPTS = [Prompt("code", "1 2"), Prompt("math", "2 3"), Prompt("code", "3 4")]


def measured(engine: FakeEngine, monkeypatch: pytest.MonkeyPatch) -> dict[str, Any]:
    monkeypatch.setattr(pair, "environment", lambda: {"device": "cpu"})
    clock = iter(range(100))
    monkeypatch.setattr(pair, "time", SimpleNamespace(perf_counter=lambda: next(clock)))
    return pair.measure(engine, ["a", "b"], PROMPTS, 8)  # type: ignore[arg-type]


def test_prompts_run_plainly_and_under_each_policy(monkeypatch: pytest.MonkeyPatch) -> None:
    engine = FakeEngine()
    document = measured(engine, monkeypatch)
    plain = pair.PLAIN
    assert engine.asked == [plain, "a", "b"] + [plain, "a", "b", "a", "b", plain, "b", plain, "a"]
    assert [r["task"] for r in document["prompts"]] == ["code", "math", "code"]
    run = document["prompts"][0]["runs"]["a"]
    assert (run["seconds"], run["steps"], run["drafted"], run["accepted"]) == (1, 2, 6, 3)
    assert set(document["policies"]) == {"a", "b"}
    assert document["policies"]["b"]["all"]["ratio"] == 1.0


def test_other_tokens_print_no_number(monkeypatch: pytest.MonkeyPatch) -> None:
    message = "^b: token ids differ from plain decoding's on prompt 1$"
    with pytest.raises(RuntimeError, match=message):
        measured(FakeEngine("b"), monkeypatch)


def test_prompts_that_the_policy_has_learned_from() -> None:
    card = {"prompts": {"fitted": [0, 3], "validated": [5]}}
    trained = SimpleNamespace(_trained=SimpleNamespace(mlp=SimpleNamespace(card=card)))
    assert pair._learned_from(trained) == {0, 3, 5}  # type: ignore[arg-type]
    untrained = SimpleNamespace(_trained=None)
    with pytest.raises(ValueError, match="expected a pair with a trained policy, got none"):
        pair._learned_from(untrained)  # type: ignore[arg-type]
