"""The decoder by the kernels for few rows: through their references, and in the interpreter."""

from __future__ import annotations

import importlib
from collections.abc import Callable, Iterator
from functools import cache, partial
from typing import Any

import pytest
import torch
from torch import Tensor

import speckv.kernels
from bench.roofline import TINY
from speckv.kernels.linear_config import Config, Scratch
from speckv.kernels.packed import Nf4Weight
from speckv.models import fused, llama, weights
from speckv.models.config import DecoderConfig
from speckv.models.fused import LAUNCHES_PER_LAYER, ROWS_MAX, Parameters
from speckv.models.llama import LlamaDecoder
from tests.models.conftest import VOCAB, seeded
from tests.tolerances import assert_close

SIZES = {
    **TINY,
    "vocab_size": VOCAB,
    "max_position_embeddings": 1024,
    "initializer_range": 0.15,
}
BOUND = {torch.float16: 4e-3, torch.bfloat16: 3e-2}  # relative to the largest logit
LINEAR = importlib.import_module("speckv.kernels.linear")
ROPE = importlib.import_module("speckv.kernels.rope_append")
ATTENTION = importlib.import_module("speckv.kernels.attention")


def _llama() -> Any:
    from transformers import LlamaConfig, LlamaForCausalLM

    return LlamaForCausalLM(LlamaConfig(**SIZES, attention_bias=True, mlp_bias=True))


def _llama_tied() -> Any:
    from transformers import LlamaConfig, LlamaForCausalLM

    return LlamaForCausalLM(LlamaConfig(**SIZES, tie_word_embeddings=True))


def _mistral() -> Any:
    from transformers import MistralConfig, MistralForCausalLM

    return MistralForCausalLM(MistralConfig(**SIZES, sliding_window=7))


def _qwen2() -> Any:
    from transformers import Qwen2Config, Qwen2ForCausalLM

    sizes = {name: size for name, size in SIZES.items() if name != "head_dim"}
    return Qwen2ForCausalLM(Qwen2Config(**sizes))


def _qwen3() -> Any:
    from transformers import Qwen3Config, Qwen3ForCausalLM

    return Qwen3ForCausalLM(Qwen3Config(**SIZES))


FAMILY = {
    "llama": _llama,
    "llama-tied": _llama_tied,
    "mistral": _mistral,
    "qwen2": _qwen2,
    "qwen3": _qwen3,
}


def build(
    name: str,
    compression: str,
    dtype: torch.dtype = torch.bfloat16,
    invariant: bool = False,
    model: Any = None,
    device: str = "cpu",
) -> LlamaDecoder:
    source = seeded(FAMILY[name]) if model is None else model
    return LlamaDecoder.from_tensors(
        DecoderConfig.from_transformers(source.config),
        source.state_dict(),
        name=name,
        compression=compression,
        dtype=dtype,
        device=torch.device(device),
        invariant=invariant,
    )


def logits_of(model: LlamaDecoder, tokens: Tensor, width: int = 3) -> Tensor:
    """Of a prompt of 20 tokens and a block for each of two sequences: [2, width, VOCAB]."""
    cache = model.new_cache(3, 64)
    starts = torch.tensor([20, 13], device=model.device)
    slots = torch.tensor([2, 0], device=model.device)
    for i in range(2):
        ids = tokens[50 * i : 50 * i + int(starts[i])]
        model.prefill(ids, cache, int(slots[i]), want_logits=False)
    block = torch.stack((tokens[200 : 200 + width], tokens[300 : 300 + width]))
    return model.forward(block, starts, cache, slots=slots, context=20 + width).float()


def distance(actual: Tensor, expected: Tensor) -> float:
    return float((actual - expected).abs().max() / expected.abs().max())


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=str)
@pytest.mark.parametrize("name", FAMILY)
def test_logits_are_those_of_transformers(name: str, dtype: torch.dtype, tokens: Tensor) -> None:
    source = seeded(FAMILY[name])
    compression = "fp16" if dtype == torch.float16 else "bf16"
    model = build(name, compression, dtype, model=source)
    assert model._fused is not None
    actual = logits_of(model, tokens)
    for i, start in enumerate((20, 13)):
        text = torch.cat((tokens[50 * i : 50 * i + start], tokens[200 + 100 * i :][:3]))
        with torch.no_grad():
            expected = source(text[None]).logits[0, -3:]
        assert distance(actual[i], expected) <= BOUND[dtype]


