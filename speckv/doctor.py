"""What ``speckv doctor`` looks at: versions, devices, CPU operations, kernels, the default model.

Kernels are compiled ahead of time in a child process: one that has ``TRITON_INTERPRET`` set could
not compile them, and a compiler crash must not take the report down with it.
"""

from __future__ import annotations

import importlib
import importlib.metadata
import json
import os
import platform
import subprocess
import sys
import tempfile
import threading
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ._cli_output import progress_bar
from ._version import __version__
from .machine import cpu_fields, cpu_name, package_version

if TYPE_CHECKING:
    from rich.console import Console

_PACKAGES = ("torch", "triton", "transformers", "bitsandbytes", "gguf", "safetensors")
_CPU_FLAGS = {"avx2": "avx2", "avx512": "avx512f", "avx512_bf16": "avx512_bf16", "amx": "amx_tile"}
_COMPILE_TIMEOUT_S = 600


@dataclass(frozen=True)
class KernelCheck:
    """One compilation; ``problem`` is ``None`` if it succeeded within its limits.

    Registers are per thread, spills in bytes per thread, shared memory in bytes per program.
    """

    kernel: str
    variant: str
    arch: str
    registers: int | None
    spills: int | None
    shared_bytes: int | None
    problem: str | None


@dataclass(frozen=True)
class Missing:
    """Something that is not there or does not fit, and how to get it."""

    what: str
    why: str
    get: str


@dataclass(frozen=True)
class Report:
    """Everything found; ``to_dict`` is the JSON form.

    ``cpu_operations`` says where the compiled CPU operations are, or why they are not used.
    """

    versions: dict[str, str | None]
    system: dict[str, Any]
    cpu_operations: str
    devices: list[dict[str, Any]]
    kernels: list[KernelCheck]
    model: dict[str, Any]
    missing: list[Missing]
    cpu_works: bool

    def to_dict(self) -> dict[str, Any]:
        """Plain dicts, lists, strings, numbers and booleans."""
        return asdict(self)


def examine(console: Console) -> Report:
    """Examine this machine; takes seconds, or a minute where kernels compile for the first time.

    Parameters
    ----------
    console : rich.console.Console
        Where progress is shown while kernels compile.
    """
    missing: list[Missing] = []
    versions: dict[str, str | None] = {
        "speckv": __version__,
        "python": platform.python_version(),
        **{name: package_version(name) for name in _PACKAGES},
    }
    missing += _package_problems(versions)
    cpu_problem = _cpu_problem()
    if cpu_problem is not None:
        missing.append(Missing("the CPU path", cpu_problem, "pip install --force-reinstall speckv"))
    kernels, kernel_problem = _check_kernels(console, versions)
    if kernel_problem is not None:
        missing.append(kernel_problem)
    model = _default_model()
    if not model["cached"]:
        missing.append(
            Missing(
                f"the default model, {model['name']}",
                f"not in {model['folder']}" if model["folder"] else "cannot be looked up",
                "speckv generate fetches and converts it on first use (98 MB)",
            )
        )
    devices = _devices(versions)
    if not any(device["type"] == "cuda" for device in devices):
        missing.append(
            Missing(
                "a CUDA device",
                "torch sees none; everything runs on the CPU",
                "an NVIDIA GPU, its driver and a CUDA build of torch",
            )
        )
    return Report(
        versions=versions,
        system={"os": f"{platform.system()} {platform.release()}", **_cpu()},
        cpu_operations=_cpu_operations(),
        devices=devices,
        kernels=kernels,
        model=model,
        missing=missing,
        cpu_works=cpu_problem is None,
    )


