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
    norm: Tensor | None = None,
    eps: float = 0.0,
    norm_scale: float = 1.0,
) -> None:
    """``out = x @ weight.T``, with norm, bias, SwiGLU and residual; see `speckv.kernels.linear`.

    Packed weights are expanded in fp32 and not rounded. Rows are rounded when they have been
    multiplied by the norm's weight, and so is the result.
    """
    dense = weight.float() if isinstance(weight, Tensor) else weight.expand(torch.float32)
    wide = x.float()
    if norm is None:
        y = F.linear(wide, dense)
    else:
        scale = (wide.square().mean(dim=1, keepdim=True) + eps).rsqrt() * norm_scale
        y = F.linear((wide * norm.float()).to(x.dtype).float(), dense) * scale
    if bias is not None:
        y = y + bias.float()
    if swiglu:
        gate, up = y.chunk(2, -1)
        y = F.silu(gate) * up
    if residual is not None:
        y = y + residual.float()
    out.copy_(y)
