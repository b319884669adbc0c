"""The `cutoff` kernels in the interpreter equal `reference.cutoff` and Hugging Face's warpers."""

from __future__ import annotations

from dataclasses import fields, replace

import pytest
import torch
from torch import Tensor
from transformers import TopKLogitsWarper, TopPLogitsWarper

from speckv.kernels import layout as at
from speckv.kernels import reference
from speckv.kernels.cutoff import Cutoff, CutoffScratch, _select_config, cutoff, cutoff_out
from speckv.kernels.split import SplitConfig, split_row
from tests.kernels.steps import Guards, strided
from tests.tolerances import assert_close

pytestmark = [
    pytest.mark.interpreter,
    # The interpreter's numpy warns of inf - inf in rows that are invalid anyhow.
    pytest.mark.filterwarnings("ignore:invalid value encountered:RuntimeWarning"),
]

DTYPES = [torch.float32, torch.float16, torch.bfloat16]
POISON = 1234.5


def launch(
    logits: Tensor,
    *parameters: Tensor | None,
    rows: Tensor | None = None,
    config: SplitConfig | None = None,
) -> tuple[Tensor, Tensor]:
    """Results of `cutoff_out` on guarded buffers and poisoned scratch."""
    guards = Guards()
    count, vocabulary = logits.shape
    config = config or _select_config(vocabulary)
    scratch = CutoffScratch.allocate(count, vocabulary, logits.dtype, config, "cpu")
    buffers = {}
    for name in (f.name for f in fields(scratch) if f.name != "config"):
        tensor: Tensor = getattr(scratch, name)
        if tensor.dtype != torch.int32:
            tensor.fill_(torch.nan)
        buffers[name] = guards.around(tensor)
    scratch = replace(scratch, **buffers)
    cutoffs, lse = (guards.around(torch.full((count,), POISON)) for _ in range(2))
    cutoff_out(logits, *parameters, rows=rows, scratch=scratch, cutoffs=cutoffs, lse=lse)
    guards.check()
    assert not scratch.counter.any() and not scratch.cursor.any()
    return cutoffs, lse


def compare(
    logits: Tensor, *parameters: Tensor | None, config: SplitConfig | None = None
) -> tuple[Tensor, Tensor]:
    """Run kernels and reference; cutoffs are equal, sums close. Returns the reference's."""
    actual, actual_lse = launch(logits, *parameters, config=config)
    expected, expected_lse = reference.cutoff(logits, *parameters)
    assert torch.equal(actual, expected)
    assert_close(actual_lse, expected_lse, torch.float32)
    return expected, expected_lse


def mixed_parameters(rows: int) -> tuple[Tensor, Tensor, Tensor]:
    """Rows that need nothing, top-k, top-p, both, at several temperatures, one of them greedy."""
    inv = torch.tensor([1.0, 0.5, 2.0, 0.0, 1.0, 1.3, 0.8, 1.0])
    top_k = torch.tensor([0, 5, 0, 3, 50, 1, 2000, 7], dtype=torch.int32)
    top_p = torch.tensor([1.0, 1.0, 0.9, 0.5, 0.8, 0.3, 0.95, 1e-3])
    index = torch.arange(rows) % 8
    return inv[index], top_k[index], top_p[index]


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("vocabulary", [1, 7, 111, 257, 1031])
@pytest.mark.parametrize("rows", [0, 1, 3, 17])
def test_grid(rows: int, vocabulary: int, dtype: torch.dtype) -> None:
    generator = torch.Generator().manual_seed(rows + vocabulary)
    logits = strided((3.0 * torch.randn(rows, vocabulary, generator=generator)).to(dtype))
    compare(logits, *mixed_parameters(rows))


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize(
    "config", [SplitConfig(128, 1, 8, 4), SplitConfig(128, 3, 3, 4), SplitConfig(256, 4, 1, 4)]
)
def test_splits(config: SplitConfig, dtype: torch.dtype) -> None:
    generator = torch.Generator().manual_seed(4)
    logits = (3.0 * torch.randn(8, 1000, generator=generator)).to(dtype)
    compare(logits, *mixed_parameters(8), config=config)


