"""The compiled row operations: right, independent of company and threads, and never required."""

from __future__ import annotations

import os
import stat
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from speckv.kernels import cpu, functional, native
from tests.tolerances import assert_close

SHAPES = [(1, 1), (3, 5), (37, 83), (64, 96), (50, 1030)]
ROWS = [*range(1, 18), 128]
DTYPES = [torch.float32, torch.bfloat16]


@pytest.fixture(scope="module")
def library() -> native.Library:
    """The library; skips visibly where it is switched off or there is no compiler."""
    found = native.library()
    if found is None:
        pytest.skip(f"data: no native library ({native.status()})")
    return found


@pytest.fixture
def fresh() -> Iterator[None]:
    """Nothing remembered about the library, before and after."""
    native._loaded.cache_clear()
    yield
    native._loaded.cache_clear()


@pytest.fixture(params=[1, 2])
def threads(request: Any) -> Iterator[int]:
    before = torch.get_num_threads()
    torch.set_num_threads(request.param)
    yield request.param
    torch.set_num_threads(before)


def noise(*shape: int, dtype: torch.dtype = torch.float32) -> Tensor:
    generator = torch.Generator().manual_seed(sum(shape))
    return torch.randn(*shape, generator=generator).to(dtype)


def run_python(program: str, **environment: str) -> str:
    done = subprocess.run(
        [sys.executable, "-c", program],
        capture_output=True,
        text=True,
        env={**os.environ, **environment},
        cwd=Path(__file__).resolve().parents[2],
        timeout=300,
    )
    assert done.returncode == 0, done.stderr
    return done.stdout


@pytest.mark.parametrize(("outputs", "columns"), SHAPES)
@pytest.mark.parametrize("rows", [1, 2, 3, 4, 5, 16, 17, 128])
def test_linear(library: native.Library, rows: int, outputs: int, columns: int) -> None:
    x, weight = noise(rows, columns), noise(outputs, columns) / columns**0.5
    bias, residual = noise(outputs), noise(rows, outputs)
    kept = residual.clone()
    exact = x.double() @ weight.double().T
    assert_close(library.linear(x, weight), exact.float(), torch.float32)
    every = library.linear(x, weight, bias, residual)
    assert_close(every, (exact + bias + residual).float(), torch.float32)
    assert torch.equal(residual, kept)


def test_linear_adds_in_one_order(library: native.Library) -> None:
    """First the bias, then the residual: 2**25 + 1 - 2**25 shows which."""
    big, one = torch.full((1, 1), 2.0**25), torch.ones(1, 1)
    zero = torch.zeros(1, 1)
    assert library.linear(big, one, torch.ones(1), -big).item() == 0.0
    assert library.linear(zero, one, torch.ones(1), -one).item() == 0.0
    assert library.linear(big, one, -big[0], one).item() == 1.0


def test_shapes_that_do_not_fit_are_refused(library: native.Library) -> None:
    x, weight = noise(2, 8), noise(3, 8)
    with pytest.raises(ValueError, match=r"x: expected \[rows, 8\], got \(2, 7\)"):
        library.linear(noise(2, 7), weight)
    with pytest.raises(ValueError, match=r"residual: expected \(2, 3\), got \(1, 3\)"):
        library.linear(x, weight, None, noise(1, 3))
    with pytest.raises(ValueError, match=r"x: expected \[rows, 7\], got \(2, 8\)"):
        library.rms_norm(x, noise(7), 1e-5)
    with pytest.raises(ValueError, match=r"cos, sin: expected \(2, 3, 4\)"):
        library.rope(noise(2, 3, 4), noise(2, 3, 4), noise(2, 2, 4))


def ordered(x: Tensor) -> Tensor:
    """Integers in the order of the bf16 values, so that neighbours differ by one."""
    bits = x.view(torch.int16).int()
    return torch.where(bits < 0, -(bits & 0x7FFF), bits)


