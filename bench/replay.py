"""Replay against reality: a trace's answers decoded live, beside what the replay says of them.

    python -m bench.replay trace.parquet --policies fixed:3,speckv

The answers are those to prompts that speckv train, by default, leaves to judge on. Each is decoded
under every policy and plainly, in an order that rotates from answer to answer, after a warm-up.
Tokens must be those of the trace and steps those of the replay, or no number is printed. Live
tokens per second are of the decoding steps (drafting, verification and decisions; no prefill), as
the replay's are. Costs are the trace's; with ``--measure N`` they are measured anew, N times amid
the run, each for the answers that follow: a machine shared with others does not keep its pace.
"""

from __future__ import annotations

import argparse
from collections import Counter
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import Any

from bench.environment import command, environment, write_json
from speckv import Engine, Result, SamplingParams
from speckv.decoding.calibrate import measure as measure_costs
from speckv.policies import CostTable
from speckv.traces.compare import split_prompts
from speckv.traces.packed import PackedController
from speckv.traces.replay import Replayed, replay
from speckv.traces.schema import Answer, Trace, read_trace
from speckv.traces.tuning import resolve

PLAIN = "fixed:0"
_WARM_UP_TOKENS = 16
_TRAIN_SHARE, _SPLIT_SEED = 0.5, 0  # the defaults of speckv train and replay

Costs = Callable[[], CostTable]
"""Those of a step on this machine, now."""


def measure(
    engine: Engine, trace: Trace, policies: Sequence[str], costs: Sequence[Costs]
) -> dict[str, Any]:
    """Decode a trace's answers, which are of the engine's compression.

    Parameters
    ----------
    costs : sequence of callable
        Each is called once, and prices its share of the answers, which are decoded next.

    Raises
    ------
    RuntimeError
        Tokens are not the trace's, or steps not the replay's.
    """
    names = list(dict.fromkeys((PLAIN, *policies)))
    found: dict[str, list[tuple[Replayed, float]]] = {name: [] for name in names}
    tables = []
    for turn, ask in enumerate(costs):
        share = frozenset(trace.answers[turn :: len(costs)])
        tables.append(ask())
        part = trace.where(lambda a, share=share: a in share)  # type: ignore[misc]
        for name, pair in _measure(engine, part, names, tables[-1]).items():
            found[name].append(pair)
    return {
        "benchmark": "replay",
        "engine": engine.describe(),
        "command": command(),
        "compression": engine.target.compression,
        "temperature": trace.mean_temperature,
        "costs": [cost.to_dict() for cost in tables],
        "answers": len(trace.answers),
        "tokens": sum(int(part.tokens.sum()) for part, _ in found[PLAIN]),
        "policies": {name: _row(parts) for name, parts in found.items()},
        "environment": environment(),
    }


def _measure(
    engine: Engine, trace: Trace, names: list[str], cost: CostTable
) -> dict[str, tuple[Replayed, float]]:
    """What replays say of answers, and the seconds that their steps take."""
    engine._cost = cost  # what the policies weigh must be what the replay weighs
    replayed = {
        name: replay(
            trace,
            _controller(name, trace, engine.target.compression, cost),
            cost,
        )
        for name in names
    }
    for name in names:
        prompt = list(trace.answers[0].prompt_tokens)
        engine.generate(prompt, SamplingParams(max_new_tokens=_WARM_UP_TOKENS), policy=name)
    seconds = dict.fromkeys(names, 0.0)
    for i, answer in enumerate(trace.answers):
        shift = i % len(names)
        for name in names[shift:] + names[:shift]:
            result = engine.generate(list(answer.prompt_tokens), _params(answer), policy=name)
            check(trace, i, name, result, replayed[name])
            parts = result.stats.seconds
            seconds[name] += parts["draft"] + parts["verify"] + parts["decision"]
    return {name: (replayed[name], seconds[name]) for name in names}


