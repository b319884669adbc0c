"""Kernels that read and write whole rows do so 16 bytes a thread."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Callable

import pytest

from speckv.kernels import registry

Compile = Callable[[registry.KernelSpec, registry.Variant, str], registry.CompiledResources]

pytestmark = pytest.mark.aot

NAMES = {
    "rms_norm": ("bf16-K2048", "bf16-K2048-residual", "bf16-K576-residual", "fp16-K8192-residual"),
    "rope_append": ("bf16-H32-8-D64", "bf16-H32-8-D128", "fp16-H9-3-D64", "bf16-H16-8-D128-norm"),
    "expand_int8": ("bf16", "fp32"),
    "expand_nf4": ("bf16", "fp16-nested", "fp32"),
}
ACCESSES = {
    "rms_norm": (0, 4),
    "rope_append": (6, 4),  # position, slot, halves of cosines and sines, which the heads share
    "expand_int8": (1, 3),  # the row's scale
    "expand_nf4": (36, 5),  # 32 weights from the table of 16, and the scale, or what makes it
}
"""Most accesses of less than 16 bytes, and fewest of 16."""
CASES = [
    pytest.param(spec, variant, arch, id=f"{variant.name}-{arch}")
    for spec in registry.all_specs()
    for variant in spec.variants
    if variant.name in NAMES.get(spec.name, ())
    for arch in variant.architectures
]


@pytest.mark.parametrize(("spec", "variant", "arch"), CASES)
def test_rows_are_read_and_written_in_16_bytes(
    compiled: Compile, spec: registry.KernelSpec, variant: registry.Variant, arch: str
) -> None:
    sass = compiled(spec, variant, arch).sass
    widths = Counter(re.findall(r"\b(?:LDG|STG)\.E\.?(\w*)", sass))
    narrow = {width: count for width, count in widths.items() if width != "128"}
    most, fewest = ACCESSES[spec.name]
    assert sum(narrow.values()) <= most, narrow
    assert widths["128"] >= fewest


def test_every_name_is_a_variant() -> None:
    assert len(CASES) == len(registry.ARCHITECTURES) * sum(map(len, NAMES.values()))
