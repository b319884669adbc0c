"""Loading from folders, GGUF files and the hub, and every way in which it can fail."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from speckv.errors import ModelError
from speckv.models.adapter import TransformersAdapter
from speckv.models.llama import LlamaDecoder
from speckv.models.loading import load_model, open_checkpoint
from tests.models.conftest import VOCAB, seeded, tiny_tokenizer
from tests.models.test_adapter import MODELS


@pytest.fixture(scope="module")
def folder(family: Any, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A sharded safetensors checkpoint with a tokenizer and a generation config."""
    path = tmp_path_factory.mktemp("checkpoint")
    family("qwen3-yarn").save_pretrained(path, max_shard_size="50KB")
    tiny_tokenizer(["red", "green"]).save_pretrained(path)
    (path / "generation_config.json").write_text(json.dumps({"eos_token_id": [2, 7]}))
    assert len(list(path.glob("*.safetensors"))) > 1
    return path


def copied(folder: Path, to: Path) -> Path:
    for file in folder.iterdir():
        (to / file.name).write_bytes(file.read_bytes())
    return to


def test_a_folder(folder: Path, decoder: Any, tokens: Tensor) -> None:
    model, tokenizer = load_model(folder, device="cpu")
    assert isinstance(model, LlamaDecoder) and tokenizer.eos_token_id == 2
    assert (model.name, model.compression, model.dtype) == (str(folder), "fp32", torch.float32)
    assert model.eos_ids == (2, 7) and model.vocab_size == VOCAB
    block = tokens[None, :9]
    expected = decoder("qwen3-yarn").forward(block, [0], decoder("qwen3-yarn").new_cache(1, 9))
    assert torch.equal(model.forward(block, [0], model.new_cache(1, 9)), expected)


def test_the_type_chooses_the_weight_format(folder: Path) -> None:
    for dtype in ("bf16", torch.bfloat16):
        model, _ = load_model(folder, dtype=dtype, device="cpu")
        assert (model.compression, model.dtype) == ("bf16", torch.bfloat16)


def test_a_folder_of_another_family(tmp_path: Path, tokens: Tensor) -> None:
    source = seeded(MODELS["gpt2"])
    source.save_pretrained(tmp_path)
    tiny_tokenizer(["red"]).save_pretrained(tmp_path)
    model, _ = load_model(tmp_path, device="cpu")
    assert isinstance(model, TransformersAdapter)
    logits = model.forward(tokens[None, :9], [0], model.new_cache(1, 9))
    with torch.no_grad():
        expected = source(tokens[None, :9]).logits
    torch.testing.assert_close(logits, expected, rtol=1e-5, atol=1e-5)


def test_a_family_checkpoint_without_safetensors(
    family: Any, folder: Path, tmp_path: Path, tokens: Tensor
) -> None:
    without_safetensors(folder, family("qwen3-yarn"), tmp_path)
    model, _ = load_model(tmp_path, device="cpu")
    expected, _ = load_model(folder, device="cpu")
    block = tokens[None, :5]
    logits = [each.forward(block, [0], each.new_cache(1, 5)) for each in (model, expected)]
    assert isinstance(model, LlamaDecoder) and torch.equal(*logits)


def without_safetensors(folder: Path, model: Any, to: Path) -> Path:
    copied(folder, to)
    for file in [*to.glob("*.safetensors"), to / "model.safetensors.index.json"]:
        file.unlink()
    torch.save(model.state_dict(), to / "pytorch_model.bin")
    return to


@pytest.mark.parametrize("kind", ["safetensors", "bin"])
def test_the_tensors_of_a_folder(kind: str, family: Any, folder: Path, tmp_path: Path) -> None:
    model = family("qwen3-yarn")
    source = folder if kind == "safetensors" else without_safetensors(folder, model, tmp_path)
    config, tensors = open_checkpoint(source)
    assert config.model_type == "qwen3" and config.eos_token_id == [2, 7]
    for name, expected in model.state_dict().items():
        assert name in tensors and torch.equal(tensors[name], expected)
    assert "model.layers.3.mlp.up_proj.weight" not in tensors


def test_the_tensors_of_a_gguf_file(
    family: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = family("llama-tied-llama3")
    monkeypatch.setattr("speckv.models.loading.load_gguf", lambda path: (model, None))
    (tmp_path / "model.gguf").touch()
    config, tensors = open_checkpoint(tmp_path / "model.gguf")
    assert config is model.config
    assert torch.equal(tensors["model.norm.weight"], model.state_dict()["model.norm.weight"])


def test_the_tensors_of_another_family_are_refused(tmp_path: Path) -> None:
    seeded(MODELS["gpt2"]).save_pretrained(tmp_path)
    with pytest.raises(ValueError, match="model_type: expected one of llama, .*, got 'gpt2'"):
        open_checkpoint(tmp_path)


@pytest.mark.parametrize("load", [load_model, open_checkpoint])
@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("/no/such/folder", "no such model folder: /no/such/folder"),
        ("no-such-file.gguf", "no such file: no-such-file.gguf"),
        ("what is this?", "no such model folder: what is this"),
    ],
)
def test_names_that_lead_nowhere(load: Any, name: str, message: str) -> None:
    with pytest.raises(ModelError, match=message):
        load(name)


