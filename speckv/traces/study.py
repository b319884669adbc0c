"""What a report is of: a trace, and what was found on it."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property

from ..policies import CostTable
from .compare import OURS, Comparison
from .replay import Controller, Oracle, Replayed, replay
from .schema import Trace
from .tries import Try
from .tuning import ORACLE, tune


@dataclass(frozen=True)
class Study:
    """What a report is of.

    Attributes
    ----------
    trace : Trace
    costs : mapping of str to CostTable
        By compression.
    found : Comparison
        Of `speckv.traces.compare.compare`.
    training : frozenset of int
        Prompts that policies were tuned on; the others judge.
    tried : mapping of float to sequence of Try
        By temperature; empty where nothing else was tried.
    """

    trace: Trace
    costs: Mapping[str, CostTable]
    found: Comparison
    training: frozenset[int]
    tried: Mapping[float, Sequence[Try]] = field(default_factory=dict)

    @property
    def compressions(self) -> list[str]:
        """Of the trace, in its order."""
        return list(dict.fromkeys(answer.compression for answer in self.trace.answers))

    @property
    def temperatures(self) -> list[float]:
        """Of the trace, from the lowest."""
        return sorted({answer.temperature for answer in self.trace.answers})

    @property
    def lowest(self) -> float:
        """The lowest temperature: 0 where there are greedy answers."""
        return self.temperatures[0]

    def part(
        self, compression: str, temperature: float | None = None, *, judged: bool | None = None
    ) -> Trace:
        """Answers of a compression, at the lowest temperature: that judge, or do not, or all."""
        key = compression, self.lowest if temperature is None else temperature
        return self.trace.where(
            lambda a: (
                (a.compression, a.temperature) == key
                and judged in (None, a.prompt_id not in self.training)
            )
        )

    def replayed(self, name: str, compression: str, temperature: float) -> Replayed:
        """A policy on the judged answers of a compression and temperature."""
        cost = self.costs[compression]
        judged = self.part(compression, temperature, judged=True)
        controller: Controller
        if name == ORACLE:
            controller = Oracle(judged, cost)
        else:
            train = self.part(compression, temperature, judged=False)
            controller = tune(name, train, compression, cost).controller
        return replay(judged, controller, cost)

    @cached_property
    def decided(self) -> dict[tuple[str, str], Replayed]:
        """Replays at the lowest temperature by compression and policy: ours and the oracle."""
        return {
            (compression, name): self.replayed(name, compression, self.lowest)
            for compression in self.compressions
            for name in (OURS, ORACLE)
        }
