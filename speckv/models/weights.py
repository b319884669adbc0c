"""From a checkpoint's tensors to the fused layers of the decoder."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from functools import cache, partial
from typing import TYPE_CHECKING, Protocol

import torch
from torch import Tensor

from speckv.errors import ModelError
from speckv.kernels import cpu, functional
from speckv.kernels.packed import Weight
from speckv.models.config import DecoderConfig
from speckv.models.fused import FusedLayer, Parameters, can_fuse, fused_product
from speckv.models.quantize import FLOAT_NAMES, Int8Weight, Nf4Weight, compress, fuse
from speckv.models.stored import is_stored, read_stored

if TYPE_CHECKING:
    from speckv.kernels import Linear

__all__ = ["DecoderLayer", "DecoderWeights", "RowOperation", "TensorSource", "build_weights"]

_SAMPLE = 4096

RowOperation = Callable[..., Tensor]
"""Maps tensors [rows, ...] to a tensor [rows, ...], row by row."""


class TensorSource(Protocol):
    """Tensors of a checkpoint by name, read one at a time."""

    def __contains__(self, name: object, /) -> bool: ...

    def __getitem__(self, name: str, /) -> Tensor: ...


@dataclass
class DecoderLayer:
    """The row-wise operations of one decoder block; attention stands between them.

    ``qkv`` maps normalised rows to queries, keys and values; ``rotate`` applies the head norm, if
    there is one, and the rotary embedding; ``out`` and ``down`` also take the residual they add.
    ``fused`` is the same block for few rows on a GPU, where its kernels take it.
    """

    attention_norm: RowOperation
    qkv: RowOperation
    rotate: RowOperation
    out: RowOperation
    mlp_norm: RowOperation
    gate_up: RowOperation
    swiglu: RowOperation
    down: RowOperation
    window: int | None
    fused: FusedLayer | None = None

    def operations(self) -> tuple[RowOperation, ...]:
        """Every operation, in the order of use."""
        return (
            self.attention_norm,
            self.qkv,
            self.rotate,
            self.out,
            self.mlp_norm,
            self.gate_up,
            self.swiglu,
            self.down,
        )


@dataclass
class DecoderWeights:
    """Embedding [vocab, hidden], decoder blocks, final norm and head.

    ``fingerprint`` tells one checkpoint from another, whatever the compression: it hashes a sample
    of every tensor.
    """

    embedding: Tensor
    layers: list[DecoderLayer]
    norm: RowOperation
    head: RowOperation
    fingerprint: str
    fused_head: Linear | None = None


@cache
def _expand_out() -> Callable[..., None] | None:
    """What launches the kernel that expands; None where there is no triton."""
    try:
        from speckv.kernels.expand import expand_out
    except ImportError:
        return None
    return expand_out


def _expanded(weight: Int8Weight | Nf4Weight, dtype: torch.dtype) -> Tensor:
    device = weight.codes.device
    launch = None if device.type == "cpu" else _expand_out()
    if launch is None:
        return weight.expand(dtype)
    out = torch.empty(weight.shape, dtype=dtype, device=device)
    launch(weight, out=out)
    return out


@dataclass(frozen=True)
class _Expanding:
    """A packed weight, written out whole at every call."""

    weight: Int8Weight | Nf4Weight
    bias: Tensor | None

    def __call__(self, x: Tensor, residual: Tensor | None = None) -> Tensor:
        weight = _expanded(self.weight, x.dtype)
        if residual is None:
            return functional.linear(x, weight, self.bias)
        return functional.linear_add(x, residual, weight, self.bias)


@dataclass(frozen=True)
class _Builder:
    """Makes the operations of one model in its formats and on its device."""

    config: DecoderConfig
    source: TensorSource
    compression: str
    dtype: torch.dtype
    device: torch.device
    invariant: bool
    stored: bool = False
    samples: dict[str, str] = field(default_factory=dict)

    def tensor(self, name: str, *shape: int) -> Tensor:
        if name not in self.source:
            raise ModelError(f"the checkpoint has no tensor {name!r}: it is incomplete or corrupt")
        found = self.source[name]
        if tuple(found.shape) != shape:
            raise ModelError(
                f"the checkpoint's tensor {name!r} has shape {tuple(found.shape)}, expected {shape}"
            )
        if not found.is_floating_point():
            raise ModelError(
                f"the checkpoint's tensor {name!r} is quantised ({found.dtype}), which only the "
                "linear layers of the decoder blocks may be"
            )
        self.sample(name, found)
        return found.to(self.device)

    def sample(self, name: str, found: Tensor) -> None:
        self.samples[name] = _sample_digest(found)

    def weight(self, name: str, rows: int, columns: int) -> Weight:
        """A linear weight, compressed unless the checkpoint has it so."""
        if self.stored and is_stored(self.source, name):
            return read_stored(self.source, name, (rows, columns), self.device, self.sample)
        found = self.tensor(f"{name}.weight", rows, columns)
        # Of a quantised checkpoint, what it leaves as it is stays so.
        compression = FLOAT_NAMES[self.dtype] if self.stored else self.compression
        return compress(found, compression, self.dtype)

    def parameters(
        self, names: Sequence[str], rows: Sequence[int], columns: int, *, bias: bool
    ) -> Parameters:
        """Linear layers of the checkpoint, compressed and stacked."""
        parts = [self.weight(name, count, columns) for name, count in zip(names, rows, strict=True)]
        shift = None
        if bias:
            shift = torch.cat(
                [
                    self.tensor(f"{name}.bias", count)
                    for name, count in zip(names, rows, strict=True)
                ]
            ).to(self.dtype)
        if not self.invariant:
            return Parameters(fuse(parts), shift)
        dense = [part if isinstance(part, Tensor) else part.expand(self.dtype) for part in parts]
        return Parameters(torch.cat(dense), shift)

    def linear(self, parameters: Parameters, *, residual: bool = False) -> RowOperation:
        weight, shift = parameters.weight, parameters.bias
        if not isinstance(weight, Tensor):
            return _Expanding(weight, shift)
        if self.invariant:
            return cpu.CpuLinear(weight, shift, residual=residual)
        run = functional.linear_add if residual else functional.linear
        return partial(run, weight=weight, bias=shift)

    def norm_weight(self, name: str) -> Tensor:
        return self.tensor(f"{name}.weight", self.config.hidden).to(self.dtype)

    def norm(self, weight: Tensor) -> RowOperation:
        run = partial(self.function("rms_norm"), weight=weight, eps=self.config.eps)
        return self._row_wise(
            run, partial(cpu.proven_rms_norm_counts, self.config.hidden, self.dtype)
        )

    def head_norm(self, name: str) -> Tensor | None:
        """Weights [heads + kv_heads, head_dim] of the norm of each head, if there is one."""
        c = self.config
        if not c.head_norm:
            return None
        return torch.cat(
            (
                self.tensor(f"{name}.q_norm.weight", c.head_dim).expand(c.heads, -1),
                self.tensor(f"{name}.k_norm.weight", c.head_dim).expand(c.kv_heads, -1),
            )
        ).to(self.dtype)

    def rotate(self, head_norm: Tensor | None) -> RowOperation:
        c = self.config
        run = rope = self.function("rope")
        if head_norm is not None:
            run = partial(_norm_and_rope, rope=rope, weight=head_norm, eps=c.eps)
        rotated = c.heads + c.kv_heads
        return self._row_wise(
            run,
            partial(
                cpu.proven_rope_counts,
                rotated + c.kv_heads,
                rotated,
                c.head_dim,
                self.dtype,
                c.head_norm,
            ),
        )

    def swiglu(self) -> RowOperation:
        width = self.config.intermediate
        return self._row_wise(
            self.function("swiglu"), partial(cpu.proven_swiglu_counts, width, self.dtype)
        )

    def function(self, name: str) -> RowOperation:
        """The row-wise function of this name, for this device."""
        if self.invariant:
            return cpu.row_function(name, self.dtype)
        found: RowOperation = getattr(functional, name)
        return found

    def _row_wise(self, run: RowOperation, proof: Callable[[], tuple[int, ...]]) -> RowOperation:
        return cpu.ProvenRows(run, proof) if self.invariant else run

    def layer(self, index: int) -> DecoderLayer:
        c, at = self.config, f"model.layers.{index}"
        queries, keys = c.heads * c.head_dim, c.kv_heads * c.head_dim
        attention_norm = self.norm_weight(f"{at}.input_layernorm")
        qkv = self.parameters(
            [f"{at}.self_attn.{part}_proj" for part in "qkv"],
            (queries, keys, keys),
            c.hidden,
            bias=c.qkv_bias,
        )
        head_norm = self.head_norm(f"{at}.self_attn")
        out = self.parameters([f"{at}.self_attn.o_proj"], (c.hidden,), queries, bias=c.output_bias)
        mlp_norm = self.norm_weight(f"{at}.post_attention_layernorm")
        gate_up = self.parameters(
            [f"{at}.mlp.{part}_proj" for part in ("gate", "up")],
            (c.intermediate, c.intermediate),
            c.hidden,
            bias=c.mlp_bias,
        )
        down = self.parameters(
            [f"{at}.mlp.down_proj"], (c.hidden,), c.intermediate, bias=c.mlp_bias
        )
        fused = None
        weights = [each.weight for each in (qkv, out, gate_up, down)]
        if not self.invariant and can_fuse(c, weights, self.dtype):
            fused = FusedLayer(
                qkv=fused_product(qkv, self.dtype, norm=attention_norm, eps=c.eps),
                out=fused_product(out, self.dtype),
                gate_up=fused_product(gate_up, self.dtype, norm=mlp_norm, eps=c.eps, swiglu=True),
                down=fused_product(down, self.dtype),
                head_norm=head_norm,
                window=c.windows[index],
            )
        return DecoderLayer(
            attention_norm=self.norm(attention_norm),
            qkv=self.linear(qkv),
            rotate=self.rotate(head_norm),
            out=self.linear(out, residual=True),
            mlp_norm=self.norm(mlp_norm),
            gate_up=self.linear(gate_up),
            swiglu=self.swiglu(),
            down=self.linear(down, residual=True),
            window=c.windows[index],
            fused=fused,
        )

    def fingerprint(self) -> str:
        """Digest of everything that was read so far, in whatever order."""
        text = "".join(f"{name} {digest}\n" for name, digest in sorted(self.samples.items()))
        return hashlib.sha256(text.encode()).hexdigest()

    def head(self, embedding: Tensor) -> Parameters:
        """The head, which is never packed."""
        c = self.config
        if c.tied:
            return Parameters(embedding, None)
        weight = self.tensor("lm_head.weight", c.vocab_size, c.hidden).to(self.dtype)
        return Parameters(weight, None)


def _sample_digest(tensor: Tensor) -> str:
    """Digest of up to ``2 * _SAMPLE`` evenly spaced elements, as fp32."""
    flat = tensor.detach().reshape(-1)
    sample = flat[:: max(1, flat.numel() // _SAMPLE)].float().cpu()
    return hashlib.sha256(sample.numpy().tobytes()).hexdigest()


def _norm_and_rope(
    qkv: Tensor, cos: Tensor, sin: Tensor, *, rope: RowOperation, weight: Tensor, eps: float
) -> Tensor:
    return rope(functional.head_rms_norm(qkv, weight, eps), cos, sin)


def _share_scratch(layers: Sequence[DecoderLayer], head: Linear | None = None) -> None:
    """Let the products of the first layer, the last one and the head have one scratch.

    They run one after the other, and all layers need as much.
    """
    fused = [layer.fused for layer in (layers[0], layers[-1]) if layer.fused is not None]
    if fused:
        from speckv.kernels.linear import share_scratch  # needs triton

        products = [product for layer in fused for product in layer.products]
        share_scratch(products if head is None else [*products, head])


@torch.inference_mode()
def build_weights(
    config: DecoderConfig,
    source: TensorSource,
    *,
    compression: str,
    dtype: torch.dtype,
    device: torch.device,
    invariant: bool | None = None,
    embedding: Tensor | None = None,
    stored: bool = False,
    advance: Callable[[], None] | None = None,
) -> DecoderWeights:
    """Fuse, compress and place the weights of a checkpoint, layer by layer.

    Parameters
    ----------
    config : DecoderConfig
        Geometry of the checkpoint.
    source : TensorSource
        Its tensors, by their transformers names.
    compression, dtype
        From :func:`speckv.models.quantize.resolve_formats`.
    device : torch.device
        Where the model runs.
    invariant : bool, optional
        Whether the operations are the width-invariant ones of the CPU; by default they are on the
        CPU. Otherwise they are plain torch, and packed weights stay packed until they are used.
    embedding : Tensor [ids, hidden], optional
        Another model's embedding to share, of type ``dtype``; ``source`` then needs none.
    stored : bool
        Whether the checkpoint is quantised already; its plain weights then stay plain.
    advance : callable, optional
        Called once a layer, and once for the head.

    Raises
    ------
    ModelError
        If a tensor is missing or has another shape.
    """
    if invariant is None:
        invariant = device.type == "cpu"
    build = _Builder(config, source, compression, dtype, device, invariant, stored)
    if embedding is None:
        embedding = build.tensor("model.embed_tokens.weight", config.vocab_size, config.hidden)
        embedding = embedding.to(dtype)
    layers: list[DecoderLayer] = []
    for index in range(config.layers):
        layers.append(build.layer(index))
        _share_scratch(layers)
        if advance is not None:
            advance()
    norm, head = build.norm_weight("model.norm"), build.head(embedding)
    fused_head = None
    if layers[0].fused is not None:
        fused_head = fused_product(head, dtype, norm=norm, eps=config.eps)
        _share_scratch(layers[:1], fused_head)
    weights = DecoderWeights(
        embedding, layers, build.norm(norm), build.linear(head), build.fingerprint(), fused_head
    )
    if advance is not None:
        advance()
    return weights
