"""A tiny random target, drafts of known acceptance, and the comparison with plain decoding.

Tests choose another family of models than ``llama`` by a parameter ``family``.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import cache, partial
from typing import Any

import pytest

from speckv.models.base import CausalModel
from tests.decoding.grid import ACCEPTANCE, EOS, PROMPTS, SAMPLINGS, params
from tests.decoding.loops import acceptance, decode, plain
from tests.decoding.tiny import transformer, wrapped


@pytest.fixture
def family() -> str:
    return "llama"


@pytest.fixture
def tiny(family: str) -> Any:
    """The target as transformers has it, fp32."""
    return transformer(family)


@pytest.fixture
def target(family: str) -> Callable[[str], CausalModel]:
    """The target by compression, or by ``COMPRESSION/DTYPE``."""
    return partial(wrapped, family, "target")


@pytest.fixture
def draft(family: str) -> Callable[[str, str], CausalModel]:
    """The draft by kind and the target's compression.

    The kinds are ``target`` (the target itself), and in fp32 ``perturbed`` and ``random``; or
    ``FAMILY:KIND``, one of another family.
    """

    def get(kind: str, compression: str) -> CausalModel:
        if kind == "target":
            return wrapped(family, "target", compression)
        other, _, kind = kind.rpartition(":")
        return wrapped(other or family, kind, "fp32")

    return get


@cache
def _plain(family: str, compression: str, sampling: str) -> list[list[int]]:
    return plain(wrapped(family, "target", compression), PROMPTS, params(sampling), eos=EOS)


@pytest.fixture
def expected(family: str) -> Callable[[str, str], list[list[int]]]:
    """Plain decoding by compression and sampling."""
    return partial(_plain, family)


@pytest.fixture
def check(
    family: str,
    target: Callable[[str], CausalModel],
    draft: Callable[[str, str], CausalModel],
    expected: Callable[[str, str], list[list[int]]],
    lossless: Callable[..., None],
) -> Callable[..., None]:
    """Decode every sampling, all rows at once and the first ones alone, and compare."""

    def run(
        compression: str, policy: str, kind: str, accepted: tuple[float, float] | None = None
    ) -> None:
        pair = target(compression), draft(kind, compression)
        low, high = accepted or ACCEPTANCE[kind]
        for sampling in SAMPLINGS:
            whole = params(sampling)
            tokens = expected(compression, sampling)
            together = decode(*pair, policy, PROMPTS, whole, eos=EOS)
            alone = [
                decode(*pair, policy, [PROMPTS[i]], [whole[i]], eos=EOS, first_request=i)[0]
                for i in (0, 2)
            ]
            for batch, rows, wanted in (
                ("4", together, tokens),
                ("1", alone, [tokens[0], tokens[2]]),
            ):
                lossless(
                    policy=policy,
                    compression=pair[0].compression,
                    draft=kind,
                    sampling=sampling,
                    batch=batch,
                    model=f"tiny {family}",
                    dtype=str(pair[0].dtype).removeprefix("torch."),
                    sequences=len(rows),
                    tokens=sum(map(len, wanted)),
                )
                assert [row.tokens for row in rows] == wanted
            for row, one in zip((together[0], together[2]), alone, strict=True):
                assert row.done == one.done
            if policy != "speckv":  # which drafts where it is sure of itself, if at all
                assert low <= acceptance(together) <= high

    return run
