"""Operations compiled from ``native.c`` and ``native_step.c`` on first use.

A row's bits depend on that row alone, by construction: see the comments in the sources. The
library is kept in the cache folder under a name that says what it was made of, so it is compiled
once per source, compiler and processor. It must run on the OpenMP runtime that torch has loaded:
two pools of spinning threads would slow each other down many times over. Where there is no
compiler, where the library does not pass a comparison with torch, or with ``SPECKV_NATIVE=0`` in
the environment, :func:`library` returns None and :func:`status` says why.
"""

from __future__ import annotations

import ctypes
import functools
import hashlib
import os
import platform
import shlex
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from filelock import FileLock
from torch import Tensor

from speckv.kernels import functional, reference
from speckv.kernels import layout as at
from speckv.kernels.layout import StepState

__all__ = ["DTYPES", "SWITCH_VARIABLE", "Library", "library", "status"]

SWITCH_VARIABLE = "SPECKV_NATIVE"
"""Environment variable that, set to 0, turns these operations off."""

_SOURCES = tuple(Path(__file__).with_name(name) for name in ("native.c", "native_step.c"))
_COMPILE_FLAGS = (
    "-std=gnu99",
    "-O3",
    "-march=native",
    "-fopenmp",
    "-fPIC",
    # The one fused multiply-add is explicit: the compiler must not choose others, case by case.
    "-ffp-contract=off",
    "-fno-math-errno",
    "-fno-trapping-math",
)
_LAYOUT_FLAGS = tuple(
    f"-DAT_{name}={value}"
    for name, value in vars(at).items()
    if name.isupper() and isinstance(value, int)
)
# Linked without -fopenmp: the runtime's symbols stay undefined, and torch's copy resolves them.
_LINK_FLAGS = ("-shared",)
_COMPILERS = ("cc", "gcc", "clang")
_COMPILE_TIMEOUT_S = 120
_CPU_FIELDS = ("model name", "flags", "CPU implementer", "CPU part", "Features")
_OPENMP_NAMES = ("libgomp", "libiomp", "libomp")
_SUFFIX = {torch.float32: "f32", torch.bfloat16: "bf16"}

DTYPES = tuple(_SUFFIX)
"""Types of the row operations; the product is fp32 only."""


class _UnavailableError(Exception):
    """Why the library cannot be used, in one line."""


