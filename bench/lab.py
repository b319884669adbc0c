"""Where the GPU command measures, and how a launch is timed."""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from bench.environment import environment
from speckv.decoding import RequestBatch
from speckv.kernels.layout import StepState
from speckv.policies import CostTable
from speckv.sampling import SamplingParams

Row = dict[str, Any]

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
    """

    def __init__(self, quick: bool, dry: bool) -> None:
        self.quick, self.dry = quick, dry
        self.trace: Path | None = None
        self.device = torch.device("cpu" if dry else "cuda")
        self.facts = environment()
        self._l2_bytes = 0
        if not dry:
            self._l2_bytes = torch.cuda.get_device_properties(self.device).L2_cache_size

    def copies(self, size: int) -> int:
        """How many buffers of ``size`` bytes are more than the L2 cache holds, at least two."""
        return 2 if self.dry else self._l2_bytes // size + 2

    def launches(self, copies: int) -> int:
        """Launches of one replay: every buffer at least once."""
        return copies if self.dry else max(copies, _LAUNCHES)

    def time(self, calls: Sequence[Callable[[], Any]], restore: Callable[[], None]) -> Row:
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
        restore()
        for call in calls:
            call()
        empty: Row = {"launches": len(calls), "n": 0, "kernel_us": None, "host_us": None}
        if self.dry:
            return empty
        torch.cuda.synchronize()
        restore()
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            for call in calls:
                call()
        # Writing this keeps the GPU busy until the replay is enqueued, and empties the L2 cache.
        backlog = torch.empty(4 * self._l2_bytes, dtype=torch.uint8, device=self.device)
        means = []
        for _ in range(20 if self.quick else 100):
            restore()
            backlog.zero_()
            start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
            start.record()
            graph.replay()
            end.record()
            torch.cuda.synchronize()
            means.append(start.elapsed_time(end) * 1e3 / len(calls))
        restore()
        torch.cuda.synchronize()
        host = []
        for call in calls[:_LAUNCHES]:  # more could fill the queue, and wait
            began = time.perf_counter_ns()
            call()
            host.append((time.perf_counter_ns() - began) / 1e3)
        torch.cuda.synchronize()
        return {
            **empty,
            "n": len(means),
            "kernel_us": quantiles(means),
            "host_us": quantiles(host),
        }


def one_request(lab: Lab, tokens: int, capacity: int = 512) -> RequestBatch:
    """A greedy request of ``tokens`` new tokens that does not end before."""
    return RequestBatch.build(
        [PROMPT],
        [SamplingParams(max_new_tokens=tokens, ignore_eos=True)],
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
