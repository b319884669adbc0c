"""The promises of the house: how it is packaged, imported, tested and laid out."""

from __future__ import annotations

import ast
import json
import os
import re
import shutil
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest

from speckv._version import __version__
from speckv.errors import ModelError, NumericsError, PolicyError, SpeckvError
from tests import report
from tests.children import ROOT, python

SOURCES = sorted([*(ROOT / "speckv").rglob("*.py"), *(ROOT / "kernels").rglob("*.py")])
MODULES = sorted([*SOURCES, *(ROOT / "bench").rglob("*.py"), *(ROOT / "tests").rglob("*.py")])
KERNELS = [path for path in SOURCES if (ROOT / "kernels") in path.parents]


def _id(path: Path) -> str:
    return str(path.relative_to(ROOT))


def test_kernels_is_a_committed_symlink() -> None:
    link = ROOT / "speckv" / "kernels"
    assert link.is_symlink() and os.readlink(link) == "../kernels"


def test_kernels_are_refused_under_another_name() -> None:
    for program in ("from kernels import reference", "import kernels.reference"):
        done = python(program)
        assert done.returncode == 1
        assert "ImportError" in done.stderr or "ModuleNotFoundError" in done.stderr


def test_transformers_works_from_the_repository_root() -> None:
    """There ``kernels/`` is importable, and must not pass for the distribution of that name."""
    program = (
        "from transformers.utils import is_kernels_available; print(is_kernels_available());"
        "import transformers.models.llama.modeling_llama"
    )
    done = python(program)
    assert done.returncode == 0, done.stderr
    assert done.stdout == "False\n"


def test_imports_without_triton() -> None:
    program = (
        "import sys; sys.modules['triton'] = None\n"
        "import speckv, speckv.kernels.reference, speckv.engine, speckv.cli, speckv.doctor\n"
        "assert speckv.Engine and speckv.SamplingParams"
    )
    done = python(program)
    assert done.returncode == 0, done.stderr


def test_importing_the_package_is_cheap() -> None:
    done = python("import sys, speckv, speckv.cli; print('torch' in sys.modules)")
    assert done.stdout == "False\n", done.stderr


_BELOW_ENGINE = {"decoding", "models", "policies", "kernels"}
_MAY_IMPORT = {
    "kernels": {"kernels"},
    "models": {"models", "kernels"},
    "policies": {"policies", "kernels"},
    "decoding": {"decoding", "models", "policies", "kernels"},
    "prompts": {"prompts"},
    "training": {"training", "traces", "prompts", *_BELOW_ENGINE},
    "traces": {"traces", "paper", "prompts", *_BELOW_ENGINE},
    "paper": {"paper", *_BELOW_ENGINE},
    "engine": {"engine", *_BELOW_ENGINE},
}
_LAYERS = (*_MAY_IMPORT, "cli")


def _layer(module: str) -> str | None:
    parts = module.split(".")
    return parts[1] if len(parts) > 1 and parts[0] == "speckv" and parts[1] in _LAYERS else None


def _imports(path: Path) -> set[str]:
    """Absolute names of the modules a source file imports, type-checking ones included."""
    if path in KERNELS:
        package = ["speckv", *path.relative_to(ROOT).parent.parts]
    else:
        package = list(path.relative_to(ROOT).parent.parts)
    names: set[str] = set()
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            names |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            base = package[: len(package) - node.level + 1] if node.level else []
            stem = ".".join([*base, *([node.module] if node.module else [])])
            names |= {stem, *(f"{stem}.{alias.name}" for alias in node.names)}
    return names


@pytest.mark.parametrize("path", SOURCES, ids=_id)
def test_imports_point_one_way(path: Path) -> None:
    names = _imports(path)
    if path in KERNELS:
        assert not {n for n in names if n.startswith("speckv") and _layer(n) != "kernels"} - {
            "speckv"
        }
    relative = path.relative_to(ROOT).with_suffix("").parts
    own = "kernels" if path in KERNELS else relative[1]
    if own in _MAY_IMPORT:
        layers = {layer for layer in map(_layer, names) if layer is not None}
        assert layers <= _MAY_IMPORT[own], f"{own} imports {layers - _MAY_IMPORT[own]}"


