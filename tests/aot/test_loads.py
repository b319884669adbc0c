"""Logits are loaded 16 bytes a thread, which the disassembly shows.

Kernels load logits with ``eviction_policy="evict_first"`` and nothing else so; these loads are the
``LDG`` instructions with the modifier ``EF``.
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Callable

import pytest

from speckv.kernels import registry

Compile = Callable[[registry.KernelSpec, registry.Variant, str], registry.CompiledResources]

pytestmark = pytest.mark.aot

CASES = [
    pytest.param(spec, variant, arch, id=f"{spec.name}-{variant.name}-{arch}")
    for spec in registry.all_specs()
    for variant in spec.variants
    if variant.wide_loads
    for arch in variant.architectures
]


def logits_loads(sass: str) -> Counter[str]:
    """Widths of the loads of logits, with their number: ``{"128": 2}``; 32 bits are ``""``."""
    modifiers = re.findall(r"\bLDG\.(\S+)", sass)
    widths: Counter[str] = Counter()
    for names in (m.split(".") for m in modifiers):
        if "EF" in names:
            widths[next((n for n in names if re.fullmatch(r"[US]?\d+", n)), "")] += 1
    return widths


@pytest.mark.parametrize(("spec", "variant", "arch"), CASES)
def test_aligned_logits_are_loaded_in_16_bytes(
    compiled: Compile, spec: registry.KernelSpec, variant: registry.Variant, arch: str
) -> None:
    loads = logits_loads(compiled(spec, variant, arch).sass)
    assert set(loads) == {"128"}, loads


def draft_step_loads(compiled: Compile, name: str) -> Counter[str]:
    (spec,) = (spec for spec in registry.all_specs() if spec.name == "draft_step")
    (variant,) = (variant for variant in spec.variants if variant.name == name)
    return logits_loads(compiled(spec, variant, "sm_90").sass)


def test_a_thread_loads_its_8_logits_in_full_blocks_and_in_the_tail(compiled: Compile) -> None:
    """Its first block's stand apart from the others'."""
    assert draft_step_loads(compiled, "bf16-greedy") == {"128": 2 * 2}
    assert draft_step_loads(compiled, "fp32-greedy") == {"128": 2 * 4}


def test_unaligned_logits_are_loaded_one_by_one(compiled: Compile) -> None:
    assert draft_step_loads(compiled, "bf16-sampled-unaligned") == {"U16": 2 * 16}
    assert draft_step_loads(compiled, "fp32-sampled-unaligned") == {"": 2 * 16}
