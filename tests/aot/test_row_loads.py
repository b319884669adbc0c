"""`rms_norm` and `rope_append` read and write rows of 16-bit floats 16 bytes a thread."""

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
}
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
    # A row's position and slot, and the halves of its cosines and sines, which the heads share.
    assert sum(narrow.values()) <= (0 if spec.name == "rms_norm" else 6), narrow
    assert widths["128"] >= 4


def test_every_name_is_a_variant() -> None:
    assert len(CASES) == len(registry.ARCHITECTURES) * sum(map(len, NAMES.values()))
