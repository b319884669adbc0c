"""The README's section on speed, written from the committed results alone.

    python -m bench.readme            # rewrite the section
    python -m bench.readme --check    # fail if it is not what the results say

A figure that is not in ``bench/history`` is not in the README; what has no result yet is named.
"""

from __future__ import annotations

import argparse
import json
import textwrap
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from bench.environment import ROOT
from bench.gpu import PARTS, failed
from speckv.files import write_atomically

HISTORY = ROOT / "bench" / "history"
REPORT = ROOT / "bench" / "traces" / "report" / "report.json"
README = ROOT / "README.md"
BEGIN, END = "<!-- results: python -m bench.readme -->\n", "<!-- end of results -->\n"
_GPU_PARTS = tuple(PARTS)

Results = Mapping[str, Sequence[Mapping[str, Any]]]
"""Documents by benchmark; a GPU run's is ``gpu``, that of ``speckv report`` is ``report``."""

_BASELINES = (
    "static",
    "static-by-task",
    "hf-confidence",
    "hf-heuristic",
    "adaedl",
    "svip",
    "confidence",
    "online-logistic",
    "paper",
    "paper-fitted",
)
_CEILING, _ORACLE = "boosted", "oracle"


def read_results(
    folder: Path = HISTORY, report: Path | None = REPORT
) -> dict[str, list[dict[str, Any]]]:
    """The documents of a folder, by benchmark, those of a file name's order; and the report."""
    found: dict[str, list[dict[str, Any]]] = {}
    for path in sorted(folder.glob("*.json")):
        document = json.loads(path.read_text(encoding="utf-8"))
        kind = document.get("benchmark")
        if kind is None and any("rows" in part for part in document.values() if _is_map(part)):
            kind = "gpu"
        if kind is not None:
            found.setdefault(kind, []).append({**document, "file": path.name})
    if report is not None and report.is_file():
        document = json.loads(report.read_text(encoding="utf-8"))
        found["report"] = [{**document, "file": report.relative_to(ROOT).as_posix()}]
    return found


def section(results: Results) -> str:
    """The section's text, without its heading."""
    parts = (
        *(_plain, _pair, _assisted, _report, _specialists),
        *(_replay, _random_draft, _decision, _gpu),
    )
    blocks = [block for part in parts for block in part(results)]
    return "\n".join(blocks)


def _plain(results: Results) -> Iterator[str]:
    rows = results.get("plain", ())
    if not rows:
        yield "Plain decoding beside `transformers` has not been measured.\n"
        return
    lines = ["| plain decoding over `transformers`' greedy `generate` | result | command |"]
    lines.append("| --- | --- | --- |")
    for row in rows:
        low, high = row["ratio_95"]
        lines.append(
            f"| {row['dtype']} | {row['median_ratio']:.2f}x (95%: {low:.2f} to {high:.2f}) | "
            f"`python -m bench.plain --dtype {row['dtype']}` |"
        )
    yield "\n".join(lines) + "\n"
    row = rows[0]
    yield _paragraph(
        f"Median of the paired ratios of tokens per second, {len(row['pairs'])} interleaved pairs, "
        f"{row['tokens']} tokens each, {_machine(row)} ({_files(rows)})."
    )


def _pair(results: Results) -> Iterator[str]:
    for row in results.get("pair", ()):
        policies = row["policies"]
        parts = next(iter(policies.values()))
        yield _paragraph(
            f"{_pair_name(row)} over plain decoding by the same engine, greedy: median over "
            f"{len(row['prompts'])} built-in prompts of up to {row['tokens']} tokens"
            f"{_unseen(row)}, {_machine(row)} (`bench/history/{row['file']}`)."
        )
        heads = "".join(f" `{name}` (95%) | accepted |" for name in policies)
        lines = [f"| task |{heads}", "| --- |" + " --- | --- |" * len(policies)]
        for part in parts:
            cells = "".join(_pair_cells(policy[part]) for policy in policies.values())
            lines.append(f"| {part} |{cells}")
        yield "\n".join(lines) + "\n"
        if row.get("command"):
            yield f"    {row['command']}\n"


