"""The slice draft: a few layers cut from the target and trained on, with a head of their own.

It shares the target's embeddings and proposes the most frequent part of the vocabulary only. A
folder holds what is new, ``draft.json`` and one safetensors file that it names; both hold for one
target, told by its fingerprint.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from speckv.errors import ModelError
from speckv.files import write_atomically
from speckv.models.llama import LlamaDecoder
from speckv.models.weights import TensorSource

__all__ = [
    "MANIFEST",
    "SliceManifest",
    "load_slice_draft",
    "read_tensors",
    "rounded",
    "save_slice_draft",
    "shipped_draft",
]

MANIFEST = "draft.json"
_FORMAT = 1
_SCALE = ".scale"
_ID_MAP = "id_map"
_SHIPPED = Path(__file__).parents[1] / "data" / "drafts"


@dataclass(frozen=True)
class SliceManifest:
    """What ``draft.json`` says.

    Attributes
    ----------
    target : str
        Name of the target, for people.
    fingerprint : str
        The target's `LlamaDecoder.fingerprint`.
    layers : tuple of int
        The target's layers that the draft's began as.
    vocab_size : int
        Rows of the head.
    weights, sha256 : str
        Name and digest of the safetensors file.
    card : dict
        How it was trained, and what it reached.
    """

    target: str
    fingerprint: str
    layers: tuple[int, ...]
    vocab_size: int
    weights: str
    sha256: str
    card: dict[str, Any] = field(default_factory=dict)

    @classmethod
    def read(cls, folder: Path) -> SliceManifest:
        """Read a folder's manifest.

        Raises
        ------
        ModelError
            There is none, or it is corrupt, or of another format.
        """
        path = folder / MANIFEST
        try:
            data = json.loads(path.read_text(encoding="utf-8"))
            version = data.pop("format")
            if version != _FORMAT:
                raise ModelError(f"{path}: expected format {_FORMAT}, got {version}; distill again")
            return cls(**{**data, "layers": tuple(data["layers"])})
        except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
            raise ModelError(f"{path} is not the manifest of a draft ({error})") from error


def save_slice_draft(
    folder: Path,
    tensors: Mapping[str, Tensor],
    id_map: Tensor,
    *,
    target: LlamaDecoder,
    layers: tuple[int, ...],
    card: dict[str, Any],
) -> SliceManifest:
    """Write a draft; until the last rename the folder holds the old one, if there was one.

    Parameters
    ----------
    folder : Path
        Made if it does not exist.
    tensors : mapping
        ``model.layers.0...``, ``model.norm.weight`` and ``lm_head.weight``, floating point.
        Matrices are stored as int8 with a scale a row, vectors as they are in fp32.
    id_map : int [vocab_size]
        Target id of each row of the head.
    """
    from safetensors.torch import save

    stored: dict[str, Tensor] = {_ID_MAP: id_map.to(torch.int32).cpu().contiguous()}
    for name, tensor in tensors.items():
        stored |= _pack(name, tensor.detach().float().cpu())
    data = save(stored)
    digest = hashlib.sha256(data).hexdigest()
    manifest = SliceManifest(
        target=target.name,
        fingerprint=target.fingerprint,
        layers=layers,
        vocab_size=id_map.numel(),
        weights=f"draft-{digest[:12]}.safetensors",
        sha256=digest,
        card=card,
    )
    write_atomically(folder / manifest.weights, lambda path: path.write_bytes(data))
    text = json.dumps({"format": _FORMAT, **asdict(manifest)}, indent=1) + "\n"
    write_atomically(folder / MANIFEST, lambda path: path.write_text(text, encoding="utf-8"))
    for stale in folder.glob("draft-*.safetensors"):
        if stale.name != manifest.weights:
            stale.unlink()
    return manifest


def load_slice_draft(folder: Path, target: LlamaDecoder) -> tuple[LlamaDecoder, Tensor]:
    """The draft in ``folder`` for ``target``, in its dtype and on its device.

    Returns
    -------
    draft : LlamaDecoder
    id_map : int32 [vocab_size]
        Target id of each draft id.

    Raises
    ------
    ModelError
        The folder holds no draft, a corrupt one, or one for another target.
    """
    manifest = SliceManifest.read(folder)
    if manifest.fingerprint != target.fingerprint:
        raise ModelError(
            f"the draft in {folder} was made for {manifest.target} "
            f"({manifest.fingerprint[:12]}), not for {target.name} ({target.fingerprint[:12]})"
        )
    tensors, id_map = read_tensors(folder, manifest)
    draft = target.slice_draft(
        tensors, manifest.layers, manifest.vocab_size, name=_name(target, manifest)
    )
    return draft, id_map.to(target.device)


def read_tensors(folder: Path, manifest: SliceManifest) -> tuple[TensorSource, Tensor]:
    """The tensors of a draft by name, fp32, and its id map (int32 [vocab_size]).

    Raises
    ------
    ModelError
        The weights are missing or corrupt.
    """
    from safetensors.torch import load

    path = folder / manifest.weights
    try:
        data = path.read_bytes()
    except OSError as error:
        raise ModelError(f"{folder} is incomplete: it has no {manifest.weights}") from error
    if hashlib.sha256(data).hexdigest() != manifest.sha256:
        raise ModelError(f"{path} is corrupt: its checksum is not that of {MANIFEST}")
    stored = load(data)
    return _Unpacked(stored), stored[_ID_MAP]


def shipped_drafts() -> list[Path]:
    """Folders of the drafts that come with the package."""
    return [path.parent for path in sorted(_SHIPPED.glob(f"*/{MANIFEST}"))]


def shipped_draft(fingerprint: str) -> Path | None:
    """Folder of the draft that comes with the package for a target of that fingerprint, if any."""
    for folder in shipped_drafts():
        if SliceManifest.read(folder).fingerprint == fingerprint:
            return folder
    return None


def rounded(tensor: Tensor) -> Tensor:
    """A tensor as it is after `save_slice_draft` and `load_slice_draft`, in fp32."""
    return _Unpacked(_pack("x", tensor.detach().float()))["x"]


def _name(target: LlamaDecoder, manifest: SliceManifest) -> str:
    return (
        f"{target.name} draft ({len(manifest.layers)} layers, head {manifest.vocab_size}, "
        f"{manifest.sha256[:8]})"
    )


class _Unpacked:
    """Stored tensors as fp32, by name: a `TensorSource`."""

    def __init__(self, stored: Mapping[str, Tensor]) -> None:
        self._stored = stored

    def __contains__(self, name: object) -> bool:
        return name in self._stored

    def __getitem__(self, name: str) -> Tensor:
        tensor = self._stored[name]
        if tensor.dtype != torch.int8:
            return tensor
        return tensor.float() * self._stored[name + _SCALE][:, None]


def _pack(name: str, tensor: Tensor) -> dict[str, Tensor]:
    """A matrix as int8 [rows, columns] and fp32 scales [rows]: round(w / s), s = max|w| / 127."""
    if tensor.ndim != 2:
        return {name: tensor.contiguous()}
    scale = tensor.abs().amax(dim=1).clamp(min=1e-12) / 127
    return {name: (tensor / scale[:, None]).round().to(torch.int8), name + _SCALE: scale}
