"""What a generation did, in numbers."""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass, field
from typing import Any


@dataclass
class Stats:
    """Statistics of one request.

    The token that prefill yields is not a step; it counts among ``new_tokens``.

    Attributes
    ----------
    steps : list of (gamma, accepted)
        Draft tokens verified and kept, in order.
    new_tokens : int
        Committed tokens, after truncation at EOS, stop text and length.
    prompt_tokens : int
    seconds : dict of str to float
        ``prefill``, ``draft``, ``verify``, ``decision`` (signals, token choice and γ) and
        ``total``; host wall time, of the whole batch where requests ran together.
    token_times : list of float
        Seconds from the start of the request to the commitment of each token.
    signals : list of list of (entropy, confidence, margin, token probability), or None
        Of every draft token of every step, where they were asked for; entropy in bits.
    """

    prompt_tokens: int = 0
    new_tokens: int = 0
    steps: list[tuple[int, int]] = field(default_factory=list)
    seconds: dict[str, float] = field(default_factory=dict)
    token_times: list[float] = field(default_factory=list)
    signals: list[list[list[float]]] | None = None

    @property
    def gamma_histogram(self) -> dict[int, int]:
        """Steps by γ."""
        return dict(sorted(Counter(gamma for gamma, _ in self.steps).items()))

    @property
    def acceptance_rate(self) -> float:
        """Accepted over drafted tokens; 0 where none was drafted."""
        drafted = sum(gamma for gamma, _ in self.steps)
        return sum(accepted for _, accepted in self.steps) / drafted if drafted else 0.0

    @property
    def tokens_per_step(self) -> float:
        """Committed tokens, that of prefill excepted, over steps; 0 without a step."""
        return (self.new_tokens - 1) / len(self.steps) if self.steps else 0.0

    @property
    def tokens_per_second(self) -> float:
        """New tokens over the seconds until the last was committed, prefill included."""
        return self.new_tokens / self.token_times[-1] if self.token_times else 0.0

    @property
    def decode_tokens_per_second(self) -> float:
        """Tokens after the first over the seconds after the first: prefill excluded."""
        span = self.token_times[-1] - self.token_times[0] if self.token_times else 0.0
        return (self.new_tokens - 1) / span if span > 0 else 0.0

    @property
    def time_to_first_token(self) -> float:
        """Seconds; 0 without a token."""
        return self.token_times[0] if self.token_times else 0.0

    @property
    def inter_token_p50(self) -> float:
        """Median of the seconds between tokens; tokens of one step arrive together."""
        return self._inter_token(0.50)

    @property
    def inter_token_p99(self) -> float:
        """99th percentile of the seconds between tokens."""
        return self._inter_token(0.99)

    def _inter_token(self, quantile: float) -> float:
        times = self.token_times
        gaps = sorted(after - before for before, after in zip(times, times[1:], strict=False))
        return gaps[min(int(quantile * len(gaps)), len(gaps) - 1)] if gaps else 0.0

    def to_dict(self) -> dict[str, Any]:
        """The JSON form; rates in tokens per second, ``inter_token_ms`` in milliseconds."""
        return {
            "prompt_tokens": self.prompt_tokens,
            "new_tokens": self.new_tokens,
            "steps": len(self.steps),
            "gamma_histogram": {str(g): n for g, n in self.gamma_histogram.items()},
            "acceptance_rate": self.acceptance_rate,
            "tokens_per_step": self.tokens_per_step,
            "tokens_per_second": self.tokens_per_second,
            "decode_tokens_per_second": self.decode_tokens_per_second,
            "seconds": dict(self.seconds),
            "time_to_first_token": self.time_to_first_token,
            "inter_token_ms": {
                "p50": self.inter_token_p50 * 1e3,
                "p99": self.inter_token_p99 * 1e3,
            },
        }
