"""Goals are judged by the worst of what was measured, and a missed one is no failure."""

from __future__ import annotations

from typing import Any

import pytest

from bench.verdicts import GOALS, failed, table, verdicts


def median(value: float) -> dict[str, float]:
    return {"p50": value}


def loop_rows(decision: float = 4.0, above: float = 0.5) -> list[dict[str, Any]]:
    at = {"vocabulary": 128_256, "batch": 1}
    step = {"name": "chained draft_step", "policy": "speckv", **at}
    return [
        {"name": "chained bare argmax", **at, "kernel_us": median(3.0)},
        {"name": "chained torch.argmax", **at, "above_first_us": median(2.0)},
        {**step, "kernel_us": median(decision), "above_first_us": median(above)},
        {**step, "batch": 8, "kernel_us": median(50.0), "above_first_us": median(9.0)},
        {"name": "draft step with draft_step", "above_first_us": median(1.5)},
        {"name": "device fixed:4", "above_forwards": 0.02, "dtype": "bfloat16"},
        {"name": "device (chain) fixed:4", "above_forwards": 0.5, "dtype": "bfloat16"},
        {"name": "eager fixed:4", "above_forwards": 2.0, "dtype": "bfloat16"},
    ]


def product(kind: str, width: int, us: float, **more: Any) -> dict[str, Any]:
    row = {"name": "linear", "shape": "8B down", "kind": kind, "width": width}
    return {**row, "bytes": 40_000_000, "kernel_us": median(us), **more}


def judged(parts: dict[str, Any]) -> dict[str, dict[str, Any]]:
    rows = verdicts(parts)
    assert len(rows) == len(GOALS) and not any(map(failed, rows))
    return {row["name"].removeprefix("goal: "): row for row in rows}


def test_nothing_measured_is_neither_met_nor_missed() -> None:
    dry = [{**row, "dry_run": True} for row in loop_rows()]
    for parts in ({}, {"loop": dry}):
        assert {(r["met"], r["dry_run"]) for r in judged(parts).values()} == {(None, True)}
        assert all(line.endswith("not measured") for line in table(verdicts(parts)))


def test_the_decision() -> None:
    found = judged({"loop": loop_rows()})
    assert not any(row["dry_run"] for row in found.values())
    assert found["a decision"]["measured"] == 4.0 and found["a decision"]["met"] is True
    assert found["a decision above an argmax, chained"]["measured"] == 0.5
    assert found["a decision above an argmax, in a draft step"]["met"] is False
    assert found["the argmax above torch.argmax"]["measured"] == -2.0
    assert found["the device loop above its forwards"]["measured"] == 0.02
    late = judged({"loop": loop_rows(decision=5.5, above=1.25)})
    assert late["a decision"]["met"] is late["a decision above an argmax, chained"]["met"] is False


def test_products() -> None:
    rows = [
        product("bf16", 1, 10.0, share_of_copy=0.9),
        product("bf16", 9, 12.0, share_of_copy=0.8),
        product("bf16", 1, 10.0, share_of_copy=0.2, bytes=1_000_000, shape="small"),
        product("bf16", 1, 10.0, share_of_copy=0.1, matches_reference=False, shape="wrong"),
        product("nf4", 1, 10.0, share_of_copy=0.6),
        product("nf4", 9, 10.5),
        product("nf4", 32, 50.0),
    ]
    theirs = [{**row, "name": "bitsandbytes.matmul_4bit"} for row in rows[4:]]
    for row, us in zip(theirs, (20.0, 10.4, 40.0), strict=True):
        row["kernel_us"] = median(us)
    found = judged({"linear": rows + theirs})
    assert found["share of copy bandwidth, bf16"]["measured"] == 0.9
    assert found["share of copy bandwidth, nf4"]["met"] is False
    assert found["share of copy bandwidth, int8"]["met"] is None
    assert found["nine rows over one"]["measured"] == pytest.approx(1.2)
    assert found["nine rows over one"]["where"] == ["8B down bf16"]
    row = found["nf4 over bitsandbytes, 1 to 16 rows"]
    assert row["measured"] == pytest.approx(10.5 / 10.4) and row["where"] == ["8B down nf4 M=9"]
    assert row["met"] is False
    lines = list(table([row]))
    assert "MISSED: 1.010 x (8B down nf4 M=9)" in lines[0] and "at most 1 x" in lines[0]


def test_a_forward_and_waits() -> None:
    row = {"name": "forward", "model": "Llama-3.2-1B", "compression": "bf16", "context": 512}
    forwards = [{**row, "width": w, "batch": 1, "kernel_us": median(900.0 * w)} for w in (1, 3)]
    waits = [{"name": "a", "syncs": 0}, {"name": "b", "syncs": 2}, {"name": "c", "exit_code": 1}]
    traced = [{"name": "d", "traced_syncs": []}]
    found = judged({"forward": forwards, "audit": [*waits, *traced]})
    assert found["a forward of Llama-3.2-1B in bf16"]["measured"] == 900.0
    row = found["waits of the host in a generation"]
    assert (row["measured"], row["met"], row["where"]) == (2.0, False, ["b"])
    assert judged({"audit": traced})["waits of the host in a generation"]["met"] is True


def test_what_is_right_or_wrong() -> None:
    ran = {"name": "pytest tests/gpu/test_loops_gpu.py", "exit_code": 0}
    tools = [
        {"name": "compute-sanitizer memcheck", "exit_code": 0},
        {"name": "compute-sanitizer racecheck", "skipped": "not installed"},
    ]
    said = {"name": "device fixed:4", "identical_to_plain": True, "dtype": "bf16"}
    grew = {"name": "memory of the device loop", "grew": True}
    parts = {"tests": [ran], "sanitizer": tools, "e2e": [said], "audit": [grew]}
    found = {row["name"].removeprefix("goal: "): row for row in verdicts(parts)}
    assert found["tests of kernels and loops"]["met"] is True
    assert found["memcheck"]["met"] is True and found["racecheck"]["met"] is None
    assert found["tokens of every loop and policy"]["met"] is True
    assert found["memory after a thousand generations"]["met"] is False
    stopped = {"tests": [ran, {**ran, "exit_code": 124}], "e2e": [{**said} | {"loop": "device"}]}
    stopped["e2e"][0]["identical_to_plain"] = False
    found = {row["name"].removeprefix("goal: "): row for row in verdicts(stopped)}
    assert found["tests of kernels and loops"]["met"] is False
    assert found["tokens of every loop and policy"]["met"] is False
