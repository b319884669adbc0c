"""``speckv profile``: a trace of a pair of models over prompts, compressions and temperatures.

Each answer is kept in a file of its own, beside the trace to be, as soon as it is recorded. So an
interrupted recording goes on where it stopped, and the trace itself appears in one rename.
"""

from __future__ import annotations

import hashlib
import json
import shutil
from collections.abc import Iterator, Sequence
from contextlib import suppress
from dataclasses import asdict, dataclass, replace
from importlib.metadata import PackageNotFoundError, version
from itertools import product
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from .._version import __version__
from ..decoding.calibrate import calibrated
from ..decoding.choice import choose_loop
from ..decoding.lookup import parse_draft
from ..decoding.trained import identify
from ..errors import TraceError
from ..kernels.checks import dtype_name
from ..machine import device_name
from ..models.base import COMPRESSIONS, CausalModel
from ..models.loading import load_model
from ..models.pairing import eos_token_ids, load_draft
from ..models.tokenizers import encode_prompts
from ..policies import CostTable
from ..prompts import Prompt
from ..reporter import Reporter
from ..sampling import SamplingParams
from .record import record
from .schema import Answer, Rows, TraceInfo, read_parts, write_trace

_TOGETHER = 16
"""Answers that are decoded together; what an interruption loses."""


@dataclass(frozen=True)
class ProfileRecipe:
    """What is recorded.

    Attributes
    ----------
    compressions : tuple of str
        Weight formats of the target.
    temperatures : tuple of float
        0 is greedy; the others are sampled under Gumbel coupling.
    max_new_tokens : int
        Longest answer.
    seed : int
        That of the first prompt; each has one of its own, the next integer.
    """

    compressions: tuple[str, ...] = ("fp32",)
    temperatures: tuple[float, ...] = (0.0, 0.7, 1.0)
    max_new_tokens: int = 128
    seed: int = 0

    def __post_init__(self) -> None:
        for name in ("compressions", "temperatures"):
            values = getattr(self, name)
            if not values or len(set(values)) != len(values):
                raise ValueError(f"{name}: expected different ones, at least one; got {values}")
        for compression in self.compressions:
            if compression not in COMPRESSIONS:
                names = ", ".join(COMPRESSIONS)
                raise ValueError(f"compressions: expected some of {names}; got {compression!r}")
        if not 0 <= self.seed < 2**32:
            raise ValueError(f"seed: expected 0 to {2**32 - 1}, got {self.seed}")
        for temperature in self.temperatures:
            SamplingParams(max_new_tokens=self.max_new_tokens, temperature=temperature)


def profile(
    target: str | None,
    draft: str | None,
    out: Path,
    prompts: Sequence[Prompt],
    recipe: ProfileRecipe,
    report: Reporter,
    *,
    device: str | None = None,
) -> TraceInfo:
    """Record a trace and the costs of a step on this machine, and write both to ``out``.

    Parameters
    ----------
    target, draft : str, optional
        As for `Engine.from_pretrained`; a lookup cannot be traced.
    out : Path
        The trace. What is unfinished lies beside it, in ``<out>.parts-<key>``, from where the same
        call goes on.
    prompts : sequence of Prompt
    device : str, optional

    Raises
    ------
    ValueError
        No prompts, one that fills the target's context, or no draft model.
    ModelError
        A model cannot be had.
    NumericsError
        A model's logits held NaN.
    """
    if not prompts:
        raise ValueError("prompts: expected at least one, got none")
    lookup, name = parse_draft(draft)
    if lookup is not None:
        raise ValueError(f"draft: expected a model, which a trace is of, got {draft!r}")
    info: TraceInfo | None = None
    folder = out
    for compression in recipe.compressions:
        pair = _Pair.load(target, name, compression, device)
        if info is None:
            info = _info(pair, prompts, recipe)
            folder = out.with_name(f"{out.name}.parts-{_key(info)}")
            folder.mkdir(parents=True, exist_ok=True)
        asked = _answers(pair, prompts, recipe)
        report.stage(f"Recording {compression}", sum(answer.limit for answer in asked))
        _record_missing(pair, asked, folder, info, report)
        costs = dict(info.costs) | {compression: pair.costs()}
        dtype = dtype_name(pair.target.dtype)
        dtypes = dict(info.target["dtype"]) | {compression: dtype}
        info = replace(info, target=dict(info.target) | {"dtype": dtypes}, costs=costs)
    assert info is not None
    write_trace(out, info, _parts(folder, prompts, recipe))
    shutil.rmtree(folder, ignore_errors=True)
    return info


