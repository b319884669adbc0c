"""One small launch of every kernel, against its twin: what compute-sanitizer runs.

Shapes are the least that split a row, a product or a context between programs.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

from speckv import kernels
from speckv.kernels import functional, reference, reference_linear, reference_step, registry
from speckv.kernels import layout as at
from speckv.kernels.layout import LoopState, StepState
from tests.gpu.test_decoder_kernels_gpu import on_device, random, weight_of
from tests.gpu.test_draft_step_gpu import check, logits_of
from tests.kernels.cases import POLICIES
from tests.kernels.steps import (
    assert_same_state,
    fixed_policy,
    rejection_case,
    verify_case,
)
from tests.tolerances import assert_close

DEVICE = "cuda"
VOCABULARY = 5003
BF16 = torch.bfloat16


def argmax() -> None:
    logits = logits_of(3, VOCABULARY, BF16, 0)
    assert torch.equal(kernels.argmax(logits.to(DEVICE)).cpu(), kernels.argmax(logits))


def draft_step() -> None:
    logits = logits_of(3, VOCABULARY, BF16, 0)
    for kind in ("greedy", "sampled"):
        check(logits, logits.to(DEVICE), POLICIES["survival-rate"], 2, kind)


def verify() -> None:
    for mode in ("greedy", "cutoffs"):
        logits, expected, arguments = verify_case(3, 3, VOCABULARY, BF16, mode, 0.9, seed=5)
        state, policy = moved(expected), fixed_policy(4)
        kernels.verify(logits.to(DEVICE), state, policy.to(DEVICE), **tensors(arguments))
        reference.verify(logits, expected, policy, **arguments)
        assert_same_state(moved(state, "cpu"), expected)


def verify_rejection() -> None:
    case = rejection_case(3, 3, VOCABULARY, BF16, seed=6, trimmed=True, top_p=0.95)
    state, policy = moved(case.state), fixed_policy(4)
    arguments = tensors(case.arguments)
    kernels.verify_rejection(case.logits.to(DEVICE), state, policy.to(DEVICE), **arguments)
    reference.verify_rejection(case.logits, case.state, policy, **case.arguments)
    assert_same_state(moved(state, "cpu"), case.state)


def cutoff() -> None:
    logits = logits_of(3, VOCABULARY, BF16, 0)
    columns = (
        torch.tensor([1.0, 0.5, 2.0]),
        torch.tensor([0, 50, 5], dtype=torch.int32),
        torch.tensor([1.0, 1.0, 0.9]),
    )
    low, lse = kernels.cutoff(logits.to(DEVICE), *(column.to(DEVICE) for column in columns))
    want, want_lse = reference.cutoff(logits, *columns)
    assert_close(lse.cpu(), want_lse, torch.float32)
    assert torch.equal(low.cpu()[:2], want[:2])


def linear() -> None:
    for kind in ("dense", "int8", "nf4", "nested"):
        for swiglu in (False, True):
            weight = weight_of(kind, 256, 1024, BF16)
            x, norm = random(17, 1024).to(BF16), random(1024, seed=7).to(BF16)
            residual = random(17, 128 if swiglu else 256, seed=8).to(BF16)
            expected = torch.empty_like(residual)
            options: dict[str, Any] = {"swiglu": swiglu, "eps": 1e-5}
            reference_linear.linear(
                x, weight, out=expected, norm=norm, residual=residual, **options
            )
            found = kernels.linear(
                x.to(DEVICE),
                on_device(weight),
                norm=norm.to(DEVICE),
                residual=residual.to(DEVICE),
                **options,
            )
            scale = expected.float().abs().mean().clamp(min=1.0).item()
            torch.testing.assert_close(found.cpu(), expected, rtol=2e-2, atol=2e-2 * scale)


def expand_int8() -> None:
    expand("int8")


def expand_nf4() -> None:
    for kind in ("nf4", "nested"):
        expand(kind)


def expand(kind: str) -> None:
    weight = weight_of(kind, 70, 1088, BF16)
    assert not isinstance(weight, Tensor)
    found = kernels.expand(on_device(weight), BF16).cpu()
    if kind == "nested":
        assert_close(found, weight.expand(BF16), BF16)
    else:
        assert torch.equal(found, weight.expand(BF16))


def attention() -> None:
    cache, queries = random(2, 600, 4, 64).to(BF16), random(1, 3, 4, 64, seed=1).to(BF16)
    positions, slots = torch.tensor([[500, 501, 502]]), torch.tensor([1])
    expected = kernels.attention(queries, cache, positions, slots)
    arguments = (queries, cache, positions, slots)
    found = kernels.attention(*(tensor.to(DEVICE) for tensor in arguments))
    assert_close(found.cpu(), expected, BF16)


def rope_append() -> None:
    table = functional.rope_table(100.0 ** -torch.linspace(0, 1, 32), 1.0, 64, torch.float16)
    qkv, cache = random(4, 12, 64, seed=1).half(), random(2, 64, 4, 64, seed=2).half()
    places = torch.tensor([[4, 5], [31, 32]]), torch.tensor([1, 0])
    full = cache.float()
    expected = kernels.rope_append(qkv.float(), table.float(), *places, full)
    device = [tensor.to(DEVICE) for tensor in (qkv, table, *places, cache)]
    found = kernels.rope_append(*device)
    assert_close(found.cpu(), expected.half(), torch.float16)
    assert_close(device[-1].cpu(), full.half(), torch.float16)


def rms_norm() -> None:
    x, weight = random(5, 1000).to(BF16), random(1000, seed=2).to(BF16)
    found = kernels.rms_norm(x.to(DEVICE), weight.to(DEVICE), 1e-5)
    assert_close(found.cpu(), kernels.rms_norm(x, weight, 1e-5), BF16)


def stepping(device: str) -> tuple[StepState, LoopState]:
    """Two rows that have just committed two tokens."""
    state = StepState.allocate(2, 64, device)
    loop = LoopState.allocate(2, 64, device, conditions_on_host=False, signals=True)
    for row in range(2):
        state.reset(row, [3 + row, 4, 5, 6], limit=40, request=row)
        state.rows[row, at.COMMITTED], state.rows[row, at.STEP] = 2, 3
        state.rows[row, at.GAMMA], state.rows[row, at.ACCEPTED] = 2, 1
    loop.control.copy_(torch.tensor([5, 0, 40, 0], dtype=torch.int32))
    return state, loop


def step_inputs() -> None:
    results = []
    for device in (DEVICE, "cpu"):
        state, _ = stepping(device)
        for purpose, width in ((at.INPUTS_FIRST, 2), (at.INPUTS_VERIFY, 3)):
            tokens = torch.zeros(2, width, dtype=torch.int32, device=device)
            positions = torch.zeros(2, width, dtype=torch.int64, device=device)
            kernels.step_inputs(state, purpose, tokens=tokens, positions=positions)
            results.append((tokens.cpu(), positions.cpu()))
    half = len(results) // 2
    for found, expected in zip(results[:half], results[half:], strict=True):
        assert all(torch.equal(a, b) for a, b in zip(found, expected, strict=True))


def close_step() -> None:
    results = []
    for device in (DEVICE, "cpu"):
        state, loop = stepping(device)
        run = kernels if device == DEVICE else reference_step
        run.close_step(state, loop, draft_positions=60)
        run.publish_conditions(state, loop)
        torch.cuda.synchronize() if device == "cuda" else None
        both = {**vars(state), **vars(loop)}
        results.append({name: tensor.cpu() for name, tensor in both.items()})
    for name, expected in results[1].items():
        assert torch.equal(results[0][name], expected), name


def keep_draft() -> None:
    results = []
    for device in (DEVICE, "cpu"):
        state, _ = stepping(device)
        state.rows[:, at.STOP], state.rows[:, at.DRAFTED] = 0, 2
        logits = random(2, 1000, seed=4).to(BF16).to(device)
        column = torch.arange(2.0, device=device)
        rows = torch.zeros(2, at.GAMMA_MAX, 1000, dtype=BF16, device=device)
        kept = (rows, *(torch.zeros(2, at.GAMMA_MAX, device=device) for _ in range(2)))
        kernels.keep_draft(state, logits, column, column, kept=kept)
        results.append([tensor.cpu() for tensor in kept])
    assert all(map(torch.equal, *results)) and results[0][0][:, 2].any()


CASES: dict[str, Callable[[], None]] = {
    case.__name__: case
    for case in (
        *(argmax, draft_step, verify, verify_rejection, cutoff, linear, expand_int8),
        *(expand_nf4, attention, rope_append, rms_norm, step_inputs, close_step, keep_draft),
    )
}
_LAUNCHED_BY = {
    "publish_conditions": "close_step",
    "cutoff_select": "cutoff",
    "cutoff_sum": "cutoff",
}
"""Kernels without a case of their own name."""


def moved(state: StepState, device: str | None = None) -> StepState:
    found = {n: t.to(device or DEVICE, copy=True) for n, t in vars(state).items()}
    return StepState(**found)


def tensors(arguments: dict[str, Any]) -> dict[str, Any]:
    return {n: v.to(DEVICE) if isinstance(v, Tensor) else v for n, v in arguments.items()}


@pytest.mark.gpu
@pytest.mark.parametrize("name", CASES)
def test_a_launch(name: str) -> None:
    CASES[name]()


def test_every_kernel_has_a_case() -> None:
    names = {spec.name for spec in registry.all_specs()}
    assert {_LAUNCHED_BY.get(name, name) for name in names} == set(CASES)


@pytest.mark.parametrize("name", sorted(set(CASES) - {"draft_step"}))
def test_cases_hold_where_both_sides_are_the_twin(
    name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """So what a GPU is asked is true of the CPU; nothing is launched here."""
    monkeypatch.setitem(globals(), "DEVICE", "cpu")
    monkeypatch.setattr("tests.gpu.test_decoder_kernels_gpu.DEVICE", "cpu")
    CASES[name]()
