"""What a step costs on this machine: the cost(γ) of the rate objective."""

from __future__ import annotations

import math
from dataclasses import dataclass

from ..kernels.layout import WIDTH_MAX


@dataclass(frozen=True)
class CostTable:
    """Milliseconds of a step that verifies γ draft tokens, linear in the context length.

    ``cost(γ) = t_draft · γ + t_catch_up [γ > 0] + t_verify(γ + 1)``. A draft token's cost holds
    its choice, a verification's the commitment.

    Attributes
    ----------
    step_ms : tuple of 16 floats
        By γ, at context 0.
    step_ms_per_context_token : tuple of 16 floats
        Slope by γ.

    Raises
    ------
    ValueError
        Not 16 values of each, a time that is not positive and finite, or a slope that is negative
        or not finite.
    """

    step_ms: tuple[float, ...]
    step_ms_per_context_token: tuple[float, ...]

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

    @classmethod
    def from_parts(
        cls,
        draft_ms: float,
        verify_ms: list[float],
        catch_up_ms: float = 0.0,
        draft_ms_per_context_token: float = 0.0,
        verify_ms_per_context_token: float = 0.0,
    ) -> CostTable:
        """From the cost of a draft token, of catching up, and of a verification by width 1..16."""
        step = [draft_ms * g + catch_up_ms * min(g, 1) + verify_ms[g] for g in range(WIDTH_MAX)]
        slope = [
            draft_ms_per_context_token * g + verify_ms_per_context_token for g in range(WIDTH_MAX)
        ]
        return cls(tuple(step), tuple(slope))
