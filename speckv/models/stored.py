"""Weights that bitsandbytes has quantised, as transformers saves them in a checkpoint.

They are read as they are. An int8 weight ``W`` is stored as ``W.weight`` [N, K] int8 and ``W.SCB``
[N], the row maxima; an nf4 one as ``W.weight``, two codes a byte, ``W.weight.absmax``,
``W.weight.quant_map`` and a JSON text in ``W.weight.quant_state.bitsandbytes__nf4``, with
``nested_absmax`` and ``nested_quant_map`` beside them where the absmax values are quantised too.
"""

from __future__ import annotations

import json
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from speckv.errors import ModelError
from speckv.kernels.packed import NESTED_BLOCK, NF4_BLOCK, Int8Weight, NestedScales, Nf4Weight

if TYPE_CHECKING:
    from speckv.models.weights import TensorSource

__all__ = ["is_stored", "read_stored", "stored_compression"]

_STATE = "weight.quant_state.bitsandbytes__"


def stored_compression(config: Any, name: str) -> str | None:
    """The format that a transformers configuration says the weights have: int8, nf4 or None.

    Raises
    ------
    ModelError
        If it is another one.
    """
    found = getattr(config, "quantization_config", None)
    if found is None:
        return None
    options: dict[str, Any] = found if isinstance(found, dict) else found.to_dict()
    if options.get("quant_method") == "bitsandbytes":
        if options.get("load_in_8bit") or options.get("_load_in_8bit"):
            return "int8"
        if options.get("bnb_4bit_quant_type") == "nf4":
            return "nf4"
    raise ModelError(
        f"{name} is already quantised, and not in bitsandbytes' int8 or nf4; load the original "
        "checkpoint and choose compression int8 or nf4 instead"
    )


def is_stored(source: TensorSource, name: str) -> bool:
    """Whether the linear layer ``name`` of a checkpoint is quantised."""
    return any(f"{name}.{part}" in source for part in ("SCB", f"{_STATE}nf4", f"{_STATE}fp4"))


def read_stored(
    source: TensorSource,
    name: str,
    shape: tuple[int, int],
    device: torch.device,
    sample: Callable[[str, Tensor], object],
) -> Int8Weight | Nf4Weight:
    """The weight of the linear layer ``name``, packed as it is stored.

    Parameters
    ----------
    source : TensorSource
    name : str
        For which `is_stored`.
    shape : (int, int)
        That it must have.
    device : torch.device
        Where to.
    sample : callable
        Called with the name of each tensor and what was read.

    Raises
    ------
    ModelError
        If something is missing, or of another shape or kind.
    """

    def read(part: str, count: int | None = None) -> Tensor:
        key = f"{name}.{part}"
        if key not in source:
            raise ModelError(f"the checkpoint has no tensor {key!r}: it is incomplete or corrupt")
        tensor = source[key]
        if count is not None and tensor.numel() != count:
            raise ModelError(
                f"the checkpoint's tensor {key!r} has {tensor.numel()} elements, expected {count}"
            )
        sample(key, tensor)
        return tensor.to(device)

    rows, columns = shape
    if f"{name}.SCB" in source:
        _expect(name, tuple(source[f"{name}.weight"].shape), shape)
        layout = f"{name}.weight_format"
        if layout in source and int(source[layout]):
            raise ModelError(f"the checkpoint's int8 weight {name!r} is not stored row by row")
        values = read("weight")
        if values.dtype != torch.int8:
            raise ModelError(f"the checkpoint's weight {name!r} is {values.dtype}, expected int8")
        return Int8Weight(values.contiguous(), read("SCB", rows).flatten().float())
    if f"{name}.{_STATE}nf4" not in source:
        raise ModelError(f"the checkpoint's weight {name!r} is fp4; expected nf4")
    state = json.loads(bytes(source[f"{name}.{_STATE}nf4"].cpu().tolist()))
    _expect(name, tuple(state["shape"]), shape)
    if state["blocksize"] != NF4_BLOCK or state.get("nested_blocksize", 256) != NESTED_BLOCK:
        raise ModelError(
            f"the checkpoint's nf4 weight {name!r} has blocks of {state['blocksize']} elements and "
            f"{state.get('nested_blocksize')} scales, expected {NF4_BLOCK} and {NESTED_BLOCK}"
        )
    codes = read("weight").contiguous().view(torch.uint8).flatten()
    if codes.numel() != -(-rows * columns // 2):
        raise ModelError(
            f"the checkpoint's nf4 weight {name!r} has {codes.numel()} bytes, expected "
            f"{-(-rows * columns // 2)}"
        )
    blocks = -(-rows * columns // NF4_BLOCK)
    absmax = read("weight.absmax", blocks).flatten()
    nested = None
    if "nested_offset" in state:
        nested = NestedScales(
            read("weight.nested_quant_map", 256).float(),
            read("weight.nested_absmax", -(-blocks // NESTED_BLOCK)).flatten().float(),
            torch.tensor(float(state["nested_offset"]), device=device),
        )
    else:
        absmax = absmax.float()
    table = read("weight.quant_map", 16).float()
    return Nf4Weight(codes, absmax, table, shape, nested)


def _expect(name: str, found: tuple[int, ...], shape: tuple[int, int]) -> None:
    if found != shape:
        raise ModelError(f"the checkpoint's weight {name!r} has shape {found}, expected {shape}")