def test_a_folder_that_is_not_a_model(tmp_path: Path) -> None:
    with pytest.raises(ModelError, match="is not a model folder: it has no config.json"):
        load_model(tmp_path, device="cpu")
    file = tmp_path / "notes.txt"
    file.write_text("no model")
    with pytest.raises(ModelError, match="neither a model folder nor a .gguf file"):
        load_model(file, device="cpu")


def _truncate(folder: Path) -> None:
    shard = sorted(folder.glob("*.safetensors"))[0]
    shard.write_bytes(shard.read_bytes()[:100])


def _forget(folder: Path) -> None:
    sorted(folder.glob("*.safetensors"))[0].unlink()


def _drop_tensor(folder: Path) -> None:
    from safetensors.torch import load_file, save_file

    for shard in folder.glob("*.safetensors"):
        tensors = load_file(shard)
        tensors.pop("model.layers.1.mlp.up_proj.weight", None)
        save_file(tensors, shard, metadata={"format": "pt"})


def _reshape(folder: Path) -> None:
    config = json.loads((folder / "config.json").read_text())
    config["intermediate_size"] += 8
    (folder / "config.json").write_text(json.dumps(config))


def _quantised(folder: Path) -> None:
    config = json.loads((folder / "config.json").read_text())
    config["quantization_config"] = {"quant_method": "gptq", "bits": 4}
    (folder / "config.json").write_text(json.dumps(config))


def _scramble_config(folder: Path) -> None:
    (folder / "config.json").write_text("{not json")


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (_truncate, "cannot load a model from"),
        (_forget, "cannot load a model from"),
        (_drop_tensor, "has no tensor 'model.layers.1.mlp.up_proj.weight'"),
        (_reshape, r"tensor 'model.layers.0.mlp.gate_proj.weight' has shape \(80, 48\), expected"),
        (_quantised, "is already quantised"),
        (_scramble_config, "cannot load a model from"),
    ],
)
def test_damaged_checkpoints(damage: Any, message: str, folder: Path, tmp_path: Path) -> None:
    damage(copied(folder, tmp_path))
    with pytest.raises(ModelError, match=message) as caught:
        load_model(tmp_path, device="cpu")
    assert "\n" not in str(caught.value)


def test_a_corrupt_gguf_file(tmp_path: Path) -> None:
    file = tmp_path / "model.gguf"
    file.write_bytes(b"GGUF" + b"\0" * 64)
    with pytest.raises(ModelError, match="cannot be read as a GGUF model") as caught:
        load_model(file, device="cpu")
    assert "\n" not in str(caught.value)


def _error(name: str) -> Exception:
    from huggingface_hub import errors

    kind = getattr(errors, name)
    # Built without their constructors, which want a response of the hub's HTTP library.
    raised: Exception = kind.__new__(kind)
    raised.args = ("refused",)
    return raised


@pytest.mark.parametrize(
    ("error", "message"),
    [
        ("RepositoryNotFoundError", "unknown model 'some/model'"),
        ("GatedRepoError", "some/model is gated on the Hugging Face hub: accept its terms"),
        ("LocalEntryNotFoundError", "could not download 'some/model'.*check the network"),
        ("HfHubHTTPError", "could not download 'some/model'.*check the network"),
    ],
)
def test_what_the_hub_may_answer(error: str, message: str, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*_: object, **__: object) -> None:
        raise _error(error)

    monkeypatch.setattr("huggingface_hub.snapshot_download", refuse)
    with pytest.raises(ModelError, match=message) as caught:
        load_model("some/model", device="cpu")
    assert "\n" not in str(caught.value)


def test_a_hub_id_is_downloaded_and_loaded(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    asked = []

    def download(name: str, **_: object) -> str:
        asked.append(name)
        return str(folder)

    monkeypatch.setattr("huggingface_hub.snapshot_download", download)
    model, _ = load_model("some/model", device="cpu")
    assert model.name == "some/model" and asked == ["some/model"]


def test_devices_are_checked() -> None:
    with pytest.raises(
        ValueError, match="device: expected a torch device such as 'cpu', got 'gpu9'"
    ):
        load_model("smollm2", device="gpu9")
