"""Distilling a slice draft from a target: corpus, search, training, export.

The search trains a draft of each depth for a short while, reads off how often it agrees with the
target for each size of the head, and keeps the pair with the most predicted tokens per second by
costs measured on this machine.
"""

from __future__ import annotations

import json
import math
import platform
import shutil
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch
from filelock import FileLock, Timeout

from .._version import __version__
from ..decoding.calibrate import measure
from ..errors import SpeckvError
from ..files import write_atomically
from ..machine import device_name
from ..models.hub import cache_root
from ..models.llama import LlamaDecoder
from ..models.loading import load_model, open_checkpoint
from ..models.slice_draft import SliceManifest, rounded, save_slice_draft
from ..models.weights import TensorSource
from ..policies import CostTable
from ..prompts import Prompt
from ..reporter import Reporter
from .acceptance import count_accepted, predict_speedup
from .card import to_markdown
from .corpus import Corpus, CorpusRecipe
from .examples import Examples
from .stopwatch import Stopwatch
from .student import Student
from .trainer import GAMMAS, Measurement, Trainer, TrainingRecipe
from .written import written_prompts

_DEPTHS = (1, 2, 4)
_SETTINGS, _SEARCH, _STATE, _SECONDS = "settings.json", "search.json", "state.pt", "seconds.json"


@dataclass(frozen=True)
class DistillRecipe:
    """Everything that decides what a draft becomes, besides target and prompts.

    Attributes
    ----------
    corpus : CorpusRecipe
    training : TrainingRecipe
    epochs : float
        Passes over the corpus.
    layers : tuple of tuple of int
        Candidates: the target's layers that a draft begins as. Empty: its first one, two and four,
        which learn faster than drafts that end in the target's last layers.
    heads : tuple of int
        Candidate sizes of the head.
    search_share : float
        Steps of each candidate's trial, as a share of the whole training.
    written : int
        Prompts that the target is to write itself, besides those given; some are dropped. See
        `speckv.training.written`.
    """

    corpus: CorpusRecipe = field(default_factory=CorpusRecipe)
    training: TrainingRecipe = field(default_factory=TrainingRecipe)
    epochs: float = 3.0
    layers: tuple[tuple[int, ...], ...] = ()
    heads: tuple[int, ...] = (4096, 8192, 16384)
    search_share: float = 0.05
    written: int = 0

    def __post_init__(self) -> None:
        for name in ("epochs", "search_share"):
            if not 0 < getattr(self, name) < math.inf:
                raise ValueError(f"{name}: expected more than 0, got {getattr(self, name)}")
        if self.written < 0:
            raise ValueError(f"written: expected at least 0, got {self.written}")
        if not self.heads or min(self.heads) < 1:
            raise ValueError(f"heads: expected sizes from 1 on, got {list(self.heads)}")
        if any(not candidate for candidate in self.layers):
            raise ValueError("layers: expected at least one layer in each candidate, got none")


@dataclass(frozen=True)
class _Trial:
    """A candidate after its short training."""

    layers: tuple[int, ...]
    head: int
    agreement: float
    gamma: int
    speedup: float


