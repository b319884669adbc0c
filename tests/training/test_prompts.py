"""Prompts: the evaluation set, the generator's promises, and a user's file."""

from __future__ import annotations

import hashlib
import json
import re
from collections import Counter
from functools import cache
from importlib import resources
from pathlib import Path

import pytest

from speckv.prompts import EVALUATION, TASKS, Prompt, evaluation_prompts
from speckv.training import prompts as module
from speckv.training.prompts import load_grammar, load_prompts, normalise, training_prompts

# SHA-256 of the first thousand texts of seed 0, joined by NUL.
FIRST_1000 = "4aecba980b81388eb88094070f7c93fc2e85010092a2f0166c48cd4bca366417"
SLOT = re.compile(r"\{(?:\^|a )?([a-z_]+)(?:#\d)?(:\d+\.\.\d+(?::\d+)?)?\}")


@cache
def many(seed: int) -> list[Prompt]:
    return training_prompts(20_000, seed=seed)


def test_evaluation_set() -> None:
    assert tuple(EVALUATION) == TASKS
    assert all(25 <= len(texts) <= 30 for texts in EVALUATION.values())
    every = [normalise(text) for texts in EVALUATION.values() for text in texts]
    assert len(set(every)) == len(every)
    assert all(text == text.strip() for texts in EVALUATION.values() for text in texts)


def test_evaluation_tasks_take_turns() -> None:
    assert evaluation_prompts(2) == [Prompt(t, EVALUATION[t][i]) for i in (0, 1) for t in TASKS]
    every = evaluation_prompts()
    assert len(every) == sum(map(len, EVALUATION.values()))
    assert every[:8] == evaluation_prompts(2)


def test_some_prompts_can_be_left_out() -> None:
    every = evaluation_prompts(5)
    assert evaluation_prompts(3, skip=2) == every[2 * len(TASKS) :]
    rest = evaluation_prompts(skip=2)
    assert rest[: 3 * len(TASKS)] == every[2 * len(TASKS) :]
    assert len(rest) == len(evaluation_prompts()) - 2 * len(TASKS)
    most = min(map(len, EVALUATION.values()))
    with pytest.raises(ValueError, match="^per_task: expected 1 to 2, got 3$"):
        evaluation_prompts(3, skip=most - 2)
    for skip in (-1, most):
        with pytest.raises(ValueError, match=rf"^skip: expected 0 to {most - 1}, got {skip}$"):
            evaluation_prompts(1, skip=skip)


@pytest.mark.parametrize("per_task", [0, -1, 31])
def test_evaluation_refuses_a_wrong_size(per_task: int) -> None:
    with pytest.raises(ValueError, match=rf"^per_task: expected 1 to \d+, got {per_task}$"):
        evaluation_prompts(per_task)


def test_the_first_thousand_never_change() -> None:
    """The same bytes on every machine and Python version."""
    texts = "\0".join(prompt.text for prompt in training_prompts(1000))
    assert hashlib.sha256(texts.encode()).hexdigest() == FIRST_1000


def test_counts_and_turns() -> None:
    prompts = training_prompts(10)
    assert [prompt.task for prompt in prompts] == [*TASKS, *TASKS, *TASKS[:2]]
    assert prompts == many(0)[:10]
    assert training_prompts(0) == []
    assert len(many(0)) == 20_000


@pytest.mark.parametrize("seed", [0, 1, 2**40])
def test_all_differ_and_none_is_an_evaluation_prompt(seed: int) -> None:
    words = {normalise(prompt.text) for prompt in many(seed)}
    assert len(words) == 20_000
    evaluation = [normalise(prompt.text) for prompt in evaluation_prompts()]
    whole = "\n".join(evaluation)
    assert not [w for w in words if w in whole or any(text in w for text in evaluation)]


def test_seeds_differ() -> None:
    shared = {prompt.text for prompt in many(0)} & {prompt.text for prompt in many(1)}
    assert len(shared) < 8_000


def test_texts_are_whole() -> None:
    for prompt in many(0):
        assert prompt.text == prompt.text.strip() and len(prompt.text) > 5
        if prompt.task != "code":
            assert not re.search(r"[{}#]|  ", prompt.text), prompt.text


@pytest.mark.parametrize("task", TASKS)
def test_openings_vary(task: str) -> None:
    """A text's first three words are one of more than a hundred, and none is in a tenth of them."""
    texts = [normalise(prompt.text) for prompt in many(0) if prompt.task == task]
    openings = Counter(" ".join(text.split()[:3]) for text in texts)
    assert len(openings) > 100
    assert openings.most_common(1)[0][1] < len(texts) / 10