@pytest.mark.parametrize("compression", ["int8", "nf4"])
@pytest.mark.parametrize("name", ["llama", "mistral", "qwen2", "qwen3"])
def test_packed_weights_are_what_they_stand_for(
    name: str, compression: str, tokens: Tensor
) -> None:
    """Against a decoder of the same weights, expanded, in fp32."""
    actual = logits_of(build(name, compression), tokens)
    expected = logits_of(build(name, compression, torch.float32, invariant=True), tokens)
    assert distance(actual, expected) <= BOUND[torch.bfloat16]


def test_six_launches_a_layer(monkeypatch: pytest.MonkeyPatch, tokens: Tensor) -> None:
    model = build("qwen3", "bf16")
    cache = model.new_cache(1, 64)
    calls: list[str] = []

    def counted(name: str, call: Callable[..., Any]) -> Callable[..., Any]:
        def wrapper(*arguments: Any, **options: Any) -> Any:
            calls.append(name)
            return call(*arguments, **options)

        return wrapper

    product = speckv.kernels.Linear.__call__
    monkeypatch.setattr(speckv.kernels.Linear, "__call__", counted("linear", product))
    rope, attend = fused.row_operations(torch.device("cpu"))
    operations = counted("rope_append", rope), counted("attention", attend)
    monkeypatch.setattr(fused, "row_operations", lambda device: operations)
    model.forward(tokens[None, :5], [0], cache)
    layer = ["linear", "rope_append", "attention", "linear", "linear", "linear"]
    assert len(layer) == LAUNCHES_PER_LAYER
    assert calls == [*layer * 2, "linear"]


def test_long_prompts_take_the_other_path(tokens: Tensor) -> None:
    """What it leaves in the cache is what the kernels go on from."""
    model, exact = build("llama", "bf16"), build("llama", "bf16", torch.bfloat16, invariant=True)
    found = []
    for each in (model, exact):
        cache = each.new_cache(1, 400)
        each.prefill(tokens[: ROWS_MAX + 100], cache, 0, want_logits=False)
        start = [ROWS_MAX + 100]
        found.append(each.forward(tokens[None, 300:304], start, cache).float())
    assert distance(*found) <= BOUND[torch.bfloat16]


MASKS = [
    (1, [128, 128, 128, 16]),
    (2 * 400 * 300, [256, 144]),  # two query heads to a key head: 300 rows, of which 256 are taken
    (2**20, [384, 16]),
    (0, None),
]


@pytest.mark.parametrize(("mask", "pieces"), MASKS)
def test_chunks_of_a_prompt_are_as_long_as_its_mask_allows(
    mask: int, pieces: list[int] | None, monkeypatch: pytest.MonkeyPatch, tokens: Tensor
) -> None:
    """Few, for every chunk reads all weights; what they leave in the cache is the same."""
    model, whole = (build("llama", "nf4", torch.float32) for _ in range(2))
    if pieces is not None:
        monkeypatch.setattr(llama, "_CHUNK", (128, 384))
        monkeypatch.setattr(llama, "_MASK_ELEMENTS", mask)
    widths, hidden = [], model._hidden

    def recorded(block: Tensor, *arguments: Any) -> Tensor:
        widths.append(block.shape[1])
        return hidden(block, *arguments)

    monkeypatch.setattr(model, "_hidden", recorded)
    found = model.prefill(tokens[:400], model.new_cache(1, 400), 0)
    assert widths == (pieces or [400])
    monkeypatch.undo()
    expected = whole.prefill(tokens[:400], whole.new_cache(1, 400), 0)
    assert found is not None and expected is not None
    assert distance(found, expected) <= 1e-5


def test_drafts_are_fused_too(tokens: Tensor) -> None:
    model = build("llama", "nf4")
    first = model.first_layers(1)
    source = seeded(_llama).state_dict()
    draft = model.slice_draft(source, (1,), VOCAB, name="draft")
    for each in (first, draft):
        assert each._fused is not None
        logits = each.forward(tokens[None, :4], [0], each.new_cache(1, 16))
        assert logits.shape == (1, 4, VOCAB) and logits.isfinite().all()


@pytest.mark.parametrize(
    ("change", "compression", "dtype"),
    [
        ({"head_dim": 24}, "bf16", torch.bfloat16),
        ({"intermediate_size": 96}, "nf4", torch.bfloat16),
        ({}, "fp32", torch.float32),
    ],
    ids=["head_dim", "nf4-depth", "fp32"],
)
def test_what_the_kernels_do_not_take(
    change: dict[str, int], compression: str, dtype: torch.dtype, tokens: Tensor
) -> None:
    from transformers import LlamaConfig, LlamaForCausalLM

    source = seeded(lambda: LlamaForCausalLM(LlamaConfig(**{**SIZES, **change})))
    model = build("llama", compression, dtype, model=source)
    assert model._fused is None and not model.width_invariant
    assert logits_of(model, tokens).isfinite().all()