@pytest.mark.parametrize("vocabulary", [49_152])
def test_large_vocabulary(vocabulary: int) -> None:
    generator = torch.Generator().manual_seed(6)
    logits = (3.0 * torch.randn(3, vocabulary, generator=generator)).bfloat16()
    top_k = torch.tensor([50, 0, 1000], dtype=torch.int32)
    compare(logits, torch.tensor([1.0, 1.2, 0.9]), top_k, torch.tensor([1.0, 0.9, 0.8]))


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("scale", [0.0, 0.2, 1.0])
def test_nearly_all_tokens_are_candidates(scale: float, dtype: torch.dtype) -> None:
    """Those that are decided on are dropped on the way, alone or after top-k."""
    generator = torch.Generator().manual_seed(8)
    logits = (scale * torch.randn(4, 9001, generator=generator)).to(dtype)
    top_k = torch.tensor([0, 0, 6000, 0], dtype=torch.int32)
    top_p = torch.tensor([0.5, 0.99, 0.7, 0.03])
    compare(logits, torch.ones(4), top_k, top_p)


@pytest.mark.parametrize("k", [1, 2, 31, 32, 33, 64, 256, 257, 999, 1000, 1001])
def test_every_kind_of_k(k: int) -> None:
    """Fewer than the groups, as many, more, and as many as there are tokens."""
    generator = torch.Generator().manual_seed(k)
    logits = torch.randn(3, 1000, generator=generator)
    logits[1] = logits[1].sort(descending=True).values
    logits[2] = logits[2].round()
    top_k = torch.full((3,), k, dtype=torch.int32)
    expected, _ = compare(logits, torch.ones(3), top_k, config=split_row(1000, block=128))
    if k < 1000:
        assert ((logits >= expected[:, None]).sum(1) >= k).all()
        assert ((logits > expected[:, None]).sum(1) < k).all()


@pytest.mark.parametrize("p", [1e-6, 0.01, 0.5, 0.9, 0.999, 1.0 - 2.0**-20])
@pytest.mark.parametrize("scale", [0.0, 0.1, 3.0, 30.0])
def test_every_kind_of_p(p: float, scale: float) -> None:
    """From uniform rows, where all tokens are candidates, to rows of one likely token."""
    generator = torch.Generator().manual_seed(9)
    logits = scale * torch.randn(1, 1000, generator=generator)
    actual, lse = launch(
        logits, torch.ones(1), None, torch.tensor([p]), config=split_row(1000, block=128)
    )
    exact = logits[0].double().softmax(0)
    kept = logits[0] >= actual[0]
    above = logits[0] > actual[0]
    rounding = 1e-6
    assert exact[above].sum() < p + rounding
    assert exact[kept].sum() >= p - rounding
    torch.testing.assert_close(lse[0], logits[0][kept].logsumexp(0), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16], ids=str)
