"""What runs between the models in a loop without a host: inputs, the close of a step, conditions.

`step_inputs` gathers the tokens of a forward, `close_step` tells the host what a step committed and
makes the rows ready for the next, `publish_conditions` reduces the rows to what the loop goes by;
`keep_draft` copies a row of logits for rejection sampling. Each is one launch, and but for the last
one of a few words; the kernels are in `loop_step_kernel`.
"""

from __future__ import annotations

from collections.abc import Sequence

import triton
from torch import Tensor

from . import layout as at
from . import reference_step as reference
from .checks import check_tensor
from .device import EMULATED
from .layout import LoopState, StepState
from .loop_step_kernel import (
    _close_step_kernel,
    _keep_draft_kernel,
    _publish_conditions_kernel,
    _step_inputs_kernel,
)
from .registry import KernelSpec, Variant

_KEPT_BLOCK = 4096


def step_inputs_out(
    state: StepState,
    purpose: int,
    *,
    tokens: Tensor,
    positions: Tensor,
    input_ids: Tensor | None = None,
) -> None:
    """Launch `step_inputs` on arguments that it would accept; nothing else.

    No allocation, no synchronisation: safe to capture in a CUDA graph. Runs on CPU tensors in
    Triton's interpreter.

    Parameters
    ----------
    state, purpose, tokens, positions, input_ids
        As in `step_inputs`.
    """
    batch, width = tokens.shape
    if batch == 0:
        return
    _step_inputs_kernel[(batch,)](
        state.rows,
        state.sequence,
        input_ids,
        tokens,
        positions,
        state.sequence.stride(0),
        PURPOSE=purpose,
        HAS_IDS=input_ids is not None,
        WIDTH=width,
        num_warps=1,
    )


def step_inputs(
    state: StepState,
    purpose: int,
    *,
    tokens: Tensor,
    positions: Tensor,
    input_ids: Tensor | None = None,
) -> None:
    """The tokens of a forward and where they stand.

    On CPU tensors this is `reference_step.step_inputs`, whose description it shares; elsewhere one
    kernel launch.

    Parameters
    ----------
    state : StepState
        LENGTH of every row is at least 1, and at least 2 where the draft is fed; every row has room
        in ``sequence`` for 16 tokens from there. Mutated by INPUTS_CATCH_UP only.
    purpose : int
        ``INPUTS_CATCH_UP``, ``INPUTS_FIRST``, ``INPUTS_NEXT`` or ``INPUTS_VERIFY``.
    tokens : int32 [B, W], contiguous
        Overwritten. W is 16, 2, 1, or for a verification 1 to 16.
    positions : int64 [B, W], contiguous
        Overwritten.
    input_ids : int32 [V], optional
        What the model is fed for each target id. None: the same.

    Raises
    ------
    TypeError, ValueError
        Naming the argument, what was expected and what came.
    """
    batch, device = _check_state(state), state.rows.device
    if purpose not in range(at.INPUTS_VERIFY + 1):
        raise ValueError(f"purpose: expected 0 to {at.INPUTS_VERIFY}, got {purpose!r}")
    check_tensor("tokens", tokens, "int32", (batch, None), device, dense=True)
    width = tokens.shape[1]
    drafts = purpose != at.INPUTS_VERIFY
    if width != at.INPUT_WIDTHS[purpose] if drafts else not 1 <= width <= at.WIDTH_MAX:
        expected = at.INPUT_WIDTHS[purpose] if drafts else f"1 to {at.WIDTH_MAX}"
        raise ValueError(f"tokens: expected {expected} a row for this purpose, got {width}")
    check_tensor("positions", positions, "int64", (batch, width), device, dense=True)
    if input_ids is not None:
        check_tensor("input_ids", input_ids, "int32", (None,), device, dense=True)
    launch = reference.step_inputs if device.type == "cpu" else step_inputs_out
    launch(state, purpose, tokens=tokens, positions=positions, input_ids=input_ids)


