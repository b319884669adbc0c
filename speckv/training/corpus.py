"""The training text of a draft: what its target writes, with the target's own distributions.

A corpus is a folder of shards. A shard depends on its place, the recipe and the target alone (on
the CPU bit for bit: rows do not depend on their batch), is written in one rename, and is generated
by whichever process holds its lock. So an interrupted generation goes on where it stopped, and
several processes may share the work.
"""

from __future__ import annotations

import hashlib
import json
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import Any

import torch
from filelock import FileLock, Timeout
from torch import Tensor

from ..files import write_atomically
from ..models.base import CausalModel
from ..models.llama import LlamaDecoder
from ..models.pairing import eos_token_ids
from ..models.tokenizers import apply_chat_template
from ..prompts import TASKS, Prompt

_FORMAT = 1
_SHARD_PROMPTS = 512
_SLOTS = 64


@dataclass(frozen=True)
class CorpusRecipe:
    """What a corpus is made of, besides its target and its prompts.

    Attributes
    ----------
    max_new_tokens : int
        Length limit of a response.
    top : int
        Tokens kept of each of the target's distributions.
    temperatures : tuple of float
        Of the responses, taking turns; 0 is greedy.
    seed : int
        Of the prompts and the draws.
    """

    max_new_tokens: int = 256
    top: int = 32
    temperatures: tuple[float, ...] = (0.0, 0.7, 0.0, 1.0)
    seed: int = 0

    def __post_init__(self) -> None:
        for name in ("max_new_tokens", "top"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name}: expected at least 1, got {getattr(self, name)}")
        if not self.temperatures or min(self.temperatures) < 0:
            raise ValueError(
                f"temperatures: expected numbers from 0 on, got {list(self.temperatures)}"
            )
        if not 0 <= self.seed < 2**32:
            raise ValueError(f"seed: expected 0 to {2**32 - 1}, got {self.seed}")

    def temperature(self, index: int) -> float:
        """Temperature of prompt ``index``; prompts of a task get every temperature in turn."""
        return self.temperatures[index // len(TASKS) % len(self.temperatures)]


@dataclass(frozen=True)
class Shard:
    """S prompts with their responses; N tokens in all, of which M are response tokens.

    Attributes
    ----------
    tokens : int32 [N]
        Prompt and response of each sequence in turn.
    lengths, prompt_lengths : int32 [S]
        Tokens of each sequence, and how many of them are its prompt.
    tasks : list of str, S of them
    temperatures : float32 [S]
    top_ids : int32 [M, top]
        The likeliest tokens at each response position, falling; first the response of sequence 0.
    top_probs : float16 [M, top]
        Their probabilities at temperature 1.
    """

    tokens: Tensor
    lengths: Tensor
    prompt_lengths: Tensor
    tasks: list[str]
    temperatures: Tensor
    top_ids: Tensor
    top_probs: Tensor

    def save(self, path: Path) -> None:
        """Write in one rename."""
        from safetensors.torch import save_file

        tensors = {name: getattr(self, name).contiguous() for name in _TENSORS}
        metadata = {"tasks": json.dumps(self.tasks)}
        write_atomically(path, lambda temporary: save_file(tensors, temporary, metadata))

    @classmethod
    def load(cls, path: Path) -> Shard:
        """Read what `save` wrote.

        Raises
        ------
        ValueError
            The file is not a shard.
        """
        from safetensors import SafetensorError, safe_open

        try:
            with safe_open(path, framework="pt") as file:
                tensors = {name: file.get_tensor(name) for name in _TENSORS}
                return cls(tasks=json.loads(file.metadata()["tasks"]), **tensors)
        except (SafetensorError, KeyError, TypeError, ValueError) as error:
            raise ValueError(f"{path}: expected a corpus shard; delete it to remake it") from error


_TENSORS = tuple(f.name for f in fields(Shard) if f.name != "tasks")


@dataclass
class _Row:
    """A sequence on its way, with room for all that it may become.

    Tensors of a token each would break up the heap between the large ones of every step.
    """

    index: int
    slot: int
    tokens: list[int]
    prompt_length: int
    limit: int
    temperature: float
    generator: torch.Generator
    top_ids: Tensor
    top_probs: Tensor

    @property
    def response_length(self) -> int:
        """Tokens after the prompt."""
        return len(self.tokens) - self.prompt_length

    def add(self, token: int, ids: Tensor, probs: Tensor) -> None:
        """One more token, and the likeliest ones [top] of the distribution it came from."""
        self.top_ids[self.response_length] = ids
        self.top_probs[self.response_length] = probs
        self.tokens.append(token)


class Corpus:
    """A folder of shards for one target, one recipe and one list of prompts.

    Parameters
    ----------
    root : Path
        Where corpora live; this one has a folder there, named by what it depends on.
    target : LlamaDecoder
        Generates; its fingerprint is part of the name.
    tokenizer : transformers tokenizer
        Its chat template is applied if it has one.
    prompts : sequence of Prompt
    recipe : CorpusRecipe
    """

    def __init__(
        self,
        root: Path,
        target: LlamaDecoder,
        tokenizer: Any,
        prompts: Sequence[Prompt],
        recipe: CorpusRecipe,
    ) -> None:
        if not prompts:
            raise ValueError("prompts: expected at least one, got none")
        self._target, self._tokenizer = target, tokenizer
        self._prompts, self._recipe = list(prompts), recipe
        self.size = -(-len(prompts) // _SHARD_PROMPTS)
        facts = {
            "format": _FORMAT,
            "target": target.fingerprint,
            "compression": target.compression,
            "dtype": str(target.dtype),
            "recipe": asdict(recipe),
        }
        key = hashlib.sha256(json.dumps(facts).encode()).hexdigest()[:16]
        self.folder = root / key
        self._facts = facts

    def path(self, index: int) -> Path:
        """File of shard ``index``: its name tells its prompts, so longer lists reuse it."""
        texts = [p.text for p in self._part(index)]
        digest = hashlib.sha256(json.dumps(texts).encode()).hexdigest()[:12]
        return self.folder / f"shard-{index:05d}-{digest}.safetensors"

    def complete(self, advance: Callable[[int, int], None] | None = None) -> None:
        """Generate what is missing; ``advance(sequences, tokens)`` is called as it grows."""
        report = advance or (lambda sequences, tokens: None)
        self.folder.mkdir(parents=True, exist_ok=True)
        facts = json.dumps(self._facts, indent=1)
        write_atomically(self.folder / "corpus.json", lambda path: path.write_text(facts))
        held: list[int] = []
        for index in range(self.size):
            if not self._make(index, report, wait=False):
                held.append(index)
        for index in held:  # by another process, unless it died
            self._make(index, report, wait=True)

    def shards(self) -> Iterator[Shard]:
        """The shards, in order.

        Raises
        ------
        ValueError
            One is missing or broken.
        """
        for index in range(self.size):
            path = self.path(index)
            if not path.is_file():
                raise ValueError(f"{self.folder}: expected shard {index}, found none")
            yield Shard.load(path)

    def _part(self, index: int) -> list[Prompt]:
        return self._prompts[index * _SHARD_PROMPTS : (index + 1) * _SHARD_PROMPTS]

    def _make(self, index: int, report: Callable[[int, int], None], *, wait: bool) -> bool:
        """Have shard ``index``; False if another process is making it and ``wait`` is not set."""
        path, part = self.path(index), self._part(index)
        if path.is_file():
            report(len(part), 0)
            return True
        try:
            with FileLock(path.with_suffix(".lock"), timeout=-1 if wait else 0):
                if path.is_file():
                    report(len(part), 0)
                    return True
                shard = generate(
                    self._target,
                    self._tokenizer,
                    part,
                    self._recipe,
                    first=index * _SHARD_PROMPTS,
                    advance=report,
                )
                shard.save(path)
        except Timeout:
            return False
        return True


@torch.inference_mode()
def generate(
    target: CausalModel,
    tokenizer: Any,
    prompts: Sequence[Prompt],
    recipe: CorpusRecipe,
    *,
    first: int = 0,
    advance: Callable[[int, int], None] = lambda sequences, tokens: None,
) -> Shard:
    """Let the target answer the prompts, a new one entering wherever one ends.

    Parameters
    ----------
    first : int
        Place of the first prompt in the whole list; with the recipe's seed it keys the draws.
    advance : callable
        Called with the sequences and the tokens that were added.

    Raises
    ------
    ValueError
        A prompt fills the target's context.
    """
    rows: dict[int, _Row] = {}
    done: dict[int, _Row] = {}
    encoded = [_encode(tokenizer, prompt.text) for prompt in prompts]
    longest = max(map(len, encoded))
    if longest >= target.max_positions:
        raise ValueError(
            f"prompts: expected at most {target.max_positions - 1} tokens each, got {longest}"
        )
    slots = min(_SLOTS, len(prompts))
    capacity = min(longest + recipe.max_new_tokens, target.max_positions)
    cache = target.new_cache(slots, capacity)
    waiting = deque(range(len(prompts)))
    free = deque(range(slots))
    eos = set(eos_token_ids(target, tokenizer))
    top = min(recipe.top, target.vocab_size)

    def extend(active: list[_Row], logits: Tensor) -> None:
        best = _likeliest(logits.float(), top)
        best_probs = torch.softmax(logits.float(), dim=-1).gather(1, best).cpu()
        best_ids = best.cpu()
        tokens = best_ids[:, 0].tolist()
        drawn = [i for i, row in enumerate(active) if row.temperature > 0]
        if drawn:
            rest = _draw(logits[drawn], [active[i] for i in drawn])
            for i, token in zip(drawn, rest, strict=True):
                tokens[i] = token
        for i, (row, token) in enumerate(zip(active, tokens, strict=True)):
            row.add(token, best_ids[i], best_probs[i])
            ended = token in eos or len(row.tokens) == row.limit
            if ended:
                rows.pop(row.slot)
                free.append(row.slot)
                done[row.index] = row
            advance(int(ended), 1)

    while waiting or rows:
        while waiting and free:
            index, slot = waiting.popleft(), free.popleft()
            prompt = encoded[index]
            place = first + index
            row = _Row(
                index,
                slot,
                list(prompt),
                len(prompt),
                min(len(prompt) + recipe.max_new_tokens, target.max_positions),
                recipe.temperature(place),
                torch.Generator().manual_seed(recipe.seed * 1_000_003 + place),
                torch.zeros(recipe.max_new_tokens, top, dtype=torch.int32),
                torch.zeros(recipe.max_new_tokens, top, dtype=torch.float16),
            )
            rows[slot] = row
            ids = torch.tensor(prompt, dtype=torch.int32, device=target.device)
            logits = target.prefill(ids, cache, slot)
            assert logits is not None
            extend([row], logits[None])
        active = list(rows.values())
        if active:
            last = torch.tensor([[row.tokens[-1]] for row in active], dtype=torch.int32)
            logits = target.forward(
                last.to(target.device),
                [len(row.tokens) - 1 for row in active],
                cache,
                slots=[row.slot for row in active],
            )
            extend(active, logits[:, 0])
    return _shard([done[i] for i in range(len(prompts))], prompts)


def _likeliest(logits: Tensor, count: int) -> Tensor:
    """Ids of the largest logits [n, V], falling: int64 [n, count].

    The first is the lowest of equal ones, as `verify` chooses: in bf16 they are not rare, and
    `topk` has no order among them.
    """
    best = logits.argmax(dim=-1, keepdim=True)
    rest = logits.scatter(1, best, -torch.inf).topk(count - 1, dim=-1).indices
    return torch.cat((best, rest), dim=1)


def _draw(logits: Tensor, rows: Sequence[_Row]) -> list[int]:
    """A token of each row of logits [n, V] at its temperature, by inversion."""
    scale = torch.tensor([[1 / row.temperature] for row in rows], device=logits.device)
    cumulative = torch.softmax(logits.float() * scale, dim=-1).cumsum(dim=-1)
    uniform = [torch.rand(1, generator=row.generator) for row in rows]
    # The last sum is 1 but for rounding, so it is what the uniform number is a share of.
    places = torch.stack(uniform).to(logits.device) * cumulative[:, -1:]
    found = torch.searchsorted(cumulative, places, right=True)[:, 0]
    tokens: list[int] = found.clamp_(max=logits.shape[-1] - 1).tolist()
    return tokens


def _encode(tokenizer: Any, text: str) -> list[int]:
    if getattr(tokenizer, "chat_template", None):
        return apply_chat_template(tokenizer, [{"role": "user", "content": text}])
    ids: list[int] = tokenizer.encode(text)
    return ids


def _shard(rows: Sequence[_Row], prompts: Sequence[Prompt]) -> Shard:
    return Shard(
        tokens=torch.tensor([t for row in rows for t in row.tokens], dtype=torch.int32),
        lengths=torch.tensor([len(row.tokens) for row in rows], dtype=torch.int32),
        prompt_lengths=torch.tensor([row.prompt_length for row in rows], dtype=torch.int32),
        tasks=[p.task for p in prompts],
        temperatures=torch.tensor([row.temperature for row in rows], dtype=torch.float32),
        top_ids=torch.cat([row.top_ids[: row.response_length] for row in rows]),
        top_probs=torch.cat([row.top_probs[: row.response_length] for row in rows]),
    )
