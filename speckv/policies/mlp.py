"""The γ-MLP's weights and their file.

A policy file is safetensors: the weight tensors, the input standardisation and, of a policy trained
on traces, its record there; and metadata with ``format``, ``version``, ``layout``, ``gammas``, a
training card, and a SHA-256 over all of these and the tensors.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from ..errors import PolicyError
from ..files import write_atomically
from ..kernels import layout as at
from ..kernels.layout import WIDTH_MAX
from .cost import CostTable

FORMAT, VERSION = "speckv-policy", "3"
_LAYOUTS = {"survival": at.LAYOUT_SURVIVAL, "paper": at.LAYOUT_PAPER}
SHAPES = {
    "feature_mean": (at.FEATURES,),
    "feature_scale": (at.FEATURES,),
    "hidden_weight": (at.HIDDEN, at.FEATURES),
    "hidden_bias": (at.HIDDEN,),
    "output_weight": (at.OUTPUTS, at.HIDDEN),
    "output_bias": (at.OUTPUTS,),
}
_RECORD = "record"
_RECORD_WORDS = at.GAMMA_MAX + 4
_OFFSETS = {
    "feature_mean": at.FEATURE_MEAN,
    "feature_scale": at.FEATURE_SCALE,
    "hidden_weight": at.HIDDEN_WEIGHT,
    "hidden_bias": at.HIDDEN_BIAS,
    "output_weight": at.OUTPUT_WEIGHT,
    "output_bias": at.OUTPUT_BIAS,
}


@dataclass(frozen=True)
class Record:
    """How a policy did on its traces of one compression and temperature: its λ is from that.

    Attributes
    ----------
    survival : tuple of 15 floats
        Share of all places where at least k = 1..15 draft tokens are accepted.
    context : float
        Mean length of the committed text, in tokens.
    gain : float
        Its tokens per second over those of the best fixed γ.
    """

    survival: tuple[float, ...]
    context: float
    gain: float

    def rate(self, cost: CostTable) -> float:
        """Tokens per millisecond to be expected at these costs: the best fixed γ's, and the gain.

        That is λ of the rate objective, which should be the rate achieved.
        """
        tokens, best = 1.0, 0.0
        for gamma in range(WIDTH_MAX):
            ms = cost.step_ms[gamma] + cost.step_ms_per_context_token[gamma] * self.context
            best = max(best, tokens / ms)
            tokens += self.survival[gamma] if gamma < at.GAMMA_MAX else 0.0
        return self.gain * best


@dataclass(frozen=True, eq=False)
class Mlp:
    """Weights of the γ-MLP, in the layouts of `speckv.kernels.layout`.

    Attributes
    ----------
    layout : int
        ``LAYOUT_SURVIVAL`` or ``LAYOUT_PAPER``.
    gammas : tuple of int
        The γ of the data it was trained on.
    tensors : mapping of str to float32 Tensor
        ``feature_mean``, ``feature_scale`` [16], ``hidden_weight`` [16, 16], ``hidden_bias`` [16],
        ``output_weight`` [16, 16], ``output_bias`` [16].
    card : mapping
        How it was trained: data, seeds, metrics. JSON values.
    records : mapping of (int, float) to Record
        By compression, as its place in the inputs' one-hot, and temperature; empty for a policy of
        no trace, or of another pair's.
    """

    layout: int
    gammas: tuple[int, ...]
    tensors: Mapping[str, Tensor]
    card: Mapping[str, Any] = field(default_factory=dict)
    records: Mapping[tuple[int, float], Record] = field(default_factory=dict)

    def __post_init__(self) -> None:
        for name, shape in SHAPES.items():
            tensor = self.tensors.get(name)
            got = "nothing" if tensor is None else f"{tensor.dtype} {tuple(tensor.shape)}"
            if tensor is None or tensor.dtype != torch.float32 or tuple(tensor.shape) != shape:
                raise PolicyError(f"policy tensor {name}: expected float32 {shape}, got {got}")
            if not torch.isfinite(tensor).all():
                raise PolicyError(f"policy tensor {name}: expected finite values")
        if not self.gammas or not all(0 < g <= at.GAMMA_MAX for g in self.gammas):
            raise PolicyError(
                f"policy gammas: expected values from 1 to {at.GAMMA_MAX}, got {self.gammas}"
            )

    def record(self, compression: int, temperature: float) -> Record | None:
        """That of this compression at the nearest temperature, the lower of two."""
        near = [t for place, t in self.records if place == compression]
        if not near:
            return None
        return self.records[compression, min(near, key=lambda t: (abs(t - temperature), t))]

    @property
    def sees_matches(self) -> bool:
        """Whether FEATURE_MATCH is among the inputs that count."""
        weight = self.tensors["hidden_weight"][:, at.FEATURE_MATCH]
        return bool((weight * self.tensors["feature_scale"][at.FEATURE_MATCH]).any())

    def pack_into(self, buffer: Tensor) -> None:
        """Write layout and weights into a policy buffer, float32 [POLICY_WORDS]."""
        buffer[at.MLP_LAYOUT] = self.layout
        for name, offset in _OFFSETS.items():
            tensor = self.tensors[name]
            buffer[offset : offset + tensor.numel()] = tensor.t().flatten()

    def save(self, path: Path) -> None:
        """Write the policy file; an interrupted save leaves the old file or none."""
        tensors = {name: self.tensors[name].contiguous() for name in SHAPES}
        if self.records:
            tensors[_RECORD] = _pack_records(self.records)
        metadata = {
            "format": FORMAT,
            "version": VERSION,
            "layout": next(name for name, value in _LAYOUTS.items() if value == self.layout),
            "gammas": json.dumps(list(self.gammas)),
            "card": json.dumps(self.card, sort_keys=True),
        }
        metadata["sha256"] = _checksum(metadata, tensors)
        write_atomically(path, lambda temporary: save_file(tensors, temporary, metadata))

    @classmethod
    def load(cls, path: Path) -> Mlp:
        """Read a policy file.

        Raises
        ------
        PolicyError
            The file is missing, is no policy file, has another version, or fails its checksum.
        """
        try:
            with safe_open(str(path), framework="pt") as file:
                metadata = file.metadata() or {}
                tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
        except FileNotFoundError:
            raise PolicyError(f"policy file {path}: no such file") from None
        except (SafetensorError, OSError) as error:
            raise PolicyError(f"policy file {path}: not a safetensors file ({error})") from None
        if metadata.get("format") != FORMAT:
            raise PolicyError(f"policy file {path}: expected the format {FORMAT!r}")
        if metadata.get("version") != VERSION:
            raise PolicyError(
                f"policy file {path}: expected version {VERSION}, got {metadata.get('version')}; "
                "train it again with this version of speckv"
            )
        if metadata.get("sha256") != _checksum(metadata, tensors):
            raise PolicyError(f"policy file {path}: corrupt, its checksum does not match")
        try:
            layout = _LAYOUTS[metadata["layout"]]
            gammas = tuple(int(g) for g in json.loads(metadata["gammas"]))
            card = json.loads(metadata["card"])
        except (KeyError, TypeError, ValueError) as error:
            raise PolicyError(f"policy file {path}: bad metadata ({error!r})") from None
        record = tensors.pop(_RECORD, None)
        if record is not None and (record.ndim != 2 or record.shape[1] != _RECORD_WORDS):
            raise PolicyError(
                f"policy file {path}: expected a record of rows of {_RECORD_WORDS}, got "
                f"{tuple(record.shape)}"
            )
        records = {} if record is None else _unpack_records(record)
        return cls(layout, gammas, tensors, card, records)


def _pack_records(records: Mapping[tuple[int, float], Record]) -> Tensor:
    rows = [
        [place, temperature, *record.survival, record.context, record.gain]
        for (place, temperature), record in records.items()
    ]
    return torch.tensor(rows, dtype=torch.float32)


def _unpack_records(packed: Tensor) -> dict[tuple[int, float], Record]:
    """Temperatures as the decimals that they were."""
    return {
        (int(place), round(temperature, 6)): Record(tuple(survival), context, gain)
        for place, temperature, *survival, context, gain in packed.tolist()
    }


def _checksum(metadata: Mapping[str, str], tensors: Mapping[str, Tensor]) -> str:
    """Of everything in the file but the checksum itself."""
    facts = {name: value for name, value in metadata.items() if name != "sha256"}
    shapes = {name: [str(t.dtype), *t.shape] for name, t in tensors.items()}
    digest = hashlib.sha256(json.dumps([facts, shapes], sort_keys=True).encode())
    for name in sorted(tensors):
        digest.update(tensors[name].contiguous().numpy().tobytes())
    return digest.hexdigest()
