"""No word of global memory is both loaded and stored by a program without a barrier in between.

A scalar is loaded by every thread and stored by one, so a thread that lags behind would load what
another has stored already. The interpreter cannot show that; the control flow of the PTX does.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator
from dataclasses import dataclass

import pytest

from speckv.kernels import registry

Compile = Callable[[registry.KernelSpec, registry.Variant, str], registry.CompiledResources]

pytestmark = pytest.mark.aot

CASES = [
    pytest.param(spec, variant, id=f"{spec.name}-{variant.name}")
    for spec in registry.all_specs()
    for variant in spec.variants
]


@dataclass(frozen=True)
class Address:
    """``offset`` bytes from the value of the register ``root``, inside the buffer ``parameter``."""

    parameter: int
    root: str
    offset: int

    def may_equal(self, other: Address) -> bool:
        """Two offsets from one register differ; anything else in one buffer may coincide."""
        apart = self.root == other.root and self.offset != other.offset
        return self.parameter == other.parameter and not apart


@dataclass(frozen=True)
class Instruction:
    """A line of PTX: its predicate, opcode and operands."""

    predicate: str
    opcode: str
    operands: str


def instructions(ptx: str) -> tuple[list[Instruction], dict[str, int]]:
    """Instructions in order, and the index that each label stands before."""
    found: list[Instruction] = []
    labels: dict[str, int] = {}
    for raw in ptx.splitlines():
        line = raw.split("//")[0].strip()
        if label := re.fullmatch(r"(\$\w+):", line):
            labels[label[1]] = len(found)
        elif parts := re.fullmatch(r"(@!?%\w+)?\s*([a-z][\w.:]*)\s*(.*);", line):
            found.append(Instruction(parts[1] or "", parts[2], parts[3]))
    return found, labels


def addresses(code: list[Instruction]) -> dict[str, Address]:
    """What is known of the registers that hold addresses of the kernel's buffers."""
    known: dict[str, Address] = {}
    exchanged: set[int] = set()  # buffers whose addresses threads pass on by shared memory
    before = -1
    while len(known) > before:  # blocks need not stand in the order in which they run
        before = len(known)
        for line in code:
            names = re.findall(r"%rd\d+", line.operands)
            if "st.shared" in line.opcode:
                exchanged |= {known[name].parameter for name in names if name in known}
            elif "ld.shared" in line.opcode:
                if len(exchanged) == 1:
                    known |= {name: Address(*exchanged, name, 0) for name in names}
            elif names and line.operands.startswith(names[0]):
                known |= derived(line, *names, known=known)
    return known


def derived(
    line: Instruction, target: str, *names: str, known: dict[str, Address]
) -> dict[str, Address]:
    """What ``target`` holds, if the instruction computes it from an address."""
    if parameter := re.search(r"_param_(\d+)", line.operands):
        return {target: Address(int(parameter[1]), f"param{parameter[1]}", 0)}
    bases = [known[name] for name in names if name in known]
    if not bases:
        return {}
    base = bases[0]
    constant = re.search(r"%rd\d+,\s*(-?\d+)$", line.operands)
    if line.opcode == "add.s64" and constant:
        return {target: Address(base.parameter, base.root, base.offset + int(constant[1]))}
    return {target: Address(base.parameter, target, 0)}


def accesses(code: list[Instruction], kind: str) -> dict[int, Address]:
    """Address of each ``ld.global`` or ``st.global``, by the index of the instruction."""
    known = addresses(code)
    found = {}
    for i, line in enumerate(code):
        if line.opcode.startswith(f"{kind}.global"):
            place = re.search(r"\[\s*(%rd\d+)\s*(?:\+\s*(-?\d+))?\s*\]", line.operands)
            assert place is not None, line
            base = known[place[1]]
            found[i] = Address(base.parameter, base.root, base.offset + int(place[2] or 0))
    return found


def next_of(i: int, line: Instruction, labels: dict[str, int]) -> Iterator[int]:
    if line.opcode.startswith("bra"):
        yield labels[line.operands]
    if line.opcode not in ("ret", "exit", "bra.uni", "bra") or line.predicate:
        yield i + 1


def races(ptx: str) -> list[tuple[Instruction, Instruction]]:
    """(access, later access) of each load and store that no barrier separates."""
    code, labels = instructions(ptx)
    loads, stores = accesses(code, "ld"), accesses(code, "st")
    found = []
    for first, second in ((loads, stores), (stores, loads)):
        for start, address in first.items():
            if not any(address.may_equal(other) for other in second.values()):
                continue
            seen: set[int] = set()
            open_ends = [*next_of(start, code[start], labels)]
            while open_ends:
                i = open_ends.pop()
                if i in seen or i >= len(code) or code[i].opcode.startswith("bar"):
                    continue
                seen.add(i)
                if i in second and address.may_equal(second[i]):
                    found.append((code[start], code[i]))
                open_ends += next_of(i, code[i], labels)
    return found


@pytest.mark.parametrize(("spec", "variant"), CASES)
def test_a_barrier_stands_between_loads_and_stores_of_a_word(
    compiled: Compile, spec: registry.KernelSpec, variant: registry.Variant
) -> None:
    assert races(compiled(spec, variant, "sm_90").ptx) == []


EXAMPLE = """
	ld.param.b64 	%rd1, [_example_kernel_param_0];
	add.s64 	%rd2, %rd1, 8;
	ld.global.b32 {{ %r1 }}, [ %rd2 + 0 ];
	@%p1 bra 	$L__BB0_2;
	bar.sync 	0;
	bra.uni 	$L__BB0_3;
$L__BB0_2:
	{between}
$L__BB0_3:
	@%p2 st.global.b32 [ {target} + 0 ], {{ %r1 }};
	ret;
"""


@pytest.mark.parametrize(
    ("between", "target", "number"),
    [
        ("mov.b32 	%r2, 0;", "%rd2", 1),
        ("mov.b32 	%r2, 0;", "%rd1", 0),
        ("bar.sync 	0;", "%rd2", 0),
        ("mad.wide.u32 	%rd3, %r2, 4, %rd1;", "%rd3", 1),
    ],
    ids=["one path has no barrier", "another word", "both paths have one", "maybe the same word"],
)
def test_races_are_found_on_every_path(between: str, target: str, number: int) -> None:
    assert len(races(EXAMPLE.format(between=between, target=target))) == number