def distill(
    source: str | None,
    out: Path | None,
    prompts: Sequence[Prompt],
    recipe: DistillRecipe,
    report: Reporter,
    *,
    compression: str | None = None,
    device: str | torch.device | None = None,
    corpus_root: Path | None = None,
    corpus_only: bool = False,
    command: str = "",
) -> SliceManifest | None:
    """Make a draft for a target.

    Parameters
    ----------
    source : str, optional
        The target, as for `load_model`; of the Llama family.
    out : Path, optional
        Folder of the draft; needed unless ``corpus_only``. What is unfinished stays in its folder
        ``unfinished``, from where the same call goes on. A lock lies beside it, ``<out>.lock``.
    compression : str, optional
        Of the target while it writes the corpus and while costs are measured.
    corpus_root : Path, optional
        Where corpora are cached.
    corpus_only : bool
        Generate the corpus and stop; several processes may do so at once.
    command : str
        For the card.

    Returns
    -------
    SliceManifest, or None with ``corpus_only``

    Raises
    ------
    ValueError
        A bad setting, or a target that is not of the Llama family.
    ModelError
        The target cannot be had.
    SpeckvError
        Another process is at work in ``out``, or other settings were begun there.
    """
    if out is None and not corpus_only:
        raise ValueError("out: expected a folder, got none")
    if len(prompts) < 3:
        raise ValueError(
            f"prompts: expected at least 3, one to learn from, one to choose by and one to hold "
            f"out, got {len(prompts)}"
        )
    target, tokenizer = load_model(source, compression=compression, device=device)
    if not isinstance(target, LlamaDecoder):
        raise ValueError(f"target: expected a model of the Llama family, got {target.name}")
    layers = recipe.layers or tuple(
        tuple(range(depth)) for depth in _DEPTHS if depth < target.config.layers
    )
    most = target.config.layers - 1
    if not layers:
        raise ValueError(f"target: expected one of two layers or more, got {target.name}")
    for candidate in layers:
        if min(candidate) < 0 or max(candidate) > most:
            raise ValueError(f"layers: expected some of 0 to {most}, got {list(candidate)}")
    root = corpus_root or cache_root() / "corpora"
    own: list[Prompt] = []
    if recipe.written:
        report.stage("Prompts", recipe.written)
        own = written_prompts(
            target,
            tokenizer,
            recipe.written,
            root,
            seed=recipe.corpus.seed,
            advance=_tokens_a_second(report),
        )
        prompts = [*prompts, *own]
    corpus = Corpus(root, target, tokenizer, prompts, recipe.corpus)
    if out is None or corpus_only:
        _write_corpus(corpus, len(prompts), report)
        return None
    settings = {
        "corpus": corpus.folder.name,
        "shards": [corpus.path(i).name for i in range(corpus.size)],
        "recipe": asdict(recipe),
        "layers": layers,
    }
    with _claimed(out, settings) as unfinished:
        _write_corpus(corpus, len(prompts), report)
        work = _Distillation(
            target, open_checkpoint(source), corpus, recipe, layers, unfinished, report
        )
        return work.run(
            out, card={"command": command, "prompts": len(prompts), "written_prompts": len(own)}
        )


@contextmanager
def _claimed(out: Path, settings: dict[str, Any]) -> Iterator[Path]:
    """The folder of what is unfinished in ``out``, for this process and these settings alone."""
    whole = out.resolve()
    whole.parent.mkdir(parents=True, exist_ok=True)
    lock = FileLock(whole.with_name(whole.name + ".lock"))
    try:
        lock.acquire(timeout=0)
    except Timeout as error:
        raise SpeckvError(f"{out} is in use by another distillation") from error
    try:
        unfinished = out / "unfinished"
        path, text = unfinished / _SETTINGS, json.dumps(settings)
        if path.is_file() and path.read_text() != text:
            raise SpeckvError(
                f"{unfinished} holds an unfinished distillation with other settings or another "
                "corpus; repeat its command to finish it, or delete the folder"
            )
        _write_json(path, settings)
        yield unfinished
    finally:
        lock.release()


def _write_corpus(corpus: Corpus, prompts: int, report: Reporter) -> None:
    report.stage("Corpus", prompts)
    corpus.complete(_tokens_a_second(report))


def _tokens_a_second(report: Reporter) -> Callable[[int, int], None]:
    """Advances a stage by texts, of so many tokens, and notes how fast."""
    begun = time.perf_counter()
    tokens = 0

    def advance(texts: int, new: int) -> None:
        nonlocal tokens
        tokens += new
        rate = tokens / (time.perf_counter() - begun)
        report.advance(texts, f"{tokens:,} tokens, {rate:,.0f} a second")

    return advance