def _controller(name: str, trace: Trace, compression: str, cost: CostTable) -> PackedController:
    policy = resolve(name, trace)
    return PackedController(policy.pack(compression, cost, temperature=trace.mean_temperature))


def check(trace: Trace, index: int, name: str, result: Result, replayed: Replayed) -> None:
    """Refuse an answer that is not the trace's, or steps that are not the replay's."""
    text = trace.rows.target_token[trace.first[index] : trace.first[index + 1]].tolist()
    if result.token_ids != text:
        raise RuntimeError(f"{name}: the tokens of answer {index} are not the trace's")
    if result.stats.steps != replayed.steps_of(index):
        raise RuntimeError(f"{name}: the steps of answer {index} are not the replay's")


def _some(trace: Trace, count: int) -> Trace:
    """So many answers, of each task as many as of any other where there are."""
    seen: Counter[str] = Counter()
    places = []
    for answer in trace.answers:
        places.append((seen[answer.task], answer))
        seen[answer.task] += 1
    kept = {answer for _, answer in sorted(places, key=lambda pair: pair[0])[:count]}
    return trace.where(lambda a: a in kept)


def _params(answer: Answer) -> SamplingParams:
    return SamplingParams(
        max_new_tokens=answer.limit, temperature=answer.temperature, seed=answer.seed
    )


def _row(parts: Sequence[tuple[Replayed, float]]) -> dict[str, Any]:
    tokens = sum(int(replayed.tokens.sum()) for replayed, _ in parts)
    steps = sum(int(replayed.steps.sum()) for replayed, _ in parts)
    said = tokens / sum(float(replayed.ms.sum()) for replayed, _ in parts) * 1e3
    live = tokens / sum(seconds for _, seconds in parts)
    return {
        "replayed_tokens_per_second": said,
        "live_tokens_per_second": live,
        "replayed_over_live": said / live,
        "tokens_per_step": tokens / steps,
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("trace", type=Path)
    parser.add_argument("--target", help="as for speckv generate")
    parser.add_argument("--draft", help="as for speckv generate; that of the trace")
    parser.add_argument("--compression", default="fp32")
    parser.add_argument("--temperature", type=float, default=0.0)
    parser.add_argument("--policies", default="fixed:3,speckv", help="separated by commas")
    parser.add_argument(
        "--answers",
        type=int,
        default=20,
        help="so many of the held-out prompts, spread over the tasks",
    )
    parser.add_argument(
        "--measure", type=int, default=0, metavar="N", help="measure costs anew, N times"
    )
    parser.add_argument("--out", type=Path, help="JSON file to write")
    arguments = parser.parse_args()
    kind = (arguments.compression, arguments.temperature)
    trace = read_trace(arguments.trace)
    known = split_prompts(trace, _TRAIN_SHARE, _SPLIT_SEED)
    held_out = trace.where(
        lambda a: (a.compression, a.temperature) == kind and a.prompt_id not in known
    )
    trace = _some(held_out, arguments.answers)
    if not 0 <= arguments.measure <= len(trace.answers):
        parser.error(f"--measure: expected 0 to {len(trace.answers)}, got {arguments.measure}")
    engine = Engine.from_pretrained(
        arguments.target, arguments.draft, compression=arguments.compression
    )
    costs: list[Costs] = [partial(trace.info.costs.__getitem__, arguments.compression)]
    if arguments.measure:
        costs = [partial(measure_costs, engine.target, engine.draft)] * arguments.measure
    document = measure(engine, trace, arguments.policies.split(","), costs)
    for name, row in document["policies"].items():
        print(
            f"{name:18} replayed {row['replayed_tokens_per_second']:.1f} tokens/s, live "
            f"{row['live_tokens_per_second']:.1f}: {row['replayed_over_live']:.3f}"
        )
    if arguments.out:
        write_json(arguments.out, document)


if __name__ == "__main__":
    main()