class Library:
    """The operations of a compiled library.

    Tensors are on the CPU. Those of row operations are contiguous and of one type, fp32 for
    :meth:`linear`, fp32 or bf16 for the others, and share ``torch.get_num_threads()`` threads.
    Logits may be of any floating type and stride; a step takes one thread. Nothing is validated
    here: callers have seen to types and shapes.

    Parameters
    ----------
    path : Path
        The shared library.

    Raises
    ------
    OSError
        If it cannot be loaded, or needs an OpenMP runtime other than the one of the process.
    AttributeError
        If it lacks a function.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        # RTLD_NOW: an OpenMP runtime that does not fit must show here, not in a forward.
        loaded = ctypes.CDLL(str(path), mode=os.RTLD_NOW | os.RTLD_LOCAL)
        pointer, size, real, count = ctypes.c_void_p, ctypes.c_long, ctypes.c_float, ctypes.c_int

        def bind(name: str, *types: Any, result: Any = None) -> Callable[..., Any]:
            function = loaded[f"speckv_{name}"]
            function.argtypes, function.restype = types, result
            return function

        def by_dtype(name: str, *types: Any) -> dict[torch.dtype, Callable[..., None]]:
            return {dtype: bind(f"{name}_{suffix}", *types) for dtype, suffix in _SUFFIX.items()}

        self._linear = bind("linear_f32", *[pointer] * 5, size, size, size, count)
        self._rms_norm = by_dtype("rms_norm", *[pointer] * 3, size, size, real, count)
        self._swiglu = by_dtype("swiglu", pointer, pointer, size, size, count)
        self._rope = by_dtype("rope", *[pointer] * 4, size, size, count)
        state = [*[pointer] * 4, size]
        self._draft_step = by_dtype(
            "draft_step", pointer, size, size, size, *state, *[pointer] * 5, count
        )
        self._verify = by_dtype(
            "verify", pointer, *[size] * 4, *state, pointer, size, *[pointer] * 3, size
        )
        self._best_gamma = bind("best_gamma", *[pointer] * 3, ctypes.c_double, result=count)

    def linear(
        self, x: Tensor, weight: Tensor, bias: Tensor | None = None, residual: Tensor | None = None
    ) -> Tensor:
        """``x [rows, K] @ weight [N, K].T + bias [N] + residual [rows, N]``, all fp32.

        Raises
        ------
        ValueError
            If the shapes do not fit.
        """
        (rows, columns), (outputs, expected) = x.shape, weight.shape
        if columns != expected:
            raise ValueError(f"x: expected [rows, {expected}], got {tuple(x.shape)}")
        if residual is not None and residual.shape != (rows, outputs):
            raise ValueError(f"residual: expected {(rows, outputs)}, got {tuple(residual.shape)}")
        out = x.new_empty((rows, outputs))
        self._linear(
            x.data_ptr(),
            weight.data_ptr(),
            None if bias is None else bias.data_ptr(),
            None if residual is None else residual.data_ptr(),
            out.data_ptr(),
            rows,
            outputs,
            columns,
            torch.get_num_threads(),
        )
        return out

    def rms_norm(self, x: Tensor, weight: Tensor, eps: float) -> Tensor:
        """:func:`functional.rms_norm` of ``x [rows, K]``.

        Raises
        ------
        ValueError
            If ``x`` does not have the columns of ``weight [K]``.
        """
        rows, columns = x.shape
        if weight.shape != (columns,):
            raise ValueError(f"x: expected [rows, {weight.shape[0]}], got {tuple(x.shape)}")
        out = torch.empty_like(x)
        self._rms_norm[x.dtype](
            x.data_ptr(),
            weight.data_ptr(),
            out.data_ptr(),
            rows,
            columns,
            eps,
            torch.get_num_threads(),
        )
        return out

    def swiglu(self, gate_up: Tensor) -> Tensor:
        """:func:`functional.swiglu` of ``gate_up [rows, 2 * K]``."""
        rows, columns = gate_up.shape[0], gate_up.shape[1] // 2
        out = gate_up.new_empty((rows, columns))
        self._swiglu[gate_up.dtype](
            gate_up.data_ptr(), out.data_ptr(), rows, columns, torch.get_num_threads()
        )
        return out

    def rope(self, qkv: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
        """:func:`functional.rope` of tensors ``[rows, heads, head_dim]``.

        Raises
        ------
        ValueError
            If their shapes differ.
        """
        if not qkv.shape == cos.shape == sin.shape:
            raise ValueError(
                f"cos, sin: expected {tuple(qkv.shape)}, got {tuple(cos.shape)} and "
                f"{tuple(sin.shape)}"
            )
        rows, heads, dim = qkv.shape
        out = torch.empty_like(qkv)
        self._rope[qkv.dtype](
            qkv.data_ptr(),
            cos.data_ptr(),
            sin.data_ptr(),
            out.data_ptr(),
            rows * heads,
            dim,
            torch.get_num_threads(),
        )
        return out

    def draft_step(
        self,
        logits: Tensor,
        state: StepState,
        policy: Tensor,
        *,
        inv_temperature: Tensor | None = None,
        seeds: Tensor | None = None,
        id_map: Tensor | None = None,
        cutoffs: Tensor | None = None,
        coupling: str = "gumbel",
    ) -> None:
        """:func:`reference.draft_step`."""
        x = _readable(logits)
        self._draft_step[x.dtype](
            x.data_ptr(),
            x.stride(0),
            x.shape[1],
            x.shape[0],
            policy.data_ptr(),
            state.rows.data_ptr(),
            state.running.data_ptr(),
            state.sequence.data_ptr(),
            state.sequence.stride(0),
            state.signals.data_ptr(),
            _address_of(id_map),
            _address_of(inv_temperature),
            _address_of(seeds),
            _address_of(cutoffs),
            coupling != "gumbel",
        )

    def verify(
        self,
        logits: Tensor,
        state: StepState,
        policy: Tensor,
        *,
        eos: Tensor,
        inv_temperature: Tensor | None = None,
        seeds: Tensor | None = None,
        cutoffs: Tensor | None = None,
    ) -> None:
        """:func:`reference.verify`."""
        x = _readable(logits)
        self._verify[x.dtype](
            x.data_ptr(),
            x.stride(0),
            x.stride(1),
            x.shape[2],
            x.shape[0],
            policy.data_ptr(),
            state.rows.data_ptr(),
            state.running.data_ptr(),
            state.sequence.data_ptr(),
            state.sequence.stride(0),
            eos.data_ptr(),
            eos.shape[1],
            _address_of(inv_temperature),
            _address_of(seeds),
            _address_of(cutoffs),
            x.shape[1],
        )

    def best_gamma(self, policy: Tensor, rows: list[int], running: list[float]) -> int:
        """:func:`reference.best_gamma`."""
        policy = policy.cpu()
        words, features = (ctypes.c_int32 * len(rows))(*rows), (ctypes.c_float * len(running))
        return int(
            self._best_gamma(
                policy.data_ptr(), words, features(*running), float(running[at.ACCEPTANCE])
            )
        )


def _readable(logits: Tensor) -> Tensor:
    """Logits of a type that is compiled for, of unit stride in the last axis."""
    logits = logits if logits.dtype in _SUFFIX else logits.float()
    return logits if logits.stride(-1) == 1 else logits.contiguous()


def _address_of(tensor: Tensor | None) -> int | None:
    return None if tensor is None else tensor.data_ptr()


def library() -> Library | None:
    """The operations, compiled first if need be, or None where they cannot be used."""
    found = _loaded()
    return found if isinstance(found, Library) else None


def status() -> str:
    """One line: where the library is, or why there is none."""
    found = _loaded()
    return str(found.path) if isinstance(found, Library) else f"not used: {found}"


@functools.cache
def _loaded() -> Library | str:
    """The library, or why there is none."""
    try:
        if os.environ.get(SWITCH_VARIABLE) == "0":
            raise _UnavailableError(f"{SWITCH_VARIABLE}=0")
        if sys.platform != "linux":
            raise _UnavailableError(f"only on Linux, not on {sys.platform}")
        _require_torch_openmp()
        found = Library(_compiled())
        _check(found)
    except (_UnavailableError, OSError, AttributeError, subprocess.SubprocessError) as error:
        return (str(error).strip().splitlines() or [type(error).__name__])[-1]
    return found


def _require_torch_openmp() -> None:
    """Make the OpenMP runtime that torch uses the one that symbols resolve to."""
    lines = Path("/proc/self/maps").read_text().splitlines()
    mapped = sorted(
        {line.split(maxsplit=5)[5] for line in lines if line.endswith(".so") or ".so." in line}
    )
    wanted = {
        _address(path, "GOMP_parallel")
        for path in mapped
        if Path(path).name.startswith("libtorch_cpu.")
    } - {None}
    if len(wanted) != 1:
        raise _UnavailableError("torch uses no OpenMP runtime with GOMP_parallel")
    if _address(None, "GOMP_parallel") in wanted:
        return
    for path in mapped:
        if Path(path).name.startswith(_OPENMP_NAMES) and _address(path, "GOMP_parallel") in wanted:
            ctypes.CDLL(path, mode=os.RTLD_NOLOAD | os.RTLD_NOW | os.RTLD_GLOBAL)
    if _address(None, "GOMP_parallel") not in wanted:
        raise _UnavailableError("symbols resolve to another OpenMP runtime than torch's")


def _address(path: str | None, symbol: str) -> int | None:
    """Where a symbol of a loaded library (None: of the whole process) is."""
    try:
        function = ctypes.CDLL(path, mode=os.RTLD_NOLOAD | os.RTLD_LAZY)[symbol]
    except (OSError, AttributeError):
        return None
    return ctypes.cast(function, ctypes.c_void_p).value


def _compiled() -> Path:
    """The shared library in the cache, compiled first if it is not there.

    The folder is that of the models: ``SPECKV_CACHE``, or ``~/.cache/speckv``.
    """
    compiler = _compiler()
    version = _output([*compiler, "--version"])
    flags = (*_COMPILE_FLAGS, *_LAYOUT_FLAGS, *_LINK_FLAGS)
    sources = (source.read_text() for source in _SOURCES)
    facts = (*sources, *flags, *compiler, version, _processor())
    digest = hashlib.sha256("\0".join(facts).encode()).hexdigest()[:16]
    chosen = os.environ.get("SPECKV_CACHE")
    root = Path(chosen).expanduser() if chosen else Path.home() / ".cache" / "speckv"
    path = root / "native" / f"rows-{digest}.so"
    if not path.exists():
        path.parent.mkdir(parents=True, exist_ok=True)
        with FileLock(path.with_suffix(".lock")):
            if not path.exists():
                _compile(compiler, path)
    return path


def _compile(compiler: list[str], path: Path) -> None:
    with tempfile.TemporaryDirectory(prefix=f".{path.stem}-", dir=path.parent) as folder:
        linked, flags = Path(folder) / "rows.so", (*_COMPILE_FLAGS, *_LAYOUT_FLAGS)
        compiled = [str(Path(folder) / f"{source.stem}.o") for source in _SOURCES]
        for source, object_file in zip(_SOURCES, compiled, strict=True):
            _output([*compiler, *flags, "-c", str(source), "-o", object_file])
        _output([*compiler, *_LINK_FLAGS, *compiled, "-o", str(linked), "-lm"])
        ctypes.CDLL(str(linked), mode=os.RTLD_NOW)  # what does not load must not stay in the cache
        linked.replace(path)


def _compiler() -> list[str]:
    """The command of the C compiler: ``CC``, or the first of the usual names that is there."""
    given = shlex.split(os.environ.get("CC", ""))
    if given:
        return given
    for name in _COMPILERS:
        found = shutil.which(name)
        if found is not None:
            return [found]
    raise _UnavailableError(f"no C compiler: none of {', '.join(_COMPILERS)} is there, CC is unset")


def _output(command: list[str]) -> str:
    done = subprocess.run(
        command,
        stdin=subprocess.DEVNULL,
        capture_output=True,
        text=True,
        errors="replace",
        timeout=_COMPILE_TIMEOUT_S,
    )
    if done.returncode:
        complaint = next(
            (line for line in done.stderr.splitlines() if "error" in line),
            f"it ended with {done.returncode}",
        )
        raise _UnavailableError(f"{command[0]} fails: {complaint.strip()}")
    return done.stdout


def _processor() -> str:
    """What ``-march=native`` depends on."""
    first = Path("/proc/cpuinfo").read_text().split("\n\n")[0].splitlines()
    facts = [line for line in first if line.partition(":")[0].strip() in _CPU_FIELDS]
    return "\n".join([platform.machine(), *facts])


def _stepped(operations: Any, logits: Tensor, policy: Tensor) -> StepState:
    """What is left of a step that drafts a token, of a trimmed vocabulary, and verifies it."""
    batch, _, vocabulary = logits.shape
    state = StepState.allocate(batch, 32, logits.device)
    for b in range(batch):
        state.reset(b, [1, 2, 3], limit=20, request=b)
    state.rows[:, at.STOP] = 0
    sampling = {"inv_temperature": torch.ones(batch), "seeds": torch.arange(batch)}
    ids = torch.arange(vocabulary, dtype=torch.int32).flip(0).contiguous()
    operations.draft_step(logits[:, 0], state, policy, id_map=ids, **sampling)
    eos = torch.full((batch, 1), -1, dtype=torch.int32)
    operations.verify(logits, state, policy, eos=eos, **sampling)
    return state


@torch.inference_mode()
def _check(found: Library) -> None:
    """Compare every operation with torch, on shapes that reach every branch of the tiles."""
    generator = torch.Generator().manual_seed(0)

    def noise(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=generator)

    x, weight, bias, residual = noise(11, 83), noise(37, 83), noise(37), noise(11, 37)
    cases = [(found.linear(x, weight, bias, residual), residual + (x @ weight.T + bias), 1e-4)]
    for dtype, bound in ((torch.float32, 1e-5), (torch.bfloat16, 2e-2)):
        rows, scale = noise(3, 46).to(dtype), noise(46).to(dtype)
        qkv, cos, sin = (noise(3, 5, 12).to(dtype) for _ in range(3))
        cases += [
            (found.rms_norm(rows, scale, 1e-5), functional.rms_norm(rows, scale, 1e-5), bound),
            (found.swiglu(rows), functional.swiglu(rows), bound),
            (found.rope(qkv, cos, sin), functional.rope(qkv, cos, sin), bound),
        ]
    for dtype in DTYPES:
        logits, policy = (3.0 * noise(24, 2, 77)).to(dtype), noise(at.POLICY_WORDS)
        policy[: at.HEADER_WORDS] = 0.0
        policy[at.MODE], policy[at.GAMMA_CAP] = at.MODE_MLP, at.GAMMA_MAX
        policy[at.CANDIDATES], policy[at.MATCHES] = 0xFFFF, 1.0
        ours, expected = (_stepped(of, logits, policy) for of in (found, reference))
        for name in ("rows", "running", "sequence"):
            cases.append((getattr(ours, name), getattr(expected, name), 1e-5))
        cases.append((ours.signals[:, :1], expected.signals[:, :1], 1e-5))
    for actual, wanted, bound in cases:
        if not torch.allclose(actual.float(), wanted.float(), rtol=bound, atol=bound):
            raise _UnavailableError(f"{found.path} computes something else than torch")
