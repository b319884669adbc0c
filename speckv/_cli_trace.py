"""``speckv profile`` and ``speckv replay``: a pair's exact trace, and policies replayed on it."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from . import _cli_options as opt

if TYPE_CHECKING:
    from .prompts import Prompt


def register(app: typer.Typer) -> None:
    """Add the commands."""
    app.command()(profile)
    app.command()(replay)


def profile(
    out: Annotated[Path, typer.Argument(metavar="TRACE", help="The file to write (Parquet).")],
    target: opt.Target = None,
    draft: opt.Draft = None,
    compression: Annotated[
        list[str] | None,
        typer.Option(
            help=f"Weight format of the target: {', '.join(opt.COMPRESSIONS)}; repeat for several."
            " [default: fp32]"
        ),
    ] = None,
    temperature: Annotated[
        list[float] | None,
        typer.Option(help="0 is greedy; repeat for several. [default: 0, 0.7 and 1]"),
    ] = None,
    prompts: Annotated[
        str | None,
        typer.Option(
            metavar="N|FILE",
            help="So many built-in prompts of each task, or a .txt or .jsonl file of prompts."
            " [default: all built-in ones]",
        ),
    ] = None,
    max_new_tokens: Annotated[int, typer.Option(metavar="N", help="Longest answer.")] = 128,
    seed: Annotated[int, typer.Option(help="Of the sampled answers.")] = 0,
    device: opt.Device = None,
) -> None:
    """Record what a draft proposes at every place of its target's own answers.

    Any policy can be replayed on the trace exactly; see speckv replay. The costs of a step on this
    machine are measured and kept with it. Interrupted, the same command goes on where it stopped.
    """
    from ._cli_output import Progressing, stderr_console, stdout_to_stderr

    chosen = _read_prompts(prompts)
    console = stderr_console()
    with stdout_to_stderr():
        from .traces.profile import ProfileRecipe
        from .traces.profile import profile as record_profile
        from .traces.schema import read_trace

        recipe = ProfileRecipe(
            compressions=tuple(compression or ProfileRecipe.compressions),
            temperatures=tuple(temperature or ProfileRecipe.temperatures),
            max_new_tokens=max_new_tokens,
            seed=seed,
        )
        with Progressing(console) as reporter:
            record_profile(target, draft, out, chosen, recipe, reporter, device=device)
        trace = read_trace(out)
    first = trace.rows.accepted[trace.rows.drafted > 0] > 0
    console.print(
        f"{out}: {len(trace.answers)} answers, {len(trace.rows):,} positions; the first draft "
        f"token is accepted at {first.mean():.1%} of them",
        markup=False,
    )


def replay(
    trace: Annotated[Path, typer.Argument(metavar="TRACE", help="What speckv profile wrote.")],
    policies: Annotated[
        str | None,
        typer.Option(
            metavar="A,B,...",
            help="Policies, separated by commas: those of --policy elsewhere, static,"
            " static-by-task, hf-confidence, hf-heuristic, adaedl, svip, confidence,"
            " online-logistic, oracle. [default: all of them]",
        ),
    ] = None,
    costs: Annotated[
        Path | None,
        typer.Option(
            metavar="FILE",
            help="JSON with step_ms and step_ms_per_context_token, 16 numbers each, by"
            " compression. [default: the costs in the trace]",
        ),
    ] = None,
    train_share: Annotated[
        float, typer.Option(help="Share of the prompts that settings are tuned on.")
    ] = 0.5,
    seed: Annotated[int, typer.Option(help="Of the split of the prompts.")] = 0,
    json: Annotated[
        Path | None, typer.Option("--json", metavar="FILE", help="Write everything as JSON.")
    ] = None,
    steps: Annotated[
        Path | None,
        typer.Option(
            metavar="FILE",
            help="Write the greedy steps of γ = 2, 4, 6 and 8 as CSV, in the columns of SpecKV's"
            " released data.",
        ),
    ] = None,
) -> None:
    """Replay policies on a trace: what each would have done, and how fast.

    Settings are tuned on some of the prompts and judged on the others, for each compression and
    temperature. Intervals are over prompts.
    """
    from rich.console import Console

    from ._cli_output import progress_bar, stderr_console, to_json
    from ._cli_replay import read_costs, show
    from .files import write_atomically
    from .traces.compare import compare, to_dict
    from .traces.schema import read_trace
    from .traces.steps import write_steps
    from .traces.tuning import DEFAULT, check_policy

    names = DEFAULT if policies is None else tuple(dict.fromkeys(policies.split(",")))
    for name in names:
        check_policy(name)
    found = read_trace(trace)
    tables = found.info.costs if costs is None else read_costs(costs)
    cells = {(a.compression, a.temperature) for a in found.answers}
    with progress_bar(stderr_console(), "replaying", len(cells) * len(names)) as advance:
        compared = compare(
            found,
            tables,
            names,
            train_share=train_share,
            seed=seed,
            advance=lambda: advance(1),
        )
    show(Console(highlight=False), found, compared)
    if steps is not None:
        write_steps(steps.expanduser(), found)
    if json is not None:
        document = to_dict(found, tables, compared, train_share=train_share, seed=seed)
        text = to_json(document, indent=1) + "\n"
        write_atomically(json.expanduser(), lambda path: path.write_text(text, encoding="utf-8"))


def _read_prompts(text: str | None) -> list[Prompt]:
    from .prompts import evaluation_prompts

    if text is None or text.isdecimal():
        return evaluation_prompts(None if text is None else int(text))
    return opt.read_prompt_file(text)
