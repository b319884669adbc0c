"""The operations of a Llama-family decoder in plain torch, on any device.

Every function works on rows: a row is one token position, and nothing here mixes rows except
:func:`attention`, which reads the KV cache. Layouts:

- ``qkv`` is one tensor ``[rows, heads + 2 * kv_heads, head_dim]``: queries, then keys, then values;
- one layer of the KV cache is ``[slots, cache_rows, 2 * kv_heads, head_dim]``: keys, then values,
  so appending a position is one contiguous write.

Rotary embedding follows Su et al., RoFormer (2021), in the half-split form of the Llama
checkpoints; RMSNorm is Zhang and Sennrich (2019); SwiGLU is Shazeer (2020).
"""

from __future__ import annotations

from contextlib import AbstractContextManager, nullcontext

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel

__all__ = [
    "append_kv",
    "attention",
    "attention_mask",
    "head_rms_norm",
    "linear",
    "linear_add",
    "planless_attention",
    "rms_norm",
    "rope",
    "rope_rows",
    "rope_table",
    "swiglu",
]


def linear(x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    """``x [rows, K] @ weight [N, K].T + bias [N]`` as ``[rows, N]``."""
    return F.linear(x, weight, bias)


def linear_add(x: Tensor, residual: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    """``linear(x, weight, bias) + residual [rows, N]``; the residual is not mutated."""
    return F.linear(x, weight, bias).add_(residual)


def rms_norm(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    """``x / sqrt(mean(x²) + eps) * weight`` over the last dimension of ``x [rows, K]``."""
    return F.rms_norm(x, (weight.shape[0],), weight, eps)


def head_rms_norm(qkv: Tensor, weight: Tensor, eps: float) -> Tensor:
    """Normalise the queries and keys of ``qkv`` head by head (Qwen3), in place.

    Parameters
    ----------
    qkv : Tensor [rows, heads + 2 * kv_heads, head_dim]
        Mutated: its first ``weight.shape[0]`` heads are replaced.
    weight : Tensor [heads + kv_heads, head_dim]
        The query norm's weight repeated per query head, then the key norm's per key head.
    eps : float
        Added to the mean square.

    Returns
    -------
    Tensor
        ``qkv`` itself.
    """
    heads = qkv[:, : weight.shape[0]]
    torch.mul(F.rms_norm(heads, (heads.shape[-1],), None, eps), weight, out=heads)
    return qkv


def rope_table(inv_freq: Tensor, scale: float, positions: int, dtype: torch.dtype) -> Tensor:
    """Cosines and signed sines of every position below ``positions``.

    Parameters
    ----------
    inv_freq : Tensor [head_dim / 2] fp32
        Rotary frequencies in radians per position.
    scale : float
        Factor on both (the attention factor of YaRN; 1 otherwise).
    positions : int
        Number of positions.
    dtype : torch.dtype
        Type of the result. Angles are fp32, as in transformers; their cosines and sines are fp64
        rounded once, by NumPy: torch's, in fp32, were seen to differ from process to process.

    Returns
    -------
    Tensor [positions, 2, head_dim]
        ``[:, 0]`` is ``cos(angle)`` twice, ``[:, 1]`` is ``(-sin(angle), sin(angle))``: the sign
        lets :func:`rope` use a plain rotation of the head by half its width.
    """
    place = np.arange(positions, dtype=np.float32)
    angle = (place[:, None] * inv_freq.float().cpu().numpy()[None, :]).astype(np.float64)
    cos, sin = (torch.from_numpy(of(angle).astype(np.float32)) * scale for of in (np.cos, np.sin))
    table = torch.stack((torch.cat((cos, cos), -1), torch.cat((-sin, sin), -1)), 1)
    return table.to(inv_freq.device, dtype)


def rope_rows(table: Tensor, positions: Tensor, rotated: int, heads: int) -> tuple[Tensor, Tensor]:
    """The factors of :func:`rope` for rows at ``positions``, shared by every layer of a forward.

    Parameters
    ----------
    table : Tensor [max_positions, 2, head_dim]
        From :func:`rope_table`.
    positions : Tensor [rows] int64
        Position of each row.
    rotated : int
        Number of leading heads that are rotated: queries and keys.
    heads : int
        Number of heads of ``qkv``; the values among them get the factors 1 and 0.

    Returns
    -------
    tuple of Tensor [rows, heads, head_dim]
        Factors of the head and of its half rotation.
    """
    rows = table.index_select(0, positions)
    shape = (rows.shape[0], heads, table.shape[-1])
    cos, sin = rows.new_ones(shape), rows.new_zeros(shape)
    cos[:, :rotated] = rows[:, 0:1]
    sin[:, :rotated] = rows[:, 1:2]
    return cos, sin


def rope(qkv: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Rotate queries and keys; ``qkv``, ``cos`` and ``sin`` are ``[rows, heads, head_dim]``.

    The values pass through unchanged (factors 1 and 0), so the result can be appended to the cache
    in one write.
    """
    return torch.addcmul(qkv * cos, torch.roll(qkv, qkv.shape[-1] // 2, -1), sin)


def swiglu(gate_up: Tensor) -> Tensor:
    """``silu(gate) * up`` of ``gate_up [rows, 2 * K]`` (gate first) as ``[rows, K]``."""
    gate, up = gate_up.chunk(2, -1)
    return F.silu(gate).mul_(up)


def append_kv(cache: Tensor, kv: Tensor, slots: Tensor, positions: Tensor) -> None:
    """Write ``kv`` into one layer of the cache, without a host synchronisation.

    Parameters
    ----------
    cache : Tensor [slots, cache_rows, 2 * kv_heads, head_dim]
        Mutated.
    kv : Tensor [batch, width, 2 * kv_heads, head_dim]
        Keys and values of the new positions.
    slots : Tensor [batch, 1] int64
        Cache slot of each sequence.
    positions : Tensor [batch, width] int64
        Cache row of each new position.
    """
    cache[slots, positions] = kv


def attention_mask(
    positions: Tensor, context: int, dtype: torch.dtype, window: int | None = None
) -> Tensor:
    """Additive causal mask of query rows over the first ``context`` cache rows.

    Parameters
    ----------
    positions : Tensor [..., width] int64
        Position of each query row; it sees cache rows up to and including its own.
    context : int
        Number of visible cache rows.
    dtype : torch.dtype
        Type of the mask, which is that of the queries.
    window : int, optional
        Sliding window: a row sees only its last ``window`` positions, itself included.

    Returns
    -------
    Tensor [..., width, context]
        0 where a row may look, -inf elsewhere.
    """
    key = torch.arange(context, device=positions.device)
    place = positions.unsqueeze(-1)
    hidden = key > place
    if window is not None:
        hidden |= key <= place - window
    mask = torch.zeros(hidden.shape, dtype=dtype, device=positions.device)
    return mask.masked_fill_(hidden, float("-inf"))


def planless_attention(device: torch.device) -> AbstractContextManager[object]:
    """Keep torch's attention on CUDA from cuDNN, which plans anew for every shape that it meets.

    Prompts are of all lengths, and a plan takes tens of milliseconds.
    """
    if device.type != "cuda":
        return nullcontext()
    return sdpa_kernel(
        [SDPBackend.FLASH_ATTENTION, SDPBackend.EFFICIENT_ATTENTION, SDPBackend.MATH]
    )


def attention(queries: Tensor, cache: Tensor, slots: Tensor | None, mask: Tensor) -> Tensor:
    """Grouped-query attention of new positions over one layer of the cache.

    The query heads that share a key head are stacked as rows of one matrix, so keys and values are
    never repeated.

    Parameters
    ----------
    queries : Tensor [batch, width, heads, head_dim]
        Rotated queries.
    cache : Tensor [slots, cache_rows, 2 * kv_heads, head_dim]
        The layer's keys and values; rows the mask hides must be finite.
    slots : Tensor [batch] int64, optional
        Cache slot of each sequence; None stands for 0 .. batch - 1, whose keys are not copied.
    mask : Tensor [batch, width, context]
        From :func:`attention_mask`; ``context <= cache_rows``. Or its rows, each as often as there
        are query heads to a key head, [batch, width * group, context]: to be made once for all
        layers.

    Returns
    -------
    Tensor [batch, width, heads * head_dim]
    """
    batch, width, heads, dim = queries.shape
    kv_heads = cache.shape[2] // 2
    group, context = heads // kv_heads, mask.shape[-1]
    visible = cache[:, :context]
    kv = (visible[:batch] if slots is None else visible.index_select(0, slots)).transpose(1, 2)
    stacked = queries.view(batch, width, kv_heads, group, dim).transpose(1, 2)
    if mask.shape[1] != width * group:
        mask = mask.repeat_interleave(group, 1)
    with planless_attention(queries.device):
        out = F.scaled_dot_product_attention(
            stacked.reshape(batch, kv_heads, width * group, dim),
            kv[:, :kv_heads],
            kv[:, kv_heads:],
            attn_mask=mask.unsqueeze(1),
        )
    out = out.view(batch, kv_heads, width, group, dim).transpose(1, 2)
    return out.reshape(batch, width, heads * dim)
