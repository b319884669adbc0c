"""From a checkpoint's tensors to the fused layers of the decoder."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from functools import partial
from typing import Protocol

import torch
from torch import Tensor

from speckv.errors import ModelError
from speckv.kernels import cpu, functional
from speckv.models.config import DecoderConfig
from speckv.models.quantize import Int8Weight, Nf4Weight, compress, fuse

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


@dataclass(frozen=True)
class _Expanding:
    """A packed weight, expanded at every call."""

    weight: Int8Weight | Nf4Weight
    bias: Tensor | None
    dtype: torch.dtype

    def __call__(self, x: Tensor, residual: Tensor | None = None) -> Tensor:
        weight = self.weight.expand(self.dtype)
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
    samples: dict[str, str] = field(default_factory=dict)

    def tensor(self, name: str, *shape: int) -> Tensor:
        if name not in self.source:
            raise ModelError(f"the checkpoint has no tensor {name!r}: it is incomplete or corrupt")
        found = self.source[name]
        if tuple(found.shape) != shape:
            raise ModelError(
                f"the checkpoint's tensor {name!r} has shape {tuple(found.shape)}, expected {shape}"
            )
        self.samples[name] = _sample_digest(found)
        return found.to(self.device)

    def linear(
        self,
        names: Sequence[str],
        rows: Sequence[int],
        columns: int,
        *,
        bias: bool,
        residual: bool = False,
    ) -> RowOperation:
        parts = [
            compress(self.tensor(f"{name}.weight", count, columns), self.compression, self.dtype)
            for name, count in zip(names, rows, strict=True)
        ]
        shift = None
        if bias:
            shift = torch.cat(
                [
                    self.tensor(f"{name}.bias", count)
                    for name, count in zip(names, rows, strict=True)
                ]
            ).to(self.dtype)
        if self.invariant:
            dense = [
                part if isinstance(part, Tensor) else part.expand(self.dtype) for part in parts
            ]
            return cpu.CpuLinear(torch.cat(dense), shift, residual=residual)
        weight = fuse(parts)
        if not isinstance(weight, Tensor):
            return _Expanding(weight, shift, self.dtype)
        run = functional.linear_add if residual else functional.linear
        return partial(run, weight=weight, bias=shift)

    def norm(self, name: str) -> RowOperation:
        weight = self.tensor(f"{name}.weight", self.config.hidden).to(self.dtype)
        run = partial(self.function("rms_norm"), weight=weight, eps=self.config.eps)
        return self._row_wise(
            run, partial(cpu.proven_rms_norm_counts, self.config.hidden, self.dtype)
        )

    def rotate(self, name: str) -> RowOperation:
        c = self.config
        run = rope = self.function("rope")
        if c.head_norm:
            weight = torch.cat(
                (
                    self.tensor(f"{name}.q_norm.weight", c.head_dim).expand(c.heads, -1),
                    self.tensor(f"{name}.k_norm.weight", c.head_dim).expand(c.kv_heads, -1),
                )
            ).to(self.dtype)
            run = partial(_norm_and_rope, rope=rope, weight=weight, eps=c.eps)
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
        return DecoderLayer(
            attention_norm=self.norm(f"{at}.input_layernorm"),
            qkv=self.linear(
                [f"{at}.self_attn.{part}_proj" for part in "qkv"],
                (queries, keys, keys),
                c.hidden,
                bias=c.qkv_bias,
            ),
            rotate=self.rotate(f"{at}.self_attn"),
            out=self.linear(
                [f"{at}.self_attn.o_proj"],
                (c.hidden,),
                queries,
                bias=c.output_bias,
                residual=True,
            ),
            mlp_norm=self.norm(f"{at}.post_attention_layernorm"),
            gate_up=self.linear(
                [f"{at}.mlp.{part}_proj" for part in ("gate", "up")],
                (c.intermediate, c.intermediate),
                c.hidden,
                bias=c.mlp_bias,
            ),
            swiglu=self.swiglu(),
            down=self.linear(
                [f"{at}.mlp.down_proj"],
                (c.hidden,),
                c.intermediate,
                bias=c.mlp_bias,
                residual=True,
            ),
            window=c.windows[index],
        )

    def fingerprint(self) -> str:
        """Digest of everything that was read so far, in whatever order."""
        text = "".join(f"{name} {digest}\n" for name, digest in sorted(self.samples.items()))
        return hashlib.sha256(text.encode()).hexdigest()

    def head(self, embedding: Tensor) -> RowOperation:
        c = self.config
        weight = embedding
        if not c.tied:
            weight = self.tensor("lm_head.weight", c.vocab_size, c.hidden).to(self.dtype)
        if self.invariant:
            return cpu.CpuLinear(weight)
        return partial(functional.linear, weight=weight)


def _sample_digest(tensor: Tensor) -> str:
    """Digest of up to ``2 * _SAMPLE`` evenly spaced elements, as fp32."""
    flat = tensor.detach().reshape(-1)
    sample = flat[:: max(1, flat.numel() // _SAMPLE)].float().cpu()
    return hashlib.sha256(sample.numpy().tobytes()).hexdigest()


def _norm_and_rope(
    qkv: Tensor, cos: Tensor, sin: Tensor, *, rope: RowOperation, weight: Tensor, eps: float
) -> Tensor:
    return rope(functional.head_rms_norm(qkv, weight, eps), cos, sin)


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
        CPU. Otherwise they are plain torch, and packed weights stay packed.
    embedding : Tensor [ids, hidden], optional
        Another model's embedding to share, of type ``dtype``; ``source`` then needs none.
    advance : callable, optional
        Called once a layer, and once for the head.

    Raises
    ------
    ModelError
        If a tensor is missing or has another shape.
    """
    if invariant is None:
        invariant = device.type == "cpu"
    build = _Builder(config, source, compression, dtype, device, invariant)
    if embedding is None:
        embedding = build.tensor("model.embed_tokens.weight", config.vocab_size, config.hidden)
        embedding = embedding.to(dtype)
    layers = []
    for index in range(config.layers):
        layers.append(build.layer(index))
        if advance is not None:
            advance()
    norm, head = build.norm("model.norm"), build.head(embedding)
    weights = DecoderWeights(embedding, layers, norm, head, build.fingerprint())
    if advance is not None:
        advance()
    return weights
