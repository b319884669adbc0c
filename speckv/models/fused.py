"""Decoder layers on a GPU at the speed of their bytes: six kernel launches a layer, for few rows.

A layer is ``qkv`` of normalised rows, `rope_append`, `attention`, ``out`` plus the residual,
``gate_up`` of normalised rows through SwiGLU, and ``down`` plus the residual. Nothing but the
results is allocated once a shape has been met, and the host is never waited for.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from speckv.kernels.packed import NF4_BLOCK, Nf4Weight, Weight
from speckv.models.cache import KVCache
from speckv.models.config import DecoderConfig

if TYPE_CHECKING:
    from speckv.kernels import Linear
    from speckv.kernels.attention import Scratch

__all__ = [
    "LAUNCHES_PER_LAYER",
    "ROWS_MAX",
    "FusedLayer",
    "FusedLayers",
    "Parameters",
    "can_fuse",
    "can_launch_early",
    "fused_product",
    "row_slices",
    "scaled_norm",
]

LAUNCHES_PER_LAYER = 6
ROWS_MAX = 136
"""Most rows of a launch: a verification of eight sequences at 17 rows each."""

_DTYPES = (torch.float16, torch.bfloat16)
_HEAD_DIMS = (16, 32, 64, 128, 256)


@dataclass(frozen=True)
class Parameters:
    """A linear layer as it is stored: its weight and its bias, if it has one."""

    weight: Weight
    bias: Tensor | None


@dataclass(frozen=True)
class FusedLayer:
    """The products of a layer, each with its norm or for its residual.

    ``head_norm`` [heads + kv_heads, head_dim] are the weights of the norm of each head, or None.
    """

    qkv: Linear
    out: Linear
    gate_up: Linear
    down: Linear
    head_norm: Tensor | None
    window: int | None

    @property
    def products(self) -> list[Linear]:
        """In the order of use."""
        return [self.qkv, self.out, self.gate_up, self.down]


def can_fuse(config: DecoderConfig, weights: Sequence[Weight], dtype: torch.dtype) -> bool:
    """Whether the kernels take these weights and this type of activations."""
    return (
        dtype in _DTYPES
        and config.head_dim in _HEAD_DIMS
        and not any(isinstance(w, Nf4Weight) and w.shape[1] % NF4_BLOCK for w in weights)
    )


def scaled_norm(norm: Tensor, dtype: torch.dtype) -> tuple[Tensor, float]:
    """A norm for products in ``dtype``, and what their rows are then multiplied by.

    Rows are multiplied by a norm before they are divided by their size. In fp16 that could exceed
    what it holds, unless the norm is below 1: it is divided by a power of two.
    """
    if dtype != torch.float16:
        return norm, 1.0
    scale = max(2.0 ** math.frexp(float(norm.abs().max()))[1], 1.0)
    return norm / scale, scale


def fused_product(
    parameters: Parameters,
    dtype: torch.dtype,
    *,
    norm: Tensor | None = None,
    eps: float = 0.0,
    swiglu: bool = False,
) -> Linear:
    """A product of up to `ROWS_MAX` rows."""
    from speckv.kernels import Linear  # needs triton

    norm_scale = 1.0
    if norm is not None:
        norm, norm_scale = scaled_norm(norm, dtype)
    return Linear(
        parameters.weight,
        dtype=dtype,
        bias=parameters.bias,
        swiglu=swiglu,
        norm=norm,
        eps=eps,
        norm_scale=norm_scale,
        rows_max=ROWS_MAX,
    )


def row_slices(batch: int, width: int = 1) -> list[slice]:
    """Sequences of ``width`` rows, cut into slices of at most `ROWS_MAX` rows."""
    count = max(ROWS_MAX // max(width, 1), 1)
    return [slice(i, min(i + count, batch)) for i in range(0, batch, count)]


def can_launch_early(device: torch.device) -> bool:
    """Whether the device has programmatic dependent launch."""
    return device.type == "cuda" and torch.cuda.get_device_capability(device) >= (9, 0)


def row_operations(device: torch.device) -> tuple[Callable[..., object], Callable[..., object]]:
    """`rope_append` and `attention`: their launchers on a GPU, where nothing is checked."""
    from speckv.kernels import attention, rope_append  # these need triton
    from speckv.kernels.attention import attention_out
    from speckv.kernels.rope_append import rope_append_out

    return (rope_append, attention) if device.type == "cpu" else (rope_append_out, attention_out)


class FusedLayers:
    """All layers of a decoder.

    Products and calls share scratch with each other, so calls must be on one stream.

    Parameters
    ----------
    config : DecoderConfig
    layers : sequence of FusedLayer

    Attributes
    ----------
    pdl : bool
        Whether kernels are launched as programmatic dependents; off at first.
    """

    def __init__(self, config: DecoderConfig, layers: Sequence[FusedLayer]) -> None:
        self.pdl = False
        self._config, self._layers = config, list(layers)
        self._scratch: Scratch | None = None
        self._outgrown: list[Scratch] = []  # captured graphs may point to them

    def __call__(
        self, x: Tensor, table: Tensor, positions: Tensor, slots: Tensor, cache: KVCache
    ) -> Tensor:
        """Rows before the final norm.

        Parameters
        ----------
        x : Tensor [batch * width, hidden]
            Embedded tokens; overwritten.
        table : Tensor [positions, 2, head_dim]
            Of `speckv.kernels.functional.rope_table`.
        positions : int64 [batch, width], contiguous
        slots : int64 [batch]
        cache : KVCache
            Mutated.

        Returns
        -------
        Tensor [batch * width, hidden]
            ``x``.
        """
        c, rows = self._config, x.shape[0]
        rope, attend = row_operations(x.device)
        heads = c.heads + 2 * c.kv_heads
        qkv = x.new_empty(rows, heads, c.head_dim)
        queries = x.new_empty(rows, c.heads, c.head_dim)
        attended = x.new_empty(*positions.shape, c.heads, c.head_dim)
        middle = torch.empty_like(x)
        wide = x.new_empty(rows, c.intermediate)
        blocks = queries.view(attended.shape)
        on_host = x.device.type == "cpu"
        scratch = None if on_host else self._attention_scratch(attended, cache)
        early = {"pdl": True} if self.pdl else {}
        for layer, kv in zip(self._layers, cache.kv, strict=True):
            layer.qkv(x, out=qkv.view(rows, -1), pdl=self.pdl)
            rope(
                qkv,
                table,
                positions,
                slots,
                kv,
                out=queries,
                head_norm=layer.head_norm,
                eps=c.eps,
                **early,
            )
            attend(
                blocks,
                kv,
                positions,
                slots,
                out=attended,
                window=layer.window,
                scratch=scratch,
                **early,
            )
            layer.out(attended.view(rows, -1), x, out=middle, pdl=self.pdl)
            layer.gate_up(middle, out=wide, pdl=self.pdl)
            layer.down(wide, middle, out=x, pdl=self.pdl)
        return x

    def _attention_scratch(self, attended: Tensor, cache: KVCache) -> Scratch:
        """Scratch for this shape: one for all, larger where one is met that it is too small for."""
        from speckv.kernels.attention import Scratch

        kv_heads = self._config.kv_heads
        if self._scratch is None or not self._scratch.covers(attended.shape, kv_heads, cache.rows):
            if self._scratch is not None:
                self._outgrown.append(self._scratch)
            self._scratch = Scratch.allocate(attended.shape, kv_heads, cache.rows, attended.device)
        return self._scratch
