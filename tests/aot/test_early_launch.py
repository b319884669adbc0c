"""Kernels that start early touch nothing that others write before they have waited for them."""

from __future__ import annotations

import re
from collections.abc import Callable

import pytest

from speckv.kernels import registry

Compile = Callable[[registry.KernelSpec, registry.Variant, str], registry.CompiledResources]

pytestmark = pytest.mark.aot

CASES = [
    pytest.param(spec, variant, arch, id=f"{spec.name}-{variant.name}-{arch}")
    for spec in registry.all_specs()
    for variant in spec.variants
    if variant.pdl
    for arch in variant.architectures
]
WAIT, LAUNCH = "ACQBULK", "PREEXIT"
PREFETCH = "CCTL.E.PF2"
MEMORY = re.compile(r"\b(?:LD|LDG|LDGSTS|ST|STG|RED|REDG|ATOM|ATOMG|CCTL|MEMBAR|UBLKCP|UTM\w+)\b")


def instructions(sass: str) -> list[str]:
    return re.findall(r"/\*[0-9a-f]{4,}\*/\s+(.+?)\s*;", sass)


def before(code: list[str]) -> list[str]:
    """Jumps and accesses to global memory that stand before the wait."""
    end = next(i for i, line in enumerate(code) if WAIT in line)
    return [line for line in code[:end] if MEMORY.search(line) or re.search(r"\bBRA\b", line)]


@pytest.mark.parametrize(("spec", "variant", "arch"), CASES)
def test_nothing_but_prefetches_stands_before_the_wait(
    compiled: Compile, spec: registry.KernelSpec, variant: registry.Variant, arch: str
) -> None:
    code = instructions(compiled(spec, variant, arch).sass)
    assert [sum(name in line for line in code) for name in (WAIT, LAUNCH)] == [1, 1]
    early = before(code)
    assert all(PREFETCH in line for line in early), early
    assert bool(early) == (spec.name == "linear")


@pytest.mark.parametrize(("spec", "variant", "arch"), CASES)
def test_the_others_neither_wait_nor_launch(
    compiled: Compile, spec: registry.KernelSpec, variant: registry.Variant, arch: str
) -> None:
    name = variant.name.removesuffix("-pdl")
    (plain,) = (each for each in spec.variants if each.name == name)
    sass = compiled(spec, plain, arch).sass
    assert WAIT not in sass and LAUNCH not in sass and PREFETCH not in sass


def test_every_kernel_of_a_layer_can_start_early() -> None:
    assert {case.values[0].name for case in CASES} == {"linear", "rope_append", "attention"}


def test_what_stands_too_early_is_found() -> None:
    code = ["S2R R0, SR_TID.X", "@P0 BRA 0x80", "LDG.E.128 R4, [R2]", "ULDC UR4, c[0x0][0x210]"]
    assert before([*code, "ACQBULK", "STG.E [R2], R4"]) == code[1:3]
