"""Width-invariant operations for the CPU: a row's bits do not depend on its company.

CPU libraries choose another algorithm, and so another order of additions, for another number of
rows: the logits of one token then differ in their last bits between plain decoding and a
verification of sixteen, and token identity is lost. Which row counts agree depends on the library,
the processor, the shape, the type and the number of threads, so nothing is assumed here: every
operation is *probed* once per process, with data on which any change of the order of additions
shows, and at run time a number of rows that was not proven is padded up to one that was.

Operations compiled from :mod:`speckv.kernels.native` are independent of the company by
construction; they are probed all the same.

The definition of an operation is its result on 16 rows. Where not even that is independent of a
row's place, rows are computed one by one, which is exact by construction and slow.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial

import torch
from torch import Tensor

from speckv.kernels import functional, native

__all__ = [
    "ROW_COUNTS",
    "CpuLinear",
    "InvariantRows",
    "ProvenRows",
    "bits_equal",
    "cached_proof",
    "common_counts",
    "prove_counts",
    "proven_rms_norm_counts",
    "proven_rope_counts",
    "proven_swiglu_counts",
    "round_up_rows",
    "row_function",
]

ROW_COUNTS = (*range(1, 17), 32, 48, 64, 128)
"""Row counts that are probed: the widths of a verification, then batches and prefill."""

_DEFINING = 16
_SHIFTS = (0, 5, 11)
_COSTLY_WEIGHTS = 1 << 23
_BITS = {1: torch.uint8, 2: torch.int16, 4: torch.int32, 8: torch.int64}
_proven: dict[tuple[object, ...], tuple[int, ...]] = {}


def bits_equal(left: Tensor, right: Tensor) -> bool:
    """Whether two tensors of one floating-point type hold the same bits."""
    bits = _BITS[left.element_size()]
    return torch.equal(left.contiguous().view(bits), right.contiguous().view(bits))


def prove_counts(
    run: Callable[[Tensor], Tensor],
    counts: Sequence[int] = ROW_COUNTS,
    shifts: Sequence[int] = _SHIFTS,
) -> tuple[int, ...]:
    """Row counts at which an operation gives every row the bits it has among sixteen.

    Parameters
    ----------
    run : callable
        Maps an index tensor [n] int64 with values 0 .. 15, which picks n of sixteen distinct input
        rows, to the operation's result [n, ...] on exactly those rows, in that order.
    counts : sequence of int
        Row counts to try.
    shifts : sequence of int
        Each count is tried with the rows rotated by each of these, so that a row is seen at
        several places.

    Returns
    -------
    tuple of int
        The proven counts in ascending order; empty when a row's bits depend on its place even
        among sixteen rows.
    """
    reference = run(torch.arange(_DEFINING))

    def holds(count: int) -> bool:
        for shift in shifts:
            pick = (torch.arange(count) + shift) % _DEFINING
            if not bits_equal(run(pick), reference[pick]):
                return False
        return True

    proven = tuple(count for count in sorted(counts) if holds(count))
    return proven if _DEFINING in proven else ()


def cached_proof(key: tuple[object, ...], probe: Callable[[], tuple[int, ...]]) -> tuple[int, ...]:
    """The result of ``probe``, run once per process, ``key`` and number of threads."""
    full = (*key, torch.get_num_threads())
    if full not in _proven:
        _proven[full] = probe()
    return _proven[full]


def common_counts(plans: Sequence[tuple[int, ...]]) -> tuple[int, ...]:
    """Row counts for a chain of operations: 16, and what more than half of ``plans`` have proven.

    An operation without a count of the chain pads or splits by itself; a row-by-row plan (empty)
    has no opinion.
    """
    opinions = [plan for plan in plans if plan]
    votes = {count: sum(count in plan for plan in opinions) for count in ROW_COUNTS}
    return tuple(
        count
        for count in ROW_COUNTS
        if count == _DEFINING or 2 * votes[count] > len(opinions) or not opinions
    )


def round_up_rows(rows: int, counts: tuple[int, ...]) -> int:
    """The smallest proven count that holds ``rows``, or a multiple of the largest one."""
    largest = counts[-1]
    if rows > largest:
        return -(-rows // largest) * largest
    return next(count for count in counts if count >= rows)


class InvariantRows:
    """A row-wise operation restricted to the row counts proven for it.

    Parameters
    ----------
    run : callable
        The operation: tensors [rows, ...] to a tensor [rows, ...].
    counts : tuple of int
        From :func:`prove_counts`.
    """

    def __init__(self, run: Callable[..., Tensor], counts: tuple[int, ...]) -> None:
        self._run = run
        self.restrict(counts)

    def restrict(self, counts: tuple[int, ...]) -> None:
        """Replace the proven row counts."""
        self.counts = counts
        self._direct = frozenset(counts)

    def __call__(self, *rows: Tensor) -> Tensor:
        """The operation on any number of rows; the arguments are [rows, ...] and contiguous."""
        if rows[0].shape[0] in self._direct:
            return self._run(*rows)
        return self._regrouped(rows)

    def _regrouped(self, rows: tuple[Tensor, ...]) -> Tensor:
        total = rows[0].shape[0]
        if not self.counts:
            # Fresh copies: a slice of another alignment could be given another algorithm.
            alone = [self._run(*(t[i : i + 1].clone() for t in rows)) for i in range(total)]
            return torch.cat(alone)
        padded = round_up_rows(total, self.counts)
        if padded > total:
            rows = tuple(torch.cat((t, t.new_zeros(padded - total, *t.shape[1:]))) for t in rows)
        if padded <= self.counts[-1]:
            return self._run(*rows)[:total]
        pieces = zip(*(torch.split(t, self.counts[-1]) for t in rows), strict=True)
        return torch.cat([self._run(*piece) for piece in pieces])[:total]


class ProvenRows(InvariantRows):
    """A row-wise operation with the probe that proves its row counts.

    Parameters
    ----------
    run : callable
        The operation: contiguous tensors [rows, ...] to a tensor [rows, ...].
    proof : callable
        Returns the row counts proven at the present number of threads; cached by
        :func:`cached_proof`.
    """

    def __init__(self, run: Callable[..., Tensor], proof: Callable[[], tuple[int, ...]]) -> None:
        self._proof = proof
        super().__init__(run, proof())

    def prove(self) -> None:
        """Probe again, as is needed after a change of ``torch.get_num_threads()``."""
        self.restrict(self._proof())


class _OneDnn:
    """oneDNN with a weight packed once: the fastest, and flat over 1 to 16 rows."""

    @staticmethod
    def pack(weight: Tensor) -> Tensor:
        packed: Tensor = torch.ops.mkldnn._reorder_linear_weight(weight, None)
        return packed

    @staticmethod
    def linear(x: Tensor, *, weight: Tensor, bias: Tensor | None) -> Tensor:
        out: Tensor = torch.ops.mkldnn._linear_pointwise.default(x, weight, bias, "none", [], "")
        return out

    @staticmethod
    def linear_add(x: Tensor, residual: Tensor, *, weight: Tensor, bias: Tensor | None) -> Tensor:
        out: Tensor = torch.ops.mkldnn._linear_pointwise.binary(x, residual, weight, bias, "add")
        return out


class _Plain:
    """``F.linear``: for builds and types without oneDNN."""

    @staticmethod
    def pack(weight: Tensor) -> Tensor:
        return weight

    @staticmethod
    def linear(x: Tensor, *, weight: Tensor, bias: Tensor | None) -> Tensor:
        return functional.linear(x, weight, bias)

    @staticmethod
    def linear_add(x: Tensor, residual: Tensor, *, weight: Tensor, bias: Tensor | None) -> Tensor:
        return functional.linear_add(x, residual, weight, bias)


class _Native:
    """Our own product, for fp32: bound by the weight's bytes, which are read where they are."""

    def __init__(self, library: native.Library) -> None:
        self._library = library

    def pack(self, weight: Tensor) -> Tensor:
        return weight.contiguous()

    def linear(self, x: Tensor, *, weight: Tensor, bias: Tensor | None) -> Tensor:
        return self._library.linear(x, weight, bias)

    def linear_add(
        self, x: Tensor, residual: Tensor, *, weight: Tensor, bias: Tensor | None
    ) -> Tensor:
        return self._library.linear(x, weight, bias, residual)


