"""The made-up release, read and analysed once."""

from __future__ import annotations

from pathlib import Path

import pytest

from speckv.paper.analysis import Analysis, analyse
from speckv.paper.data import Released, load
from tests.paper.synthetic import Row, make_release, write_release


@pytest.fixture(scope="session")
def rows() -> tuple[list[Row], list[Row]]:
    """Rows of the step file and of the run file."""
    return make_release()


@pytest.fixture(scope="session")
def folder(tmp_path_factory: pytest.TempPathFactory, rows: tuple[list[Row], list[Row]]) -> Path:
    """Both files."""
    return write_release(tmp_path_factory.mktemp("release"), *rows)


@pytest.fixture(scope="session")
def released(folder: Path) -> Released:
    return load(folder)


@pytest.fixture(scope="session")
def analysis(released: Released) -> Analysis:
    return analyse(released)
