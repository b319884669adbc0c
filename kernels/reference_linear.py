"""`linear` in plain torch, in fp32 throughout: the CPU path, and the oracle of the kernel."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from .packed import Weight


def linear(
    x: Tensor,
    weight: Weight,
    *,
    out: Tensor,
    bias: Tensor | None = None,
    residual: Tensor | None = None,
    swiglu: bool = False,
) -> None:
    """``out = x @ weight.T``, with bias, SwiGLU and residual; see `speckv.kernels.linear`.

    Packed weights are expanded in fp32 and not rounded; the result is rounded once.
    """
    dense = weight.float() if isinstance(weight, Tensor) else weight.expand(torch.float32)
    y = F.linear(x.float(), dense, None if bias is None else bias.float())
    if swiglu:
        gate, up = y.chunk(2, -1)
        y = F.silu(gate) * up
    if residual is not None:
        y = y + residual.float()
    out.copy_(y)
