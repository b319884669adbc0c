"""A pair that says what was recorded: real forwards, and injected text, signals and acceptance.

Models with random weights cost what trained ones cost, but agree on nothing. To measure a policy on
them, logits are replaced, after a forward has run, by rows made from a recorded trace. The target
says the recorded text after the recorded prompt, so that what a policy is told of text that repeats
itself is real; the draft says the recorded tokens, right and wrong ones, and its rows have the
recorded probability of the likeliest token, its margin and its entropy. The loop, its kernels and
its losslessness are the real ones. Numbers got this way say so.

What is synthetic: after a wrong draft token the draft goes on as it did on the true text; beyond
the second token a row's mass is spread evenly.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from speckv.kernels import layout as at
from speckv.models.base import CausalModel
from speckv.models.cache import KVCache

if TYPE_CHECKING:
    from speckv.traces.schema import Trace

_SURE = 30.0
"""How far the target's token stands above all others."""
_ROOM = 32


@dataclass(frozen=True)
class Script:
    """What is said of each token of an answer.

    Attributes
    ----------
    prompt : list of int
    answer : list of int
    proposed : list of int
        The draft's token at each place.
    confidence, entropy, margin : list of float
        Of the draft's distribution; entropy in bits.
    """

    prompt: list[int]
    answer: list[int]
    proposed: list[int]
    confidence: list[float]
    entropy: list[float]
    margin: list[float]


def scripts(
    trace: Trace, compression: str, length: int, count: int, vocabulary: int
) -> list[Script]:
    """The first ``count`` greedy answers of a trace with at least ``length`` tokens, cut to these.

    Ids beyond a smaller ``vocabulary`` wrap around.

    Raises
    ------
    ValueError
        If there are fewer.
    """
    found: list[Script] = []
    for index, answer in enumerate(trace.answers):
        if (answer.compression, answer.temperature) != (compression, 0.0):
            continue
        rows = slice(int(trace.first[index]), int(trace.first[index]) + length)
        if trace.lengths[index] < length or not trace.rows.drafted[rows][1:].all():
            continue
        said = [int(t) % vocabulary for t in trace.rows.target_token[rows]]
        right = (trace.rows.accepted[rows] > 0).tolist()
        proposed = [int(t) % vocabulary for t in trace.rows.draft_tokens[rows, 0]]
        for i, token in enumerate(said):
            if right[i]:
                proposed[i] = token
            elif proposed[i] == token:  # only where ids wrap around
                proposed[i] = (token + 1) % vocabulary
        signals = trace.rows.signals[rows, 0]
        found.append(
            Script(
                prompt=[token % vocabulary for token in answer.prompt_tokens],
                answer=said,
                proposed=proposed,
                confidence=signals[:, at.CONFIDENCE].tolist(),
                entropy=signals[:, at.ENTROPY].tolist(),
                margin=signals[:, at.MARGIN].tolist(),
            )
        )
        if len(found) == count:
            return found
    raise ValueError(
        f"trace: expected {count} greedy answers of {length} positions in {compression}, "
        f"got {len(found)}"
    )


def logits_of(
    confidence: float, entropy: float, margin: float, token: int, vocabulary: int
) -> Tensor:
    """A row [vocabulary] whose softmax has this top probability and margin, and nearly the entropy.

    What the two likeliest tokens leave is spread evenly over as many others as the entropy asks
    for: between those that keep it below the second and the whole vocabulary.
    """
    row = torch.full((vocabulary,), -math.inf)
    row[token] = 0.0
    second = min(max(confidence - margin, 0.0), 1.0 - confidence)
    rest = 1.0 - confidence - second
    if second > 0.0:
        row[(token + 1) % vocabulary] = math.log(second / confidence)
    if second <= 0.0 or rest <= 0.0:
        return row
    known = confidence * math.log2(confidence) + second * math.log2(second)
    bits = (entropy + known) / rest + math.log2(rest)
    fewest = min(math.floor(rest / second) + 1, vocabulary - 2)
    others = min(max(round(2.0 ** min(bits, 30.0)), fewest), vocabulary - 2)
    index = (token + 2 + torch.arange(others)) % vocabulary
    row[index] = math.log(rest / others / confidence)
    return row


class _Scripted:
    """A model whose forwards run, and whose logits are those of a table, by position.

    Parameters
    ----------
    model : CausalModel
    capacity : int
        Most tokens of a sequence.
    """

    def __init__(self, model: CausalModel, capacity: int) -> None:
        self._model = model
        self._table = torch.zeros(
            capacity + _ROOM, model.vocab_size, dtype=model.dtype, device=model.device
        )

    def __getattr__(self, name: str) -> Any:
        return getattr(self._model, name)

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
        """The model's forward, then the table's rows for the positions after those asked for."""
        self._model.forward(tokens, start, cache, slots=slots, select=select, context=context)
        device = self._table.device
        places = torch.as_tensor(start, device=device)
        if places.ndim == 1:
            places = places[:, None] + torch.arange(tokens.shape[1], device=device)
        if isinstance(select, int):
            places = places[:, select]
        elif select is not None:
            columns = torch.as_tensor(select, device=device).long()
            places = places.gather(1, columns[:, None])[:, 0]
        rows = self._table.index_select(0, places.reshape(-1) + 1)
        return rows.view(*places.shape, -1)

    def prefill(
        self,
        tokens: Tensor,
        cache: KVCache,
        slot: int,
        *,
        start: int = 0,
        want_logits: bool = True,
    ) -> Tensor | None:
        """The model's, then the table's row for the position after."""
        self._model.prefill(tokens, cache, slot, start=start, want_logits=want_logits)
        return self._table[start + len(tokens)].clone() if want_logits else None

    def _write(self, first: int, rows: Sequence[Tensor]) -> None:
        """The table's rows from position ``first`` on."""
        self._table.zero_()
        self._table[first : first + len(rows)] = torch.stack(list(rows)).to(self._table)


class ScriptedTarget(_Scripted):
    """A target that says what a script says."""

    def follow(self, script: Script) -> None:
        """Say this answer from now on."""
        rows = torch.full((len(script.answer), self._model.vocab_size), -_SURE)
        rows[torch.arange(len(rows)), torch.tensor(script.answer)] = 0.0
        self._write(len(script.prompt), [*rows])


class ScriptedDraft(_Scripted):
    """A draft that proposes what a script says."""

    def follow(self, script: Script) -> None:
        """Propose this from now on."""
        said = zip(script.confidence, script.entropy, script.margin, script.proposed, strict=True)
        vocabulary = self._model.vocab_size
        rows = [
            logits_of(confidence, entropy, margin, token, vocabulary)
            for confidence, entropy, margin, token in said
        ]
        self._write(len(script.prompt), rows)
