"""Attention of a few new positions a sequence over the static KV cache; one launch.

`attention` is the public function, `attention_out` the bare launch. The kernel, with its rules and
what keeps the bits of a row apart from the rows beside it, is in `attention_kernel`.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
import triton
from torch import Tensor

from . import functional
from .attention_kernel import PROGRAMS, TILE_ROWS, _attention_kernel
from .checks import check_scratch, check_tensor, dtype_name
from .device import EMULATED
from .registry import FP_FUSION, KernelSpec, Variant

DTYPES = (torch.float16, torch.bfloat16)
HEAD_DIMS = (16, 32, 64, 128, 256)


@dataclass(frozen=True)
class Config:
    """A program takes chunks of ``chunk`` positions, ``block`` of them at a time."""

    chunk: int = 128
    block: int = 64
    num_warps: int = 4
    num_stages: int = 3


def _select_config(head_dim: int) -> Config:
    """One chunk for every context and capacity: a row's result must depend on neither."""
    return Config(
        block=64 if head_dim <= 128 else 32,
        num_stages=3 if head_dim <= 128 else 2,
    )


def _programs(capacity: int, config: Config) -> int:
    """Programs of a tile over a cache of so many rows."""
    return min(-(-capacity // config.chunk), PROGRAMS)


@dataclass(frozen=True)
class Scratch:
    """What programs hand to each other; launches that share it must not overlap.

    Attributes
    ----------
    tops, values : float32 [any]
    counters : int32 [any]
        Programs of a tile that have arrived; zero between launches.
    """

    tops: Tensor
    values: Tensor
    counters: Tensor

    @staticmethod
    def sizes(queries: torch.Size, kv_heads: int, capacity: int) -> dict[str, int]:
        """Elements of each tensor for what `allocate` takes."""
        batch, width, heads, head_dim = queries
        tiles = batch * kv_heads * triton.cdiv(width * heads // kv_heads, TILE_ROWS.value)
        rows = tiles * _programs(capacity, _select_config(head_dim)) * TILE_ROWS.value
        return {"tops": 2 * rows, "values": rows * head_dim, "counters": tiles}

    def covers(self, queries: torch.Size, kv_heads: int, capacity: int) -> bool:
        """Whether it will do for what `allocate` takes."""
        sizes = self.sizes(queries, kv_heads, capacity)
        return all(getattr(self, name).numel() >= size for name, size in sizes.items())

    @classmethod
    def allocate(
        cls, queries: torch.Size, kv_heads: int, capacity: int, device: torch.device | str
    ) -> Scratch:
        """Scratch for queries of up to this shape, over caches of up to ``capacity`` rows."""
        sizes = cls.sizes(queries, kv_heads, capacity)
        return cls(
            tops=torch.empty(sizes["tops"], dtype=torch.float32, device=device),
            values=torch.empty(sizes["values"], dtype=torch.float32, device=device),
            counters=torch.zeros(sizes["counters"], dtype=torch.int32, device=device),
        )


def attention_out(
    queries: Tensor,
    cache: Tensor,
    positions: Tensor,
    slots: Tensor,
    *,
    out: Tensor,
    scratch: Scratch,
    window: int | None = None,
    pdl: bool = False,
) -> None:
    """Launch `attention` on arguments that it would accept; nothing else.

    No allocation, no synchronisation: safe to capture in a CUDA graph. Runs on CPU tensors in
    Triton's interpreter.

    Parameters
    ----------
    scratch : Scratch
        Made for queries of this shape or a larger one, and for this cache or a longer one.
    queries, cache, positions, slots, out, window
        As in `attention`.
    pdl : bool
        Programmatic dependent launch: from compute capability 9.0 on.
    """
    batch, width, heads, head_dim = queries.shape
    if batch == 0 or width == 0:
        return
    kv_heads = cache.shape[2] // 2
    group = heads // kv_heads
    config = _select_config(head_dim)
    tiles = triton.cdiv(width * group, TILE_ROWS.value)
    _attention_kernel[(_programs(cache.shape[1], config), tiles, batch * kv_heads)](
        queries,
        cache,
        positions,
        slots,
        out,
        scratch.tops,
        scratch.values,
        scratch.counters,
        cache.stride(0),
        cache.stride(1),
        width,
        kv_heads,
        1 / (math.sqrt(head_dim) * math.log(2)),
        GROUP=group,
        HEAD_DIM=head_dim,
        WINDOW=window or 0,
        CHUNK=config.chunk,
        BLOCK=config.block,
        PDL=pdl,
        EMULATED=EMULATED,
        num_warps=config.num_warps,
        num_stages=config.num_stages,
        launch_pdl=pdl,
        enable_fp_fusion=FP_FUSION,
    )


def attention(
    queries: Tensor,
    cache: Tensor,
    positions: Tensor,
    slots: Tensor,
    *,
    window: int | None = None,
    out: Tensor | None = None,
    scratch: Scratch | None = None,
) -> Tensor:
    """Grouped-query attention of new positions over one layer of the cache.

    On CPU tensors this is `functional.attention`, elsewhere one kernel launch. The bits of a row
    depend on its query and on what it sees of the cache, and on nothing else.

    Parameters
    ----------
    queries : fp16 | bf16 [batch, width, heads, head_dim]
        Rotated queries, contiguous; head_dim is 16, 32, 64, 128 or 256. Not mutated.
    cache : Tensor [slots, cache rows, 2 * kv_heads, head_dim]
        Of the type of the queries; keys, then values; contiguous heads. Its rows up to the last
        position are finite, in every slot. Not mutated.
    positions : int64 [batch, width]
        Position of each row, below the cache's rows: it sees those up to and including its own.
        Not checked.
    slots : int64 [batch]
        Slot of each sequence. Not checked.
    window : int, optional
        A row sees only its last ``window`` positions, itself included.
    out : Tensor [batch, width, heads, head_dim], optional
        Contiguous; overwritten.
    scratch : Scratch, optional
        To be kept between calls. Not needed on the CPU.

    Returns
    -------
    Tensor [batch, width, heads, head_dim]
        ``out``, or a new tensor.

    Raises
    ------
    TypeError, ValueError
        Naming the argument, what was expected and what came.
    """
    if not isinstance(queries, Tensor) or queries.dtype not in DTYPES:
        found = queries.dtype if isinstance(queries, Tensor) else type(queries).__name__
        raise TypeError(f"queries: expected fp16 or bf16, got {found}")
    dtype, device = dtype_name(queries.dtype), queries.device
    check_tensor("queries", queries, dtype, (None, None, None, None), dense=True)
    batch, width, heads, head_dim = queries.shape
    if head_dim not in HEAD_DIMS:
        raise ValueError(f"queries: expected a head_dim among {HEAD_DIMS}, got {head_dim}")
    check_tensor("cache", cache, dtype, (None, None, None, head_dim), device)
    kv_heads = cache.shape[2] // 2
    if cache.shape[2] % 2 or not kv_heads or heads % kv_heads or cache.stride(2) != head_dim:
        raise ValueError(
            f"cache: expected contiguous keys and values of heads that divide {heads}, "
            f"got {cache.shape[2]} of strides {cache.stride()}"
        )
    check_tensor("positions", positions, "int64", (batch, width), device, dense=True)
    check_tensor("slots", slots, "int64", (batch,), device, dense=True)
    if window is not None and window < 1:
        raise ValueError(f"window: expected a positive number, got {window}")
    if out is None:
        out = torch.empty_like(queries)
    check_tensor("out", out, dtype, (batch, width, heads, head_dim), device, dense=True)
    if device.type == "cpu":
        if positions.numel():
            context = int(positions.max()) + 1
            mask = functional.attention_mask(positions, context, queries.dtype, window)
            out.copy_(functional.attention(queries, cache, slots, mask).view_as(out))
        return out
    capacity = cache.shape[1]
    if scratch is None:
        scratch = Scratch.allocate(queries.shape, kv_heads, capacity, device)
    else:
        check_scratch(scratch, Scratch.sizes(queries.shape, kv_heads, capacity))
    attention_out(queries, cache, positions, slots, out=out, scratch=scratch, window=window)
    return out


def _variant(
    dtype: str,
    heads: int,
    kv_heads: int,
    head_dim: int,
    *,
    window: int | None = None,
    pdl: bool = False,
) -> Variant:
    """What `attention_out` would launch."""
    config = _select_config(head_dim)
    signature = {n: f"*{dtype}" for n in ("queries_ptr", "cache_ptr", "out_ptr")}
    signature |= {n: "*i64" for n in ("positions_ptr", "slots_ptr")}
    signature |= {"tops_ptr": "*fp32", "values_ptr": "*fp32", "counters_ptr": "*i32"}
    signature |= {n: "i32" for n in ("stride_slot", "stride_position", "width", "kv_heads")}
    signature["scale"] = "fp32"
    suffix = f"{'-window' if window else ''}{'-pdl' if pdl else ''}"
    return Variant(
        name=f"{dtype}-H{heads}-{kv_heads}-D{head_dim}{suffix}",
        signature=signature,
        constexprs={
            "GROUP": heads // kv_heads,
            "HEAD_DIM": head_dim,
            "WINDOW": window or 0,
            "CHUNK": config.chunk,
            "BLOCK": config.block,
            "PDL": pdl,
            "EMULATED": False,
        },
        divisible=frozenset(signature) - {"scale", "width", "kv_heads"},
        num_warps=config.num_warps,
        num_stages=config.num_stages,
        pdl=pdl,
    )


SPECS = (
    KernelSpec(
        name="attention",
        kernel=_attention_kernel,
        variants=(
            _variant("bf16", 32, 8, 64),
            _variant("bf16", 32, 8, 128),
            _variant("fp16", 9, 3, 64),
            _variant("bf16", 32, 8, 128, window=4096),
            _variant("bf16", 8, 1, 256),
            _variant("bf16", 32, 8, 64, pdl=True),
        ),
        max_registers=240,  # four programs' 16 rows of 256 in flight
        max_shared_bytes=100_000,
    ),
)
