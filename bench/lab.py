"""Where the GPU command measures, and how a launch is timed."""

from __future__ import annotations

import math
import time
import traceback
from collections.abc import Callable, Generator, Iterable, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from bench.environment import environment
from speckv.decoding import RequestBatch
from speckv.decoding.graphed import capture
from speckv.errors import ModelError
from speckv.kernels.layout import StepState
from speckv.policies import CostTable
from speckv.sampling import SamplingParams

Row = dict[str, Any]
Calls = Sequence[Callable[[], Any]]

COST = CostTable.from_parts(0.3, [2.0 + 0.05 * width for width in range(16)])
"""For policies that weigh costs; what they decide is not what is measured."""

PROMPT = [1, 2, 3, 4]
"""Of requests to models with random weights."""

_LAUNCHES = 100


class Lab:
    """Where a part runs: the GPU, or a dry run on the CPU.

    Parameters
    ----------
    quick : bool
        Fewer shapes and repeats.
    dry : bool
        Tiny shapes on the CPU, no times.

    Attributes
    ----------
    trace : Path, optional
        Recorded signals and acceptance, for what needs them.
    end : float
        When the section under way is to stop, by `time.monotonic`.
    """

    def __init__(self, quick: bool, dry: bool) -> None:
        self.quick, self.dry = quick, dry
        self.trace: Path | None = None
        self.end = math.inf
        self.device = torch.device("cpu" if dry else "cuda")
        self.facts = environment()
        self._l2_bytes = 0
        if not dry:
            self._l2_bytes = torch.cuda.get_device_properties(self.device).L2_cache_size

    @property
    def seconds_left(self) -> float:
        """Of the section under way, at least one."""
        return max(self.end - time.monotonic(), 1.0)

    def copies(self, size: int) -> int:
        """How many buffers of ``size`` bytes are twice what the L2 cache holds, at least two.

        What the cache keeps is not strictly what was used last: once over would leave some of it.
        """
        return 2 if self.dry else 2 * self._l2_bytes // size + 2

    def launches(self, copies: int) -> int:
        """Launches of one replay: every buffer at least once."""
        return copies if self.dry else max(copies, _LAUNCHES)

    def time(self, calls: Calls, restore: Callable[[], None]) -> Row:
        """Times of one call, in microseconds; None in a dry run, which only runs the calls.

        ``kernel_us``: the calls are captured into one graph; each of ``n`` replays gives the mean
        time of a call, and the quantiles are over replays. ``host_us``: wall time of a call on the
        host, which does not wait for the GPU; the quantiles are over calls.

        Parameters
        ----------
        calls : sequence of callable
            One launch each, on buffers that together exceed the L2 cache and on states of their
            own, so nothing between them needs resetting.
        restore : callable
            Puts all states back; outside every timed region.
        """
        return self.turns((calls, restore))[0]

    def turns(self, *variants: tuple[Calls, Callable[[], None]]) -> list[Row]:
        """As `time`, of several variants whose replays take turns.

        Rows after the first also have ``above_first_us``: how much longer a call takes than one of
        the first variant, by pairs of neighbouring replays.
        """
        rows: list[Row] = []
        for calls, restore in variants:
            restore()
            for call in calls:
                call()
            rows.append({"launches": len(calls), "n": 0, "kernel_us": None, "host_us": None})
        for row in rows[1:]:
            row["above_first_us"] = None
        if self.dry:
            return rows
        torch.cuda.synchronize()
        graphs = [_captured(*variant) for variant in variants]
        # Writing this keeps the GPU busy until the replay is enqueued, and empties the L2 cache.
        backlog = torch.empty(4 * self._l2_bytes, dtype=torch.uint8, device=self.device)
        means: list[list[float]] = [[] for _ in variants]
        for _ in range(20 if self.quick else 100):
            for (calls, restore), graph, found in zip(variants, graphs, means, strict=True):
                restore()
                backlog.zero_()
                found.append(_elapsed_us(graph.replay) / len(calls))
        for row, (calls, restore), found in zip(rows, variants, means, strict=True):
            row |= {"n": len(found), "kernel_us": quantiles(found)}
            row["host_us"] = quantiles(_host_us(calls, restore))
        for row, found in zip(rows[1:], means[1:], strict=True):
            pairs = zip(found, means[0], strict=True)
            row["above_first_us"] = quantiles([mine - first for mine, first in pairs])
        return rows

    def copied(self) -> Row:
        """Bandwidth of a large copy, bytes read and written, as ``bytes_per_us``.

        The faster of a copy and of a kernel that does nothing else: in a graph a copy is another
        kind of node.
        """
        size = 1 << (12 if self.dry else 28)
        source = torch.zeros(size, dtype=torch.uint8, device=self.device)
        target = torch.empty_like(source)
        count = self.launches(2)
        copies = [partial(target.copy_, source)] * count
        kernels = [partial(torch.bitwise_not, source, out=target)] * count
        times = min(
            self.turns((copies, nothing), (kernels, nothing)),
            key=lambda row: 0.0 if self.dry else row["kernel_us"]["p50"],
        )
        row: Row = {"name": "copy", "dtype": "uint8", "bytes": 2 * size, **times}
        bandwidth = None if self.dry else row["bytes"] / row["kernel_us"]["p50"]
        return row | {"bytes_per_us": bandwidth}


