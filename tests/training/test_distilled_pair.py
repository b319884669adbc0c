"""An engine with a distilled draft: the tokens of plain decoding, and how a draft is named."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from speckv import Engine, SamplingParams
from speckv.errors import ModelError
from speckv.models import slice_draft
from speckv.models.llama import LlamaDecoder
from speckv.models.pairing import load_draft
from speckv.models.slice_draft import MANIFEST, save_slice_draft
from speckv.training.trainer import Trainer
from tests.models.conftest import seeded
from tests.models.test_adapter import MODELS
from tests.training.conftest import HEAD, LAYERS, make_prompts, save_target, tiny_llama

PROMPTS = [prompt.text for prompt in make_prompts(6, seed=7)]
SAMPLING = {
    "greedy": SamplingParams(40, ignore_eos=True),
    "sampled": SamplingParams(40, temperature=0.9, seed=3, ignore_eos=True),
    "truncated": SamplingParams(40, temperature=1.0, top_k=9, top_p=0.9, seed=3),
}


@pytest.fixture(scope="module")
def draft(
    new_trainer: Callable[..., Trainer],
    id_map: torch.Tensor,
    target: LlamaDecoder,
    tmp_path_factory: pytest.TempPathFactory,
) -> Path:
    """A folder as `speckv distill` leaves it."""
    folder, trainer = tmp_path_factory.mktemp("draft"), new_trainer()
    trainer.run(40)
    save_slice_draft(
        folder, trainer.student.trainable(), id_map, target=target, layers=LAYERS, card={}
    )
    return folder


def engine(folder: Path, draft: Path | str | None, **options: Any) -> Engine:
    name = None if draft is None else str(draft)
    return Engine.from_pretrained(
        str(folder), name, **{"policy": "fixed:4", "device": "cpu", "progress": False, **options}
    )


@pytest.mark.parametrize("sampling", SAMPLING)
@pytest.mark.parametrize("compression", ["fp32", "bf16", "int8"])
def test_it_generates_the_tokens_of_plain_decoding(
    folder: Path, draft: Path, compression: str, sampling: str, lossless: Callable[..., None]
) -> None:
    pair = engine(folder, draft, compression=compression)
    params = SAMPLING[sampling]
    plain = pair.generate(PROMPTS, params, policy="fixed:0")
    tokens = sum(len(result.token_ids) for result in plain)
    for policy in ("fixed:1", "fixed:8", "entropy:3"):
        lossless(
            policy=policy,
            compression=compression,
            sampling=sampling,
            draft="distilled",
            batch=str(len(PROMPTS)),
            sequences=len(PROMPTS),
            tokens=tokens,
        )
        results = pair.generate(PROMPTS, params, policy=policy)
        assert [r.token_ids for r in results] == [r.token_ids for r in plain]
        assert sum(accepted for r in results for _, accepted in r.stats.steps) > 10


def test_rejection_sampling_runs(folder: Path, draft: Path) -> None:
    params = SamplingParams(30, temperature=1.0, seed=1, coupling="rejection", ignore_eos=True)
    results = engine(folder, draft).generate(PROMPTS, params)
    assert all(len(result.token_ids) == 30 for result in results)
    assert sum(accepted for r in results for _, accepted in r.stats.steps) > 10


def test_the_head_proposes_its_own_tokens_alone(
    folder: Path, draft: Path, id_map: torch.Tensor
) -> None:
    pair = engine(folder, draft)
    assert pair.draft is not None and pair.draft.vocab_size == HEAD
    assert str(folder) in pair.describe() and f"draft (2 layers, head {HEAD}" in pair.describe()
    assert torch.equal(pair._loops._id_map, id_map.int())


def test_other_drafts_of_the_same_target(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(slice_draft, "_SHIPPED", folder / "nowhere")
    first = engine(folder, "first:2").draft
    assert isinstance(first, LlamaDecoder) and first.config.layers == 2
    assert engine(folder, "none", policy="fixed:0").draft is None
    assert engine(folder, None, policy="fixed:0").draft is None, "four layers are too few to cut"


def test_the_default_is_the_draft_that_comes_with_the_package(
    folder: Path, draft: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    shutil.copytree(draft, tmp_path / "some-draft")
    monkeypatch.setattr(slice_draft, "_SHIPPED", tmp_path)
    found = engine(folder, None).draft
    assert isinstance(found, LlamaDecoder) and found.vocab_size == HEAD
    params = SAMPLING["greedy"]
    explicit = engine(folder, draft).generate(PROMPTS, params)
    default = engine(folder, None).generate(PROMPTS, params)
    assert [r.stats.steps for r in default] == [r.stats.steps for r in explicit]


def test_a_draft_of_another_target_is_refused(draft: Path, tmp_path: Path) -> None:
    model = seeded(tiny_llama)
    with torch.no_grad():
        model.model.norm.weight.mul_(1.1)
    other = save_target(model, tmp_path)
    with pytest.raises(ModelError, match=f"^the draft in {draft} was made for .*, not for {other}"):
        engine(other, draft)


def test_a_target_of_another_family_has_no_distilled_draft(draft: Path, tmp_path: Path) -> None:
    other = save_target(seeded(MODELS["gpt2"]), tmp_path)
    with pytest.raises(ValueError, match=r"^draft '.*': .* is not of the Llama family$"):
        engine(other, draft)
    assert engine(other, None, policy="fixed:0").draft is None


def test_an_id_map_beside_a_distilled_draft_is_refused(
    folder: Path, draft: Path, id_map: torch.Tensor
) -> None:
    message = "^id_map: expected none for a distilled draft, which has its own, got one$"
    with pytest.raises(ValueError, match=message):
        engine(folder, draft, id_map=id_map.int())


@pytest.mark.parametrize("name", ["none", "lookup", "first:2", "lookup+first:2"])
def test_an_id_map_is_refused_where_none_is_used(
    name: str, folder: Path, id_map: torch.Tensor
) -> None:
    with pytest.raises(ValueError, match="^id_map: expected none (where|for) .*, got one$"):
        engine(folder, name, policy="fixed:0", id_map=id_map.int())


@pytest.mark.parametrize("name", ["first:0", "first:99"])
def test_more_layers_than_there_are(name: str, folder: Path) -> None:
    with pytest.raises(ValueError, match=f"^draft: expected first:1 to first:4, got '{name}'$"):
        engine(folder, name)


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (lambda folder: (folder / MANIFEST).unlink(), "is not a model folder: it has no config"),
        (lambda folder: (folder / MANIFEST).write_text("{}"), "is not the manifest of a draft"),
        (lambda folder: next(folder.glob("*.safetensors")).unlink(), "is incomplete: it has no"),
    ],
)
def test_bad_folders(
    damage: Callable[[Path], object], message: str, folder: Path, draft: Path, tmp_path: Path
) -> None:
    for file in draft.iterdir():
        (tmp_path / file.name).write_bytes(file.read_bytes())
    damage(tmp_path)
    with pytest.raises(ModelError, match=message) as caught:
        engine(folder, tmp_path)
    assert "\n" not in str(caught.value)


def test_a_folder_that_is_not_there(loaded: tuple[LlamaDecoder, Any], tmp_path: Path) -> None:
    with pytest.raises(ModelError, match="no such model folder"):
        load_draft(str(tmp_path / "nowhere"), *loaded)