def _paragraph(text: str) -> str:
    return textwrap.fill(text, 100, break_long_words=False, break_on_hyphens=False) + "\n"


def _unseen(row: Mapping[str, Any]) -> str:
    """What the command says of the prompts left out."""
    said = str(row.get("command"))
    if "--skip" in said:
        return ", none of those that policies were chosen by"
    return ", none of those that `speckv` was trained on" if "--held-out" in said else ""


def _pair_cells(row: Mapping[str, Any]) -> str:
    low, high = row["ratio_95"]
    accepted = "none" if row["acceptance"] is None else f"{row['acceptance']:.0%}"
    return f" {row['ratio']:.2f}x ({low:.2f} to {high:.2f}) | {accepted} |"


def _assisted(results: Results) -> Iterator[str]:
    rows = results.get("assisted", ())
    if not rows:
        yield "Assisted generation of `transformers` with the same pair has not been measured.\n"
    for row in rows:
        setting = row["tuned_setting"]
        said = []
        for name in ("default", "tuned"):
            low, high = row[name]["ratio_95"]
            ratio = row[name]["median_ratio"]
            said.append(f"{ratio:.2f}x ({low:.2f} to {high:.2f}) its {name} setting")
        yield _paragraph(
            f"Over assisted generation of `transformers` with the same pair: {', '.join(said)}; "
            f"tuned to {setting['num_assistant_tokens']} tokens and a threshold of "
            f"{setting['assistant_confidence_threshold']}, {len(row['prompts'])} prompts, "
            f"interleaved, {_machine(row)} (`bench/history/{row['file']}`)."
        )
        if row.get("command"):
            yield f"    {row['command']}\n"


def _report(results: Results) -> Iterator[str]:
    for document in results.get("report", ()):
        trace, pooled = document["trace"], document["pooled"]
        count = len(document["cells"]) // len(pooled)
        yield _paragraph(
            f"The policy in replay, on the pair's trace ({trace['positions']:,} positions; "
            f"{pooled[0]['prompts']} prompts that neither it nor a baseline was tuned on, "
            f"{count} compressions together), tokens per second with 95% intervals over prompts "
            f"(`{document['file']}`, and `report.html` beside it; `speckv report --tries`):"
        )
        head = "".join(f" temperature {cell['temperature']:g} |" for cell in pooled)
        lines = [f"| `speckv` over |{head}", "| --- |" + " --- |" * len(pooled)]
        tables = [{row["policy"]: row for row in cell["rows"]} for cell in pooled]
        for name in (*_BASELINES, _CEILING):
            if all(name in rows for rows in tables):
                cells = "".join(f" {_gain(rows[name])} |" for rows in tables)
                lines.append(f"| {_policy_name(name)} |{cells}")
        gaps = "".join(
            f" {rows[_ORACLE]['over_static'] - 1:+.1%}; {rows['speckv']['gap_closed']:.0%} |"
            for rows in tables
        )
        lines.append(f"| the oracle over the best fixed γ; share of that reached |{gaps}")
        yield "\n".join(lines) + "\n"
        yield from _undecided(document["cells"])


def _undecided(cells: Sequence[Mapping[str, Any]]) -> Iterator[str]:
    """How many comparisons with a baseline, cell by cell, have an interval that includes zero."""
    open_by_name: dict[str, list[str]] = {name: [] for name in _BASELINES}
    count, lost = 0, []
    for cell in cells:
        where = f"{cell['compression']} at {cell['temperature']:g}"
        for row in cell["rows"]:
            if row["policy"] not in open_by_name:
                continue
            count += 1
            low, high = row["ours_over_it_95"]
            if low <= 1 <= high:
                open_by_name[row["policy"]].append(where)
            elif high < 1:
                lost.append(f"`{row['policy']}` in {where}")
    if not count:
        return
    undecided = {name: found for name, found in open_by_name.items() if found}
    said = "; ".join(f"`{name}` in {', '.join(found)}" for name, found in undecided.items())
    total = sum(map(len, undecided.values()))
    kinds = f"{len(cells)} compressions and temperatures apart"
    listed = f": {said}" if said else ""
    below = f" `speckv` is slower beyond its interval than {', '.join(lost)}." if lost else ""
    yield _paragraph(
        f"Taken by the {kinds}, {total} of {count} comparisons with these baselines have an "
        f"interval that includes zero{listed}.{below}"
    )


