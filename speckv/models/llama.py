"""One functional decoder for the Llama family: llama, mistral, qwen2 and qwen3."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace

import torch
from torch import Tensor

from speckv.kernels import functional
from speckv.kernels.cpu import ProvenRows, common_counts, round_up_rows
from speckv.kernels.cpu_attention import AttentionPiece, CpuAttention, round_up_context
from speckv.models.cache import KVCache, host_positions, host_slots
from speckv.models.config import DecoderConfig
from speckv.models.fused import ROWS_MAX, FusedLayers, can_launch_early, row_slices
from speckv.models.quantize import FLOAT_NAMES
from speckv.models.weights import DecoderWeights, TensorSource, build_weights

__all__ = ["LlamaDecoder"]

_CHUNK = 512, 2048
"""Fewest and most tokens of a prompt that an accelerator takes at once."""
_MASK_ELEMENTS = 2**27
"""Of the attention mask that those between are chosen for."""


class LlamaDecoder:
    """A Llama-family decoder over a static KV cache; see :class:`speckv.models.base.CausalModel`.

    On the CPU every row has the same bits at any width, offset, batch, slot and cache capacity, in
    decoding and in prefill (:mod:`speckv.kernels.cpu`). On CUDA a forward never synchronises with
    the host when ``start``, ``slots`` and ``select`` are tensors there. In fp16 and bf16 blocks of
    up to 136 positions run in six kernels a layer (:mod:`speckv.models.fused`), whose bits do not
    depend on the other rows either; as many whole sequences as have 136 rows at a time. Longer
    blocks, as in prefill, and what `fused.can_fuse` refuses, run in PyTorch's operations, for which
    packed weights are expanded, and whose bits do depend on the other rows (`width_invariant`).

    Parameters
    ----------
    config : DecoderConfig
        Geometry.
    weights : DecoderWeights
        From :func:`speckv.models.weights.build_weights`.
    name : str
        Hub id or path, as shown to people.
    compression : str
        Weight format of ``weights``.

    Attributes
    ----------
    fingerprint : str
        Digest of the checkpoint, whatever the compression.
    """

    def __init__(
        self, config: DecoderConfig, weights: DecoderWeights, *, name: str, compression: str
    ) -> None:
        self.config = config
        self.name = name
        self.compression = compression
        self.vocab_size = config.vocab_size
        self.embedding_size = weights.embedding.shape[0]
        self.max_positions = config.max_positions
        self.eos_ids = config.eos_ids
        self.fingerprint = weights.fingerprint
        self.dtype = weights.embedding.dtype
        self.device = weights.embedding.device
        self._weights = weights
        self._table = weights.embedding.new_empty(0, 2, config.head_dim)
        self._tables: list[Tensor] = []  # captured graphs read the one that was there
        self._on_host = isinstance(weights.head, ProvenRows)
        fused = [layer.fused for layer in weights.layers if layer.fused is not None]
        self._fused = FusedLayers(config, fused) if fused else None
        if self._on_host:
            self._attention = CpuAttention(
                config.heads, config.kv_heads, config.head_dim, self.dtype
            )
            self._plan_rows()

    @property
    def pdl(self) -> bool:
        """Whether the kernels of a forward are programmatic dependents of each other.

        Each then starts, and asks for its weights, while the one before it ends (compute capability
        9.0 and later). It changes no result. Graphs that are captured keep what they were captured
        with.
        """
        return self._fused is not None and self._fused.pdl

    @pdl.setter
    def pdl(self, on: bool) -> None:
        if on and not (self._fused is not None and can_launch_early(self.device)):
            raise ValueError(
                "pdl: expected fused layers on a GPU of compute capability 9.0 or later, "
                f"got {self.name} on {self.device}"
            )
        if self._fused is not None:
            self._fused.pdl = bool(on)

    @property
    def width_invariant(self) -> bool:
        """Whether the bits of a row of up to 136 depend on no other row: needed to be lossless."""
        return self._on_host or self._fused is not None

    @classmethod
    def from_tensors(
        cls,
        config: DecoderConfig,
        source: TensorSource,
        *,
        name: str,
        compression: str,
        dtype: torch.dtype,
        device: torch.device,
        invariant: bool | None = None,
        stored: bool = False,
        advance: Callable[[], None] | None = None,
    ) -> LlamaDecoder:
        """Build a decoder from a checkpoint's tensors; see ``build_weights`` for the parameters."""
        weights = build_weights(
            config,
            source,
            compression=compression,
            dtype=dtype,
            device=device,
            invariant=invariant,
            stored=stored,
            advance=advance,
        )
        return cls(config, weights, name=name, compression=compression)

    def first_layers(self, count: int) -> LlamaDecoder:
        """A draft made of the first ``count`` layers, the final norm and the head, all shared.

        Raises
        ------
        ValueError
            If ``count`` is not between 1 and the number of layers.
        """
        layers = self.config.layers
        if not 1 <= count <= layers:
            raise ValueError(f"count: expected 1 to {layers} layers, got {count}")
        return LlamaDecoder(
            replace(self.config, windows=self.config.windows[:count]),
            replace(self._weights, layers=self._weights.layers[:count]),
            name=f"{self.name} (first {count} layers)",
            compression=self.compression,
        )

    def slice_draft(
        self, source: TensorSource, layers: Sequence[int], vocab_size: int, *, name: str
    ) -> LlamaDecoder:
        """A draft with layers, norm and head of its own, and this model's embedding, shared.

        Parameters
        ----------
        source : TensorSource
            ``model.layers.0`` and so on, ``model.norm`` and ``lm_head``.
        layers : sequence of int
            Layers of this model whose attention windows the draft's layers take over.
        vocab_size : int
            Rows of the head.
        name : str
            As shown to people.

        Raises
        ------
        ValueError
            If a layer is not one of this model.
        ModelError
            If a tensor is missing or has another shape.
        """
        count = self.config.layers
        if not layers or min(layers) < 0 or max(layers) >= count:
            raise ValueError(f"layers: expected some of 0 to {count - 1}, got {list(layers)}")
        config = replace(
            self.config,
            windows=tuple(self.config.windows[layer] for layer in layers),
            vocab_size=vocab_size,
            tied=False,
        )
        compression = FLOAT_NAMES[self.dtype]
        weights = build_weights(
            config,
            source,
            compression=compression,
            dtype=self.dtype,
            device=self.device,
            invariant=self._on_host,
            embedding=self._weights.embedding,
        )
        return LlamaDecoder(config, weights, name=name, compression=compression)

    def new_cache(self, batch: int, capacity: int) -> KVCache:
        """A zero-filled cache of ``batch`` slots for sequences of up to ``capacity`` tokens."""
        if capacity > self.max_positions:
            raise ValueError(
                f"capacity: expected at most {self.max_positions} positions, got {capacity}"
            )
        c = self.config
        cache = KVCache(
            c.layers,
            batch,
            capacity,
            c.kv_heads,
            c.head_dim,
            dtype=self.dtype,
            device=self.device,
        )
        self._reach(cache.rows)
        return cache

    @torch.inference_mode()
    def forward(
        self,
        tokens: Tensor,
        start: Sequence[int] | Tensor,
        cache: KVCache,
        *,
        slots: Sequence[int] | Tensor | None = None,
        select: Sequence[int] | Tensor | int | None = None,
        context: int | None = None,
    ) -> Tensor:
        """Process a block of positions; see :meth:`speckv.models.base.CausalModel.forward`."""
        batch, width = tokens.shape
        hidden = self._hidden(tokens, start, cache, slots, context)
        if select is None:
            return self._logits(hidden).view(batch, width, self.vocab_size)
        if isinstance(select, int):
            return self._logits(hidden.view(batch, width, -1)[:, select].contiguous())
        column = torch.as_tensor(select, dtype=torch.int64, device=self.device)
        first = torch.arange(0, batch * width, width, device=self.device)
        return self._logits(hidden.index_select(0, first + column))

    @torch.inference_mode()
    def prefill(
        self,
        tokens: Tensor,
        cache: KVCache,
        slot: int,
        *,
        start: int = 0,
        want_logits: bool = True,
    ) -> Tensor | None:
        """Process a prompt in wide chunks; see :meth:`speckv.models.base.CausalModel.prefill`."""
        if tokens.ndim != 1 or tokens.shape[0] < 1:
            raise ValueError(f"tokens: expected [length >= 1], got {tuple(tokens.shape)}")
        hidden = tokens
        place = start
        chunk = self._chunk(start + tokens.shape[0])
        for piece in torch.split(tokens, chunk):
            end = place + piece.shape[0]
            hidden = self._hidden(
                piece[None], self._block(place, end), cache, self._slot(slot), end
            )
            place = end
        return self._logits(hidden[piece.shape[0] - 1 :][:1])[0] if want_logits else None

    def _chunk(self, context: int) -> int:
        """Tokens that are prefilled at once: on an accelerator many, each chunk reads all weights.

        They depend on nothing but how much there is to attend to.
        """
        if self._on_host:
            return self._counts[-1]
        group = self.config.heads // self.config.kv_heads
        fewest, most = _CHUNK
        return min(max(_MASK_ELEMENTS // (group * context) // 128 * 128, fewest), most)

    def _block(self, start: int, end: int) -> Sequence[int] | Tensor:
        """``start`` of a forward of one sequence; on CUDA made there: sending it is a wait."""
        if self._on_host:
            return [start]
        return torch.arange(start, end, device=self.device)[None]

    def _slot(self, slot: int) -> Sequence[int] | Tensor:
        """``slots`` of a forward of one sequence, likewise."""
        return [slot] if self._on_host else torch.full((1,), slot, device=self.device)

    def _hidden(
        self,
        tokens: Tensor,
        start: Sequence[int] | Tensor,
        cache: KVCache,
        slots: Sequence[int] | Tensor | None,
        context: int | None,
    ) -> Tensor:
        """Rows [batch * width (+ padding), hidden] before the final norm."""
        batch, width = tokens.shape
        self._reach(cache.rows)
        ids = tokens.reshape(-1)
        step: _HostStep | _DeviceStep
        if self._on_host:
            if torch.get_num_threads() != self._threads:
                self._plan_rows()
            starts = host_positions(start, batch, width, cache)
            step = _HostStep(self._attention, cache, starts, host_slots(slots, batch, cache), width)
            padding = round_up_rows(batch * width, self._counts) - batch * width
            if padding:
                ids = torch.cat((ids, ids.new_zeros(padding)))
        else:
            step = _DeviceStep(self.config.heads, cache, start, slots, (batch, width), context)
            if self._fused is not None and width <= ROWS_MAX:
                x = self._weights.embedding.index_select(0, ids)
                for part in row_slices(batch, width):
                    own = x[part.start * width : part.stop * width]
                    self._fused(own, self._table, step.blocks[part], step.slots[part], cache)
                return x
        positions = step.positions(ids.shape[0])
        c, rows = self.config, ids.shape[0]
        rotated = c.heads + c.kv_heads
        all_heads = rotated + c.kv_heads
        cos, sin = functional.rope_rows(self._table, positions, rotated, all_heads)
        x = self._weights.embedding.index_select(0, ids)
        for index, layer in enumerate(self._weights.layers):
            qkv = layer.qkv(layer.attention_norm(x)).view(rows, all_heads, c.head_dim)
            attended = step.attend(index, layer.window, layer.rotate(qkv, cos, sin))
            x = layer.out(attended, x)
            x = layer.down(layer.swiglu(layer.gate_up(layer.mlp_norm(x))), x)
        return x[: batch * width]

    def _logits(self, hidden: Tensor) -> Tensor:
        head = self._weights.fused_head
        if head is None:
            return self._weights.head(self._weights.norm(hidden))
        logits = hidden.new_empty(hidden.shape[0], self.vocab_size)
        for rows in row_slices(hidden.shape[0]):
            head(hidden[rows], out=logits[rows], pdl=self.pdl)
        return logits

    def _reach(self, rows: int) -> None:
        """Grow the rotary table to ``rows`` positions."""
        if self._table.shape[0] < rows:
            table = functional.rope_table(
                self.config.inv_freq, self.config.rope_scale, rows, self.dtype
            )
            self._table = table.to(self.device)
            self._tables.append(self._table)

    def _plan_rows(self) -> None:
        """Find the row counts that most operations of a layer have been proven for."""
        self._threads = torch.get_num_threads()
        self._attention.prove()
        plans = []
        for operation in (self._weights.norm, self._weights.head):
            if isinstance(operation, ProvenRows):
                operation.prove()
        for layer in self._weights.layers:
            for operation in layer.operations():
                if isinstance(operation, ProvenRows):
                    operation.prove()
                    plans.append(operation.counts)
        self._counts = common_counts(plans)


class _HostStep:
    """Cache writes and attention of one forward on the CPU, sequence by sequence."""

    def __init__(
        self,
        attention: CpuAttention,
        cache: KVCache,
        starts: list[int],
        slots: list[int],
        width: int,
    ) -> None:
        self._attention = attention
        self._cache = cache
        self._starts, self._slots, self._width = starts, slots, width
        self._pieces: dict[int | None, list[list[AttentionPiece]]] = {}
        self._out: Tensor | None = None

    def positions(self, rows: int) -> Tensor:
        """Position of every row [rows] int64; padding rows stand at 0."""
        flat = [start + i for start in self._starts for i in range(self._width)]
        return torch.tensor(flat + [0] * (rows - len(flat)))

    def attend(self, index: int, window: int | None, qkv: Tensor) -> Tensor:
        """Append the keys and values of layer ``index``, then attend: [rows, heads * head_dim]."""
        attention, cache, width = self._attention, self._cache, self._width
        heads = attention.heads
        pieces = self._pieces.get(window)
        if pieces is None:
            pieces = [attention.pieces(start, width, window) for start in self._starts]
            self._pieces[window] = pieces
        if len(pieces) == 1 and len(pieces[0]) == 1 and width == qkv.shape[0]:
            # One sequence, nothing padded: plain decoding, where each small call counts.
            slot, start, piece = self._slots[0], self._starts[0], pieces[0][0]
            queries, kv = qkv.split_with_sizes((heads, qkv.shape[1] - heads), 1)
            cache.slot(index, slot).narrow(0, start, width).copy_(kv)
            return attention(queries, *cache.heads(index, slot, piece.low, piece.high), piece)
        if self._out is None:
            self._out = qkv.new_zeros(qkv.shape[0], heads * attention.dim)
        out = self._out
        for i, (slot, start) in enumerate(zip(self._slots, self._starts, strict=True)):
            first = i * width
            cache.slot(index, slot)[start : start + width] = qkv[first : first + width, heads:]
            for piece in pieces[i]:
                keys, values = cache.heads(index, slot, piece.low, piece.high)
                begin = first + piece.first
                end = begin + piece.count
                out[begin:end] = attention(qkv[begin:end, :heads], keys, values, piece)
        return out


class _DeviceStep:
    """Cache writes and attention of one forward on an accelerator, in one call each.

    Attributes
    ----------
    blocks : int64 [batch, width]
        Position of every row.
    slots : int64 [batch]
        Cache slot of each sequence.
    """

    def __init__(
        self,
        heads: int,
        cache: KVCache,
        start: Sequence[int] | Tensor,
        slots: Sequence[int] | Tensor | None,
        shape: tuple[int, int],
        context: int | None,
    ) -> None:
        batch, width = shape
        device = cache.kv[0].device
        self._heads, self._cache, self._shape = heads, cache, shape
        self._context = min(cache.rows, round_up_context(context or cache.rows))
        blocks = torch.as_tensor(start, dtype=torch.int64, device=device)
        if blocks.ndim == 1:
            blocks = blocks[:, None] + torch.arange(width, device=device)
        self.blocks = blocks
        self._slots = (
            None if slots is None else torch.as_tensor(slots, dtype=torch.int64, device=device)
        )
        self.slots = torch.arange(batch, device=device) if self._slots is None else self._slots
        self._masks: dict[int | None, Tensor] = {}

    def positions(self, rows: int) -> Tensor:
        """Position of every row [rows] int64."""
        return self.blocks.reshape(rows)

    def attend(self, index: int, window: int | None, qkv: Tensor) -> Tensor:
        """Append the keys and values of layer ``index``, then attend: [rows, heads * head_dim]."""
        rows, layer = qkv.shape[0], self._cache.kv[index]
        blocks = qkv.view(*self._shape, *qkv.shape[1:])
        functional.append_kv(layer, blocks[:, :, self._heads :], self.slots[:, None], self.blocks)
        mask = self._masks.get(window)
        if mask is None:
            group = self._heads // (layer.shape[2] // 2)
            mask = functional.attention_mask(self.blocks, self._context, qkv.dtype, window)
            mask = self._masks[window] = mask.repeat_interleave(group, 1)
        queries = blocks[:, :, : self._heads]
        return functional.attention(queries, layer, self._slots, mask).view(rows, -1)
