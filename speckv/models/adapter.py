"""Any causal language model that transformers can run, behind the interface of the decoder.

Exactness here needs no knowledge of the model: every position is computed in one fixed place of a
forward of one fixed shape. Positions are cut into aligned blocks of 16, a forward always processes
a whole block of one sequence over a context that depends on the block alone, and only the wanted
rows are kept and written to the cache. A row's bits then cannot depend on the width of a
verification, on the batch or on the cache, as long as rows do not influence each other; models
where they do (mixtures of experts group rows by expert) are found by a probe at load and run one
position at a time, over exactly the context that it sees.

The model's own mask code runs: it asks the cache how long it is, so sliding windows are honoured.
"""

from __future__ import annotations

import copy
import warnings
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn
from transformers.cache_utils import Cache, CacheLayerMixin
from transformers.pytorch_utils import Conv1D

from speckv.errors import ModelError
from speckv.kernels.cpu import bits_equal
from speckv.kernels.cpu_attention import round_up_context
from speckv.kernels.functional import planless_attention
from speckv.models.cache import KVCache, host_positions, host_slots
from speckv.models.config import eos_ids_of
from speckv.models.quantize import compress

if TYPE_CHECKING:
    from transformers import PreTrainedModel

__all__ = ["TransformersAdapter"]

_BLOCK = 16
_PROBE_TOKENS = 24
_AGREEMENT = {torch.float32: 1e-3, torch.float16: 2e-2, torch.bfloat16: 1e-1}


