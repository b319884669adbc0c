"""``speckv paper``: its tables, JSON and plots, and the numbers of the released data."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

import pytest

from speckv import cli
from speckv._cli_paper import notes
from speckv.paper import analysis as analysis_module
from speckv.paper.analysis import Analysis
from speckv.paper.data import COMPRESSIONS, RUN_FILE, STEP_FILE, Released
from speckv.paper.plots import PLOTS

RELEASED = Path(__file__).resolve().parents[3] / "shared" / "paper"
GAMMAS = {"2", "4", "6", "8"}
ROW = {"compression", "task", "fixed4", "speckv", "improvement_pct"}
Capture = pytest.CaptureFixture[str]


@pytest.fixture
def analysed(monkeypatch: pytest.MonkeyPatch, analysis: Analysis) -> None:
    """The analysis of the made-up release, which takes seconds, is not run again."""

    def analyse(released: Released, stage: Any) -> Analysis:
        assert len(released.steps) == len(analysis.released.steps)
        stage("nothing")
        return analysis

    monkeypatch.setattr(analysis_module, "analyse", analyse)


@pytest.mark.usefixtures("analysed")
def test_the_headline_numbers_have_the_promised_keys(folder: Path, tmp_path: Path) -> None:
    path = tmp_path / "new" / "paper.json"
    assert cli.run(["paper", str(folder), "--json", str(path)]) == 0
    found = json.loads(path.read_text())
    assert set(found) == {
        "predictor", "table1", "table2", "overall", "p_value", "confidence_intervals", "throughput",
    }  # fmt: skip
    assert set(found["predictor"]) == {"corr", "mse", "decision_ms"}
    assert [set(row) for row in found["table1"] + found["table2"]] == [ROW] * 16
    assert set(found["overall"]) == {"fixed4", "speckv", "improvement_pct"}
    for by in ("by_step", "by_prompt"):
        for key in found["overall"]:
            low, high = found["confidence_intervals"][by][key]
            assert low <= found["overall"][key] <= high
    assert tuple(found["throughput"]) == COMPRESSIONS
    for of in found["throughput"].values():
        assert set(of) == {
            "tokens_per_second", "best_gamma", "paper_policy_vs_fixed4_pct", "cost_fit",
        }  # fmt: skip
        assert set(of["tokens_per_second"]) == GAMMAS
        assert set(of["cost_fit"]) == {"t_draft_ms", "t_verify_ms"}
    assert [child.name for child in path.parent.iterdir()] == ["paper.json"]


@pytest.mark.usefixtures("analysed")
def test_tables_notes_and_details(
    folder: Path, tmp_path: Path, analysis: Analysis, capsys: Capture
) -> None:
    path = tmp_path / "details.json"
    assert cli.run(["paper", str(folder), "--details", str(path)]) == 0
    out, err = capsys.readouterr()
    assert f"wrote {path}" in err
    best = " / ".join(str(of.best_gamma) for of in analysis.throughput.values())
    assert f"tokens/s-optimal fixed γ: {best} (fp16 / int8 / nf4)" in out
    for words in ("Table 1", "Table 2", "shuffled labels", "t_verify", "scikit-learn", "published"):
        assert words in out
    squeezed = " ".join(out.split())
    for note in notes(analysis):
        assert note in squeezed
    assert max(len(line) for line in out.splitlines()) <= 80
    found = json.loads(path.read_text())
    assert len(found["controls"]["shuffled_correlations"]) == 10
    assert found["decision"]["ratio"] > 0
    share = found["throughput"]["fp16"]["decision_share_of_step_pct"]
    assert set(share) == GAMMAS and share["2"] > share["8"]


@pytest.mark.usefixtures("analysed")
def test_plots_are_png_files(folder: Path, tmp_path: Path) -> None:
    plots = tmp_path / "plots"
    assert cli.run(["paper", str(folder), "--plots", str(plots)]) == 0
    assert {path.name for path in plots.iterdir()} == {f"{name}.png" for name in PLOTS}
    for path in plots.iterdir():
        content = path.read_bytes()
        assert content.startswith(b"\x89PNG\r\n") and len(content) > 5_000


@pytest.mark.usefixtures("analysed")
def test_an_interrupted_write_leaves_the_old_file(
    folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = tmp_path / "paper.json"
    path.write_text("old")

    def fail(self: Path, text: str, **kwargs: Any) -> int:
        with self.open("w") as file:
            file.write(text[:10])
        raise OSError("disk full")

    monkeypatch.setattr(Path, "write_text", fail)
    assert cli.run(["paper", str(folder), "--json", str(path)]) == 1
    assert path.read_text() == "old"
    assert [child.name for child in tmp_path.iterdir()] == ["paper.json"]


def _error(arguments: list[str], capsys: Capture) -> tuple[int, str]:
    code = cli.run(["paper", *arguments])
    out, err = capsys.readouterr()
    assert out == "" and err.startswith("error: ") and err.count("\n") == 1, err
    return code, err


def test_missing_data_is_one_line(tmp_path: Path, capsys: Capture) -> None:
    code, err = _error([str(tmp_path / "absent")], capsys)
    assert code == 2 and f"{STEP_FILE} and {RUN_FILE}" in err
    code, err = _error([str(tmp_path)], capsys)
    assert code == 2 and str(tmp_path / STEP_FILE) in err
    code, err = _error([], capsys)
    assert code == 2 and "DIR" in err


@pytest.mark.parametrize(
    ("module", "extra", "arguments"),
    [
        ("sklearn.model_selection", "train", []),
        ("matplotlib.figure", "report", ["--plots", "unused"]),
    ],
)
def test_a_missing_package_names_its_extra(
    module: str,
    extra: str,
    arguments: list[str],
    folder: Path,
    capsys: Capture,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setitem(sys.modules, module, None)
    code, err = _error([str(folder), *arguments], capsys)
    assert code == 1 and f"pip install 'speckv[{extra}]'" in err


@pytest.fixture(scope="module")
def reproduced(tmp_path_factory: pytest.TempPathFactory) -> tuple[dict[str, Any], dict[str, Any]]:
    """Headline numbers and details of the released data."""
    if not (RELEASED / STEP_FILE).exists() or not (RELEASED / RUN_FILE).exists():
        pytest.skip("data: the profiling data released with the paper")
    folder = tmp_path_factory.mktemp("reproduced")
    paths = [folder / "json", folder / "details"]
    arguments = ["paper", str(RELEASED), "--json", str(paths[0]), "--details", str(paths[1])]
    assert cli.run(arguments) == 0
    headline, details = (json.loads(path.read_text()) for path in paths)
    return headline, details


def test_the_paper_reproduces(reproduced: tuple[dict[str, Any], dict[str, Any]]) -> None:
    found, details = reproduced
    assert found["predictor"]["corr"] == pytest.approx(0.685, abs=0.02)
    assert found["predictor"]["mse"] == pytest.approx(0.0896, abs=0.004)
    assert found["overall"]["fixed4"] == pytest.approx(3.73, abs=0.06)
    assert found["overall"]["speckv"] == pytest.approx(5.82, abs=0.06)
    assert found["overall"]["improvement_pct"] == pytest.approx(56, abs=2)
    assert found["p_value"] < 0.001
    signals = details["signal_correlations"]
    assert signals["mean_draft_entropy"] == pytest.approx(-0.558, abs=0.01)
    assert signals["mean_draft_confidence"] == pytest.approx(0.570, abs=0.01)


def test_shuffled_labels_stay_under_a_tenth_in_every_shuffle(
    reproduced: tuple[dict[str, Any], dict[str, Any]],
) -> None:
    """The protocol's own seed, 42, is the first; the others show that it is no exception."""
    of_the_protocol, *others = reproduced[1]["controls"]["shuffled_correlations"]
    assert abs(of_the_protocol) < 0.1 and len(others) == 9
    assert max(map(abs, others)) < 0.1 and abs(sum(others) / len(others)) < 0.05


