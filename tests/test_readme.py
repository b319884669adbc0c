"""What the README shows runs as it stands there."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

README = Path(__file__).resolve().parent.parent / "README.md"


def example() -> str:
    found = re.search(r"```python\n(.*?)```", README.read_text(encoding="utf8"), re.DOTALL)
    assert found is not None
    return found[1]


@pytest.mark.model
def test_the_example_runs(capsys: pytest.CaptureFixture[str]) -> None:
    exec(compile(example(), str(README), "exec"), {"__name__": "readme"})
    assert len(capsys.readouterr().out.split()) > 20
