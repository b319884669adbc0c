"""Prompts to train a draft on: a deterministic generator, and a user's own file.

The generator expands grammars, one for each task, kept as JSON under ``speckv/data/training``. A
grammar maps the name of a rule to its alternatives; ``prompt`` is where a text starts. Alternatives
hold slots:

``{rule}``
    An alternative of that rule. Within one text the same slot always gives the same words, so that
    a passage stays about one town and one person.
``{rule#2}``
    Another alternative of the rule than its other slots gave.
``{name:3..40}``, ``{name:10..90:5}``
    A new whole number from a range, both ends included, with a step; ``{name}`` repeats it.
``{^slot}``, ``{a slot}``
    With a capital first letter; with the article "a" or "an".

Evaluation prompts never come out, nor texts that contain one or are part of one.
"""

from __future__ import annotations

import codecs
import json
import random
import re
from collections.abc import Iterator
from functools import cache
from importlib import resources
from itertools import islice
from pathlib import Path

from ..prompts import EVALUATION, TASKS, Prompt

Grammar = dict[str, list[str]]

_SLOT = re.compile(
    r"\{(?P<form>\^|a )?(?P<name>(?P<rule>[a-z_]+)(?:#\d)?)"
    r"(?::(?P<low>\d+)\.\.(?P<high>\d+)(?::(?P<step>\d+))?)?\}"
)
# What is spoken with a vowel first: "an owl", "an 11-year-old", "an R script", but "a user".
_VOWEL = re.compile(r"(?!u(?:se|ni))[aeiou]|8|1[18]\b|R\b", re.IGNORECASE)
_TRIES = 1000  # texts of one task in a row that were all known before it counts as used up
# Shares of texts that are asked politely, end in an extra wish, or are typed carelessly.
_POLITE, _WISH, _CARELESS = 0.15, 0.15, 0.12