def _gain(row: Mapping[str, Any]) -> str:
    low, high = row["ours_over_it_95"]
    return f"{row['ours_over_it'] - 1:+.1%} ({low - 1:+.1%} to {high - 1:+.1%})"


def _policy_name(name: str) -> str:
    known = {
        "static": "the best fixed γ of each compression",
        "static-by-task": "the best fixed γ of each task",
        _CEILING: "boosted trees on the same features",
    }
    return known.get(name, f"`{name}`")


def _specialists(results: Results) -> Iterator[str]:
    for document in results.get("specialists", ()):
        gains = []
        for row in document["pooled"]:
            low, high = row["one_over_own_95"]
            gains.append(
                f"{row['one_over_own'] - 1:+.1%} ({low - 1:+.1%} to {high - 1:+.1%}) at "
                f"temperature {row['temperature']:g}"
            )
        yield _paragraph(
            "One policy for all compressions, beside one trained for each: "
            f"{', '.join(gains)} (`bench/history/{document['file']}`, "
            "`python -m bench.specialists`)."
        )


def _replay(results: Results) -> Iterator[str]:
    rows = results.get("replay", ())
    if not rows:
        return
    yield _paragraph(
        "Replay beside live decoding of the same answers, to prompts that the policy was not "
        "trained on; tokens and steps were equal, one by one, and tokens per second are of the "
        f"steps ({_machine(rows[0])}, {_files(rows)}):"
    )
    lines = [
        "| | policy | replayed | live | live over plain |",
        "| --- | --- | --- | --- | --- |",
    ]
    for row in rows:
        plain = row["policies"]["fixed:0"]["live_tokens_per_second"]
        for name, found in row["policies"].items():
            live = found["live_tokens_per_second"]
            lines.append(
                f"| {row['compression']} at {row['temperature']:g} | `{name}` | "
                f"{found['replayed_tokens_per_second']:.1f} | {live:.1f} | {live / plain:.2f}x |"
            )
    yield "\n".join(lines) + "\n"
    yield f"    {rows[0]['command']}\n"


def _random_draft(results: Results) -> Iterator[str]:
    rows = results.get("random_draft", ())
    if not rows:
        yield "What a useless draft costs has not been measured.\n"
        return
    found = ", ".join(
        f"{row['compression']} {row['live']['ratio']:.3f}x "
        f"({' to '.join(f'{end:.3f}' for end in row['live']['ratio_95'])}), "
        f"{row['replay']['ratio']:.3f}x in replay"
        for row in rows
    )
    yield _paragraph(
        "With a useless draft, the default one's shapes with random weights, `speckv` over plain "
        f"decoding: {found}; medians of whole calls over {rows[0]['prompts']} prompts, "
        f"interleaved, with 95% intervals; {_machine(rows[0])} ({_files(rows)}, "
        f"`{rows[0]['command']}`)."
    )


def _decision(results: Results) -> Iterator[str]:
    rows = results.get("decision", ())
    if not rows:
        yield "What a decision costs beside the paper's has not been measured.\n"
    for row in rows:
        us, cheaper = row["us"], row["times_cheaper"]
        packed = "packed and compiled" if row["compiled"] else "packed"
        yield _paragraph(
            f"A decision on the CPU: the paper's four `predict` calls take {_us(us['predict'])}, "
            f"the same MLP, {packed}, {_us(us['paper'])}, {cheaper['paper']:.0f} times less, and "
            f"the trained policy's {_us(us['survival'])}, {cheaper['survival']:.0f} times less: "
            f"medians of {row['decisions']:,} each, by turns, and 99th percentiles; "
            f"{_machine(row)} (`bench/history/{row['file']}`, `{row['command']}`)."
        )


