"""Kernels are compiled here, for GPUs that need not be present."""

from __future__ import annotations

import os
from collections.abc import Callable

import pytest

from speckv.kernels import registry
from speckv.kernels.registry import CompiledResources, KernelSpec, Variant

Compile = Callable[[KernelSpec, Variant, str], CompiledResources]


@pytest.fixture(autouse=True)
def _compiler() -> None:
    if os.environ.get("TRITON_INTERPRET") == "1":
        pytest.fail("run tests/aot without TRITON_INTERPRET (make test does)", pytrace=False)


@pytest.fixture(scope="session")
def compiled() -> Compile:
    """`registry.compile_variant`, once for each variant and architecture."""
    done: dict[tuple[str, str, str], CompiledResources] = {}

    def compile_once(spec: KernelSpec, variant: Variant, arch: str) -> CompiledResources:
        key = (spec.name, variant.name, arch)
        if key not in done:
            done[key] = registry.compile_variant(spec, variant, arch)
        return done[key]

    return compile_once
