"""Token, signals and γ decision of one draft step; the formulas stand with the kernel.

`draft_step` is the public function, `DraftStep` its prepared form for the loop, `draft_step_out`
the bare launch. The kernel, with its formulas and its rules for ties, NaN and -inf, is in
`draft_step_kernel`.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import cache, partial

import torch
import triton
from torch import Tensor

from . import layout as at
from . import reference
from .device import EMULATED
from .draft_step_kernel import _draft_step_kernel
from .layout import StepState
from .registry import FP_FUSION, KernelSpec, Variant

VOCABULARY_MAX = 262_144
LOGITS_DTYPES = (torch.float32, torch.float16, torch.bfloat16)
COUPLINGS = ("gumbel", "rejection")
PARTIAL_WORDS = 8


@dataclass(frozen=True)
class Config:
    """How a row is cut: ``splits`` programs take every ``splits``-th block of ``block`` logits."""

    block: int
    splits: int
    num_warps: int


def _select_config(vocabulary: int, sm_count: int) -> Config:
    """One block per program, and one program per multiprocessor, as far as that goes.

    A thread holds 8 logits: one 16-byte load of 2-byte logits, two of fp32. Vocabularies of more
    blocks than there are multiprocessors get blocks, and programs, of twice the size before any
    program gets a second block. The batch has no say: a row's result must not depend on it.
    """
    warps = 4 if triton.cdiv(vocabulary, 1024) <= sm_count else 8
    blocks = triton.cdiv(vocabulary, 256 * warps)
    splits = triton.cdiv(blocks, triton.cdiv(blocks, sm_count))
    return Config(block=256 * warps, splits=splits, num_warps=warps)


def _registers(sampled: bool, aligned: bool) -> int:
    """Most registers of a thread; the compiler would take more, or so few that it spills.

    128 let four greedy programs of 128 threads on a multiprocessor, or two of 256, so that the rows
    of a batch need not wait for each other.
    """
    if sampled:
        return 208
    return 128 if aligned else 168


@dataclass(frozen=True)
class Scratch:
    """What programs hand to each other, for one shape; launches that share it must not overlap.

    Attributes
    ----------
    config : Config
    partials : float32 [B, PARTIAL_WORDS, splits]
    counters : int32 [B]
        Programs of a row that have arrived; zero between launches.
    """

    config: Config
    partials: Tensor
    counters: Tensor

    @classmethod
    def allocate(cls, batch: int, config: Config, device: torch.device | str) -> Scratch:
        """Scratch for rows of a batch of ``batch``, cut by ``config``."""
        return cls(
            config=config,
            partials=torch.empty(batch, PARTIAL_WORDS, config.splits, device=device),
            counters=torch.zeros(batch, dtype=torch.int32, device=device),
        )


def draft_step_out(
    logits: Tensor,
    state: StepState,
    policy: Tensor,
    *,
    scratch: Scratch,
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
    scratch : Scratch
        Of this batch, and of a config made for this vocabulary.
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
        scratch.partials,
        scratch.counters,
        logits.stride(0),
        state.sequence.stride(0),
        vocabulary,
        SAMPLED=sampled,
        HAS_ID_MAP=id_map is not None,
        HAS_CUTOFFS=sampled and cutoffs is not None,
        REJECTION=coupling == "rejection",
        SPLITS=config.splits,
        SPLITS_PADDED=triton.next_power_of_2(config.splits),
        BLOCK=config.block,
        WARPS=config.num_warps,
        EMULATED=EMULATED,
        num_warps=config.num_warps,
        num_stages=1,
        maxnreg=_registers(sampled, vocabulary % 16 == 0),
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

    Attributes
    ----------
    config : Config, optional
        How the launch is cut; None on the CPU.

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
        _check_logits(logits)
        (batch, vocabulary), device = logits.shape, logits.device
        _check("state.rows", state.rows, torch.int32, (batch, at.ROW_WORDS), device)
        _check("state.running", state.running, torch.float32, (batch, at.RUNNING_WORDS), device)
        signals = (batch, at.GAMMA_MAX, at.SIGNALS)
        _check("state.signals", state.signals, torch.float32, signals, device)
        _check("state.sequence", state.sequence, torch.int32, (batch, None), device)
        _check("policy", policy, torch.float32, (at.POLICY_WORDS,), device)
        if inv_temperature is not None:
            _check("inv_temperature", inv_temperature, torch.float32, (batch,), device)
            _check("seeds", seeds, torch.int64, (batch,), device)
        if id_map is not None:
            _check("id_map", id_map, torch.int32, (vocabulary,), device)
        if cutoffs is not None:
            _check("cutoffs", cutoffs, torch.float32, (batch,), device)
        if coupling not in COUPLINGS:
            raise ValueError(f"coupling: expected one of {COUPLINGS}, got {coupling!r}")
        self.config: Config | None = None
        launch: Callable[..., None] = reference.draft_step
        if device.type != "cpu":
            self.config = _select_config(vocabulary, _sm_count(device))
            scratch = Scratch.allocate(batch, self.config, device)
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


def _check_logits(logits: object) -> None:
    if not isinstance(logits, Tensor) or logits.dtype not in LOGITS_DTYPES:
        raise TypeError(f"logits: expected fp32, fp16 or bf16 [B, V], got {_describe(logits)}")
    if logits.dim() != 2 or not 1 <= logits.shape[1] <= VOCABULARY_MAX:
        raise ValueError(
            f"logits: expected [B, V] with V from 1 to {VOCABULARY_MAX}, got {_describe(logits)}"
        )
    if logits.shape[1] > 1 and logits.stride(1) != 1:
        raise ValueError(f"logits: expected unit stride in V, got strides {logits.stride()}")


def _check(
    name: str,
    tensor: object,
    dtype: torch.dtype,
    shape: tuple[int | None, ...],
    device: torch.device,
) -> None:
    """Refuse another dtype, shape or device; contiguous, but for rows of a free length."""
    wanted = f"{dtype} {list(shape)} on {device}"
    if not isinstance(tensor, Tensor) or tensor.dtype != dtype:
        raise TypeError(f"{name}: expected {wanted}, got {_describe(tensor)}")
    free = None in shape
    fits = tensor.dim() == len(shape) and all(
        size in (None, actual) for size, actual in zip(shape, tensor.shape, strict=True)
    )
    dense = tensor.stride(-1) == 1 if free and fits else tensor.is_contiguous()
    if not fits or not dense or tensor.device != device:
        raise ValueError(
            f"{name}: expected {wanted}, {'unit stride in the last axis' if free else 'contiguous'}"
            f", got {_describe(tensor)}"
        )


def _describe(value: object) -> str:
    if not isinstance(value, Tensor):
        return type(value).__name__
    return f"{value.dtype} {list(value.shape)} of strides {value.stride()} on {value.device}"


@cache
def _sm_count(device: torch.device) -> int:
    return int(torch.cuda.get_device_properties(device).multi_processor_count)


def _variant(
    name: str,
    dtype: str,
    *,
    config: Config,
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
        "partials_ptr": "*fp32",
        "counters_ptr": "*i32",
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
            "SPLITS_PADDED": triton.next_power_of_2(config.splits),
            "BLOCK": config.block,
            "WARPS": config.num_warps,
            "EMULATED": False,
        },
        divisible=frozenset(signature) - {*unaligned},
        wide_loads=aligned,
        num_warps=config.num_warps,
        maxnreg=_registers(sampled, aligned),
    )


def _variants() -> tuple[Variant, ...]:
    usual, odd = (_select_config(n, 132) for n in (128_256, VOCABULARY_MAX - 1))
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
        variants += [
            _variant(
                f"{dtype}-sampled-unaligned", dtype, config=usual, sampled=True, aligned=False
            ),
            _variant(f"{dtype}-greedy-unaligned", dtype, config=usual, aligned=False),
            _variant(f"{dtype}-greedy-unaligned-large", dtype, config=odd, aligned=False),
            _variant(
                f"{dtype}-rejection-cutoffs",
                dtype,
                config=usual,
                sampled=True,
                cutoffs=True,
                rejection=True,
            ),
        ]
        for vocabulary in (512, VOCABULARY_MAX):
            config = _select_config(vocabulary, 132)
            variants += [
                _variant(f"{dtype}-sampled-V{vocabulary}", dtype, config=config, sampled=True),
                _variant(f"{dtype}-greedy-V{vocabulary}", dtype, config=config),
            ]
    return tuple(variants)


SPECS = (
    KernelSpec(
        name="draft_step",
        kernel=_draft_step_kernel,
        variants=_variants(),
        max_registers=_registers(sampled=True, aligned=True),
        max_shared_bytes=8192,
    ),
)
