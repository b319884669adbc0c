"""kill -9 during ``speckv paper``: the old file is left, or the whole new one."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from speckv.kernels import native
from speckv.paper.plots import PLOTS
from tests.killed import OLD, assert_whole_png, killed


@pytest.mark.parametrize("renames", [0, 3])
def test_files_are_old_or_whole(
    renames: int, folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """First comes the JSON, then the plots, in their order."""
    monkeypatch.setenv(native.SWITCH_VARIABLE, "0")  # or compiling it would be the first rename
    document, plots = tmp_path / "paper.json", tmp_path / "plots"
    plots.mkdir()
    names = [f"{name}.png" for name in PLOTS]
    for path in (document, plots / names[0], plots / names[1]):
        path.write_text(OLD)
    command = ("paper", str(folder), "--json", str(document), "--plots", str(plots))
    killed(tmp_path, renames, *command)
    if renames:
        assert "predictor" in json.loads(document.read_text())
    else:
        assert document.read_text() == OLD
    drawn = max(renames - 1, 0)
    for path in (plots / name for name in names[:drawn]):
        assert_whole_png(path)
    assert [(plots / name).read_text() for name in names[drawn:2]] == [OLD] * (2 - drawn)
    assert not any((plots / name).exists() for name in names[max(drawn, 2) :])
