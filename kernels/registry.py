"""One entry per kernel: what ahead-of-time compilation, tests, benchmarks and `doctor` go by.

A kernel's module exports ``SPECS``, a tuple of `KernelSpec`, and is named in `MODULES`. Nothing
here imports triton before `all_specs` or `compile_spec` is called.
"""

from __future__ import annotations

import importlib
import os
import re
import subprocess
import tempfile
from collections.abc import Mapping
from dataclasses import dataclass, field
from functools import cache, cached_property
from pathlib import Path
from typing import Any

ARCHITECTURES = ("sm_80", "sm_90", "sm_100")
"""What kernels are compiled for in the tests."""

PDL_ARCHITECTURE = 90
"""The first with programmatic dependent launch."""

MODULES = (
    "argmax",
    "draft_step",
    "verify",
    "rejection",
    "cutoff",
    "linear",
    "expand",
    "rms_norm",
    "rope_append",
    "attention",
    "loop_step",
)
"""Modules of this package that export ``SPECS``."""

FP_FUSION = True
"""``enable_fp_fusion`` of every launch and of every compilation: Triton's default changes."""


@dataclass(frozen=True)
class Variant:
    """One specialisation of a kernel, as a launch would make it.

    Attributes
    ----------
    name : str
        Unique within the kernel, such as ``"bf16-sampled"``.
    signature : mapping of str to str
        Triton type of each run-time argument: ``"*bf16"``, ``"i32"``, ``"i64"``, ``"fp32"``.
    constexprs : mapping of str to object
        Value of each other argument; a pointer that a launch passes as None belongs here.
    divisible : frozenset of str
        Run-time arguments that are multiples of 16 (pointers: aligned to 16 bytes).
    wide_loads : bool
        Whether every load of logits must be 16 bytes a thread. Logits are what a kernel loads
        with ``eviction_policy="evict_first"``, which names these loads in the disassembly.
    num_warps, num_stages : int
    maxnreg : int, optional
        Registers that a thread may use, where the compiler is not to choose.
    pdl : bool
        Whether it is launched as a programmatic dependent, which takes sm_90 or later.
    """

    name: str
    signature: Mapping[str, str]
    constexprs: Mapping[str, Any]
    divisible: frozenset[str] = frozenset()
    wide_loads: bool = False
    num_warps: int = 4
    num_stages: int = 1
    maxnreg: int | None = None
    pdl: bool = False

    @property
    def architectures(self) -> tuple[str, ...]:
        """What it is compiled for."""
        return tuple(
            arch for arch in ARCHITECTURES if not self.pdl or int(arch[3:]) >= PDL_ARCHITECTURE
        )


@dataclass(frozen=True)
class KernelSpec:
    """A kernel, the variants that are compiled ahead of time, and what each may use.

    Attributes
    ----------
    name : str
        Of the public function.
    kernel : triton.JITFunction
    variants : tuple of Variant
    max_registers : int
        Per thread.
    max_shared_bytes : int
        Per program.
    """

    name: str
    kernel: Any
    variants: tuple[Variant, ...]
    max_registers: int
    max_shared_bytes: int


@dataclass(frozen=True)
class CompiledResources:
    """What a compiled variant uses.

    Attributes
    ----------
    kernel, variant, arch : str
    registers : int
        Per thread.
    spills : int
        Bytes of local memory and stack per thread; 0 where nothing was spilled.
    shared_bytes : int
        Per program.
    cubin : bytes
    ptx : str
    """

    kernel: str
    variant: str
    arch: str
    registers: int
    spills: int
    shared_bytes: int
    cubin: bytes = field(repr=False)
    ptx: str = field(default="", repr=False)

    @cached_property
    def sass(self) -> str:
        """The disassembly, one instruction a line."""
        return disassemble(self.cubin)

    @cached_property
    def instructions(self) -> int:
        """Instructions of the disassembly, padding left out."""
        found = re.findall(r"^\s*/\*[0-9a-f]{4,}\*/\s+(.+?);", self.sass, re.MULTILINE)
        return sum(not line.startswith("NOP") for line in found)


def all_specs() -> tuple[KernelSpec, ...]:
    """Every kernel of the package, in the order of `MODULES`.

    Raises
    ------
    ImportError
        Without triton.
    """
    modules = (importlib.import_module(f"{__package__}.{name}") for name in MODULES)
    return tuple(spec for module in modules for spec in module.SPECS)


