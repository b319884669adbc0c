"""`reference.draft_step` on cases worked by hand."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor

from speckv.kernels import layout as at
from speckv.kernels import reference
from tests.kernels.cases import GuardedState, fixed, threshold

pytestmark = pytest.mark.interpreter

INF = math.inf


def step(logits: list[list[float]] | Tensor, start: GuardedState | None = None, **options: object):
    """The state after one step on these logits."""
    x = torch.as_tensor(logits)
    guarded = start or GuardedState(x.shape[0])
    options.setdefault("policy", fixed())
    reference.draft_step(x, guarded.state, **options)
    return guarded.state


def log(*probabilities: float) -> list[float]:
    return [math.log(p) if p else -INF for p in probabilities]


@pytest.mark.parametrize(
    ("logits", "token", "signals"),
    [
        pytest.param([0.0] * 4, 0, (2.0, 0.25, 0.0, 0.25), id="uniform"),
        pytest.param(log(0.25, 0.5, 0.125, 0.125), 1, (1.75, 0.5, 0.25, 0.5), id="dyadic"),
        pytest.param(log(0.0, 1.0, 0.0), 1, (0.0, 1.0, 1.0, 1.0), id="one-hot"),
        pytest.param([7.0], 0, (0.0, 1.0, 1.0, 1.0), id="vocabulary of one"),
        pytest.param([-3e38, 3e38, -3e38], 1, (0.0, 1.0, 1.0, 1.0), id="extreme"),
        pytest.param([-INF, 2.0, 2.0, -INF], 1, (1.0, 0.5, 0.0, 0.5), id="tie"),
    ],
)
def test_signals(logits: list[float], token: int, signals: tuple[float, ...]) -> None:
    state = step([logits])
    assert int(state.sequence[0, 3]) == token
    assert state.signals[0, 0].tolist() == pytest.approx(signals, abs=1e-6)
    entropy, confidence, margin, _ = signals
    expected = [entropy, entropy, confidence, confidence, entropy, confidence, margin, 0.5]
    assert state.running[0].tolist() == pytest.approx(expected, abs=1e-6)
    assert int(state.rows[0, at.DRAFTED]) == 1


def test_features_run_over_the_step() -> None:
    guarded = GuardedState(1)
    state = step([log(0.5, 0.5)], guarded)  # 1 bit, confidence 0.5
    step([log(0.25, 0.25, 0.25, 0.25)], guarded)  # 2 bits, 0.25
    step([log(0.0, 1.0)], guarded)  # 0 bits, 1
    assert state.running[0].tolist() == pytest.approx(
        [1.0, 2.0, 1.75 / 3, 0.25, 0.0, 1.0, 1.0, 0.5], abs=1e-6
    )
    assert state.sequence[0, 3:6].tolist() == [0, 0, 1]
    assert state.signals[0, :3, at.ENTROPY].tolist() == pytest.approx([1.0, 2.0, 0.0], abs=1e-6)
    state.rows[0, at.DRAFTED] = 0  # the next step starts over
    step([log(0.5, 0.5)], guarded)
    assert state.running[0, : at.LAST_ENTROPY].tolist() == pytest.approx([1.0, 1.0, 0.5, 0.5])


@pytest.mark.parametrize("bad", [math.nan, INF, -INF])
@pytest.mark.parametrize("sampled", [False, True])
def test_a_row_without_a_token_ends_and_says_so(bad: float, sampled: bool) -> None:
    logits = [[bad] * 3, [0.0, 1.0, 2.0]] if bad == -INF else [[1.0, bad, 2.0], [0.0, 1.0, 2.0]]
    options = {"inv_temperature": torch.ones(2), "seeds": torch.arange(2)} if sampled else {}
    guarded = GuardedState(2)
    before = guarded.clone().state
    state = step(logits, guarded, **options)
    expected = before.rows[0].clone()
    expected[at.ERROR], expected[at.STOP] = at.ERROR_DRAFT, 1
    expected[at.DONE] = at.DONE_ERROR
    assert torch.equal(state.rows[0], expected)
    assert torch.equal(state.sequence[0], before.sequence[0])
    assert torch.equal(state.running[0], before.running[0])
    assert int(state.rows[1, at.ERROR]) == 0 and int(state.rows[1, at.DRAFTED]) == 1


def test_a_cutoff_above_every_logit_is_an_error() -> None:
    options = {"inv_temperature": torch.ones(1), "seeds": torch.zeros(1, dtype=torch.int64)}
    ids = torch.tensor([2, 1, 0], dtype=torch.int32)
    for id_map in (None, ids):
        state = step([[0.0, 1.0, 2.0]], cutoffs=torch.tensor([3.0]), id_map=id_map, **options)
        assert int(state.rows[0, at.ERROR]) == at.ERROR_DRAFT


@pytest.mark.parametrize("word", [at.DONE, at.STOP])
def test_done_and_stopped_rows_are_left_alone(word: int) -> None:
    guarded = GuardedState(2)
    guarded.state.rows[1, word] = 1
    before = guarded.clone()
    step([[0.0, 1.0], [math.nan, 1.0]], guarded)
    for now, then in zip(
        guarded.state.__dict__.values(), before.state.__dict__.values(), strict=True
    ):
        assert torch.equal(now[1], then[1])
    assert int(guarded.state.rows[0, at.DRAFTED]) == 1


def test_stop_is_the_decision_after_this_token() -> None:
    policy = threshold(at.MODE_ENTROPY, 1.5)
    state = step([log(0.5, 0.5, 0.0, 0.0), [0.0] * 4], policy=policy)
    assert state.rows[:, at.STOP].tolist() == [0, 1]


def test_sampling_adds_the_noise_of_the_position() -> None:
    x = torch.linspace(-1.0, 1.0, 50).repeat(2, 1)
    seeds, inv = torch.tensor([9, 10]), torch.tensor([0.5, 2.0])
    state = step(x, inv_temperature=inv, seeds=seeds)
    for b, length in enumerate((3, 4)):
        noise = reference.gumbel(int(seeds[b]), 100 + 13 * b, length, torch.arange(50))
        assert int(state.sequence[b, length]) == int((x[b] * inv[b] + noise).argmax())


def test_rejection_noise_is_keyed_by_step_and_draft_index() -> None:
    guarded = GuardedState(1)
    guarded.state.rows[0, at.STEP] = 21
    options = {"inv_temperature": torch.ones(1), "seeds": torch.tensor([4])}
    x = torch.zeros(1, 64)
    for drafted in range(2):
        state = step(x, guarded, coupling="rejection", **options)
        purpose = at.NOISE_DRAFT | drafted << 8
        noise = reference.gumbel(4, 100, 21, torch.arange(64), purpose)
        assert int(state.sequence[0, 3 + drafted]) == int(noise.argmax())


def test_id_map_names_the_token_and_keys_the_noise() -> None:
    ids = torch.tensor([40, 7, 900, 3], dtype=torch.int32)
    assert int(step([[0.0, 5.0, 1.0, 5.0]], id_map=ids).sequence[0, 3]) == 7
    options = {"inv_temperature": torch.ones(1), "seeds": torch.tensor([4])}
    state = step([[0.0] * 4], id_map=ids, **options)
    noise = reference.gumbel(4, 100, 3, ids.long())
    assert int(state.sequence[0, 3]) == int(ids[noise.argmax()])


def test_sampling_keeps_what_reaches_the_cutoff_and_signals_do_not_see_it() -> None:
    x = torch.zeros(1, 200)
    x[0, 17] = x[0, 60] = 0.5
    options = {"inv_temperature": torch.ones(1), "cutoffs": torch.tensor([0.5])}
    drawn = set()
    for seed in range(12):
        state = step(x, seeds=torch.tensor([seed]), **options)
        drawn.add(int(state.sequence[0, 3]))
        assert float(state.running[0, at.LAST_CONFIDENCE]) < 0.01
    assert drawn == {17, 60}


def test_temperature_zero_is_greedy_among_sampled_rows() -> None:
    x = torch.randn(2, 30, generator=torch.Generator().manual_seed(0))
    options = {"inv_temperature": torch.tensor([0.0, 1.0]), "seeds": torch.tensor([1, 1])}
    state = step(x, **options)
    assert int(state.sequence[0, 3]) == int(x[0].argmax())
