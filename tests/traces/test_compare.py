"""Comparisons: the split, the search, the intervals, and the figures against sums by hand."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest

from speckv.errors import PolicyError
from speckv.policies import CostTable
from speckv.traces import tuning
from speckv.traces.compare import POOLED, Comparison, compare, speedup_interval, split_prompts
from speckv.traces.replay import replay
from speckv.traces.schema import Trace
from speckv.traces.tuning import (
    BY_TASK,
    DEFAULT,
    FAMILIES,
    Family,
    best_settings,
    check_policy,
    tune,
)
from tests.traces.synthetic import COST, made_up_trace
from tests.traces.test_replay import controller

_FITTED = {"online-logistic": {"weight", "bias", "mean"}, "adaedl": {"threshold"}}
COSTS = {"fp32": COST, "int8": CostTable.from_parts(0.1, [2.0] * 16)}


@pytest.fixture(scope="module")
def trace() -> Trace:
    return made_up_trace(prompts=32, length=36)


@pytest.fixture(scope="module")
def found(trace: Trace) -> Comparison:
    return compare(trace, COSTS)


def test_the_split_is_by_prompt_and_task(trace: Trace) -> None:
    chosen = split_prompts(trace, 0.5, seed=0)
    assert len(chosen) == 16
    for task in range(4):
        assert len([p for p in chosen if p % 4 == task]) == 4
    assert chosen == split_prompts(trace, 0.5, seed=0) != split_prompts(trace, 0.5, seed=1)
    fewer = split_prompts(trace.where(lambda a: a.compression == "int8"), 0.5, seed=0)
    assert fewer == chosen, "the same prompts, whatever else the trace holds"


def test_every_policy_in_every_cell(found: Comparison) -> None:
    cells = found.cells
    assert [(c.compression, c.temperature) for c in cells] == [
        ("fp32", 0.0),
        ("fp32", 0.7),
        ("int8", 0.0),
        ("int8", 0.7),
    ]
    for cell in cells:
        assert [row.policy for row in cell.rows] == list(DEFAULT)
        assert cell.prompts == 16
        rows = {row.policy: row for row in cell.rows}
        assert rows["static"].over_static == 1.0 == rows["fixed:0"].over_plain
        assert rows["static"].over_static_95 == (1.0, 1.0) and rows["static"].gap_closed == 0.0
        assert rows["oracle"].gap_closed == 1.0 and rows["oracle"].regret == 0.0
        for row in cell.rows:
            assert 0 <= row.regret < 1 and row.over_static_95[0] <= row.over_static_95[1]
            assert sum(row.histogram) == sum(sum(t["histogram"]) for t in row.tasks.values())
            if row.policy in FAMILIES:
                assert set(row.settings) == set(row.search) | _FITTED.get(row.policy, set())
                assert set(row.on_edge) <= set(row.search)
                assert all(row.settings[k] in row.search[k] for k in row.search)
    # Signals that tell the truth are worth something.
    assert {r.policy: r for r in cells[0].rows}["confidence"].over_static > 1.0


def test_figures_are_those_of_the_judged_prompts(trace: Trace, found: Comparison) -> None:
    chosen = split_prompts(trace, 0.5, seed=0)
    own = trace.where(
        lambda a: (a.compression, a.temperature) == ("int8", 0.7) and a.prompt_id not in chosen
    )
    cost = COSTS["int8"]
    own_replay = replay(own, controller("fixed:4", cost), cost)
    row = {r.policy: r for r in found.cells[3].rows}["fixed:4"]
    assert row.tokens_per_second == pytest.approx(
        own_replay.tokens.sum() / own_replay.ms.sum() * 1e3
    )
    assert row.tokens_per_step == pytest.approx(own_replay.tokens.sum() / len(own_replay.gamma))
    assert row.histogram == np.bincount(own_replay.gamma, minlength=16).tolist()
    code = [i for i, a in enumerate(own.answers) if a.task == "code"]
    assert row.tasks["code"]["tokens_per_second"] == pytest.approx(
        own_replay.tokens[code].sum() / own_replay.ms[code].sum() * 1e3
    )


def test_ours_over_each_policy(found: Comparison) -> None:
    for cell in (*found.cells, *found.pooled):
        rows = {row.policy: row for row in cell.rows}
        ours = rows["speckv"]
        assert ours.ours_over_it == 1.0 and ours.ours_over_it_95 == (1.0, 1.0)
        assert rows["static"].ours_over_it == pytest.approx(ours.over_static)
        assert rows["static"].ours_over_it_95 == pytest.approx(ours.over_static_95)
        for row in cell.rows:
            low, high = row.ours_over_it_95
            assert low <= row.ours_over_it <= high
            assert row.ours_over_it == pytest.approx(ours.tokens_per_second / row.tokens_per_second)


def test_compressions_are_pooled_by_prompt(trace: Trace, found: Comparison) -> None:
    assert [(c.compression, c.temperature) for c in found.pooled] == [(POOLED, 0.0), (POOLED, 0.7)]
    for pooled in found.pooled:
        parts = [c for c in found.cells if c.temperature == pooled.temperature]
        assert pooled.prompts == 16 and pooled.tokens == sum(c.tokens for c in parts)
        for i, row in enumerate(pooled.rows):
            seconds = [c.tokens / c.rows[i].tokens_per_second for c in parts]
            assert row.tokens_per_second == pytest.approx(pooled.tokens / sum(seconds))
            assert row.histogram == np.sum([c.rows[i].histogram for c in parts], axis=0).tolist()
            assert row.settings == {}
            low, high = row.over_static_95
            assert low <= row.over_static <= high
    fewer = trace.where(lambda a: a.compression == "fp32" or a.prompt_id % 8)
    alone = compare(fewer, COSTS, ("static",))
    assert alone.pooled == [], "not the same prompts"
    assert np.isnan(alone.cells[0].rows[0].ours_over_it)


def test_the_search_finds_the_best_of_the_training_prompts(trace: Trace) -> None:
    train = trace.where(lambda a: a.compression == "fp32" and a.temperature == 0.0)
    times = [replay(train, controller(f"fixed:{g}"), COST).ms.sum() for g in (0, 1, 4, 15)]
    tuned = tune("static", train, "fp32", COST)
    best = replay(train, tuned.controller, COST).ms.sum()
    assert best <= min(times)
    by_task = tune(BY_TASK, train, "fp32", COST)
    assert replay(train, by_task.controller, COST).ms.sum() <= best
    assert set(by_task.settings) == {"code", "math", "chat", "summarization"}


def test_an_optimum_on_the_edge_of_its_range_is_told(trace: Trace) -> None:
    train = trace.where(lambda a: a.compression == "fp32" and a.temperature == 0.0)

    def edges(values: tuple[float, ...], bounds: tuple[float, ...] = ()) -> tuple[str, ...]:
        build = FAMILIES["static"].build
        family = Family({"gamma": values}, build, {"gamma": bounds})
        return family.on_edge(best_settings(family, train, COST))

    best = int(best_settings(FAMILIES["static"], train, COST)["gamma"])
    assert 1 < best < 14
    assert edges((best - 1, best, best + 1)) == ()
    assert edges((best, best + 1)) == edges((best - 1, best)) == ("gamma",)
    assert edges((best - 1, best), bounds=(best,)) == ()
    useless = replace(train.rows, accepted=np.zeros_like(train.rows.accepted))
    for name, family in FAMILIES.items():
        found = tune(name, replace(train, rows=useless), "fp32", COST)
        assert "cap" not in found.on_edge and "gamma" not in found.on_edge, "there is no less"
        assert set(found.search) == set(family.search)


def test_a_search_by_steps_finds_what_trying_everything_finds(
    trace: Trace, monkeypatch: pytest.MonkeyPatch
) -> None:
    train = trace.where(lambda a: a.compression == "fp32" and a.temperature == 0.0)
    family = FAMILIES["confidence"]
    everything = best_settings(family, train, COST)
    monkeypatch.setattr(tuning, "_EXHAUSTIVE", 1)
    by_steps = best_settings(family, train, COST)
    times = [
        replay(train, family.build(settings, train, COST), COST).ms.sum()
        for settings in (everything, by_steps)
    ]
    assert times[1] <= 1.002 * times[0]


def test_tuning_sees_no_judged_prompt(trace: Trace) -> None:
    """Rubbish on the judged side changes no setting."""
    trace = trace.where(lambda a: a.compression == "fp32" and a.temperature == 0.0)
    chosen = split_prompts(trace, 0.5, seed=0)
    judged = np.repeat([a.prompt_id not in chosen for a in trace.answers], trace.lengths)
    accepted = trace.rows.accepted.copy()
    accepted[judged] = 0
    changed = replace(trace, rows=replace(trace.rows, accepted=accepted))
    names = ("static", "svip", "hf-confidence", "static-by-task")
    for ours, theirs in zip(
        compare(trace, COSTS, names).cells, compare(changed, COSTS, names).cells, strict=True
    ):
        assert [r.settings for r in ours.rows] == [r.settings for r in theirs.rows]


def test_intervals_cover_the_truth() -> None:
    """In 95% or so of samples of prompts; the policies' times go together, so pairing matters."""
    rng = np.random.default_rng(0)
    covered, widths = 0, []
    for seed in range(200):
        base = rng.gamma(4.0, 1.0, 60)
        ms = base * rng.normal(1.0, 0.1, 60) / 1.1
        low, high = speedup_interval(ms, base, resamples=500, seed=seed)
        covered += low <= 1.1 <= high
        widths.append(high - low)
    assert 180 <= covered <= 198
    assert np.mean(widths) < 0.1


def test_intervals_without_time() -> None:
    assert all(np.isnan(speedup_interval(np.zeros(3), np.zeros(3))))


def test_what_is_refused(trace: Trace) -> None:
    with pytest.raises(ValueError, match="costs: expected a table for int8, got none"):
        compare(trace, {"fp32": COST})
    with pytest.raises(ValueError, match="expected a number between 0 and 1, got 1"):
        compare(trace, COSTS, train_share=1)
    one = trace.where(lambda a: a.prompt_id == 3)
    with pytest.raises(ValueError, match="prompts to tune on and others to judge on, got 1 prom"):
        compare(one, COSTS)
    for name in (*FAMILIES, BY_TASK, "oracle", "fixed:3", "entropy:2", "paper"):
        check_policy(name)
    with pytest.raises(ValueError, match="got 'magic'; or one of static, .*, oracle"):
        check_policy("magic")
    with pytest.raises(PolicyError, match="no such file"):
        check_policy("file:/nowhere.safetensors")