class _Distillation:
    """Search, training and export on a corpus that is complete."""

    def __init__(
        self,
        target: LlamaDecoder,
        checkpoint: tuple[Any, TensorSource],
        corpus: Corpus,
        recipe: DistillRecipe,
        layers: tuple[tuple[int, ...], ...],
        folder: Path,
        report: Reporter,
    ) -> None:
        self._target, self._layers, self._folder = target, layers, folder
        self._config, self._tensors = checkpoint
        self._recipe, self._report = recipe, report
        self._stopwatch = Stopwatch(folder / _SECONDS)
        shards = list(corpus.shards())
        self._corpus_seconds = sum(shard.seconds for shard in shards)
        self._examples = Examples.from_shards(shards)
        self._train, self._validation, self._held_out = self._examples.split()
        self._vocabulary = self._examples.vocabulary(
            max(recipe.heads), self._train, target.vocab_size
        )

    def run(self, out: Path, *, card: dict[str, Any]) -> SliceManifest:
        """Go on from where ``folder`` stands; write the draft; remove the folder."""
        with self._stopwatch.stage("search"):
            trials = self._search()
        best = self._best(trials)
        trainer = self._trainer(best.layers, best.head)
        steps = self._steps(trainer, self._recipe.epochs)
        self._report.line(
            f"training {len(best.layers)} layers with a head of {best.head:,}: {steps:,} steps"
        )
        with self._stopwatch.stage("training"):
            self._run(trainer, steps, "Training", self._folder / _STATE)
        tensors = trainer.student.trainable()
        with torch.no_grad():
            for tensor in tensors.values():
                tensor.copy_(rounded(tensor))
        card |= self._card(trainer, best, trials, steps)
        manifest = save_slice_draft(
            out,
            tensors,
            self._vocabulary[: best.head],
            target=self._target,
            layers=best.layers,
            card=card,
        )
        text = to_markdown(manifest)
        write_atomically(out / "README.md", lambda path: path.write_text(text, encoding="utf-8"))
        for name in (_STATE, _SEARCH, _SECONDS, _SETTINGS):  # settings last: they guard the others
            (self._folder / name).unlink(missing_ok=True)
        shutil.rmtree(self._folder)  # what a process that was killed may have left
        return manifest

    def _best(self, trials: list[_Trial]) -> _Trial:
        """The fastest; where none is faster than plain decoding, the one that agrees most."""
        best = max(trials, key=lambda trial: (trial.speedup, trial.agreement))
        if best.speedup <= 1 and len(trials) > 1:
            self._report.line("none is predicted to be faster than plain decoding: by agreement")
        return best

    def _search(self) -> list[_Trial]:
        """Trials of every depth and head; those already in the folder are not repeated."""
        path = self._folder / _SEARCH
        trials = []
        if path.is_file():
            found = json.loads(path.read_text())
            trials = [_Trial(**{**t, "layers": tuple(t["layers"])}) for t in found]
        heads = sorted({min(head, self._vocabulary.numel()) for head in self._recipe.heads})
        known = {trial.layers for trial in trials}
        for layers in self._layers:
            if layers in known:
                continue
            trials += self._try(layers, heads)
            _write_json(path, [asdict(trial) for trial in trials])
        return trials

    def _try(self, layers: tuple[int, ...], heads: list[int]) -> list[_Trial]:
        trainer = self._trainer(layers, heads[-1])
        alone = len(self._layers) == 1 and len(heads) == 1
        if not alone:
            share = self._recipe.search_share * self._recipe.epochs
            self._run(trainer, self._steps(trainer, share), f"Trying {len(layers)} layers", None)
        agreed, _ = trainer.agreements(heads)
        trials = []
        for head, bits in zip(heads, agreed, strict=True):
            gamma, speedup = predict_speedup(bits, self._cost(trainer, layers, head), self._context)
            share = sum(map(sum, bits)) / sum(map(len, bits))
            trials.append(_Trial(layers, head, float(share), gamma, speedup))
            self._report.line(
                f"layers {','.join(map(str, layers))}, head {head:,}: agreement {share:.1%}, "
                f"predicted {speedup:.2f}x at γ={gamma}"
            )
        return trials

    def _trainer(self, layers: tuple[int, ...], head: int) -> Trainer:
        torch.manual_seed(self._recipe.training.seed)
        id_map = self._vocabulary[:head]
        return Trainer(
            Student(self._config, self._tensors, layers, id_map),
            id_map,
            self._examples,
            self._train,
            self._validation,
            self._recipe.training,
            self._target.device,
        )

    def _steps(self, trainer: Trainer, epochs: float) -> int:
        return max(1, round(trainer.epoch_steps * epochs))

    def _run(self, trainer: Trainer, steps: int, stage: str, checkpoint: Path | None) -> None:
        self._report.stage(stage, steps)
        shown = 0

        def advance(step: int, loss: float) -> None:
            nonlocal shown
            self._report.advance(step - shown, f"loss {loss:.3f}")  # a checkpoint's steps at once
            shown = step

        def measured(m: Measurement) -> None:
            by_gamma = ", ".join(f"γ={g} {a:.1%}" for g, a in m.acceptance.items())
            self._report.line(
                f"step {m.step:,}: agreement {m.agreement:.1%}, overlap {m.overlap:.1%}, "
                f"accepted {by_gamma}"
            )
            self._stopwatch.save()

        trainer.run(
            steps,
            checkpoint=checkpoint,
            advance=advance,
            measured=measured,
        )

    @property
    def _context(self) -> int:
        """A typical context: half of the validation sequences' mean length."""
        return int(self._examples.lengths[self._validation].float().mean()) // 2

    def _cost(self, trainer: Trainer, layers: tuple[int, ...], head: int) -> CostTable:
        tensors = {name: t.detach() for name, t in trainer.student.trainable().items()}
        tensors["lm_head.weight"] = tensors["lm_head.weight"][:head]
        draft = self._target.slice_draft(tensors, layers, head, name="candidate")
        return measure(self._target, draft)

    def _card(
        self, trainer: Trainer, best: _Trial, trials: list[_Trial], steps: int
    ) -> dict[str, Any]:
        """What was done and what came of it, measured on the weights as they are stored."""
        (agreed,), shared = trainer.agreements(sequences=self._held_out)
        gamma, speedup = predict_speedup(
            agreed, self._cost(trainer, best.layers, best.head), self._context
        )
        tasks = [self._examples.tasks[i] for i in self._held_out]
        by_task = {}
        for task in dict.fromkeys(tasks):
            bits = [a for a, t in zip(agreed, tasks, strict=True) if t == task]
            by_task[task] = _acceptance(bits)
        return {
            "recipe": asdict(self._recipe),
            "corpus": {
                "sequences": self._examples.size,
                "tokens": int(self._examples.top_ids.shape[0]),
                "validation_sequences": len(self._validation),
                "held_out_sequences": len(self._held_out),
            },
            "training": {
                "steps": trainer.step,
                "planned_steps": steps,
                "measurements": [asdict(m) for m in trainer.measurements],
            },
            "search": [asdict(trial) for trial in trials],
            "held_out": {
                "temperatures": sorted(
                    {self._recipe.corpus.temperature(i) for i in self._held_out}
                ),
                "overlap_at_least": round(shared, 4),
                "acceptance": _acceptance(agreed),
                "acceptance_by_task": by_task,
                "predicted": {"gamma": gamma, "speedup": round(speedup, 3)},
            },
            "seconds": {
                "corpus": round(self._corpus_seconds),
                "search": round(self._stopwatch["search"]),
                "training": round(self._stopwatch["training"]),
            },
            "machine": {
                "device": device_name(self._target.device),
                "threads": torch.get_num_threads(),
                "compression": self._target.compression,
                "python": platform.python_version(),
                "torch": torch.__version__,
                "speckv": __version__,
            },
            "date": time.strftime("%Y-%m-%d", time.gmtime()),
        }


def _write_json(path: Path, data: Any) -> None:
    text = json.dumps(data)
    write_atomically(path, lambda temporary: temporary.write_text(text))


def _acceptance(agreed: Sequence[np.ndarray]) -> dict[str, float]:
    """Accepted over drafted tokens by fixed γ."""
    return {str(g): round(count_accepted(agreed, g).acceptance, 4) for g in GAMMAS}