def assert_same(actual: Tensor, expected: Tensor) -> None:
    """Within fp32's tolerance, or one unit in the last place of bf16."""
    assert_close(actual, expected, actual.dtype)
    if actual.dtype == torch.bfloat16:
        assert (ordered(actual) - ordered(expected)).abs().max() <= 1


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("width", [1, 15, 46, 576])
@pytest.mark.parametrize("rows", [1, 3, 128])
def test_rms_norm_and_swiglu(
    library: native.Library, rows: int, width: int, dtype: torch.dtype
) -> None:
    x, weight = noise(rows, width, dtype=dtype), noise(width, dtype=dtype)
    gate_up = 8 * noise(rows, 2 * width, dtype=dtype)
    assert_same(library.rms_norm(x, weight, 1e-5), functional.rms_norm(x, weight, 1e-5))
    assert_same(library.swiglu(gate_up), functional.swiglu(gate_up))


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("dim", [2, 12, 64])
@pytest.mark.parametrize("rows", [1, 3, 128])
def test_rope(library: native.Library, rows: int, dim: int, dtype: torch.dtype) -> None:
    qkv, cos, sin = (noise(rows, 5, dim + i, dtype=dtype)[..., i:].contiguous() for i in range(3))
    kept = qkv.clone()
    assert_same(library.rope(qkv, cos, sin), functional.rope(qkv, cos, sin))
    assert torch.equal(qkv, kept)


def test_extremes(library: native.Library) -> None:
    values = [0.0, 1e4, -1e4, float("inf"), float("nan"), 88.5, -88.5]
    gate_up = torch.tensor([values * 5 + [1.0] * 35])
    assert_close(library.swiglu(gate_up), functional.swiglu(gate_up), torch.float32)
    assert torch.equal(
        library.rms_norm(torch.zeros(1, 20), torch.ones(20), 1e-5), torch.zeros(1, 20)
    )
    nan = library.rms_norm(torch.full((1, 20), float("nan")), torch.ones(20), 1e-5)
    assert nan.isnan().all()


@pytest.mark.parametrize(("outputs", "columns"), [*SHAPES, (960, 576), (576, 1536)])
def test_linear_rows_have_fixed_bits(
    library: native.Library, outputs: int, columns: int, threads: int
) -> None:
    x, weight = cpu._cancelling(outputs, columns, torch.Generator().manual_seed(1))
    bias, residual = noise(outputs) * 2**-20, noise(16, outputs) * 2**-20
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    alone = [library.linear(x[i : i + 1], weight, bias, residual[i : i + 1]) for i in range(16)]
    torch.set_num_threads(before)
    expected = torch.cat(alone)
    for rows in ROWS:
        for shift in (0, 3, 8):
            pick = (torch.arange(rows) + shift) % 16
            actual = library.linear(x[pick], weight, bias, residual[pick])
            assert cpu.bits_equal(actual, expected[pick]), f"{rows} rows from {shift}"


@pytest.mark.parametrize("dtype", DTYPES)
def test_other_rows_have_fixed_bits(
    library: native.Library, dtype: torch.dtype, threads: int
) -> None:
    x, weight = noise(16, 1030, dtype=dtype), noise(1030, dtype=dtype)
    qkv = noise(16, 5, 206, dtype=dtype)
    cases = (
        (lambda pick: library.rms_norm(x[pick], weight, 1e-5)),
        (lambda pick: library.swiglu(x[pick])),
        (lambda pick: library.rope(qkv[pick], qkv[pick], qkv[pick])),
    )
    for run in cases:
        alone = torch.cat([run(torch.tensor([i])) for i in range(16)])
        for rows in ROWS:
            pick = (torch.arange(rows) + 5) % 16
            assert cpu.bits_equal(run(pick), alone[pick])


def test_every_row_count_is_proven(library: native.Library) -> None:
    linear = cpu.CpuLinear(noise(70, 50), noise(70), residual=True)
    assert linear.counts == cpu.ROW_COUNTS
    for dtype in DTYPES:
        assert cpu.row_function("swiglu", dtype) is not functional.swiglu
        assert cpu.proven_rms_norm_counts(50, dtype) == cpu.ROW_COUNTS
        assert cpu.proven_swiglu_counts(50, dtype) == cpu.ROW_COUNTS
        assert cpu.proven_rope_counts(5, 4, 8, dtype, False) == cpu.ROW_COUNTS
    assert cpu.row_function("swiglu", torch.float16) is functional.swiglu


def test_a_tied_weight_is_not_copied(library: native.Library) -> None:
    weight = noise(70, 50)
    linear = cpu.CpuLinear(weight)
    assert linear._run.keywords["weight"].data_ptr() == weight.data_ptr()


def test_one_openmp_runtime_serves_all(library: native.Library) -> None:
    program = (
        "import torch; from speckv.kernels import native\n"
        "x = torch.randn(64, 576)\n"
        "(x @ x.T), native.library().linear(x, torch.randn(2000, 576))\n"
        "names = {line.split('/')[-1].strip() for line in open('/proc/self/maps') if '/' in line}\n"
        "print(*[n for n in names if n.startswith(('libgomp', 'libomp', 'libiomp'))], sep='\\n')"
    )
    assert len(run_python(program).split()) == 1