def close_step_out(state: StepState, loop: LoopState, *, draft_positions: int = 0) -> None:
    """Launch `close_step` on arguments that it would accept; nothing else.

    No allocation, no synchronisation: safe to capture in a CUDA graph. Runs on CPU tensors in
    Triton's interpreter.

    Parameters
    ----------
    state, loop, draft_positions
        As in `close_step`.
    """
    batch = state.rows.shape[0]
    if batch == 0:
        return
    _close_step_kernel[(batch,)](
        state.rows,
        state.sequence,
        state.signals,
        loop.control,
        loop.passes,
        loop.cancel,
        loop.tokens,
        loop.records,
        loop.signals,
        state.sequence.stride(0),
        loop.records.stride(0),
        draft_positions,
        HAS_SIGNALS=loop.signals is not None,
        EMULATED=EMULATED,
        num_warps=1,
    )


def close_step(state: StepState, loop: LoopState, *, draft_positions: int = 0) -> None:
    """Tell the host what each row committed, and make the rows ready for the next step.

    On CPU tensors this is `reference_step.close_step`, whose description it shares; elsewhere one
    kernel launch.

    Parameters
    ----------
    state : StepState
        As `verify` leaves it. Mutated.
    loop : LoopState
        For as many rows, and room for every position of theirs. Mutated.
    draft_positions : int
        Longest sequence of the draft; 0 without one.

    Raises
    ------
    TypeError, ValueError
        Naming the argument, what was expected and what came.
    """
    batch = _check_state(state)
    _check_loop(loop, batch, state)
    launch = reference.close_step if state.rows.device.type == "cpu" else close_step_out
    launch(state, loop, draft_positions=draft_positions)


def publish_conditions_out(
    state: StepState, loop: LoopState, *, gamma_cap: int = at.GAMMA_MAX
) -> None:
    """Launch `publish_conditions` on arguments that it would accept; nothing else.

    No allocation, no synchronisation: safe to capture in a CUDA graph. Runs on CPU tensors in
    Triton's interpreter.

    Parameters
    ----------
    state, loop, gamma_cap
        As in `publish_conditions`.
    """
    batch = state.rows.shape[0]
    _publish_conditions_kernel[(1,)](
        state.rows,
        loop.control,
        loop.passes,
        loop.conditions,
        loop.ended,
        batch,
        gamma_cap,
        BLOCK=max(triton.next_power_of_2(batch), 2),
        num_warps=1,
    )


def publish_conditions(state: StepState, loop: LoopState, *, gamma_cap: int = at.GAMMA_MAX) -> None:
    """What the loop goes by: whether rows run, draft and lag, and the longest draft.

    On CPU tensors this is `reference_step.publish_conditions`, whose description it shares;
    elsewhere one kernel launch.

    Parameters
    ----------
    state : StepState
        Not mutated.
    loop : LoopState
        For as many rows. TICKET and PASSES are incremented; ``conditions`` is overwritten, and
        ``ended`` if no row runs.
    gamma_cap : int
        Most draft tokens of a step, for FIXED_GAMMA.

    Raises
    ------
    TypeError, ValueError
        Naming the argument, what was expected and what came.
    """
    _check_loop(loop, _check_state(state), state)
    on_host = state.rows.device.type == "cpu"
    launch = reference.publish_conditions if on_host else publish_conditions_out
    launch(state, loop, gamma_cap=gamma_cap)


def keep_draft_out(
    state: StepState, logits: Tensor, cutoffs: Tensor, lse: Tensor, *, kept: Sequence[Tensor]
) -> None:
    """Launch `keep_draft` on arguments that it would accept; nothing else.

    No allocation, no synchronisation: safe to capture in a CUDA graph. Runs on CPU tensors in
    Triton's interpreter.

    Parameters
    ----------
    state, logits, cutoffs, lse, kept
        As in `keep_draft`.
    """
    batch, vocabulary = logits.shape
    if batch == 0:
        return
    _keep_draft_kernel[(triton.cdiv(vocabulary, _KEPT_BLOCK), batch)](
        state.rows,
        logits,
        cutoffs,
        lse,
        *kept,
        logits.stride(0),
        kept[0].stride(0),
        kept[0].stride(1),
        vocabulary,
        BLOCK=_KEPT_BLOCK,
        num_warps=4,
    )