_Backend = _Native | type[_OneDnn] | type[_Plain]
_backends: dict[torch.dtype, _Backend] = {}


def _linear_backend(dtype: torch.dtype) -> _Backend:
    if dtype not in _backends:
        library = native.library() if dtype == torch.float32 else None
        if library is not None:
            _backends[dtype] = _Native(library)
        else:
            _backends[dtype] = _OneDnn if _onednn_runs(dtype) else _Plain
    return _backends[dtype]


def row_function(name: str, dtype: torch.dtype) -> Callable[..., Tensor]:
    """The fastest ``"rms_norm"``, ``"rope"`` or ``"swiglu"`` of :mod:`functional` for ``dtype``.

    Its arguments must be contiguous.
    """
    library = native.library() if dtype in native.DTYPES else None
    found: Callable[..., Tensor] = getattr(functional if library is None else library, name)
    return found


def _onednn_runs(dtype: torch.dtype) -> bool:
    if not torch.backends.mkldnn.is_available():
        return False
    weight = torch.eye(16, dtype=dtype)
    try:
        out = _OneDnn.linear_add(weight, weight, weight=_OneDnn.pack(weight), bias=None)
    except (RuntimeError, AttributeError, NotImplementedError):
        return False
    return torch.equal(out, weight + weight)


