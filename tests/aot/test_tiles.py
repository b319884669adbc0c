"""`linear` and `attention` read weights and cache 16 bytes a thread, and multiply tiles of 16 rows.

Weights of a regular shape and the cache come by asynchronous copies to shared memory (``LDGSTS``),
as does ``x``.
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Callable

import pytest

from speckv.kernels import registry
from speckv.kernels.linear_config import Config, _shared_bytes

Compile = Callable[[registry.KernelSpec, registry.Variant, str], registry.CompiledResources]

pytestmark = pytest.mark.aot

(SPEC,) = (spec for spec in registry.all_specs() if spec.name == "linear")
(ATTENTION,) = (spec for spec in registry.all_specs() if spec.name == "attention")
CASES = [
    pytest.param(variant, arch, id=f"{variant.name}-{arch}")
    for variant in SPEC.variants
    for arch in variant.architectures
]


def is_odd(variant: registry.Variant) -> bool:
    return "depth" not in variant.divisible


def is_usual(variant: registry.Variant) -> bool:
    """Codes of scales, and tables of their own, have buffers of their own."""
    constants = variant.constexprs
    return not is_odd(variant) and constants["STANDARD"] and not constants["NESTED"]


def copies(sass: str) -> Counter[str]:
    """Widths in bits of the asynchronous copies from global memory, with their number."""
    return Counter(
        next((part for part in modifiers.split(".") if part.isdigit()), "32")
        for modifiers in re.findall(r"\bLDGSTS\.(\S+)", sass)
    )


def products(sass: str) -> Counter[str]:
    """Matrix instructions, with their number."""
    return Counter(re.findall(r"\b([A-Z]*MMA[.\w]*)\b", sass))


@pytest.mark.parametrize(("variant", "arch"), CASES)
def test_weights_are_read_16_bytes_a_thread(
    compiled: Compile, variant: registry.Variant, arch: str
) -> None:
    used = compiled(SPEC, variant, arch)
    if is_odd(variant):
        assert not copies(used.sass)
        return
    widths = set(copies(used.sass))
    if variant.constexprs["KIND"] == "nf4":
        widths -= {"32", "64"}  # scales, and the weights of a norm
    assert widths == {"128"}
    # Nothing else that is read in the loop is wide enough to be weights or x.
    narrow = re.findall(r"\bLDG\.E\.(?:64|128)\b(?!\.STRONG)", used.sass)
    assert len(narrow) <= 1, narrow  # the residual


@pytest.mark.parametrize(("variant", "arch"), CASES)
def test_every_row_goes_through_the_same_products(
    compiled: Compile, variant: registry.Variant, arch: str
) -> None:
    """Of 16 rows and 16 elements of K; those of another shape would sum in another order."""
    found = products(compiled(SPEC, variant, arch).sass)
    kind = ".BF16" if variant.name.startswith("bf16") else ""
    assert set(found) == {f"HMMA.16816.F32{kind}"}


@pytest.mark.parametrize(
    ("variant", "arch"),
    [
        pytest.param(variant, arch, id=f"{variant.name}-{arch}")
        for variant in ATTENTION.variants
        for arch in variant.architectures
    ],
)
def test_the_cache_is_read_16_bytes_a_thread(
    compiled: Compile, variant: registry.Variant, arch: str
) -> None:
    sass = compiled(ATTENTION, variant, arch).sass
    assert set(copies(sass)) == {"128"}
    kind = ".BF16" if variant.name.startswith("bf16") else ""
    assert set(products(sass)) == {f"HMMA.16816.F32{kind}"}


def test_nf4_codes_are_looked_up_in_registers(compiled: Compile) -> None:
    """16 byte permutations for 8 weights, so 256 for the 128 weights of a thread's block."""
    (variant,) = (v for v in SPEC.variants if v.name == "bf16-nf4-qkv")
    sass = compiled(SPEC, variant, "sm_90").sass
    # A thread copies half of the four scales that a row has in a block, with three blocks on their
    # way before the loop and one in it.
    assert copies(sass) == {"128": 32, "64": 4}
    permutations = len(re.findall(r"\bPRMT\b", sass))
    assert 256 <= permutations <= 384


@pytest.mark.parametrize(
    ("variant", "arch"),
    [case for case in CASES if is_usual(case.values[0])],
)
def test_shared_memory_is_what_the_selector_counts_with(
    compiled: Compile, variant: registry.Variant, arch: str
) -> None:
    c = variant.constexprs
    config = Config(c["BLOCK_N"], c["BLOCK_K"], c["SPLITS"], num_stages=variant.num_stages)
    counted = _shared_bytes(config, c["KIND"], c["SWIGLU"])
    most = counted * (1.04 if c["NORM"] else 1)
    assert counted <= compiled(SPEC, variant, arch).shared_bytes <= most


def test_widths_are_read_from_the_disassembly() -> None:
    sass = "LDGSTS.E.BYPASS.128 [R1], [R2] ;\nLDGSTS.E [R1], [R2] ;\nLDG.E.128 R4, [R2] ;"
    assert copies(sass) == {"128": 1, "32": 1}
    assert products("HMMA.16816.F32 R1, R2 ;\nHGMMA.64x16x16.F32 R3 ;") == {
        "HMMA.16816.F32": 1,
        "HGMMA.64x16x16.F32": 1,
    }
