"""What runs between the models in a loop without a host: inputs, the close of a step, conditions.

`step_inputs` gathers the tokens of a forward, `close_step` tells the host what a step committed and
makes the rows ready for the next, `publish_conditions` reduces the rows to what the loop goes by.
Each is one launch of a few words; the kernels are in `loop_step_kernel`.
"""

from __future__ import annotations

import triton
from torch import Tensor

from . import layout as at
from . import reference_step as reference
from .checks import check_tensor
from .layout import LoopState, StepState
from .loop_step_kernel import _close_step_kernel, _publish_conditions_kernel, _step_inputs_kernel
from .registry import KernelSpec, Variant


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
        loop.cancel,
        loop.tokens,
        loop.records,
        loop.signals,
        state.sequence.stride(0),
        loop.records.stride(0),
        draft_positions,
        HAS_SIGNALS=loop.signals is not None,
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


def publish_conditions_out(state: StepState, loop: LoopState) -> None:
    """Launch `publish_conditions` on arguments that it would accept; nothing else.

    No allocation, no synchronisation: safe to capture in a CUDA graph. Runs on CPU tensors in
    Triton's interpreter.

    Parameters
    ----------
    state, loop
        As in `publish_conditions`.
    """
    batch = state.rows.shape[0]
    _publish_conditions_kernel[(1,)](
        state.rows,
        loop.control,
        loop.conditions,
        batch,
        BLOCK=max(triton.next_power_of_2(batch), 2),
        num_warps=1,
    )


def publish_conditions(state: StepState, loop: LoopState) -> None:
    """What the loop goes by: whether rows run, draft and lag, and the longest draft.

    On CPU tensors this is `reference_step.publish_conditions`, elsewhere one kernel launch.

    Parameters
    ----------
    state : StepState
        Not mutated.
    loop : LoopState
        For as many rows. TICKET is incremented; ``conditions`` is overwritten.

    Raises
    ------
    TypeError, ValueError
        Naming the argument, what was expected and what came.
    """
    _check_loop(loop, _check_state(state), state)
    on_host = state.rows.device.type == "cpu"
    (reference.publish_conditions if on_host else publish_conditions_out)(state, loop)


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
        },
        divisible=frozenset(pointers),
        num_warps=1,
    )


def _conditions_variant(batch: int) -> Variant:
    pointers = {"rows_ptr": "*i32", "control_ptr": "*i32", "conditions_ptr": "*i64"}
    return Variant(
        name=f"B{batch}",
        signature=pointers | {"batch": "i32"},
        constexprs={"BLOCK": max(batch, 2)},
        divisible=frozenset(pointers),
        num_warps=1,
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
)
