"""`attention` in the interpreter, against softmax in float64, row by row."""

from __future__ import annotations

import importlib
from collections.abc import Callable, Iterable
from dataclasses import dataclass, replace

import pytest
import torch
from torch import Tensor

from speckv import kernels
from tests.tolerances import assert_close

attention_module = importlib.import_module("speckv.kernels.attention")

CAPACITY = 600


@dataclass
class Case:
    """Queries of sequences that end at ``starts + width - 1``; the cache is NaN beyond."""

    queries: Tensor
    cache: Tensor
    positions: Tensor
    slots: Tensor
    window: int | None = None

    @classmethod
    def make(
        cls,
        starts: list[int],
        width: int,
        dtype: torch.dtype = torch.bfloat16,
        heads: int = 6,
        kv_heads: int = 2,
        head_dim: int = 16,
        window: int | None = None,
    ) -> Case:
        generator = torch.Generator().manual_seed(sum(starts) + width)
        batch = len(starts)
        cache = torch.randn(batch + 1, CAPACITY, 2 * kv_heads, head_dim, generator=generator)
        slots = (torch.arange(batch) + 2) % (batch + 1)
        positions = torch.tensor(starts, dtype=torch.int64).view(-1, 1) + torch.arange(width)
        for b in range(batch):
            cache[slots[b], starts[b] + width :] = float("nan")
        queries = 3 * torch.randn(batch, width, heads, head_dim, generator=generator)
        return cls(queries.to(dtype), cache.to(dtype), positions.contiguous(), slots, window)

    def launch(self) -> Tensor:
        """The kernel's result, from scratch full of NaN."""
        kv_heads = self.cache.shape[2] // 2
        scratch = attention_module.Scratch.allocate(self.queries.shape, kv_heads, CAPACITY, "cpu")
        scratch.tops.fill_(float("nan"))
        scratch.values.fill_(float("nan"))
        out = torch.full_like(self.queries, float("nan"))
        attention_module.attention_out(
            self.queries,
            self.cache,
            self.positions,
            self.slots,
            out=out,
            scratch=scratch,
            window=self.window,
        )
        assert not scratch.counters.any()
        return out

    def expected(self) -> Tensor:
        batch, width, heads, head_dim = self.queries.shape
        kv_heads = self.cache.shape[2] // 2
        out = torch.empty(self.queries.shape, dtype=torch.float64)
        for b in range(batch):
            for w in range(width):
                end = int(self.positions[b, w]) + 1
                begin = 0 if self.window is None else max(end - self.window, 0)
                seen = self.cache[self.slots[b], begin:end].double()
                for h in range(heads):
                    kv = h // (heads // kv_heads)
                    weights = seen[:, kv] @ self.queries[b, w, h].double() / head_dim**0.5
                    out[b, w, h] = weights.softmax(0) @ seen[:, kv_heads + kv]
        return out.to(self.queries.dtype)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=str)
@pytest.mark.parametrize("width", [1, 2, 5, 16])
def test_the_kernel_equals_softmax(width: int, dtype: torch.dtype) -> None:
    case = Case.make([0, 254, 511], width, dtype)
    assert_close(case.launch(), case.expected(), dtype)


@pytest.mark.parametrize("starts", [[0], [63], [64], [126], [127], [128], [580]])
def test_the_ends_of_blocks_and_chunks(starts: list[int]) -> None:
    case = Case.make(starts, 2)
    assert_close(case.launch(), case.expected(), torch.bfloat16)


@pytest.mark.parametrize(
    ("heads", "kv_heads", "head_dim"), [(1, 1, 32), (9, 3, 64), (4, 4, 128), (20, 1, 256)]
)
def test_other_heads(heads: int, kv_heads: int, head_dim: int) -> None:
    case = Case.make([70, 3], 3, torch.float16, heads, kv_heads, head_dim)
    assert_close(case.launch(), case.expected(), torch.float16)


@pytest.mark.parametrize("window", [1, 5, 64, 256, 300, 5000])
def test_windows(window: int) -> None:
    case = Case.make([0, 255, 520], 4, window=window)
    assert_close(case.launch(), case.expected(), torch.bfloat16)


