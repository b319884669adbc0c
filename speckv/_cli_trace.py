"""``speckv profile``, ``replay``, ``train``, ``report`` and ``calibrate``: traces and costs."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from . import _cli_options as opt

if TYPE_CHECKING:
    from .prompts import Prompt
    from .traces.schema import Trace as _Trace


Trace = Annotated[Path, typer.Argument(metavar="TRACE", help="What speckv profile wrote.")]
Costs = Annotated[
    Path | None,
    typer.Option(
        metavar="FILE",
        help="JSON with step_ms and step_ms_per_context_token, 16 numbers each, by compression."
        " [default: the costs in the trace]",
    ),
]
Policies = Annotated[
    str | None,
    typer.Option(
        metavar="A,B,...",
        help="Policies, separated by commas: those of --policy elsewhere, static, static-by-task,"
        " hf-confidence, hf-heuristic, adaedl, svip, confidence, online-logistic, oracle,"
        " paper-fitted, boosted. [default: all but the last two, which take minutes]",
    ),
]
TrainShare = Annotated[
    float, typer.Option(help="Share of the prompts to tune or train on; the others judge.")
]
SplitSeed = Annotated[int, typer.Option(help="Of the split of the prompts.")]


def register(app: typer.Typer) -> None:
    """Add the commands."""
    app.command()(profile)
    app.command()(replay)
    app.command()(train)
    app.command()(calibrate)
    app.command()(report)


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
    trace: Trace,
    policies: Policies = None,
    costs: Costs = None,
    train_share: TrainShare = 0.5,
    seed: SplitSeed = 0,
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

    from ._cli_output import write_json
    from ._cli_replay import replay_all, show
    from .traces.compare import to_dict
    from .traces.steps import write_steps

    study = replay_all(trace, policies, costs, train_share=train_share, seed=seed)
    show(Console(highlight=False), study.trace, study.found)
    if steps is not None:
        write_steps(steps.expanduser(), study.trace)
    if json is not None:
        document = to_dict(
            study.trace, study.costs, study.found, train_share=train_share, seed=seed
        )
        write_json(json.expanduser(), document)


def train(
    trace: Trace,
    out: Annotated[
        Path | None,
        typer.Option(
            metavar="FILE",
            help="The policy file to write. [default: where the policy speckv of this pair is"
            " looked for]",
        ),
    ] = None,
    compression: Annotated[
        list[str] | None,
        typer.Option(help="Learn from this compression alone; repeat for several. [default: all]"),
    ] = None,
    costs: Costs = None,
    rounds: Annotated[
        int, typer.Option(help="Of gathering decisions under the policy and fitting.")
    ] = 3,
    seeds: Annotated[int, typer.Option(metavar="N", help="Fits of each round.")] = 3,
    train_share: TrainShare = 0.5,
    seed: SplitSeed = 0,
) -> None:
    """Train the policy speckv of a pair on its trace, for the most tokens per second.

    Half of the prompts are learned from; speckv replay, with the same split, judges on the others.
    """
    from ._cli_output import Progressing, stderr_console
    from ._cli_replay import read_costs
    from .decoding.trained import pair_key, policy_path
    from .traces.schema import read_trace
    from .training.gamma import GammaRecipe, train_policy

    recipe = GammaRecipe(rounds=rounds, seeds=tuple(range(seeds)))
    found = read_trace(trace)
    tables = found.info.costs if costs is None else read_costs(costs)
    if compression:
        found = _of_compressions(found, compression)
    console = stderr_console()
    with Progressing(console) as reporter:
        trained = train_policy(found, tables, recipe, reporter, train_share=train_share, seed=seed)
    path = out or policy_path(pair_key(found.info.target, found.info.draft))
    trained.mlp.save(path.expanduser())
    for cell, gain in trained.over_static.items():
        console.print(
            f"{cell}: {gain - 1:+.1%} tokens/s over the best fixed γ, on validation prompts",
            markup=False,
        )
    console.print(f"written to {path}", markup=False)


def calibrate(
    target: opt.Target = None,
    draft: opt.Draft = None,
    compression: opt.Compression = None,
    dtype: opt.Dtype = None,
    device: opt.Device = None,
    json: Annotated[
        Path | None, typer.Option("--json", metavar="FILE", help="Write the table as JSON.")
    ] = None,
) -> None:
    """Measure what a step costs on this machine, for a pair; the policy speckv weighs it.

    The engine does this by itself where the pair, the machine or the versions are new. This command
    measures anew and replaces what is kept: run it with nothing else running.
    """
    from rich.console import Console

    from ._cli_output import stdout_to_stderr
    from ._cli_replay import show_costs, write_costs

    with stdout_to_stderr():
        from .decoding.calibrate import calibrated
        from .decoding.choice import choose_loop
        from .decoding.lookup import parse_draft
        from .models.loading import load_model
        from .models.pairing import load_draft

        lookup, name = parse_draft(draft)
        model, tokenizer = load_model(target, compression=compression, dtype=dtype, device=device)
        drafted, _ = load_draft(name, model, tokenizer)
        if drafted is None and lookup is None:
            raise ValueError(f"draft: expected one, since {model.name} has none of its own")
        graphs = choose_loop(model, drafted, lookup).on_graphs
        table = calibrated(model, drafted, graphs=graphs, anew=True)
    show_costs(Console(highlight=False), model.compression, table)
    if json is not None:
        write_costs(json.expanduser(), {model.compression: table})


def report(
    trace: Trace,
    out: Annotated[
        Path | None,
        typer.Option(metavar="DIR", help="Where to write. [default: TRACE with .report added]"),
    ] = None,
    policies: Policies = None,
    costs: Costs = None,
    train_share: TrainShare = 0.5,
    seed: SplitSeed = 0,
    tries: Annotated[
        bool,
        typer.Option(
            "--tries",
            help="Also what other information, training targets and stopping rules would give; "
            "minutes for each temperature.",
        ),
    ] = False,
) -> None:
    """Replay policies on a trace and write what came of it: report.html, plots, report.json."""
    from ._cli_output import stderr_console, write_json
    from ._cli_replay import replay_all, try_all
    from .figures import require_matplotlib
    from .traces.compare import to_dict
    from .traces.report import tries_to_list, write_report

    require_matplotlib()
    study = replay_all(trace, policies, costs, train_share=train_share, seed=seed)
    if tries:
        study = try_all(study)
    folder = (out or trace.with_name(f"{trace.name}.report")).expanduser()
    path = write_report(study, folder)
    document = to_dict(study.trace, study.costs, study.found, train_share=train_share, seed=seed)
    write_json(folder / "report.json", document | {"tries": tries_to_list(study)})
    stderr_console().print(f"wrote {path}", markup=False)


def _of_compressions(found: _Trace, names: list[str]) -> _Trace:
    there = dict.fromkeys(answer.compression for answer in found.answers)
    for name in names:
        if name not in there:
            raise ValueError(f"--compression: expected some of {', '.join(there)}; got {name!r}")
    return found.where(lambda answer: answer.compression in names)


def _read_prompts(text: str | None) -> list[Prompt]:
    from .prompts import evaluation_prompts

    if text is None or text.isdecimal():
        return evaluation_prompts(None if text is None else int(text))
    return opt.read_prompt_file(text)