def compile_spec(spec: KernelSpec, arch: str) -> list[CompiledResources]:
    """Compile every variant of a kernel that the architecture runs; needs no GPU.

    Parameters
    ----------
    spec : KernelSpec
    arch : str
        ``"sm_80"``, ``"sm_90"``, ``"sm_100"``, ...

    Returns
    -------
    list of CompiledResources
        In the order of ``spec.variants``.

    Raises
    ------
    ValueError
        If ``arch`` is not of the form ``sm_<number>``.
    RuntimeError
        If this process runs kernels in Triton's interpreter, where nothing compiles.
    """
    if re.fullmatch(r"sm_\d+", arch) is None:
        raise ValueError(f"arch: expected 'sm_<number>' such as 'sm_90', got {arch!r}")
    return [
        compile_variant(spec, variant, arch)
        for variant in spec.variants
        if not variant.pdl or int(arch[3:]) >= PDL_ARCHITECTURE
    ]


def compile_variant(spec: KernelSpec, variant: Variant, arch: str) -> CompiledResources:
    """Compile one variant; see `compile_spec`."""
    if not hasattr(spec.kernel, "cache_key"):
        raise RuntimeError("kernels compile only in a process without TRITON_INTERPRET=1")

    import triton
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource

    names = spec.kernel.arg_names
    source = ASTSource(
        fn=spec.kernel,
        signature={n: variant.signature.get(n, "constexpr") for n in names},
        constexprs={n: variant.constexprs[n] for n in names if n not in variant.signature},
        attrs={(names.index(n),): [["tt.divisibility", 16]] for n in sorted(variant.divisible)},
    )
    options = {
        "num_warps": variant.num_warps,
        "num_stages": variant.num_stages,
        "maxnreg": variant.maxnreg,
        "launch_pdl": variant.pdl,
        "enable_fp_fusion": FP_FUSION,
    }
    target = GPUTarget("cuda", int(arch.removeprefix("sm_")), 32)
    compiled = triton.compile(source, target=target, options=options)
    cubin: bytes = compiled.asm["cubin"]
    usage = resource_usage(cubin)
    return CompiledResources(
        kernel=spec.name,
        variant=variant.name,
        arch=arch,
        registers=usage["REG"],
        spills=usage["STACK"] + usage["LOCAL"],
        shared_bytes=int(compiled.metadata.shared),
        cubin=cubin,
        ptx=compiled.asm["ptx"],
    )


def assemble(ptx: str, arch: str) -> bytes:
    """The cubin of a PTX text.

    Raises
    ------
    RuntimeError
        What the assembler says.
    """
    with tempfile.TemporaryDirectory() as folder:
        source, target = Path(folder, "kernel.ptx"), Path(folder, "kernel.cubin")
        source.write_text(ptx)
        command = [str(_tool("ptxas")), f"-arch={arch}", str(source), "-o", str(target)]
        done = subprocess.run(command, capture_output=True, text=True)
        if done.returncode:
            raise RuntimeError(f"ptxas failed: {done.stderr.strip()}")
        return target.read_bytes()


def disassemble(cubin: bytes) -> str:
    """One instruction a line."""
    return _cuobjdump("-sass", cubin)


def resource_usage(cubin: bytes) -> dict[str, int]:
    """What the kernel of a cubin uses, by the assembler's names: REG, STACK, LOCAL, SHARED, ..."""
    found = re.findall(r"(\w+):(\d+)", _cuobjdump("-res-usage", cubin))
    return {name: int(value) for name, value in found}


@cache
def toolchain() -> str:
    """What compiles: ``"triton <version>, ptxas <version>"``, of the assembler that it carries."""
    import triton

    done = subprocess.run([_tool("ptxas"), "--version"], capture_output=True, text=True, check=True)
    found = re.search(r"\bV(\d+(?:\.\d+)+)", done.stdout)
    return f"triton {triton.__version__}, ptxas {found[1] if found else 'unknown'}"


def _tool(name: str) -> Path:
    """A program that ships inside triton."""
    import triton

    return Path(triton.__file__).parent / "backends" / "nvidia" / "bin" / name


def _cuobjdump(option: str, cubin: bytes) -> str:
    """Output of ``cuobjdump``."""
    with tempfile.TemporaryDirectory() as folder:
        path = os.path.join(folder, "kernel.cubin")
        Path(path).write_bytes(cubin)
        done = subprocess.run([_tool("cuobjdump"), option, path], capture_output=True, text=True)
    if done.returncode:
        raise RuntimeError(f"cuobjdump {option} failed: {done.stderr.strip()}")
    return done.stdout