def _is_jit(function: ast.FunctionDef | ast.AsyncFunctionDef) -> bool:
    return any(ast.unparse(d).startswith("triton.") for d in function.decorator_list)


@pytest.mark.parametrize("path", KERNELS, ids=_id)
def test_only_kernel_bodies_are_untyped(path: Path) -> None:
    """mypy cannot make this distinction within a module, so it is lenient with all of them."""
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, (ast.FunctionDef, ast.AsyncFunctionDef)) and not _is_jit(node):
            every = [*node.args.posonlyargs, *node.args.args, *node.args.kwonlyargs]
            every += [a for a in (node.args.vararg, node.args.kwarg) if a is not None]
            untyped = [a.arg for a in every if a.annotation is None and a.arg not in _SELF]
            assert not untyped, f"{node.name}: no type for {', '.join(untyped)}"
            assert node.returns is not None, f"{node.name}: no return type"


_SELF = ("self", "cls")


@pytest.mark.parametrize("path", MODULES, ids=_id)
def test_modules_stay_small(path: Path) -> None:
    assert len(path.read_text(encoding="utf-8").splitlines()) <= 500


def test_errors() -> None:
    assert all(issubclass(e, SpeckvError) for e in (ModelError, NumericsError, PolicyError))
    assert issubclass(NumericsError, RuntimeError) and issubclass(PolicyError, ValueError)


