"""Compressed weights are bitsandbytes' own, and the decoder computes with them."""

from __future__ import annotations

import sys
from typing import Any

import pytest
import torch
from torch import Tensor

from speckv.errors import ModelError
from speckv.kernels.packed import NestedScales
from speckv.models import quantize
from speckv.models.loading import wrap_model
from speckv.models.quantize import Int8Weight, Nf4Weight, compress, fuse, resolve_formats

CPU = torch.device("cpu")


@pytest.fixture
def weight() -> Tensor:
    return torch.randn(24, 80, generator=torch.Generator().manual_seed(5)) * 0.1


def test_int8_is_bitsandbytes_row_wise_format(weight: Tensor) -> None:
    packed = compress(weight, "int8", torch.float32)
    assert isinstance(packed, Int8Weight)
    half = weight.half().float()
    peak = half.abs().amax(1)
    assert packed.codes.dtype == torch.int8 and torch.equal(packed.scale, peak)
    expanded = packed.expand(torch.float32)
    assert torch.allclose(expanded, packed.codes.float() * peak[:, None] / 127, rtol=1e-6)
    assert ((expanded - half).abs() <= peak[:, None] / 127 * 0.501).all()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("columns", [64, 576])
def test_nf4_is_bitsandbytes_4_bit_format(columns: int, dtype: torch.dtype) -> None:
    weight = torch.randn(24, columns, generator=torch.Generator().manual_seed(5)).to(dtype)
    packed = compress(weight, "nf4", dtype)
    assert isinstance(packed, Nf4Weight)
    library = quantize._bitsandbytes()
    codes, state = library.quantize_4bit(weight, blocksize=64, quant_type="nf4")
    assert torch.equal(packed.codes, codes.flatten())
    assert torch.equal(packed.expand(dtype), library.dequantize_4bit(codes, state))


def test_nf4_blocks_that_straddle_rows(weight: Tensor) -> None:
    """bitsandbytes' own CPU expansion is wrong here (rows of 80), so the formula is the oracle."""
    packed = compress(weight, "nf4", torch.float32)
    assert isinstance(packed, Nf4Weight)
    flat, expanded = weight.flatten(), packed.expand(torch.float32).flatten()
    for block in range(30):
        rows = slice(64 * block, 64 * block + 64)
        peak = flat[rows].abs().max()
        assert packed.absmax[block] == peak
        nearest = (flat[rows, None] - packed.table * peak).abs().min(1).values
        assert torch.allclose((flat[rows] - expanded[rows]).abs(), nearest, atol=1e-6)


@pytest.mark.parametrize("compression", ["int8", "nf4"])
def test_fused_parts_keep_their_own_codes(compression: str, weight: Tensor) -> None:
    parts = [
        compress(weight[:8], compression, torch.float32),
        compress(weight[8:], compression, torch.float32),
    ]
    fused = fuse(parts)
    assert not isinstance(fused, Tensor)
    apart = [part.expand(torch.bfloat16) for part in parts if not isinstance(part, Tensor)]
    assert torch.equal(fused.expand(torch.bfloat16), torch.cat(apart))


def test_double_quantised_parts_are_fused_by_their_values(weight: Tensor) -> None:
    library = quantize._bitsandbytes()
    parts = []
    for rows in (weight[:8, :64].contiguous(), weight[8:, :64].contiguous()):
        codes, state = library.quantize_4bit(
            rows, blocksize=64, quant_type="nf4", compress_statistics=True
        )
        nested = NestedScales(state.state2.code, state.state2.absmax, state.offset)
        shape = (rows.shape[0], 64)
        parts.append(Nf4Weight(codes.flatten(), state.absmax, state.code, shape, nested))
        assert torch.equal(parts[-1].expand(torch.float32), library.dequantize_4bit(codes, state))
    fused = fuse(parts)
    assert isinstance(fused, Nf4Weight) and fused.nested is None
    apart = [part.expand(torch.bfloat16) for part in parts]
    assert torch.equal(fused.expand(torch.bfloat16), torch.cat(apart))