def test_switched_off() -> None:
    program = (
        "import torch; from speckv.kernels import cpu, functional, native\n"
        "assert native.library() is None\n"
        "assert cpu.row_function('rope', torch.float32) is functional.rope\n"
        "w = torch.randn(24, 16); y = cpu.CpuLinear(w)(torch.ones(3, 16))\n"
        "assert torch.allclose(y, w.sum(1).expand(3, -1), atol=1e-5)\n"
        "print(native.status())"
    )
    assert run_python(program, SPECKV_NATIVE="0") == "not used: SPECKV_NATIVE=0\n"


def test_without_a_compiler(fresh: None, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv(native.SWITCH_VARIABLE, raising=False)
    monkeypatch.delenv("CC", raising=False)
    monkeypatch.setenv("PATH", "")
    assert native.library() is None
    assert (
        native.status() == "not used: no C compiler: none of cc, gcc, clang is there, CC is unset"
    )


@pytest.mark.parametrize(
    ("script", "reason"),
    [
        ("exit 1", "fails: it ended with 1"),
        ("[ $1 = --version ] || { echo 'rows.c:1: error: no' >&2; exit 1; }", "error: no"),
        ("while [ $# -gt 0 ]; do [ $1 = -o ] && echo rubbish > $2; shift; done; exit 0", "rows"),
    ],
)
def test_a_compiler_that_fails(
    fresh: None, monkeypatch: pytest.MonkeyPatch, tmp_path: Path, script: str, reason: str
) -> None:
    """Nothing that could pass for a library is left in the cache."""
    compiler = tmp_path / "bad-cc"
    compiler.write_text(f"#!/bin/sh\n{script}\n")
    compiler.chmod(compiler.stat().st_mode | stat.S_IXUSR)
    monkeypatch.delenv(native.SWITCH_VARIABLE, raising=False)
    monkeypatch.setenv("CC", str(compiler))
    monkeypatch.setenv("SPECKV_CACHE", str(tmp_path / "cache"))
    assert native.library() is None
    assert native.status().startswith("not used: ") and reason in native.status()
    assert not list(tmp_path.rglob("*.so"))


@pytest.mark.parametrize(
    ("right", "wrong"),
    [
        ("silu = gate / (1.0f", "silu = gate / (1.1f"),
        ("return -logf(u", "return -1.1f * logf(u"),
        ("rows[AT_LENGTH] + drafted] = id;", "rows[AT_LENGTH] + drafted] = id + 1;"),
    ],
)
def test_a_library_that_computes_something_else(
    fresh: None,
    monkeypatch: pytest.MonkeyPatch,
    library: native.Library,
    tmp_path: Path,
    right: str,
    wrong: str,
) -> None:
    changed = []
    for source in native._SOURCES:
        changed.append(tmp_path / source.name)
        changed[-1].write_text(source.read_text().replace(right, wrong))
    assert (
        sum(
            new.read_text() != old.read_text()
            for new, old in zip(changed, native._SOURCES, strict=True)
        )
        == 1
    )
    monkeypatch.setattr(native, "_SOURCES", tuple(changed))
    monkeypatch.setenv("SPECKV_CACHE", str(tmp_path))
    assert native.library() is None
    assert native.status().endswith("computes something else than torch")


def test_compiled_once_and_found_again(
    fresh: None, monkeypatch: pytest.MonkeyPatch, library: native.Library, tmp_path: Path
) -> None:
    monkeypatch.setenv("SPECKV_CACHE", str(tmp_path))
    native._loaded.cache_clear()
    first = native.library()
    assert first is not None and first.path.parent == tmp_path / "native"
    assert {p.suffix for p in first.path.parent.iterdir()} <= {".so", ".lock"}
    native._loaded.cache_clear()
    monkeypatch.setattr(native, "_compile", lambda *_: pytest.fail("compiled again"))
    second = native.library()
    assert second is not None and second.path == first.path


def test_processes_that_compile_at_once_agree(library: native.Library, tmp_path: Path) -> None:
    program = "from speckv.kernels import native; print(native.status())"
    running = [
        subprocess.Popen(
            [sys.executable, "-c", program],
            stdout=subprocess.PIPE,
            text=True,
            env={**os.environ, "SPECKV_CACHE": str(tmp_path)},
            cwd=Path(__file__).resolve().parents[2],
        )
        for _ in range(2)
    ]
    said = {process.communicate(timeout=300)[0].strip() for process in running}
    (path,) = (tmp_path / "native").glob("*.so")
    assert said == {str(path)}
