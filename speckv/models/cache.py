"""A static KV cache: allocated once, never moved, its lengths kept by whoever decodes."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from speckv.kernels.cpu_attention import round_up_context

__all__ = ["SLACK_ROWS", "KVCache", "host_positions", "host_slots"]

SLACK_ROWS = 16
"""Rows beyond the capacity, so that a padded verification block never writes outside."""


class KVCache:
    """Keys and values of several sequences, one slot each.

    The cache knows no lengths: a row holds what was last written there, rolling back is using a
    smaller start position, and rows beyond a sequence's length are overwritten before they are
    read. Rows are zero at first, so masked rows are always finite.

    Parameters
    ----------
    layers, slots, kv_heads, head_dim : int
        Geometry.
    capacity : int
        Positions a sequence may use; :data:`SLACK_ROWS` are added and the sum is rounded up to a
        multiple of the attention's context block.
    dtype, device
        Type and place of the storage.

    Attributes
    ----------
    kv : list of Tensor [slots, rows, 2 * kv_heads, head_dim]
        One tensor a layer: keys, then values.
    """

    def __init__(
        self,
        layers: int,
        slots: int,
        capacity: int,
        kv_heads: int,
        head_dim: int,
        *,
        dtype: torch.dtype,
        device: torch.device,
    ) -> None:
        for name, value in (("batch", slots), ("capacity", capacity)):
            if value < 1:
                raise ValueError(f"{name}: expected at least 1, got {value}")
        self.slots, self.capacity, self.kv_heads = slots, capacity, kv_heads
        self.rows = round_up_context(capacity + SLACK_ROWS)
        shape = (slots, self.rows, 2 * kv_heads, head_dim)
        self.kv = [torch.zeros(shape, dtype=dtype, device=device) for _ in range(layers)]
        self._slot_rows = [list(layer.unbind(0)) for layer in self.kv]
        self._visible: dict[tuple[int, int], tuple[int, tuple[Tensor, Tensor]]] = {}

    @property
    def nbytes(self) -> int:
        """Bytes of storage."""
        return sum(layer.nbytes for layer in self.kv)

    def slot(self, layer: int, slot: int) -> Tensor:
        """Storage of one slot of one layer: [rows, 2 * kv_heads, head_dim]."""
        return self._slot_rows[layer][slot]

    def heads(self, layer: int, slot: int, low: int, high: int) -> tuple[Tensor, Tensor]:
        """Keys and values of cache rows ``low .. high - 1``: views [1, kv_heads, rows, dim]."""
        # Between two forwards the context seldom changes, and making views costs time.
        known = self._visible.get((layer, slot))
        if low == 0 and known is not None and known[0] == high:
            return known[1]
        rows = self._slot_rows[layer][slot][low:high].transpose(0, 1).unsqueeze(0)
        views = rows[:, : self.kv_heads], rows[:, self.kv_heads :]
        if low == 0:
            self._visible[layer, slot] = high, views
        return views


def host_slots(slots: Sequence[int] | Tensor | None, batch: int, cache: KVCache) -> list[int]:
    """Cache slots as integers; 0 .. batch - 1 for None.

    Raises
    ------
    ValueError
        If their number is not ``batch`` or one is not in the cache.
    """
    found = list(range(batch)) if slots is None else _ints(slots)
    if len(found) != batch or min(found) < 0 or max(found) >= cache.slots:
        raise ValueError(
            f"slots: expected {batch} of the cache's slots 0 to {cache.slots - 1}, got {found}"
        )
    return found


def host_positions(
    start: Sequence[int] | Tensor, batch: int, width: int, cache: KVCache
) -> list[int]:
    """Start positions as integers, of a `CausalModel.forward`.

    Raises
    ------
    ValueError
        If their number is not ``batch``, or a block of ``width`` positions leaves the cache.
    """
    found = _ints(start[:, 0] if isinstance(start, Tensor) and start.ndim == 2 else start)
    if len(found) != batch or min(found) < 0 or max(found) + width > cache.rows:
        raise ValueError(
            f"start: expected {batch} positions from which {width} more fit into "
            f"{cache.rows} cache rows, got {found}"
        )
    return found


def _ints(values: Sequence[int] | Tensor) -> list[int]:
    return values.tolist() if isinstance(values, Tensor) else [int(value) for value in values]
