"""The probes see a change of bits, and the operations behind them compute what they say."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from torch import Tensor

from speckv.kernels import cpu, functional
from speckv.kernels.cpu_attention import CpuAttention
from speckv.models.cache import KVCache


def generator() -> torch.Generator:
    return torch.Generator().manual_seed(3)


def test_prove_counts_rejects_what_depends_on_company() -> None:
    rows = torch.randn(16, 8, generator=generator())

    def by_count(pick: Tensor) -> Tensor:
        out = rows[pick].clone()
        return out.nextafter(out + 1) if len(pick) in (1, 5) else out

    def by_place(pick: Tensor) -> Tensor:
        out = rows[pick].clone()
        if len(pick) == 7:
            out[6] = out[6].nextafter(out[6] + 1)
        return out

    def by_place_always(pick: Tensor) -> Tensor:
        return rows[pick] + torch.arange(len(pick))[:, None]

    counts = tuple(range(1, 17))
    assert cpu.prove_counts(lambda pick: rows[pick], counts) == counts
    assert cpu.prove_counts(by_count, counts) == tuple(c for c in counts if c not in (1, 5))
    assert 7 not in cpu.prove_counts(by_place, counts)
    assert cpu.prove_counts(by_place_always, counts) == ()


def test_bits_and_not_values_are_compared() -> None:
    zero = torch.zeros(2, dtype=torch.bfloat16)
    assert not cpu.bits_equal(zero, -zero)
    nan = torch.full((2,), math.nan)
    assert cpu.bits_equal(nan, nan)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_the_probe_sees_another_order_of_additions(dtype: torch.dtype) -> None:
    """Summing the same products in two halves, or backwards, must show after rounding."""
    x, weight = (t.to(dtype).float() for t in cpu._cancelling(64, 96, generator()))
    products = x[:, None, :] * weight[None]

    def summed(order: Tensor) -> Tensor:
        total = torch.zeros(16, 64)
        for column in order.tolist():
            total = total + products[:, :, column]
        return total.to(dtype)

    forward = summed(torch.arange(96))
    for order in (torch.arange(95, -1, -1), torch.arange(96).roll(48)):
        differ = (summed(order) != forward).float().mean()
        assert differ > 0.9


@pytest.mark.parametrize("total", [1, 3, 16, 17, 40])
@pytest.mark.parametrize("counts", [(), (2, 4, 16), (1, 16)])
def test_rows_are_regrouped_without_loss(total: int, counts: tuple[int, ...]) -> None:
    seen = []

    def run(x: Tensor, y: Tensor) -> Tensor:
        seen.append(x.shape[0])
        return x + y

    x, y = torch.randn(total, 5, generator=generator()), torch.ones(total, 5)
    assert torch.equal(cpu.InvariantRows(run, counts)(x, y), x + 1)
    assert set(seen) <= set(counts or (1,))


def test_common_counts_and_rounding() -> None:
    assert cpu.common_counts([(1, 2, 16), (2, 16, 32), (2, 5, 16, 32), ()]) == (2, 16, 32)
    assert cpu.common_counts([(2, 16), (1, 16)]) == (16,)
    assert cpu.common_counts([(), ()]) == cpu.ROW_COUNTS
    assert [cpu.round_up_rows(n, (2, 16)) for n in (1, 2, 3, 16, 17, 33)] == [2, 2, 16, 16, 32, 48]


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
@pytest.mark.parametrize(("rows", "columns"), [(96, 50), (64, 129), (7, 48)])
def test_cpu_linear(rows: int, columns: int, dtype: torch.dtype) -> None:
    weight = torch.randn(rows, columns, generator=generator()).to(dtype)
    bias = torch.randn(rows, generator=generator()).to(dtype)
    x = torch.randn(5, columns, generator=generator()).to(dtype)
    residual = torch.randn(5, rows, generator=generator()).to(dtype)
    exact = x.double() @ weight.double().T + bias.double()
    bound = {torch.float32: 1e-5, torch.float16: 1e-2, torch.bfloat16: 6e-2}[dtype]
    plain = cpu.CpuLinear(weight, bias)(x)
    added = cpu.CpuLinear(weight, bias, residual=True)(x, residual)
    assert plain.dtype == added.dtype == dtype
    assert (plain.double() - exact).abs().max() <= bound * exact.abs().max()
    assert (added.double() - exact - residual.double()).abs().max() <= bound * exact.abs().max()
    with pytest.raises(ValueError, match=r"weight: expected a matrix \[N, K\] on the CPU"):
        cpu.CpuLinear(bias)


def test_elementwise_operations_by_hand() -> None:
    x = torch.tensor([[3.0, 4.0]])
    weight = torch.tensor([2.0, 1.0])
    norm = functional.rms_norm(x, weight, 0.0)
    torch.testing.assert_close(norm, torch.tensor([[6.0, 4.0]]) / math.sqrt(12.5))
    gate_up = torch.tensor([[0.0, 1.0, 5.0, 3.0]])
    silu = 1.0 / (1.0 + math.exp(-1.0))
    torch.testing.assert_close(functional.swiglu(gate_up), torch.tensor([[0.0, 3.0 * silu]]))


def test_rope_turns_each_pair_by_its_angle_and_leaves_values_alone() -> None:
    inv_freq = torch.tensor([1.0, 0.1])
    table = functional.rope_table(inv_freq, 1.0, 8, torch.float32)
    positions = torch.tensor([5, 0])
    cos, sin = functional.rope_rows(table, positions, 2, 3)
    qkv = torch.randn(2, 3, 4, generator=generator())
    out = functional.rope(qkv, cos, sin)
    assert torch.equal(out[:, 2], qkv[:, 2]) and torch.equal(out[1], qkv[1])
    for head in range(2):
        for pair in range(2):
            turned = complex(*qkv[0, head, [pair, pair + 2]].tolist()) * complex(
                math.cos(5 * inv_freq[pair]), math.sin(5 * inv_freq[pair])
            )
            expected = torch.tensor([turned.real, turned.imag])
            torch.testing.assert_close(out[0, head, [pair, pair + 2]], expected)


@pytest.mark.parametrize("window", [None, 5])
def test_attention_by_its_formula(window: int | None) -> None:
    cache = KVCache(1, 3, 20, 2, 8, dtype=torch.float32, device=torch.device("cpu"))
    kv = torch.randn(12, 4, 8, generator=generator())
    cache.slot(0, 1)[:12] = kv
    queries = torch.randn(3, 6, 8, generator=generator())
    expected = torch.empty(3, 6, 8)
    for row, position in enumerate((9, 10, 11)):
        low = 0 if window is None else position - window + 1
        for head in range(6):
            keys, values = kv[low : position + 1, head // 3], kv[low : position + 1, 2 + head // 3]
            weights = torch.softmax(keys @ queries[row, head] / math.sqrt(8), 0)
            expected[row, head] = weights @ values
    positions = torch.tensor([[9, 10, 11]])
    mask = functional.attention_mask(positions, 512, torch.float32, window)
    batched = functional.attention(queries[None], cache.kv[0], torch.tensor([1]), mask)
    torch.testing.assert_close(batched[0], expected.flatten(1))
    attention = CpuAttention(6, 2, 8, torch.float32)
    proven = attention.counts
    for counts in (proven, (16,), ()):
        attention.counts = counts
        rows = []
        for piece in attention.pieces(9, 3, window):
            keys, values = cache.heads(0, 1, piece.low, piece.high)
            rows.append(
                attention(queries[piece.first : piece.first + piece.count], keys, values, piece)
            )
        torch.testing.assert_close(torch.cat(rows), expected.flatten(1))


def test_append_kv_writes_the_given_rows_only() -> None:
    cache = torch.zeros(3, 8, 2, 4)
    kv = torch.arange(1.0, 33.0).view(2, 2, 2, 4)
    slots, positions = torch.tensor([[2], [0]]), torch.tensor([[1, 2], [6, 7]])
    functional.append_kv(cache, kv, slots, positions)
    assert torch.equal(cache[2, 1:3], kv[0]) and torch.equal(cache[0, 6:8], kv[1])
    assert cache.count_nonzero() == kv.numel()


def test_the_rotary_table_is_the_rounded_truth() -> None:
    """Of fp32 angles, as transformers has them; alike in every process and at every length."""
    inv_freq = 10000.0 ** -(torch.arange(0, 64, 2).float() / 64)
    table = functional.rope_table(inv_freq, 1.0, 600, torch.float32)
    for position in (0, 1, 47, 599):
        for i in (0, 1, 20, 31):
            angle = float(torch.tensor(position, dtype=torch.float32) * inv_freq[i])
            cos, sin = np.float32(math.cos(angle)), np.float32(math.sin(angle))
            assert float(table[position, 0, i]) == float(table[position, 0, i + 32]) == cos
            assert float(table[position, 1, i]) == -sin and float(table[position, 1, i + 32]) == sin
    longer = functional.rope_table(inv_freq, 1.0, 2048, torch.float32)
    assert torch.equal(longer[:600], table)