class TransformersAdapter:
    """A transformers model as a :class:`speckv.models.base.CausalModel`.

    It runs eagerly, one sequence after the other, and reads positions on the host. Compressed
    weights are expanded at load on every device: the numerics are those of the compressed model,
    the memory is not saved.

    Parameters
    ----------
    model : PreTrainedModel
        A causal language model.
    name : str
        Hub id or path, as shown to people.
    compression, dtype
        From :func:`speckv.models.quantize.resolve_formats`.
    device : torch.device
        Where the model runs.
    owned : bool
        Whether ``model`` may be changed; otherwise it is copied.

    Raises
    ------
    ValueError
        If the model keeps no cache of keys and values by position, or does not follow the positions
        it is given.
    """

    def __init__(
        self,
        model: PreTrainedModel,
        *,
        name: str,
        compression: str,
        dtype: torch.dtype,
        device: torch.device,
        owned: bool = False,
    ) -> None:
        _refuse_by_kind(model, name)
        self.name = name
        self.compression = compression
        self.dtype = dtype
        self.eos_ids = eos_ids_of(model.config)
        text_config: Any = model.config.get_text_config()
        longest = getattr(text_config, "max_position_embeddings", None)
        if not isinstance(longest, int):
            raise ValueError(f"model: {name} states no max_position_embeddings")
        self.max_positions = longest
        self._model: Any = model if owned else copy.deepcopy(model)
        _convert(self._model, compression, dtype)
        self._model.to(device).eval()
        self.device = next(self._model.parameters()).device  # with its number
        self._block = _BLOCK
        self._geometry, self.vocab_size = _discover(self._model, name, device)
        self.embedding_size = int(self._model.get_input_embeddings().weight.shape[0])
        self._check()

    def new_cache(self, batch: int, capacity: int) -> KVCache:
        """A zero-filled cache of ``batch`` slots for sequences of up to ``capacity`` tokens."""
        if capacity > self.max_positions:
            raise ValueError(
                f"capacity: expected at most {self.max_positions} positions, got {capacity}"
            )
        layers, kv_heads, head_dim = self._geometry
        return KVCache(
            layers, batch, capacity, kv_heads, head_dim, dtype=self.dtype, device=self.device
        )

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
        """Process a block of positions; see :meth:`speckv.models.base.CausalModel.forward`.

        ``context`` is not needed: positions are read on the host.
        """
        batch, width = tokens.shape
        slot_list = host_slots(slots, batch, cache)
        starts = host_positions(start, batch, width, cache)
        rows = [self._sequence(tokens[i], starts[i], cache, slot_list[i]) for i in range(batch)]
        logits = torch.stack(rows)
        if select is None:
            return logits
        column = torch.as_tensor(select, dtype=torch.int64, device=self.device)
        return logits[torch.arange(batch, device=self.device), column]

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
        """Process a prompt; see :meth:`speckv.models.base.CausalModel.prefill`."""
        if tokens.ndim != 1 or tokens.shape[0] < 1:
            raise ValueError(f"tokens: expected [length >= 1], got {tuple(tokens.shape)}")
        host_positions([start], 1, tokens.shape[0], cache)
        host_slots([slot], 1, cache)
        last = tokens
        for first, end in self._cuts(start, tokens.shape[0]):
            last = self._run(tokens[first - start : end - start], first, cache, slot)
        return last[-1].clone() if want_logits else None

    def _sequence(self, tokens: Tensor, start: int, cache: KVCache, slot: int) -> Tensor:
        pieces = [
            self._run(tokens[first - start : end - start], first, cache, slot)
            for first, end in self._cuts(start, tokens.shape[0])
        ]
        return torch.cat(pieces)

    def _cuts(self, start: int, width: int) -> list[tuple[int, int]]:
        """The positions ``start .. start + width - 1`` cut at multiples of the block."""
        end, block = start + width, self._block
        edges = [start, *range((start // block + 1) * block, end, block), end]
        return list(zip(edges[:-1], edges[1:], strict=True))

    def _run(self, tokens: Tensor, start: int, cache: KVCache, slot: int) -> Tensor:
        """Logits [count, vocab] of ``tokens`` at ``start``, all within one aligned block."""
        block, count = self._block, tokens.shape[0]
        begin = start // block * block
        context = round_up_context(begin + block) if block > 1 else begin + 1
        offset = start - begin
        ids = torch.zeros(1, block, dtype=torch.int64, device=self.device)
        ids[0, offset : offset + count] = tokens
        places = torch.arange(begin, begin + block, device=self.device)
        rows = slice(offset, offset + count)
        layers = [
            _BlockLayer(cache, index, slot, begin, rows, context) for index in range(len(cache.kv))
        ]
        with planless_attention(self.device):
            out = self._model(
                input_ids=ids,
                position_ids=places.clamp_(max=self.max_positions - 1)[None],
                past_key_values=Cache(layers=layers),
                use_cache=True,
            )
        logits: Tensor = out.logits[0, offset : offset + count]
        return logits

    @torch.inference_mode()
    def _check(self) -> None:
        """Compare with the model's own forward, then find out whether rows are independent."""
        generator = torch.Generator().manual_seed(0)
        tokens = torch.randint(self.vocab_size, (_PROBE_TOKENS,), generator=generator)
        tokens = tokens.to(self.device)
        expected = self._model(input_ids=tokens[None], use_cache=False).logits[0]
        cache = self.new_cache(1, min(_PROBE_TOKENS, self.max_positions))
        try:
            together = self._sequence(tokens, 0, cache, 0)
        except Exception as error:
            raise ValueError(
                f"model: {self.name} cannot run over a static cache "
                f"({type(error).__name__}: {error})"
            ) from error
        # The median, because in low precision single positions may differ for good reasons (another
        # choice of experts), and each block apart, because wrong positions show in the second.
        errors = (together - expected).float().abs().amax(-1)
        worst = torch.stack([block.median() for block in errors.split(self._block)]).max()
        if not worst <= _AGREEMENT[self.dtype] * expected.float().abs().max().clamp(min=1.0):
            raise ValueError(
                f"model: {self.name} does not follow the positions and masks it is given, so it "
                "cannot be decoded speculatively"
            )
        alone = [self._sequence(tokens[i : i + 1], i, cache, 0) for i in range(_PROBE_TOKENS)]
        config: Any = self._model.config.get_text_config()
        experts = any(
            getattr(config, field, None)
            for field in ("num_experts", "num_local_experts", "n_routed_experts")
        )
        if experts or not bits_equal(torch.cat(alone), together):
            self._block = 1
            warnings.warn(
                f"{self.name}: rows of a forward influence each other; positions are computed one "
                "by one, which is exact and slow",
                stacklevel=2,
            )


def _refuse_by_kind(model: PreTrainedModel, name: str) -> None:
    if model.config.is_encoder_decoder:
        raise ValueError(f"model: {name} is an encoder-decoder, expected a causal language model")
    if getattr(model, "_is_stateful", False):
        raise ValueError(
            f"model: {name} keeps a recurrent state, which cannot be rolled back to a position"
        )


def _discover(model: Any, name: str, device: torch.device) -> tuple[tuple[int, int, int], int]:
    """Layers, key heads and head width of a model's cache, and the width of its logits."""
    ids = torch.zeros(1, 2, dtype=torch.int64, device=device)
    with torch.inference_mode():
        out = model(input_ids=ids, use_cache=True)
    layers = getattr(out.get("past_key_values"), "layers", None) or []
    shapes = {
        tuple(tensor.shape)
        for layer in layers
        for tensor in (getattr(layer, "keys", None), getattr(layer, "values", None))
        if isinstance(tensor, Tensor)
    }
    if not shapes:
        raise ValueError(f"model: {name} keeps no cache of keys and values by position")
    if len(shapes) > 1:
        raise ValueError(
            f"model: {name} has keys and values of several shapes, which is not supported"
        )
    _, kv_heads, _, head_dim = shapes.pop()
    return (len(layers), kv_heads, head_dim), int(out.logits.shape[-1])


@torch.no_grad()
def _convert(model: Any, compression: str, dtype: torch.dtype) -> None:
    """Compress the linear layers but the head, then cast parameters (never computed buffers)."""
    if compression in ("int8", "nf4"):
        head = model.get_output_embeddings()
        for module in model.modules():
            if module is head or not isinstance(module, nn.Linear | Conv1D):
                continue
            transposed = isinstance(module, Conv1D)
            weight = module.weight.data.T.contiguous() if transposed else module.weight.data
            packed = compress(weight, compression, dtype)
            if isinstance(packed, Tensor):
                raise ModelError(f"{compression} left a weight uncompressed")
            dense = packed.expand(dtype)
            module.weight.data = dense.T.contiguous() if transposed else dense
    for parameter in model.parameters():
        parameter.data = parameter.data.to(dtype)
    if model.config._attn_implementation != "sdpa" and model._supports_sdpa:
        model.set_attn_implementation("sdpa")


class _BlockLayer(CacheLayerMixin):  # type: ignore[misc]
    """One layer of a slot, as transformers sees it while one block is computed.

    The block begins at position ``begin``; its ``rows`` are written; the first ``context`` cache
    rows are visible.
    """

    is_sliding = False

    def __init__(
        self, cache: KVCache, index: int, slot: int, begin: int, rows: slice, context: int
    ) -> None:
        super().__init__()
        self.is_initialized = True
        self._storage = cache.slot(index, slot)[begin + rows.start : begin + rows.stop]
        self._visible = cache.heads(index, slot, 0, context)
        self._capacity = cache.rows
        self._begin, self._rows, self._context = begin, rows, context

    def lazy_initialization(self, key_states: Tensor, value_states: Tensor) -> None:
        """Nothing to do: the storage is static."""

    def update(
        self, key_states: Tensor, value_states: Tensor, *args: Any, **kwargs: Any
    ) -> tuple[Tensor, Tensor]:
        """Keep the wanted rows of [1, kv_heads, block, head_dim]; return what is visible."""
        new = torch.cat((key_states[0, :, self._rows], value_states[0, :, self._rows]))
        self._storage.copy_(new.transpose(0, 1))
        return self._visible

    def get_mask_sizes(self, query_length: int) -> tuple[int, int]:
        """Visible cache rows, and the first of them."""
        return self._context, 0

    def get_seq_length(self) -> int:
        """Position of the block's first row."""
        return self._begin

    def get_max_length(self) -> int:
        """Rows of the cache."""
        return self._capacity

    get_max_cache_shape = get_max_length
