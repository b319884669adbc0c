"""`speckv doctor`: what it finds is shown, and what is wrong is said with a way out."""

from __future__ import annotations

import io
import json
import re
from pathlib import Path

import pytest
import torch
from rich.console import Console

from speckv import doctor
from speckv._version import __version__
from speckv.decoding import choice
from speckv.kernels import registry
from tests.children import python


def test_what_is_missing_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    found = {name: "1.0" for name in ("torch", "triton", "transformers", "gguf", "safetensors")}
    monkeypatch.setattr(doctor, "_declared_ranges", lambda: {"torch": _Range(), "gguf": _Range()})
    problems = list(doctor._package_problems({**found, "gguf": None, "bitsandbytes": None}))
    assert [(item.what, item.why, item.get) for item in problems] == [
        ("torch", "1.0 is outside >=2", "pip install 'torch>=2'"),
        ("bitsandbytes", "not installed", "pip install 'bitsandbytes'"),
        ("gguf", "not installed", "pip install 'gguf>=2'"),
    ]


class _Range:
    def contains(self, version: str, prereleases: bool) -> bool:
        return version.startswith("2")

    def __str__(self) -> str:
        return ">=2"


def test_kernels_are_held_to_their_limits(monkeypatch: pytest.MonkeyPatch) -> None:
    variants = tuple(registry.Variant(name, {}, {}) for name in ("ok", "spills", "fat", "broken"))
    spec = registry.KernelSpec("k", None, variants, max_registers=64, max_shared_bytes=1024)
    used = {"ok": (64, 0, 1024), "spills": (64, 8, 0), "fat": (65, 0, 0)}

    def compile_variant(spec: object, variant: object, arch: str) -> object:
        name = variant.name  # type: ignore[attr-defined]
        if name == "broken":
            raise RuntimeError("at 5:8:\n x = y\nNameError('y is not defined')")
        return registry.CompiledResources("k", name, arch, *used[name], cubin=b"")

    monkeypatch.setattr(registry, "all_specs", lambda: (spec,))
    monkeypatch.setattr(registry, "compile_variant", compile_variant)
    first, *checks = doctor.compile_kernels()
    assert first == {"total": 12}
    assert len(checks) == 12
    assert {check["variant"]: check["problem"] for check in checks} == {
        "ok": None,
        "spills": "spills 8 bytes",
        "fat": "more than 64 registers",
        "broken": "does not compile: NameError('y is not defined')",
    }
    assert checks[0]["registers"] == 64 and checks[-1]["registers"] is None


def test_failures_are_shown_with_how_to_mend_them() -> None:
    checks = [
        doctor.KernelCheck("k", "a", "sm_90", 40, 0, 64, None),
        doctor.KernelCheck("k", "b", "sm_90", 90, 0, 32, "more than 64 registers"),
        doctor.KernelCheck("k", "c", "sm_90", None, None, None, "does not compile: [x]"),
    ]
    found = doctor.Report(
        versions={"speckv": "0.1.0", "gguf": None},
        system={"os": "Linux", "cpu": "A [fast] one", "threads": 2, "features": {"avx2": True}},
        cpu_operations="not used: no C compiler [cc] found",
        devices=[{"type": "cpu", "name": "cpu", "loop": "eager loop (it is [old])"}],
        kernels=checks,
        model={"name": "m", "folder": "/c", "cached": True},
        missing=[doctor.Missing("gguf", "not installed", "pip install 'gguf>=0.10'")],
        cpu_works=False,
    )
    console = Console(file=io.StringIO(), width=100)
    doctor.show(console, found)
    shown = console.file.getvalue()  # type: ignore[attr-defined]
    assert re.search(r"k +sm_90 +1 of 3 +90 +0 +64", shown)
    assert "problem k b sm_90: more than 64 registers" in shown
    assert "problem k c sm_90: does not compile: [x]" in shown
    assert "A [fast] one, 2 threads" in shown
    assert re.search(r"device +cpu: eager loop \(it is \[old\]\)", shown)
    assert re.search(r"cpu operations +not used: no C compiler \[cc\] found", shown)
    assert "pip install 'gguf>=0.10'" in shown
    assert "the CPU path fails" in shown


def test_it_tells_why_cpu_operations_are_not_used(tmp_path: Path) -> None:
    program = "from speckv import doctor; print(doctor._cpu_operations())"
    off = python(program, SPECKV_NATIVE="0", SPECKV_CACHE=str(tmp_path))
    assert off.stdout == "not used: SPECKV_NATIVE=0\n", off.stderr
    without_torch = python(f"import sys; sys.modules['torch'] = None; {program}")
    assert without_torch.stdout.startswith("not used: import of torch"), without_torch.stderr


def test_a_gpu_that_fails_is_one_line(monkeypatch: pytest.MonkeyPatch) -> None:
    def broken(device: torch.device) -> choice.Choice:
        raise RuntimeError(f"CUDA error\non {device}")

    monkeypatch.setattr(choice, "best_loop", broken)
    assert doctor._loop("cuda:0") == "no loop (on cuda:0)"


@pytest.mark.aot
def test_this_machine(tmp_path: Path) -> None:
    """Also with ``TRITON_INTERPRET`` set, which would keep kernels from compiling here."""
    program = "from speckv import cli; raise SystemExit(cli.run(['doctor', '--json']))"
    done = python(program, TRITON_INTERPRET="1", SPECKV_CACHE=str(tmp_path))
    assert done.returncode == 0, done.stderr
    found = json.loads(done.stdout)
    assert found["versions"]["speckv"] == __version__
    assert found["cpu_works"] is True
    assert found["devices"][0]["type"] == "cpu"
    assert found["devices"][0]["loop"] == "eager loop (CUDA graphs need a GPU)"
    assert set(found["system"]["features"]) == {"avx2", "avx512", "avx512_bf16", "amx"}
    operations = found["cpu_operations"]
    assert operations.startswith("not used: ") or Path(operations).is_relative_to(tmp_path)
    assert {check["arch"] for check in found["kernels"]} == {"sm_80", "sm_90", "sm_100"}
    assert [check for check in found["kernels"] if check["problem"] is not None] == []
    assert found["model"]["cached"] is False
    missing = {item["what"]: item for item in found["missing"]}
    assert str(tmp_path) in missing["the default model, SmolLM2-135M-Instruct"]["why"]