class CpuLinear(ProvenRows):
    """A linear layer ``x @ weight.T + bias (+ residual)`` whose rows have fixed bits.

    Called with ``x [rows, K]``, and with ``residual [rows, N]`` if it was made for one. The weight
    is packed once; the given tensor is kept only where it is packed already (fp32, where the
    compiled operations are available). Row counts are proven at construction, once per
    (shape, type, bias, residual, backend, threads) in the process.

    Parameters
    ----------
    weight : Tensor [N, K] fp32, bf16 or fp16, contiguous
        The weight.
    bias : Tensor [N], optional
        The bias, of the same type.
    residual : bool
        Whether calls add a residual, in the same rounding as the product.
    """

    def __init__(
        self, weight: Tensor, bias: Tensor | None = None, *, residual: bool = False
    ) -> None:
        if weight.ndim != 2 or weight.device.type != "cpu":
            raise ValueError(
                f"weight: expected a matrix [N, K] on the CPU, got {tuple(weight.shape)} "
                f"on {weight.device}"
            )
        backend = _linear_backend(weight.dtype)
        run = backend.linear_add if residual else backend.linear
        shape = (weight.shape[0], weight.shape[1])
        case = (shape, weight.dtype, bias is not None, residual, backend)
        super().__init__(
            partial(run, weight=backend.pack(weight), bias=bias),
            partial(cached_proof, ("linear", *case), partial(_probe_linear, *case)),
        )


