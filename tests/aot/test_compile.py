"""Every variant of every kernel compiles ahead of time, within its limits and without spills."""

from __future__ import annotations

from collections.abc import Callable

import pytest

from speckv.kernels import registry

Compile = Callable[[registry.KernelSpec, registry.Variant, str], registry.CompiledResources]

pytestmark = pytest.mark.aot

CASES = [
    pytest.param(spec, variant, arch, id=f"{spec.name}-{variant.name}-{arch}")
    for spec in registry.all_specs()
    for variant in spec.variants
    for arch in variant.architectures
]


@pytest.mark.parametrize(("spec", "variant", "arch"), CASES)
def test_resources(
    compiled: Compile, spec: registry.KernelSpec, variant: registry.Variant, arch: str
) -> None:
    used = compiled(spec, variant, arch)
    assert used.spills == 0
    assert used.registers <= spec.max_registers
    assert used.shared_bytes <= spec.max_shared_bytes


def test_names_are_unique() -> None:
    specs = registry.all_specs()
    assert len({spec.name for spec in specs}) == len(specs)
    for spec in specs:
        assert len({variant.name for variant in spec.variants}) == len(spec.variants)


def test_unknown_architecture_is_refused() -> None:
    with pytest.raises(ValueError, match="arch: expected 'sm_<number>'"):
        registry.compile_spec(registry.all_specs()[0], "hopper")
