"""What a step launches and allocates, counted where the loop runs its kernels in the interpreter.

These are exact numbers: one launch more in a step is a regression.
"""

from __future__ import annotations

import importlib
from collections import Counter
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any
from unittest.mock import patch

import pytest
import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from speckv.decoding import plan, works
from speckv.decoding.planned import PlannedLoop
from speckv.decoding.works import Form
from speckv.kernels import layout as at
from speckv.models.fused import LAUNCHES_PER_LAYER
from tests.decoding.test_planned import packed
from tests.kernels.test_decoding import Interpreted
from tests.models.test_fused import build, interpreted

pytestmark = [
    pytest.mark.interpreter,
    pytest.mark.filterwarnings("ignore::RuntimeWarning"),
    pytest.mark.usefixtures(interpreted.__name__),
]

__all__ = ["interpreted"]

LAYERS = 2
FORWARD = 1 + LAUNCHES_PER_LAYER * LAYERS + 1  # embedding, layers, head with its norm
ALLOCATIONS = {"empty", "empty_like", "new_empty", "empty_strided"}


class Counting(TorchDispatchMode):
    """Counts torch's operations outside kernels, and kernels."""

    def __init__(self) -> None:
        super().__init__()
        self.operations: Counter[str] = Counter()
        self.allocations = 0
        self.kernels = 0
        self._inside = False

    def __torch_dispatch__(
        self,
        operation: Any,
        types: Any,
        arguments: tuple[Any, ...] = (),
        options: Mapping[str, Any] | None = None,
    ) -> Any:
        name = operation.overloadpacket.__name__
        result = operation(*arguments, **(options or {}))
        if name in ALLOCATIONS:
            self.allocations += not self._inside
        elif not self._inside and not _is_view(result, arguments):
            self.operations[name] += 1
        return result

    @contextmanager
    def launching(self) -> Iterator[None]:
        self.kernels += 1
        self._inside = True
        try:
            yield
        finally:
            self._inside = False

    @property
    def launches(self) -> int:
        return self.kernels + sum(self.operations.values())


def _is_view(result: Any, arguments: tuple[Any, ...]) -> bool:
    """Whether an operation gave what it got, looked at otherwise: no kernel ran."""

    def place(tensor: Tensor) -> int:
        return tensor.untyped_storage().data_ptr()

    got = {place(a) for a in arguments if isinstance(a, Tensor)}
    return isinstance(result, Tensor) and place(result) in got


def counted(monkeypatch: pytest.MonkeyPatch) -> dict[tuple[int, str], Counting]:
    """Every work of a loop for one row and for four, run once and counted once."""
    interpreter = importlib.import_module("triton.runtime.interpreter")
    launch = interpreter.GridExecutor.__call__
    between = works.launches(importlib.import_module("speckv.kernels.loop_step"))
    kernels = _Kept()
    monkeypatch.setattr(works, "operations", lambda device: kernels)
    monkeypatch.setattr(works, "step_operations", lambda device: between)
    target, draft = build("llama", "bf16"), build("llama", "bf16")
    assert target.config.layers == LAYERS
    found = {}
    for batch in (1, 4):
        loop = PlannedLoop(target, draft, batch=batch, capacity=32)
        form = Form(batch=batch, gamma_cap=2, sampled=False, truncated=False, eos=8)
        each = loop._works_for(form)
        each.load(_requests(batch), packed("fixed:2"))
        for row in range(batch):
            each.state.reset(row, [1, 2, 3], limit=20, request=row)
            each.state.rows[row, at.STOP] = 0
        for name in each.names:
            each(name)  # prepares
            counting = Counting()

            def noted(self: Any, *a: Any, counting: Counting = counting, **k: Any) -> Any:
                with counting.launching():
                    return launch(self, *a, **k)

            with patch.object(interpreter.GridExecutor, "__call__", noted), counting:
                each(name)
            found[batch, name] = counting
    return found


class _Kept(Interpreted):
    """`cutoff` apart, these are the launches that a loop on a GPU makes."""

    def _get(self, kind: str, logits: Tensor) -> Any:
        return self._scratch(kind, *logits.shape)


def _requests(batch: int) -> Any:
    from speckv.decoding import RequestBatch
    from speckv.sampling import SamplingParams

    params = [SamplingParams(max_new_tokens=9)] * batch
    device = torch.device("cpu")
    return RequestBatch.build([[1, 2, 3]] * batch, params, eos_ids=[], max_length=32, device=device)


def test_launches_and_allocations(monkeypatch: pytest.MonkeyPatch) -> None:
    found = counted(monkeypatch)
    inputs, chosen, published = 1, 1, 1
    draft = inputs + FORWARD + chosen + published
    expected = {
        plan.BEGIN: published,
        plan.CLOSE: 1 + published,
        plan.CATCH_UP: inputs + FORWARD + published,
        plan.FIRST: draft,
        plan.NEXT: draft,
        **{plan.verify_work(w): inputs + FORWARD + chosen for w in (1, 2, 3)},
    }
    launches = {name: each.launches for (batch, name), each in found.items() if batch == 1}
    assert launches == expected
    steps = [plan.launches_per_step(plan.generation_plan(2), launches, g) for g in range(3)]
    ends = 2 + 3  # close, conditions, and three times the kernel that sets handles
    verify = inputs + FORWARD + chosen
    assert steps == [verify + ends, verify + draft + 1 + ends, verify + 2 * (draft + 1) + ends]
    fixed = plan.generation_plan(2, "switch")  # does not ask after every draft token
    steps = [plan.launches_per_step(fixed, launches, g) for g in (1, 2)]
    assert steps == [verify + draft + ends, verify + 2 * draft + ends]

    copied = (plan.CATCH_UP, plan.FIRST)  # in a batch the wanted rows are brought together
    launches = {name: each.launches for (batch, name), each in found.items() if batch == 4}
    assert launches == {name: n + (name in copied) for name, n in expected.items()}
    for (batch, name), each in found.items():
        forward = name not in (plan.BEGIN, plan.CLOSE)
        torchs = ["index_select"] * forward + ["contiguous"] * (batch > 1 and name in copied)
        assert sorted(each.operations.elements()) == sorted(torchs), name
        # Rows between the kernels, and logits: a captured work has them in its graph's pool.
        assert each.allocations == 6 * forward, name