# As published, by compression and task: Fixed-4, SpecKV.
TABLE2 = {
    "fp16": {"code": (3.95, 6.32), "math": (4.17, 6.74), "chat": (3.20, 4.71),
             "summarization": (3.48, 5.25)},
    "int8": {"code": (3.99, 6.36), "math": (4.29, 7.05), "chat": (3.19, 4.68),
             "summarization": (3.68, 5.66)},
    "nf4": {"code": (4.02, 6.47), "math": (4.22, 6.95), "chat": (3.33, 4.95),
            "summarization": (3.67, 5.62)},
}  # fmt: skip
TABLE1 = {"fp16": (3.67, 5.68), "int8": (3.75, 5.85), "nf4": (3.78, 5.93), "all": (3.73, 5.82)}


def test_its_tables_reproduce(reproduced: tuple[dict[str, Any], dict[str, Any]]) -> None:
    found, _ = reproduced
    tables = [(row, TABLE1[row["compression"]]) for row in found["table1"]]
    tables += [(row, TABLE2[row["compression"]][row["task"]]) for row in found["table2"]]
    assert len(tables) == 16
    for row, (fixed4, speckv) in tables:
        assert row["fixed4"] == pytest.approx(fixed4, abs=0.06)
        assert row["speckv"] == pytest.approx(speckv, abs=0.1)


def test_in_tokens_per_second_it_is_another_story(
    reproduced: tuple[dict[str, Any], dict[str, Any]],
) -> None:
    found, details = reproduced
    speeds = found["throughput"]
    assert [speeds[name]["best_gamma"] for name in COMPRESSIONS] == [2, 6, 4]
    changes = [speeds[name]["paper_policy_vs_fixed4_pct"] for name in COMPRESSIONS]
    assert changes == pytest.approx([-15.6, 7.2, -9.7], abs=1)
    fits = [speeds[name]["cost_fit"] for name in COMPRESSIONS]
    assert [fit["t_draft_ms"] for fit in fits] == pytest.approx([10.5, 10.4, 10.6], abs=0.3)
    assert [fit["t_verify_ms"] for fit in fits] == pytest.approx([20.1, 90.4, 36.5], abs=1)
    gain = details["measured_gamma8_over_gamma4_tokens_per_step"]
    assert gain["percent"] == pytest.approx(39.1, abs=0.1)
    assert gain["high"] < found["overall"]["improvement_pct"]
