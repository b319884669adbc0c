"""On a GPU: the loops on graphs give the eager loop's steps, without the host waiting."""

from __future__ import annotations

import importlib
from collections.abc import Callable, Iterator
from itertools import pairwise
from typing import Any

import pytest
import torch

from bench import roofline
from bench.audit import SyncAudit, audited
from bench.e2e_rows import random_decoder
from bench.lab import Lab
from bench.loop_rows import conditional_plans, conditional_rows
from speckv.decoding import EagerLoop, RequestBatch, StepRecord
from speckv.decoding.calibrate import measure
from speckv.decoding.choice import choose_loop
from speckv.models.llama import LlamaDecoder
from speckv.policies import parse_policy
from speckv.sampling import SamplingParams
from tests.decoding.loops import COST
from tests.decoding.test_planned import by_row, ended_early

pytestmark = pytest.mark.gpu

KINDS = {"graphed": "GraphedLoop", "device": "DeviceLoop"}
POLICIES = ["fixed:0", "fixed:1", "fixed:4", "fixed:15", "entropy:3", "confidence:0.3", "speckv"]
PROMPTS = [[5, 9, 3], [7, 1, 2, 3, 4, 5, 6, 7, 8], [11], list(range(17))]
NEW_TOKENS = [60, 45, 70, 30]
WAYS: dict[str, dict[str, Any]] = {
    "greedy": {},
    "sampled": {"temperature": 0.8},
    "truncated": {"temperature": 1.0, "top_k": 40, "top_p": 0.9},
    "rejection": {"temperature": 1.0, "coupling": "rejection"},
}
CAPACITY = 512


@pytest.fixture(scope="module", params=["bf16", "int8", "nf4"])
def pair(request: pytest.FixtureRequest) -> tuple[LlamaDecoder, LlamaDecoder]:
    """A random SmolLM2 and its first layers, which agree with it now and then."""
    lab = Lab(quick=True, dry=False)
    name = next(name for name in roofline.MODELS if "SmolLM2" in name)
    target = random_decoder(lab, name, request.param)
    return target, target.first_layers(target.config.layers - 1)


@pytest.fixture
def loop_of() -> Iterator[Callable[..., Any]]:
    """Makes loops on graphs, which are closed when the test is over."""
    made: list[Any] = []

    def make(kind: str, *arguments: Any, **options: Any) -> Any:
        module = importlib.import_module(f"speckv.decoding.{kind}")
        made.append(getattr(module, KINDS[kind])(*arguments, **options))
        return made[-1]

    yield make
    for loop in made:
        loop.close()


def requests_of(way: str, batch: int) -> RequestBatch:
    options = WAYS[way]
    params = [
        SamplingParams(max_new_tokens=n, **({**options, "seed": i} if options else {}))
        for i, n in enumerate(NEW_TOKENS[:batch])
    ]
    device = torch.device("cuda")
    return RequestBatch.build(
        PROMPTS[:batch], params, eos_ids=[7], max_length=CAPACITY, device=device
    )


def packed(policy: str) -> torch.Tensor:
    return parse_policy(policy).pack(cost=COST)


def texts(steps: dict[int, list[StepRecord]]) -> dict[int, tuple[list[int], int]]:
    """Tokens and end of each row."""
    return {
        row: ([t for record in records for t in record.tokens], records[-1].done)
        for row, records in steps.items()
    }


@pytest.mark.parametrize("batch", [1, 4])
@pytest.mark.parametrize("way", WAYS)
def test_all_loops_give_the_same_tokens(
    way: str, batch: int, pair: tuple[LlamaDecoder, LlamaDecoder], loop_of: Callable[..., Any]
) -> None:
    """The loops on graphs step alike. The eager loop's forwards may be of other widths, which
    changes no bit; its tokens are what is compared."""
    loops = [loop_of(kind, *pair, batch=batch, capacity=CAPACITY) for kind in KINDS]
    eager = EagerLoop(*pair, batch=batch, capacity=CAPACITY)
    requests = requests_of(way, batch)
    for policy in POLICIES:
        expected = texts(by_row(eager.run(requests, packed(policy))))
        steps = [by_row(loop.run(requests, packed(policy))) for loop in loops for _ in range(2)]
        assert texts(steps[0]) == expected, policy
        assert all(each == steps[0] for each in steps), policy


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("batch", [1, 4])
def test_the_host_never_waits(
    kind: str, batch: int, pair: tuple[LlamaDecoder, LlamaDecoder], loop_of: Callable[..., Any]
) -> None:
    loop = loop_of(kind, *pair, batch=batch, capacity=CAPACITY)
    for way in ("greedy", "sampled"):
        requests = requests_of(way, batch)
        for policy in ("fixed:3", "speckv"):
            for _ in loop.run(requests, packed(policy)):
                pass
            audit = SyncAudit()
            audited(loop, requests, packed(policy), audit)
            assert audit.found == [], (way, policy)


def test_costs_are_measured_on_captured_steps(pair: tuple[LlamaDecoder, LlamaDecoder]) -> None:
    table = measure(*pair, graphs=True)
    assert all(0 < before <= after for before, after in pairwise(table.step_ms))


def test_a_row_that_the_host_ends(
    pair: tuple[LlamaDecoder, LlamaDecoder], loop_of: Callable[..., Any]
) -> None:
    loop = loop_of("device", *pair, batch=4, capacity=CAPACITY)
    requests = requests_of("greedy", 4)
    whole = by_row(loop.run(requests, packed("fixed:2")))
    cut = by_row(ended_early(loop, requests, packed("fixed:2"), row=2, records=3))
    assert cut[2] == whole[2][:3] and cut[0] == whole[0]
    assert by_row(loop.run(requests, packed("fixed:2"))) == whole


def test_an_abandoned_generation(
    pair: tuple[LlamaDecoder, LlamaDecoder], loop_of: Callable[..., Any]
) -> None:
    loop = loop_of("device", *pair, batch=1, capacity=CAPACITY)
    requests = requests_of("greedy", 1)
    whole = by_row(loop.run(requests, packed("fixed:2")))
    running = loop.run(requests, packed("fixed:2"))
    next(running)
    running.close()
    assert by_row(loop.run(requests, packed("fixed:2"))) == whole


def test_conditional_nodes_count() -> None:
    rows = list(conditional_rows(Lab(quick=True, dry=False)))
    counted = [row for row in rows if "counted" in row]
    assert len(counted) == len(conditional_plans())
    for row in counted:
        assert row["matches_reference"], row
        assert row["iteration_us"]["p50"] > 0


def test_the_device_loop_is_what_a_pair_gets(pair: tuple[LlamaDecoder, LlamaDecoder]) -> None:
    assert str(choose_loop(*pair)) == "device loop"
