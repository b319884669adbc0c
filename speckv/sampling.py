"""Sampling parameters of one request."""

from __future__ import annotations

import math
import secrets
from dataclasses import dataclass, replace

COUPLINGS = ("gumbel", "rejection")


@dataclass(frozen=True)
class SamplingParams:
    """How tokens are chosen and where a request ends.

    Parameters
    ----------
    max_new_tokens : int
        At least 1.
    temperature : float
        0 is greedy decoding.
    top_k : int
        Keep the k most probable tokens; 0 keeps all.
    top_p : float
        Keep the most probable tokens up to this mass, in (0, 1]; applied after ``top_k``, as
        transformers does.
    seed : int or None
        64 bits. The same seed gives the same tokens, whatever the policy; in a list of prompts,
        each place has noise of its own. None draws one; the result tells which.
    coupling : "gumbel" | "rejection"
        Gumbel coupling gives exactly the tokens of plain sampling with that seed. Rejection
        sampling accepts more draft tokens and is exact in distribution only.
    stop : tuple of str
        Texts that end the request; they are not part of the result's text.
    stop_token_ids : tuple of int
        Token ids that end the request, beside the model's own.
    ignore_eos : bool
        Go on after the model's end-of-sequence tokens.

    Raises
    ------
    ValueError, TypeError
        A value out of range or of the wrong type.
    """

    max_new_tokens: int = 128
    temperature: float = 0.0
    top_k: int = 0
    top_p: float = 1.0
    seed: int | None = None
    coupling: str = "gumbel"
    stop: tuple[str, ...] = ()
    stop_token_ids: tuple[int, ...] = ()
    ignore_eos: bool = False

    def __post_init__(self) -> None:
        if isinstance(self.stop, str):
            object.__setattr__(self, "stop", (self.stop,))
        object.__setattr__(self, "stop", tuple(self.stop))
        object.__setattr__(self, "stop_token_ids", tuple(self.stop_token_ids))
        _integer("max_new_tokens", self.max_new_tokens, 1, 2**31 - 1)
        _integer("top_k", self.top_k, 0, 2**31 - 1)
        if self.seed is not None:
            _integer("seed", self.seed, -(2**63), 2**63 - 1)
        if not _is_number(self.temperature) or not 0.0 <= self.temperature <= 100.0:
            raise ValueError(f"temperature: expected 0 to 100, got {self.temperature!r}")
        if 0.0 < self.temperature < 1e-3:
            raise ValueError(
                f"temperature: expected 0 (greedy) or at least 0.001, got {self.temperature!r}"
            )
        if not _is_number(self.top_p) or not 0.0 < self.top_p <= 1.0:
            raise ValueError(f"top_p: expected a value in (0, 1], got {self.top_p!r}")
        if self.coupling not in COUPLINGS:
            raise ValueError(f"coupling: expected one of {COUPLINGS}, got {self.coupling!r}")
        if not all(isinstance(text, str) and text for text in self.stop):
            raise ValueError(f"stop: expected non-empty strings, got {self.stop!r}")
        for token in self.stop_token_ids:
            _integer("stop_token_ids", token, 0, 2**31 - 1)

    def seeded(self) -> SamplingParams:
        """The same with a seed drawn where there is none."""
        return self if self.seed is not None else replace(self, seed=secrets.randbits(63))


def _is_number(value: object) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value)


def _integer(name: str, value: object, low: int, high: int) -> None:
    if isinstance(value, bool) or not isinstance(value, int):
        raise TypeError(f"{name}: expected an integer, got {value!r}")
    if not low <= value <= high:
        raise ValueError(f"{name}: expected {low} to {high}, got {value}")
