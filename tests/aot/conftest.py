"""Kernels are compiled here, for GPUs that need not be present."""

from __future__ import annotations

import os

import pytest


@pytest.fixture(autouse=True)
def _compiler() -> None:
    if os.environ.get("TRITON_INTERPRET") == "1":
        pytest.fail("run tests/aot without TRITON_INTERPRET (make test does)", pytrace=False)
