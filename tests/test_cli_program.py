"""What the command line prints with, and the program as a process of its own."""

from __future__ import annotations

import io
import json
import os
import signal
import subprocess
import sys
import warnings
from typing import Any

import pytest
from rich.console import Console

from speckv import cli
from speckv._cli_options import ModelOptions
from speckv._cli_output import (
    histogram_lines,
    progress_bar,
    stdout_to_stderr,
    to_json,
    warnings_as_lines,
)
from speckv.decoding import trained
from speckv.decoding.trained import warn_untrained
from speckv.errors import UntrainedPolicyWarning
from tests.children import ROOT, python


def test_histogram_fills_gaps_and_never_hides_a_step() -> None:
    lines = histogram_lines({3: 1000, 1: 1})
    assert [line.split("│")[0] for line in lines] == ["γ  0 ", "γ  1 ", "γ  2 ", "γ  3 "]
    assert [line.split("│")[2] for line in lines] == [" 0", " 1", " 0", " 1000"]
    bars = [line.split("│")[1] for line in lines]
    assert {len(bar) for bar in bars} == {30}
    assert bars[0].strip() == "" and bars[1].strip() == "▏" and bars[3] == "█" * 30
    assert histogram_lines({}) == []


def test_a_progress_bar_is_for_terminals_only() -> None:
    for terminal in (False, True):
        console = Console(file=io.StringIO(), force_terminal=terminal, width=60)
        with progress_bar(console, "comparing", 4) as advance:
            advance(4)
        shown = console.file.getvalue()  # type: ignore[attr-defined]
        assert ("comparing" in shown and "100%" in shown) if terminal else shown == ""


def test_json_has_no_nan() -> None:
    document = {"a": float("nan"), "b": [1.5, float("inf")], "c": {2: "γ"}}
    assert json.loads(to_json(document)) == {"a": None, "b": [1.5, None], "c": {"2": "γ"}}


def test_stdout_of_child_processes_is_redirected_too(capfd: pytest.CaptureFixture[str]) -> None:
    with stdout_to_stderr():
        print("from here")
        subprocess.run([sys.executable, "-c", "print('from a child')"], check=True)
    print("after")
    sys.stdout.flush()
    out, err = capfd.readouterr()
    assert out == "after\n"
    assert "from here" in err and "from a child" in err


def test_a_warning_is_one_line(capsys: pytest.CaptureFixture[str]) -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", UntrainedPolicyWarning)  # which a user of the library may
        with warnings_as_lines():
            warnings.warn("it is not trained", UntrainedPolicyWarning, stacklevel=1)
    out, err = capsys.readouterr()
    assert (out, err) == ("", "warning: it is not trained\n")
    with pytest.warns(UserWarning, match="another"), warnings_as_lines():
        warnings.warn("another", stacklevel=1)
    assert capsys.readouterr().err == ""


class Warned:
    """An engine whose loading warns twice of the same, as two policies would have it."""

    @classmethod
    def from_pretrained(cls, *models: Any, **options: Any) -> Warned:
        _warn_untrained()
        return cls()

    def warmup(self) -> None:
        _warn_untrained()


def _warn_untrained() -> None:
    warn_untrained({"name": "t", "fingerprint": "1"}, {"name": "d", "fingerprint": "2"})


def test_loading_tells_once_that_no_policy_is_trained(
    monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(trained, "_warned", set())
    monkeypatch.setattr("speckv.engine.Engine", Warned)
    cli.load_engine(ModelOptions(None, None, None, None, "speckv", None, "auto"))
    out, err = capfd.readouterr()
    assert out == "" and err.count("\n") == 1
    assert err.startswith("warning: policy speckv: none is trained for the target t")
    assert trained.FALLBACK in err and "speckv train" in err


def _program(*arguments: str, script: str = "", **options: Any) -> subprocess.CompletedProcess[str]:
    program = f"import sys; from speckv import cli; {script}\nsys.argv[0] = 'speckv'; cli.main()"
    return subprocess.run(
        [sys.executable, "-c", program, *arguments],
        capture_output=True,
        text=True,
        cwd=ROOT,
        timeout=120,
        **options,
    )


def test_version_and_help() -> None:
    done = _program("--version")
    assert (done.returncode, done.stdout) == (0, f"speckv {cli.__version__}\n")
    for arguments in ([], ["--help"]):
        done = _program(*arguments)
        assert done.returncode == 0
        assert all(name in done.stdout for name in ("generate", "chat", "doctor"))
    assert "--compare" in _program("generate", "--help").stdout


def test_the_package_is_a_program_too() -> None:
    done = python("import runpy; runpy.run_module('speckv', run_name='__main__')")
    assert (done.returncode, done.stdout.split()[:2]) == (0, ["Usage:", "speckv"])


def test_help_and_mistakes_do_not_import_torch() -> None:
    check = (
        "import atexit; "
        "atexit.register(lambda: print([m for m in ('torch', 'transformers') if m in sys.modules]))"
    )
    for arguments in (["generate", "--help"], ["generate", "a", "--top-p", "2"]):
        done = _program(*arguments, script=check)
        assert done.stdout.endswith("[]\n"), done.stdout


def test_an_ascii_terminal_does_not_end_the_program() -> None:
    environment = {**os.environ, "PYTHONIOENCODING": "ascii:strict", "PYTHONUTF8": "0"}
    done = _program(script="cli.run = lambda arguments: print('γ') or 0", env=environment)
    assert (done.returncode, done.stdout) == (0, "?\n")


def test_a_real_ctrl_c_while_loading() -> None:
    script = (
        "import time\n"
        "def load(options): print('loading', flush=True); time.sleep(60)\n"
        "cli.load_engine = load"
    )
    # A shell starts what runs in the background with SIGINT ignored, and children inherit that.
    heed = "import signal; signal.signal(signal.SIGINT, signal.default_int_handler)"
    program = f"import sys; from speckv import cli\n{heed}\n{script}\ncli.main()"
    with subprocess.Popen(
        [sys.executable, "-c", program, "generate", "Why?"],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        cwd=ROOT,
    ) as child:
        assert child.stdout is not None
        assert child.stdout.readline() == "loading\n"
        child.send_signal(signal.SIGINT)
        _, err = child.communicate(timeout=60)
    assert child.returncode == 130
    assert "Traceback" not in err