@dataclass(frozen=True)
class _Pair:
    """A loaded pair."""

    target: CausalModel
    tokenizer: Any
    draft: CausalModel
    id_map: Tensor | None

    def costs(self) -> CostTable:
        """Of the loop that would decode."""
        graphs = choose_loop(self.target, self.draft).on_graphs
        return calibrated(self.target, self.draft, graphs=graphs)

    @classmethod
    def load(
        cls, target: str | None, draft: str | None, compression: str, device: str | None
    ) -> _Pair:
        model, tokenizer = load_model(target, compression=compression, device=device)
        drafted, id_map = load_draft(draft, model, tokenizer)
        if drafted is None:
            raise ValueError(f"draft: expected a model, since {model.name} has none of its own")
        return cls(model, tokenizer, drafted, id_map)


def _info(pair: _Pair, prompts: Sequence[Prompt], recipe: ProfileRecipe) -> TraceInfo:
    target, draft = pair.target, pair.draft
    texts = json.dumps([(prompt.task, prompt.text) for prompt in prompts])
    return TraceInfo(
        target=identify(target) | {"dtype": {}},
        draft=identify(draft),
        device=device_name(target.device),
        versions={
            "speckv": __version__,
            "torch": torch.__version__,
            "transformers": version("transformers"),
            **_versions_of("triton", "bitsandbytes"),
        },
        recipe=json.loads(json.dumps(asdict(recipe)))
        | {
            "prompts": len(prompts),
            "prompts_sha256": hashlib.sha256(texts.encode()).hexdigest(),
            "threads": torch.get_num_threads(),
        },
    )


def _versions_of(*packages: str) -> dict[str, str]:
    """Of those that are installed; not every machine has or needs them."""
    found = {}
    for package in packages:
        with suppress(PackageNotFoundError):
            found[package] = version(package)
    return found


def _key(info: TraceInfo) -> str:
    """Tells recordings apart whose answers could differ."""
    return hashlib.sha256(info.to_json().encode()).hexdigest()[:12]


def _answers(pair: _Pair, prompts: Sequence[Prompt], recipe: ProfileRecipe) -> list[Answer]:
    """What is to be recorded of one compression."""
    target = pair.target
    encoded = encode_prompts(pair.tokenizer, [p.text for p in prompts], target.max_positions)
    return [
        Answer(
            prompt_id=i,
            task=prompts[i].task,
            compression=target.compression,
            temperature=temperature,
            seed=recipe.seed + i,
            limit=min(recipe.max_new_tokens, target.max_positions - len(ids)),
            prompt_tokens=tuple(ids),
        )
        for temperature in recipe.temperatures
        for i, ids in enumerate(encoded)
    ]


def _record_missing(
    pair: _Pair, asked: Sequence[Answer], folder: Path, info: TraceInfo, report: Reporter
) -> None:
    """Record the answers that have no part yet."""
    missing = []
    for answer in asked:
        if _is_whole(_part(folder, answer.compression, answer.temperature, answer.prompt_id)):
            report.advance(answer.limit, "")
        else:
            missing.append(answer)
    eos = eos_token_ids(pair.target, pair.tokenizer)
    for first in range(0, len(missing), _TOGETHER):
        together = missing[first : first + _TOGETHER]
        found = record(
            pair.target,
            pair.draft,
            together,
            eos=eos,
            id_map=pair.id_map,
            advance=lambda tokens: report.advance(tokens, ""),
        )
        for answer, rows in zip(together, found, strict=True):
            path = _part(folder, answer.compression, answer.temperature, answer.prompt_id)
            write_trace(path, info, [(answer, rows)])
            report.advance(answer.limit - len(rows), "")


def _part(folder: Path, compression: str, temperature: float, prompt: int) -> Path:
    return folder / f"{compression}-{temperature:g}-{prompt:05d}.parquet"


def _is_whole(path: Path) -> bool:
    """Whether a part is there and can be read."""
    try:
        list(read_parts(path))
    except TraceError:
        return False
    return True


def _parts(
    folder: Path, prompts: Sequence[Prompt], recipe: ProfileRecipe
) -> Iterator[tuple[Answer, Rows]]:
    places = product(recipe.compressions, recipe.temperatures, range(len(prompts)))
    for compression, temperature, prompt in places:
        yield from read_parts(_part(folder, compression, temperature, prompt))
