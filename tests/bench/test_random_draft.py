"""bench.random_draft: a draft of the default one's shapes that proposes nothing of use."""

from __future__ import annotations

import json
import sys
from pathlib import Path

import pytest

from bench import random_draft
from tests.traces.synthetic import COST

pytestmark = pytest.mark.model


def test_live_and_in_replay(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    out = tmp_path / "random.json"
    monkeypatch.setattr(random_draft, "measure_costs", lambda target, draft: COST)
    options = ["--compression", "bf16", "--per-task", "1", "--tokens", "24", "--out", str(out)]
    monkeypatch.setattr(sys, "argv", ["bench/random_draft.py", *options])
    random_draft.main()
    found = json.loads(out.read_text())
    assert found["replay"]["first_token_accepted"] < 0.02
    assert "random draft" in found["engine"] and found["compression"] == "bf16"
    assert 0 < found["live"]["ratio_95"][0] <= found["live"]["ratio"]
    # Of 23 steps the first drafts to find out; by these costs that is what the ratio tells.
    assert 0.9 < found["replay"]["ratio"] < 1
