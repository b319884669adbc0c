"""``speckv report``: one HTML file that needs no other, plots of every kind, and JSON."""

from __future__ import annotations

import base64
import html
import json
import re
import struct
from dataclasses import replace
from pathlib import Path
from typing import Any

import matplotlib.figure
import numpy as np
import pytest

from speckv import cli
from speckv.kernels.layout import WIDTH_MAX
from speckv.models.hub import CACHE_VARIABLE
from speckv.traces import tries
from speckv.traces.compare import compare, split_prompts
from speckv.traces.known import INFORMATION
from speckv.traces.plots import CAPTIONS, PLOTS
from speckv.traces.schema import Trace, write_trace
from speckv.traces.study import Study
from speckv.traces.tries import COUNT
from tests.traces.synthetic import COST, made_up_trace
from tests.traces.test_schema import parts_of

POLICIES = ["fixed:0", "fixed:2", "fixed:6", "static", "confidence:0.5", "speckv", "oracle"]


@pytest.fixture(scope="module")
def trace() -> Trace:
    return made_up_trace(prompts=16, length=30)


@pytest.fixture(scope="module")
def path(trace: Trace, tmp_path_factory: pytest.TempPathFactory) -> Path:
    file = tmp_path_factory.mktemp("trace") / "trace.parquet"
    write_trace(file, trace.info, parts_of(trace))
    return file


@pytest.fixture(autouse=True)
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(CACHE_VARIABLE, str(tmp_path / "cache"))


def axes_of(study: Study, name: str) -> Any:
    axes = matplotlib.figure.Figure().add_subplot()
    PLOTS[name](study, axes)
    return axes


@pytest.fixture(scope="module")
def study(trace: Trace) -> Study:
    costs = {"fp32": COST, "int8": COST}
    return Study(trace, costs, compare(trace, costs, POLICIES), split_prompts(trace, 0.5, 0))


def test_another_pairs_predictions_are_not_shown_as_its_own(study: Study) -> None:
    axes = axes_of(study, "calibration")
    assert axes.get_title() == "no policy was trained for this pair"
    assert len(axes.lines) == 1, "the diagonal alone"


@pytest.mark.parametrize("trained", [False, True])
def test_the_page_holds_everything(path: Path, tmp_path: Path, trained: bool) -> None:
    if trained:
        assert cli.run(["train", str(path), "--rounds", "1", "--seeds", "1"]) == 0
    out = tmp_path / "new" / "folder"
    assert cli.run(["report", str(path), "--out", str(out), "--policies", ",".join(POLICIES)]) == 0
    assert {file.name for file in out.iterdir()} == {
        "report.html",
        "report.json",
        *(f"{name}.png" for name in PLOTS),
    }
    page = (out / "report.html").read_text(encoding="utf-8")
    assert not re.search(r'(src|href)="(?!data:)', page), "it needs no other file"
    images = re.findall(r'src="data:image/png;base64,([^"]+)"', page)
    assert len(images) == len(PLOTS) == len(CAPTIONS)
    for image in images:
        data = base64.b64decode(image)
        assert data[:8] == b"\x89PNG\r\n\x1a\n" and struct.unpack(">I", data[16:20])[0] > 500
    document = json.loads((out / "report.json").read_text())
    cells, pooled = document["cells"], document["pooled"]
    assert (len(cells), len(pooled)) == (4, 2) and page.count("<h2>") == 6
    for cell in (*cells, *pooled):
        for row in cell["rows"]:
            assert f"<td>{row['policy']}</td><td>{row['tokens_per_second']:.1f}</td>" in page


def test_what_else_was_tried(path: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(tries._SETTINGS, "max_iter", 3)
    out = tmp_path / "report"
    arguments = ["report", str(path), "--out", str(out), "--policies", "static", "--tries"]
    assert cli.run(arguments) == 0
    page = (out / "report.html").read_text(encoding="utf-8")
    found = json.loads((out / "report.json").read_text())["tries"]
    assert len(found) == page.count("<h3>") == 2
    assert [each["temperature"] for each in found] == [0.0, 0.7]
    for cell in found:
        names = [each["name"] for each in cell["tries"]]
        assert [*INFORMATION] == names[: len(INFORMATION)]
        assert len(names) == len(set(names)) == COUNT
        for each in cell["tries"]:
            low, high = each["over_static_95"]
            assert low <= each["over_static"] <= high and each["gap_closed"] <= 1
            assert html.escape(each["name"]) in page


def test_the_best_gamma_is_the_fastest_that_was_replayed(study: Study) -> None:
    rows = {row.policy: row.tokens_per_second for row in study.found.cells[0].rows}
    lines = axes_of(study, "best_gamma").get_lines()
    assert lines[0].get_xdata().tolist() == [0, 2, 6]
    speeds = [rows[f"fixed:{gamma}"] for gamma in (0, 2, 6)]
    assert lines[0].get_ydata().tolist() == speeds
    assert lines[1].get_ydata()[0] == max(speeds)


def test_costs_are_those_of_the_table(study: Study) -> None:
    near, far, *_ = axes_of(study, "cost").get_lines()
    assert near.get_ydata().tolist() == list(COST.step_ms)
    assert len(far.get_ydata()) == WIDTH_MAX and (far.get_ydata() >= near.get_ydata()).all()


def test_acceptance_rises_with_confidence_and_falls_with_entropy(study: Study) -> None:
    for name, sign in (("acceptance_by_confidence", 1), ("acceptance_by_entropy", -1)):
        line = axes_of(study, name).get_lines()[0]
        assert sign * np.corrcoef(line.get_xdata(), line.get_ydata())[0, 1] > 0.6


def test_gamma_over_time_is_that_of_the_steps(study: Study) -> None:
    lines = {line.get_label(): line for line in axes_of(study, "gamma_over_time").get_lines()}
    found = study.decided["fp32", "oracle"]
    place, sums, counts = 1, [0.0] * 4, [0] * 4
    for lane in range(len(found.steps)):
        place = 1
        for gamma, accepted in found.steps_of(lane):
            sums[place // 8] += gamma
            counts[place // 8] += 1
            place += accepted + 1
    means = [s / c for s, c in zip(sums, counts, strict=True) if c]
    assert lines["fp32, oracle"].get_ydata().tolist() == pytest.approx(means)


def test_what_is_lost_is_that_of_all_compressions(study: Study) -> None:
    axes = axes_of(study, "regret")
    pooled = next(cell for cell in study.found.pooled if cell.temperature == 0.0)
    rows = [row for row in pooled.rows if row.policy in ("static", "speckv")]
    expected = [100 * task["regret"] for row in rows for task in row.tasks.values()]
    assert [bar.get_height() for bar in axes.patches] == pytest.approx(expected)
    assert axes.get_ylabel().endswith("all compressions")
    labels = {line.get_label() for line in axes.get_lines()}
    assert {"fp32", "int8"} <= labels
    one = replace(study, found=replace(study.found, pooled=[], cells=study.found.cells[:1]))
    assert axes_of(one, "regret").get_ylabel().endswith("fp32")


def test_without_matplotlib(
    path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setitem(__import__("sys").modules, "matplotlib.figure", None)
    assert cli.run(["report", str(path)]) == 1
    assert "pip install 'speckv[report]'" in capsys.readouterr().err
    assert list(path.parent.iterdir()) == [path]