def test_nf4_blocks_may_not_straddle_fused_parts(weight: Tensor) -> None:
    parts = [compress(weight[:3, :50].contiguous(), "nf4", torch.float32)] * 2
    assert not isinstance(parts[0], Tensor) and parts[0].expand(torch.float32).shape == (3, 50)
    with pytest.raises(ValueError, match="nf4 needs a multiple of 64 elements to be fused"):
        fuse(parts)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("compression", ["int8", "nf4"])
def test_the_decoder_runs_the_compressed_model(
    compression: str, dtype: torch.dtype, family: Any, tokens: Tensor
) -> None:
    """Equal, bit for bit, to a decoder of the dequantised weights; head and embedding are exact."""
    source = family("qwen2-window")
    state = {name: tensor.clone() for name, tensor in source.state_dict().items()}
    for name, tensor in state.items():
        if name.endswith("_proj.weight"):
            packed = compress(tensor, compression, dtype)
            assert not isinstance(packed, Tensor)
            tensor.copy_(packed.expand(dtype))
    expanded = type(source)(source.config).eval()
    expanded.load_state_dict(state)
    plain = {torch.float32: "fp32", torch.bfloat16: "bf16"}[dtype]
    outputs = []
    for model, how in ((source, compression), (expanded, plain)):
        decoder = wrap_model(model, compression=how, dtype=dtype, device=CPU)
        assert decoder.compression == how and decoder.dtype == dtype
        outputs.append(decoder.forward(tokens[None, :20], [0], decoder.new_cache(1, 20)))
    assert torch.equal(*outputs)
    uncompressed = wrap_model(source, compression=plain, device=CPU)
    assert not torch.equal(
        outputs[0], uncompressed.forward(tokens[None, :20], [0], uncompressed.new_cache(1, 20))
    )


@pytest.mark.parametrize(
    ("compression", "dtype", "expected"),
    [
        ("fp32", None, torch.float32),
        ("bf16", "bf16", torch.bfloat16),
        ("fp16", torch.float16, torch.float16),
        ("int8", "fp32", torch.float32),
        ("nf4", torch.bfloat16, torch.bfloat16),
    ],
)
def test_formats_and_types_that_go_together(
    compression: str, dtype: Any, expected: torch.dtype
) -> None:
    assert resolve_formats(compression, dtype, CPU) == (compression, expected)


@pytest.mark.parametrize(("fast", "expected"), [(True, torch.bfloat16), (False, torch.float32)])
def test_the_default_type_of_compressed_models(
    fast: bool, expected: torch.dtype, monkeypatch: pytest.MonkeyPatch
) -> None:
    for probe in ("_is_avx512_bf16_supported", "_is_amx_tile_supported"):
        monkeypatch.setattr(torch.cpu, probe, lambda: fast)
    assert resolve_formats("int8", None, CPU)[1] == expected
    assert resolve_formats("nf4", None, torch.device("cuda"))[1] == torch.bfloat16


def test_conflicts_and_unknown_names_are_refused() -> None:
    with pytest.raises(ValueError, match="compression: expected one of fp32, .*, got 'int4'"):
        resolve_formats("int4", None, CPU)
    with pytest.raises(ValueError, match="dtype: expected one of fp32, fp16, bf16, got 'half'"):
        resolve_formats("int8", "half", CPU)
    with pytest.raises(ValueError, match="dtype: expected one of .*, got torch.int8"):
        resolve_formats("int8", torch.int8, CPU)
    with pytest.raises(
        ValueError, match="dtype: compression 'fp16' computes in torch.float16, got"
    ):
        resolve_formats("fp16", "bf16", CPU)


def test_a_missing_bitsandbytes_is_one_line(
    weight: Tensor, monkeypatch: pytest.MonkeyPatch
) -> None:
    quantize._bitsandbytes.cache_clear()
    monkeypatch.setitem(sys.modules, "bitsandbytes.functional", None)
    try:
        with pytest.raises(ModelError, match="need bitsandbytes.*pip install bitsandbytes"):
            compress(weight, "nf4", torch.float32)
        assert torch.equal(compress(weight, "fp32", torch.float32), weight)
    finally:
        quantize._bitsandbytes.cache_clear()
