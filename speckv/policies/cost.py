"""What a step costs on this machine: the cost(γ) of the rate objective."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from typing import Any

from ..kernels.layout import WIDTH_MAX


@dataclass(frozen=True)
class StepParts:
    """What the time of a step is made of, in milliseconds, at a short context.

    Attributes
    ----------
    draft_ms : float
        A draft forward of one token.
    verify_ms : tuple of 16 floats
        The target's forward, by width 1..16.
    overhead_ms : tuple of 16 floats
        Choices, decisions and commitment, by γ.
    """

    draft_ms: float
    verify_ms: tuple[float, ...]
    overhead_ms: tuple[float, ...]

    def __post_init__(self) -> None:
        for name in ("verify_ms", "overhead_ms"):
            values = getattr(self, name)
            if len(values) != WIDTH_MAX:
                raise ValueError(f"parts: {name}: expected {WIDTH_MAX} values, got {len(values)}")


@dataclass(frozen=True)
class CostTable:
    """Milliseconds of a step that verifies γ draft tokens, linear in the context length.

    ``cost(γ) = t_draft · γ + t_verify(γ + 1) + t_overhead(γ)``, and t_catch_up where plain steps
    have committed tokens since the draft was last fed. Policies leave that last one out: a token
    that the draft lacks is fed sooner or later, whatever they decide.

    Attributes
    ----------
    step_ms : tuple of 16 floats
        By γ, at context 0.
    step_ms_per_context_token : tuple of 16 floats
        Slope by γ.
    catch_up_ms : float
        Of each such token, or of up to ``catch_up_tokens`` of them.
    catch_up_tokens : int
        1 where they widen the draft's next forward; more where forwards of their own feed so many.
    parts : StepParts, optional
        What they are made of, for people; nothing is computed from it.

    Raises
    ------
    ValueError
        Not 16 values of each, a time that is not positive and finite, or a slope or ``catch_up_ms``
        that is negative or not finite.
    """

    step_ms: tuple[float, ...]
    step_ms_per_context_token: tuple[float, ...]
    catch_up_ms: float = 0.0
    catch_up_tokens: int = 1
    parts: StepParts | None = None

    def __post_init__(self) -> None:
        for name in ("step_ms", "step_ms_per_context_token"):
            values = getattr(self, name)
            if len(values) != WIDTH_MAX:
                raise ValueError(f"{name}: expected {WIDTH_MAX} values, got {len(values)}")
        for ms in self.step_ms:
            if not 0 < ms < math.inf:
                raise ValueError(f"step_ms: expected positive, finite values, got {ms}")
        for slope in self.step_ms_per_context_token:
            if not 0 <= slope < math.inf:
                raise ValueError(
                    f"step_ms_per_context_token: expected finite values of at least 0, got {slope}"
                )
        if not 0 <= self.catch_up_ms < math.inf:
            raise ValueError(
                f"catch_up_ms: expected a finite value of at least 0, got {self.catch_up_ms}"
            )
        if self.catch_up_tokens < 1:
            raise ValueError(f"catch_up_tokens: expected at least 1, got {self.catch_up_tokens}")

    def to_dict(self) -> dict[str, Any]:
        """JSON values."""
        return asdict(self)

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> CostTable:
        """What `to_dict` gave; what has a default may be missing.

        Raises
        ------
        TypeError, ValueError
            Something else.
        """
        known = dict(values)
        parts = known.pop("parts", None)
        if not isinstance(parts, Mapping | None):
            raise TypeError(f"parts: expected an object, got {type(parts).__name__}")
        return cls(
            catch_up_ms=float(known.pop("catch_up_ms", 0.0)),
            catch_up_tokens=int(known.pop("catch_up_tokens", 1)),
            parts=None if parts is None else StepParts(**_numbers(parts)),
            **_numbers(known),
        )

    @classmethod
    def from_parts(
        cls,
        draft_ms: float,
        verify_ms: list[float],
        first_draft_ms: float = 0.0,
        draft_ms_per_context_token: float = 0.0,
        verify_ms_per_context_token: float = 0.0,
    ) -> CostTable:
        """From what a draft token, the first one besides, and a verification by width cost."""
        step = [draft_ms * g + first_draft_ms * min(g, 1) + verify_ms[g] for g in range(WIDTH_MAX)]
        slope = [
            draft_ms_per_context_token * g + verify_ms_per_context_token for g in range(WIDTH_MAX)
        ]
        return cls(tuple(step), tuple(slope))


def _numbers(values: Mapping[str, Any]) -> dict[str, Any]:
    """Floats, and lists of numbers as tuples of them."""
    return {
        name: tuple(map(float, value)) if isinstance(value, list | tuple) else float(value)
        for name, value in values.items()
    }
