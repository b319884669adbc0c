"""Checkpoints that transformers and bitsandbytes have quantised are read as they are."""

from __future__ import annotations

import json
import logging
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from speckv.errors import ModelError
from speckv.kernels.packed import Int8Weight, Nf4Weight
from speckv.models import quantize
from speckv.models.config import DecoderConfig
from speckv.models.llama import LlamaDecoder
from speckv.models.loading import _SafetensorsFolder, load_model, open_checkpoint, wrap_model
from tests.models.conftest import VOCAB, seeded, tiny_tokenizer

FORMATS = {
    "int8": {"load_in_8bit": True},
    "nf4": {"load_in_4bit": True, "bnb_4bit_quant_type": "nf4"},
    "nf4-double": {
        "load_in_4bit": True,
        "bnb_4bit_quant_type": "nf4",
        "bnb_4bit_use_double_quant": True,
        "bnb_4bit_quant_storage": "bfloat16",
    },
    "fp4": {"load_in_4bit": True, "bnb_4bit_quant_type": "fp4"},
}
GOOD = ("int8", "nf4", "nf4-double")
LINEAR = "model.layers.1.mlp.down_proj"


def _source() -> Any:
    from transformers import Qwen2Config, Qwen2ForCausalLM

    return Qwen2ForCausalLM(
        Qwen2Config(
            vocab_size=VOCAB,
            hidden_size=128,
            intermediate_size=256,
            num_hidden_layers=2,
            num_attention_heads=4,
            num_key_value_heads=2,
            max_position_embeddings=512,
            initializer_range=0.15,
        )
    )


@pytest.fixture(scope="module")
def plain(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("plain")
    seeded(_source).save_pretrained(path)
    tiny_tokenizer(["red", "green"]).save_pretrained(path)
    return path


Checkpoint = Callable[[str], tuple[Path, Any]]


@pytest.fixture(scope="module")
def checkpoint(plain: Path, tmp_path_factory: pytest.TempPathFactory) -> Checkpoint:
    """The folder of a format, and the model that transformers made of it; made once."""
    from transformers import AutoModelForCausalLM, BitsAndBytesConfig

    logging.getLogger("bitsandbytes.backends.cpu.ops").setLevel(logging.ERROR)
    made: dict[str, tuple[Path, Any]] = {}

    def get(name: str) -> tuple[Path, Any]:
        if name not in made:
            model = AutoModelForCausalLM.from_pretrained(
                plain,
                quantization_config=BitsAndBytesConfig(**FORMATS[name]),
                device_map="cpu",
                dtype=torch.float32,
            )
            path = tmp_path_factory.mktemp(name)
            model.save_pretrained(path)
            tiny_tokenizer(["red", "green"]).save_pretrained(path)
            made[name] = path, model
        return made[name]

    return get


def dequantised(model: Any) -> Any:
    """The model's plain twin, of weights that bitsandbytes itself dequantises."""
    import bitsandbytes as bnb

    twin = seeded(_source)
    state = {name: tensor.clone() for name, tensor in twin.state_dict().items()}
    for name, module in model.named_modules():
        if isinstance(module, bnb.nn.Linear4bit):
            weight = module.weight
            state[f"{name}.weight"] = bnb.functional.dequantize_4bit(
                weight.data, weight.quant_state
            )
        elif isinstance(module, bnb.nn.Linear8bitLt):
            weight = module.weight
            codes, scale = weight.data, weight.SCB
            state[f"{name}.weight"] = bnb.functional.int8_vectorwise_dequant(codes, scale)
    changed = [n for n, tensor in twin.state_dict().items() if not torch.equal(tensor, state[n])]
    assert len(changed) == 14
    twin.load_state_dict(state)
    return twin


def compression_of(name: str) -> str:
    return name.removesuffix("-double")


@pytest.mark.parametrize("name", GOOD)
def test_logits_are_those_of_the_dequantised_weights(
    name: str, checkpoint: Checkpoint, tokens: Tensor
) -> None:
    path, quantised = checkpoint(name)
    model, _ = load_model(path, dtype="fp32", device="cpu")
    assert isinstance(model, LlamaDecoder)
    assert (model.compression, model.dtype) == (compression_of(name), torch.float32)
    found = model.forward(tokens[None, :20], [0], model.new_cache(1, 20))
    with torch.no_grad():
        expected = dequantised(quantised)(tokens[None, :20]).logits
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-4)
    plain_model = wrap_model(seeded(_source), compression="fp32", device="cpu")
    other = plain_model.forward(tokens[None, :20], [0], plain_model.new_cache(1, 20))
    assert float((found - other).abs().max()) > 0.01


