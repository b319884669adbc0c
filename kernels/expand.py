"""Packed weights written out whole: what a prompt of many rows is multiplied with; one launch.

    weight[n, k] = code[n, k] * (scale[n] / 127)               int8 (bitsandbytes: CB, SCB)
    weight[n, k] = table[code[n, k]] * absmax[64-block]        nf4, in blocks over rows and columns

Products and quotients are in fp32, and a weight is rounded once, to the type of the result.

Rules: every weight is written once, and nothing else is; a program reads each code once.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from .checks import check_packed, check_tensor, dtype_name
from .device import EMULATED, _round
from .linear_kernel import _absmax, _values
from .packed import NF4_BLOCK, Int8Weight, Nf4Weight
from .registry import FP_FUSION, KernelSpec, Variant

_COLUMNS = 2048
"""Weights of a row that a program of int8 expands."""
_BLOCKS = 64
"""Blocks of 64 weights that a program of nf4 expands."""
_NUM_WARPS = 4


@triton.jit
def _expand_int8_kernel(
    # inputs
    codes_ptr,  # [rows, columns]
    scale_ptr,  # [rows]
    # output
    out_ptr,  # [rows, columns]
    # shape
    columns,
    # constants
    BLOCK: tl.constexpr,
    EMULATED: tl.constexpr,
):
    i_row = tl.program_id(0).to(tl.int64)
    o = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    mask = o < columns
    scale = tl.div_rn(tl.load(scale_ptr + i_row), 127.0)
    codes = tl.load(codes_ptr + i_row * columns + o, mask=mask, other=0)
    weights = _round(codes.to(tl.float32) * scale, out_ptr.dtype.element_ty, EMULATED)
    tl.store(out_ptr + i_row * columns + o, weights, mask=mask)


@triton.jit
def _expand_nf4_kernel(
    # inputs
    codes_ptr,  # [total / 2]
    scale_ptr,  # [blocks]
    nested_code_ptr,  # [256]
    nested_absmax_ptr,  # [blocks / 256]
    offset_ptr,  # as nested_absmax
    table_ptr,  # fp32 [16]
    # output
    out_ptr,  # [total]
    # shape
    blocks,
    total,
    # constants
    NESTED: tl.constexpr,
    EVEN: tl.constexpr,
    BLOCKS: tl.constexpr,
    EMULATED: tl.constexpr,
):
    o_block = tl.program_id(0).to(tl.int64) * BLOCKS + tl.arange(0, BLOCKS)
    m_block = o_block < blocks
    o_known = tl.minimum(o_block, blocks - 1)
    absmax = _absmax(scale_ptr, nested_code_ptr, nested_absmax_ptr, offset_ptr, o_known, NESTED, 1)
    o_byte = o_block[:, None] * 32 + tl.arange(0, 32)[None, :]
    o_out = o_block[:, None] * 64 + tl.arange(0, 64)[None, :]
    m_byte, m_out = m_block[:, None], m_block[:, None]
    if not EVEN:
        m_byte, m_out = o_byte * 2 < total, o_out < total
    codes = tl.load(codes_ptr + o_byte, mask=m_byte, other=0)
    weights = _values(codes, table_ptr, tl.float32, False) * absmax
    tl.store(out_ptr + o_out, _round(weights, out_ptr.dtype.element_ty, EMULATED), mask=m_out)


def expand_out(weight: Int8Weight | Nf4Weight, *, out: Tensor) -> None:
    """Launch `expand` on arguments that it would accept; nothing else.

    No allocation, no synchronisation: safe to capture in a CUDA graph. Runs on CPU tensors in
    Triton's interpreter.

    Parameters
    ----------
    weight, out
        As in `expand`.
    """
    rows, columns = weight.shape
    if isinstance(weight, Int8Weight):
        _expand_int8_kernel[(rows, triton.cdiv(columns, _COLUMNS))](
            weight.codes,
            weight.scale,
            out,
            columns,
            BLOCK=_COLUMNS,
            EMULATED=EMULATED,
            num_warps=_NUM_WARPS,
            enable_fp_fusion=FP_FUSION,
        )
        return
    nested, blocks = weight.nested, weight.absmax.shape[0]
    _expand_nf4_kernel[(triton.cdiv(blocks, _BLOCKS),)](
        weight.codes,
        weight.absmax,
        None if nested is None else nested.table,
        None if nested is None else nested.absmax,
        None if nested is None else nested.offset,
        weight.table,
        out,
        blocks,
        rows * columns,
        NESTED=nested is not None,
        EVEN=rows * columns % NF4_BLOCK == 0,
        BLOCKS=_BLOCKS,
        EMULATED=EMULATED,
        num_warps=_NUM_WARPS,
        enable_fp_fusion=FP_FUSION,
    )


def expand(
    weight: Int8Weight | Nf4Weight, dtype: torch.dtype, *, out: Tensor | None = None
) -> Tensor:
    """The weights that a packed weight stands for, each rounded once.

    On the CPU this is the weight's own ``expand``, elsewhere one kernel launch with the same
    results; absmax values that are coded themselves may differ in their last bit of fp32.

    Parameters
    ----------
    weight : Int8Weight | Nf4Weight
        Of shape [N, K], its tensors contiguous.
    dtype : torch.dtype
        fp32, fp16 or bf16.
    out : Tensor [N, K], optional
        Of type ``dtype``, contiguous. Overwritten.

    Returns
    -------
    Tensor [N, K]
        ``out``, or a new tensor.

    Raises
    ------
    TypeError, ValueError
        Naming the argument, what was expected and what came.

    Examples
    --------
    >>> codes, scale = torch.tensor([[127, -64]]).char(), torch.tensor([0.5])
    >>> expand(Int8Weight(codes, scale), torch.bfloat16)
    tensor([[ 0.5000, -0.2520]], dtype=torch.bfloat16)
    """
    if not isinstance(weight, Int8Weight | Nf4Weight):
        raise TypeError(f"weight: expected Int8Weight or Nf4Weight, got {type(weight).__name__}")
    device = check_packed(weight)
    if dtype not in (torch.float32, torch.float16, torch.bfloat16):
        raise TypeError(f"dtype: expected torch.float32, float16 or bfloat16, got {dtype}")
    if out is None:
        out = torch.empty(weight.shape, dtype=dtype, device=device)
    check_tensor("out", out, dtype_name(dtype), weight.shape, device, dense=True)
    if device.type == "cpu":
        out.copy_(weight.expand(dtype))
    else:
        expand_out(weight, out=out)
    return out


def _variant(
    name: str, dtype: str, *, int8: bool = False, nested: bool = False, odd: bool = False
) -> Variant:
    """What `expand_out` would launch for a weight of 3,072 x 2,048, or of an odd size."""
    if int8:
        signature = {"codes_ptr": "*i8", "scale_ptr": "*fp32", "out_ptr": f"*{dtype}"}
        signature |= {"columns": "i32"}
        constexprs: dict[str, object] = {"BLOCK": _COLUMNS, "EMULATED": False}
        divisible = frozenset(signature) - ({"columns"} if odd else set())
        return Variant(name, signature, constexprs, divisible, num_warps=_NUM_WARPS)
    scales = {"nested_code_ptr": "*fp32", "nested_absmax_ptr": "*fp32", "offset_ptr": "*fp32"}
    signature = {
        "codes_ptr": "*u8",
        "scale_ptr": "*u8" if nested else "*fp32",
        **(scales if nested else {}),
        "table_ptr": "*fp32",
        "out_ptr": f"*{dtype}",
        "blocks": "i32",
        "total": "i32",
    }
    constexprs = {
        **({} if nested else dict.fromkeys(scales)),
        "NESTED": nested,
        "EVEN": not odd,
        "BLOCKS": _BLOCKS,
        "EMULATED": False,
    }
    divisible = frozenset(signature) - ({"blocks", "total"} if odd else set())
    return Variant(name, signature, constexprs, divisible, num_warps=_NUM_WARPS)


SPECS = (
    KernelSpec(
        name="expand_int8",
        kernel=_expand_int8_kernel,
        variants=(
            _variant("bf16", "bf16", int8=True),
            _variant("fp32", "fp32", int8=True),
            _variant("fp16-odd", "fp16", int8=True, odd=True),
        ),
        max_registers=64,
        max_shared_bytes=16_384,
    ),
    KernelSpec(
        name="expand_nf4",
        kernel=_expand_nf4_kernel,
        variants=(
            _variant("bf16", "bf16"),
            _variant("fp16-nested", "fp16", nested=True),
            _variant("fp32", "fp32"),
            _variant("fp32-odd", "fp32", odd=True),
        ),
        max_registers=96,
        max_shared_bytes=16_384,
    ),
)
