"""`rope_append` in the interpreter, against rotations of complex numbers in float64."""

from __future__ import annotations

import importlib
from collections.abc import Callable
from dataclasses import dataclass

import pytest
import torch
from torch import Tensor

from speckv import kernels
from speckv.kernels import functional
from tests.kernels.cases import WORD
from tests.tolerances import assert_close

rope_module = importlib.import_module("speckv.kernels.rope_append")
EPS = 1e-3


@dataclass
class Case:
    """Rows of ``batch`` sequences at ``width`` positions each, from different starts."""

    qkv: Tensor
    inv_freq: Tensor
    table: Tensor
    positions: Tensor
    slots: Tensor
    cache: Tensor
    heads: int
    head_norm: Tensor | None

    @classmethod
    def make(
        cls,
        batch: int,
        width: int,
        dtype: torch.dtype,
        heads: int = 5,
        kv_heads: int = 2,
        head_dim: int = 16,
        norm: bool = False,
    ) -> Case:
        generator = torch.Generator().manual_seed(batch + width)

        def random(*shape: int) -> Tensor:
            return torch.randn(shape, generator=generator).to(dtype)

        total = heads + 2 * kv_heads
        inv_freq = 100.0 ** (-torch.arange(head_dim // 2) / (head_dim / 2))
        starts = torch.tensor([3 * b % 7 for b in range(batch)])
        whole = random(batch * width, (total + 1) * head_dim)
        return cls(
            qkv=whole[:, : total * head_dim].view(-1, total, head_dim),
            inv_freq=inv_freq,
            table=functional.rope_table(inv_freq, 1.0, 40, dtype),
            positions=(starts[:, None] + torch.arange(width)).contiguous(),
            slots=torch.tensor([(b + 2) % (batch + 1) for b in range(batch)]),
            cache=torch.full((batch + 1, 40, 2 * kv_heads, head_dim), WORD).to(dtype),
            heads=heads,
            head_norm=random(heads + kv_heads, head_dim) if norm else None,
        )

    def launch(self) -> Tensor:
        rows, _, head_dim = self.qkv.shape
        out = torch.full((rows, self.heads, head_dim), float("nan")).to(self.qkv.dtype)
        rope_module.rope_append_out(
            self.qkv,
            self.table,
            self.positions,
            self.slots,
            self.cache,
            out=out,
            head_norm=self.head_norm,
            eps=EPS,
        )
        return out

    def expected(self) -> tuple[Tensor, Tensor]:
        """Queries, and the cache."""
        kv_heads = self.cache.shape[2] // 2
        x = self.qkv.double()
        rotated = x[:, :-kv_heads]
        if self.head_norm is not None:
            root = (rotated.square().mean(-1, keepdim=True) + EPS).sqrt()
            rotated = rotated / root * self.head_norm.double()
        half = x.shape[-1] // 2
        angle = self.positions.view(-1)[:, None].double() * self.inv_freq.double()
        turn = torch.polar(torch.ones_like(angle), angle)[:, None]
        turned = torch.complex(rotated[..., :half], rotated[..., half:]) * turn
        rotated = torch.cat((turned.real, turned.imag), -1).to(self.qkv.dtype)
        cache = torch.full_like(self.cache, WORD)
        width = self.positions.shape[1]
        for row, position in enumerate(self.positions.view(-1).tolist()):
            place = cache[int(self.slots[row // width]), position]
            place[:kv_heads] = rotated[row, self.heads :]
            place[kv_heads:] = self.qkv[row, -kv_heads:]
        return rotated[:, : self.heads], cache


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16], ids=str)
@pytest.mark.parametrize("norm", [False, True], ids=["plain", "head norm"])
@pytest.mark.parametrize(("batch", "width"), [(1, 1), (1, 16), (3, 2), (8, 5)])
def test_the_kernel_equals_the_formula(
    batch: int, width: int, norm: bool, dtype: torch.dtype
) -> None:
    case = Case.make(batch, width, dtype, norm=norm)
    before = case.qkv.clone()
    out = case.launch()
    queries, cache = case.expected()
    assert torch.equal(case.qkv, before)
    assert_close(out, queries, dtype)
    assert_close(case.cache, cache, dtype)
    untouched = cache == WORD
    assert torch.equal(case.cache[untouched], cache[untouched])
    kv_heads = cache.shape[2] // 2
    assert torch.equal(case.cache[:, :, kv_heads:], cache[:, :, kv_heads:])


@pytest.mark.parametrize(
    ("heads", "kv_heads", "head_dim"), [(1, 1, 2), (9, 3, 64), (4, 4, 80), (7, 1, 128)]
)
def test_other_heads(heads: int, kv_heads: int, head_dim: int) -> None:
    shape = {"heads": heads, "kv_heads": kv_heads, "head_dim": head_dim}
    case = Case.make(2, 3, torch.bfloat16, norm=True, **shape)
    queries, cache = case.expected()
    assert_close(case.launch(), queries, torch.bfloat16)
    assert_close(case.cache, cache, torch.bfloat16)


def test_the_bits_of_a_row_do_not_depend_on_the_others() -> None:
    case = Case.make(1, 16, torch.bfloat16, norm=True)
    together = case.launch()
    rows = slice(5, 8)
    alone = Case(**{**vars(case), "cache": torch.full_like(case.cache, WORD)})
    alone.qkv, alone.positions = case.qkv[rows], case.positions[:, rows].contiguous()
    assert torch.equal(alone.launch(), together[rows])
    at = alone.positions[0]
    slot = int(case.slots[0])
    assert torch.equal(alone.cache[slot, at], case.cache[slot, at])


@pytest.mark.parametrize("norm", [False, True], ids=["plain", "head norm"])
def test_the_twin_on_the_cpu(norm: bool) -> None:
    case = Case.make(3, 4, torch.float32, norm=norm)
    queries, cache = case.expected()
    found = kernels.rope_append(
        case.qkv,
        case.table,
        case.positions,
        case.slots,
        case.cache,
        head_norm=case.head_norm,
        eps=EPS,
    )
    assert_close(found, queries, torch.float32)
    assert_close(case.cache, cache, torch.float32)


def test_no_rows() -> None:
    case = Case.make(0, 1, torch.float32)
    assert case.launch().shape == (0, 5, 16)


@pytest.mark.parametrize(
    ("name", "change", "error", "message"),
    [
        ("qkv", lambda t: t[..., :15], ValueError, "qkv: expected an even head_dim"),
        ("qkv", lambda t: t.int(), TypeError, "qkv: expected floating"),
        ("qkv", lambda t: t[:, ::2], ValueError, "qkv: expected contiguous heads"),
        ("table", lambda t: t[:, :1], ValueError, r"table: expected float32 \[any, 2, 16\]"),
        ("positions", lambda t: t.int(), TypeError, "positions: expected int64"),
        ("positions", lambda t: t[:, :1].contiguous(), ValueError, "positions: expected 6 in all"),
        ("slots", lambda t: t[:2], ValueError, r"slots: expected int64 \[3\]"),
        ("cache", lambda t: t[:, :, :3], ValueError, "cache: expected contiguous heads, an even"),
        ("cache", lambda t: t.half(), TypeError, "cache: expected float32"),
        ("head_norm", lambda t: t[:5], ValueError, r"head_norm: expected float32 \[7, 16\]"),
        ("out", lambda t: torch.zeros(6, 4, 16), ValueError, r"out: expected float32 \[6, 5, 16\]"),
    ],
)
def test_bad_arguments_are_refused(
    name: str, change: Callable[[Tensor], Tensor], error: type[Exception], message: str
) -> None:
    case = Case.make(3, 2, torch.float32, norm=True)
    arguments = {k: v for k, v in vars(case).items() if k not in ("inv_freq", "heads")}
    arguments[name] = change(arguments.get(name, case.qkv))
    with pytest.raises(error, match=message):
        kernels.rope_append(**arguments)
