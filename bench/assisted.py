"""The engine against transformers' assisted generation: same target, same draft, interleaved.

    python -m bench.assisted --dtype bf16 --policy confidence:0.4

Transformers runs the distilled draft as an assistant of its own kind, with its default settings and
with the draft length and confidence threshold that are fastest on other prompts (``--tune`` of each
task). Its draft has the same weights, in the module that trained them. A figure is the median over
prompts of the ratio of tokens per second, with a bootstrap interval over prompts. In fp32 all sides
must say the same tokens, or no number is printed; in bf16, where transformers' products round by
how many rows they have, the prompts with other tokens are counted.
"""

from __future__ import annotations

import argparse
import copy
import itertools
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from bench.environment import command, environment, write_json
from bench.sides import (
    DTYPES,
    Run,
    bootstrap_median,
    compare,
    differing,
    engine_side,
    transformers_side,
)
from speckv import Engine, SamplingParams
from speckv.models.hub import fetch
from speckv.models.llama import LlamaDecoder
from speckv.models.loading import open_checkpoint
from speckv.models.slice_draft import SliceManifest, read_tensors, shipped_draft
from speckv.prompts import evaluation_prompts
from speckv.training.student import Student

_LENGTHS = (1, 2, 3, 4, 5, 6, 8, 10)
_THRESHOLDS = (0.0, 0.2, 0.3, 0.4, 0.5, 0.6, 0.8)

Setting = dict[str, Any]


class ScatteredHead(nn.Module):
    """A trimmed head whose logits stand at their target ids; the other ids have -inf's stand-in."""

    _id_map: Tensor

    def __init__(self, head: nn.Linear, id_map: Tensor, vocab_size: int) -> None:
        super().__init__()
        self._head, self._vocab_size = head, vocab_size
        self.register_buffer("_id_map", id_map.long())

    def forward(self, hidden: Tensor) -> Tensor:
        """Logits [..., vocab_size]."""
        small: Tensor = self._head(hidden)
        full = small.new_full((*small.shape[:-1], self._vocab_size), torch.finfo(small.dtype).min)
        return full.index_copy_(-1, self._id_map, small)


def transformers_draft(folder: Path, dtype: torch.dtype, source: str | None = None) -> Any:
    """A distilled draft as transformers runs it."""
    from transformers import AutoModelForCausalLM

    manifest = SliceManifest.read(folder)
    tensors, id_map = read_tensors(folder, manifest)
    config, target = open_checkpoint(source)
    student = Student(config, target, manifest.layers, id_map.long())
    with torch.no_grad():
        for name, parameter in student.trainable().items():
            parameter.copy_(tensors[name])
    config = copy.deepcopy(student.body.config)
    config.tie_word_embeddings = False
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(config)
    model.model = student.body
    model.lm_head = ScatteredHead(student.head, id_map, config.vocab_size)
    return model.to(dtype).eval()


def tune(run: Callable[[Setting], Run], prompts: list[list[int]]) -> tuple[Setting, list[Any]]:
    """The fastest setting on some prompts, by total time, and what every setting took."""
    tried: list[dict[str, Any]] = []
    for length, threshold in itertools.product(_LENGTHS, _THRESHOLDS):
        setting = {
            "num_assistant_tokens": length,
            "num_assistant_tokens_schedule": "constant",
            "assistant_confidence_threshold": threshold,
        }
        call = run(setting)
        times = [call(prompt) for prompt in prompts]
        rate = sum(len(ids) for _, ids in times) / sum(seconds for seconds, _ in times)
        tried.append({"setting": setting, "tokens_per_second": rate})
    best = max(tried, key=lambda row: row["tokens_per_second"])
    return best["setting"], tried


