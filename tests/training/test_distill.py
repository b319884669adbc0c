"""`speckv distill` from end to end on a tiny target, interrupted wherever it can be."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from filelock import FileLock

from speckv import Engine, SamplingParams, cli
from speckv.decoding.calibrate import measure
from speckv.errors import SpeckvError
from speckv.models.hub import CACHE_VARIABLE
from speckv.models.llama import LlamaDecoder
from speckv.models.slice_draft import MANIFEST, SliceManifest, save_slice_draft
from speckv.policies import CostTable
from speckv.prompts import TASKS
from speckv.training import distill as module
from speckv.training import stopwatch
from speckv.training.card import to_markdown
from speckv.training.distill import DistillRecipe, distill
from speckv.training.trainer import Trainer
from tests.models.conftest import seeded
from tests.models.test_adapter import MODELS
from tests.training.conftest import (
    RECIPE,
    TRAINING,
    VOCAB,
    make_prompts,
    new_student,
    save_target,
    tiny_llama,
)

PROMPTS = make_prompts(400)
DISTILLING = DistillRecipe(
    corpus=RECIPE, training=TRAINING, epochs=2.5, layers=((0,), (0, 3)), heads=(64, 128)
)
COST = CostTable.from_parts(0.1, [1.0 + 0.02 * width for width in range(16)])


class Listener:
    """A reporter that keeps what it is told, and presses Ctrl-C after so many units of a stage."""

    def __init__(self, stage: str = "", units: int = 0) -> None:
        self._until = (stage, units)
        self.units: dict[str, int] = {}
        self.totals: dict[str, int] = {}
        self.lines: list[str] = []

    def stage(self, name: str, total: int) -> None:
        self.totals[name], self.units[name] = total, 0
        self._stage = name

    def advance(self, units: int, note: str) -> None:
        self.units[self._stage] += units
        if (self._stage, self.units[self._stage]) == self._until:
            raise KeyboardInterrupt

    def line(self, text: str) -> None:
        self.lines.append(text)
        if self._until == ("line", len(self.lines)):
            raise KeyboardInterrupt


@pytest.fixture(autouse=True)
def fixed_costs(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "measure", lambda target, draft: COST)


@pytest.fixture(scope="module")
def corpora(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("corpora")


@pytest.fixture(scope="module")
def run(folder: Path, corpora: Path) -> Callable[..., SliceManifest | None]:
    """Distill the tiny target, with another recipe or listener if given."""

    def distilled(
        out: Path | None,
        listener: Listener | None = None,
        recipe: DistillRecipe = DISTILLING,
        prompts: Any = PROMPTS,
        source: Path = folder,
        **options: Any,
    ) -> SliceManifest | None:
        return distill(
            str(source),
            out,
            prompts,
            recipe,
            listener or Listener(),
            device="cpu",
            **{"corpus_root": corpora, "command": "speckv distill", **options},
        )

    return distilled


Run = Callable[..., SliceManifest | None]


@pytest.fixture(scope="module")
def whole(
    run: Run, tmp_path_factory: pytest.TempPathFactory
) -> tuple[Path, SliceManifest, Listener]:
    """A distillation without interruption."""
    out, listener = tmp_path_factory.mktemp("whole"), Listener()
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(module, "measure", lambda target, draft: COST)
        manifest = run(out, listener)
    assert manifest is not None
    return out, manifest, listener


def acceptance(folder: Path, draft: Path) -> float:
    engine = Engine.from_pretrained(
        str(folder), str(draft), policy="fixed:2", device="cpu", progress=False
    )
    texts = [prompt.text for prompt in make_prompts(40, seed=9)]
    results = engine.generate(texts, SamplingParams(max_new_tokens=24))
    steps = [step for result in results for step in result.stats.steps]
    return sum(accepted for _, accepted in steps) / sum(gamma for gamma, _ in steps)


def test_the_draft_is_accepted_more_often_than_the_untrained_slice(
    whole: tuple[Path, SliceManifest, Listener], folder: Path, target: LlamaDecoder, tmp_path: Path
) -> None:
    out, manifest, _ = whole
    from safetensors.torch import load_file

    id_map = load_file(out / manifest.weights)["id_map"]
    untrained = new_student(folder, manifest.layers, id_map.long()).trainable()
    save_slice_draft(
        tmp_path / "untrained", untrained, id_map, target=target, layers=manifest.layers, card={}
    )
    assert acceptance(folder, out) > acceptance(folder, tmp_path / "untrained") + 0.05


def test_the_folder_holds_the_draft_alone(whole: tuple[Path, SliceManifest, Listener]) -> None:
    out, manifest, _ = whole
    assert SliceManifest.read(out).sha256 == manifest.sha256
    assert {path.name for path in out.iterdir()} == {MANIFEST, manifest.weights, "README.md"}


def test_the_card(whole: tuple[Path, SliceManifest, Listener], target: LlamaDecoder) -> None:
    out, manifest, _ = whole
    card = json.loads((out / MANIFEST).read_text())["card"]
    assert (manifest.target, manifest.fingerprint) == (target.name, target.fingerprint)
    assert card["command"] == "speckv distill" and card["prompts"] == len(PROMPTS)
    assert set(card["seconds"]) == {"corpus", "search", "training"} and len(card["date"]) == 10
    assert card["recipe"]["corpus"]["max_new_tokens"] == RECIPE.max_new_tokens
    corpus = card["corpus"]
    assert corpus["sequences"] == len(PROMPTS)
    assert (corpus["validation_sequences"], corpus["held_out_sequences"]) == (8, 4)
    training = card["training"]
    assert training["steps"] == training["planned_steps"] == training["measurements"][-1]["step"]
    held_out = card["held_out"]
    assert set(held_out["acceptance_by_task"]) == set(TASKS)
    for shares in [held_out["acceptance"], *held_out["acceptance_by_task"].values()]:
        assert set(shares) == {"1", "4", "8"} and all(0 <= s <= 1 for s in shares.values())
    assert held_out["temperatures"] == [0.0] and 0 < held_out["overlap_at_least"] < 1
    assert held_out["predicted"]["gamma"] >= 1 and held_out["predicted"]["speedup"] > 1
    machine = card["machine"]
    assert machine["compression"] == "fp32" and machine["threads"] == torch.get_num_threads()
    assert set(machine) > {"device", "python", "torch", "speckv"}


def test_the_card_for_people(whole: tuple[Path, SliceManifest, Listener]) -> None:
    out, manifest, _ = whole
    text = (out / "README.md").read_text()
    assert text == to_markdown(manifest)
    assert "chosen on 8 responses that it did not learn from; 4 others were held out" in text
    seconds = {"corpus": 7205, "search": 61, "training": 59}
    shown = to_markdown(replace(manifest, card={**manifest.card, "seconds": seconds}))
    assert "corpus 2 h 0 min, search 1 min 1 s, training 0 min 59 s on " in shown
    assert f"covers at least {manifest.card['held_out']['overlap_at_least']:.1%}: " in shown
    assert "(temperature 0), counting the target's 8 likeliest tokens alone" in shown


def test_what_is_reported_was_chosen_on_other_text(
    run: Run, folder: Path, corpora: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked: list[tuple[int, list[int]]] = []
    agreements = Trainer.agreements

    def listened(self: Trainer, heads: Any = None, sequences: Any = None) -> Any:
        asked.append((self.step, self._validation if sequences is None else sequences))
        return agreements(self, heads, sequences)

    monkeypatch.setattr(Trainer, "agreements", listened)
    run(tmp_path, recipe=replace(DISTILLING, epochs=0.5, heads=(64,)))
    *choosing, (_, reported) = asked
    assert reported == [160, 161, 162, 163]
    validation = [0, 1, 2, 3, 320, 321, 322, 323]
    assert len(choosing) > 2 and all(sequences == validation for _, sequences in choosing)


def test_the_search_keeps_the_fastest(whole: tuple[Path, SliceManifest, Listener]) -> None:
    _, manifest, _ = whole
    trials = manifest.card["search"]
    assert [(tuple(t["layers"]), t["head"]) for t in trials] == [
        ((0,), 64),
        ((0,), 128),
        ((0, 3), 64),
        ((0, 3), 128),
    ]
    best = max(trials, key=lambda t: t["speedup"])
    assert (manifest.layers, manifest.vocab_size) == (tuple(best["layers"]), best["head"])
    assert len({t["agreement"] for t in trials}) > 2


def test_the_search_is_by_costs_not_by_acceptance_alone(
    run: Run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def dear_depth(target: LlamaDecoder, draft: LlamaDecoder) -> CostTable:
        cost = 0.02 if draft.config.layers == 1 else 0.9
        return CostTable.from_parts(cost + draft.vocab_size * 1e-3, [1.0] * 16)

    monkeypatch.setattr(module, "measure", dear_depth)
    quick = replace(DISTILLING, epochs=0.5, heads=(64, 10_000))
    manifest = run(tmp_path, recipe=quick)
    assert manifest is not None and (manifest.layers, manifest.vocab_size) == ((0,), 64)
    assert {t["head"] for t in manifest.card["search"]} == {64, VOCAB}, "no more than there are"


def test_without_a_fast_one_the_search_keeps_the_one_that_agrees_most(
    run: Run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    dear = CostTable.from_parts(9.0, [1.0] * 16)
    monkeypatch.setattr(module, "measure", lambda target, draft: dear)
    listener = Listener()
    manifest = run(tmp_path, listener, replace(DISTILLING, epochs=0.5))
    assert manifest is not None
    trials = manifest.card["search"]
    assert {(t["speedup"], t["gamma"]) for t in trials} == {(1.0, 0)}
    best = max(trials, key=lambda t: t["agreement"])
    assert best["agreement"] > trials[0]["agreement"]
    assert (manifest.layers, manifest.vocab_size) == (tuple(best["layers"]), best["head"])
    told = "none is predicted to be faster than plain decoding: by agreement"
    assert listener.lines.count(told) == 1


def test_progress_covers_every_stage(whole: tuple[Path, SliceManifest, Listener]) -> None:
    _, manifest, listener = whole
    assert list(listener.totals) == ["Corpus", "Trying 1 layers", "Trying 2 layers", "Training"]
    assert listener.units == listener.totals
    assert listener.totals["Corpus"] == len(PROMPTS)
    assert listener.totals["Training"] == manifest.card["training"]["planned_steps"]
    measured = [line for line in listener.lines if line.startswith("step ")]
    assert all("accepted γ=1 " in line and ", γ=8 " in line for line in measured)
    assert sum("predicted" in line for line in listener.lines) == 4


def test_one_candidate_is_not_tried(run: Run, tmp_path: Path) -> None:
    listener = Listener()
    alone = replace(DISTILLING, epochs=0.5, layers=((1, 3),), heads=(64,))
    manifest = run(tmp_path, listener, alone)
    assert list(listener.totals) == ["Corpus", "Training"]
    assert manifest is not None and manifest.layers == (1, 3)


def test_an_interrupted_distillation_ends_as_an_uninterrupted_one(
    run: Run,
    whole: tuple[Path, SliceManifest, Listener],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """In the corpus, in and after a trial, before and after a checkpoint, and when written."""
    places = [
        ("Corpus", 90),
        ("Trying 1 layers", 2),
        ("Trying 2 layers", 1),
        ("line", 5),
        ("Training", 7),
        ("Training", 24),
        ("Training", 41),
    ]
    out, root = tmp_path / "out", tmp_path / "corpora"
    for stage, units in places:
        with pytest.raises(KeyboardInterrupt):
            run(out, Listener(stage, units), corpus_root=root)
        assert not (out / MANIFEST).exists()

    def interrupted(*_: Any, **__: Any) -> None:
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(module, "save_slice_draft", interrupted)
        with pytest.raises(KeyboardInterrupt):
            run(out, corpus_root=root)
    manifest = run(out, corpus_root=root)
    assert manifest is not None and manifest.sha256 == whole[1].sha256
    for part in ("search", "training", "held_out", "corpus"):
        assert manifest.card[part] == whole[1].card[part]
    assert {path.name for path in out.iterdir()} == {MANIFEST, manifest.weights, "README.md"}


def test_the_card_counts_the_seconds_of_interrupted_runs(
    run: Run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    clock = iter(range(0, 10**6, 100))
    monkeypatch.setattr(stopwatch.time, "perf_counter", lambda: float(next(clock)))
    recipe = replace(DISTILLING, epochs=1.0, layers=((0,), (1,)), heads=(64,))
    whole = run(tmp_path / "whole", recipe=recipe)
    for stage in ("Trying 1 layers", "Training"):
        with pytest.raises(KeyboardInterrupt):
            run(tmp_path / "out", Listener(stage, 1), recipe)
    resumed = run(tmp_path / "out", recipe=recipe)
    assert whole is not None and resumed is not None
    for stage in ("search", "training"):
        assert resumed.card["seconds"][stage] > whole.card["seconds"][stage] > 0
    assert resumed.card["seconds"]["corpus"] == whole.card["seconds"]["corpus"]


def test_progress_of_a_resumed_training_counts_what_was_done(run: Run, tmp_path: Path) -> None:
    recipe = replace(DISTILLING, layers=((0,),), heads=(64,))
    with pytest.raises(KeyboardInterrupt):
        run(tmp_path, Listener("Training", 30), recipe)
    listener = Listener()
    run(tmp_path, listener, recipe)
    assert listener.units["Training"] == listener.totals["Training"]


def test_other_settings_are_refused_in_an_unfinished_folder(
    run: Run,
    whole: tuple[Path, SliceManifest, Listener],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    with pytest.raises(KeyboardInterrupt):
        run(tmp_path, Listener("Training", 3))
    others = [
        {"recipe": replace(DISTILLING, epochs=4.0)},
        {"recipe": replace(DISTILLING, heads=(64,))},
        {"recipe": replace(DISTILLING, training=replace(TRAINING, learning_rate=1e-3))},
        {"prompts": PROMPTS[:100]},
    ]
    for options in others:
        with pytest.raises(SpeckvError, match="holds an unfinished distillation with other sett"):
            run(tmp_path, **options)
    # A training that is cut off while its folder is cleared must not leave weights for another.
    unlink = Path.unlink

    def once(path: Path, missing_ok: bool = False) -> None:
        unlink(path, missing_ok=missing_ok)
        if path.parent.name == "unfinished" and path.name.endswith((".json", ".pt")):
            raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(Path, "unlink", once)
        with pytest.raises(KeyboardInterrupt):
            run(tmp_path)
    with pytest.raises(SpeckvError, match="other settings"):
        run(tmp_path, recipe=others[0]["recipe"])
    assert SliceManifest.read(tmp_path).sha256 == whole[1].sha256


def test_a_folder_in_use_is_refused(run: Run, tmp_path: Path) -> None:
    out, root = tmp_path / "out", tmp_path / "corpora"
    with (
        FileLock(tmp_path / "out.lock"),
        pytest.raises(SpeckvError, match=f"^{out} is in use by another distillation$"),
    ):
        run(out, corpus_root=root)
    assert [path.name for path in tmp_path.iterdir()] == ["out.lock"], "before the corpus"


def test_other_settings_are_refused_before_the_corpus(run: Run, tmp_path: Path) -> None:
    out = tmp_path / "out"
    with pytest.raises(KeyboardInterrupt):
        run(out, Listener("Corpus", len(PROMPTS)))
    with pytest.raises(SpeckvError, match="other settings"):
        run(out, prompts=PROMPTS[:100], corpus_root=tmp_path / "corpora")
    assert not (tmp_path / "corpora").exists()


def test_a_corpus_alone_needs_no_folder(run: Run, tmp_path: Path) -> None:
    root = tmp_path / "corpora"
    with pytest.raises(ValueError, match="^out: expected a folder, got none$"):
        run(None, corpus_root=root)
    assert not root.exists()
    assert run(None, corpus_root=root, corpus_only=True, prompts=PROMPTS[:12]) is None
    assert len(list(root.glob("*/shard-*.safetensors"))) == 1


def test_layers_to_try(run: Run, tmp_path: Path) -> None:
    manifest = run(tmp_path, recipe=replace(DISTILLING, epochs=0.5, layers=(), heads=(64,)))
    assert manifest is not None
    assert [trial["layers"] for trial in manifest.card["search"]] == [(0,), (0, 1)]


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"epochs": 0.0}, "epochs: expected more than 0, got 0.0"),
        ({"epochs": float("nan")}, "epochs: expected more than 0, got nan"),
        ({"search_share": 0.0}, "search_share: expected more than 0, got 0.0"),
        ({"heads": ()}, r"heads: expected sizes from 1 on, got \[\]"),
        ({"heads": (64, 0)}, r"heads: expected sizes from 1 on, got \[64, 0\]"),
        ({"layers": ((0,), ())}, "layers: expected at least one layer in each candidate"),
    ],
)
def test_bad_recipes(options: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        DistillRecipe(**options)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"prompts": PROMPTS[:2]}, "prompts: expected at least 3, .* got 2$"),
        (
            {"recipe": replace(DISTILLING, layers=((0,), (0, 4)))},
            r"layers: expected some of 0 to 3, got \[0, 4\]",
        ),
        (
            {"recipe": replace(DISTILLING, layers=((-1, 0),))},
            r"layers: expected some of 0 to 3, got \[-1, 0\]",
        ),
    ],
)
def test_bad_settings_are_refused_before_anything_is_written(
    options: dict[str, Any], message: str, run: Run, tmp_path: Path
) -> None:
    with pytest.raises(ValueError, match=message):
        run(tmp_path / "out", corpus_root=tmp_path / "corpora", **options)
    assert not list(tmp_path.iterdir())


def test_targets_that_cannot_be_sliced(run: Run, tmp_path: Path) -> None:
    other = save_target(seeded(MODELS["gpt2"]), tmp_path / "gpt2")
    with pytest.raises(ValueError, match="^target: expected a model of the Llama family, got "):
        run(tmp_path / "out", source=other)
    short = tiny_llama()
    short.model.layers, short.config.num_hidden_layers = short.model.layers[:1], 1
    single = save_target(short, tmp_path / "single")
    with pytest.raises(ValueError, match="^target: expected one of two layers or more, got "):
        run(tmp_path / "out", source=single, recipe=replace(DISTILLING, layers=()))


def test_the_command(
    folder: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.setenv(CACHE_VARIABLE, str(tmp_path / "cache"))
    monkeypatch.setattr(module, "measure", measure)
    file, out = tmp_path / "prompts.txt", tmp_path / "out"
    file.write_text("\n".join(prompt.text for prompt in make_prompts(24)))
    options = f"--target {folder} --prompts {file} --max-new-tokens 8 --seed 3"
    arguments = ["distill", *options.split(), "--device", "cpu"]
    assert cli.run([*arguments, "--corpus-only"]) == 0
    captured = capsys.readouterr()
    assert captured.out == "" and captured.err.endswith("the training text is complete\n")
    assert not out.exists() and len(list((tmp_path / "cache").rglob("shard-*.safetensors"))) == 1

    chosen = f"--out {out} --layers 0,3 --layers 1 --head 50 --epochs 2 --learning-rate 0.003"
    assert cli.run([*arguments, *chosen.split()]) == 0
    captured = capsys.readouterr()
    manifest = SliceManifest.read(out)
    assert captured.out == "" and f"{out}: {len(manifest.layers)} layers" in captured.err
    assert "head 50; accepted γ=1 " in captured.err and manifest.vocab_size == 50
    recipe = manifest.card["recipe"]
    assert (recipe["epochs"], recipe["layers"], recipe["heads"]) == (2.0, [[0, 3], [1]], [50])
    assert recipe["corpus"]["seed"] == recipe["training"]["seed"] == 3
    assert recipe["training"]["learning_rate"] == 0.003
    assert manifest.card["command"].startswith("speckv ")
    assert set(manifest.card["held_out"]["acceptance_by_task"]) == {"user"}
