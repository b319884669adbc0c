"""`linear` in the interpreter, against sums in float64 over weights unpacked one by one."""

from __future__ import annotations

import importlib
from dataclasses import dataclass, replace

import bitsandbytes.functional as bnb
import pytest
import torch
from torch import Tensor

from speckv import kernels
from speckv.kernels import reference_linear
from speckv.kernels.linear_config import Config, Scratch, _resident, _select_config, _shared_bytes
from speckv.kernels.nf4_lookup import NF4_TABLE
from speckv.kernels.packed import Int8Weight, NestedScales, Nf4Weight, Weight
from tests.kernels.cases import WORD, guarded
from tests.tolerances import assert_close

linear_module = importlib.import_module("speckv.kernels.linear")

KINDS = ("dense", "int8", "nf4", "nested")
ROWS = (1, 2, 3, 5, 9, 16, 17, 33, 136)
DTYPES = (torch.float16, torch.bfloat16)
EPS = 1e-2


@dataclass
class Case:
    """A weight and its value in float64, with random arguments to go with it."""

    weight: Weight
    value: Tensor
    dtype: torch.dtype
    generator: torch.Generator

    @classmethod
    def make(cls, kind: str, rows: int, depth: int, dtype: torch.dtype, seed: int = 0) -> Case:
        generator = torch.Generator().manual_seed(seed)

        def random(*shape: int) -> Tensor:
            return torch.randn(shape, generator=generator)

        weight: Weight
        if kind == "dense":
            weight = (random(rows, depth) / depth**0.5).to(dtype)
            value = weight.double()
        elif kind == "int8":
            codes = torch.randint(-127, 128, (rows, depth), generator=generator, dtype=torch.int8)
            scale = random(rows).abs() / depth**0.5
            weight, value = Int8Weight(codes, scale), torch.empty(rows, depth, dtype=torch.float64)
            for n in range(rows):
                value[n] = codes[n].double() * scale[n].double() / 127
        else:
            count = rows * depth
            codes = torch.randint(0, 256, (count // 2,), generator=generator, dtype=torch.uint8)
            table, nested = torch.tensor(NF4_TABLE), None
            if kind == "nf4":
                scales = absmax = random(count // 64).abs() / depth**0.5
            else:
                size = (count // 64,)
                absmax = torch.randint(0, 256, size, generator=generator, dtype=torch.uint8)
                outer = random(-(-count // 64 // 256)).abs() / depth**0.5
                nested = NestedScales(random(256), outer, random(outer.shape[0]) / depth**0.5)
                scales = torch.stack(
                    [
                        nested.table[int(code)] * outer[i // 256] + nested.offset[i // 256]
                        for i, code in enumerate(absmax)
                    ]
                )
            weight = Nf4Weight(codes, absmax, table, (rows, depth), nested)
            value = torch.empty(count, dtype=torch.float64)
            value[0::2] = torch.tensor(NF4_TABLE)[codes.long() // 16].double()
            value[1::2] = torch.tensor(NF4_TABLE)[codes.long() % 16].double()
            value = (value.view(-1, 64) * scales.double()[:, None]).view(rows, depth)
        return cls(weight, value, dtype, generator)

    def random(self, *shape: int) -> Tensor:
        """Random numbers with padding after each row."""
        *rows, last = shape
        whole = torch.randn(*rows, last + 6, generator=self.generator)
        return whole.to(self.dtype)[..., :last]

    def expected(
        self,
        x: Tensor,
        bias: Tensor | None = None,
        residual: Tensor | None = None,
        swiglu: bool = False,
        norm: Tensor | None = None,
    ) -> Tensor:
        y = x.double() @ self.value.T
        if norm is not None:
            weighed = (x.double() * norm.double()).to(x.dtype)
            size = (x.double().square().mean(dim=1, keepdim=True) + EPS).sqrt()
            y = weighed.double() @ self.value.T / size
        if bias is not None:
            y += bias.double()
        if swiglu:
            half = y.shape[1] // 2
            gate = y[:, :half]
            y = gate / (1 + (-gate).exp()) * y[:, half:]
        if residual is not None:
            y += residual.double()
        return y.to(self.dtype)

    def launch(
        self,
        x: Tensor,
        config: Config,
        bias: Tensor | None = None,
        residual: Tensor | None = None,
        swiglu: bool = False,
        norm: Tensor | None = None,
        norm_scale: float = 1.0,
    ) -> Tensor:
        """The kernel's result, written between guards, from scratch full of NaN."""
        columns = self.value.shape[0] // (2 if swiglu else 1)
        whole, out = guarded(max(x.shape[0], 1), columns, dtype=self.dtype, pad=5)
        out = out[: x.shape[0]]
        scratch = Scratch.allocate(x.shape[0], columns, config, "cpu", swiglu=swiglu)
        scratch.partials.fill_(float("nan"))
        table = self.weight.table.to(self.dtype) if isinstance(self.weight, Nf4Weight) else None
        linear_module.linear_out(
            x,
            self.weight,
            out=out,
            config=config,
            scratch=scratch,
            bias=bias,
            residual=residual,
            swiglu=swiglu,
            norm=norm,
            eps=EPS,
            norm_scale=norm_scale,
            table=table,
        )
        assert not scratch.counters.any()
        found = out.clone()
        out.fill_(WORD)
        assert (whole == torch.tensor(WORD).to(self.dtype)).all()
        return found


def config_of(kind: str, splits: int = 2) -> Config:
    return Config(block_n=32, block_k=128 if kind in ("nf4", "nested") else 64, splits=splits)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("kind", KINDS)
def test_every_number_of_rows(kind: str, dtype: torch.dtype) -> None:
    case = Case.make(kind, 46, 256, dtype)
    for rows in ROWS:
        x = case.random(rows, 256)
        assert_close(case.launch(x, config_of(kind)), case.expected(x), dtype)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize(
    ("rows", "depth"), [(1, 1), (7, 257), (111, 7), (257, 111), (1, 576), (7, 130), (111, 1031)]
)
def test_odd_weights(kind: str, rows: int, depth: int) -> None:
    if kind in ("nf4", "nested"):
        depth = -(-depth // 64) * 64
    case = Case.make(kind, rows, depth, torch.bfloat16, seed=rows + depth)
    config = Config(block_n=64, block_k=64, splits=min(2, -(-depth // 64)))
    x = case.random(3, depth)
    assert_close(case.launch(x, config), case.expected(x), torch.bfloat16)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("splits", [1, 3])
@pytest.mark.parametrize("swiglu", [False, True], ids=["plain", "swiglu"])
@pytest.mark.parametrize("kind", KINDS)
def test_epilogues(kind: str, swiglu: bool, splits: int, dtype: torch.dtype) -> None:
    case = Case.make(kind, 74, 384, dtype, seed=1)
    x, bias = case.random(5, 384), case.random(1, 74)[0]
    residual = case.random(5, 37 if swiglu else 74)
    for arguments in (
        {},
        {"bias": bias},
        {"residual": residual},
        {"bias": bias, "residual": residual},
    ):
        found = case.launch(x, config_of(kind, splits), swiglu=swiglu, **arguments)
        assert_close(found, case.expected(x, swiglu=swiglu, **arguments), dtype)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("splits", [1, 3])
@pytest.mark.parametrize("swiglu", [False, True], ids=["plain", "swiglu"])
@pytest.mark.parametrize("kind", KINDS)
def test_normalised_rows(kind: str, swiglu: bool, splits: int, dtype: torch.dtype) -> None:
    """Rows of every scale, to which the norm is blind but for its epsilon."""
    case = Case.make(kind, 74, 384, dtype, seed=4)
    norm = case.random(1, 384)[0].contiguous() + 1
    residual = case.random(19, 37 if swiglu else 74)
    scale = torch.logspace(-3, 2, 19)[:, None].to(dtype)
    x = case.random(19, 390)[:, :384] * scale
    for arguments in ({}, {"bias": case.random(1, 74)[0], "residual": residual}):
        found = case.launch(x, config_of(kind, splits), swiglu=swiglu, norm=norm, **arguments)
        assert_close(found, case.expected(x, swiglu=swiglu, norm=norm, **arguments), dtype)


def test_a_norm_that_is_scaled_down_keeps_large_rows_finite() -> None:
    """In fp16 the products of these rows with the norm as it is would not be."""
    case = Case.make("dense", 74, 384, torch.float16, seed=4)
    norm = 64 * case.random(1, 384)[0].clamp(-1, 1).contiguous()
    x, config = 2.0**15 * case.random(3, 384).sign(), config_of("dense")
    assert case.launch(x, config, norm=norm).isnan().any()
    found = case.launch(x, config, norm=norm / 64, norm_scale=64.0)
    expected = 64 * case.expected(x, norm=norm / 64).double()
    assert_close(found, expected.half(), torch.float16)
    twin = torch.empty_like(found)
    scaled = {"norm": norm / 64, "norm_scale": 64.0, "eps": EPS}
    reference_linear.linear(x, case.weight, out=twin, **scaled)
    assert_close(twin, found, torch.float16)


@pytest.mark.parametrize("depth", [7, 111, 257, 1031])
def test_normalised_rows_of_odd_weights(depth: int) -> None:
    case = Case.make("dense", 23, depth, torch.bfloat16, seed=depth)
    x, norm = case.random(3, depth), case.random(1, depth)[0].contiguous()
    config = Config(block_n=64, block_k=64, splits=min(3, -(-depth // 64)))
    assert_close(case.launch(x, config, norm=norm), case.expected(x, norm=norm), torch.bfloat16)


@pytest.mark.parametrize("kind", KINDS)
def test_the_bits_of_a_normalised_row_do_not_depend_on_the_others(kind: str) -> None:
    case = Case.make(kind, 80, 384, torch.bfloat16, seed=5)
    config = config_of(kind, splits=3)
    x, norm = case.random(136, 384), case.random(1, 384)[0].contiguous()
    together = case.launch(x, config, norm=norm)
    for first, rows in zip((0, 5, 31, 70, 127, 1, 119, 77, 0), ROWS, strict=True):
        found = case.launch(x[first : first + rows], config, norm=norm)
        assert torch.equal(found, together[first : first + rows])


@pytest.mark.parametrize(
    ("kind", "swiglu"), [*((kind, False) for kind in KINDS), ("dense", True), ("nf4", True)]
)
def test_the_bits_of_a_row_do_not_depend_on_the_others(kind: str, swiglu: bool) -> None:
    """At every number of rows, at other places of other tiles.

    Of activations of one size, so that a block of codes has one sum in any order: the interpreter's
    products have other last bits in other rows.
    """
    case = Case.make(kind, 80, 384, torch.bfloat16, seed=2)
    config = replace(config_of(kind, splits=3), block_n=128)
    x = case.random(136, 384).sign()
    together = case.launch(x, config, swiglu=swiglu)
    for first, rows in zip((0, 5, 31, 70, 127, 1, 119, 77, 0), ROWS, strict=True):
        found = case.launch(x[first : first + rows], config, swiglu=swiglu)
        assert torch.equal(found, together[first : first + rows])


def test_infinities_and_nan_stay_in_their_row() -> None:
    case = Case.make("dense", 40, 128, torch.float16, seed=3)
    x = case.random(18, 128)
    clean = case.launch(x, config_of("dense"))
    x[2, 7], x[16, 100] = float("nan"), float("inf")
    found = case.launch(x, config_of("dense"))
    assert found[2].isnan().all() and not found[16].isfinite().any()
    others = [i for i in range(18) if i not in (2, 16)]
    assert torch.equal(found[others], clean[others])


def test_splits_are_added_in_index_order() -> None:
    """2^26 + 1 - 2^26 is 0 in that order, in fp32, and 1 in any other."""
    weight = torch.zeros(1, 192, dtype=torch.bfloat16)
    weight[0, 0], weight[0, 64], weight[0, 128] = 2.0**26, 1.0, -(2.0**26)
    case = Case(weight, weight.double(), torch.bfloat16, torch.Generator())
    ones = torch.ones(2, 192, dtype=torch.bfloat16)
    assert case.launch(ones, Config(16, 64, splits=3)).tolist() == [[0.0], [0.0]]


def test_a_case_worked_by_hand() -> None:
    """Codes 15, 0, 7 and 15 stand for 1, -1, 0 and 1; the second block's absmax is 0.5."""
    codes = torch.full((64,), 0x77, dtype=torch.uint8)
    codes[0], codes[1], codes[32] = 0xF0, 0x7F, 0xF7
    weight = Nf4Weight(codes, torch.tensor([2.0, 0.5]), torch.tensor(NF4_TABLE), (1, 128))
    x = torch.zeros(1, 128, dtype=torch.float16)
    x[0, 0], x[0, 1], x[0, 3], x[0, 64] = 5.0, 3.0, 7.0, 100.0
    case = Case(weight, torch.empty(1, 128), torch.float16, torch.Generator())
    assert case.launch(x, Config(64, 64, splits=2)).item() == 2 * (5 - 3 + 7) + 50
    assert kernels.linear(x, weight).item() == 68


def test_the_residual_may_be_overwritten() -> None:
    case = Case.make("dense", 48, 128, torch.bfloat16, seed=4)
    x, residual = case.random(5, 128), case.random(5, 48)
    config = config_of("dense")
    apart = case.launch(x, config, residual=residual)
    scratch = Scratch.allocate(5, 48, config, "cpu")
    linear_module.linear_out(
        x, case.weight, out=residual, config=config, scratch=scratch, residual=residual
    )
    assert torch.equal(residual, apart)


def test_no_rows() -> None:
    case = Case.make("dense", 48, 128, torch.bfloat16)
    empty = torch.empty(0, 128, dtype=torch.bfloat16)
    assert case.launch(empty, config_of("dense")).shape == (0, 48)
    assert kernels.linear(empty, case.weight).shape == (0, 48)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("swiglu", [False, True], ids=["plain", "swiglu"])
def test_the_twin_on_the_cpu(kind: str, swiglu: bool) -> None:
    case = Case.make(kind, 74, 192, torch.bfloat16, seed=5)
    x, bias = case.random(5, 192), case.random(1, 74)[0]
    residual = case.random(5, 37 if swiglu else 74)
    found = kernels.linear(x, case.weight, bias=bias, residual=residual, swiglu=swiglu)
    assert_close(found, case.expected(x, bias, residual, swiglu), torch.bfloat16)


@pytest.mark.parametrize("double", [False, True], ids=["fp32 absmax", "double-quantised"])
def test_nf4_weights_of_bitsandbytes_are_read_as_they_are(double: bool) -> None:
    generator = torch.Generator().manual_seed(6)
    dense = torch.randn(96, 320, generator=generator) / 18
    codes, state = bnb.quantize_4bit(
        dense, blocksize=64, quant_type="nf4", compress_statistics=double
    )
    nested = None
    if double:
        outer = state.state2
        nested = NestedScales(outer.code, outer.absmax, state.offset)
    weight = Nf4Weight(codes.flatten(), state.absmax, state.code, (96, 320), nested)
    value = bnb.dequantize_4bit(codes, state)
    assert_close(weight.expand(torch.float32), value, torch.float32)
    case = Case(weight, value.double(), torch.float16, generator)
    x = case.random(9, 320)
    assert_close(case.launch(x, Config(32, 64, splits=2)), case.expected(x), torch.float16)


def test_int8_weights_of_bitsandbytes_are_read_as_they_are() -> None:
    generator = torch.Generator().manual_seed(7)
    dense = (torch.randn(96, 320, generator=generator) / 18).half()
    codes, scale, _ = bnb.int8_vectorwise_quant(dense)
    value = bnb.int8_vectorwise_dequant(codes, scale)
    case = Case(Int8Weight(codes, scale), value.double(), torch.float16, generator)
    x = case.random(9, 320)
    assert_close(case.launch(x, Config(32, 64, splits=2)), case.expected(x), torch.float16)


SHAPES = [(1, 1), (960, 576), (1031, 1031), (2048, 8192), (4096, 14_336), (128_256, 2048)]


@pytest.mark.parametrize("kind", ["dense", "int8", "nf4"])
@pytest.mark.parametrize("capability", [(8, 0), (9, 0), (10, 0), (7, 7)])
def test_configs_are_whole(kind: str, capability: tuple[int, int]) -> None:
    for columns, depth in SHAPES:
        if kind == "nf4":
            depth = -(-depth // 64) * 64
        for swiglu in (False, True):
            config = _select_config(columns, depth, capability, kind, swiglu)
            assert 1 <= config.splits <= min(16, -(-depth // config.block_k))
            if kind == "nf4":
                assert depth % config.block_k == 0 and config.block_n == 64


def test_configs_fill_the_multiprocessors() -> None:
    assert _select_config(2048, 8192, (9, 0), "dense").splits == 8
    assert _select_config(2048, 2048, (9, 0), "nf4").splits == 4
    assert _select_config(6144, 4096, (9, 0), "dense").splits == 4  # three on each: one wave
    assert _select_config(6144, 4096, (9, 0), "dense", multiprocessors=114).splits == 2
    assert _select_config(128_256, 2048, (9, 0), "dense").splits == 1
    assert _select_config(8192, 2048, (9, 0), "dense", swiglu=True) == Config(
        block_n=32, block_k=128, splits=1, maxnreg=128
    )


@pytest.mark.parametrize(
    ("kind", "swiglu", "shared", "programs"),
    [
        ("dense", False, 61_440, {(8, 0): 2, (9, 0): 3, (8, 6): 1}),
        ("dense", True, 61_440, {(8, 0): 2, (9, 0): 3, (8, 6): 1}),
        ("int8", False, 36_864, {(8, 0): 4, (9, 0): 4, (8, 6): 2}),
        ("nf4", False, 52_224, {(8, 0): 3, (9, 0): 3, (8, 6): 1}),
        ("nf4", True, 39_936, {(8, 0): 3, (9, 0): 3, (8, 6): 2}),
    ],
)
def test_programs_that_are_resident(
    kind: str, swiglu: bool, shared: int, programs: dict[tuple[int, int], int]
) -> None:
    """As many as shared memory holds, and registers: 4 of 128 a thread, 3 of 144."""
    config = _select_config(8192, 2048, (9, 0), kind, swiglu)
    assert _shared_bytes(config, kind, swiglu) == shared
    assert {c: _resident(config, kind, swiglu, c) for c in programs} == programs


def weights() -> dict[str, Weight]:
    return {kind: Case.make(kind, 4, 64, torch.float16).weight for kind in KINDS}


X = torch.zeros(3, 64, dtype=torch.float16)
BAD = {
    "x of fp32": ("dense", {"x": X.float()}, TypeError, "x: expected fp16 or bf16"),
    "x of rank 3": ("dense", {"x": X[None]}, ValueError, r"x: expected \[M, K\]"),
    "x of another K": ("int8", {"x": X[:, :32]}, ValueError, r"x: expected float16 \[3, 64\]"),
    "x in columns": ("dense", {"x": X.T.contiguous().T}, ValueError, "x: expected unit stride"),
    "x off a word": (
        "nf4",
        {"x": torch.zeros(193, dtype=torch.float16)[1:].view(3, 64)},
        ValueError,
        "x: expected rows that start at multiples of 4 bytes",
    ),
    "weight of another type": ("dense", {"x": X.bfloat16()}, TypeError, "weight: expected bfl"),
    "bias of N + 1": ("dense", {"bias": X[0, :5]}, ValueError, r"bias: expected float16 \[4\]"),
    "bias of fp32": ("dense", {"bias": torch.zeros(4)}, TypeError, "bias: expected float16"),
    "residual of N": (
        "dense",
        {"residual": X[:, :4], "swiglu": True},
        ValueError,
        r"residual: expected float16 \[3, 2\]",
    ),
    "out of fp32": ("dense", {"out": torch.zeros(3, 4)}, TypeError, "out: expected float16"),
}


@pytest.mark.parametrize(("kind", "arguments", "error", "message"), BAD.values(), ids=BAD)
def test_bad_arguments_are_refused(
    kind: str, arguments: dict[str, Tensor], error: type[Exception], message: str
) -> None:
    with pytest.raises(error, match=message):
        kernels.linear(**{"x": X, "weight": weights()[kind], **arguments})


def test_bad_weights_are_refused() -> None:
    dense, int8, nf4, nested = weights().values()
    assert isinstance(dense, Tensor) and isinstance(int8, Int8Weight)
    assert isinstance(nf4, Nf4Weight) and isinstance(nested, Nf4Weight)
    scales = nested.nested
    assert scales is not None
    empty = torch.empty(0, 64, dtype=torch.float16)
    for weight, error, message in (
        (None, TypeError, "weight: expected a tensor, Int8Weight or Nf4Weight, got NoneType"),
        (dense.T, ValueError, "weight: expected a contiguous"),
        (empty, ValueError, "weight: expected at least one row and column"),
        (replace(int8, codes=int8.codes.int()), TypeError, "weight.codes: expected int8"),
        (replace(int8, scale=int8.scale[:3]), ValueError, r"weight.scale: expected float32 \[4\]"),
        (replace(nf4, shape=(8, 32)), ValueError, "weight: expected nf4 rows of a multiple of 64"),
        (replace(nf4, absmax=nested.absmax), TypeError, "weight.absmax: expected float32"),
        (replace(nested, absmax=nf4.absmax), TypeError, "weight.absmax: expected uint8"),
        (
            replace(nested, nested=replace(scales, table=scales.table[:9])),
            ValueError,
            r"weight.nested.table: expected float32 \[256\]",
        ),
    ):
        with pytest.raises(error, match=message):
            kernels.linear(X, weight)
    with pytest.raises(ValueError, match="weight: expected an even number of rows"):
        kernels.linear(X, dense[:3], swiglu=True)
    with pytest.raises(TypeError, match="dtype: expected torch.float16 or torch.bfloat16"):
        kernels.Linear(dense.float(), dtype=torch.float32)