def keep_draft(
    state: StepState, logits: Tensor, cutoffs: Tensor, lse: Tensor, *, kept: Sequence[Tensor]
) -> None:
    """Keep what a draft token is about to be drawn from, for rejection sampling.

    On CPU tensors this is `reference_step.keep_draft`, whose description it shares; elsewhere one
    kernel launch.

    Parameters
    ----------
    state : StepState
        Not mutated.
    logits : fp32 | fp16 | bf16 [B, V]
        Unit stride in V.
    cutoffs, lse : float32 [B], contiguous
    kept : (as logits [B, GAMMA_MAX, V], float32 [B, GAMMA_MAX], float32 [B, GAMMA_MAX])
        Unit stride in V, the others contiguous. Mutated.

    Raises
    ------
    TypeError, ValueError
        Naming the argument, what was expected and what came.
    """
    batch, device = _check_state(state), state.rows.device
    check_tensor("logits", logits, "floating", (batch, None), device)
    check_tensor("cutoffs", cutoffs, "float32", (batch,), device, dense=True)
    check_tensor("lse", lse, "float32", (batch,), device, dense=True)
    if len(kept) != 3:
        raise ValueError(f"kept: expected logits, cutoffs and lse, got {len(kept)} tensors")
    shape = (batch, at.GAMMA_MAX)
    check_tensor("kept[0]", kept[0], "floating", (*shape, logits.shape[1]), device)
    for i in (1, 2):
        check_tensor(f"kept[{i}]", kept[i], "float32", shape, device, dense=True)
    launch = reference.keep_draft if device.type == "cpu" else keep_draft_out
    launch(state, logits, cutoffs, lse, kept=kept)


def _check_state(state: StepState) -> int:
    """Refuse a state that is none; its batch."""
    check_tensor("state.rows", state.rows, "int32", (None, at.ROW_WORDS), dense=True)
    batch, device = state.rows.shape[0], state.rows.device
    check_tensor("state.sequence", state.sequence, "int32", (batch, None), device)
    signals = (batch, at.GAMMA_MAX, at.SIGNALS)
    check_tensor("state.signals", state.signals, "float32", signals, device, dense=True)
    return batch


def _check_loop(loop: LoopState, batch: int, state: StepState) -> None:
    device = state.rows.device
    check_tensor("loop.control", loop.control, "int32", (at.CONTROL_WORDS,), device, dense=True)
    check_tensor("loop.passes", loop.passes, "int32", (at.PASS_WORDS,), device, dense=True)
    check_tensor("loop.ended", loop.ended, "int64", (1,), dense=True)
    check_tensor("loop.conditions", loop.conditions, "int64", (at.CONDITIONS,), dense=True)
    check_tensor("loop.cancel", loop.cancel, "int32", (batch,), dense=True)
    check_tensor("loop.tokens", loop.tokens, "int64", (batch, None), dense=True)
    check_tensor("loop.records", loop.records, "int64", tuple(loop.tokens.shape), dense=True)
    if loop.signals is not None:
        shape = (*loop.tokens.shape, at.GAMMA_MAX, at.SIGNALS)
        check_tensor("loop.signals", loop.signals, "float32", shape, device, dense=True)


