"""Accept draft tokens that are the target's own choice, then commit: one launch, one pass.

The target's token at position j is, over the vocabulary of ``x = logits[b, j]``::

    argmax x                      (greedy rows)
    argmax x / T + gumbel(token)  (sampled rows, over x >= cutoff)

with the noise of the token's absolute position, which the draft used too (Gumbel coupling: Daliri,
Musco and Suresh 2024). Draft token j is accepted while it equals the target's token j; the first
that differs is replaced by it, and after γ matches the target adds its own.

Every (row, position) is split over several programs. Those of positions that the row did not draft
return at once; of the others the last to arrive merges the splits in index order and commits
(`commit._commit`). Returning without arriving is safe: only that last program changes the row's
state, and DRAFTED = 0 or DONE then make a late program return all the same. The semantics are
those of `reference.verify`.

Rules: ties go to the lowest id; ``-inf`` is an impossible token; a position that decides and holds
NaN or ``+inf``, or nothing but ``-inf``, sets ERROR and ends the row, while one behind the first
mismatch is not looked at; rows that are done get COMMITTED = 0 and are otherwise left as they are.
Only a row's last, incomplete block is masked.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial

import triton
import triton.language as tl
from torch import Tensor

from . import layout as at
from . import reference
from .checks import check_tensor
from .commit import STATE_TYPES, _commit, check_step
from .layout import StepState
from .registry import FP_FUSION, KernelSpec, Variant
from .scan import _arrives_last, _best_of_split, _merge_splits
from .split import ChoiceScratch, SplitConfig, split_row


@triton.jit(do_not_specialize=["vocabulary", "stride_eb", "n_eos", "blocks"])
def _verify_kernel(
    # logits [B, W, V]
    logits_ptr,
    stride_lb,
    stride_lw,
    vocabulary,
    # state
    rows_ptr,
    running_ptr,
    sequence_ptr,
    stride_sb,
    policy_ptr,
    eos_ptr,
    stride_eb,
    n_eos,
    # sampling
    inv_ptr,
    seed_ptr,
    cutoff_ptr,
    # scratch
    score_ptr,
    token_ptr,
    counter_ptr,
    # shape
    blocks,
    SAMPLED: tl.constexpr,
    HAS_CUTOFFS: tl.constexpr,
    SPLITS: tl.constexpr,
    BLOCK: tl.constexpr,
):
    i_split, i_position = tl.program_id(0), tl.program_id(1)
    i_row = tl.program_id(2).to(tl.int64)
    splits, width = tl.num_programs(0), tl.num_programs(1)
    rows_ptr += i_row * at.ROW_WORDS
    if tl.load(rows_ptr + at.DONE) != 0:
        if (i_split == 0) & (i_position == 0):
            tl.store(rows_ptr + at.COMMITTED, 0)
        return
    drafted = tl.load(rows_ptr + at.DRAFTED)
    if i_position > drafted:
        return

    length = tl.load(rows_ptr + at.LENGTH)
    inv, low, seed, request = 0.0, float("-inf"), 0, 0
    if SAMPLED:
        inv = tl.load(inv_ptr + i_row)
        seed = tl.load(seed_ptr + i_row)
        request = tl.load(rows_ptr + at.REQUEST)
        if HAS_CUTOFFS:
            low = tl.load(cutoff_ptr + i_row * width + i_position)
    score, token = _best_of_split(
        logits_ptr + i_row * stride_lb + i_position.to(tl.int64) * stride_lw,
        vocabulary,
        i_split,
        blocks,
        inv,
        low,
        seed,
        request,
        length + i_position,
        tl.full((), at.NOISE_COUPLED, tl.int32),
        SAMPLED,
        BLOCK,
    )
    first_slot = i_row * width * splits
    slot = first_slot + i_position * splits + i_split
    tl.store(score_ptr + slot, score)
    tl.store(token_ptr + slot, token)

    if _arrives_last(counter_ptr + i_row, (drafted + 1) * splits):
        o = tl.arange(0, 16)
        _, b_token = _merge_splits(
            score_ptr + first_slot, token_ptr + first_slot, splits, o, o <= drafted, splits, SPLITS
        )
        sequence_ptr += i_row * stride_sb
        b_draft = tl.load(sequence_ptr + length + o, mask=o < drafted, other=-2)
        accepted = tl.min(tl.where(b_token == b_draft, 16, o), 0)
        _commit(
            rows_ptr,
            running_ptr + i_row * at.RUNNING_WORDS,
            sequence_ptr,
            policy_ptr,
            eos_ptr + i_row * stride_eb,
            n_eos,
            length,
            drafted,
            accepted,
            b_token,
        )


def _select_config(vocabulary: int) -> SplitConfig:
    """Programs of one position; they depend on neither the batch nor the width."""
    return split_row(vocabulary, block=2048)


def verify_out(
    logits: Tensor,
    state: StepState,
    policy: Tensor,
    *,
    scratch: ChoiceScratch,
    eos: Tensor,
    inv_temperature: Tensor | None = None,
    seeds: Tensor | None = None,
    cutoffs: Tensor | None = None,
) -> None:
    """Launch `verify` on arguments that `Verify` would accept; nothing else.

    No allocation, no synchronisation: safe to capture in a CUDA graph. Runs on CPU tensors in
    Triton's interpreter.

    Parameters
    ----------
    scratch : ChoiceScratch
        Of this B and W, one channel, and of a config made for this vocabulary.
    logits, state, policy, eos, inv_temperature, seeds, cutoffs
        As in `verify`.
    """
    batch, width, vocabulary = logits.shape
    if batch == 0:
        return
    config = scratch.config
    sampled = inv_temperature is not None
    _verify_kernel[(config.splits, width, batch)](
        logits,
        logits.stride(0),
        logits.stride(1),
        vocabulary,
        state.rows,
        state.running,
        state.sequence,
        state.sequence.stride(0),
        policy,
        eos,
        eos.stride(0),
        eos.shape[1],
        inv_temperature,
        seeds if sampled else None,
        cutoffs if sampled else None,
        scratch.score,
        scratch.token,
        scratch.counter,
        config.blocks,
        SAMPLED=sampled,
        HAS_CUTOFFS=sampled and cutoffs is not None,
        SPLITS=config.padded_splits,
        BLOCK=config.block,
        num_warps=config.num_warps,
        num_stages=1,
        enable_fp_fusion=FP_FUSION,
    )


class Verify:
    """`verify` on one state and policy, validated once: what the loop calls.

    Parameters
    ----------
    logits : Tensor
        An example of what will be passed to the calls.
    state, policy, eos, inv_temperature, seeds, cutoffs
        As in `verify`. The tensors are kept, and read at each call.

    Attributes
    ----------
    config : SplitConfig, optional
        How the launch is cut; None on the CPU.

    Raises
    ------
    TypeError, ValueError
        As `verify`.
    """

    def __init__(
        self,
        logits: Tensor,
        state: StepState,
        policy: Tensor,
        *,
        eos: Tensor,
        inv_temperature: Tensor | None = None,
        seeds: Tensor | None = None,
        cutoffs: Tensor | None = None,
    ) -> None:
        check_step(logits, state, policy, eos)
        (batch, width, vocabulary), device = logits.shape, logits.device
        if inv_temperature is not None:
            check_tensor("inv_temperature", inv_temperature, "float32", (batch,), device)
            check_tensor("seeds", seeds, "int64", (batch,), device)
        if cutoffs is not None:
            check_tensor("cutoffs", cutoffs, "float32", (batch, width), device, dense=True)
        self.config: SplitConfig | None = None
        launch: Callable[..., None] = reference.verify
        if device.type != "cpu":
            self.config = _select_config(vocabulary)
            scratch = ChoiceScratch.allocate(batch, width, self.config, device)
            launch = partial(verify_out, scratch=scratch)
        self._launch = partial(
            launch, eos=eos, inv_temperature=inv_temperature, seeds=seeds, cutoffs=cutoffs
        )
        self._state = state
        self._policy = policy

    def __call__(self, logits: Tensor) -> None:
        """Close the step. Shape, dtype and device of ``logits`` are those of the example."""
        self._launch(logits, self._state, self._policy)


def verify(
    logits: Tensor,
    state: StepState,
    policy: Tensor,
    *,
    eos: Tensor,
    inv_temperature: Tensor | None = None,
    seeds: Tensor | None = None,
    cutoffs: Tensor | None = None,
) -> None:
    """Accept draft tokens while they are the target's own choice, then commit.

    For each row that is not done: the sequence, LENGTH, GAMMA, ACCEPTED, COMMITTED, STEP,
    PLAIN_RUN, DONE and ACCEPTANCE are updated, DRAFTED becomes 0, and STOP becomes the decision "no
    draft at all" for the next step; MATCH and MATCH_LENGTH are those of the text so far, for a
    policy that goes by them. Commitment ends with the first EOS, and at LIMIT; ACCEPTED
    counts committed draft tokens only. Rows that are done get COMMITTED = 0. On CPU tensors this is
    `reference.verify`, elsewhere one kernel launch; `Verify` is its prepared form.

    Parameters
    ----------
    logits : fp32 | fp16 | bf16 [B, W, V]
        Target logits after the last committed token and each draft token; unit stride in V, any
        other strides, W at most 16. Row b uses its first DRAFTED + 1 positions; W must be at least
        that, which is not checked: the counts live on the device. Not mutated. Full speed needs a
        base and strides that are multiples of 16 bytes.
    state : StepState
        Mutated. Its sequence has room up to LIMIT.
    policy : float32 [POLICY_WORDS]
        See `layout`.
    eos : int32 [B, E]
        Ids that end a row; -1 pads.
    inv_temperature : float32 [B], optional
        1 / temperature, 0 for a greedy row. None: all rows greedy.
    seeds : int64 [B], optional
        Needed with ``inv_temperature``.
    cutoffs : float32 [B, W], contiguous, optional
        Keep ``logits >= cutoff`` when sampling (from `cutoff`).

    Raises
    ------
    TypeError, ValueError
        Naming the argument, what was expected and what came.
    """
    Verify(
        logits,
        state,
        policy,
        eos=eos,
        inv_temperature=inv_temperature,
        seeds=seeds,
        cutoffs=cutoffs,
    )(logits)


def _variant(name: str, sampled: bool, cutoffs: bool, aligned: bool = True) -> Variant:
    config = _select_config(128_256)
    signature = {
        "logits_ptr": f"*{name}",
        "stride_lb": "i32",
        "stride_lw": "i32",
        "vocabulary": "i32",
        **STATE_TYPES,
        "score_ptr": "*fp32",
        "token_ptr": "*i32",
        "counter_ptr": "*i32",
        "blocks": "i32",
    }
    if sampled:
        signature |= {"inv_ptr": "*fp32", "seed_ptr": "*i64"}
    if cutoffs:
        signature |= {"cutoff_ptr": "*fp32"}
    pointers = {n for n, t in signature.items() if t.startswith("*")}
    strides = {"stride_lb", "stride_lw"} if aligned else set()
    return Variant(
        name="-".join(
            [name, "sampled" if sampled else "greedy"]
            + ["cutoffs"] * cutoffs
            + ["unaligned"] * (not aligned)
        ),
        signature=signature,
        constexprs={
            "inv_ptr": None,
            "seed_ptr": None,
            "cutoff_ptr": None,
            "SAMPLED": sampled,
            "HAS_CUTOFFS": cutoffs,
            "SPLITS": config.padded_splits,
            "BLOCK": config.block,
        },
        divisible=frozenset(pointers | strides),
        wide_loads=aligned,
        num_warps=config.num_warps,
    )


SPECS = (
    KernelSpec(
        name="verify",
        kernel=_verify_kernel,
        variants=(
            *(
                _variant(name, sampled, cutoffs)
                for name in ("fp32", "fp16", "bf16")
                for sampled, cutoffs in ((False, False), (True, False), (True, True))
            ),
            _variant("bf16", True, True, aligned=False),
        ),
        max_registers=128,
        max_shared_bytes=16_384,
    ),
)
