"""The README's section on speed says what the committed results say, and no more."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from bench import readme

MACHINE = {"device": "cpu", "threads": 2, "cpu": "a processor, 2 cores", "cpu_capability": "AVX2"}


def pair() -> dict[str, Any]:
    cell = {"ratio": 1.5, "ratio_95": [1.25, 1.75], "acceptance": 0.5}
    return {
        "benchmark": "pair",
        "file": "pair.json",
        "engine": "target t (bf16), draft d, policy speckv",
        "prompts": [1, 2, 3],
        "tokens": 64,
        "policies": {"fixed:2": {"all": cell, "code": {**cell, "acceptance": None}}},
        "command": "python -m bench.pair",
        "environment": MACHINE,
    }


def gpu(device: str, parts: tuple[str, ...]) -> dict[str, Any]:
    row = {"name": "device fixed:4", "target": "t", "tokens_per_second": {"p50": 321.0}}
    environment = {"device": device}
    return {"file": "gpu.json"} | {
        part: {"environment": environment, "rows": [row]} for part in parts
    }


def test_the_committed_readme_is_up_to_date() -> None:
    text = readme.README.read_text(encoding="utf-8")
    assert readme.rewrite(text, readme.read_results()) == text


def test_a_pair() -> None:
    text = readme.section({"pair": [pair()]})
    assert "Target t (bf16), draft d over plain decoding" in text
    assert "median over 3 built-in prompts of up to 64 tokens" in " ".join(text.split())
    assert "| all | 1.50x (1.25 to 1.75) | 50% |" in text
    assert "| code | 1.50x (1.25 to 1.75) | none |" in text
    assert "    python -m bench.pair" in text
    assert all(len(line) <= 100 or line.startswith("|") for line in text.splitlines())


def test_what_is_missing_is_said() -> None:
    text = readme.section({})
    assert "Plain decoding beside `transformers` has not been measured." in text
    assert "Assisted generation of `transformers` with the same pair has not been measured." in text
    assert "Nothing has run on a GPU yet" in text


def test_a_dry_run_is_no_run() -> None:
    assert "Nothing has run on a GPU" in readme.section({"gpu": [gpu("cpu", ("loop", "e2e"))]})


def test_parts_that_ran() -> None:
    text = readme.section({"gpu": [gpu("NVIDIA H100", ("loop", "e2e"))]})
    assert "On one NVIDIA H100 (`bench/history/gpu.json`):" in text
    assert "| device fixed:4 | t | 321.00 |" in text
    assert (
        "Of `make gpu`, probe, draft, verify, linear, forward, e2e-8b, audit, sanitizer, tests,"
        in " ".join(text.split())
    )
    skipped = gpu("NVIDIA H100", readme._GPU_PARTS)
    skipped["sanitizer"]["rows"] = [{"name": "compute-sanitizer memcheck", "skipped": "not there"}]
    said = " ".join(readme.section({"gpu": [skipped]}).split())
    assert "Of `make gpu`, sanitizer has not run" in said
    every = readme.section({"gpu": [gpu("NVIDIA H100", readme._GPU_PARTS)]})
    assert "have not run" not in every and "Nothing has" not in every


def gain(policy: str, ratio: float, **more: float) -> dict[str, Any]:
    interval = [ratio - 0.01, ratio + 0.01]
    return {"policy": policy, "ours_over_it": ratio, "ours_over_it_95": interval, **more}


def test_a_report() -> None:
    rows = [
        gain("static", 1.05),
        gain("speckv", 1.0, gap_closed=0.25),
        gain("oracle", 0.9, over_static=1.2),
    ]
    cells = [
        {"compression": name, "temperature": t, "rows": rows}
        for name in ("bf16", "int8", "nf4")
        for t in (0.0, 0.7)
    ]
    report = {
        "file": "bench/traces/report/report.json",
        "trace": {"positions": 12345},
        "cells": cells,
        "pooled": [{"temperature": t, "prompts": 7, "rows": rows} for t in (0.0, 0.7)],
    }
    text = readme.section({"report": [report]})
    assert "12,345 positions; 7 prompts" in " ".join(text.split())
    assert "3 compressions together" in " ".join(text.split())
    assert "| `speckv` over | temperature 0 | temperature 0.7 |" in text
    best = "| the best fixed γ of each compression | +5.0% (+4.0% to +6.0%) |"
    assert best in text and "`svip`" not in text
    assert "| the oracle over the best fixed γ; share of that reached | +20.0%; 25% |" in text
    assert "0 of 6 comparisons with these baselines have an interval that includes zero." in (
        " ".join(text.split())
    )


def test_comparisons_that_decide_nothing_are_named() -> None:
    def cell(compression: str, temperature: float, *rows: dict[str, Any]) -> dict[str, Any]:
        return {"compression": compression, "temperature": temperature, "rows": rows}

    cells = [
        cell("bf16", 0.0, gain("svip", 1.005), gain("confidence", 1.02), gain("boosted", 1.0)),
        cell("nf4", 1.0, gain("svip", 1.01), gain("confidence", 0.98), gain("oracle", 0.8)),
    ]
    text = " ".join("\n".join(readme._undecided(cells)).split())
    assert "Taken by the 2 compressions and temperatures apart, 2 of 4 comparisons" in text
    assert "includes zero: `svip` in bf16 at 0, nf4 at 1." in text
    assert text.endswith("`speckv` is slower beyond its interval than `confidence` in nf4 at 1.")
    assert not list(readme._undecided([cell("bf16", 0.0, gain("oracle", 0.8))]))


def test_one_policy_beside_one_for_each_compression() -> None:
    pooled = [{"temperature": 0.7, "one_over_own": 1.01, "one_over_own_95": [0.99, 1.03]}]
    text = readme.section({"specialists": [{"file": "specialists.json", "pooled": pooled}]})
    assert "+1.0% (-1.0% to +3.0%) at temperature 0.7" in " ".join(text.split())


def test_replay_beside_live() -> None:
    policies = {
        "fixed:0": {"replayed_tokens_per_second": 51.0, "live_tokens_per_second": 50.0},
        "speckv": {"replayed_tokens_per_second": 70.0, "live_tokens_per_second": 75.0},
    }
    row = {
        "file": "replay-bf16.json",
        "compression": "bf16",
        "temperature": 0.0,
        "policies": policies,
        "command": "python -m bench.replay",
        "environment": MACHINE,
    }
    text = readme.section({"replay": [row]})
    assert "| bf16 at 0 | `speckv` | 70.0 | 75.0 | 1.50x |" in text
    assert "2 threads on a processor, 2 cores, AVX2, `bench/history/replay-bf16.json`" in (
        " ".join(text.split())
    )


def test_a_useless_draft() -> None:
    row: dict[str, Any] = {
        "file": "random-bf16.json",
        "compression": "bf16",
        "prompts": 12,
        "live": {"ratio": 0.987, "ratio_95": [0.98, 0.99]},
        "replay": {"ratio": 0.991},
        "command": "python -m bench.random_draft",
        "environment": {"threads": 2, "cpu": "a", "cpu_capability": "AVX2", "device": "cpu"},
    }
    text = " ".join(readme.section({"random_draft": [row]}).split())
    assert "bf16 0.987x (0.980 to 0.990), 0.991x in replay; medians of whole calls over 12" in text


def test_a_decision() -> None:
    assert "What a decision costs beside the paper's has not been measured." in readme.section({})
    row = {
        "file": "decision-cpu.json",
        "decisions": 5000,
        "compiled": True,
        "us": {
            "predict": {"p50": 340.4, "p90": 400.0, "p99": 612.0},
            "paper": {"p50": 20.0, "p90": 25.0, "p99": 31.0},
            "survival": {"p50": 17.0, "p90": 20.0, "p99": 28.0},
        },
        "times_cheaper": {"paper": 17.02, "survival": 20.02},
        "command": "python -m bench.decision",
        "environment": {**MACHINE, "threads": 1},
    }
    text = " ".join(readme.section({"decision": [row]}).split())
    assert "calls take 340 µs (612), the same MLP, packed and compiled, 20 µs (31), 17" in text
    assert "the trained policy's 17 µs (28), 20 times less: medians of 5,000 each" in text
    assert "1 thread on a processor, 2 cores, AVX2 (`bench/history/decision-cpu.json`" in text


def test_results_are_found_by_what_they_are(tmp_path: Path) -> None:
    (tmp_path / "b.json").write_text(json.dumps(pair()))
    (tmp_path / "a.json").write_text(json.dumps({**pair(), "tokens": 32}))
    (tmp_path / "c.json").write_text(json.dumps(gpu("cpu", ("loop",))))
    (tmp_path / "tests.json").write_text(json.dumps({"passed": True}))
    found = readme.read_results(tmp_path, report=None)
    assert [row["tokens"] for row in found["pair"]] == [32, 64]
    assert set(found) == {"pair", "gpu"}


def test_a_readme_without_marks_is_refused() -> None:
    with pytest.raises(ValueError, match="expected the lines <!-- results"):
        readme.rewrite("# speckv\n", {})
