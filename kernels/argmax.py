"""A bare argmax of rows of logits: what `draft_step` is when it chooses a token and nothing else.

It is cut like `draft_step`, and is what the cost of a decision is measured above. Ties go to the
lowest id; rows hold no NaN.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from .checks import check_tensor
from .draft_step import Scratch, _select_config, _sm_count
from .registry import KernelSpec, Variant
from .scan import _arrives_last, _best_of_lanes


@triton.jit
def _argmax_kernel(
    logits_ptr,  # [B, V]
    tokens_ptr,  # [B]
    partials_ptr,  # [B, PARTIAL_WORDS, SPLITS]
    counters_ptr,  # [B], zero between launches
    stride_logits_b,
    stride_partials_b,
    vocabulary,
    SPLITS: tl.constexpr,
    SPLITS_PADDED: tl.constexpr,
    BLOCK: tl.constexpr,
):
    i_split = tl.program_id(0)
    i_row = tl.program_id(1).to(tl.int64)
    logits_ptr += i_row * stride_logits_b
    o = tl.arange(0, BLOCK)
    top = tl.full([BLOCK], float("-inf"), tl.float32)
    token = i_split * BLOCK + o
    full_blocks = vocabulary // BLOCK
    for i_block in range(i_split, tl.cdiv(vocabulary, BLOCK), SPLITS):
        o_token = i_block * BLOCK + o
        if i_block < full_blocks:
            x = tl.load(logits_ptr + o_token, eviction_policy="evict_first").to(tl.float32)
        else:
            x = tl.load(logits_ptr + o_token, o_token < vocabulary, float("-inf")).to(tl.float32)
        token = tl.where(x > top, o_token, token)
        top = tl.maximum(top, x)
    best, first = _best_of_lanes(top, token)
    if SPLITS > 1:
        partial_ptr = partials_ptr + i_row * stride_partials_b
        tl.store(partial_ptr + i_split, best)
        tl.store(partial_ptr + SPLITS + i_split, first.to(tl.float32))
        if not _arrives_last(counters_ptr + i_row, SPLITS):
            return
        o_split = tl.arange(0, SPLITS_PADDED)
        mask = o_split < SPLITS
        b_top = tl.load(partial_ptr + o_split, mask, float("-inf"), cache_modifier=".cg")
        b_token = tl.load(partial_ptr + SPLITS + o_split, mask, 0.0, cache_modifier=".cg")
        best, first = _best_of_lanes(b_top, b_token.to(tl.int32))
    tl.store(tokens_ptr + i_row, first)


def argmax_out(logits: Tensor, *, tokens: Tensor, scratch: Scratch) -> None:
    """Launch `argmax` on arguments that it would accept; nothing else.

    No allocation, no synchronisation: safe to capture in a CUDA graph. Runs on CPU tensors in
    Triton's interpreter.

    Parameters
    ----------
    logits, tokens
        As in `argmax`.
    scratch : Scratch
        Of this batch, and of a config made for this vocabulary; `draft_step`'s.
    """
    batch, vocabulary = logits.shape
    if batch == 0:
        return
    config = scratch.config
    _argmax_kernel[(config.splits, batch)](
        logits,
        tokens,
        scratch.partials,
        scratch.counters,
        logits.stride(0),
        scratch.partials.stride(0),
        vocabulary,
        SPLITS=config.splits,
        SPLITS_PADDED=triton.next_power_of_2(config.splits),
        BLOCK=config.block,
        num_warps=config.num_warps,
        num_stages=1,
    )


def argmax(
    logits: Tensor, *, tokens: Tensor | None = None, scratch: Scratch | None = None
) -> Tensor:
    """The id of the highest logit of each row, the lowest among equals.

    On CPU tensors this is `torch.argmax`, elsewhere one kernel launch.

    Parameters
    ----------
    logits : fp32 | fp16 | bf16 [B, V]
        Unit stride in V, any row stride; V at least 1 and at most 262,144. Not mutated.
    tokens : int32 [B], optional
        Overwritten.
    scratch : Scratch, optional
        To be kept between calls. Not needed on the CPU.

    Returns
    -------
    int32 [B]
        ``tokens``, or a new tensor.

    Raises
    ------
    TypeError, ValueError
        Naming the argument, what was expected and what came.
    """
    check_tensor("logits", logits, "floating", (None, None))
    batch, vocabulary = logits.shape
    if vocabulary < 1:
        raise ValueError("logits: expected a vocabulary of at least 1, got 0")
    if tokens is None:
        tokens = torch.empty(batch, dtype=torch.int32, device=logits.device)
    check_tensor("tokens", tokens, "int32", (batch,), logits.device, dense=True)
    if logits.device.type == "cpu":
        return tokens.copy_(logits.argmax(-1))
    if scratch is None:
        config = _select_config(vocabulary, _sm_count(logits.device))
        scratch = Scratch.allocate(batch, config, logits.device)
    argmax_out(logits, tokens=tokens, scratch=scratch)
    return tokens


def _variant(dtype: str) -> Variant:
    """What `argmax_out` would launch for a vocabulary of 128,256 on 132 multiprocessors."""
    config = _select_config(128_256, 132)
    pointers = {
        "logits_ptr": f"*{dtype}",
        "tokens_ptr": "*i32",
        "partials_ptr": "*fp32",
        "counters_ptr": "*i32",
    }
    sizes = ("stride_logits_b", "stride_partials_b", "vocabulary")
    return Variant(
        name=dtype,
        signature=pointers | {n: "i32" for n in sizes},
        constexprs={
            "SPLITS": config.splits,
            "SPLITS_PADDED": triton.next_power_of_2(config.splits),
            "BLOCK": config.block,
        },
        divisible=frozenset({*pointers, "stride_logits_b"}),
        wide_loads=True,
        num_warps=config.num_warps,
    )


SPECS = (
    KernelSpec(
        name="argmax",
        kernel=_argmax_kernel,
        variants=tuple(_variant(dtype) for dtype in ("fp32", "fp16", "bf16")),
        max_registers=64,
        max_shared_bytes=4096,
    ),
)
