"""Validation that the public functions of the kernels share. Imports no triton."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor

from .packed import NESTED_BLOCK, NF4_BLOCK, Int8Weight, Nf4Weight

_DTYPES = {
    "floating": (torch.float32, torch.float16, torch.bfloat16),
    "float32": (torch.float32,),
    "float16": (torch.float16,),
    "bfloat16": (torch.bfloat16,),
    "uint8": (torch.uint8,),
    "int8": (torch.int8,),
    "int32": (torch.int32,),
    "int64": (torch.int64,),
}


def dtype_name(dtype: torch.dtype) -> str:
    """Torch's name of a type, such as ``"int32"``."""
    return str(dtype).removeprefix("torch.")


def check_tensor(
    name: str,
    tensor: object,
    dtype: str,
    shape: tuple[int | None, ...],
    device: torch.device | None = None,
    *,
    dense: bool = False,
) -> None:
    """Refuse a tensor of another dtype, shape, device or stride than expected.

    Parameters
    ----------
    name : str
        Of the argument, for the message.
    dtype : str
        ``"floating"`` (fp32, fp16, bf16), or torch's name of a type, such as ``"int32"``.
    shape : tuple
        None where any size will do.
    device : torch.device, optional
        None: any.
    dense : bool
        Whether the tensor must be contiguous; otherwise its last dimension must have unit stride.

    Raises
    ------
    TypeError
        Not a tensor, or of another dtype.
    ValueError
        Another shape, device or stride.
    """
    if not isinstance(tensor, Tensor):
        raise TypeError(f"{name}: expected a tensor of {dtype}, got {type(tensor).__name__}")
    wanted = f"{dtype} [{', '.join('any' if n is None else str(n) for n in shape)}]"
    got = f"{dtype_name(tensor.dtype)} {list(tensor.shape)}"
    if tensor.dtype not in _DTYPES[dtype]:
        raise TypeError(f"{name}: expected {wanted}, got {got}")
    fits = len(shape) == tensor.ndim and all(
        want is None or want == size for want, size in zip(shape, tensor.shape, strict=True)
    )
    if not fits:
        raise ValueError(f"{name}: expected {wanted}, got {got}")
    if device is not None and tensor.device != device:
        raise ValueError(f"{name}: expected a tensor on {device}, got one on {tensor.device}")
    if dense and not tensor.is_contiguous():
        raise ValueError(f"{name}: expected a contiguous tensor, got strides {tensor.stride()}")
    if tensor.shape[-1] > 1 and tensor.stride(-1) != 1:
        raise ValueError(
            f"{name}: expected unit stride in the last dimension, got {tensor.stride(-1)}"
        )


def check_packed(weight: Int8Weight | Nf4Weight) -> torch.device:
    """Refuse a packed weight whose tensors do not fit its shape, or each other.

    Returns
    -------
    torch.device
        Where it is.

    Raises
    ------
    TypeError, ValueError
        As `check_tensor`, naming the tensor.
    """
    device = weight.codes.device

    def check(name: str, tensor: Tensor, dtype: str, *shape: int | None) -> None:
        check_tensor(f"weight.{name}", tensor, dtype, shape, device, dense=True)

    if isinstance(weight, Int8Weight):
        check("codes", weight.codes, "int8", None, None)
        check("scale", weight.scale, "float32", weight.shape[0])
        return device
    total, nested = weight.shape[0] * weight.shape[1], weight.nested
    blocks = -(-total // NF4_BLOCK)
    check("codes", weight.codes, "uint8", -(-total // 2))
    check("absmax", weight.absmax, "float32" if nested is None else "uint8", blocks)
    check("table", weight.table, "float32", 16)
    if nested is not None:
        outer = -(-blocks // NESTED_BLOCK)
        check("nested.table", nested.table, "float32", 256)
        check("nested.absmax", nested.absmax, "float32", outer)
        check("nested.offset", nested.offset, "float32", outer)
    return device


def check_scratch(scratch: object, sizes: Mapping[str, int]) -> None:
    """Refuse scratch whose tensors have fewer elements than ``sizes`` says, by name.

    Raises
    ------
    ValueError
        Naming the first.
    """
    for name, size in sizes.items():
        given = getattr(scratch, name).shape[0]
        if given < size:
            raise ValueError(f"scratch: expected {name} of at least {size} elements, got {given}")
