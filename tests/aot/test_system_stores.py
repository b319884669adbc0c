"""What the host reads while a graph runs is stored at system scope, and what it writes is loaded
so: the disassembly shows it."""

from __future__ import annotations

import re
from collections.abc import Callable

import pytest

from speckv.kernels import loop_step, registry

Compile = Callable[[registry.KernelSpec, registry.Variant, str], registry.CompiledResources]

pytestmark = pytest.mark.aot

CASES = [
    pytest.param(spec, variant, arch, id=f"{spec.name}-{variant.name}-{arch}")
    for spec in loop_step.SPECS
    for variant in spec.variants
    for arch in registry.ARCHITECTURES
]


@pytest.mark.parametrize(("spec", "variant", "arch"), CASES)
def test_words_for_the_host_reach_it(
    compiled: Compile, spec: registry.KernelSpec, variant: registry.Variant, arch: str
) -> None:
    """In PTX they are the only words of 64 bits that these kernels store, tensors of positions
    apart."""
    found = compiled(spec, variant, arch)
    written = re.findall(r"\bst\.global(\S*)\.(?:v\d\.)?b64", found.ptx)
    strong = [m for m in re.findall(r"\bSTG?\.(\S+)", found.sass) if "STRONG.SYS" in m]
    if spec.name not in ("close_step", "publish_conditions"):
        assert ".wt" not in written and not strong
        return
    heard = re.findall(r"\bLDG?\.(\S+)", found.sass)
    assert sum("STRONG.SYS" in m for m in heard) == (spec.name == "close_step"), heard
    assert written and set(written) == {".wt"}, written
    assert len(strong) == len(written) and all(".64." in m for m in strong), strong
