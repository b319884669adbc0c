"""The `draft_step` kernel against the reference, over shapes, dtypes, layouts and edge cases."""

from __future__ import annotations

import math
import subprocess
import sys

import pytest
import torch
from torch import Tensor

from speckv.kernels import layout as at
from speckv.kernels import reference
from speckv.kernels.draft_step import (
    VOCABULARY_MAX,
    Config,
    DraftStep,
    Scratch,
    _select_config,
    draft_step,
    draft_step_out,
)
from tests.kernels.cases import (
    POLICIES,
    GuardedState,
    fixed,
    random_logits,
    sampling,
    threshold,
)
from tests.tolerances import assert_close

pytestmark = [
    pytest.mark.interpreter,
    # -inf - -inf and NaN, which the kernel discards, make numpy warn.
    pytest.mark.filterwarnings("ignore::RuntimeWarning"),
]

DTYPES = (torch.float32, torch.float16, torch.bfloat16)
SMALL = Config(block=256, splits=3, num_warps=4)


def cut(vocabulary: int) -> Config:
    """At most three programs a row; several blocks each, and a tail, at V = 1031."""
    return Config(256, min(SMALL.splits, -(-vocabulary // 256)), 4)


def mixed(batch: int) -> GuardedState:
    """Rows that draft, at 0 to 2 drafted tokens, and rows that are done or stopped."""
    start = GuardedState(batch)
    rows, running = start.state.rows, start.state.running
    for b in range(batch):
        rows[b, at.DRAFTED] = b % 3
        if b % 3:
            running[b] = torch.tensor([1.5, 2.5, 0.4, 0.2, 2.5, 0.2, 0.1, 0.6])
        rows[b, at.STOP] = int(b % 7 == 3)
        rows[b, at.DONE] = at.DONE_STOP if b % 7 == 5 else at.RUNNING
    return start


def check(
    logits: Tensor,
    start: GuardedState,
    policy: Tensor,
    config: Config,
    steps: int = 1,
    **options: object,
) -> GuardedState:
    """Run kernel and reference from ``start``; everything must agree. Returns what came out."""
    kernel, expected = start.clone(), start.clone()
    scratch = Scratch.allocate(logits.shape[0], config, "cpu")
    scratch.partials.fill_(math.nan)
    untouched = logits.clone()
    for _ in range(steps):
        draft_step_out(logits, kernel.state, policy, scratch=scratch, **options)
        reference.draft_step(logits, expected.state, policy, **options)
    for got, wanted in zip(kernel.whole, expected.whole, strict=True):
        if got.dtype == torch.int32:
            assert torch.equal(got, wanted)
        else:
            assert_close(got, wanted, torch.float32)
    idle = (start.state.rows[:, at.DONE] != 0) | (start.state.rows[:, at.STOP] != 0)
    for now, then in zip(vars(kernel.state).values(), vars(start.state).values(), strict=True):
        assert torch.equal(now[idle], then[idle])
    assert not scratch.counters.any()
    assert torch.equal(logits, untouched) or untouched.isnan().any()
    return kernel


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("vocabulary", [1, 7, 111, 257, 1031])
@pytest.mark.parametrize("batch", [0, 1, 3, 17])
@pytest.mark.parametrize("sampled", [False, True], ids=["greedy", "sampled"])
def test_equals_reference(batch: int, vocabulary: int, dtype: torch.dtype, sampled: bool) -> None:
    logits = random_logits(batch, vocabulary, dtype)
    options = sampling(batch) if sampled else {}
    policy = threshold(at.MODE_ENTROPY, 0.8 * math.log2(max(vocabulary, 2)))
    if batch == 0:
        state = at.StepState.allocate(0, 8)
        scratch = Scratch.allocate(0, cut(vocabulary), "cpu")
        draft_step_out(logits, state, policy, scratch=scratch, **options)
        return
    check(logits, mixed(batch), policy, cut(vocabulary), **options)


@pytest.mark.parametrize("dtype", DTYPES)
def test_large_vocabulary(dtype: torch.dtype) -> None:
    config = Config(block=16_384, splits=5, num_warps=8)
    logits = random_logits(2, 128_256, dtype)
    check(logits, mixed(2), fixed(), config, **sampling(2))


@pytest.mark.parametrize("name", POLICIES)
@pytest.mark.parametrize("sampled", [False, True], ids=["greedy", "sampled"])
def test_a_whole_step_under_every_policy(name: str, sampled: bool) -> None:
    options = sampling(4) if sampled else {}
    start = GuardedState(4)
    start.state.rows[2, at.LIMIT] = 7  # unequal ends: room for one draft token
    check(random_logits(4, 111, torch.float32), start, POLICIES[name], cut(111), 5, **options)


@pytest.mark.parametrize("coupling", ["gumbel", "rejection"])
@pytest.mark.parametrize("mapped", [False, True], ids=["same ids", "id map"])
@pytest.mark.parametrize("cutoffs", [False, True], ids=["all", "cutoffs"])
def test_sampling_options(coupling: str, mapped: bool, cutoffs: bool) -> None:
    batch, vocabulary = 5, 257
    logits = random_logits(batch, vocabulary, torch.bfloat16, seed=4)
    options: dict[str, object] = {**sampling(batch), "coupling": coupling}
    if mapped:
        generator = torch.Generator().manual_seed(1)
        ids = torch.randperm(49_152, generator=generator)[:vocabulary]
        options["id_map"] = ids.to(torch.int32)
    if cutoffs:
        options["cutoffs"] = logits.float().topk(9).values[:, -1].contiguous()
    check(logits, mixed(batch), fixed(), cut(vocabulary), 2, **options)


def test_id_map_of_greedy_rows() -> None:
    ids = torch.arange(111, dtype=torch.int32).flip(0) * 9
    check(random_logits(3, 111, torch.float16), mixed(3), fixed(), cut(111), id_map=ids)


def edge_rows(vocabulary: int) -> Tensor:
    """Ties, impossible tokens and one-hot rows, within blocks, across them and in the tail."""
    rows = torch.full((8, vocabulary), -2.0)
    rows[0] = 0.0  # all equal
    rows[1, [5, 300, vocabulary - 1]] = 4.0  # tie across programs
    rows[2] = -math.inf
    rows[2, vocabulary - 1] = 1.0  # one-hot in the tail
    rows[3, : vocabulary // 2] = -math.inf  # programs with nothing but -inf
    rows[4, 0], rows[4, 1] = 3e38, -3e38
    rows[5] = torch.finfo(torch.float32).min  # finite, however low
    rows[6, 512:] = -math.inf
    rows[6, [511, 100]] = 1.5  # tie inside a program's two blocks
    rows[7, 3], rows[7, 700] = 0.0, -0.0  # equal zeros
    return rows


@pytest.mark.parametrize("sampled", [False, True], ids=["greedy", "sampled"])
def test_ties_and_impossible_tokens(sampled: bool) -> None:
    logits = edge_rows(1031)
    options = sampling(8) if sampled else {}
    out = check(logits, GuardedState(8), fixed(), cut(1031), **options)
    assert not out.state.rows[:, at.ERROR].any()
    if not sampled:
        first = [int(out.state.sequence[b, 3 + b % 5]) for b in range(8)]
        assert first == [0, 5, 1030, 515, 0, 0, 100, 3]


@pytest.mark.parametrize("place", [0, 255, 256, 1030])
@pytest.mark.parametrize("bad", [math.nan, math.inf])
@pytest.mark.parametrize("sampled", [False, True], ids=["greedy", "sampled"])
def test_nan_and_infinity_end_the_row(place: int, bad: float, sampled: bool) -> None:
    logits = random_logits(2, 1031, torch.float32).clone()
    logits[0, place] = bad
    options = sampling(2) if sampled else {}
    out = check(logits, GuardedState(2), fixed(), cut(1031), **options)
    assert out.state.rows[:, at.ERROR].tolist() == [at.ERROR_DRAFT, 0]
    assert out.state.rows[:, at.DONE].tolist() == [at.DONE_ERROR, at.RUNNING]


@pytest.mark.parametrize("sampled", [False, True], ids=["greedy", "sampled"])
def test_rows_without_a_possible_token_end(sampled: bool) -> None:
    logits = torch.full((1, 300), -math.inf)
    options: dict[str, object] = dict(sampling(1)) if sampled else {}
    out = check(logits, GuardedState(1), fixed(), cut(300), **options)
    assert int(out.state.rows[0, at.ERROR]) == at.ERROR_DRAFT
    if sampled:
        options["cutoffs"] = torch.tensor([1.0])
        out = check(torch.zeros(1, 300), GuardedState(1), fixed(), cut(300), **options)
        assert int(out.state.rows[0, at.ERROR]) == at.ERROR_DRAFT


def test_the_split_and_the_batch_do_not_change_tokens() -> None:
    logits = random_logits(3, 1031, torch.float32)
    tokens = []
    for config in (Config(256, 1, 4), SMALL, Config(256, 5, 4), Config(2048, 1, 8)):
        out = check(logits, GuardedState(3), fixed(), config, **sampling(3))
        tokens.append(out.whole[2])
    assert all(torch.equal(tokens[0], other) for other in tokens)
    alone = check(
        logits[:1],
        GuardedState(1),
        fixed(),
        SMALL,
        **{name: value[:1] for name, value in sampling(3).items()},
    )
    together = check(logits, GuardedState(3), fixed(), SMALL, **sampling(3))
    for one, three in zip(vars(alone.state).values(), vars(together.state).values(), strict=True):
        assert torch.equal(one[0], three[0])  # bit for bit


def test_public_call_and_prepared_object_use_the_reference_on_cpu() -> None:
    logits = random_logits(3, 111, torch.float32)
    states = [mixed(3) for _ in range(3)]
    reference.draft_step(logits, states[0].state, fixed(), **sampling(3))
    draft_step(logits, states[1].state, fixed(), **sampling(3))
    DraftStep(logits, states[2].state, fixed(), **sampling(3))(logits)
    for other in states[1:]:
        for one, two in zip(states[0].whole, other.whole, strict=True):
            assert torch.equal(one, two)


@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        ({"logits": torch.zeros(2, 5).double()}, TypeError, "logits: expected fp32, fp16 or bf16"),
        ({"logits": [[0.0]]}, TypeError, "logits: expected .* got list"),
        ({"logits": torch.zeros(5)}, ValueError, r"logits: expected \[B, V\]"),
        ({"logits": torch.zeros(2, 0)}, ValueError, "V from 1 to 262144"),
        ({"logits": torch.zeros(1, 1).expand(2, VOCABULARY_MAX + 1)}, ValueError, "V from 1 to"),
        ({"logits": torch.zeros(5, 2).t()}, ValueError, "logits: expected unit stride in V"),
        ({"logits": torch.zeros(3, 5)}, ValueError, r"state.rows: expected torch.int32 \[3, 16\]"),
        ({"policy": torch.zeros(4)}, ValueError, "policy: expected"),
        ({"policy": None}, TypeError, "policy: expected .* got NoneType"),
        ({"inv_temperature": torch.ones(2)}, TypeError, "seeds: expected .* got NoneType"),
        ({"inv_temperature": torch.ones(3)}, ValueError, "inv_temperature: expected"),
        ({"id_map": torch.zeros(4, dtype=torch.int32)}, ValueError, r"id_map: expected .*\[5\]"),
        ({"id_map": torch.zeros(5)}, TypeError, "id_map: expected torch.int32"),
        ({"cutoffs": torch.zeros(4)[::2]}, ValueError, "cutoffs: expected .* contiguous"),
        ({"coupling": "none"}, ValueError, "coupling: expected one of"),
    ],
)
def test_bad_arguments(change: dict[str, object], error: type[Exception], message: str) -> None:
    arguments: dict[str, object] = {
        "logits": torch.zeros(2, 5),
        "state": GuardedState(2).state,
        "policy": fixed(),
        **change,
    }
    with pytest.raises(error, match=message):
        draft_step(**arguments)  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("vocabulary", "sm_count", "config"),
    [
        (1, 132, Config(1024, 1, 4)),
        (1024, 132, Config(1024, 1, 4)),
        (49_152, 132, Config(1024, 48, 4)),
        (128_256, 132, Config(1024, 126, 4)),
        (128_256, 108, Config(2048, 63, 8)),
        (262_144, 132, Config(2048, 128, 8)),
        (262_144, 108, Config(2048, 64, 8)),
    ],
)
def test_select_config(vocabulary: int, sm_count: int, config: Config) -> None:
    assert _select_config(vocabulary, sm_count) == config


def test_public_names_need_no_triton_until_used() -> None:
    program = (
        "import sys, speckv.kernels as k, speckv.kernels.reference\n"
        "assert 'triton' not in sys.modules\n"
        "from speckv.kernels.draft_step import draft_step\n"
        "assert k.draft_step is draft_step\n"
        "assert all(callable(getattr(k, name)) for name in k.PUBLIC)\n"
    )
    subprocess.run([sys.executable, "-c", program], check=True)
