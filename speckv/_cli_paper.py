"""``speckv paper``: tables on stdout, progress on stderr, JSON and plots in files."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ._cli_output import write_json

if TYPE_CHECKING:
    from rich.console import Console

    from .paper.analysis import Analysis
    from .paper.throughput import Change


def run_paper(
    folder: Path,
    json: Path | None,
    details: Path | None,
    plots: Path | None,
    console: Console,
    progress: Console,
) -> None:
    """Analyse the released data of ``folder``, show the tables, write what was asked for.

    Raises
    ------
    ValueError
        The data are missing or not as released.
    SpeckvError
        A package of an extra is not installed.
    OSError
        A file cannot be written.
    """
    from .figures import require_matplotlib
    from .paper import plots as plotting
    from .paper.analysis import analyse
    from .paper.data import load

    if plots is not None:
        require_matplotlib()
    released = load(folder.expanduser())
    with progress.status("") as status:
        analysis = analyse(released, stage=lambda name: status.update(name))
    show(console, analysis)
    for path, document in ((json, analysis.summary()), (details, analysis.details())):
        if path is not None:
            write_json(path.expanduser(), document)
            progress.print(f"wrote {path}", markup=False)
    if plots is not None:
        for path in plotting.draw(analysis, plots.expanduser()):
            progress.print(f"wrote {path}", markup=False)


def show(console: Console, analysis: Analysis) -> None:
    """Print the analysis as tables and notes."""
    _show_protocol(console, analysis)
    _show_tables(console, analysis)
    _show_controls(console, analysis)
    _show_throughput(console, analysis)
    _show_decision(console, analysis)
    console.print("\nWhat the paper's protocol does not show", style="bold")
    for note in notes(analysis):
        console.print(f"- {note}", markup=False)


def notes(analysis: Analysis) -> list[str]:
    """What is wrong with the protocol, each in a sentence or two with its numbers."""
    from .paper.data import GAMMAS

    found, controls = analysis.protocol, analysis.controls
    four, eight = GAMMAS.index(4), GAMMAS.index(8)
    chosen = (found.choice == eight).mean()
    always8 = found.tokens[:, eight].mean()
    shuffled = controls.shuffled_improvements_pct
    whole = analysis.intervals["by_prompt"]["improvement_pct"]
    longer = ", ".join(
        f"{name} {100 * (of.step_ms[eight] / of.step_ms[four] - 1):+.0f}%"
        for name, of in analysis.throughput.items()
    )
    return [
        "The signals are those of the block whose length they choose: known only once it has been"
        f" drafted. Predicting from the step before, the correlation is"
        f" {controls.causal_correlation:.3f}; from the block itself"
        f" {controls.by_prompt_correlation:.3f} (prompts held out in both).",
        "One block's signals stand for every γ, though a mean or a maximum over 8 tokens is not one"
        " over 2.",
        "Policies are scored by the predictor, not by what the target accepted, after it was"
        " refitted on the very rows that it scores; steps of one prompt are in both parts.",
        "The improvement and its p-value cannot fail: SpecKV is scored by the largest of four"
        " values, Fixed-4 by one of them. A predictor fitted to shuffled labels improves by"
        f" {min(shuffled):.0f} to {max(shuffled):.0f}%.",
        f"SpecKV chooses γ=8 in {chosen:.0%} of the steps. Always γ=8 scores {always8:.2f}; the"
        f" choice adds {100 * (found.speckv.mean() / always8 - 1):.1f}%.",
        f"Measured tokens per step of γ=8 over γ=4: {_change(analysis.gain)}; the protocol says"
        f" {whole[0]:.1f} to {whole[1]:.1f}%.",
        f"Tokens per step are not tokens per second. A step of γ=8 lasts longer than one of γ=4:"
        f" {longer}.",
    ]


def _show_protocol(console: Console, analysis: Analysis) -> None:
    from .paper.analysis import PUBLISHED

    overall = analysis.summary()["overall"]
    by_step, by_prompt = analysis.intervals["by_step"], analysis.intervals["by_prompt"]
    rows = [
        ("predictor's correlation", f"{analysis.protocol.correlation:.3f}", "corr", "", ""),
        ("predictor's squared error", f"{analysis.protocol.mse:.4f}", "mse", "", ""),
    ]
    for label, key in (("Fixed-4, tokens/step", "fixed4"), ("SpecKV, tokens/step", "speckv")):
        rows.append((label, f"{overall[key]:.2f}", key, *_pair(by_step, by_prompt, key, 2)))
    key = "improvement_pct"
    rows.append(("improvement, %", f"{overall[key]:.1f}", key, *_pair(by_step, by_prompt, key, 1)))
    body = [(name, value, f"{PUBLISHED[key]:g}", *rest) for name, value, key, *rest in rows]
    by_prompt_p = f"p = {analysis.p_value_by_prompt:.4f}"
    body.append(("p-value", f"{analysis.p_value:.4f}", "< 0.001", "", by_prompt_p))
    rows_in_all, held_out = len(analysis.released.steps), len(analysis.protocol.held_out)
    _table(
        console,
        f"The paper's protocol: {rows_in_all:,} steps, {held_out:,} held out",
        ("", "here", "published", "95%, by step", "95%, by prompt"),
        body,
    )


def _show_tables(console: Console, analysis: Analysis) -> None:
    table1, table2 = analysis.tables
    for title, rows in (("Table 1: by compression", table1), ("Table 2: by task", table2)):
        _table(
            console,
            f"{title} (expected tokens/step)",
            ("compression", "task", "Fixed-4", "SpecKV", "improvement"),
            [
                (
                    row["compression"],
                    row["task"],
                    f"{row['fixed4']:.2f}",
                    f"{row['speckv']:.2f}",
                    f"{row['improvement_pct']:+.1f}%",
                )
                for row in rows
            ],
        )


def _show_controls(console: Console, analysis: Analysis) -> None:
    from .paper.protocol import signal_correlations

    controls = analysis.controls
    shuffled = controls.shuffled_correlations
    mean = sum(shuffled) / len(shuffled)
    _table(
        console,
        "Correlation with the acceptance rate",
        ("", "correlation"),
        [
            *(
                (name.replace("_", " "), f"{value:+.3f}")
                for name, value in signal_correlations(analysis.released.steps).items()
            ),
            ("predictor, prompts held out", f"{controls.by_prompt_correlation:+.3f}"),
            ("the same, signals of the step before", f"{controls.causal_correlation:+.3f}"),
            (
                f"predictor, shuffled labels (mean of {len(shuffled)};"
                f" farthest {max(shuffled, key=abs):+.3f})",
                f"{mean:+.3f}",
            ),
        ],
    )


def _show_throughput(console: Console, analysis: Analysis) -> None:
    from .paper.data import GAMMAS

    speeds = analysis.throughput
    gammas = [f"γ={gamma}" for gamma in GAMMAS]
    _table(
        console,
        "Tokens/s by fixed γ, from the paper's timings (sum of tokens / sum of seconds)",
        ("compression", *gammas, "best γ (sure)", "γ=8 over γ=4 (95%)"),
        [
            (
                name,
                *(f"{value:.1f}" for value in of.tokens_per_second),
                f"{of.best_gamma} ({of.best_share[GAMMAS.index(of.best_gamma)]:.0%})",
                _change(of.fixed8_vs_fixed4),
            )
            for name, of in speeds.items()
        ],
    )
    console.print(
        "tokens/s-optimal fixed γ: "
        + " / ".join(str(of.best_gamma) for of in speeds.values())
        + f" ({' / '.join(speeds)}); sure: the share of resampled prompts that agree",
        markup=False,
    )
    _table(
        console,
        "The paper's policy over γ=4, in tokens/s",
        ("compression", "measured (95%)", "by predicted tokens", "γ=8 chosen"),
        [
            (
                name,
                _change(of.paper_policy_vs_fixed4),
                f"{of.predicted_policy_vs_fixed4_pct:+.1f}%",
                f"{of.chosen[GAMMAS.index(8)]:.0%}",
            )
            for name, of in speeds.items()
        ],
    )
    _table(
        console,
        "ms per step, fitted as t_verify + γ t_draft",
        ("compression", "t_draft", "t_verify", "misses by", *gammas),
        [
            (
                name,
                f"{of.cost.t_draft_ms:.2f}",
                f"{of.cost.t_verify_ms:.2f}",
                f"{of.cost.largest_error_pct:.1f}%",
                *(f"{value:.1f}" for value in of.step_ms),
            )
            for name, of in speeds.items()
        ],
    )
    four, eight = GAMMAS.index(4), GAMMAS.index(8)
    _table(
        console,
        "Tokens per step, measured and predicted",
        ("compression", "γ=4", "predicted", "γ=8", "predicted", "γ=8 over γ=4 (95%)"),
        [
            (
                name,
                f"{of.tokens_per_step[four]:.2f}",
                f"{of.predicted_tokens_per_step[four]:.2f}",
                f"{of.tokens_per_step[eight]:.2f}",
                f"{of.predicted_tokens_per_step[eight]:.2f}",
                _change(of.fixed8_vs_fixed4_tokens),
            )
            for name, of in speeds.items()
        ],
    )


def _show_decision(console: Console, analysis: Analysis) -> None:
    from .paper.analysis import PUBLISHED
    from .paper.data import GAMMAS

    cost = analysis.decision
    least = min(of.step_ms.min() for of in analysis.throughput.values())
    most = max(of.step_ms.max() for of in analysis.throughput.values())
    published = PUBLISHED["decision_ms"]

    def shares(ms: float) -> tuple[str, str]:
        return f"{100 * ms / least:.2f}%", f"{100 * ms / most:.2f}%"

    title = f"One decision (median of {cost.decisions:,}), as a share of the paper's steps"
    _table(
        console,
        title,
        ("", "ms", f"share of {least:.0f} ms", f"share of {most:.0f} ms"),
        [
            (
                f"{len(GAMMAS)} calls of scikit-learn's predict",
                f"{cost.predict_ms:.3f}",
                *shares(cost.predict_ms),
            ),
            ("the same, published", f"{published:.3f}", *shares(published)),
            ("packed MLP, CPU", f"{cost.packed_ms:.3f}", *shares(cost.packed_ms)),
        ],
    )
    console.print(
        f"the packed MLP is {cost.ratio:.1f}x cheaper; both choose the same γ in"
        f" {cost.same_choice:.1%} of the decisions",
        markup=False,
    )


def _table(
    console: Console, title: str, columns: Sequence[str], rows: Iterable[Sequence[Any]]
) -> None:
    from rich.table import Table

    table = Table(box=None, padding=(0, 2, 0, 0), header_style="dim")
    for index, column in enumerate(columns):
        table.add_column(column, justify="left" if index == 0 else "right")
    for row in rows:
        table.add_row(*row)
    console.print(f"\n{title}", style="bold", markup=False)
    console.print(table)


def _pair(
    by_step: dict[str, tuple[float, float]],
    by_prompt: dict[str, tuple[float, float]],
    key: str,
    digits: int,
) -> tuple[str, str]:
    first, second = (
        f"{low:.{digits}f} to {high:.{digits}f}" for low, high in (by_step[key], by_prompt[key])
    )
    return first, second


def _change(change: Change) -> str:
    return f"{change.percent:+.1f}% ({change.low:+.1f} to {change.high:+.1f})"
