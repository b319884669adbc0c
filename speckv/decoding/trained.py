"""Policies trained for a pair of models: where they are kept, and which one an engine takes."""

from __future__ import annotations

import hashlib
import json
import warnings
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

from ..errors import UntrainedPolicyWarning
from ..models.base import CausalModel
from ..models.hub import cache_root
from ..models.slice_draft import shipped_draft
from ..policies import Policy
from ..policies.mlp import Mlp
from ..policies.policy import mlp_policy

SHIPPED = "policy.safetensors"
"""Name of the policy in the folder of a draft that comes with the package."""

FALLBACK = "the default pair's MLP, scaled by this pair's own record"
"""What the policy ``speckv`` is for a pair that none was trained for."""

_warned: set[str] = set()


def identify(model: CausalModel) -> dict[str, Any]:
    """What tells a model from others: ``name``, ``fingerprint`` (or None) and ``vocab_size``."""
    return {
        "name": model.name,
        "fingerprint": getattr(model, "fingerprint", None),
        "vocab_size": model.vocab_size,
    }


def pair_key(target: Mapping[str, Any], draft: Mapping[str, Any]) -> str:
    """A name for a pair of models that `identify` describes.

    Checkpoints count, not names, where there is a fingerprint. A draft made of its target's own
    layers has its target's, and counts by name.
    """
    own, other = target["fingerprint"], draft["fingerprint"]
    facts = [own or target["name"], draft["name"] if other in (None, own) else other]
    return hashlib.sha256(json.dumps(facts).encode()).hexdigest()[:16]


def policy_path(key: str) -> Path:
    """Where the policy that was trained for a pair on this machine is kept."""
    return cache_root() / "policies" / f"{key}.safetensors"


def trained_policy(target: Mapping[str, Any], draft: Mapping[str, Any]) -> Policy | None:
    """The policy ``speckv`` of a pair: one trained here, else one that ships, else None.

    Parameters
    ----------
    target, draft : mapping
        What `identify` tells.

    Raises
    ------
    PolicyError
        The file is corrupt or of another version.
    """
    key = pair_key(target, draft)
    paths = [policy_path(key)]
    if target["fingerprint"] and (shipped := shipped_draft(target["fingerprint"])) is not None:
        paths.append(shipped / SHIPPED)
    for path in paths:
        if path.is_file():
            mlp = Mlp.load(path)
            if mlp.card.get("pair") == key:
                return replace(mlp_policy("speckv", mlp), trained=True)
    return None


def warn_untrained(target: Mapping[str, Any], draft: Mapping[str, Any]) -> None:
    """Warn, once for each pair and process, that it has no `trained_policy`, and of the remedy."""
    key = pair_key(target, draft)
    if key in _warned:
        return
    _warned.add(key)
    warnings.warn(
        f"policy speckv: none is trained for the target {target['name']} with the draft "
        f"{draft['name']}, so {FALLBACK}, decides; to train one, run speckv profile TRACE with "
        "this target and draft, then speckv train TRACE",
        UntrainedPolicyWarning,
        stacklevel=4,
    )