@pytest.fixture(params=[16, 8], ids=lambda block: f"blocks of {block}")
def small_chunks(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    """38 chunks in a cache: more than there are programs, so that some have two."""
    config = attention_module.Config(chunk=16, block=request.param)
    monkeypatch.setattr(attention_module, "_select_config", lambda head_dim: config)


@pytest.mark.parametrize("window", [None, 100, 550])
def test_more_chunks_than_programs(window: int | None, small_chunks: None) -> None:
    for starts in ([254, 583], [510]):
        case = Case.make(starts, 4, heads=2, kv_heads=1, window=window)
        assert_close(case.launch(), case.expected(), torch.bfloat16)


@pytest.mark.parametrize("window", [None, 100, 500])
def test_bits_beside_rows_of_a_second_chunk(window: int | None, small_chunks: None) -> None:
    """Rows around position 512, where the first program's second chunk begins.

    Of numbers whose products are exact in any order: the interpreter's, of matrices as small as
    these chunks, have other last bits in other rows.
    """
    case = Case.make([504, 17], 16, heads=2, kv_heads=1, window=window)
    case.queries, case.cache = case.queries.sign(), case.cache.sign()
    check_rows_alone(case, (1, 3, 8))


@pytest.mark.parametrize("window", [None, 300])
def test_the_bits_of_a_row_do_not_depend_on_the_others(window: int | None) -> None:
    """Rows on both sides of a chunk's end."""
    check_rows_alone(Case.make([248, 17], 16, window=window), range(1, 17))


def check_rows_alone(case: Case, widths: Iterable[int]) -> None:
    """Rows of the first sequence have the same bits at any width, alone and in a batch."""
    together = case.launch()
    for width in widths:
        first = (5 * width) % (17 - width)
        rows = slice(first, first + width)
        part = replace(
            case,
            queries=case.queries[:1, rows].contiguous(),
            positions=case.positions[:1, rows].contiguous(),
            slots=case.slots[:1],
        )
        assert torch.equal(part.launch(), together[:1, rows])


def test_a_row_worked_by_hand() -> None:
    """Logits 0 and ln 3 give the values 1/4 and 3/4 of the weight."""
    case = Case.make([1], 1, torch.float16, 1, 1, 16)
    case.queries.zero_()
    case.queries[..., 0] = 4.0
    case.cache[case.slots[0], :2] = 0.0
    case.cache[case.slots[0], 1, 0, 0] = 1.0986
    case.cache[case.slots[0], 0, 1], case.cache[case.slots[0], 1, 1] = 8.0, 16.0
    assert case.launch().flatten().tolist() == pytest.approx([14.0] * 16, abs=0.01)


def test_nan_stays_in_its_row() -> None:
    case = Case.make([300], 4)
    clean = case.launch()
    case.queries[0, 1, 2, 3] = float("nan")
    found = case.launch()
    assert found[0, 1, 2].isnan().all()
    found[0, 1, 2] = clean[0, 1, 2]
    assert torch.equal(found, clean)


@pytest.mark.parametrize("window", [None, 7])
def test_the_twin_on_the_cpu(window: int | None) -> None:
    case = Case.make([20, 30], 3, window=window)
    case.cache.nan_to_num_(0.0)
    arguments = (case.queries, case.cache, case.positions, case.slots)
    found = kernels.attention(*arguments, window=window)
    assert_close(found, case.expected(), torch.bfloat16)


def test_no_rows() -> None:
    case = Case.make([], 1)
    assert case.launch().shape == (0, 1, 6, 16)
    arguments = (case.queries, case.cache, case.positions, case.slots)
    assert kernels.attention(*arguments).shape == (0, 1, 6, 16)


@pytest.mark.parametrize(
    ("name", "change", "error", "message"),
    [
        ("queries", lambda t: t.float(), TypeError, "queries: expected fp16 or bf16"),
        ("queries", lambda t: t[..., :15].contiguous(), ValueError, "queries: expected a head_dim"),
        ("queries", lambda t: t.transpose(1, 2), ValueError, "queries: expected a contiguous"),
        ("queries", lambda t: t[:, :, :5].contiguous(), ValueError, "cache: expected contiguous k"),
        ("cache", lambda t: t[:, :, :3], ValueError, "cache: expected contiguous keys"),
        ("cache", lambda t: t.half(), TypeError, "cache: expected bfloat16"),
        ("positions", lambda t: t.int(), TypeError, "positions: expected int64"),
        ("slots", lambda t: t[:1], ValueError, r"slots: expected int64 \[2\]"),
        ("window", lambda t: 0, ValueError, "window: expected a positive number, got 0"),
        ("out", lambda t: torch.zeros(2, 3), TypeError, "out: expected bfloat16"),
    ],
)
def test_bad_arguments_are_refused(
    name: str,
    change: Callable[[Tensor | None], object],
    error: type[Exception],
    message: str,
) -> None:
    arguments = vars(Case.make([20, 30], 3))
    arguments[name] = change(arguments.get(name))
    with pytest.raises(error, match=message):
        kernels.attention(**arguments)
