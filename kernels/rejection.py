"""Rejection sampling with residual resampling, then commit: one launch after the `cutoff` passes.

With ``p = exp(x / T - lse)`` over the target's kept tokens and ``q`` likewise the draft's, token
x_j is accepted if ``u_j q_j(x_j) < p_j(x_j)``; the first rejected one is replaced by a draw from
``norm(max(p_j - q_j, 0))``; after γ acceptances a draw from p_γ follows (Leviathan et al. 2023,
Chen et al. 2023). A draw is ``argmax log weight + gumbel``, keyed by (step, draft index, purpose).

Which position closes the step follows from γ probabilities, so every program of a row works it out
first, and a sampled row reads no more than that one position's logits: the target's, and the
draft's for a residual. Greedy rows (``inv_temperature`` 0) scan all positions, as `verify` does.
All programs of the positions that a row drafted arrive, whether they read anything or not, because
the last of them changes what the others decide by. The semantics are those of
`reference.verify_rejection`.

Rules: ties go to the lowest id; ``-inf`` is an impossible token; where no residual is left to
rounding, p itself is drawn from; a position without a token is known by an ``lse`` that is not
finite (`cutoff` sets it so), or found by the scan of a greedy row: if it decides, ERROR is set and
the row ends; rows that are done get COMMITTED = 0 and are otherwise left as they are.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial

from torch import Tensor

from . import layout as at
from . import reference
from .checks import check_tensor
from .commit import STATE_TYPES, check_step
from .layout import StepState
from .registry import FP_FUSION, KernelSpec, Variant
from .rejection_kernel import _verify_rejection_kernel
from .split import ChoiceScratch, SplitConfig, split_row


def _select_config(vocabulary: int) -> SplitConfig:
    """Programs of one position; they depend on neither the batch nor the width.

    Blocks are half those of `verify`, because a residual keeps two running choices a token.
    """
    return split_row(vocabulary, block=1024)


def verify_rejection_out(
    logits: Tensor,
    state: StepState,
    policy: Tensor,
    *,
    scratch: ChoiceScratch,
    eos: Tensor,
    inv_temperature: Tensor,
    seeds: Tensor,
    cutoffs: Tensor,
    lse: Tensor,
    draft_logits: Tensor,
    draft_cutoffs: Tensor,
    draft_lse: Tensor,
    draft_ids: Tensor | None = None,
) -> None:
    """Launch `verify_rejection` on arguments that `VerifyRejection` would accept; nothing else.

    No allocation, no synchronisation: safe to capture in a CUDA graph. Runs on CPU tensors in
    Triton's interpreter.

    Parameters
    ----------
    scratch : ChoiceScratch
        Of this B and W, two channels, and of a config made for this vocabulary.
    logits, state, policy, eos, inv_temperature, seeds, cutoffs, lse, draft_logits, draft_cutoffs,
    draft_lse, draft_ids
        As in `verify_rejection`.
    """
    batch, width, vocabulary = logits.shape
    if batch == 0:
        return
    config = scratch.config
    _verify_rejection_kernel[(config.splits, width, batch)](
        logits,
        logits.stride(0),
        logits.stride(1),
        vocabulary,
        draft_logits,
        draft_logits.stride(0),
        draft_logits.stride(1),
        draft_ids,
        state.rows,
        state.running,
        state.sequence,
        state.sequence.stride(0),
        policy,
        eos,
        eos.stride(0),
        eos.shape[1],
        inv_temperature,
        seeds,
        cutoffs,
        lse,
        draft_cutoffs,
        draft_lse,
        scratch.score,
        scratch.token,
        scratch.counter,
        config.blocks,
        HAS_IDS=draft_ids is not None,
        SPLITS=config.padded_splits,
        BLOCK=config.block,
        num_warps=config.num_warps,
        num_stages=1,
        enable_fp_fusion=FP_FUSION,
    )


class VerifyRejection:
    """`verify_rejection` on one state and policy, validated once: what the loop calls.

    Parameters
    ----------
    logits : Tensor
        An example of what will be passed to the calls.
    state, policy, eos, inv_temperature, seeds, cutoffs, lse, draft_logits, draft_cutoffs,
    draft_lse, draft_ids
        As in `verify_rejection`. The tensors are kept, and read at each call.

    Attributes
    ----------
    config : SplitConfig, optional
        How the launch is cut; None on the CPU.

    Raises
    ------
    TypeError, ValueError
        As `verify_rejection`.
    """

    def __init__(
        self,
        logits: Tensor,
        state: StepState,
        policy: Tensor,
        *,
        eos: Tensor,
        inv_temperature: Tensor,
        seeds: Tensor,
        cutoffs: Tensor,
        lse: Tensor,
        draft_logits: Tensor,
        draft_cutoffs: Tensor,
        draft_lse: Tensor,
        draft_ids: Tensor | None = None,
    ) -> None:
        check_step(logits, state, policy, eos)
        (batch, width, vocabulary), device = logits.shape, logits.device
        check_tensor("inv_temperature", inv_temperature, "float32", (batch,), device)
        check_tensor("seeds", seeds, "int64", (batch,), device)
        check_tensor("cutoffs", cutoffs, "float32", (batch, width), device, dense=True)
        check_tensor("lse", lse, "float32", (batch, width), device, dense=True)
        drafts = (batch, at.GAMMA_MAX)
        size = vocabulary if draft_ids is None else None
        check_tensor("draft_logits", draft_logits, "floating", (*drafts, size), device)
        check_tensor("draft_cutoffs", draft_cutoffs, "float32", drafts, device, dense=True)
        check_tensor("draft_lse", draft_lse, "float32", drafts, device, dense=True)
        if draft_ids is not None:
            check_tensor("draft_ids", draft_ids, "int32", (vocabulary,), device)
        self.config: SplitConfig | None = None
        launch: Callable[..., None] = reference.verify_rejection
        if device.type != "cpu":
            self.config = _select_config(vocabulary)
            scratch = ChoiceScratch.allocate(batch, width, self.config, device, channels=2)
            launch = partial(verify_rejection_out, scratch=scratch)
        self._launch = partial(
            launch,
            eos=eos,
            inv_temperature=inv_temperature,
            seeds=seeds,
            cutoffs=cutoffs,
            lse=lse,
            draft_logits=draft_logits,
            draft_cutoffs=draft_cutoffs,
            draft_lse=draft_lse,
            draft_ids=draft_ids,
        )
        self._state = state
        self._policy = policy

    def __call__(self, logits: Tensor) -> None:
        """Close the step. Shape, dtype and device of ``logits`` are those of the example."""
        self._launch(logits, self._state, self._policy)


def verify_rejection(
    logits: Tensor,
    state: StepState,
    policy: Tensor,
    *,
    eos: Tensor,
    inv_temperature: Tensor,
    seeds: Tensor,
    cutoffs: Tensor,
    lse: Tensor,
    draft_logits: Tensor,
    draft_cutoffs: Tensor,
    draft_lse: Tensor,
    draft_ids: Tensor | None = None,
) -> None:
    """Accept draft tokens by rejection sampling, then commit; state updates are those of `verify`.

    On CPU tensors this is `reference.verify_rejection`, elsewhere one kernel launch;
    `VerifyRejection` is its prepared form.

    Parameters
    ----------
    logits, state, policy, eos
        As in `verify`.
    inv_temperature : float32 [B]
        1 / temperature; a row with 0 accepts what equals the argmax.
    seeds : int64 [B]
    cutoffs, lse : float32 [B, W], contiguous
        Of the target's rows, from `cutoff`.
    draft_logits : fp32 | fp16 | bf16 [B, GAMMA_MAX, V_draft]
        The rows that the draft tokens were drawn from; unit stride in V_draft.
    draft_cutoffs, draft_lse : float32 [B, GAMMA_MAX], contiguous
        Of the draft's rows, from `cutoff`.
    draft_ids : int32 [V], optional
        Draft id of each target id, -1 where the draft has none. None: the same ids, V_draft = V.

    Raises
    ------
    TypeError, ValueError
        Naming the argument, what was expected and what came.
    """
    VerifyRejection(
        logits,
        state,
        policy,
        eos=eos,
        inv_temperature=inv_temperature,
        seeds=seeds,
        cutoffs=cutoffs,
        lse=lse,
        draft_logits=draft_logits,
        draft_cutoffs=draft_cutoffs,
        draft_lse=draft_lse,
        draft_ids=draft_ids,
    )(logits)


def _variant(name: str, has_ids: bool) -> Variant:
    config = _select_config(128_256)
    signature = {
        "logits_ptr": f"*{name}",
        "stride_lb": "i32",
        "stride_lw": "i32",
        "vocabulary": "i32",
        "draft_ptr": f"*{name}",
        "stride_db": "i32",
        "stride_dj": "i32",
        **STATE_TYPES,
        "inv_ptr": "*fp32",
        "seed_ptr": "*i64",
        "cutoff_ptr": "*fp32",
        "lse_ptr": "*fp32",
        "draft_cutoff_ptr": "*fp32",
        "draft_lse_ptr": "*fp32",
        "score_ptr": "*fp32",
        "token_ptr": "*i32",
        "counter_ptr": "*i32",
        "blocks": "i32",
    }
    if has_ids:
        signature["ids_ptr"] = "*i32"
    pointers = {n for n, t in signature.items() if t.startswith("*")}
    return Variant(
        name=f"{name}-ids" if has_ids else name,
        signature=signature,
        constexprs={
            "ids_ptr": None,
            "HAS_IDS": has_ids,
            "SPLITS": config.padded_splits,
            "BLOCK": config.block,
        },
        divisible=frozenset(pointers | {"stride_lb", "stride_lw", "stride_db", "stride_dj"}),
        wide_loads=True,
        num_warps=config.num_warps,
    )


SPECS = (
    KernelSpec(
        name="verify_rejection",
        kernel=_verify_rejection_kernel,
        variants=tuple(
            _variant(name, has_ids)
            for name in ("fp32", "fp16", "bf16")
            for has_ids in (False, True)
        ),
        max_registers=128,
        max_shared_bytes=16_384,
    ),
)
