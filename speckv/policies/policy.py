"""Policies by name, and their packing into the buffer of `speckv.kernels.layout`.

========================  =====================================================================
``fixed:K``               K draft tokens every step; ``fixed:0`` is plain decoding
``entropy:T``             stop after the first draft token with an entropy above T bits
``confidence:T``          stop after the first draft token with a confidence below T
``paper``                 the paper's MLP and objective: most predicted tokens per step
``speckv``                most tokens per second by the measured costs of this machine
``file:PATH``             an MLP from a policy file
========================  =====================================================================
"""

from __future__ import annotations

import math
from collections.abc import Iterable
from dataclasses import dataclass, replace
from functools import cache
from importlib.resources import as_file, files
from pathlib import Path

import torch
from torch import Tensor

from ..kernels import layout as at
from .cost import CostTable
from .mlp import Mlp

EMA_WEIGHT = 0.2
_PROBE_EVERY = 32  # at least so many steps with γ=0 before a draft token that finds out
_PROBE_SHARE = 0.004  # of the time at most, catching up aside, where a draft token is dear
_MARGIN = 1.25  # predictions of another pair must promise that much more than they cost
_SHIPPED = {
    "paper": "policies/data/paper.safetensors",
    "speckv": "data/drafts/smollm2-135m-instruct/policy.safetensors",
}
COMPRESSION_INDEX = {"fp32": 0, "fp16": 0, "bf16": 0, "int8": 1, "nf4": 2}
_EXPECTED = "fixed:K, entropy:T, confidence:T, paper, speckv or file:PATH"


@dataclass(frozen=True)
class Policy:
    """A rule that chooses γ.

    Attributes
    ----------
    name : str
        As the user gave it.
    mode : int
        ``MODE_*`` of `speckv.kernels.layout`.
    gamma_cap : int
        γ of a fixed policy, the largest γ of any other.
    threshold : float
        Bits (entropy) or a probability (confidence).
    mlp : Mlp, optional
        Of ``MODE_MLP``.
    objective : int
        ``OBJECTIVE_*``; the rate objective needs a cost table to be packed.
    candidates : tuple of int
        The γ that the MLP chooses from.
    expected_acceptance : float
        What an MLP trained on another pair of models takes for granted: a pair whose record of
        acceptance is below has its predictions scaled down. 0: no scaling.
    trained : bool
        Whether it was trained on traces of the very pair that it decides for.
    """

    name: str
    mode: int
    gamma_cap: int = at.GAMMA_MAX
    threshold: float = 0.0
    mlp: Mlp | None = None
    objective: int = at.OBJECTIVE_TOKENS
    candidates: tuple[int, ...] = ()
    expected_acceptance: float = 0.0
    trained: bool = False

    @property
    def never_drafts(self) -> bool:
        """Whether this is plain decoding, for which no draft model need run."""
        return self.gamma_cap == 0

    @property
    def needs_cost(self) -> bool:
        """Whether `pack` needs a cost table."""
        return self.mode == at.MODE_MLP and self.objective == at.OBJECTIVE_RATE

    def pack(
        self,
        compression: str = "fp16",
        cost: CostTable | None = None,
        *,
        temperature: float = 0.0,
        rate: float | None = None,
    ) -> Tensor:
        """The policy as the kernels read it.

        Parameters
        ----------
        compression : str
            Of the target; bf16 and fp32 count as fp16.
        cost : CostTable, optional
            Costs of a step on this machine. λ, which should be the rate achieved, comes from the
            record of an MLP trained on traces of this compression, at the nearest temperature. For
            any other it is that of plain decoding, a lower bound: γ errs upwards where speculation
            pays, and a draft that its own predictions do not support is not used. Predictions of
            another pair's MLP must promise a quarter more than that.
        temperature : float
            Of the requests, on average.
        rate : float, optional
            λ itself, tokens per millisecond.

        Returns
        -------
        float32 [POLICY_WORDS], on the CPU
        """
        buffer = torch.zeros(at.POLICY_WORDS)
        buffer[at.MODE] = self.mode
        buffer[at.OBJECTIVE] = self.objective
        buffer[at.GAMMA_CAP] = self.gamma_cap
        buffer[at.THRESHOLD] = self.threshold
        buffer[at.PROBE_EVERY] = _PROBE_EVERY
        buffer[at.COMPRESSION] = COMPRESSION_INDEX[compression]
        buffer[at.CANDIDATES] = sum(1 << g for g in self.candidates)
        buffer[at.EMA_WEIGHT] = EMA_WEIGHT
        buffer[at.TEMPERATURE] = temperature
        if self.mlp is not None:
            self.mlp.pack_into(buffer)
            buffer[at.MATCHES] = self.mlp.sees_matches
            buffer[at.EXPECTED_ACCEPTANCE] = self.expected_acceptance
        if self.needs_cost:
            if cost is None:
                raise ValueError(f"policy {self.name!r} needs a cost table, got None")
            buffer[at.COST : at.COST + at.WIDTH_MAX] = torch.tensor(cost.step_ms)
            buffer[at.COST_PER_TOKEN : at.COST_PER_TOKEN + at.WIDTH_MAX] = torch.tensor(
                cost.step_ms_per_context_token
            )
            probe = cost.step_ms[1] / cost.step_ms[0] - 1  # what one costs, in plain steps
            buffer[at.PROBE_EVERY] = max(_PROBE_EVERY, round(probe / _PROBE_SHARE))
            buffer[at.RATE] = self._rate(compression, cost, temperature) if rate is None else rate
        return buffer

    def _rate(self, compression: str, cost: CostTable, temperature: float) -> float:
        assert self.mlp is not None
        record = self.mlp.record(COMPRESSION_INDEX[compression], temperature)
        if record is not None:
            return record.rate(cost)
        return (_MARGIN if self.expected_acceptance else 1.0) / cost.step_ms[0]