def _cancelling(rows: int, columns: int, generator: torch.Generator) -> tuple[Tensor, Tensor]:
    """Inputs [16, columns] and weights [rows, columns] whose exact products are all zero.

    Every term appears twice with opposite signs, at random places, over sixteen binary orders of
    magnitude: the computed result is nothing but the rounding errors of the additions, which
    another order of additions changes, even after the result is rounded to bf16.
    """
    half = columns // 2
    place = torch.randperm(2 * half, generator=generator)

    def draw(count: int) -> Tensor:
        value = torch.randn(count, half, generator=generator)
        return value * torch.exp2(torch.randint(-4, 5, (count, half), generator=generator).float())

    x, weight = torch.zeros(_DEFINING, columns), torch.zeros(rows, columns)
    left, right = draw(_DEFINING), draw(rows)
    x[:, : 2 * half] = torch.cat((left, left), 1)[:, place]
    weight[:, : 2 * half] = torch.cat((right, -right), 1)[:, place]
    if columns > 2 * half:
        x[:, -1], weight[:, -1] = 1.0, 2.0**-12
    return x, weight


@torch.inference_mode()
def _probe_linear(
    shape: tuple[int, int],
    dtype: torch.dtype,
    has_bias: bool,
    has_residual: bool,
    backend: _Backend,
) -> tuple[int, ...]:
    outputs, columns = shape
    generator = torch.Generator().manual_seed(outputs * 31 + columns)
    x, block = (t.to(dtype) for t in _cancelling(min(outputs, 1024), columns, generator))
    weight = block.repeat(-(-outputs // block.shape[0]), 1)[:outputs].contiguous()
    tiny = torch.randn(_DEFINING + 1, outputs, generator=generator) * 2.0**-20
    residual, bias = tiny[:-1].to(dtype), tiny[-1].to(dtype) if has_bias else None
    packed = backend.pack(weight)

    def run(pick: Tensor) -> Tensor:
        if has_residual:
            return backend.linear_add(x[pick], residual[pick], weight=packed, bias=bias)
        return backend.linear(x[pick], weight=packed, bias=bias)

    if outputs * columns > _COSTLY_WEIGHTS:
        return prove_counts(run, ROW_COUNTS[:-2], _SHIFTS[1:2])
    return prove_counts(run, ROW_COUNTS)


def _noise(*shape: int, dtype: torch.dtype) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(shape[-1])).to(dtype)


@torch.inference_mode()
def proven_rms_norm_counts(width: int, dtype: torch.dtype) -> tuple[int, ...]:
    """Row counts proven for the ``rms_norm`` of :func:`row_function` over ``width`` columns."""
    x, weight = _noise(_DEFINING, width, dtype=dtype), _noise(width, dtype=dtype)
    rms_norm = row_function("rms_norm", dtype)

    def run(pick: Tensor) -> Tensor:
        return rms_norm(x[pick], weight, 1e-5)

    return cached_proof(("rms_norm", width, dtype), lambda: prove_counts(run))


@torch.inference_mode()
def proven_swiglu_counts(width: int, dtype: torch.dtype) -> tuple[int, ...]:
    """Row counts proven for the ``swiglu`` of :func:`row_function` of ``width`` outputs."""
    x, swiglu = _noise(_DEFINING, 2 * width, dtype=dtype), row_function("swiglu", dtype)
    return cached_proof(
        ("swiglu", width, dtype), lambda: prove_counts(lambda pick: swiglu(x[pick]))
    )


@torch.inference_mode()
def proven_rope_counts(
    heads: int, rotated: int, width: int, dtype: torch.dtype, head_norm: bool
) -> tuple[int, ...]:
    """Row counts proven for the ``rope`` of :func:`row_function`, after a head norm or not.

    ``heads`` counts queries, keys and values, ``rotated`` queries and keys, ``width`` is the width
    of a head.
    """
    qkv, cos, sin = (_noise(_DEFINING, heads, width + i, dtype=dtype)[..., i:] for i in range(3))
    weight = _noise(rotated, width, dtype=dtype)
    rope = row_function("rope", dtype)

    def run(pick: Tensor) -> Tensor:
        rows = qkv[pick]
        if head_norm:
            rows = functional.head_rms_norm(rows, weight, 1e-5)
        return rope(rows, cos[pick], sin[pick])

    key = ("rope", heads, rotated, width, dtype, head_norm)
    return cached_proof(key, lambda: prove_counts(run))
