"""The ``speckv`` command.

Torch and transformers are imported only inside the commands that need them, so that ``--help`` and
mistakes in the arguments answer at once. Exit codes: 0 success, 1 failure, 2 bad arguments, 130
Ctrl-C.
"""

from __future__ import annotations

import contextlib
import json as json_module
import os
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from . import _cli_bench, _cli_trace
from . import _cli_options as opt
from ._version import __version__
from .errors import PolicyError, SpeckvError
from .sampling import SamplingParams

if TYPE_CHECKING:
    from collections.abc import Sequence

    from rich.console import Console

    from .engine import Engine, Prompt
    from .results import Result

_INTERRUPTED = 130

app = typer.Typer(
    name="speckv",
    help="Lossless speculative decoding that decides, token by token, how far to speculate.",
    add_completion=False,
    pretty_exceptions_enable=False,
    rich_markup_mode=None,
)
_cli_trace.register(app)
app.add_typer(_cli_bench.app, name="bench")


def load_engine(model: opt.ModelOptions) -> Engine:
    """Load and warm up an engine; whatever that prints goes to stderr.

    Raises
    ------
    SpeckvError, ValueError
        As ``Engine.from_pretrained``.
    """
    from ._cli_output import stdout_to_stderr, warnings_as_lines

    with stdout_to_stderr(), warnings_as_lines():
        from .engine import Engine

        engine = Engine.from_pretrained(
            model.target,
            model.draft,
            compression=model.compression,
            policy=model.policy,
            device=model.device,
            loop=model.loop,
            dtype=model.dtype,
            progress=True,
        )
        engine.warmup()
    return engine


@app.callback(invoke_without_command=True)
def _root(
    context: typer.Context,
    version: Annotated[bool, typer.Option("--version", help="Print the version and exit.")] = False,
) -> None:
    if version:
        typer.echo(f"speckv {__version__}")
        raise typer.Exit
    if context.invoked_subcommand is None:
        typer.echo(context.get_help())
        raise typer.Exit


@app.command()
def generate(
    prompt: Annotated[
        str | None, typer.Argument(help="The text to continue, or - to read it from stdin.")
    ] = None,
    max_new_tokens: opt.MaxNewTokens = 128,
    temperature: opt.Temperature = 0.0,
    top_k: opt.TopK = 0,
    top_p: opt.TopP = 1.0,
    seed: opt.Seed = None,
    coupling: opt.Coupling = "gumbel",
    ignore_eos: opt.IgnoreEos = False,
    policy: opt.Policy = None,
    gamma: opt.Gamma = None,
    target: opt.Target = None,
    draft: opt.Draft = None,
    compression: opt.Compression = None,
    dtype: opt.Dtype = None,
    device: opt.Device = None,
    loop: opt.Loop = "auto",
    chat: Annotated[
        bool, typer.Option("--chat/--no-chat", help="Apply the target's chat template.")
    ] = False,
    system: opt.System = None,
    json: Annotated[
        bool, typer.Option("--json", help="Print one JSON object on stdout, nothing else.")
    ] = False,
    compare: Annotated[
        bool, typer.Option("--compare", help="Measure plain decoding and a fixed γ of 4 beside.")
    ] = False,
    runs: Annotated[int, typer.Option(metavar="N", help="Rounds of --compare.")] = 3,
) -> None:
    """Continue a prompt.

    The text streams to stdout; statistics follow on stderr.
    """
    from ._cli_output import show_stats, stderr_console, to_json

    text = _read_prompt(prompt)
    if system is not None and not chat:
        raise ValueError("--system: expected together with --chat, got it alone")
    if runs < 1:
        raise ValueError(f"--runs: expected at least 1, got {runs}")
    model = opt.ModelOptions(
        target, draft, compression, dtype, opt.resolve_policy(policy, gamma), device, loop
    )
    params = SamplingParams(
        max_new_tokens, temperature, top_k, top_p, seed, coupling, ignore_eos=ignore_eos
    ).seeded()

    console = stderr_console()
    engine = load_engine(model)
    _introduce(console, engine, params)
    asked: Prompt = text
    if system is not None:
        asked = [{"role": "system", "content": system}, {"role": "user", "content": text}]

    result = _generate_shown(engine, asked, params, chat=chat, quiet=json)
    stats = result.stats.to_dict()
    document = {
        "text": result.text,
        "token_ids": list(result.token_ids),
        "finish_reason": result.finish_reason,
        "stats": stats,
    }
    code = _INTERRUPTED if result.finish_reason == "interrupted" else 0
    if not json:
        show_stats(console, stats)
    if compare and code == 0:
        code = _compare(engine, asked, params, chat, model.policy, runs, document)
    if json:
        typer.echo(to_json(document))
    raise typer.Exit(code)


