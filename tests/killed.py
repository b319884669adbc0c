"""kill -9 during a command, at the moment that it renames a file it has written."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from pathlib import Path

from speckv.models.hub import CACHE_VARIABLE

ROOT = Path(__file__).resolve().parent.parent
OLD = "an old file"

_KILLED = """
import os, signal, sys
from pathlib import Path
from speckv import cli
left = int(sys.argv[1])
rename = Path.replace
def replace(self, target):
    global left
    if not left:
        os.kill(os.getpid(), signal.SIGKILL)
    left -= 1
    return rename(self, target)
Path.replace = replace
sys.exit(cli.run(sys.argv[2:]))
"""


def killed(tmp_path: Path, renames: int, *command: str) -> None:
    """Run a command that is killed once it has written and renamed so many files."""
    process = subprocess.run(
        [sys.executable, "-c", _KILLED, str(renames), *command],
        cwd=ROOT,
        env=os.environ | {CACHE_VARIABLE: str(tmp_path / "cache")},
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert process.returncode == -signal.SIGKILL, process.stderr


def assert_whole_png(path: Path) -> None:
    content = path.read_bytes()
    assert content.startswith(b"\x89PNG\r\n") and content.endswith(b"IEND\xaeB`\x82")
