"""Plans of the conditional nodes' costs: built into graphs, they run as often as they say."""

from __future__ import annotations

import pytest
import torch

from bench.lab import Lab
from bench.loop_rows import Ticking, conditional_plans
from speckv.decoding import plan
from speckv.decoding.conditional import Driver, PlanGraph
from speckv.kernels import layout as at
from tests.decoding.cuda_stub import Api


@pytest.mark.parametrize("name", conditional_plans())
def test_a_graph_runs_its_iterations(name: str) -> None:
    each = conditional_plans()[name]
    ticking = Ticking(Lab(quick=True, dry=True))
    needed = plan.works(each)
    api = Api(dict(enumerate(ticking.works[work] for work in needed)))
    addresses = {work: address for address, work in enumerate(needed)}
    built = PlanGraph(each, addresses, ticking.loop.conditions.data_ptr(), Driver(api))
    iterations = 1000 if "unrolled" in name else 12
    for _ in range(2):
        ticking.restart(iterations)
        built.launch(0)
        found = ticking.outcome({"name": name, "iterations": iterations})
        assert found["counted"] == iterations and found["matches_reference"], found
    assert len(api.launches) == 2


def test_a_body_that_is_left_out_is_seen() -> None:
    ticking = Ticking(Lab(quick=True, dry=True))
    ticking.restart(8)
    ticking.loop.control[at.STEPS] = 8
    ticking.visits.copy_(torch.tensor([3, 1, 2, 2]))
    row = {"name": "WHILE + SWITCH(4)", "iterations": 8}
    assert not ticking.outcome(row)["matches_reference"]
    ticking.visits.fill_(2)
    assert ticking.outcome(row)["matches_reference"]
    assert not ticking.outcome({**row, "iterations": 9})["matches_reference"]