def parse_policy(name: str | Policy) -> Policy:
    """The policy of that name.

    Raises
    ------
    ValueError
        An unknown name, or a number that is missing or out of range.
    PolicyError
        A policy file that is missing, corrupt or of another version.
    """
    if isinstance(name, Policy):
        return name
    if not isinstance(name, str):
        raise TypeError(f"policy: expected a name ({_EXPECTED}), got {type(name).__name__}")
    kind, _, argument = name.partition(":")
    if kind == "fixed":
        gamma = _number(name, argument, int, 0, at.GAMMA_MAX)
        return Policy(name, at.MODE_FIXED, gamma_cap=int(gamma))
    if kind == "entropy":
        return Policy(name, at.MODE_ENTROPY, threshold=_number(name, argument, float, 0, math.inf))
    if kind == "confidence":
        return Policy(name, at.MODE_CONFIDENCE, threshold=_number(name, argument, float, 0, 1))
    if kind == "file" and argument:
        return mlp_policy(name, Mlp.load(Path(argument)))
    if name == "paper":
        return mlp_policy(name, shipped_mlp("paper"))
    if name == "speckv":
        mlp = shipped_mlp(name)
        usual = float(mlp.card["acceptance_lower_quartile"])
        blank = replace(mlp, card={}, records={})  # those are of another pair
        return replace(mlp_policy(name, blank), expected_acceptance=usual)
    raise ValueError(f"policy: expected {_EXPECTED}, got {name!r}")


@cache
def shipped_mlp(name: str) -> Mlp:
    """The MLP that ships with the package: ``paper``, or ``speckv``, the default pair's."""
    with as_file(files(__package__.partition(".")[0]) / _SHIPPED[name]) as path:
        return Mlp.load(path)


def mlp_policy(name: str, mlp: Mlp) -> Policy:
    """The policy of an MLP.

    The paper chooses among the γ it measured; the rate objective among all up to those.
    """
    rate = mlp.layout == at.LAYOUT_SURVIVAL
    largest = max(mlp.gammas)
    candidates: Iterable[int] = range(largest + 1) if rate else mlp.gammas
    return Policy(
        name,
        at.MODE_MLP,
        gamma_cap=largest,
        mlp=mlp,
        objective=at.OBJECTIVE_RATE if rate else at.OBJECTIVE_TOKENS,
        candidates=tuple(candidates),
    )


def _number(name: str, text: str, kind: type[int] | type[float], low: float, high: float) -> float:
    try:
        value = kind(text)
    except ValueError:
        value = math.nan
    if not low <= value <= high or math.isinf(value):
        what = "an integer" if kind is int else "a number"
        bounds = f"of at least {low:g}" if math.isinf(high) else f"from {low:g} to {high:g}"
        raise ValueError(f"policy {name!r}: expected {what} {bounds} after ':', got {text!r}")
    return value
