"""The lowest kept logit and the log-sum-exp of what is kept, under temperature, top-k and top-p.

Temperature comes first, then top-k, then top-p over the renormalised top-k, as in Hugging Face's
warpers: ``keep = {x : x >= x_(k)}``, and of those the tokens before which the mass, sorted from the
top, is less than p. Two launches, each one pass over the logits, and no sort:

1. Sums: ``lse = log sum exp(x / T)``. For a row that is truncated the last program to arrive also
   derives a floor that is certainly not above the cutoff: about the k-th largest of the maxima of
   many groups of tokens, or the logit below which the whole vocabulary weighs less than top-p may
   drop. Rows that are not truncated are finished here.
2. Selection: the few tokens at or above the floor are gathered; the last program to arrive finds
   the cutoff among them by bisection over integer keys.

Nothing depends on the order of arrival: partial sums are merged in index order, the gathered tokens
are counted and weighed in integers, and there is no floating-point atomic. The semantics are those
of `reference.cutoff`.

Rules: ties at the cutoff are all kept; where fewer than k tokens are possible all of them are, and
the cutoff is ``-inf``; a row with NaN, ``+inf`` or nothing but ``-inf`` gets the cutoff ``-inf``
and an ``lse`` of NaN, by which `verify_rejection` knows it.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from . import layout as at
from . import reference
from .checks import check_tensor
from .cutoff_kernel import GROUPS, _cutoff_select_kernel, _cutoff_sum_kernel
from .registry import FP_FUSION, KernelSpec, Variant
from .split import SplitConfig, split_row

SELECT_REGISTERS = 112
"""Of a thread of the selection; left to choose, the assembler of Triton 3.6 spills."""


def _select_config(vocabulary: int) -> SplitConfig:
    """Programs of one row; they do not depend on the number of rows."""
    return split_row(vocabulary, block=1024)


@dataclass(frozen=True)
class CutoffScratch:
    """What the programs of `cutoff` leave for each other; launches that share it must not overlap.

    Attributes
    ----------
    config : SplitConfig
    top, total : float32 [R, splits]
        Largest logit of a split, and its sum of exponentials relative to that.
    group : float32 [R, splits, GROUPS]
        Largest logit of each group of a split.
    bound : float32 [R, 3]
        Floor (``inf``: nothing to select), largest logit, sum of exponentials relative to it.
    candidate : floating [R, V]
        Logits at or above the floor, packed, in no particular order.
    cursor : int32 [R]
        How many; zero between launches.
    counter : int32 [R]
        Programs of a row that have arrived; zero between launches.
    """

    config: SplitConfig
    top: Tensor
    total: Tensor
    group: Tensor
    bound: Tensor
    candidate: Tensor
    cursor: Tensor
    counter: Tensor

    @classmethod
    def allocate(
        cls,
        rows: int,
        vocabulary: int,
        dtype: torch.dtype,
        config: SplitConfig,
        device: torch.device | str,
    ) -> CutoffScratch:
        """Scratch for logits [rows, vocabulary] of ``dtype``, split by ``config``."""
        splits = config.splits
        return cls(
            config=config,
            top=torch.empty(rows, splits, device=device),
            total=torch.empty(rows, splits, device=device),
            group=torch.empty(rows, splits, GROUPS, device=device),
            bound=torch.empty(rows, 3, device=device),
            candidate=torch.empty(rows, vocabulary, dtype=dtype, device=device),
            cursor=torch.zeros(rows, dtype=torch.int32, device=device),
            counter=torch.zeros(rows, dtype=torch.int32, device=device),
        )


def cutoff_out(
    logits: Tensor,
    inv_temperature: Tensor,
    top_k: Tensor | None = None,
    top_p: Tensor | None = None,
    *,
    rows: Tensor | None = None,
    scratch: CutoffScratch,
    cutoffs: Tensor,
    lse: Tensor,
) -> None:
    """Launch `cutoff` on arguments that `Cutoff` would accept; nothing else.

    One launch where neither ``top_k`` nor ``top_p`` is given, else two. No allocation, no
    synchronisation: safe to capture in a CUDA graph. Runs on CPU tensors in Triton's interpreter.

    Parameters
    ----------
    logits, inv_temperature, top_k, top_p, rows
        As in `cutoff`.
    scratch : CutoffScratch
        Of this shape and dtype.
    cutoffs, lse : float32 [R], contiguous
        Written, but for rows that are skipped.
    """
    count, vocabulary = logits.shape
    if count == 0:
        return
    config = scratch.config
    inputs = (
        logits,
        logits.stride(0),
        vocabulary,
        inv_temperature,
        top_k,
        top_p,
        rows,
        1 if rows is None else count // rows.shape[0],
        cutoffs,
        lse,
    )
    options = {
        "HAS_K": top_k is not None,
        "HAS_P": top_p is not None,
        "HAS_ROWS": rows is not None,
        "SPLITS": config.padded_splits,
        "BLOCK": config.block,
        "num_warps": config.num_warps,
        "num_stages": 1,
        "enable_fp_fusion": FP_FUSION,
    }
    grid = (config.splits, count)
    _cutoff_sum_kernel[grid](
        *inputs,
        scratch.top,
        scratch.total,
        scratch.group,
        scratch.bound,
        scratch.counter,
        config.blocks,
        **options,
    )
    if top_k is not None or top_p is not None:
        _cutoff_select_kernel[grid](
            *inputs,
            scratch.bound,
            scratch.candidate,
            scratch.cursor,
            scratch.counter,
            config.blocks,
            maxnreg=SELECT_REGISTERS,
            **options,
        )


class Cutoff:
    """`cutoff` with given parameters, validated once: what the loop calls.

    Parameters
    ----------
    logits : Tensor
        An example of what will be passed to the calls.
    inv_temperature, top_k, top_p, rows
        As in `cutoff`. The tensors are kept, and read at each call.

    Attributes
    ----------
    cutoffs, lse : float32 [R]
        Results, overwritten by each call.
    config : SplitConfig, optional
        How the launch is cut; None on the CPU.

    Raises
    ------
    TypeError, ValueError
        As `cutoff`.
    """

    def __init__(
        self,
        logits: Tensor,
        inv_temperature: Tensor,
        top_k: Tensor | None = None,
        top_p: Tensor | None = None,
        *,
        rows: Tensor | None = None,
    ) -> None:
        check_tensor("logits", logits, "floating", (None, None))
        (count, vocabulary), device = logits.shape, logits.device
        if vocabulary < 1:
            raise ValueError("logits: expected a vocabulary of at least 1, got 0")
        check_tensor("inv_temperature", inv_temperature, "float32", (count,), device)
        if top_k is not None:
            check_tensor("top_k", top_k, "int32", (count,), device)
        if top_p is not None:
            check_tensor("top_p", top_p, "float32", (count,), device)
        if rows is not None:
            check_tensor("rows", rows, "int32", (None, at.ROW_WORDS), device, dense=True)
            if count and (rows.shape[0] == 0 or count % rows.shape[0]):
                raise ValueError(
                    f"rows: expected a number of sequences that divides the {count} rows of "
                    f"logits, got {rows.shape[0]}"
                )
        self.cutoffs = torch.full((count,), float("-inf"), device=device)
        self.lse = torch.full((count,), float("nan"), device=device)
        self._parameters = (inv_temperature, top_k, top_p)
        self._rows = rows
        self.config: SplitConfig | None = None
        self._scratch = None
        if device.type != "cpu":
            self.config = _select_config(vocabulary)
            self._scratch = CutoffScratch.allocate(
                count, vocabulary, logits.dtype, self.config, device
            )

    def __call__(self, logits: Tensor) -> None:
        """Fill the results. Shape, dtype and device of ``logits`` are those of the example."""
        if self._scratch is None:
            cutoffs, lse = reference.cutoff(logits, *self._parameters, rows=self._rows)
            self.cutoffs.copy_(cutoffs)
            self.lse.copy_(lse)
            return
        cutoff_out(
            logits,
            *self._parameters,
            rows=self._rows,
            scratch=self._scratch,
            cutoffs=self.cutoffs,
            lse=self.lse,
        )


def cutoff(
    logits: Tensor,
    inv_temperature: Tensor,
    top_k: Tensor | None = None,
    top_p: Tensor | None = None,
    *,
    rows: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """The lowest kept logit and the log-sum-exp of what is kept, row by row.

    On CPU tensors this is `reference.cutoff`, elsewhere one or two kernel launches; `Cutoff` is its
    prepared form.

    Parameters
    ----------
    logits : fp32 | fp16 | bf16 [R, V]
        Unit stride in V, any row stride. Not mutated. Full speed needs a base and a row stride
        that are multiples of 16 bytes.
    inv_temperature : float32 [R]
        1 / temperature; 0 means greedy, for which 1 is used (the cutoff does not matter there).
    top_k : int32 [R], optional
        0 keeps all. None: every row does.
    top_p : float32 [R], optional
        In (0, 1]; 1 keeps all. None: every row does.
    rows : int32 [B, ROW_WORDS], contiguous, optional
        `StepState.rows` of B sequences with R / B positions each, in order. Positions of sequences
        that are done, and beyond DRAFTED, are skipped.

    Returns
    -------
    cutoff : float32 [R]
        Raw logit: keep ``logits >= cutoff``. ``-inf`` where nothing is dropped or the row skipped.
    lse : float32 [R]
        ``log(sum(exp(logits * inv_temperature)))`` over the kept tokens; NaN for a row without a
        token, or skipped.

    Raises
    ------
    TypeError, ValueError
        Naming the argument, what was expected and what came.
    """
    prepared = Cutoff(logits, inv_temperature, top_k, top_p, rows=rows)
    prepared(logits)
    return prepared.cutoffs, prepared.lse


_INPUT_TYPES = {
    "stride_lr": "i32",
    "vocabulary": "i32",
    "inv_ptr": "*fp32",
    "width": "i32",
    "cutoff_ptr": "*fp32",
    "lse_ptr": "*fp32",
    "bound_ptr": "*fp32",
    "counter_ptr": "*i32",
    "blocks": "i32",
}


def _variant(
    name: str,
    scratch_types: dict[str, str],
    truncated: bool,
    rows: bool,
    maxnreg: int | None = None,
) -> Variant:
    config = _select_config(128_256)
    signature = {"logits_ptr": f"*{name}", **_INPUT_TYPES, **scratch_types}
    if truncated:
        signature |= {"k_ptr": "*i32", "p_ptr": "*fp32"}
    if rows:
        signature["rows_ptr"] = "*i32"
    pointers = {n for n, t in signature.items() if t.startswith("*")}
    return Variant(
        name=name + "-truncated" * truncated + "-rows" * rows,
        signature=signature,
        constexprs={
            "k_ptr": None,
            "p_ptr": None,
            "rows_ptr": None,
            "HAS_K": truncated,
            "HAS_P": truncated,
            "HAS_ROWS": rows,
            "SPLITS": config.padded_splits,
            "BLOCK": config.block,
        },
        divisible=frozenset(pointers | {"stride_lr"}),
        wide_loads=True,
        num_warps=config.num_warps,
        maxnreg=maxnreg,
    )


def _sum_variant(name: str, truncated: bool, rows: bool) -> Variant:
    partials = {"top_ptr": "*fp32", "total_ptr": "*fp32", "group_ptr": "*fp32"}
    return _variant(name, partials, truncated, rows)


def _select_variant(name: str, rows: bool) -> Variant:
    scratch = {"candidate_ptr": f"*{name}", "cursor_ptr": "*i32"}
    return _variant(name, scratch, True, rows, maxnreg=SELECT_REGISTERS)


SPECS = (
    KernelSpec(
        name="cutoff_sum",
        kernel=_cutoff_sum_kernel,
        variants=tuple(
            _sum_variant(name, truncated, rows)
            for name in ("fp32", "fp16", "bf16")
            for truncated, rows in ((False, False), (True, False), (True, True))
        ),
        max_registers=128,
        max_shared_bytes=16_384,
    ),
    KernelSpec(
        name="cutoff_select",
        kernel=_cutoff_select_kernel,
        variants=tuple(
            _select_variant(name, rows)
            for name in ("fp32", "fp16", "bf16")
            for rows in (False, True)
        ),
        max_registers=128,
        max_shared_bytes=16_384,
    ),
)