def show(console: Console, report: Report) -> None:
    """Print a report for people."""
    from rich.markup import escape
    from rich.table import Table

    def fact(name: str, value: str) -> None:
        console.print(f"[dim]{name:<14}[/dim] {value}", soft_wrap=True)

    for name, version in report.versions.items():
        fact(name, version or "[red]missing[/red]")
    features = [name for name, present in report.system["features"].items() if present]
    fact("system", escape(report.system["os"]))
    fact("cpu", escape(f"{report.system['cpu']}, {report.system['threads']} threads"))
    fact("cpu features", ", ".join(features) or "none of those speckv profits from")
    fact("cpu operations", escape(report.cpu_operations))
    for device in report.devices:
        fact("device", escape(f"{device['name']}: {device['loop']}"))
    cached = report.model["folder"] if report.model["cached"] else "not fetched yet"
    fact("default model", escape(f"{report.model['name']}: {cached}"))

    if report.kernels:
        table = Table(box=None, padding=(0, 2, 0, 0), header_style="dim")
        for heading in ("kernel", "compiled for", "variants", "registers", "spills", "shared"):
            table.add_column(heading)
        for row in _summaries(report.kernels):
            table.add_row(*row)
        console.print(table)
        for check in report.kernels:
            if check.problem is not None:
                where = f"{check.kernel} {check.variant} {check.arch}"
                console.print(f"[red]problem[/red] {escape(f'{where}: {check.problem}')}")

    for item in report.missing:
        console.print(f"[yellow]missing[/yellow] {escape(f'{item.what}: {item.why}')}")
        console.print(f"        {escape(item.get)}")
    console.print("the CPU path works" if report.cpu_works else "[red]the CPU path fails[/red]")


def _summaries(checks: list[KernelCheck]) -> Iterator[tuple[str, ...]]:
    """Per kernel and target: how many variants are in order, and the most that any one uses."""
    groups: dict[tuple[str, str], list[KernelCheck]] = {}
    for check in checks:
        groups.setdefault((check.kernel, check.arch), []).append(check)
    for (kernel, arch), group in groups.items():
        passed = sum(check.problem is None for check in group)
        most = (
            max((value for value in values if value is not None), default=None)
            for values in zip(
                *((check.registers, check.spills, check.shared_bytes) for check in group),
                strict=True,
            )
        )
        numbers = ("n/a" if number is None else str(number) for number in most)
        yield (kernel, arch, f"{passed} of {len(group)}", *numbers)


def compile_kernels() -> Iterator[dict[str, Any]]:
    """Compile every registered variant for every target, one plain dict each.

    The first one is ``{"total": n}``; the others have the fields of `KernelCheck`.

    Raises
    ------
    ImportError
        Without triton.
    """
    from .kernels import registry

    jobs = [
        (spec, variant, arch)
        for spec in registry.all_specs()
        for variant in spec.variants
        for arch in variant.architectures
    ]
    yield {"total": len(jobs)}
    for spec, variant, arch in jobs:
        check: dict[str, Any] = {"kernel": spec.name, "variant": variant.name, "arch": arch}
        check |= dict.fromkeys(("registers", "spills", "shared_bytes", "problem"))
        try:
            used = registry.compile_variant(spec, variant, arch)
        except Exception as error:  # a compiler raises anything, and the others still matter
            check["problem"] = f"does not compile: {_one_line(error)}"
        else:
            check |= {
                "registers": used.registers,
                "spills": used.spills,
                "shared_bytes": used.shared_bytes,
            }
            if used.spills:
                check["problem"] = f"spills {used.spills} bytes"
            elif used.registers > spec.max_registers:
                check["problem"] = f"more than {spec.max_registers} registers"
            elif used.shared_bytes > spec.max_shared_bytes:
                check["problem"] = f"more than {spec.max_shared_bytes} bytes shared"
        yield check


def _check_kernels(
    console: Console, versions: dict[str, str | None]
) -> tuple[list[KernelCheck], Missing | None]:
    if versions["triton"] is None:
        return [], None  # already reported as a missing package

    root = str(Path(__file__).resolve().parent.parent)
    environment = {k: v for k, v in os.environ.items() if k != "TRITON_INTERPRET"}
    program = (
        f"import sys; sys.path.insert(0, {root!r})\n"
        "import json\n"
        "from speckv.doctor import compile_kernels\n"
        "for line in compile_kernels(): print(json.dumps(line), flush=True)\n"
    )
    checks: list[KernelCheck] = []
    total = 0
    with (
        progress_bar(console, "compiling kernels", None) as advance,
        tempfile.TemporaryFile("w+", encoding="utf-8") as complaints,
        subprocess.Popen(
            [sys.executable, "-c", program],
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=complaints,
            env=environment,
            text=True,
        ) as child,
    ):
        assert child.stdout is not None
        watchdog = threading.Timer(_COMPILE_TIMEOUT_S, child.kill)
        watchdog.daemon = True
        watchdog.start()
        for line in child.stdout:
            record = json.loads(line)
            if "total" in record:
                total = record["total"]
            else:
                checks.append(KernelCheck(**record))
                advance(1)
        child.wait()
        watchdog.cancel()
        complaints.seek(0)
        message = complaints.read()
    if child.returncode == 0 and len(checks) == total:
        return checks, None
    last = message.strip().splitlines()[-1:] or [f"the compiler ended with {child.returncode}"]
    return checks, Missing(
        "ahead-of-time compilation", last[0], "GPU kernels need Triton on Linux; the CPU does not"
    )


