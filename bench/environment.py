"""Where and on what a number was measured: every row of every benchmark carries this."""

from __future__ import annotations

import datetime
import json
import os
import platform
import shlex
import subprocess
import sys
from pathlib import Path
from typing import Any

import torch

from speckv.files import write_atomically
from speckv.machine import cpu_name, package_version

ROOT = Path(__file__).resolve().parent.parent
COMMIT = ROOT / "bench" / "COMMIT"
"""Written before a tree is copied without its repository; git ignores it."""


def environment() -> dict[str, Any]:
    """Commit, dirty flag, device, driver and versions, as JSON values.

    Where the tree has come without its repository, the commit is what the variable
    ``SPECKV_COMMIT`` or the file ``bench/COMMIT`` says, and whether it was dirty is not known,
    unless a ``+`` follows the commit there.
    """
    commit, dirty = _commit()
    facts: dict[str, Any] = {
        "date": datetime.datetime.now(datetime.timezone.utc).isoformat(timespec="seconds"),
        "commit": commit,
        "dirty": dirty,
        "python": platform.python_version(),
        "torch": torch.__version__,
        "transformers": package_version("transformers"),
        "triton": package_version("triton"),
        "bitsandbytes": package_version("bitsandbytes"),
        "threads": torch.get_num_threads(),
        "cpu": f"{cpu_name()}, {os.cpu_count()} cores",
        "cpu_capability": torch.backends.cpu.get_cpu_capability(),
        "device": "cpu",
    }
    if torch.cuda.is_available():
        facts["device"] = torch.cuda.get_device_name()
        facts["cuda"] = torch.version.cuda
        facts["driver"] = _driver()
    return facts


def command() -> str:
    """The command that this process was started with, without ``--out``."""
    name = f"bench.{Path(sys.argv[0]).stem}"
    arguments = [each for each in sys.argv[1:] if not each.startswith("--out=")]
    if "--out" in arguments:
        at = arguments.index("--out")
        del arguments[at : at + 2]
    return shlex.join(["python", "-m", name, *arguments])


def write_json(path: Path, document: Any) -> None:
    """Write indented JSON; an interrupted write leaves the old file or none."""
    text = json.dumps(document, indent=1) + "\n"
    write_atomically(path, lambda temporary: temporary.write_text(text))


def _commit() -> tuple[str | None, bool | None]:
    """The commit of this tree, and whether the tree is another by now."""
    said = os.environ.get("SPECKV_COMMIT", "").strip()
    if not said and (commit := _git("rev-parse", "HEAD")) is not None:
        return commit, bool(_git("status", "--porcelain"))
    if not said and COMMIT.is_file():
        said = COMMIT.read_text(encoding="utf-8").strip()
    return said.rstrip("+") or None, True if said.endswith("+") else None


def _git(*arguments: str) -> str | None:
    try:
        run = subprocess.run(
            ["git", *arguments], cwd=ROOT, capture_output=True, text=True, check=True
        )
    except (OSError, subprocess.CalledProcessError):
        return None
    return run.stdout.strip()


def _driver() -> str | None:
    query = ["nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader"]
    try:
        run = subprocess.run(query, capture_output=True, text=True, check=True)
    except (OSError, subprocess.CalledProcessError):
        return None
    return run.stdout.strip()