@app.command()
def chat(
    max_new_tokens: opt.MaxNewTokens = 512,
    temperature: opt.Temperature = 0.0,
    top_k: opt.TopK = 0,
    top_p: opt.TopP = 1.0,
    seed: opt.Seed = None,
    coupling: opt.Coupling = "gumbel",
    policy: opt.Policy = None,
    gamma: opt.Gamma = None,
    target: opt.Target = None,
    draft: opt.Draft = None,
    compression: opt.Compression = None,
    dtype: opt.Dtype = None,
    device: opt.Device = None,
    loop: opt.Loop = "auto",
    system: opt.System = None,
) -> None:
    """Talk over several turns.

    Ctrl-C stops an answer, /exit leaves.
    """
    from ._cli_chat import Conversation
    from ._cli_output import stderr_console

    model = opt.ModelOptions(
        target, draft, compression, dtype, opt.resolve_policy(policy, gamma), device, loop
    )
    params = SamplingParams(max_new_tokens, temperature, top_k, top_p, seed, coupling).seeded()
    with contextlib.suppress(ImportError):
        import readline  # noqa: F401  (line editing and history for input())

    console = stderr_console()
    engine = load_engine(model)
    _introduce(console, engine, params)
    Conversation(engine, params, system, console).run()


@app.command()
def distill(
    context: typer.Context,
    target: opt.Target = None,
    out: Annotated[
        Path | None,
        typer.Option(metavar="DIR", help="Folder of the draft; needed unless --corpus-only."),
    ] = None,
    prompts: Annotated[
        str,
        typer.Option(
            metavar="N|FILE",
            help="So many built-in training prompts, or a .txt or .jsonl file of prompts.",
        ),
    ] = "20480",
    written: Annotated[
        int,
        typer.Option(
            metavar="N",
            help="Let the target write about so many more; they are more varied. It needs a chat"
            " template.",
        ),
    ] = 0,
    max_new_tokens: Annotated[
        int, typer.Option(metavar="N", help="Longest response to train on.")
    ] = 256,
    epochs: Annotated[float, typer.Option(help="Passes over the corpus.")] = 3.0,
    layers: Annotated[
        list[str] | None,
        typer.Option(
            metavar="I,J",
            help="Begin as these layers of the target; repeat to try several."
            " [default: tries the first 1, 2 and 4]",
        ),
    ] = None,
    head: Annotated[
        list[int] | None,
        typer.Option(
            metavar="V",
            help="Tokens that the draft can propose; repeat to try several."
            " [default: tries 4096, 8192 and 16384]",
        ),
    ] = None,
    learning_rate: Annotated[float, typer.Option(help="The highest one.")] = 3e-3,
    seed: Annotated[int, typer.Option(help="Of prompts, draws and the order of training.")] = 0,
    compression: opt.Compression = None,
    device: opt.Device = None,
    corpus_only: Annotated[
        bool,
        typer.Option(
            "--corpus-only", help="Write the training text and stop; several processes share it."
        ),
    ] = False,
) -> None:
    """Make a draft for a target.

    The target writes its own training text; the draft's depth and head are those with the most
    predicted tokens per second on this machine. Interrupted, the same command goes on where it
    stopped.
    """
    from ._cli_distill import DistillOptions, run_distill
    from ._cli_output import stderr_console

    console = stderr_console()
    manifest = run_distill(
        DistillOptions(
            target,
            out,
            prompts,
            written,
            max_new_tokens,
            epochs,
            layers or [],
            head or [],
            learning_rate,
            seed,
            compression,
            device,
            corpus_only,
            arguments=context.obj,
        ),
        console,
    )
    if manifest is None:
        console.print("the training text is complete", markup=False)
        return
    held_out = manifest.card["held_out"]
    shares = ", ".join(f"γ={g} {a:.1%}" for g, a in held_out["acceptance"].items())
    predicted = held_out["predicted"]
    console.print(
        f"{out}: {len(manifest.layers)} layers, head {manifest.vocab_size:,}; accepted {shares}; "
        f"predicted {predicted['speedup']:.2f}x at γ={predicted['gamma']}",
        markup=False,
    )


@app.command()
def paper(
    folder: Annotated[
        Path, typer.Argument(metavar="DIR", help="Folder with the CSV files that SpecKV released.")
    ],
    json: Annotated[
        Path | None, typer.Option("--json", metavar="FILE", help="Write the headline numbers.")
    ] = None,
    details: Annotated[
        Path | None, typer.Option(metavar="FILE", help="Write everything else, as JSON.")
    ] = None,
    plots: Annotated[
        Path | None, typer.Option(metavar="DIR", help="Write plots, as PNG files.")
    ] = None,
) -> None:
    """Repeat the evaluation of SpecKV (arXiv 2605.02888) on its released data.

    Beside it: controls, and what the same choices mean in tokens per second.
    """
    from rich.console import Console

    from ._cli_output import stderr_console
    from ._cli_paper import run_paper

    run_paper(folder, json, details, plots, Console(highlight=False), stderr_console())