@pytest.fixture(scope="module")
def distributions(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """A wheel built from the tree, an sdist, and a wheel built from that sdist."""
    folder = tmp_path_factory.mktemp("build")
    tree = folder / "tree"
    ignored = shutil.ignore_patterns(".git", ".venv", ".*_cache", "__pycache__", "build", "*.info")
    shutil.copytree(ROOT, tree, symlinks=True, ignore=ignored)

    def wheel(source: Path, name: str) -> Path:
        pip = [sys.executable, "-m", "pip", "wheel", "-q", "--no-deps", "--no-build-isolation"]
        _check([*pip, "-w", str(folder / name), str(source)], cwd=folder)
        (built,) = (folder / name).glob("*.whl")
        return built

    _check([sys.executable, "setup.py", "-q", "sdist", "-d", str(folder / "sdist")], cwd=tree)
    (sdist,) = (folder / "sdist").glob("*.tar.gz")
    return {"wheel": wheel(tree, "direct"), "sdist": wheel(sdist, "from-sdist")}


def _check(command: list[str], cwd: Path) -> None:
    done = subprocess.run(command, capture_output=True, text=True, cwd=cwd, timeout=300)
    assert done.returncode == 0, done.stdout + done.stderr


@pytest.mark.parametrize("origin", ["wheel", "sdist"])
def test_wheel_contents(distributions: dict[str, Path], origin: str) -> None:
    with zipfile.ZipFile(distributions[origin]) as archive:
        names = set(archive.namelist())
    info = f"speckv-{__version__}.dist-info"
    assert {name.split("/")[0] for name in names} == {"speckv", info}
    for path in [*KERNELS, *(ROOT / "kernels").rglob("*.c")]:
        assert f"speckv/{path.relative_to(ROOT).as_posix()}" in names
    data = [
        path
        for pattern in ("py.typed", "*.json", "*.safetensors", "data/drafts/*/README.md")
        for path in (ROOT / "speckv").rglob(pattern)
    ]
    for path in [*data, *(ROOT / "speckv").rglob("*.py")]:
        assert path.relative_to(ROOT).as_posix() in names
    assert f"{info}/licenses/LICENSE" in names


@pytest.mark.parametrize("origin", ["wheel", "sdist"])
def test_an_unpacked_wheel_imports(
    distributions: dict[str, Path], origin: str, tmp_path: Path
) -> None:
    with zipfile.ZipFile(distributions[origin]) as archive:
        archive.extractall(tmp_path)
    program = "import speckv, speckv.cli, speckv.kernels.reference as r; print(r.__file__)"
    done = python(program, cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    assert Path(done.stdout.strip()) == tmp_path / "speckv" / "kernels" / "reference.py"


def test_the_readme_names_real_commands() -> None:
    makefile = (ROOT / "Makefile").read_text(encoding="utf-8")
    targets = set(re.findall(r"^([a-z-]+):", makefile, flags=re.MULTILINE))
    for page in ("README.md", "CONTRIBUTING.md"):
        text = (ROOT / page).read_text(encoding="utf-8")
        named = set(re.findall(r"(?:^    |`)make ([a-z-]+)", text, flags=re.MULTILINE))
        assert named and named <= targets, f"{page}: {named - targets}"


def test_the_readme_example_is_valid_python() -> None:
    text = (ROOT / "README.md").read_text(encoding="utf-8")
    (example,) = re.findall(r"```python\n(.*?)```", text, flags=re.DOTALL)
    compile(example, "README.md", "exec")
    assert len(example.strip().splitlines()) <= 10


def test_ci_runs_make_test() -> None:
    script = ROOT / ".ci" / "run"
    assert os.access(script, os.X_OK)
    assert script.read_text(encoding="utf-8").splitlines()[-1] == "make test"


_CONFTEST = (ROOT / "tests" / "conftest.py").read_text(encoding="utf-8")
_INI = """
[pytest]
markers =
    aot: a
    gpu: g
    interpreter: i
    slow: s
"""


@pytest.fixture
def project(pytester: pytest.Pytester, monkeypatch: pytest.MonkeyPatch) -> pytest.Pytester:
    """A test project with this repository's conftest, outside the interpreter."""
    monkeypatch.delenv("TRITON_INTERPRET", raising=False)
    pytester.makeconftest(_CONFTEST)
    pytester.makeini(_INI)
    return pytester


@pytest.mark.parametrize("workers", ["", "-n2"])
def test_unexplained_skips_fail_the_run(project: pytest.Pytester, workers: str) -> None:
    bodies = (
        "def test_it(): pytest.skip('no time')",
        "@pytest.mark.skip(reason='later')\ndef test_it(): pass",
        "@pytest.mark.skipif(True, reason='not here')\ndef test_it(): pass",
        "pytest.skip('whole module', allow_module_level=True)",
        "pytest.importorskip('no_such_module')",
        "@pytest.fixture\ndef f(): pytest.skip('no data')\ndef test_it(f): pass",
    )
    files = {f"test_{i}": f"import pytest\n{body}\n" for i, body in enumerate(bodies)}
    project.makepyfile(**files, test_passes="def test_it(): pass")
    result = project.runpytest_subprocess("-p", "no:cacheprovider", *workers.split())
    assert result.ret == pytest.ExitCode.TESTS_FAILED
    summary = result.stdout.str().partition("skip audit")[2]
    assert set(re.findall(r"^  (test_\d).py", summary, flags=re.MULTILINE)) == set(files)


def test_explained_skips_do_not(project: pytest.Pytester) -> None:
    project.makepyfile(
        """
        import pytest
        def test_data(): pytest.skip('data: no wheel at hand')
        @pytest.mark.xfail(reason='known', strict=True)
        def test_known(): assert False
        @pytest.mark.gpu
        def test_gpu(): pytest.skip('needs sm_90')
        @pytest.mark.gpu
        @pytest.mark.skip(reason='later')
        def test_gpu_later(): pass
        """
    )
    result = project.runpytest_subprocess("-p", "no:cacheprovider")
    assert result.ret == pytest.ExitCode.OK
    result.assert_outcomes(skipped=3, xfailed=1)
    result.stdout.no_fnmatch_line("*skip audit*")


def test_a_failure_stays_a_failure(project: pytest.Pytester) -> None:
    project.makepyfile("import pytest\ndef test_a(): pytest.skip('x')\ndef test_b(): assert 0")
    result = project.runpytest_subprocess("-p", "no:cacheprovider")
    assert result.ret == pytest.ExitCode.TESTS_FAILED
    result.assert_outcomes(failed=1, skipped=1)


def test_gpu_tests_skip_visibly(project: pytest.Pytester, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "")
    project.makepyfile("import pytest\n@pytest.mark.gpu\ndef test_it(): assert False")
    result = project.runpytest_subprocess("-rs", "-p", "no:cacheprovider")
    assert result.ret == pytest.ExitCode.OK
    result.stdout.fnmatch_lines(["SKIPPED*needs a CUDA device"])


@pytest.mark.parametrize(
    ("mode", "expected"),
    [("", {"aot", "plain", "reference_aot"}), ("1", {"inside", "marked", "plain"})],
)
def test_each_mode_runs_its_own_tests(
    project: pytest.Pytester, monkeypatch: pytest.MonkeyPatch, mode: str, expected: set[str]
) -> None:
    monkeypatch.setenv("TRITON_INTERPRET", mode)
    project.makepyfile(
        """
        import pytest
        @pytest.mark.aot
        def test_aot(): pass
        @pytest.mark.interpreter
        def test_marked(): pass
        def test_plain(): pass
        """
    )
    inside = project.mkdir("kernels") / "test_inside.py"
    inside.write_text(
        "import pytest\ndef test_inside(): pass\n@pytest.mark.aot\ndef test_reference_aot(): pass\n"
    )
    result = project.runpytest_subprocess("-v", "-p", "no:cacheprovider")
    assert result.ret == pytest.ExitCode.OK
    assert set(re.findall(r"::test_(\w+) PASSED", result.stdout.str())) == expected


def test_report_reads_counts_and_lossless_cells(project: pytest.Pytester) -> None:
    project.makepyfile(
        """
        import pytest
        @pytest.mark.parametrize("policy", ["fixed:0", "speckv"])
        def test_same_tokens(policy, lossless):
            lossless(policy=policy, compression="int8", sequences=4, tokens=128)
            assert policy != "speckv"
        def test_passes(): pass
        @pytest.mark.gpu
        def test_gpu(): pytest.skip("none")
        @pytest.mark.xfail
        def test_xfails(): assert False
        @pytest.fixture
        def broken(): raise RuntimeError
        def test_errors(broken): pass
        """
    )
    junit = project.path / "junit.xml"
    project.runpytest_subprocess(f"--junitxml={junit}", "-p", "no:cacheprovider")
    read = report.read_junit(junit)
    assert read["counts"] == {"passed": 2, "failed": 1, "errors": 1, "skipped": 1, "xfailed": 1}
    row = {"cells": 1, "sequences": 4, "tokens": 128}
    assert report.summarise_lossless(read["lossless"]) == {
        "cells": 2,
        "sequences": 8,
        "tokens": 256,
        "failed_cells": 1,
        "by": {
            "policy": {
                "fixed:0": {**row, "failed_cells": 0},
                "speckv": {**row, "failed_cells": 1},
            },
            "compression": {"int8": {"cells": 2, "sequences": 8, "tokens": 256, "failed_cells": 1}},
        },
    }


def test_report_is_written_whole(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    suites = (
        report.Suite("good", ("timeit", "-n1", "-r1", "pass")),
        report.Suite("bad", ("no_such_module_of_speckv",)),
    )
    out = tmp_path / "history" / "test-full.json"
    monkeypatch.setattr(report, "SUITES", suites[:1])
    assert report.main(["--out", str(out)]) == 0
    monkeypatch.setattr(report, "SUITES", suites)
    assert report.main(["--out", str(out)]) == 1
    assert [path.name for path in out.parent.iterdir()] == ["test-full.json"]
    document = json.loads(out.read_text())
    assert document["passed"] is False
    assert document["suites"]["good"]["exit_code"] == 0
    assert document["suites"]["bad"]["exit_code"] == 1
    assert document["versions"]["torch"] and document["machine"]["cpu"]
    assert os.uname().nodename not in json.dumps(document["machine"])
    assert document["lossless"]["cells"] == 0
