"""`reference.cutoff`: temperature, top-k and top-p as one number a row, by sorting.

Rules: ties at the cutoff are all kept; a row that holds NaN or ``+inf``, or nothing but ``-inf``,
keeps the cutoff ``-inf`` and an ``lse`` of NaN.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from . import layout as at

__all__ = ["cutoff"]


def cutoff(
    logits: Tensor,
    inv_temperature: Tensor,
    top_k: Tensor | None = None,
    top_p: Tensor | None = None,
    *,
    rows: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """The lowest kept logit and the log-sum-exp of what is kept, under Hugging Face's warpers.

    Temperature first, then top-k, then top-p over the renormalised top-k. Ties at the cutoff are
    all kept (transformers keeps them for top-k and drops an arbitrary part of them for top-p).

    Parameters
    ----------
    logits : floating [R, V]
    inv_temperature : float32 [R]
        1 / temperature; 0 means greedy, for which 1 is used (the cutoff does not matter there).
    top_k : int32 [R], optional
        0 keeps all. None: every row does.
    top_p : float32 [R], optional
        In (0, 1]; 1 keeps all. None: every row does.
    rows : int32 [B, ROW_WORDS], optional
        `StepState.rows` of B sequences with R / B positions each, in order. Positions of sequences
        that are done, and beyond DRAFTED, are skipped.

    Returns
    -------
    cutoff : float32 [R]
        Raw logit: keep ``logits >= cutoff``. ``-inf`` where nothing is dropped or the row skipped.
    lse : float32 [R]
        ``log(sum(exp(logits * inv_temperature)))`` over the kept tokens; NaN for a row without a
        token, or skipped.
    """
    count = logits.shape[0]
    low = torch.full((count,), -math.inf, device=logits.device)
    lse = torch.full((count,), math.nan, device=logits.device)
    for i in range(count):
        if rows is not None:
            width = count // rows.shape[0]
            of_row = rows[i // width]
            if of_row[at.DONE] or i % width > of_row[at.DRAFTED]:
                continue
        x, inv = logits[i].float(), float(inv_temperature[i]) or 1.0
        k = 0 if top_k is None else int(top_k[i])
        p = 1.0 if top_p is None else float(top_p[i])
        if not math.isfinite(x.max()):
            continue
        kept = x
        if 0 < k < x.numel():
            low[i] = x.topk(k).values[-1]
            kept = x[x >= low[i]]
        if p < 1.0:
            low[i] = _nucleus_cutoff(kept, inv, p)
            kept = kept[kept >= low[i]]
        lse[i] = torch.logsumexp(kept * inv, 0)
    return low, lse


def _nucleus_cutoff(x: Tensor, inv: float, p: float) -> Tensor:
    """The lowest value of ``x`` [N] with a mass of less than ``p`` strictly above it."""
    total = torch.logsumexp(x * inv, 0)
    for size in (min(1024, x.numel()), x.numel()):  # the top is nearly always enough
        values = x.topk(size).values
        mass = (values * inv - total).exp().cumsum(0)
        if mass[-1] >= p:
            break
    above = torch.searchsorted(-values, -values)
    before = torch.where(above > 0, mass[(above - 1).clamp(min=0)], 0.0)
    return values[before < p][-1]