def _captured(calls: Calls, restore: Callable[[], None]) -> Any:
    restore()

    def work() -> None:
        for call in calls:
            call()

    graph, _ = capture(work, None)
    graph.instantiate()
    return graph


def _elapsed_us(work: Callable[[], object]) -> float:
    start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    start.record()
    work()
    end.record()
    torch.cuda.synchronize()
    return float(start.elapsed_time(end)) * 1e3


def _host_us(calls: Calls, restore: Callable[[], None]) -> list[float]:
    restore()
    torch.cuda.synchronize()
    found = []
    for call in calls[:_LAUNCHES]:  # more could fill the queue, and wait
        began = time.perf_counter_ns()
        call()
        found.append((time.perf_counter_ns() - began) / 1e3)
    torch.cuda.synchronize()
    return found


class DeviceLost(RuntimeError):
    """The device answers this process no more; another one may go on."""


def isolated(
    facts: Row, rows: Callable[[], Iterable[Row]], *, vital: bool = True
) -> Generator[Row, None, None]:
    """What ``rows`` yields; what goes wrong becomes a row, so that others are measured anyway.

    What cannot be had here (a package, or a `ModelError`: a format needs bitsandbytes) is a row
    that was skipped.

    Parameters
    ----------
    facts : Row
        Of the row that says what went wrong; ``name`` is among them.
    vital : bool
        Whether an error is a failure; one of a baseline is not.

    Raises
    ------
    DeviceLost
        After that row, if the error has left the device unusable.
    """
    try:
        yield from rows()
    except (ModelError, ModuleNotFoundError) as error:
        yield {**facts, "skipped": str(error)}
    except DeviceLost:
        raise
    except Exception as error:
        traceback.print_exc()
        problem = f"{type(error).__name__}: {error}"
        yield facts | ({"exit_code": 1, "problem": problem} if vital else {"skipped": problem})
        error.__traceback__ = None  # its frames hold tensors
        try:
            if torch.cuda.is_available():
                torch.cuda.synchronize()
                torch.cuda.empty_cache()
        except RuntimeError as lost:
            raise DeviceLost(str(lost)) from None


def one_request(
    lab: Lab, tokens: int, capacity: int = 512, *, batch: int = 1, temperature: float = 0.0
) -> RequestBatch:
    """Requests, one or more alike, of ``tokens`` new tokens that do not end before."""
    return RequestBatch.build(
        [[*PROMPT, *range(10, 10 + row)] for row in range(batch)],
        [SamplingParams(tokens, temperature, ignore_eos=True, seed=row) for row in range(batch)],
        eos_ids=[],
        max_length=capacity,
        device=lab.device,
    )


def quantiles(values: Sequence[float]) -> dict[str, float]:
    """p50, p90 and p99, linear between the values, and a 95% interval of the median.

    The interval is that of order statistics: the sign test's, which assumes no distribution.
    """
    ordered = torch.tensor(values, dtype=torch.float64).sort().values
    levels = torch.tensor([0.5, 0.9, 0.99], dtype=torch.float64)
    found = dict(zip(("p50", "p90", "p99"), ordered.quantile(levels).tolist(), strict=True))
    reach = 1.96 * math.sqrt(len(values)) / 2
    middle = (len(values) - 1) / 2
    found["low"] = float(ordered[max(math.floor(middle - reach), 0)])
    found["high"] = float(ordered[min(math.ceil(middle + reach), len(values) - 1)])
    return found


def nothing() -> None:
    """Restores calls that change no state."""


class States:
    """Start states in turn, each for a launch of its own, put back all at once.

    Parameters
    ----------
    starts : sequence of StepState
        Of one shape.
    count : int
        Launches; the i-th begins at ``starts[i % len(starts)]``.
    """

    def __init__(self, starts: Sequence[StepState], count: int) -> None:
        turns = [starts[i % len(starts)] for i in range(count)]
        self._start = [torch.stack(tensors) for tensors in zip(*map(_tensors, turns), strict=True)]
        self._now = [bank.clone() for bank in self._start]
        self.each = [StepState(*(bank[i] for bank in self._now)) for i in range(count)]

    def restore(self) -> None:
        """Put every state back to its start."""
        for now, start in zip(self._now, self._start, strict=True):
            now.copy_(start)

    def gives(self, call: Callable[[], Any], expected: Callable[[StepState], None]) -> bool:
        """Whether ``call``, on the first state, leaves the counters and tokens of ``expected``.

        ``expected`` changes a state on the CPU.
        """
        self.restore()
        want = StepState(*(_cpu(bank[0]) for bank in self._now))
        expected(want)
        call()
        got = self.each[0]
        same = torch.equal(_cpu(got.rows), want.rows)
        return same and torch.equal(_cpu(got.sequence), want.sequence)


def _tensors(state: StepState) -> tuple[Tensor, ...]:
    return state.rows, state.running, state.sequence, state.signals


def _cpu(tensor: Tensor) -> Tensor:
    """A copy on the CPU."""
    return tensor.to("cpu", copy=True)
