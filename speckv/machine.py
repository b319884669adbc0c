"""The machine's name, for keys of what was measured on it and for reports."""

from __future__ import annotations

import platform
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import torch


def cpu_fields() -> dict[str, str]:
    """What Linux tells about the first processor; empty elsewhere."""
    try:
        text = Path("/proc/cpuinfo").read_text(encoding="utf-8")
    except OSError:
        return {}
    pairs = (line.partition(":") for line in text.split("\n\n")[0].splitlines())
    return {key.strip(): value.strip() for key, _, value in pairs}


def cpu_name() -> str:
    """Model name of the processor."""
    return cpu_fields().get("model name") or platform.processor() or platform.machine()


def device_name(device: torch.device) -> str:
    """Name of the GPU, or that of the processor for any other device."""
    if device.type != "cuda":
        return cpu_name()
    import torch

    return torch.cuda.get_device_name(device)


def package_version(name: str) -> str | None:
    """Version of an installed package; None where there is none."""
    try:
        return version(name)
    except PackageNotFoundError:
        return None
