"""Prompts that a target writes itself.

An instruction-tuned model that is shown the beginning of a conversation, up to where the user's
words stand, goes on with what users say. This is Magpie (Xu et al. 2024, arXiv 2406.08464). Its
prompts are far more varied than those of a grammar. Here the first words of a prompt are often
given too, so that every task is met; they are ``speckv/data/training/openings.json``.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from ..errors import SpeckvError
from ..files import write_atomically
from ..kernels.checks import dtype_name
from ..models.llama import LlamaDecoder
from ..models.pairing import eos_token_ids
from ..prompts import TASKS, Prompt
from .corpus import CorpusRecipe, continue_texts, make_files
from .prompts import load_openings, normalise, overlaps_evaluation

_FORMAT = 1
_PART_PROMPTS = 512
_FEWEST_WORDS = 3
_HERE = "\x00here\x00"


def written_prompts(
    target: LlamaDecoder,
    tokenizer: Any,
    count: int,
    root: Path,
    *,
    seed: int = 0,
    max_new_tokens: int = 160,
    advance: Callable[[int, int], None] = lambda prompts, tokens: None,
) -> list[Prompt]:
    """Prompts by the target, of ``count`` tries, the tasks of ``TASKS`` taking turns.

    A try is dropped where it does not end by itself, has fewer than three words, repeats an earlier
    one, or overlaps with an evaluation prompt. Tries are kept in files under ``root``, 512 in each;
    several processes share the work.

    Parameters
    ----------
    tokenizer : transformers tokenizer
        With a chat template.
    root : Path
        Where corpora live.
    seed : int
        Of the openings and the draws.
    max_new_tokens : int
        Length limit of a prompt, its opening not counted.
    advance : callable
        Called with the tries and the tokens that were added.

    Raises
    ------
    ValueError
        There is no chat template, or it does not show the user's words as they are.
    SpeckvError
        A file under ``root`` is damaged.
    """
    if count < 1:
        return []
    before = _before_the_user(tokenizer)
    openings = load_openings()
    recipe = CorpusRecipe(max_new_tokens=max_new_tokens, top=1, temperatures=(1.0,), seed=seed)
    facts = {
        "format": _FORMAT,
        "target": target.fingerprint,
        "compression": target.compression,
        "dtype": dtype_name(target.dtype),
        "before": before,
        "openings": openings,
        "seed": seed,
        "max_new_tokens": max_new_tokens,
    }
    key = hashlib.sha256(json.dumps(facts).encode()).hexdigest()[:16]
    folder = root / f"written-{key}"
    folder.mkdir(parents=True, exist_ok=True)
    eos = eos_token_ids(target, tokenizer)
    paths = [folder / f"part-{i:05d}.json" for i in range(-(-count // _PART_PROMPTS))]

    def make(index: int) -> None:
        first = index * _PART_PROMPTS
        opened = [_opening(openings, first + i) for i in range(_PART_PROMPTS)]
        texts = [tokenizer.encode(before + text, add_special_tokens=False) for _, text in opened]
        rows = continue_texts(target, texts, recipe, eos=eos, first=first, advance=advance)
        found = [
            (task, text + tokenizer.decode(row.tokens[row.prompt_length : -1]))
            for (task, text), row in zip(opened, rows, strict=True)
            if row.tokens[-1] in eos
        ]
        data = json.dumps(found)
        write_atomically(paths[index], lambda path: path.write_text(data, encoding="utf-8"))

    make_files(paths, make, found=lambda index: advance(_PART_PROMPTS, 0))
    return _kept([pair for path in paths for pair in _read(path)])


def _kept(found: Sequence[tuple[str, str]]) -> list[Prompt]:
    """Those that are of use, each once."""
    seen: set[str] = set()
    kept = []
    for task, text in found:
        key = normalise(text)
        if key in seen or len(key.split()) < _FEWEST_WORDS or "\ufffd" in text:
            continue
        if overlaps_evaluation(key):
            continue
        seen.add(key)
        kept.append(Prompt(task, text.strip()))
    return kept


def _opening(openings: dict[str, list[str]], place: int) -> tuple[str, str]:
    """Task and first words of a try."""
    task = TASKS[place % len(TASKS)]
    return task, openings[task][place // len(TASKS) % len(openings[task])]


def _before_the_user(tokenizer: Any) -> str:
    """A conversation up to the user's first words."""
    if not getattr(tokenizer, "chat_template", None):
        raise ValueError("written prompts: expected a chat template, this tokenizer has none")
    text = tokenizer.apply_chat_template([{"role": "user", "content": _HERE}], tokenize=False)
    before, found, _ = text.partition(_HERE)
    if not found or not before:
        raise ValueError("written prompts: expected a chat template that shows what the user says")
    return str(before)


def _read(path: Path) -> list[tuple[str, str]]:
    try:
        return [(str(task), str(text)) for task, text in json.loads(path.read_text("utf-8"))]
    except (ValueError, TypeError) as error:
        raise SpeckvError(f"{path}: damaged; delete it to have it made again") from error
