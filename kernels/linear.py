"""Matrix products of few rows with weights in fp16, bf16, int8 or nf4; one launch each.

`linear` is the public function, `Linear` its prepared form for the decoder, `linear_out` the bare
launch. The kernel, with its formulas and the rules that keep the bits of a row apart from how many
rows there are, is in `linear_kernel`.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
import triton
from torch import Tensor

from . import reference_linear
from .checks import check_packed, check_scratch, check_tensor, dtype_name
from .device import EMULATED
from .linear_config import TILE_ROWS, Config, Scratch, _select_config
from .linear_kernel import _linear_kernel
from .nf4_lookup import NF4_TABLE
from .packed import NF4_BLOCK, Int8Weight, Nf4Weight, Weight
from .registry import FP_FUSION, KernelSpec, Variant

DTYPES = (torch.float16, torch.bfloat16)
ROWS_MAX = 136
"""A verification of 8 sequences at 17 rows each, the most the scratch of a `Linear` is made for."""


def linear_out(
    x: Tensor,
    weight: Weight,
    *,
    out: Tensor,
    config: Config,
    scratch: Scratch,
    bias: Tensor | None = None,
    residual: Tensor | None = None,
    swiglu: bool = False,
    norm: Tensor | None = None,
    eps: float = 0.0,
    norm_scale: float = 1.0,
    table: Tensor | None = None,
    pdl: bool = False,
) -> None:
    """Launch `linear` on arguments that `linear` would accept; nothing else.

    No allocation, no synchronisation: safe to capture in a CUDA graph. Runs on CPU tensors in
    Triton's interpreter.

    Parameters
    ----------
    x, weight, out, bias, residual, swiglu, norm, eps, norm_scale
        As in `linear`.
    config : Config
    scratch : Scratch
        Made for ``config``, and for at least as many rows.
    table : Tensor [16], optional
        Values of nf4 codes in the type of ``x``, where they are not `NF4_TABLE`'s; the interpreter
        always needs them.
    pdl : bool
        Programmatic dependent launch: from compute capability 9.0 on.
    """
    rows, depth = x.shape
    columns = out.shape[1]
    if rows == 0:
        return
    kind, codes, scale = "dense", weight, None
    nested = None
    if isinstance(weight, Int8Weight):
        kind, codes, scale = "int8", weight.codes, weight.scale
    elif isinstance(weight, Nf4Weight):
        kind, codes, scale, nested = "nf4", weight.codes, weight.absmax, weight.nested
    tiles = triton.cdiv(columns, config.block_n)
    # The stride of a single row means nothing, and must not choose another compilation.
    _linear_kernel[(triton.cdiv(rows, TILE_ROWS), tiles, config.splits)](
        x,
        norm,
        codes,
        scale,
        None if nested is None else nested.table,
        None if nested is None else nested.absmax,
        None if nested is None else nested.offset,
        table,
        bias,
        residual,
        out,
        scratch.partials if config.splits > 1 else None,
        scratch.counters if config.splits > 1 else None,
        x.stride(0) if rows > 1 else x.shape[1],
        columns if residual is None or rows == 1 else residual.stride(0),
        columns if rows == 1 else out.stride(0),
        rows,
        columns,
        depth,
        eps,
        norm_scale,
        KIND=kind,
        NORM=norm is not None,
        SWIGLU=swiglu,
        NESTED=nested is not None,
        STANDARD=table is None,
        HAS_BIAS=bias is not None,
        HAS_RESIDUAL=residual is not None,
        SPLITS=config.splits,
        BLOCK_N=config.block_n,
        BLOCK_K=config.block_k,
        EVEN=depth % config.block_k == 0,
        STAGES=config.num_stages,
        PDL=pdl,
        EMULATED=EMULATED,
        num_warps=config.num_warps,
        num_stages=config.num_stages,
        launch_pdl=pdl,
        maxnreg=config.maxnreg,
        enable_fp_fusion=FP_FUSION,
    )


class Linear:
    """`linear` with one weight, validated once: what the decoder calls.

    Parameters
    ----------
    weight, bias, swiglu, norm, eps, norm_scale
        As in `linear`. The tensors are kept, and read at each call.
    dtype : torch.float16 | torch.bfloat16
        Of what will be passed to the calls, and of the results.
    rows_max : int
        Most rows of a call.
    scratch : Scratch, optional
        To be shared with other products that never run at the same time. None: one of its own.

    Attributes
    ----------
    columns : int
        Of the result.
    scratch : Scratch or None
        None on the CPU, which needs none.

    Raises
    ------
    TypeError, ValueError
        As `linear`.
    """

    def __init__(
        self,
        weight: Weight,
        *,
        dtype: torch.dtype,
        bias: Tensor | None = None,
        swiglu: bool = False,
        norm: Tensor | None = None,
        eps: float = 0.0,
        norm_scale: float = 1.0,
        rows_max: int = ROWS_MAX,
        scratch: Scratch | None = None,
    ) -> None:
        device = _check_weight(weight, dtype)
        rows, self.depth = weight.shape
        if swiglu and rows % 2:
            raise ValueError(f"weight: expected an even number of rows for SwiGLU, got {rows}")
        if bias is not None:
            check_tensor("bias", bias, dtype_name(dtype), (rows,), device)
        if norm is not None:
            check_tensor("norm", norm, dtype_name(dtype), (self.depth,), device, dense=True)
        if not eps >= 0:
            raise ValueError(f"eps: expected a number from 0 on, got {eps}")
        if not norm_scale > 0:
            raise ValueError(f"norm_scale: expected a number above 0, got {norm_scale}")
        self.columns = rows // 2 if swiglu else rows
        self._weight, self._bias, self._swiglu = weight, bias, swiglu
        self._norm, self._eps, self._norm_scale = norm, eps, norm_scale
        self.dtype, self.device = dtype, device
        self.scratch: Scratch | None = None
        if device.type != "cpu":
            capability = torch.cuda.get_device_capability(device)
            multiprocessors = torch.cuda.get_device_properties(device).multi_processor_count
            self._config = _select_config(
                self.columns, self.depth, capability, _kind(weight), swiglu, multiprocessors
            )
            self._table = _custom_table(weight, dtype)
            form = (rows_max, self.columns, self._config)
            if scratch is None:
                scratch = Scratch.allocate(*form, device, swiglu=swiglu)
            else:
                check_scratch(scratch, Scratch.sizes(*form, swiglu=swiglu))
            self.scratch = scratch

    def __call__(
        self, x: Tensor, residual: Tensor | None = None, *, out: Tensor, pdl: bool = False
    ) -> None:
        """Multiply; the arguments are as in `linear_out`, and are not checked."""
        if self.scratch is None:
            reference_linear.linear(
                x,
                self._weight,
                out=out,
                bias=self._bias,
                residual=residual,
                swiglu=self._swiglu,
                norm=self._norm,
                eps=self._eps,
                norm_scale=self._norm_scale,
            )
        else:
            linear_out(
                x,
                self._weight,
                out=out,
                config=self._config,
                scratch=self.scratch,
                bias=self._bias,
                residual=residual,
                swiglu=self._swiglu,
                norm=self._norm,
                eps=self._eps,
                norm_scale=self._norm_scale,
                table=self._table,
                pdl=pdl,
            )


def share_scratch(products: Sequence[Linear]) -> None:
    """Let products that never run at the same time have one scratch, the largest of theirs."""
    own = [product.scratch for product in products if product.scratch is not None]
    if not own:
        return
    largest = Scratch(
        partials=max((scratch.partials for scratch in own), key=Tensor.numel),
        counters=max((scratch.counters for scratch in own), key=Tensor.numel),
    )
    for product in products:
        product.scratch = largest


def linear(
    x: Tensor,
    weight: Weight,
    *,
    bias: Tensor | None = None,
    residual: Tensor | None = None,
    swiglu: bool = False,
    norm: Tensor | None = None,
    eps: float = 0.0,
    norm_scale: float = 1.0,
    out: Tensor | None = None,
) -> Tensor:
    """``x @ weight.T + bias``, optionally of normalised rows, through SwiGLU, plus a residual.

    One launch.

    Sums are in fp32 and rounded once, at the end. On CPU tensors this is `reference_linear.linear`,
    elsewhere a kernel made for few rows: it is right for any number, and fast up to some 16 to 32.
    The bits of a row do not depend on the other rows or on their number.

    Parameters
    ----------
    x : fp16 | bf16 [M, K]
        Unit stride in K, any row stride; for nf4, rows start at multiples of 4 bytes. Not mutated.
        Full speed needs a base and a row stride that are multiples of 16 bytes and of 16 elements.
    weight : Tensor [N, K] | Int8Weight | Nf4Weight
        Contiguous; a plain one has the type of ``x``. Rows of a K that is no multiple of 16 are
        read element by element, which is right but slow; nf4 needs a multiple of 64.
    bias : Tensor [N], optional
        Of the type of ``x``, as are ``residual`` and ``out``.
    residual : Tensor [M, columns], optional
        Added last. Unit stride in the columns. Not mutated, unless it is also ``out``.
    swiglu : bool
        Whether the rows of ``weight`` are those of a gate and then as many of an up projection, of
        which the result is ``silu(gate) * up`` (Shazeer, 2020).
    norm : Tensor [K], optional
        The weight of an RMS norm that the rows of ``x`` go through first, of the type of ``x``.
        Their products with it must be finite.
    eps : float
        Of the norm: what is added to the mean square.
    norm_scale : float
        What a normalised row is multiplied by, in fp32: of a ``norm`` that was divided by it.
    out : Tensor [M, columns], optional
        Overwritten. Unit stride in the columns; may be ``residual``, and nothing else that is read.

    Returns
    -------
    Tensor [M, columns]
        ``out``, or a new tensor; N columns, or N / 2 with ``swiglu``.

    Raises
    ------
    TypeError, ValueError
        Naming the argument, what was expected and what came.

    Examples
    --------
    >>> linear(torch.ones(2, 64).half(), torch.full((3, 64), 0.5).half())
    tensor([[32., 32., 32.],
            [32., 32., 32.]], dtype=torch.float16)
    """
    if not isinstance(x, Tensor) or x.dtype not in DTYPES:
        raise TypeError(f"x: expected fp16 or bf16 [M, K], got {_describe(x)}")
    if x.dim() != 2:
        raise ValueError(f"x: expected [M, K], got {_describe(x)}")
    dtype = dtype_name(x.dtype)
    product = Linear(
        weight,
        dtype=x.dtype,
        bias=bias,
        swiglu=swiglu,
        norm=norm,
        eps=eps,
        norm_scale=norm_scale,
        rows_max=x.shape[0],
    )
    check_tensor("x", x, dtype, (x.shape[0], product.depth), product.device)
    shape = (x.shape[0], product.columns)
    if isinstance(weight, Nf4Weight) and (x.data_ptr() % 4 or (x.shape[0] > 1 and x.stride(0) % 2)):
        raise ValueError(
            f"x: expected rows that start at multiples of 4 bytes, got {_describe(x)} "
            f"at {x.data_ptr() % 4} bytes past one"
        )
    if residual is not None:
        check_tensor("residual", residual, dtype, shape, product.device)
    if out is None:
        out = torch.empty(shape, dtype=x.dtype, device=x.device)
    check_tensor("out", out, dtype, shape, product.device)
    product(x, residual, out=out)
    return out


def _kind(weight: Weight) -> str:
    if isinstance(weight, Int8Weight):
        return "int8"
    return "nf4" if isinstance(weight, Nf4Weight) else "dense"


def _custom_table(weight: Weight, dtype: torch.dtype) -> Tensor | None:
    """Values of the codes in ``dtype``, unless the kernel has them or there are none."""
    if not isinstance(weight, Nf4Weight):
        return None
    standard = torch.tensor(NF4_TABLE, dtype=torch.float32)
    if not EMULATED and torch.equal(weight.table.cpu(), standard):
        return None
    return weight.table.to(dtype)


def _check_weight(weight: Weight, dtype: torch.dtype) -> torch.device:
    """Refuse what `linear` cannot read; the device of what it can."""
    if dtype not in DTYPES:
        raise TypeError(f"dtype: expected torch.float16 or torch.bfloat16, got {dtype}")
    if isinstance(weight, Tensor):
        check_tensor("weight", weight, dtype_name(dtype), (None, None), dense=True)
        device = weight.device
    elif isinstance(weight, Int8Weight | Nf4Weight):
        if isinstance(weight, Nf4Weight) and weight.shape[1] % NF4_BLOCK:
            raise ValueError(
                f"weight: expected nf4 rows of a multiple of {NF4_BLOCK} elements, "
                f"got {weight.shape[1]}"
            )
        device = check_packed(weight)
    else:
        raise TypeError(
            f"weight: expected a tensor, Int8Weight or Nf4Weight, got {type(weight).__name__}"
        )
    if 0 in weight.shape:
        raise ValueError(f"weight: expected at least one row and column, got {[*weight.shape]}")
    return device


def _describe(value: object) -> str:
    if not isinstance(value, Tensor):
        return type(value).__name__
    return f"{value.dtype} {list(value.shape)} of strides {value.stride()} on {value.device}"


def _variant(
    name: str,
    dtype: str,
    kind: str,
    columns: int,
    depth: int,
    *,
    capability: tuple[int, int] = (9, 0),
    swiglu: bool = False,
    bias: bool = False,
    residual: bool = False,
    norm: bool = False,
    nested: bool = False,
    table: bool = False,
    pdl: bool = False,
) -> Variant:
    """What `linear_out` would launch."""
    config = _select_config(columns, depth, capability, kind, swiglu)
    split = config.splits > 1
    signature = {
        "x_ptr": f"*{dtype}",
        "weight_ptr": {"dense": f"*{dtype}", "int8": "*i8", "nf4": "*u8"}[kind],
        "out_ptr": f"*{dtype}",
        "stride_x": "i32",
        "stride_residual": "i32",
        "stride_out": "i32",
        "rows": "i32",
        "columns": "i32",
        "depth": "i32",
        "eps": "fp32",
        "norm_scale": "fp32",
    }
    optional = {
        "norm_ptr": (f"*{dtype}", norm),
        "scale_ptr": ("*u8" if nested else "*fp32", kind != "dense"),
        "nested_code_ptr": ("*fp32", nested),
        "nested_absmax_ptr": ("*fp32", nested),
        "offset_ptr": ("*fp32", nested),
        "table_ptr": (f"*{dtype}", table),
        "bias_ptr": (f"*{dtype}", bias),
        "residual_ptr": (f"*{dtype}", residual),
        "partials_ptr": ("*fp32", split),
        "counters_ptr": ("*i32", split),
    }
    signature |= {n: of for n, (of, given) in optional.items() if given}
    unaligned = () if depth % 16 == 0 else ("stride_x", "depth")
    return Variant(
        name=name,
        signature=signature,
        constexprs={
            **{n: None for n, (_, given) in optional.items() if not given},
            "KIND": kind,
            "NORM": norm,
            "SWIGLU": swiglu,
            "NESTED": nested,
            "STANDARD": not table,
            "HAS_BIAS": bias,
            "HAS_RESIDUAL": residual,
            "SPLITS": config.splits,
            "BLOCK_N": config.block_n,
            "BLOCK_K": config.block_k,
            "EVEN": depth % config.block_k == 0,
            "STAGES": config.num_stages,
            "PDL": pdl,
            "EMULATED": False,
        },
        divisible=frozenset(signature) - {"rows", "eps", "norm_scale", *unaligned},
        num_warps=config.num_warps,
        num_stages=config.num_stages,
        maxnreg=config.maxnreg,
        pdl=pdl,
    )


def _variants() -> tuple[Variant, ...]:
    """The products of a decoder of 2,048 hidden units, the largest of 4,096, and the odd ones."""
    variants = []
    for kind in ("dense", "int8", "nf4"):
        variants += [
            _variant(f"bf16-{kind}-qkv", "bf16", kind, 3072, 2048, bias=True),
            _variant(f"fp16-{kind}-qkv", "fp16", kind, 3072, 2048, bias=True),
            _variant(f"bf16-{kind}-down", "bf16", kind, 2048, 8192, residual=True),
            _variant(f"bf16-{kind}-swiglu", "bf16", kind, 8192, 2048, swiglu=True),
            _variant(f"bf16-{kind}-norm-qkv", "bf16", kind, 3072, 2048, norm=True),
            _variant(f"bf16-{kind}-norm-swiglu", "bf16", kind, 8192, 2048, norm=True, swiglu=True),
            _variant(
                f"bf16-{kind}-norm-swiglu-pdl",
                "bf16",
                kind,
                8192,
                2048,
                norm=True,
                swiglu=True,
                pdl=True,
            ),
            _variant(f"bf16-{kind}-down-pdl", "bf16", kind, 2048, 8192, residual=True, pdl=True),
        ]
    return (
        *variants,
        _variant("bf16-dense-head", "bf16", "dense", 128_256, 2048),
        _variant("bf16-dense-tail", "bf16", "dense", 2048, 1040),
        _variant("bf16-dense-odd", "bf16", "dense", 1031, 1031, bias=True, residual=True),
        _variant("bf16-int8-odd", "bf16", "int8", 1031, 1031, swiglu=True, bias=True),
        _variant("bf16-nf4-8B-norm-swiglu", "bf16", "nf4", 14_336, 4096, norm=True, swiglu=True),
        _variant("bf16-nf4-nested", "bf16", "nf4", 3072, 2048, nested=True),
        _variant("bf16-nf4-table", "bf16", "nf4", 3072, 2048, table=True),
    )


SPECS = (
    KernelSpec(
        name="linear",
        kernel=_linear_kernel,
        variants=_variants(),
        max_registers=150,
        max_shared_bytes=100_000,
    ),
)
