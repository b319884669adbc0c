"""What compiled kernels use, against the committed baseline of this compiler."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from bench import resources
from speckv.kernels import registry
from tests.aot.test_compile import CASES, Compile

pytestmark = pytest.mark.aot


@pytest.fixture(scope="module")
def baseline() -> resources.Table:
    return resources.read_baseline()


@pytest.mark.parametrize(("spec", "variant", "arch"), CASES)
def test_no_regression(
    compiled: Compile,
    baseline: resources.Table,
    spec: registry.KernelSpec,
    variant: registry.Variant,
    arch: str,
) -> None:
    found = compiled(spec, variant, arch)
    assert not resources.regressions(resources.label(found), resources.used(found), baseline)


def test_the_baseline_has_nothing_else(baseline: resources.Table) -> None:
    names = {
        f"{spec.name}/{variant.name}/{arch}"
        for spec in registry.all_specs()
        for variant in spec.variants
        for arch in variant.architectures
    }
    assert set(baseline) == names


def test_more_than_the_tolerance_is_a_regression() -> None:
    before = {"k/v/sm_90": {"instructions": 1000, "registers": 100, "shared_bytes": 0}}
    same = {"instructions": 1050, "registers": 105, "shared_bytes": 0}
    assert resources.regressions("k/v/sm_90", same, before) == []
    (line,) = resources.regressions("k/v/sm_90", {**same, "instructions": 1051}, before)
    assert line == "k/v/sm_90: 1051 instructions, +5.1% over the baseline's 1000"
    assert resources.regressions("k/w/sm_90", same, before) == ["k/w/sm_90: not in the baseline"]
    (line,) = resources.regressions("k/v/sm_90", {**same, "shared_bytes": 16}, before)
    assert line == "k/v/sm_90: 16 shared_bytes over the baseline's 0"


def test_another_compiler_needs_a_baseline_of_its_own(tmp_path: Path) -> None:
    path = tmp_path / "resources.json"
    with pytest.raises(ValueError, match="expected a baseline for triton .*, found none; look"):
        resources.read_baseline(path)
    path.write_text(json.dumps({"triton 1.0, ptxas 2": {}}))
    with pytest.raises(ValueError, match="found triton 1.0, ptxas 2; look at what changed and run"):
        resources.read_baseline(path)


def test_instructions_are_counted_without_padding(compiled: Compile) -> None:
    spec = registry.all_specs()[0]
    found = compiled(spec, spec.variants[0], "sm_90")
    lines = [line for line in found.sass.splitlines() if line.partition("/* 0x")[0].count(";")]
    assert found.instructions == sum("NOP" not in line for line in lines) > 100