def test_hugging_face(dtype: torch.dtype) -> None:
    """Rows without ties keep what the warpers keep, temperature first."""
    generator = torch.Generator().manual_seed(12)
    values = torch.linspace(-9.0, 9.0, 700).to(dtype)
    assert values.unique().numel() == 700
    logits = torch.stack([values[torch.randperm(700, generator=generator)] for _ in range(6)])
    inv = torch.tensor([1.0, 0.25, 4.0, 1.0, 0.5, 0.7])
    top_k = torch.tensor([40, 40, 5, 0, 0, 700], dtype=torch.int32)
    top_p = torch.tensor([1.0, 0.77, 0.6, 0.9, 0.63, 0.81])
    actual, lse = launch(logits, inv, top_k, top_p)
    for i in range(6):
        scores = logits[i : i + 1].float() * inv[i]
        if top_k[i]:
            scores = TopKLogitsWarper(int(top_k[i]))(None, scores)
        if top_p[i] < 1.0:
            scores = TopPLogitsWarper(float(top_p[i]))(None, scores)
        assert torch.equal(logits[i].float() >= actual[i], scores[0].isfinite())
        torch.testing.assert_close(lse[i], scores[0].logsumexp(0), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("k", [0, 3])
@pytest.mark.parametrize("p", [1.0, 0.5])
def test_ties_at_the_cutoff_are_kept(k: int, p: float) -> None:
    logits = torch.zeros(1, 300)
    logits[0, [5, 130, 131, 270]] = torch.tensor([2.0, 9.0, 2.0, 2.0])
    parameters = (torch.ones(1), torch.tensor([k], dtype=torch.int32), torch.tensor([p]))
    expected, _ = compare(logits, *parameters, config=split_row(300, block=128))
    if k and p == 1.0:
        assert expected.item() == 2.0


def test_both_zeros_are_one_value() -> None:
    logits = torch.tensor([[0.0, -0.0, -1.0, 1.0, -0.0, -2.0]])
    for k in (2, 3, 4):
        expected, _ = compare(logits, torch.ones(1), torch.tensor([k], dtype=torch.int32))
        assert expected.item() == 0.0


def test_impossible_tokens() -> None:
    logits = torch.full((4, 300), -torch.inf)
    logits[0, 7] = -3.0
    logits[1, [7, 200]] = torch.tensor([1.0, 2.0])
    logits[2, 100:] = 0.5
    logits[3, [0, 299]] = 4.0
    inv = torch.ones(4)
    config = split_row(300, block=128)
    for k in (0, 1, 2, 3, 250):
        for p in (1.0, 0.6):
            top_k, top_p = torch.full((4,), k, dtype=torch.int32), torch.full((4,), p)
            compare(logits, inv, top_k, top_p, config=config)


@pytest.mark.parametrize("bad", [torch.nan, torch.inf, None])
def test_rows_without_a_token(bad: float | None) -> None:
    generator = torch.Generator().manual_seed(13)
    logits = torch.randn(8, 300, generator=generator)
    if bad is None:
        logits[::2] = -torch.inf
    else:
        logits[::2, 150] = bad
    expected, lse = compare(logits, *mixed_parameters(8), config=split_row(300, block=128))
    assert (expected[::2] == -torch.inf).all() and lse[::2].isnan().all()
    assert lse[1::2].isfinite().all()


def test_parameters_are_optional() -> None:
    logits = torch.randn(3, 300, generator=torch.Generator().manual_seed(14))
    inv, top_k = torch.tensor([1.0, 0.4, 3.0]), torch.tensor([4, 0, 9], dtype=torch.int32)
    top_p = torch.tensor([0.9, 0.3, 1.0])
    untouched, _ = compare(logits, inv)
    assert (untouched == -torch.inf).all()
    compare(logits, inv, top_k)
    compare(logits, inv, None, top_p)


def test_rows_that_draw_nothing_are_skipped() -> None:
    generator = torch.Generator().manual_seed(15)
    logits = torch.randn(12, 300, generator=generator)
    rows = torch.zeros(3, at.ROW_WORDS, dtype=torch.int32)
    rows[:, at.DRAFTED] = torch.tensor([2, 0, 3])
    rows[2, at.DONE] = at.DONE_STOP
    used = torch.tensor([1, 1, 1, 0, 1, 0, 0, 0, 0, 0, 0, 0], dtype=torch.bool)
    parameters = (torch.ones(12), torch.full((12,), 5, dtype=torch.int32), torch.full((12,), 0.8))
    actual, lse = launch(logits, *parameters, rows=rows)
    all_rows, all_lse = launch(logits, *parameters)
    assert torch.equal(actual[used], all_rows[used]) and torch.equal(lse[used], all_lse[used])
    assert (actual[~used] == POISON).all() and (lse[~used] == POISON).all()
    public, public_lse = cutoff(logits, *parameters, rows=rows)
    assert torch.equal(public[used], all_rows[used])
    assert (public[~used] == -torch.inf).all() and public_lse[~used].isnan().all()


def test_prepared_form_uses_the_reference_on_the_cpu() -> None:
    logits = torch.randn(8, 111, generator=torch.Generator().manual_seed(16))
    parameters = mixed_parameters(8)
    prepared = Cutoff(logits, *parameters)
    prepared(logits)
    expected, lse = reference.cutoff(logits, *parameters)
    assert torch.equal(prepared.cutoffs, expected) and torch.equal(prepared.lse, lse)


@pytest.mark.parametrize(
    ("name", "value", "error", "message"),
    [
        ("logits", torch.zeros(4), ValueError, r"logits: expected floating \[any, any\]"),
        ("logits", torch.zeros(4, 0), ValueError, "logits: expected a vocabulary"),
        ("inv_temperature", torch.ones(3), ValueError, r"inv_temperature: expected float32 \[4\]"),
        ("top_k", torch.ones(4), TypeError, "top_k: expected int32 .*got float32"),
        ("top_p", torch.ones(4).double(), TypeError, "top_p: expected float32 .*got float64"),
        ("rows", torch.zeros(3, at.ROW_WORDS).int(), ValueError, "rows: expected a number of seq"),
    ],
)
def test_bad_arguments(name: str, value: Tensor, error: type[Exception], message: str) -> None:
    arguments = {
        "logits": torch.zeros(4, 9),
        "inv_temperature": torch.ones(4),
        "top_k": torch.zeros(4, dtype=torch.int32),
        "top_p": torch.ones(4),
        name: value,
    }
    with pytest.raises(error, match=message):
        cutoff(**arguments)
