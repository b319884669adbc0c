"""Slice drafts: what a folder holds, what it is refused for, and the decoder that it becomes."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from speckv.errors import ModelError
from speckv.models import slice_draft as module
from speckv.models.llama import LlamaDecoder
from speckv.models.loading import wrap_model
from speckv.models.slice_draft import (
    MANIFEST,
    SliceManifest,
    load_slice_draft,
    rounded,
    save_slice_draft,
    shipped_draft,
)
from tests.models.conftest import FAMILY, VOCAB, seeded
from tests.tolerances import assert_close

NAME = "llama-biased"
LAYERS = (0, 2)
HEAD = 60


def cut(model: Any, layers: tuple[int, ...], id_map: Tensor) -> dict[str, Tensor]:
    """The tensors of a draft: layers, norm and head rows of a model, all a little changed."""
    draw = torch.Generator().manual_seed(5)
    tensors = {}
    for name, tensor in model.state_dict().items():
        parts = name.split(".")
        if parts[1] == "layers" and int(parts[2]) in layers:
            parts[2] = str(layers.index(int(parts[2])))
            tensors[".".join(parts)] = tensor
    tensors["model.norm.weight"] = model.state_dict()["model.norm.weight"]
    tensors["lm_head.weight"] = model.state_dict()["lm_head.weight"][id_map]
    return {name: t + 0.02 * torch.randn(t.shape, generator=draw) for name, t in tensors.items()}


@pytest.fixture(scope="module")
def id_map() -> Tensor:
    return torch.randperm(VOCAB, generator=torch.Generator().manual_seed(2))[:HEAD]


@pytest.fixture(scope="module")
def target(decoder: Callable[..., LlamaDecoder]) -> LlamaDecoder:
    return decoder(NAME)


@pytest.fixture(scope="module")
def tensors(family: Callable[[str], Any], id_map: Tensor) -> dict[str, Tensor]:
    return cut(family(NAME), LAYERS, id_map)


@pytest.fixture
def saved(tensors: dict[str, Tensor], id_map: Tensor, target: LlamaDecoder, tmp_path: Path) -> Path:
    save_slice_draft(
        tmp_path / "draft", tensors, id_map, target=target, layers=LAYERS, card={"steps": 3}
    )
    return tmp_path / "draft"


def logits(model: LlamaDecoder, tokens: Tensor) -> Tensor:
    return model.forward(tokens[None, :40], [0], model.new_cache(1, 40))[0]


def test_a_draft_is_loaded_as_it_was_saved(
    saved: Path, tensors: dict[str, Tensor], id_map: Tensor, target: LlamaDecoder, tokens: Tensor
) -> None:
    draft, ids = load_slice_draft(saved, target)
    assert ids.dtype == torch.int32 and torch.equal(ids, id_map.int())
    assert (draft.vocab_size, draft.embedding_size) == (HEAD, VOCAB)
    assert draft.config.layers == 2 and draft.compression == "fp32"
    assert draft.name.startswith(f"{target.name} draft (2 layers, head {HEAD}, ")
    kept = {name: rounded(tensor) for name, tensor in tensors.items()}
    expected = target.slice_draft(kept, LAYERS, HEAD, name="expected")
    assert torch.equal(logits(draft, tokens), logits(expected, tokens))
    unrounded = target.slice_draft(tensors, LAYERS, HEAD, name="unrounded")
    assert not torch.equal(logits(draft, tokens), logits(unrounded, tokens))


def test_the_manifest_tells_what_the_folder_holds(saved: Path, target: LlamaDecoder) -> None:
    manifest = SliceManifest.read(saved)
    assert (manifest.target, manifest.fingerprint) == (target.name, target.fingerprint)
    assert (manifest.layers, manifest.vocab_size, manifest.card) == (LAYERS, HEAD, {"steps": 3})
    assert sorted(path.name for path in saved.iterdir()) == sorted([MANIFEST, manifest.weights])
    assert json.loads((saved / MANIFEST).read_text())["format"] == 1


def test_a_file_holds_no_embedding_and_a_byte_a_weight(
    saved: Path, tensors: dict[str, Tensor]
) -> None:
    from safetensors.torch import load_file

    stored = load_file(saved / SliceManifest.read(saved).weights)
    matrices = {name for name, tensor in tensors.items() if tensor.ndim == 2}
    assert {name for name, t in stored.items() if t.dtype == torch.int8} == matrices
    assert set(stored) == {*tensors, *(f"{name}.scale" for name in matrices), "id_map"}


@pytest.mark.parametrize("scale", [1e-20, 1e-3, 1.0, 1e6])
def test_rounding_is_by_half_a_scale_of_each_row(scale: float) -> None:
    matrix = torch.randn(50, 33, generator=torch.Generator().manual_seed(0)) * scale
    matrix *= torch.logspace(-3, 3, 50)[:, None]
    matrix[7] = 0
    step = matrix.abs().amax(dim=1, keepdim=True).clamp(min=1e-12).double() / 127
    error = (rounded(matrix).double() - matrix.double()).abs()
    assert bool((error <= step * 0.50001).all()) and bool((error[:7].amax(1) > 0).any())
    assert not rounded(matrix)[7].any()
    vector = torch.randn(33)
    assert torch.equal(rounded(vector), vector)
    assert rounded(matrix.bfloat16()).dtype == torch.float32


def test_the_embedding_is_the_targets_own(saved: Path, target: LlamaDecoder) -> None:
    draft, _ = load_slice_draft(saved, target)
    shared = target._weights.embedding.data_ptr()
    assert draft._weights.embedding.data_ptr() == shared


@pytest.mark.parametrize("name", ["llama-tied-llama3", "mistral-window", "qwen2-window"])
@pytest.mark.parametrize("layers", [(0, 2), (2, 1), (1,)])
def test_a_draft_computes_as_the_whole_model_of_its_layers(
    name: str,
    layers: tuple[int, ...],
    family: Callable[[str], Any],
    decoder: Callable[..., LlamaDecoder],
    tokens: Tensor,
) -> None:
    target, everything = decoder(name), torch.arange(VOCAB)
    parts = cut(family(name), layers, everything)
    embedding = {
        "model.embed_tokens.weight": family(name).state_dict()["model.embed_tokens.weight"]
    }
    config = replace(
        target.config, windows=tuple(target.config.windows[i] for i in layers), tied=False
    )
    whole = LlamaDecoder.from_tensors(
        config,
        parts | embedding,
        name="whole",
        compression="fp32",
        dtype=torch.float32,
        device=torch.device("cpu"),
    )
    draft = target.slice_draft(parts, layers, VOCAB, name="draft")
    assert torch.equal(logits(draft, tokens), logits(whole, tokens))
    trimmed = {**parts, "lm_head.weight": parts["lm_head.weight"][:HEAD]}
    small = target.slice_draft(trimmed, layers, HEAD, name="small")
    assert_close(logits(small, tokens), logits(whole, tokens)[:, :HEAD], torch.float32)


@pytest.mark.parametrize(
    ("compression", "dtype"),
    [("bf16", None), ("fp16", None), ("int8", torch.float32), ("nf4", torch.bfloat16)],
)
def test_a_draft_takes_the_type_of_its_target(
    compression: str,
    dtype: torch.dtype | None,
    saved: Path,
    decoder: Callable[..., LlamaDecoder],
    tokens: Tensor,
) -> None:
    target = decoder(NAME, compression, dtype)
    draft, _ = load_slice_draft(saved, target)
    found = logits(draft, tokens)
    assert found.dtype == target.dtype and found.isfinite().all()
    exact, _ = load_slice_draft(saved, decoder(NAME))
    scale = logits(exact, tokens).std()
    assert float((found.float() - logits(exact, tokens)).std() / scale) < 0.02


@pytest.mark.parametrize("layers", [(), (0, 3), (-1,)])
def test_layers_that_the_target_lacks(layers: tuple[int, ...], target: LlamaDecoder) -> None:
    with pytest.raises(ValueError, match=r"^layers: expected some of 0 to 2, got \["):
        target.slice_draft({}, layers, HEAD, name="draft")


def test_tensors_that_are_missing_or_misshapen(
    tensors: dict[str, Tensor], target: LlamaDecoder
) -> None:
    with pytest.raises(ModelError, match=r"'lm_head.weight' has shape \(60, 48\), expected \(61"):
        target.slice_draft(tensors, LAYERS, HEAD + 1, name="draft")
    with pytest.raises(ModelError, match="has no tensor 'model.layers.2"):
        target.slice_draft(tensors, (0, 1, 2), HEAD, name="draft")


def test_a_fingerprint_is_the_checkpoints_whatever_the_compression(
    decoder: Callable[..., LlamaDecoder],
) -> None:
    for name in ("llama-biased", "llama-tied-llama3"):
        prints = {decoder(name, c).fingerprint for c in ("fp32", "fp16", "bf16", "int8", "nf4")}
        assert len(prints) == 1


@pytest.mark.parametrize(
    "changed",
    [
        "model.embed_tokens.weight",
        "model.layers.0.self_attn.q_proj.weight",
        "model.layers.1.self_attn.o_proj.bias",
        "model.layers.2.mlp.down_proj.weight",
        "model.layers.2.input_layernorm.weight",
        "model.norm.weight",
        "lm_head.weight",
    ],
)
def test_a_fingerprint_tells_checkpoints_apart(changed: str, target: LlamaDecoder) -> None:
    other = seeded(FAMILY[NAME])
    same = wrap_model(other, device="cpu")
    assert isinstance(same, LlamaDecoder) and same.fingerprint == target.fingerprint
    with torch.no_grad():
        other.get_parameter(changed).mul_(1.01)
    model = wrap_model(other, device="cpu")
    assert isinstance(model, LlamaDecoder) and model.fingerprint != target.fingerprint


def test_another_target_is_refused(saved: Path, decoder: Callable[..., LlamaDecoder]) -> None:
    other = decoder("llama-linear")
    message = r"^the draft in .* was made for .* \([0-9a-f]{12}\), not for .* \([0-9a-f]{12}\)$"
    with pytest.raises(ModelError, match=message):
        load_slice_draft(saved, other)


def weights_of(folder: Path) -> Path:
    return folder / SliceManifest.read(folder).weights


def _flip(folder: Path) -> None:
    data = bytearray(weights_of(folder).read_bytes())
    data[-1] ^= 1
    weights_of(folder).write_bytes(data)


def _edit(**changes: Any) -> Callable[[Path], None]:
    def edit(folder: Path) -> None:
        data = json.loads((folder / MANIFEST).read_text()) | changes
        kept = {key: value for key, value in data.items() if value is not None}
        (folder / MANIFEST).write_text(json.dumps(kept))

    return edit


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (_flip, r"\.safetensors is corrupt: its checksum is not that of draft.json"),
        (lambda folder: weights_of(folder).unlink(), "is incomplete: it has no draft-"),
        (_edit(format=2), "expected format 1, got 2; distill again"),
        (_edit(format=None), "is not the manifest of a draft"),
        (_edit(layers=None), "is not the manifest of a draft"),
        (_edit(extra=1), "is not the manifest of a draft"),
        (lambda f: (f / MANIFEST).write_text("{oh"), "is not the manifest of a draft"),
        (lambda f: (f / MANIFEST).write_text("[1]"), "is not the manifest of a draft"),
        (lambda f: (f / MANIFEST).write_bytes(b"\xff\xfe"), "is not the manifest of a draft"),
        (lambda f: (f / MANIFEST).unlink(), "is not the manifest of a draft"),
    ],
)
def test_damaged_folders(
    damage: Callable[[Path], object], message: str, saved: Path, target: LlamaDecoder
) -> None:
    damage(saved)
    with pytest.raises(ModelError, match=message) as caught:
        load_slice_draft(saved, target)
    assert "\n" not in str(caught.value)


def test_an_interrupted_overwrite_leaves_the_old_draft(
    saved: Path,
    tensors: dict[str, Tensor],
    id_map: Tensor,
    target: LlamaDecoder,
    tokens: Tensor,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    old = logits(load_slice_draft(saved, target)[0], tokens)
    better = {name: tensor * 1.5 for name, tensor in tensors.items()}
    write = module.write_atomically

    def save() -> None:
        save_slice_draft(saved, better, id_map, target=target, layers=LAYERS, card={})

    for last in ("draft-", MANIFEST):

        def interrupted(path: Path, content: Any, last: str = last) -> None:
            if path.name.startswith(last):
                raise KeyboardInterrupt
            write(path, content)

        monkeypatch.setattr(module, "write_atomically", interrupted)
        with pytest.raises(KeyboardInterrupt):
            save()
        assert torch.equal(logits(load_slice_draft(saved, target)[0], tokens), old)
    monkeypatch.setattr(module, "write_atomically", write)
    save()
    assert not torch.equal(logits(load_slice_draft(saved, target)[0], tokens), old)
    assert len(list(saved.iterdir())) == 2, "the old weights are gone"


def test_a_shipped_draft_is_found_by_its_target(
    saved: Path,
    target: LlamaDecoder,
    decoder: Callable[..., LlamaDecoder],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(module, "_SHIPPED", saved.parent)
    assert shipped_draft(target.fingerprint) == saved
    assert shipped_draft(decoder(NAME, "int8").fingerprint) == saved
    assert shipped_draft(decoder("llama-linear").fingerprint) is None
    monkeypatch.setattr(module, "_SHIPPED", saved.parent / "nowhere")
    assert shipped_draft(target.fingerprint) is None
