"""What a row says of the tree that it was measured with."""

from __future__ import annotations

from pathlib import Path

import pytest

from bench import environment


def test_a_tree_without_its_repository(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("SPECKV_COMMIT", raising=False)
    monkeypatch.setattr(environment, "ROOT", tmp_path)
    monkeypatch.setattr(environment, "COMMIT", tmp_path / "COMMIT")
    monkeypatch.setenv("GIT_CEILING_DIRECTORIES", str(tmp_path.parent))
    facts = environment.environment()
    assert (facts["commit"], facts["dirty"]) == (None, None)
    (tmp_path / "COMMIT").write_text("0123abc\n")
    facts = environment.environment()
    assert (facts["commit"], facts["dirty"]) == ("0123abc", None)
    monkeypatch.setenv("SPECKV_COMMIT", "456def+")
    facts = environment.environment()
    assert (facts["commit"], facts["dirty"]) == ("456def", True)


def test_a_tree_with_its_repository(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("SPECKV_COMMIT", raising=False)
    facts = environment.environment()
    assert isinstance(facts["dirty"], bool | None) and facts["torch"]
