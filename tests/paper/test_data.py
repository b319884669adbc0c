"""Reading the released files: every column, the join, and one clear line for what is wrong."""

from __future__ import annotations

from collections.abc import Callable
from copy import deepcopy
from pathlib import Path

import pytest

from speckv.paper.data import COMPRESSIONS, RUN_FILE, SIGNALS, STEP_FILE, Released, load
from tests.paper.synthetic import Row, write_release

Rows = tuple[list[Row], list[Row]]


def test_every_column_is_read(released: Released, rows: Rows) -> None:
    steps, runs = released.steps, released.runs
    assert len(steps) == len(rows[0]) and len(runs) == len(rows[1])
    for i in range(0, len(steps), 17):
        row = rows[0][i]
        assert COMPRESSIONS[steps.compression[i]] == row["compression"]
        assert steps.tasks[steps.task[i]] == row["task"]
        assert steps.strata[i] == f"{row['compression']}/{row['task']}"
        assert (steps.gamma[i], steps.step[i]) == (row["gamma"], row["step"])
        assert (steps.accepted[i], steps.tokens[i]) == (row["accepted"], row["tokens_produced"])
        assert steps.acceptance[i] == pytest.approx(row["acceptance_rate"])
        assert steps.signals[i].tolist() == [row[name] for name in SIGNALS]
        index = COMPRESSIONS.index(row["compression"])
        assert steps.inputs[i].tolist() == [*steps.signals[i], index, row["gamma"]]
    assert runs.tokens.tolist() == [row["num_tokens"] for row in rows[1]]
    assert runs.seconds.tolist() == [row["elapsed_sec"] for row in rows[1]]


def test_steps_find_their_prompt(released: Released, rows: Rows) -> None:
    expected = [row["prompt"] for row in rows[1] for _ in range(row["num_steps"])]
    names = list(dict.fromkeys(row["prompt"] for row in rows[1]))
    assert [names[i] for i in released.prompt_of_step] == expected


def _set(file: int, index: int, **values: object) -> Callable[[Rows], None]:
    def change(rows: Rows) -> None:
        rows[file][index].update(values)

    return change


def _drop_step(rows: Rows) -> None:
    del rows[0][10]


def _drop_runs(rows: Rows) -> None:
    """All of nf4 at γ=6, with their steps."""
    for part in rows:
        part[:] = [r for r in part if (r["compression"], r["gamma"]) != ("nf4", 6)]


def _swap_runs(rows: Rows) -> None:
    rows[1][0], rows[1][1] = rows[1][1], rows[1][0]


BAD: dict[str, tuple[Callable[[Rows], None], str]] = {
    "compression": (_set(0, 3, compression="fp8"), r"row 4: compression: .*nf4, got 'fp8'"),
    "gamma": (_set(0, 0, gamma=3), r"row 1: gamma: expected one of 2, 4, 6, 8, got '3'"),
    "task": (_set(1, 0, task="poetry"), r"row 1: task: expected one of .*'poetry'"),
    "no task": (_set(0, 0, task=" "), r"row 1: task: expected some text"),
    "accepted": (_set(0, 1, accepted="-1"), r"row 2: accepted: expected a whole number"),
    "huge": (_set(0, 1, step="9" * 30), r"row 2: step: expected a whole number"),
    "fraction": (_set(0, 1, accepted="1.5"), r"row 2: accepted: expected a whole number"),
    "rate": (_set(0, 1, acceptance_rate="x"), r"row 2: acceptance_rate: expected a number from 0"),
    "nan": (_set(0, 1, mean_draft_entropy="nan"), r"row 2: mean_draft_entropy: expected a number"),
    "entropy": (_set(0, 1, max_draft_entropy=-1), r"max_draft_entropy: expected .* at least 0"),
    "confidence": (_set(0, 1, min_draft_confidence=1.1), r"expected a number from 0 to 1"),
    "no seconds": (_set(1, 2, elapsed_sec=0), r"row 3: elapsed_sec: expected a number above 0"),
    "no steps": (_set(1, 2, num_steps=0), r"row 3: num_steps: expected .* at least 1"),
    "too many": (_set(0, 1, accepted=9, tokens_produced=10), r"row 2: expected accepted <= gamma"),
    "tokens": (_set(0, 1, tokens_produced=99), r"row 2: .*tokens_produced = accepted \+ 1"),
    "no token": (_set(0, 1, accepted=0, tokens_produced=0, acceptance_rate=0), r"row 2: expected"),
    "low rate": (
        _set(0, 1, accepted=2, tokens_produced=3, acceptance_rate=0.5),
        r"row 2: .*acceptance_rate >= accepted / gamma, got 2, 2, 3 and 0.5",
    ),
    "a step less": (_drop_step, r"to be the steps of the runs"),
    "runs in another order": (_swap_runs, r"to be the steps of the runs"),
    "no runs of one kind": (_drop_runs, r"expected runs of nf4 at γ=6, got none"),
}


@pytest.mark.parametrize("name", BAD)
def test_bad_values_are_one_clear_line(name: str, rows: Rows, tmp_path: Path) -> None:
    change, expected = BAD[name]
    changed = deepcopy(rows)
    change(changed)
    with pytest.raises(ValueError, match=expected) as found:
        load(write_release(tmp_path, *changed))
    assert "\n" not in str(found.value) and str(tmp_path) in str(found.value)


def test_missing_and_unreadable_files(folder: Path, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="DIR: expected a folder with"):
        load(tmp_path / "absent")
    with pytest.raises(ValueError, match=rf"{STEP_FILE}: cannot be read \(No such file"):
        load(tmp_path)
    (tmp_path / STEP_FILE).write_bytes((folder / STEP_FILE).read_bytes())
    with pytest.raises(ValueError, match=rf"{RUN_FILE}: cannot be read"):
        load(tmp_path)
    bad = tmp_path / RUN_FILE
    for content, expected in (
        (b"", "expected a column 'compression', got none"),
        (b"a,b\n1,2\n", "expected a column 'compression', got none"),
        (b"\xff\xfe\x00", "expected a CSV file in UTF-8"),
        ((folder / RUN_FILE).read_bytes().splitlines()[0], "at least one row, got none"),
        (
            b"\n".join([(folder / RUN_FILE).read_bytes().splitlines()[0], b"fp16,2"]),
            "row 1: task: expected a value, got None",
        ),
    ):
        bad.write_bytes(content)
        with pytest.raises(ValueError, match=expected) as found:
            load(tmp_path)
        assert "\n" not in str(found.value)
