"""The pair that comes with the package: its draft, and the policy trained for it."""

from __future__ import annotations

import pytest

from speckv.decoding.trained import SHIPPED, identify, pair_key
from speckv.kernels.layout import LAYOUT_SURVIVAL
from speckv.models.loading import load_model
from speckv.models.pairing import load_draft
from speckv.models.slice_draft import shipped_draft
from speckv.policies.mlp import Mlp

pytestmark = pytest.mark.model


def test_the_default_draft_and_its_policy() -> None:
    target, tokenizer = load_model("smollm2", compression="bf16", device="cpu")
    folder = shipped_draft(target.fingerprint)  # type: ignore[attr-defined]
    assert folder is not None
    assert sum(path.stat().st_size for path in folder.iterdir()) < 20 << 20
    card = (folder / "README.md").read_text(encoding="utf-8")
    assert "speckv distill" in card and "| summarization |" in card
    draft, id_map = load_draft(None, target, tokenizer)
    assert draft is not None and id_map is not None and draft.vocab_size == len(id_map)
    policy = Mlp.load(folder / SHIPPED)
    assert policy.card["pair"] == pair_key(identify(target), identify(draft))
    assert policy.layout == LAYOUT_SURVIVAL and (0, 0.0) in policy.records