@pytest.mark.parametrize("name", GOOD)
def test_packed_weights_are_the_bytes_of_the_file(
    name: str, checkpoint: Checkpoint, tokens: Tensor, monkeypatch: pytest.MonkeyPatch
) -> None:
    """By the fused path; double-quantised scales stay so where parts are stacked, too."""
    path, _ = checkpoint(name)

    def requantised(*_: object) -> None:
        raise AssertionError("quantised again")

    monkeypatch.setattr(quantize, "_bitsandbytes", requantised)
    source = _SafetensorsFolder(path)
    built = LlamaDecoder.from_tensors(
        DecoderConfig.from_transformers(_source().config),
        source,
        name=name,
        compression=compression_of(name),
        dtype=torch.bfloat16,
        device=torch.device("cpu"),
        invariant=False,
        stored=True,
    )
    layer = built._weights.layers[1].fused
    assert layer is not None
    down, gate_up = layer.down._weight, layer.gate_up._weight
    codes = source[f"{LINEAR}.weight"]
    if name == "int8":
        assert isinstance(down, Int8Weight) and isinstance(gate_up, Int8Weight)
        assert torch.equal(down.codes, codes)
        assert torch.equal(down.scale, source[f"{LINEAR}.SCB"])
    else:
        assert isinstance(down, Nf4Weight) and isinstance(gate_up, Nf4Weight)
        assert torch.equal(down.codes, codes.view(torch.uint8).flatten())
        assert torch.equal(down.absmax, source[f"{LINEAR}.weight.absmax"])
        assert (down.nested is not None) == (gate_up.nested is not None) == (name == "nf4-double")
    logits = built.forward(tokens[None, :5], [0], built.new_cache(1, 8)).float()
    exact, _ = load_model(path, dtype="fp32", device="cpu")
    expected = exact.forward(tokens[None, :5], [0], exact.new_cache(1, 8))
    assert float((logits - expected).abs().max() / expected.abs().max()) <= 3e-2


@pytest.mark.parametrize("name", GOOD)
def test_a_quantised_model_in_memory(name: str, checkpoint: Checkpoint, tokens: Tensor) -> None:
    path, quantised = checkpoint(name)
    logits = []
    for model in (wrap_model(quantised, dtype="fp32", device="cpu"), load_model(path)[0]):
        assert model.compression == compression_of(name)
        if model.dtype == torch.float32:
            logits.append(model.forward(tokens[None, :5], [0], model.new_cache(1, 8)))
    assert len(logits) == 1 or torch.equal(*logits)


def test_other_formats_are_refused(checkpoint: Checkpoint, plain: Path) -> None:
    path, quantised = checkpoint("nf4")
    with pytest.raises(ValueError, match="compression: .* is quantised already, to 'nf4', got 'b"):
        load_model(path, compression="bf16", device="cpu")
    with pytest.raises(ValueError, match="is quantised already, to 'nf4', got 'int8'"):
        wrap_model(quantised, compression="int8", device="cpu")
    with pytest.raises(ModelError, match="not in bitsandbytes' int8 or nf4"):
        load_model(checkpoint("fp4")[0], device="cpu")
    with pytest.raises(ModelError, match="which only Llama-family targets in safetensors may be"):
        open_checkpoint(path)


def _no_scales(tensors: dict[str, Tensor]) -> None:
    del tensors[f"{LINEAR}.weight.absmax"]


def _fewer_codes(tensors: dict[str, Tensor]) -> None:
    tensors[f"{LINEAR}.weight.absmax"] = tensors[f"{LINEAR}.weight.absmax"][1:].clone()


def _change_state(tensors: dict[str, Tensor], **changes: object) -> None:
    name = f"{LINEAR}.weight.quant_state.bitsandbytes__nf4"
    state = json.loads(bytes(tensors[name].tolist())) | changes
    tensors[name] = torch.tensor(list(json.dumps(state).encode()), dtype=torch.uint8)


def _other_blocks(tensors: dict[str, Tensor]) -> None:
    _change_state(tensors, blocksize=128)


def _other_shape(tensors: dict[str, Tensor]) -> None:
    _change_state(tensors, shape=[256, 128])


def _quantised_head(tensors: dict[str, Tensor]) -> None:
    tensors["lm_head.weight"] = tensors["lm_head.weight"].to(torch.int8)


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (_no_scales, "has no tensor 'model.layers.1.mlp.down_proj.weight.absmax'"),
        (_fewer_codes, "down_proj.weight.absmax' has 511 elements, expected 512"),
        (_other_blocks, "has blocks of 128 elements and None scales, expected 64 and 256"),
        (_other_shape, r"down_proj' has shape \(256, 128\), expected \(128, 256\)"),
        (_quantised_head, r"'lm_head.weight' is quantised \(torch.int8\)"),
    ],
)
def test_damaged_checkpoints(
    damage: Callable[[dict[str, Tensor]], None],
    message: str,
    checkpoint: Checkpoint,
    tmp_path: Path,
) -> None:
    from safetensors.torch import load_file, save_file

    for file in checkpoint("nf4")[0].iterdir():
        (tmp_path / file.name).write_bytes(file.read_bytes())
    tensors = load_file(tmp_path / "model.safetensors")
    damage(tensors)
    save_file(tensors, tmp_path / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(ModelError, match=message) as caught:
        load_model(tmp_path, device="cpu")
    assert "\n" not in str(caught.value)
