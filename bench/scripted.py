"""A draft that says what was recorded: real forwards, and injected signals and acceptance.

Models with random weights cost what trained ones cost, but agree on nothing. To measure a policy on
them, the draft's logits are replaced, after its forward has run, by rows made from a recorded
trace: the likeliest token is the target's own where the trace's draft was right, and another where
it was not; its probability and the row's entropy are the recorded ones. The loop, its kernels and
its losslessness are the real ones. Numbers got this way say so.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from speckv.kernels import layout as at
from speckv.models.base import CausalModel
from speckv.models.cache import KVCache
from speckv.traces.schema import Trace


@dataclass(frozen=True)
class Script:
    """What a draft says of each token of an answer after its first.

    Attributes
    ----------
    right : list of bool
        Whether its token is the target's.
    confidence, entropy : list of float
        Of its distribution; entropy in bits.
    """

    right: list[bool]
    confidence: list[float]
    entropy: list[float]

    def __len__(self) -> int:
        return len(self.right)


def scripts(trace: Trace, compression: str, length: int, count: int) -> list[Script]:
    """The first ``count`` greedy answers of a trace with at least ``length`` positions.

    Raises
    ------
    ValueError
        If there are fewer.
    """
    found: list[Script] = []
    for index, answer in enumerate(trace.answers):
        if (answer.compression, answer.temperature) != (compression, 0.0):
            continue
        if trace.lengths[index] <= length:  # the last row has nothing to say
            continue
        at_row = slice(int(trace.first[index]), int(trace.first[index]) + length)
        signals = trace.rows.signals[at_row, 0]
        found.append(
            Script(
                right=(trace.rows.accepted[at_row] > 0).tolist(),
                confidence=signals[:, at.CONFIDENCE].tolist(),
                entropy=signals[:, at.ENTROPY].tolist(),
            )
        )
        if len(found) == count:
            return found
    raise ValueError(
        f"trace: expected {count} greedy answers of {length} positions in {compression}, "
        f"got {len(found)}"
    )


def logits_of(confidence: float, entropy: float, token: int, vocabulary: int) -> Tensor:
    """A row [vocabulary] whose softmax has this top probability and, as near as can be, entropy.

    The rest of the mass is spread evenly over as many tokens as the entropy asks for: between those
    that keep it below the top and the whole vocabulary.
    """
    rest = 1.0 - confidence
    row = torch.full((vocabulary,), -math.inf)
    row[token] = 0.0
    if rest <= 0.0:
        return row
    bits = (entropy + confidence * math.log2(confidence)) / rest + math.log2(rest)
    fewest = math.floor(rest / confidence) + 1
    others = min(max(round(2.0 ** min(bits, 30.0)), fewest), vocabulary - 1)
    index = (token + 1 + torch.arange(others)) % vocabulary
    row[index] = math.log(rest / others / confidence)
    return row


class ScriptedDraft:
    """A draft whose forwards run, and whose logits are a script's.

    Parameters
    ----------
    model : CausalModel
    first : int
        Position of the second token of the answers, which scripts begin with.
    capacity : int
        Most tokens of a sequence.
    """

    def __init__(self, model: CausalModel, first: int, capacity: int) -> None:
        self._model, self._first = model, first
        self._table = torch.zeros(
            capacity + 32, model.vocab_size, dtype=model.dtype, device=model.device
        )

    def __getattr__(self, name: str) -> Any:
        return getattr(self._model, name)

    def follow(self, script: Script, tokens: Sequence[int]) -> None:
        """Speak of ``tokens``, the target's answer after its first token, from now on."""
        for i, (token, right) in enumerate(zip(tokens, script.right, strict=False)):
            said = token if right else (token + 1) % self._model.vocab_size
            row = logits_of(script.confidence[i], script.entropy[i], said, self._model.vocab_size)
            self._table[self._first + i] = row.to(self._table)

    def forward(
        self,
        tokens: Tensor,
        start: Any,
        cache: KVCache,
        *,
        slots: Any = None,
        select: Any = None,
        context: int | None = None,
    ) -> Tensor:
        """The model's forward, then the script's rows for the positions after the selected ones."""
        self._model.forward(tokens, start, cache, slots=slots, select=select, context=context)
        if isinstance(start, Tensor) and start.ndim == 2:
            next_one = start[:, select if isinstance(select, int) else 0] + 1
        else:
            first = torch.as_tensor(start, device=self._table.device)
            column = torch.as_tensor(0 if select is None else select, device=first.device)
            next_one = first + column + 1
        rows = self._table.index_select(0, next_one.reshape(-1))
        return rows if select is not None else rows[:, None]

    def prefill(self, *arguments: Any, **options: Any) -> Tensor | None:
        """The model's."""
        return self._model.prefill(*arguments, **options)
