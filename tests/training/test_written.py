"""Prompts that a target writes itself: what is kept, and files that survive interruption."""

from __future__ import annotations

import copy
import json
from pathlib import Path
from typing import Any

import pytest

from speckv.errors import SpeckvError
from speckv.models.llama import LlamaDecoder
from speckv.prompts import EVALUATION, TASKS
from speckv.training import written as module
from speckv.training.prompts import load_openings
from speckv.training.written import written_prompts

Loaded = tuple[LlamaDecoder, Any]
OPENINGS = {task: ["w7 w8", "w9"] for task in TASKS}


@pytest.fixture
def chatty(loaded: Loaded, monkeypatch: pytest.MonkeyPatch) -> Loaded:
    """The tiny target, a template that begins with w5, and openings in its words; parts of 16."""
    target, tokenizer = loaded
    tokenizer = copy.deepcopy(tokenizer)
    tokenizer.chat_template = "w5 w6 {{ messages[0]['content'] }} w3"
    monkeypatch.setattr(module, "load_openings", lambda: OPENINGS)
    monkeypatch.setattr(module, "_PART_PROMPTS", 16)
    return target, tokenizer


def tries(root: Path) -> list[tuple[str, str]]:
    (folder,) = root.iterdir()
    return [pair for path in sorted(folder.glob("*.json")) for pair in json.loads(path.read_text())]


def test_prompts_begin_as_told_and_end_themselves(chatty: Loaded, tmp_path: Path) -> None:
    told: list[tuple[int, int]] = []
    found = written_prompts(*chatty, 64, tmp_path, advance=lambda *by: told.append(by))
    assert 5 < len(found) < 64, "some did not end"
    for prompt in found:
        assert prompt.text.startswith(tuple(OPENINGS[prompt.task]))
        assert len(prompt.text.split()) >= 3 and "w5 w6" not in prompt.text[:6]
    assert len({prompt.text for prompt in found}) == len(found)
    assert {prompt.task for prompt in found} == set(TASKS)
    assert sum(texts for texts, _ in told) == 64


def test_a_longer_list_begins_with_the_shorter_one(chatty: Loaded, tmp_path: Path) -> None:
    few = written_prompts(*chatty, 16, tmp_path)
    more = written_prompts(*chatty, 33, tmp_path)
    assert more[: len(few)] == few and len(more) > len(few)
    (folder,) = tmp_path.iterdir()
    assert len(list(folder.glob("*.json"))) == 3
    assert written_prompts(*chatty, 33, tmp_path / "other") == more
    assert written_prompts(*chatty, 33, tmp_path, seed=1) != more


def test_what_is_there_is_not_written_again(
    chatty: Loaded, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    found = written_prompts(*chatty, 32, tmp_path)

    def refuse(*args: object, **options: object) -> None:
        raise AssertionError("generated again")

    monkeypatch.setattr(module, "continue_texts", refuse)
    assert written_prompts(*chatty, 32, tmp_path) == found
    (folder,) = tmp_path.iterdir()
    (folder / "part-00001.json").write_text("[")
    with pytest.raises(SpeckvError, match="part-00001.json: damaged; delete it"):
        written_prompts(*chatty, 32, tmp_path)


def test_what_is_of_no_use_is_dropped(chatty: Loaded, tmp_path: Path) -> None:
    written_prompts(*chatty, 16, tmp_path)
    (folder,) = tmp_path.iterdir()
    evaluation = EVALUATION["chat"][0]
    texts = ["one two three", "One two, three!", "two words", "a b \ufffd c", evaluation, " d e f "]
    pairs = [["chat", text] for text in texts]
    (folder / "part-00000.json").write_text(json.dumps(pairs))
    kept = written_prompts(*chatty, 16, tmp_path)
    assert [prompt.text for prompt in kept] == ["one two three", "d e f"]


def test_a_template_is_needed(loaded: Loaded, chatty: Loaded, tmp_path: Path) -> None:
    target, plain = loaded
    with pytest.raises(ValueError, match="expected a chat template, this tokenizer has none"):
        written_prompts(target, plain, 8, tmp_path)
    silent = copy.deepcopy(chatty[1])
    silent.chat_template = "{{ messages[0]['content'] | upper }}"
    with pytest.raises(ValueError, match="expected a chat template that shows what the user says"):
        written_prompts(target, silent, 8, tmp_path)
    assert written_prompts(target, plain, 0, tmp_path) == []
    assert not list(tmp_path.iterdir())


def test_the_openings_cover_every_task() -> None:
    openings = load_openings()
    assert set(openings) == set(TASKS)
    assert all(len(set(texts)) >= 15 for texts in openings.values())