def measure(
    dtype: str, policy: str, draft: str | None, per_task: int, tuned_on: int, tokens: int
) -> dict[str, Any]:
    """Tune transformers on some prompts, then run all three sides on others.

    Raises
    ------
    ValueError
        No draft is given and none is shipped.
    RuntimeError
        fp32 token ids differ between the sides.
    """
    from transformers import AutoModelForCausalLM

    engine = Engine.from_pretrained(draft=draft, compression=dtype, policy=policy)
    shipped = (
        shipped_draft(engine.target.fingerprint)
        if isinstance(engine.target, LlamaDecoder)
        else None
    )
    folder = Path(draft) if draft else shipped
    if folder is None:
        raise ValueError("draft: expected a folder, since none is shipped for this target")
    target = AutoModelForCausalLM.from_pretrained(fetch(), dtype=DTYPES[dtype]).eval()
    assistant = transformers_draft(folder, DTYPES[dtype])

    def encode(per_task: int, skip: int) -> list[list[int]]:
        prompts = evaluation_prompts(per_task, skip=skip)
        return [engine.encode(prompt.text, chat=True) for prompt in prompts]

    default = copy.deepcopy(assistant.generation_config)

    def theirs(setting: Setting) -> Run:
        def reset() -> None:
            # Assisted generation adapts its settings in place, so each run starts afresh.
            assistant.generation_config = copy.deepcopy(default)
            assistant.generation_config.update(**setting)

        return transformers_side(target, tokens, before=reset, assistant_model=assistant)

    prompts = encode(per_task, 0)
    ours = engine_side(engine, SamplingParams(max_new_tokens=tokens))
    ours(prompts[0])
    theirs({})(prompts[0])
    best, tried = tune(theirs, encode(tuned_on, per_task))
    sides = {"speckv": ours, "default": theirs({}), "tuned": theirs(best)}
    rows = compare(sides, prompts, exact=dtype == "fp32")
    return {
        "benchmark": "assisted",
        "engine": engine.describe(),
        "tokens": tokens,
        "tuned_setting": best,
        "tuning": tried,
        "prompts": rows,
        "default": summary(rows, "default"),
        "tuned": summary(rows, "tuned"),
        "command": command(),
        "environment": environment(),
    }


def summary(rows: list[dict[str, Any]], name: str) -> dict[str, Any]:
    """The engine against one of transformers' sides."""

    def rate(row: dict[str, Any]) -> float:
        return float(row["tokens"] / row["seconds"])

    ratios = np.array([rate(row["speckv"]) / rate(row[name]) for row in rows])
    return {
        "differing_prompts": differing(rows, name),
        "median_ratio": float(np.median(ratios)),
        "ratio_95": list(bootstrap_median(ratios)),
        "transformers_tokens_per_second": float(np.median([rate(row[name]) for row in rows])),
        "speckv_tokens_per_second": float(np.median([rate(row["speckv"]) for row in rows])),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--dtype", choices=sorted(DTYPES), default="bf16")
    parser.add_argument("--policy", default="speckv")
    parser.add_argument("--draft", help="folder of a distilled draft [default: the shipped one]")
    parser.add_argument("--per-task", type=int, default=5)
    parser.add_argument("--tune", type=int, default=1, help="prompts of each task to tune on")
    parser.add_argument("--tokens", type=int, default=128)
    parser.add_argument("--out", type=Path, help="JSON file to write")
    arguments = parser.parse_args()
    document = measure(
        arguments.dtype,
        arguments.policy,
        arguments.draft,
        arguments.per_task,
        arguments.tune,
        arguments.tokens,
    )
    for name in ("default", "tuned"):
        row = document[name]
        low, high = row["ratio_95"]
        print(
            f"transformers {name}: {row['transformers_tokens_per_second']:.1f} tokens/s, speckv "
            f"{row['speckv_tokens_per_second']:.1f}; median paired ratio "
            f"{row['median_ratio']:.3f}, 95% [{low:.3f}, {high:.3f}]; other token ids on "
            f"{row['differing_prompts']} of {len(document['prompts'])} prompts"
        )
    print(f"tuned setting: {document['tuned_setting']}")
    if arguments.out:
        write_json(arguments.out, document)


if __name__ == "__main__":
    main()
