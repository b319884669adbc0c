"""Weight compression: fp32, fp16 and bf16 as they are, int8 and nf4 in bitsandbytes' formats.

Compression is weight-only and row- or block-wise, so it depends on nothing but the weight: int8 is
bitsandbytes' row-wise format (codes CB int8 and absolute row maxima SCB, a weight being
``CB * SCB / 127``), nf4 its 4-bit NormalFloat format (Dettmers et al., QLoRA, 2023) in blocks of
64 without double quantisation. A checkpoint that bitsandbytes has quantised already is read as it
is, doubly quantised or not (:mod:`speckv.models.stored`). Only the linear layers of the decoder
blocks are compressed; embeddings, norms and the head stay in the activation type, as in
transformers.

On the CPU a compressed weight is expanded once, at load, and runs dense: the numerics are those of
the compressed model, the memory is not saved. On CUDA it stays packed: in fp16 and bf16 kernels
multiply few rows by it as it is, and what else there is expands it at every call.
"""

from __future__ import annotations

import importlib
import logging
from collections.abc import Sequence
from functools import cache
from typing import Any

import torch
from torch import Tensor

from speckv.errors import ModelError
from speckv.kernels.packed import (
    NESTED_BLOCK,
    NF4_BLOCK,
    Int8Weight,
    NestedScales,
    Nf4Weight,
    Weight,
)
from speckv.models.base import COMPRESSIONS

__all__ = ["FLOAT_NAMES", "Int8Weight", "Nf4Weight", "compress", "fuse", "resolve_formats"]

_FLOATS = {"fp32": torch.float32, "fp16": torch.float16, "bf16": torch.bfloat16}
FLOAT_NAMES = {dtype: name for name, dtype in _FLOATS.items()}
"""The weight format of each type that weights may have as they are."""


def resolve_formats(
    compression: str, dtype: torch.dtype | str | None, device: torch.device
) -> tuple[str, torch.dtype]:
    """Check a weight format against an activation type, and choose the type if there is none.

    Parameters
    ----------
    compression : str
        One of ``fp32``, ``fp16``, ``bf16``, ``int8``, ``nf4``.
    dtype : torch.dtype or str, optional
        Type of activations and KV cache: a torch type, or ``fp32``, ``fp16`` or ``bf16``. By
        default it follows the compression; int8 and nf4 take bf16 where the device computes in it,
        else fp32.
    device : torch.device
        Where the model will run.

    Returns
    -------
    tuple of str and torch.dtype

    Raises
    ------
    ValueError
        If either is unknown, or if they conflict (``fp16`` weights with bf16 activations).
    """
    if compression not in COMPRESSIONS:
        raise ValueError(
            f"compression: expected one of {', '.join(COMPRESSIONS)}, got {compression!r}"
        )
    wanted = _FLOATS.get(dtype) if isinstance(dtype, str) else dtype
    if (dtype is not None and wanted is None) or (wanted and wanted not in _FLOATS.values()):
        raise ValueError(f"dtype: expected one of {', '.join(_FLOATS)}, got {dtype!r}")
    own = _FLOATS.get(compression)
    if own is not None:
        if wanted not in (None, own):
            raise ValueError(
                f"dtype: compression {compression!r} computes in {own}, got {wanted}; "
                "int8 and nf4 leave the choice"
            )
        return compression, own
    if wanted is None:
        wanted = torch.bfloat16 if _computes_in_bf16(device) else torch.float32
    return compression, wanted


def _computes_in_bf16(device: torch.device) -> bool:
    if device.type != "cpu":
        return True
    probes = ("_is_avx512_bf16_supported", "_is_amx_tile_supported")
    return any(getattr(torch.cpu, probe, bool)() for probe in probes)


def compress(weight: Tensor, compression: str, dtype: torch.dtype) -> Weight:
    """Compress one linear weight [N, K] of any floating-point type.

    ``dtype`` is the type of an uncompressed result. int8 codes are made from the weight in fp16 and
    nf4 codes from the weight as stored, as bitsandbytes does.

    Raises
    ------
    ModelError
        If bitsandbytes is needed and missing.
    """
    if compression in _FLOATS:
        return weight.to(dtype)
    library = _bitsandbytes()
    if compression == "int8":
        codes, scale, _ = library.int8_vectorwise_quant(weight.to(torch.float16).contiguous())
        return Int8Weight(codes, scale.float())
    codes, state = library.quantize_4bit(
        weight.contiguous(), blocksize=NF4_BLOCK, quant_type="nf4", compress_statistics=False
    )
    shape = (weight.shape[0], weight.shape[1])
    return Nf4Weight(codes.flatten(), state.absmax.float(), state.code.float(), shape)


def fuse(parts: Sequence[Weight]) -> Weight:
    """Stack the rows of several weights of one format, each keeping its own codes.

    Absmax values of nf4 that are themselves coded stay so, if each part fills its blocks of them,
    and are written out in fp32 otherwise.

    Raises
    ------
    ValueError
        If an nf4 part does not fill its last block, so that blocks would straddle parts, or if the
        parts are of several formats or have other codes.
    """
    if len({type(part) for part in parts}) > 1:
        raise ValueError(
            "weight: expected parts of one format to be fused, got "
            + ", ".join(type(part).__name__ for part in parts)
        )
    first = parts[0]
    if len(parts) == 1:
        return first
    if isinstance(first, Tensor):
        return torch.cat([part for part in parts if isinstance(part, Tensor)])
    if isinstance(first, Int8Weight):
        whole = [part for part in parts if isinstance(part, Int8Weight)]
        return Int8Weight(
            torch.cat([part.codes for part in whole]), torch.cat([part.scale for part in whole])
        )
    blocks = [part for part in parts if isinstance(part, Nf4Weight)]
    columns = first.shape[1]
    for part in blocks:
        if part.shape[0] * columns % NF4_BLOCK:
            raise ValueError(
                f"weight: nf4 needs a multiple of {NF4_BLOCK} elements to be fused, "
                f"got {part.shape[0]} x {columns}"
            )
        if not torch.equal(part.table, blocks[0].table):
            raise ValueError("weight: expected nf4 parts of one code table to be fused")
    nested = _fuse_nested(blocks)
    return Nf4Weight(
        torch.cat([part.codes for part in blocks]),
        torch.cat([part.scales() if nested is None else part.absmax for part in blocks]),
        first.table,
        (sum(part.shape[0] for part in blocks), columns),
        nested,
    )


def _fuse_nested(parts: Sequence[Nf4Weight]) -> NestedScales | None:
    """The stacked scales' scales, if all parts have them, in whole blocks and with one table."""
    scales = [part.nested for part in parts if part.nested is not None]
    if len(scales) < len(parts):
        return None
    if any(part.absmax.shape[0] % NESTED_BLOCK for part in parts):
        return None
    if not all(torch.equal(each.table, scales[0].table) for each in scales):
        return None
    return NestedScales(
        scales[0].table,
        torch.cat([each.absmax for each in scales]),
        torch.cat([each.offset for each in scales]),
    )


@cache
def _bitsandbytes() -> Any:
    # At import it reports, on every machine, an optional kernel that is not used here.
    logging.getLogger("bitsandbytes.backends.cpu.ops").setLevel(logging.ERROR)
    try:
        return importlib.import_module("bitsandbytes.functional")
    except ImportError as error:
        raise ModelError(
            "compression int8 and nf4 need bitsandbytes, which cannot be imported "
            f"({error}); install it with: pip install bitsandbytes"
        ) from error