@pytest.mark.parametrize("task", TASKS)
def test_every_rule_is_defined_and_used(task: str) -> None:
    grammar, shared = load_grammar(task), set(_shared())
    used = {"prompt", "imperative", "polite", "wish"}
    for rule, alternatives in grammar.items():
        # Only in these two does an alternative stand more than once, to come more often.
        assert rule in ("prompt", "language") or len(set(alternatives)) == len(alternatives)
        slots = [slot for text in alternatives for slot in SLOT.finditer(text)]
        numbers = {slot[1] for slot in slots if slot[2]}
        names = {slot[1] for slot in slots if not slot[2]} - numbers
        assert names <= set(grammar)
        used |= names
    assert set(grammar) - used <= shared


def _shared() -> dict[str, list[str]]:
    file = resources.files("speckv").joinpath("data", "training", "shared.json")
    rules: dict[str, list[str]] = json.loads(file.read_text(encoding="utf-8"))
    return rules


def test_articles_and_distinct_alternatives(monkeypatch: pytest.MonkeyPatch) -> None:
    grammar = {
        "prompt": ["{a item} and {a item#2}, {^item}, {n:8..8}, {n} {a n:11..11}"],
        "item": ["owl", "user"],
        "imperative": [],
        "polite": [""],
        "wish": [""],
    }
    monkeypatch.setattr(module, "load_grammar", lambda task: grammar)
    monkeypatch.setattr(module, "_WISH", 0)
    monkeypatch.setattr(module, "_CARELESS", 0)
    texts = {prompt.text for prompt in training_prompts(8)}
    assert texts == {"an owl and a user, Owl, 8, 8 an 11", "a user and an owl, User, 8, 8 an 11"}


def test_generator_skips_evaluation_prompts(monkeypatch: pytest.MonkeyPatch) -> None:
    known = EVALUATION["math"][2]
    grammar = {
        "prompt": [known, f"Hello. {known.upper()} Thanks!", known[:30], "Something else."],
        "imperative": [],
        "wish": [""],
    }
    monkeypatch.setattr(module, "load_grammar", lambda task: grammar)
    monkeypatch.setattr(module, "_WISH", 0)
    monkeypatch.setattr(module, "_CARELESS", 0)
    assert [prompt.text for prompt in training_prompts(4)] == ["Something else."] * 4
    with pytest.raises(ValueError, match="^count: expected at most 4 with seed 0, got 5$"):
        training_prompts(5)


def test_generator_refuses_a_negative_count() -> None:
    with pytest.raises(ValueError, match="^count: expected at least 0, got -1$"):
        training_prompts(-1)


def test_text_file(tmp_path: Path) -> None:
    path = tmp_path / "mine.TXT"
    path.write_bytes("\ufeffWrite a poem.\r\n\n  Was ist \u2028neu?  \n".encode())
    assert load_prompts(path) == [
        Prompt("user", "Write a poem."),
        Prompt("user", "Was ist \u2028neu?"),
    ]


def test_json_lines(tmp_path: Path) -> None:
    path = tmp_path / "mine.jsonl"
    path.write_text('{"prompt": "Hi\\nthere", "task": "chat", "id": 3}\n\n{"prompt": "2+2?"}\n')
    assert load_prompts(str(path)) == [Prompt("chat", "Hi\nthere"), Prompt("user", "2+2?")]


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("a.txt", b"", "a.txt: expected at least one prompt, found none"),
        ("a.txt", b" \n\n", "a.txt: expected at least one prompt, found none"),
        ("a.jsonl", b"", "a.jsonl: expected at least one prompt, found none"),
        ("a.txt", b"good\nb\xffd\n", "a.txt, line 2: expected UTF-8 text"),
        ("a.jsonl", b'{"prompt": "x"}\n\n{"prompt"', "a.jsonl, line 3: expected a JSON object"),
        ("a.jsonl", b"[1]", "a.jsonl, line 1: expected a JSON object, got list"),
        ("a.jsonl", b"[" * 100_000, "a.jsonl, line 1: expected a JSON object"),
        ("a.jsonl", b'{"text": "x"}', 'line 1: expected "prompt" to be a text that is not empty'),
        ("a.jsonl", b'{"prompt": " "}', 'line 1: expected "prompt" to be a text that is not empty'),
        ("a.jsonl", b'{"prompt": "x", "task": 1}', 'line 1: expected "task" to be a text'),
        ("a.jsonl", b'{"prompt": "\\ud800"}', 'line 1: expected "prompt" to be Unicode, got half'),
        ("a.csv", b"x", "prompts: expected a .txt or .jsonl file, got a.csv"),
    ],
)
def test_bad_files(tmp_path: Path, name: str, content: bytes, message: str) -> None:
    (tmp_path / name).write_bytes(content)
    with pytest.raises(ValueError) as caught:
        load_prompts(tmp_path / name)
    assert message in str(caught.value) and "\n" not in str(caught.value)