@app.command()
def doctor(
    json: Annotated[
        bool, typer.Option("--json", help="Print one JSON object on stdout, nothing else.")
    ] = False,
) -> None:
    """Check this machine.

    Shows versions, devices and which loop decodes there (on a GPU a small graph is run), which
    kernels compile, and what is missing and how to get it. Exits with 0 if generation on the CPU
    can work.
    """
    from . import doctor as checks
    from ._cli_output import stderr_console, stdout_to_stderr

    with stdout_to_stderr():
        report = checks.examine(stderr_console())
    if json:
        typer.echo(json_module.dumps(report.to_dict()))
    else:
        from rich.console import Console

        checks.show(Console(highlight=False), report)
    raise typer.Exit(0 if report.cpu_works else 1)


def run(arguments: Sequence[str]) -> int:
    """Run the command line and return its exit code; expected errors become one line on stderr.

    Parameters
    ----------
    arguments : sequence of str
        What follows the program's name. With ``SPECKV_TRACEBACK`` set in the environment, errors
        are raised instead of summarised.
    """
    try:
        code = app(
            args=list(arguments), prog_name="speckv", standalone_mode=False, obj=tuple(arguments)
        )
    except Exception as error:
        summary = _summary(error)
        if summary is None or os.environ.get("SPECKV_TRACEBACK"):
            raise
        message, code = summary
        print(f"error: {' '.join(message.split())}", file=sys.stderr)
    return code if isinstance(code, int) else 0


def main() -> None:
    """Entry point of the console script."""
    for stream in (sys.stdout, sys.stderr):
        # A terminal that cannot show a γ or a token must not end the program.
        if hasattr(stream, "reconfigure"):
            stream.reconfigure(errors="replace")
    sys.exit(run(sys.argv[1:]))


def _summary(error: Exception) -> tuple[str, int] | None:
    """The one-line message and exit code of an expected error, ``None`` for a defect."""
    # Typer's usage errors are click's or, in later versions, its own copy of them: both have this.
    format_message = getattr(error, "format_message", None)
    if format_message is not None:
        return str(format_message()), 2
    if isinstance(error, PolicyError):
        return str(error), 2
    if isinstance(error, (SpeckvError, OSError)):
        return str(error), 1
    if isinstance(error, (ValueError, TypeError)):
        return str(error), 2
    return None


def _introduce(console: Console, engine: Engine, params: SamplingParams) -> None:
    """Say what runs and, when sampling, the seed that repeats it."""
    seed = f", seed {params.seed}" if params.temperature > 0 else ""
    console.print(f"{engine.describe()}{seed}", style="dim", markup=False)


def _read_prompt(prompt: str | None) -> str:
    if prompt is None:
        raise ValueError("PROMPT: expected a text, or - to read it from stdin; got nothing")
    if prompt == "-":
        prompt = sys.stdin.read().rstrip("\n")
    if not prompt.strip():
        raise ValueError("PROMPT: expected some text, got an empty prompt")
    return prompt


def _generate_shown(
    engine: Engine, asked: Prompt, params: SamplingParams, *, chat: bool, quiet: bool
) -> Result:
    """Stream one generation to stdout or, with ``quiet``, behind a progress bar on stderr."""
    from ._cli_chat import write_chunk
    from ._cli_output import progress_bar, stderr_console, stdout_to_stderr
    from ._cli_run import follow

    if not quiet:
        result = follow(engine.stream(asked, params, chat=chat), write_chunk)
        typer.echo()
        return result

    with (
        stdout_to_stderr(),
        progress_bar(stderr_console(), "generating", params.max_new_tokens) as advance,
    ):
        return follow(
            engine.stream(asked, params, chat=chat), lambda chunk: advance(len(chunk.token_ids))
        )


def _compare(
    engine: Engine,
    asked: Prompt,
    params: SamplingParams,
    chat: bool,
    policy: str,
    runs: int,
    document: dict[str, Any],
) -> int:
    """Add the comparison to ``document``, show it on stderr, and return the exit code."""
    from ._cli_output import stderr_console, stdout_to_stderr
    from ._cli_run import compare, show_comparison

    console = stderr_console()
    try:
        with stdout_to_stderr():
            comparison = compare(
                engine,
                asked,
                params,
                chat=chat,
                policy=policy,
                runs=runs,
                expected=document["token_ids"],
                console=console,
            )
    except KeyboardInterrupt:
        console.print("the comparison was interrupted", style="dim")
        return _INTERRUPTED
    document["compare"] = comparison.to_dict()
    show_comparison(console, comparison, policy)
    if comparison.identical is False:
        console.print("error: the tokens differ between policies; please report this", markup=False)
        return 1
    return 0


if __name__ == "__main__":
    main()
