"""Kernels run in Triton's interpreter here.

The interpreter is chosen when a kernel is defined, so the variable must be set before the first
import of one; setting it here would be too late for, or break, tests that compile kernels in the
same process.
"""

from __future__ import annotations

import os

import pytest


@pytest.fixture(autouse=True)
def _interpreter() -> None:
    if os.environ.get("TRITON_INTERPRET") != "1":
        pytest.fail("run tests/kernels with TRITON_INTERPRET=1 (make test does)", pytrace=False)