def _inputs_variant(purpose: int, width: int, ids: bool) -> Variant:
    signature = {
        "rows_ptr": "*i32",
        "sequence_ptr": "*i32",
        **({"input_ids_ptr": "*i32"} if ids else {}),
        "tokens_ptr": "*i32",
        "positions_ptr": "*i64",
        "stride_sequence_b": "i32",
    }
    name = ("catch-up", "first", "next", "verify")[purpose]
    return Variant(
        name=f"{name}-W{width}{'-ids' if ids else ''}",
        signature=signature,
        constexprs={
            **({} if ids else {"input_ids_ptr": None}),
            "PURPOSE": purpose,
            "HAS_IDS": ids,
            "WIDTH": width,
        },
        divisible=frozenset(signature) - {"stride_sequence_b"},
        num_warps=1,
    )


def _close_variant(signals: bool) -> Variant:
    pointers = {
        "rows_ptr": "*i32",
        "sequence_ptr": "*i32",
        "signals_ptr": "*fp32",
        "control_ptr": "*i32",
        "passes_ptr": "*i32",
        "cancel_ptr": "*i32",
        "tokens_ptr": "*i64",
        "records_ptr": "*i64",
        **({"kept_signals_ptr": "*fp32"} if signals else {}),
    }
    sizes = ("stride_sequence_b", "stride_loop_b", "draft_positions")
    return Variant(
        name="signals" if signals else "plain",
        signature=pointers | {n: "i32" for n in sizes},
        constexprs={
            **({} if signals else {"kept_signals_ptr": None}),
            "HAS_SIGNALS": signals,
            "EMULATED": False,
        },
        divisible=frozenset(pointers),
        num_warps=1,
    )


def _conditions_variant(batch: int) -> Variant:
    pointers = {
        "rows_ptr": "*i32",
        "control_ptr": "*i32",
        "passes_ptr": "*i32",
        "conditions_ptr": "*i64",
        "ended_ptr": "*i64",
    }
    return Variant(
        name=f"B{batch}",
        signature=pointers | {"batch": "i32", "gamma_cap": "i32"},
        constexprs={"BLOCK": max(batch, 2)},
        divisible=frozenset(pointers),
        num_warps=1,
    )


def _keep_variant(dtype: str) -> Variant:
    pointers = {
        "rows_ptr": "*i32",
        "logits_ptr": f"*{dtype}",
        "cutoffs_ptr": "*fp32",
        "lse_ptr": "*fp32",
        "kept_ptr": f"*{dtype}",
        "kept_cutoffs_ptr": "*fp32",
        "kept_lse_ptr": "*fp32",
    }
    strides = ("stride_logits_b", "stride_kept_b", "stride_kept_j")
    return Variant(
        name=dtype,
        signature=pointers | {n: "i32" for n in (*strides, "vocabulary")},
        constexprs={"BLOCK": _KEPT_BLOCK},
        divisible=frozenset({*pointers, *strides}),
        num_warps=4,
    )


SPECS = (
    KernelSpec(
        name="step_inputs",
        kernel=_step_inputs_kernel,
        variants=(
            _inputs_variant(at.INPUTS_CATCH_UP, 16, ids=True),
            _inputs_variant(at.INPUTS_FIRST, 2, ids=False),
            _inputs_variant(at.INPUTS_NEXT, 1, ids=True),
            _inputs_variant(at.INPUTS_VERIFY, 5, ids=False),
        ),
        max_registers=64,
        max_shared_bytes=1024,
    ),
    KernelSpec(
        name="close_step",
        kernel=_close_step_kernel,
        variants=(_close_variant(signals=False), _close_variant(signals=True)),
        max_registers=64,
        max_shared_bytes=1024,
    ),
    KernelSpec(
        name="publish_conditions",
        kernel=_publish_conditions_kernel,
        variants=(_conditions_variant(1), _conditions_variant(8)),
        max_registers=64,
        max_shared_bytes=1024,
    ),
    KernelSpec(
        name="keep_draft",
        kernel=_keep_draft_kernel,
        variants=tuple(_keep_variant(dtype) for dtype in ("fp32", "fp16", "bf16")),
        max_registers=128,
        max_shared_bytes=1024,
    ),
)