def _us(found: Mapping[str, float]) -> str:
    middle, last = (f"{us:.0f}" if us >= 10 else f"{us:.1f}" for us in (found["p50"], found["p99"]))
    return f"{middle} µs ({last})"


def _gpu(results: Results) -> Iterator[str]:
    runs = [row for row in results.get("gpu", ()) if _device(row) is not None]
    ran = {part for row in runs for part in _GPU_PARTS if _passed(row, part)}
    for row in runs:
        yield f"On one {_device(row)} (`bench/history/{row['file']}`):\n"
        yield "\n".join(_gpu_lines(row)) + "\n"
    missing = [part for part in _GPU_PARTS if part not in ran]
    if missing:
        what = f"Of `make gpu`, {', '.join(missing)}" if ran else "Nothing"
        have = "have" if ran and len(missing) > 1 else "has"
        negated = " not" if ran else ""
        yield _paragraph(
            f"{what} {have}{negated} run on a GPU yet: kernels have compiled for three "
            "architectures, and `make gpu` is the one command that runs and measures everything."
        )


def _passed(document: Mapping[str, Any], part: str) -> bool:
    """Whether a part has a row of something that ran, and none that failed."""
    rows = document.get(part, {}).get("rows", ())
    ran = any(not row.get("skipped") and not row.get("cut") for row in rows)
    return ran and not any(failed(row) for row in rows)


def _gpu_lines(document: Mapping[str, Any]) -> Iterator[str]:
    yield "| what | | tokens/s, or us |"
    yield "| --- | --- | --- |"
    for part in _GPU_PARTS:
        for row in document.get(part, {}).get("rows", ()):
            found = row.get("tokens_per_second") or row.get("iteration_us") or row.get("kernel_us")
            if not found or failed(row) or part in ("draft", "verify", "linear", "forward"):
                continue
            keys = ("target", "compression", "policy", "batch", "vocabulary")
            shape = " ".join(str(row[key]) for key in keys if row.get(key) is not None)
            injected = " (recorded signals and acceptance, injected)"
            note = injected if "injected" in str(row.get("signals_and_acceptance")) else ""
            yield f"| {row['name']}{note} | {shape} | {found['p50']:,.2f} |"


def _device(document: Mapping[str, Any]) -> str | None:
    """The GPU of a document's rows, or None where there was none."""
    for part in document.values():
        if _is_map(part) and "environment" in part:
            device = str(part["environment"]["device"])
            return None if device == "cpu" else device
    return None


def _pair_name(row: Mapping[str, Any]) -> str:
    pair: str = row["engine"].partition(", policy")[0]
    return pair[:1].upper() + pair[1:]


def _machine(row: Mapping[str, Any]) -> str:
    environment = row["environment"]
    threads = environment["threads"]
    cores = f"{threads} thread{'s' * (threads != 1)}"
    if environment["device"] != "cpu":
        return str(environment["device"])
    return f"{cores} on {environment['cpu']}, {environment['cpu_capability']}"


def _files(rows: Sequence[Mapping[str, Any]]) -> str:
    return ", ".join(f"`bench/history/{row['file']}`" for row in rows)


def _is_map(value: object) -> bool:
    return isinstance(value, Mapping)


def rewrite(text: str, results: Results) -> str:
    """The README with its section brought up to date.

    Raises
    ------
    ValueError
        If the marks are not there, once each and in order.
    """
    head, begin, rest = text.partition(BEGIN)
    _, end, tail = rest.partition(END)
    if not begin or not end:
        raise ValueError(f"{README.name}: expected the lines {BEGIN.strip()} and {END.strip()}")
    return f"{head}{BEGIN}\n{section(results)}\n{END}{tail}"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--check", action="store_true", help="change nothing")
    arguments = parser.parse_args()
    text = README.read_text(encoding="utf-8")
    new = rewrite(text, read_results())
    if arguments.check:
        raise SystemExit(0 if new == text else "error: README.md: run python -m bench.readme")
    write_atomically(README, lambda path: path.write_text(new, encoding="utf-8"))


if __name__ == "__main__":
    main()
