"""Tensor functions of speckv: Triton kernels, and the plain-torch reference that is their oracle.

Imported as ``speckv.kernels`` only: Hugging Face distributes an unrelated top-level package named
``kernels``, so any other import name is refused.
"""

from __future__ import annotations

if __name__ != "speckv.kernels":
    raise ImportError(
        f"this package must be imported as speckv.kernels, not as {__name__!r} "
        "(the name 'kernels' belongs to an unrelated Hugging Face distribution)"
    )
