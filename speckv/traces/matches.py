"""What a decision is told of text that repeats itself, at every place of an answer."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from ..kernels.layout import GAMMA_MAX, MATCH_MAX, WIDTH_MAX


def match_lengths(
    prompt: Sequence[int], answer: np.ndarray, draft_tokens: np.ndarray
) -> np.ndarray:
    """Word MATCH_LENGTH of a step that begins at each place, after each number of draft tokens.

    It is `speckv.kernels.reference.latest_match` of the text before the place, as long as the draft
    tokens are those that came in the match too.

    Parameters
    ----------
    prompt : sequence of int
    answer : int32 [N]
    draft_tokens : int32 [N, GAMMA_MAX]
        From each place on.

    Returns
    -------
    int8 [N, WIDTH_MAX]
        Column j: after j draft tokens.
    """
    text = [*prompt, *answer.tolist()]
    latest: dict[tuple[int, ...], int] = {}
    found = np.zeros((len(answer), WIDTH_MAX), dtype=np.int8)
    for length in range(1, len(text)):
        place = length - len(prompt)
        if place >= 0:
            found[place] = _followed(text, length, latest, draft_tokens[place])
        for n in range(1, min(MATCH_MAX, length) + 1):
            latest[tuple(text[length - n : length])] = length
    return found


def _followed(
    text: list[int], length: int, latest: dict[tuple[int, ...], int], draft: np.ndarray
) -> np.ndarray:
    """Of the first ``length`` tokens of a text, whose n-grams but the last ones are known."""
    for n in range(min(MATCH_MAX, length), 0, -1):
        after = latest.get(tuple(text[length - n : length]))
        if after is not None:
            came = np.full(GAMMA_MAX, -1)
            known = text[after : min(after + GAMMA_MAX, length)]
            came[: len(known)] = known
            return n * np.cumprod(np.append(True, came == draft))
    return np.zeros(WIDTH_MAX, dtype=np.int64)
