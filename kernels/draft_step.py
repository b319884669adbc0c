"""Token, signals and γ decision of one draft step; the formulas stand with the kernel.

`draft_step` is the public function, `DraftStep` its prepared form for the loop, `draft_step_out`
the bare launch. The kernel, with its formulas and its rules for ties, NaN and -inf, is in
`draft_step_kernel`.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import cache, partial

import torch
import triton
from torch import Tensor

from . import reference
from .checks import check_sampling, check_state, check_tensor
from .draft_step_kernel import PARTIAL_TOKENS, PARTIAL_VALUES, _draft_step_kernel
from .layout import StepState
from .registry import FP_FUSION, KernelSpec, Variant
from .split import SplitConfig, SplitScratch, split_row

VOCABULARY_MAX = 262_144
COUPLINGS = ("gumbel", "rejection")


def _select_config(vocabulary: int, sm_count: int) -> SplitConfig:
    """One block per program, and one program per multiprocessor, as far as that goes.

    A thread holds 8 logits: one 16-byte load of 2-byte logits, two of fp32. Vocabularies of more
    blocks than there are multiprocessors get blocks, and programs, of twice the size before any
    program gets a second block. The batch has no say: a row's result must not depend on it.
    """
    warps = 4 if triton.cdiv(vocabulary, 1024) <= sm_count else 8
    return split_row(vocabulary, 256 * warps, max_splits=sm_count, num_warps=warps)


def _allocate_scratch(batch: int, config: SplitConfig, device: torch.device | str) -> SplitScratch:
    return SplitScratch.allocate(batch, config, device, PARTIAL_VALUES, PARTIAL_TOKENS)


def draft_step_out(
    logits: Tensor,
    state: StepState,
    policy: Tensor,
    *,
    scratch: SplitScratch,
    inv_temperature: Tensor | None = None,
    seeds: Tensor | None = None,
    id_map: Tensor | None = None,
    cutoffs: Tensor | None = None,
    coupling: str = "gumbel",
) -> None:
    """Launch `draft_step` on arguments that `DraftStep` would accept; nothing else.

    No allocation, no synchronisation: safe to capture in a CUDA graph. Runs on CPU tensors in
    Triton's interpreter.

    Parameters
    ----------
    scratch : SplitScratch
        Of this batch, with PARTIAL_VALUES and PARTIAL_TOKENS, and of a config made for this
        vocabulary.
    logits, state, policy, inv_temperature, seeds, id_map, cutoffs, coupling
        As in `draft_step`.
    """
    batch, vocabulary = logits.shape
    if batch == 0:
        return
    config = scratch.config
    sampled = inv_temperature is not None
    _draft_step_kernel[(config.splits, batch)](
        logits,
        id_map,
        inv_temperature,
        seeds if sampled else None,
        cutoffs if sampled else None,
        policy,
        state.rows,
        state.running,
        state.sequence,
        state.signals,
        scratch.values,
        scratch.tokens,
        scratch.counter,
        logits.stride(0),
        state.sequence.stride(0),
        vocabulary,
        SAMPLED=sampled,
        HAS_ID_MAP=id_map is not None,
        HAS_CUTOFFS=sampled and cutoffs is not None,
        REJECTION=coupling == "rejection",
        SPLITS=config.splits,
        SPLITS_PADDED=config.padded_splits,
        BLOCK=config.block,
        num_warps=config.num_warps,
        num_stages=1,
        enable_fp_fusion=FP_FUSION,
    )


class DraftStep:
    """`draft_step` on one state and policy, validated once: what the loop calls.

    Parameters
    ----------
    logits : Tensor
        An example of what will be passed to the calls.
    state, policy, inv_temperature, seeds, id_map, cutoffs, coupling
        As in `draft_step`. The tensors are kept, and read at each call.

    Raises
    ------
    TypeError, ValueError
        As `draft_step`.
    """

    def __init__(
        self,
        logits: Tensor,
        state: StepState,
        policy: Tensor,
        *,
        inv_temperature: Tensor | None = None,
        seeds: Tensor | None = None,
        id_map: Tensor | None = None,
        cutoffs: Tensor | None = None,
        coupling: str = "gumbel",
    ) -> None:
        check_tensor("logits", logits, "floating", (None, None))
        (batch, vocabulary), device = logits.shape, logits.device
        if not 1 <= vocabulary <= VOCABULARY_MAX:
            raise ValueError(
                f"logits: expected a vocabulary of 1 to {VOCABULARY_MAX}, got {vocabulary}"
            )
        check_state(state, policy, batch, device)
        if inv_temperature is not None:
            check_sampling(inv_temperature, seeds, batch, device)
        if id_map is not None:
            check_tensor("id_map", id_map, "int32", (vocabulary,), device, dense=True)
        if cutoffs is not None:
            check_tensor("cutoffs", cutoffs, "float32", (batch,), device, dense=True)
        if coupling not in COUPLINGS:
            raise ValueError(f"coupling: expected one of {COUPLINGS}, got {coupling!r}")
        launch: Callable[..., None] = reference.draft_step
        if device.type != "cpu":
            config = _select_config(vocabulary, _sm_count(device))
            scratch = _allocate_scratch(batch, config, device)
            launch = partial(draft_step_out, scratch=scratch)
        self._launch = partial(
            launch,
            inv_temperature=inv_temperature,
            seeds=seeds,
            id_map=id_map,
            cutoffs=cutoffs,
            coupling=coupling,
        )
        self._state = state
        self._policy = policy

    def __call__(self, logits: Tensor) -> None:
        """Take one step. Shape, dtype and device of ``logits`` are those of the example."""
        self._launch(logits, self._state, self._policy)


def draft_step(
    logits: Tensor,
    state: StepState,
    policy: Tensor,
    *,
    inv_temperature: Tensor | None = None,
    seeds: Tensor | None = None,
    id_map: Tensor | None = None,
    cutoffs: Tensor | None = None,
    coupling: str = "gumbel",
) -> None:
    """Choose a draft token, take its signals, and decide whether to draft another.

    For each row that is neither done nor stopped: appends the token at
    ``sequence[LENGTH + DRAFTED]``, writes its signals, folds them into ``running``, increments
    DRAFTED and sets STOP to the decision. Other rows are left alone. On CPU tensors this is
    `reference.draft_step`, elsewhere one kernel launch; `DraftStep` is its prepared form.

    Parameters
    ----------
    logits : fp32 | fp16 | bf16 [B, V]
        Draft logits, unit stride in V, any row stride, V at most 262,144. Not mutated. Full speed
        needs a base and a row stride that are multiples of 16 bytes, and V a multiple of 16.
    state : StepState
        Mutated. Every row that is neither done nor stopped has DRAFTED < GAMMA_MAX and room in
        ``sequence`` at LENGTH + DRAFTED, as `verify` and this function leave it if GAMMA_CAP is at
        most GAMMA_MAX and LIMIT at most the capacity.
    policy : float32 [POLICY_WORDS]
        See `layout`.
    inv_temperature : float32 [B], optional
        1 / temperature, 0 for a greedy row. None: all rows greedy.
    seeds : int64 [B], optional
        Needed with ``inv_temperature``.
    id_map : int32 [V], optional
        Target id of each draft id; noise is keyed by target ids. None: the same ids.
    cutoffs : float32 [B], optional
        Keep ``logits >= cutoff`` when sampling (from `cutoff`). Signals do not see it.
    coupling : "gumbel" | "rejection"
        How the noise is keyed: by position, or by (step, draft index).

    Raises
    ------
    TypeError, ValueError
        Naming the argument, what was expected and what came.
    """
    DraftStep(
        logits,
        state,
        policy,
        inv_temperature=inv_temperature,
        seeds=seeds,
        id_map=id_map,
        cutoffs=cutoffs,
        coupling=coupling,
    )(logits)


@cache
def _sm_count(device: torch.device) -> int:
    return int(torch.cuda.get_device_properties(device).multi_processor_count)


def _variant(
    name: str,
    dtype: str,
    *,
    config: SplitConfig,
    sampled: bool = False,
    id_map: bool = False,
    cutoffs: bool = False,
    rejection: bool = False,
    aligned: bool = True,
) -> Variant:
    """What `draft_step_out` would launch."""
    signature = {
        "logits_ptr": f"*{dtype}",
        "policy_ptr": "*fp32",
        "rows_ptr": "*i32",
        "running_ptr": "*fp32",
        "sequence_ptr": "*i32",
        "signals_ptr": "*fp32",
        "values_ptr": "*fp32",
        "tokens_ptr": "*i32",
        "counter_ptr": "*i32",
        "stride_logits_b": "i32",
        "stride_sequence_b": "i32",
        "vocabulary": "i32",
    }
    optional = {
        "id_map_ptr": ("*i32", id_map),
        "inv_temperature_ptr": ("*fp32", sampled),
        "seeds_ptr": ("*i64", sampled),
        "cutoffs_ptr": ("*fp32", cutoffs),
    }
    signature |= {n: kind for n, (kind, given) in optional.items() if given}
    unaligned = () if aligned else ("logits_ptr", "stride_logits_b", "vocabulary")
    return Variant(
        name=name,
        signature=signature,
        constexprs={
            **{n: None for n, (_, given) in optional.items() if not given},
            "SAMPLED": sampled,
            "HAS_ID_MAP": id_map,
            "HAS_CUTOFFS": cutoffs,
            "REJECTION": rejection,
            "SPLITS": config.splits,
            "SPLITS_PADDED": config.padded_splits,
            "BLOCK": config.block,
        },
        divisible=frozenset(signature) - {*unaligned},
        wide_loads=aligned,
        num_warps=config.num_warps,
    )


def _variants() -> tuple[Variant, ...]:
    usual = _select_config(128_256, 132)
    variants = [
        _variant(
            f"{dtype}-{'sampled' if sampled else 'greedy'}{'-map' if id_map else ''}",
            dtype,
            config=usual,
            sampled=sampled,
            id_map=id_map,
        )
        for dtype in ("fp32", "fp16", "bf16")
        for sampled in (False, True)
        for id_map in (False, True)
    ]
    for dtype in ("fp32", "fp16", "bf16"):
        variants.append(
            _variant(f"{dtype}-sampled-unaligned", dtype, config=usual, sampled=True, aligned=False)
        )
        variants.append(
            _variant(
                f"{dtype}-rejection-cutoffs",
                dtype,
                config=usual,
                sampled=True,
                cutoffs=True,
                rejection=True,
            )
        )
        for vocabulary in (512, VOCABULARY_MAX):
            config = _select_config(vocabulary, 132)
            variants.append(
                _variant(f"{dtype}-sampled-V{vocabulary}", dtype, config=config, sampled=True)
            )
    return tuple(variants)


SPECS = (
    KernelSpec(
        name="draft_step",
        kernel=_draft_step_kernel,
        variants=_variants(),
        max_registers=216,
        max_shared_bytes=8192,
    ),
)