def training_prompts(count: int, *, seed: int = 0) -> list[Prompt]:
    """Distinct prompts, the tasks of ``TASKS`` taking turns.

    The same arguments give the same prompts on every machine and Python version, and a smaller
    ``count`` gives the beginning of a larger one's list.

    Raises
    ------
    ValueError
        ``count`` is negative, or more than the grammars can give.
    """
    if count < 0:
        raise ValueError(f"count: expected at least 0, got {count}")
    turns = -(-count // len(TASKS))
    tasks = [list(islice(_stream(task, seed), turns)) for task in TASKS]
    prompts = [prompt for turn in zip(*tasks, strict=False) for prompt in turn]
    if len(prompts) < count:
        raise ValueError(f"count: expected at most {len(prompts)} with seed {seed}, got {count}")
    return prompts[:count]


def _stream(task: str, seed: int) -> Iterator[Prompt]:
    """Distinct prompts of one task until its grammar seems used up."""
    rng = random.Random(f"{task} {seed}")
    grammar = load_grammar(task)
    seen: set[str] = set()
    misses = 0
    while misses < _TRIES:
        text = _dress(_Expansion(grammar, rng).of("prompt"), grammar, rng)
        key = normalise(text)
        if key in seen or overlaps_evaluation(key):
            misses += 1
            continue
        misses = 0
        seen.add(key)
        yield Prompt(task, text)


@cache
def load_grammar(task: str) -> Grammar:
    """The rules of a task together with those that all tasks share."""
    rules: Grammar = {}
    for name in ("shared", task):
        rules |= _load_rules(name)
    return rules


@cache
def load_openings() -> dict[str, list[str]]:
    """First words of prompts, by task, for a model to go on from."""
    return _load_rules("openings")


def _load_rules(name: str) -> Grammar:
    folder = resources.files("speckv").joinpath("data", "training")
    rules: Grammar = json.loads(folder.joinpath(f"{name}.json").read_text(encoding="utf-8"))
    return rules


def _pick(rng: random.Random, count: int) -> int:
    """A whole number below ``count``, by the one method Python promises never to change."""
    return int(rng.random() * count)


class _Expansion:
    """One text in the making: the grammar and what its slots have become so far."""

    def __init__(self, grammar: Grammar, rng: random.Random) -> None:
        self._grammar = grammar
        self._rng = rng
        self._filled: dict[str, str] = {}
        self._taken: dict[str, set[str]] = {}

    def of(self, rule: str) -> str:
        """An alternative of the rule that no slot of this text has taken, expanded."""
        taken = self._taken.setdefault(rule, set())
        choices = [text for text in self._grammar[rule] if text not in taken]
        chosen = choices[_pick(self._rng, len(choices))]
        taken.add(chosen)
        return _SLOT.sub(self._fill, chosen)

    def _fill(self, slot: re.Match[str]) -> str:
        name = slot["name"]
        if slot["low"] is not None:
            values = range(int(slot["low"]), int(slot["high"]) + 1, int(slot["step"] or 1))
            self._filled[name] = str(values[_pick(self._rng, len(values))])
        elif name not in self._filled:
            self._filled[name] = self.of(slot["rule"])
        text = self._filled[name]
        if slot["form"] == "^":
            return text[:1].upper() + text[1:]
        if slot["form"] == "a ":
            return f"an {text}" if _VOWEL.match(text) else f"a {text}"
        return text


def _dress(text: str, grammar: Grammar, rng: random.Random) -> str:
    """Vary how a text is put: politeness, a wish at its end, careless typing."""
    polite, wish, careless = rng.random(), rng.random(), rng.random()
    one_line = "\n" not in text
    if polite < _POLITE and text.split(maxsplit=1)[0] in grammar["imperative"]:
        opening = grammar["polite"][_pick(rng, len(grammar["polite"]))]
        text = f"{opening} {text[0].lower()}{text[1:]}"
        if opening.startswith(("Can", "Could", "Would")) and re.fullmatch(r"[^.?!]*\.", text):
            text = text[:-1] + "?"
    if one_line and wish < _WISH:
        text = f"{text} {grammar['wish'][_pick(rng, len(grammar['wish']))]}"
    if one_line and careless < _CARELESS:
        text = text[0].lower() + text[1:]
        if careless < _CARELESS / 2:
            text = text.rstrip(".?!")
    return text


def normalise(text: str) -> str:
    """The words of a text, in lower case, without punctuation, one space between them."""
    return " ".join(re.findall(r"\w+", text.casefold()))


@cache
def _evaluation() -> tuple[list[str], str]:
    texts = [normalise(text) for texts in EVALUATION.values() for text in texts]
    return texts, "\n".join(texts)


def overlaps_evaluation(normalised: str) -> bool:
    """Whether a normalised text contains an evaluation prompt or is part of one."""
    texts, joined = _evaluation()
    return normalised in joined or any(text in normalised for text in texts)


def load_prompts(path: Path | str) -> list[Prompt]:
    """A user's prompts.

    Parameters
    ----------
    path : path
        ``.txt``: one prompt a line. ``.jsonl``: objects ``{"prompt": ..., "task": ...}`` a line,
        the task optional. Blank lines are skipped; a prompt without a task gets ``"user"``.

    Raises
    ------
    ValueError
        Another kind of file, no prompts in it, or a malformed line, which is named.
    OSError
        The file cannot be read.
    """
    path = Path(path)
    kind = path.suffix.lower()
    if kind not in (".txt", ".jsonl"):
        raise ValueError(f"prompts: expected a .txt or .jsonl file, got {path.name}")
    data = path.read_bytes().removeprefix(codecs.BOM_UTF8)
    try:
        # Not splitlines(): a JSON string may hold what it takes for the end of a line.
        lines = data.decode("utf-8").split("\n")
    except UnicodeDecodeError as error:
        line = data.count(b"\n", 0, error.start) + 1
        raise ValueError(f"{path.name}, line {line}: expected UTF-8 text") from None
    parse = _parse_json if kind == ".jsonl" else _parse_text
    prompts = [
        parse(line.strip(), f"{path.name}, line {number}")
        for number, line in enumerate(lines, start=1)
        if line.strip()
    ]
    if not prompts:
        raise ValueError(f"{path.name}: expected at least one prompt, found none")
    return prompts


def _parse_text(line: str, where: str) -> Prompt:
    return Prompt("user", line)


def _parse_json(line: str, where: str) -> Prompt:
    try:
        row = json.loads(line)
    except (ValueError, RecursionError):
        raise ValueError(f"{where}: expected a JSON object") from None
    if not isinstance(row, dict):
        raise ValueError(f"{where}: expected a JSON object, got {type(row).__name__}")
    return Prompt(
        _text(row.get("task", "user"), "task", where), _text(row.get("prompt"), "prompt", where)
    )


def _text(value: object, name: str, where: str) -> str:
    if not isinstance(value, str) or not value.strip():
        raise ValueError(f'{where}: expected "{name}" to be a text that is not empty')
    if any("\ud800" <= character <= "\udfff" for character in value):
        raise ValueError(f'{where}: expected "{name}" to be Unicode, got half a surrogate pair')
    return value
