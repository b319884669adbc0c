"""Decisions of a replay: their features against the reference's state, their outcomes by hand."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import pytest

from speckv.kernels import layout as at
from speckv.kernels import reference
from speckv.kernels.layout import GAMMA_MAX
from speckv.policies import parse_policy
from speckv.traces.baselines import Static
from speckv.traces.decisions import decisions, join_decisions, running_features
from speckv.traces.packed import PackedController
from speckv.traces.replay import Controller, replay
from speckv.traces.schema import Answer, Trace
from tests.traces.synthetic import COST, made_up_trace


class Recording:
    """A controller, and the features that the kernels' reference would have at each decision."""

    def __init__(self, inner: PackedController) -> None:
        self.inner, self.seen = inner, []  # type: ignore[var-annotated]

    def start(self, answers: Sequence[Answer]) -> None:
        self.inner.start(answers)

    def begins(self, lanes: np.ndarray, length: np.ndarray, match: np.ndarray) -> np.ndarray:
        self._note(lanes, length, 0, match)
        return self.inner.begins(lanes, length, match)

    def goes_on(
        self,
        lanes: np.ndarray,
        length: np.ndarray,
        drafted: int,
        signals: np.ndarray,
        match: np.ndarray,
    ) -> np.ndarray:
        more = self.inner.goes_on(lanes, length, drafted, signals, match)
        self._note(lanes, length, drafted, match)
        return more

    def learns(self, lanes: np.ndarray, gamma: np.ndarray, accepted: np.ndarray) -> None:
        self.inner.learns(lanes, gamma, accepted)

    def _note(self, lanes: np.ndarray, length: np.ndarray, drafted: int, match: np.ndarray) -> None:
        told = (lanes.tolist(), length.tolist(), match.tolist())
        for lane, place, matched in zip(*told, strict=True):
            running = self.inner._running[lane].copy()
            if running[at.LAST_ENTROPY] >= 0:
                self.seen.append((lane, place, drafted, *running.tolist(), matched))


@pytest.fixture(scope="module")
def trace() -> Trace:
    return made_up_trace(prompts=9, length=40, compressions=("int8",), temperatures=(0.0,))


@pytest.mark.parametrize("name", ["fixed:3", "confidence:0.7", "paper"])
def test_features_are_those_of_the_loop(trace: Trace, name: str) -> None:
    recording = Recording(PackedController(parse_policy(name).pack("int8", COST)))
    found = decisions(trace, replay(trace, recording, COST))
    names = [*range(at.FEATURE_DRAFTED), at.FEATURE_DRAFTED]
    names += [at.FEATURE_ACCEPTANCE, at.FEATURE_MATCH]
    ours = found.features[:, names]
    theirs = np.array([[*row[3 : 3 + 7], row[2], *row[10:]] for row in recording.seen])
    assert len(ours) == len(theirs) > 300
    order, other = np.lexsort(ours.T.round(4)), np.lexsort(theirs.T.round(4))
    np.testing.assert_allclose(ours[order], theirs[other], rtol=0, atol=2e-3)
    assert (found.features[:, at.FEATURE_COMPRESSION : at.FEATURE_ACCEPTANCE] == [0, 1, 0]).all()
    assert found.features[:, at.FEATURE_MATCH].any()
    assert not found.features[:, at.FEATURE_MATCH + 1 :].any()


def test_running_features_fold_as_the_reference_does(trace: Trace) -> None:
    signals = trace.rows.signals[:5]
    found = running_features(signals)
    for row in range(5):
        running = [*at.RUNNING_START]
        for place in range(GAMMA_MAX):
            running = reference.fold_signals(running, signals[row, place].tolist(), place)
            np.testing.assert_allclose(found[row, place], running[:7], rtol=1e-5, atol=1e-6)


def test_outcomes_are_those_of_the_trace(trace: Trace) -> None:
    found = replay(trace, Static({}, 2), COST)
    examples = decisions(trace, found)
    drafted = examples.features[:, at.FEATURE_DRAFTED]
    at_two = examples.take(drafted == 2)
    hits = sum(
        min(int(trace.rows.accepted[trace.first[lane] + place]), 2) == 2
        for lane in range(len(trace.answers))
        for place, gamma in _steps(found.steps_of(lane))
        if gamma == 2
    )
    assert at_two.survived[:, 1].sum() == hits > 20
    assert (np.diff(examples.survived.astype(int), axis=1) <= 0).all()


def test_what_a_cut_text_does_not_show_is_unknown(trace: Trace) -> None:
    examples = decisions(trace, replay(trace, Static({}, 15), COST))
    assert examples.known[examples.survived].all()
    unknown = ~examples.known.all(axis=1)
    assert 0 < unknown.sum() < len(examples) / 2
    ended = trace.where(lambda answer: answer.prompt_id % 3 == 0)
    assert decisions(ended, replay(ended, Static({}, 15), COST)).known.all()


def test_looking_ahead_adds_what_was_not_drafted(trace: Trace) -> None:
    found = replay(trace, Static({}, 2), COST)
    plain, ahead = decisions(trace, found), decisions(trace, found, ahead=3)
    assert plain.features[:, at.FEATURE_DRAFTED].max() == 2
    assert ahead.features[:, at.FEATURE_DRAFTED].max() == 5
    joined = join_decisions([plain, ahead])
    assert len(joined) == len(plain) + len(ahead)
    assert (joined.prompt[: len(plain)] == plain.prompt).all()


def test_mistakes() -> None:
    both = made_up_trace()
    never: Controller = Static({}, 0)
    with pytest.raises(ValueError, match=r"expected one compression, got \['fp32', 'int8'\]"):
        decisions(both, replay(both, never, COST))
    with pytest.raises(ValueError, match="expected at least one, got none"):
        join_decisions([])


def _steps(steps: list[tuple[int, int]]) -> list[tuple[int, int]]:
    """(place, γ) of each step."""
    place, found = 1, []
    for gamma, accepted in steps:
        found.append((place, gamma))
        place += accepted + 1
    return found
