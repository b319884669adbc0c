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
    from ._cli_output import stderr_console, stdout_to_stderr

    chosen = _read_prompts(prompts)
    console = stderr_console()
    with stdout_to_stderr():
        from ._cli_distill import Progressing
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


def _read_prompts(text: str | None) -> list[Prompt]:
    from .prompts import evaluation_prompts
    from .training.prompts import load_prompts

    if text is None or text.isdecimal():
        return evaluation_prompts(None if text is None else int(text))
    path = Path(text).expanduser()
    if not path.is_file():
        raise ValueError(f"--prompts: expected a number or a file, got {text!r}")
    return load_prompts(path)
