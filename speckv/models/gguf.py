"""Reading GGUF checkpoints through transformers, and rewriting one as an ordinary folder."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import torch

from speckv.errors import ModelError
from speckv.models.progress import without_transformers_bars

__all__ = ["load_gguf", "write_gguf_as_folder"]


def load_gguf(path: Path) -> tuple[Any, Any]:
    """The transformers model (fp32) and tokenizer of a GGUF file.

    Raises
    ------
    ModelError
        If the file is corrupt, or of an architecture that transformers cannot read.
    """
    from transformers import AutoModelForCausalLM, AutoTokenizer

    where = {"pretrained_model_name_or_path": str(path.parent), "gguf_file": path.name}
    try:
        with without_transformers_bars():
            model = AutoModelForCausalLM.from_pretrained(**where, dtype=torch.float32)
            tokenizer = AutoTokenizer.from_pretrained(**where)
    except ImportError as error:
        raise ModelError(f"reading {path.name} needs gguf: pip install gguf ({error})") from error
    except Exception as error:  # transformers and gguf raise whatever they stumble over
        raise ModelError(f"{path} cannot be read as a GGUF model: {_one_line(error)}") from error
    if getattr(model.config, "quantization_config", None) is not None:
        del model.config.quantization_config
    return model, tokenizer


def write_gguf_as_folder(path: Path, into: Path) -> None:
    """Write a GGUF file as config, tokenizer and safetensors.

    The weights are stored as fp16 if that loses nothing, else as fp32.

    Parameters
    ----------
    path : Path
        The GGUF file.
    into : Path
        An empty folder.
    """
    from safetensors.torch import save_file

    model, tokenizer = load_gguf(path)
    tensors = {name: t.contiguous() for name, t in model.state_dict().items()}
    if model.config.tie_word_embeddings:
        tensors.pop("lm_head.weight", None)
    exact = all(torch.equal(t.half().float(), t) for t in tensors.values())
    if exact:
        tensors = {name: t.half() for name, t in tensors.items()}
    config = model.config.to_dict()
    config["dtype"] = "float16" if exact else "float32"
    config["architectures"] = [type(model).__name__]
    (into / "config.json").write_text(json.dumps(config, indent=2, sort_keys=True) + "\n")
    tokenizer.save_pretrained(into)
    save_file(tensors, into / "model.safetensors", metadata={"format": "pt"})


def _one_line(error: BaseException) -> str:
    text = str(error).strip().splitlines()
    return f"{type(error).__name__}: {text[0] if text else 'no message'}"
