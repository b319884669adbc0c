"""Models: the functional decoder, the transformers adapter, loading, compression, tokenizers."""

from __future__ import annotations

import importlib.util
import sys
from pathlib import Path


def _hide_source_folder() -> None:
    """Keep the repository's ``kernels/`` from being taken for Hugging Face's package of that name.

    With the repository root on ``sys.path`` transformers would find and import it, which the folder
    refuses. A distribution that is really installed is left alone.
    """
    if "kernels" in sys.modules:
        return
    spec = importlib.util.find_spec("kernels")
    here = Path(__file__).resolve().parents[2] / "kernels" / "__init__.py"
    if spec is not None and spec.origin is not None and Path(spec.origin).resolve() == here:
        sys.modules["kernels"] = None  # type: ignore[assignment]


_hide_source_folder()