def _package_problems(versions: dict[str, str | None]) -> Iterator[Missing]:
    """Packages that are absent, or outside the range speckv declares (where it is installed)."""
    ranges = _declared_ranges()
    for name in _PACKAGES:
        version, allowed = versions[name], ranges.get(name)
        wanted = f"pip install '{name}{allowed or ''}'"
        if version is None:
            yield Missing(name, "not installed", wanted)
        elif allowed is not None and not allowed.contains(version, prereleases=True):
            yield Missing(name, f"{version} is outside {allowed}", wanted)


def _declared_ranges() -> dict[str, Any]:
    try:
        from packaging.requirements import Requirement

        declared = importlib.metadata.requires("speckv") or []
    except (ImportError, importlib.metadata.PackageNotFoundError):
        return {}
    requirements = [Requirement(text) for text in declared]
    return {r.name: r.specifier for r in requirements if r.marker is None or r.marker.evaluate()}


def _cpu_problem() -> str | None:
    """Why generation on the CPU cannot work, ``None`` if its modules import and torch computes."""
    try:
        import torch

        for name in ("speckv.kernels.reference", "speckv.engine", "transformers"):
            importlib.import_module(name)
        if float((torch.ones(2, 2) @ torch.ones(2, 2)).sum()) != 8.0:
            return "torch computes a wrong product"
    except Exception as error:  # any failure to import is an answer here
        return _one_line(error)
    return None


def _cpu() -> dict[str, Any]:
    """Model name, thread count and vector extensions; Linux tells most."""
    flags = cpu_fields().get("flags", "").split()
    return {
        "cpu": cpu_name(),
        "threads": os.cpu_count() or 1,
        "features": {name: flag in flags for name, flag in _CPU_FLAGS.items()},
    }


def _cpu_operations() -> str:
    """Path of the compiled CPU operations, compiled now if need be, or why PyTorch's are used."""
    try:
        from .kernels import native
    except Exception as error:  # without torch, which the report names elsewhere
        return f"not used: {_one_line(error)}"
    return native.status()


def _devices(versions: dict[str, str | None]) -> list[dict[str, Any]]:
    devices: list[dict[str, Any]] = [{"type": "cpu", "name": "cpu", "loop": _loop("cpu")}]
    if versions["torch"] is None:
        return devices
    import torch

    for index in range(torch.cuda.device_count() if torch.cuda.is_available() else 0):
        properties = torch.cuda.get_device_properties(index)
        gib = properties.total_memory / 2**30
        devices.append(
            {
                "type": "cuda",
                "name": f"cuda:{index} {properties.name}, sm_{properties.major}{properties.minor}, "
                f"{gib:.0f} GiB",
                "loop": _loop(f"cuda:{index}"),
            }
        )
    return devices


def _loop(device: str) -> str:
    """Which loop decodes there, and why not a faster one; on a GPU it has run a small graph."""
    try:
        import torch

        from .decoding.choice import best_loop

        return str(best_loop(torch.device(device)))
    except Exception as error:  # without a package that the report names elsewhere, or a broken GPU
        return f"no loop ({_one_line(error)})"


def _default_model() -> dict[str, Any]:
    """Name, folder and presence of the default target, without fetching or loading it."""
    try:
        from .models import hub
    except Exception:  # without its dependencies, which the report names elsewhere
        return {"name": "the default target", "folder": None, "cached": False}
    folder = str(hub.SMOLLM2.folder)
    return {"name": hub.DEFAULT_TARGET, "folder": folder, "cached": hub.is_cached()}


def _one_line(error: Exception) -> str:
    """The last line of a message: where compilers and chained import errors say what is wrong."""
    lines = str(error).strip().splitlines() or [type(error).__name__]
    return lines[-1].strip()