def test_large_activations_stay_finite_in_fp16() -> None:
    """As in transformers, which divides a row by its size before it is multiplied by the norm."""
    weight = torch.eye(64, dtype=torch.float16)
    norm, x = torch.full((64,), 24.0).half(), torch.full((2, 64), 6e4).half()
    out = torch.empty_like(x)
    for dtype in (torch.float16, torch.bfloat16):
        parameters = Parameters(weight.to(dtype), None)
        product = fused.fused_product(parameters, dtype, norm=norm.to(dtype), eps=1e-5)
        product(x.to(dtype), out=out)
        assert_close(out, torch.full_like(x, 24.0), dtype)


class Interpreted:
    """`fused_product` whose kernel runs in the interpreter."""

    def __init__(
        self,
        parameters: Parameters,
        dtype: torch.dtype,
        *,
        norm: Tensor | None = None,
        eps: float = 0.0,
        swiglu: bool = False,
    ) -> None:
        weight = parameters.weight
        rows, depth = weight.shape
        columns = rows // 2 if swiglu else rows
        self.scratch = None
        self._config = Config(block_n=32, block_k=64, splits=min(2, -(-depth // 64)))
        self._scratch = Scratch.allocate(ROWS_MAX, columns, self._config, "cpu", swiglu=swiglu)
        table = weight.table.to(dtype) if isinstance(weight, Nf4Weight) else None
        scale = 1.0
        if norm is not None:
            norm, scale = fused.scaled_norm(norm, dtype)
        self._launch = partial(
            LINEAR.linear_out,
            weight=weight,
            config=self._config,
            scratch=self._scratch,
            bias=parameters.bias,
            swiglu=swiglu,
            norm=norm,
            eps=eps,
            norm_scale=scale,
            table=table,
        )

    def __call__(
        self, x: Tensor, residual: Tensor | None = None, *, out: Tensor, pdl: bool = False
    ) -> None:
        assert not pdl
        self._launch(x, out=out, residual=residual)


@pytest.fixture
def interpreted(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Every kernel of a fused forward runs in the interpreter."""

    def product(*arguments: Any, **options: Any) -> Interpreted:
        return Interpreted(*arguments, **options)

    @cache
    def scratch(shape: torch.Size, kv_heads: int, capacity: int) -> Any:
        return ATTENTION.Scratch.allocate(shape, kv_heads, capacity, "cpu")

    def attention(queries: Tensor, kv: Tensor, *arguments: Any, **options: Any) -> None:
        own = scratch(queries.shape, kv.shape[2] // 2, kv.shape[1])
        ATTENTION.attention_out(queries, kv, *arguments, **{**options, "scratch": own})

    monkeypatch.setattr(weights, "fused_product", product)
    monkeypatch.setattr(fused, "row_operations", lambda device: (ROPE.rope_append_out, attention))
    yield


@pytest.mark.interpreter
@pytest.mark.parametrize(
    ("name", "compression"),
    [
        *((name, "bf16") for name in FAMILY),
        ("llama", "fp16"),
        ("llama", "int8"),
        ("qwen2", "int8"),
        ("qwen2", "nf4"),
        ("qwen3", "nf4"),
    ],
)
def test_the_kernels_give_the_logits_of_their_references(
    name: str, compression: str, tokens: Tensor, request: pytest.FixtureRequest
) -> None:
    dtype = torch.float16 if compression == "fp16" else torch.bfloat16
    expected = logits_of(build(name, compression, dtype), tokens)
    request.getfixturevalue("interpreted")
    actual = logits_of(build(name, compression, dtype), tokens)
    assert distance(actual, expected) <= BOUND[dtype]


@pytest.mark.interpreter
@pytest.mark.parametrize("compression", ["bf16", "int8", "nf4"])
def test_the_bits_of_a_row_do_not_depend_on_the_width(
    compression: str, tokens: Tensor, interpreted: None
) -> None:
    """A block of tokens, whole and token by token, and beside another sequence."""
    model = build("qwen3", compression)
    text = tokens[:12]

    def decode(widths: list[int]) -> Tensor:
        cache, place, found = model.new_cache(1, 32), 0, []
        for width in widths:
            found.append(model.forward(text[None, place : place + width], [place], cache)[0])
            place += width
        return torch.cat(found)

    alone = decode([1] * 12)
    assert torch.equal(decode([7, 1, 4]), alone)
    assert torch.equal(decode([12]), alone)
    cache = model.new_cache(2, 32)
    both = model.forward(torch.stack((tokens[100:112], text)), [0, 0], cache)
    assert torch.equal(both[1], alone)


@pytest.mark.interpreter
def test_nine_sequences_of_sixteen_rows_take_the_kernels(
    tokens: Tensor, interpreted: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    """144 rows are two launches' worth, and have the bits that each sequence has alone."""
    model = build("qwen2", "bf16")
    model = model.first_layers(1)
    blocks = tokens[: 9 * 16].view(9, 16)
    starts = torch.arange(9) % 3
    cache = model.new_cache(9, 32)
    for i, layer in enumerate(cache.kv):
        layer.normal_(generator=torch.Generator().manual_seed(i))
    kept = [layer.clone() for layer in cache.kv]

    def unfused(*_: object) -> Tensor:
        raise AssertionError("operations of PyTorch, whose bits depend on the number of rows")

    monkeypatch.setattr(model._weights, "head", unfused)
    monkeypatch.setattr(model._weights.layers[0], "qkv", unfused)
    together = model.forward(blocks, starts, cache)
    filled = [layer.clone() for layer in cache.kv]
    assert together.shape == (9, 16, VOCAB)
    for layer, before in zip(cache.kv, kept, strict=True):
        layer.copy_(before)
    for row in (0, 7, 8):
        one = [starts[row : row + 1], cache]
        alone = model.forward(blocks[row : row + 1], *one, slots=torch.tensor([row]))
        assert torch.equal(alone[0], together[row])
        for layer, after in zip(cache.kv, filled, strict=True):
            assert torch.equal(layer[row], after[row])


def test_slices_hold_whole_sequences() -> None:
    def sizes(batch: int, width: int) -> list[int]:
        slices = fused.row_slices(batch, width)
        assert [i for part in slices for i in range(batch)[part]] == list(range(batch))
        return [part.stop - part.start for part in slices]

    assert sizes(8, 17) == [8] and sizes(9, 16) == [8, 1] and sizes(9, 17) == [8, 1]
    assert sizes(300, 1) == [136, 136, 28] and sizes(3, 100) == [1, 1, 1]
    assert sizes(2, 136) == [1, 1] and sizes(0, 5) == []


def test_early_launches_need_a_gpu_that_has_them() -> None:
    model = build("llama", "bf16")
    assert model.width_invariant and not model.pdl
    model.pdl = False
    with pytest.raises(ValueError, match="pdl: expected fused layers on a GPU of compute capab"):
        model.pdl = True


def test_early_launches_reach_every_kernel(tokens: Tensor, monkeypatch: pytest.MonkeyPatch) -> None:
    """On a device that has them, of which only the launches are recorded."""
    calls: list[str] = []

    def recorded(name: str) -> Callable[..., None]:
        def call(*_: object, pdl: bool, **__: object) -> None:
            calls.append(f"{name} {pdl}")

        return call

    model, other = build("llama", "bf16"), build("llama", "bf16").first_layers(1)
    monkeypatch.setattr("speckv.models.llama.can_launch_early", lambda device: True)
    operations = recorded("rope"), recorded("attention")
    monkeypatch.setattr(fused, "row_operations", lambda device: operations)
    monkeypatch.setattr(speckv.kernels.Linear, "__call__", recorded("linear"))
    model.pdl = True
    assert model.pdl and not other.pdl
    model.forward(tokens[None, :5], [0], model.new_cache(1, 64))
    layer = ["linear True", "rope True", "attention True", *["linear True"] * 3]
    assert calls == [*layer * 2, "linear True"]


def test_products_of_a_decoder_share_the_largest_scratch() -> None:
    model = build("llama", "bf16")
    layers = [layer.fused for layer in model._weights.layers]
    sizes = (3, 9, 5, 2)
    for layer in layers:
        assert layer is not None
        for product, size in zip(layer.products, sizes, strict=True):
            product.scratch = Scratch(torch.zeros(size), torch.zeros(9 - size, dtype=torch.int32))
    weights._share_scratch(model._weights.layers)
    shared = {id(p.scratch) for layer in layers if layer is not None for p in layer.products}
    assert len(shared) == 1
    scratch = model._weights.layers[0].fused.products[0].scratch  # type: ignore[union-attr]
    assert scratch is not None and (len(scratch.partials), len(scratch.counters)) == (9, 7)


def test_fusing_needs_what_the_constants_say() -> None:
    from speckv.kernels.linear import DTYPES
    from speckv.kernels.linear import ROWS_MAX as MOST

    assert fused._DTYPES == DTYPES and fused._HEAD_DIMS == ATTENTION.HEAD_DIMS
    assert MOST == ROWS_MAX
