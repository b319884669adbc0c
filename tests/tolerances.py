"""The one table of float tolerances, and the comparison that uses it.

The bounds are those of the *input's* dtype: kernels compute in fp32 whatever they read, so they
bound what rounding the input costs the reference and the kernel alike.
"""

from __future__ import annotations

import torch
from torch import Tensor

TOLERANCE = {torch.float32: 1e-5, torch.float16: 1e-3, torch.bfloat16: 1e-2}
"""Largest absolute difference, relative to 1 or to the expected magnitude if that is larger."""

RMS_SHARE = 0.3
"""Root mean square difference allowed, as a share of the tolerance."""


def assert_close(actual: Tensor, expected: Tensor, dtype: torch.dtype) -> None:
    """Fail unless ``actual`` equals ``expected`` within the tolerance of ``dtype``.

    Shape and dtype must agree. NaN equals NaN, infinities equal themselves.
    """
    assert actual.shape == expected.shape and actual.dtype == expected.dtype
    tolerance = TOLERANCE[dtype]
    torch.testing.assert_close(actual, expected, rtol=tolerance, atol=tolerance, equal_nan=True)
    finite = expected.isfinite()
    if finite.any():
        scale = expected[finite].abs().clamp(min=1.0)
        rms = ((actual[finite] - expected[finite]) / scale).double().square().mean().sqrt()
        assert rms <= RMS_SHARE * tolerance, f"RMS difference {rms:.3g}"
