"""Many runs of the eager loop on tabular models, under a policy that looks at its own past."""

from __future__ import annotations

from dataclasses import dataclass
from itertools import pairwise
from unittest.mock import patch

import numpy as np
import torch
from torch import Tensor

from speckv.decoding import EagerLoop, RequestBatch, eager
from speckv.decoding.lookup import Lookup
from speckv.kernels import layout as at
from speckv.kernels import reference
from speckv.policies import CostTable, Mlp, Policy
from speckv.sampling import SamplingParams
from tests.statistical.law import Warp, exact_joint
from tests.tabular import TabularModel, random_table

VOCAB = 5  # two Philox quads
PROMPT = (1, 3)
LENGTH = 6  # tokens of a run: that of prefill, and at least two steps
GAMMA_CAP = 3
BATCH = 1024

_ID_MAP = torch.tensor([3, 0, 4], dtype=torch.int32)


def _tables() -> tuple[Tensor, Tensor]:
    """Logits [2, V, V, V] of target and draft, with impossible tokens of their own.

    After an odd position the draft is nearly the target and either is rather flat. After an even
    one it is far off, and sharp or flat by the last token. So the entropy that ends a step of three
    often tells which token was drafted second while the first is rejected: signals that steer the
    next step say much about noise that no rejection has touched.
    """
    target = random_table(VOCAB, VOCAB, seed=3) * torch.tensor([1.0, 0.6])[:, None, None, None]
    noise = random_table(VOCAB, VOCAB, seed=17)
    finite = target.clamp(min=-4.0)
    sharpness = torch.tensor([2.0, 0.15, 2.0, 0.15, 2.0])[:, None]
    draft = torch.stack([(0.5 * finite[0] + noise[0]) * sharpness, finite[1] + 0.2 * noise[1]])
    return target, draft


TARGET, DRAFT = _tables()


def history_policy() -> Tensor:
    """A packed survival MLP whose γ is 0 to 3 by last entropy and confidence and past acceptance.

    Token k is worth drafting if its survival beats its cost, 0.35 of a plain step's: if
    ``4.6 - 0.3 (k - 1) - 25 (entropy - 1.5)+ - 8 (0.6 - confidence)+ - 4 acceptance`` exceeds
    log(0.35 / 0.65). Drafting less after success is perverse, and here for a reason: it makes full
    acceptances end in γ=0. After two steps with γ=0 the next one drafts.
    """
    hidden_weight, hidden_bias = torch.zeros(at.HIDDEN, at.FEATURES), torch.zeros(at.HIDDEN)
    output_weight, output_bias = torch.zeros(at.OUTPUTS, at.HIDDEN), torch.zeros(at.OUTPUTS)
    hidden_weight[0, at.LAST_ENTROPY], hidden_bias[0] = 1.0, -1.5
    hidden_weight[1, at.LAST_CONFIDENCE], hidden_bias[1] = -1.0, 0.6
    hidden_weight[2, at.FEATURE_ACCEPTANCE] = 1.0
    output_weight[:, 0], output_weight[:, 1], output_weight[:, 2] = -25.0, -8.0, -4.0
    output_bias[:] = 4.6 - 0.3 * torch.arange(at.OUTPUTS)
    tensors = {
        "feature_mean": torch.zeros(at.FEATURES),
        "feature_scale": torch.ones(at.FEATURES),
        "hidden_weight": hidden_weight,
        "hidden_bias": hidden_bias,
        "output_weight": output_weight,
        "output_bias": output_bias,
    }
    policy = Policy(
        "history",
        at.MODE_MLP,
        gamma_cap=GAMMA_CAP,
        mlp=Mlp(at.LAYOUT_SURVIVAL, tuple(range(1, GAMMA_CAP + 1)), tensors),
        objective=at.OBJECTIVE_RATE,
        candidates=tuple(range(GAMMA_CAP + 1)),
    )
    cost = CostTable.from_parts(draft_ms=0.35, verify_ms=[1.0] * at.WIDTH_MAX)
    packed = policy.pack(cost=cost)
    packed[at.EMA_WEIGHT] = 0.5  # six tokens are a short history
    packed[at.PROBE_EVERY] = 2
    return packed


@dataclass(frozen=True)
class Setting:
    """What is sampled, and how.

    Attributes
    ----------
    coupling : "gumbel" | "rejection"
    temperature, top_k, top_p
        As in `SamplingParams`.
    trimmed : bool
        The draft knows three of the five tokens, in another order.
    lookup : Lookup, optional
        Drafts by lookup too, or, without a ``model``, by nothing else.
    model : bool
        Whether there is a draft model.
    prompt : tuple of int
    seed : int
        One for all runs, which differ by their request ids.
    """

    coupling: str
    temperature: float = 0.8
    top_k: int = 0
    top_p: float = 1.0
    trimmed: bool = False
    seed: int = 2026
    lookup: Lookup | None = None
    model: bool = True
    prompt: tuple[int, ...] = PROMPT

    @property
    def warp(self) -> Warp:
        return Warp(self.temperature, self.top_k, self.top_p)

    @property
    def law(self) -> np.ndarray:
        """The target's exact joint law of a run's tokens (`law.exact_joint`)."""
        return exact_joint(TARGET, self.prompt, LENGTH, self.warp)

    @property
    def params(self) -> SamplingParams:
        return SamplingParams(
            max_new_tokens=LENGTH,
            temperature=self.temperature,
            top_k=self.top_k,
            top_p=self.top_p,
            seed=self.seed,
            coupling=self.coupling,
        )


@dataclass(frozen=True)
class Runs:
    """Tokens int64 [N, LENGTH]; per run, the (γ, accepted) of its steps."""

    tokens: Tensor
    steps: list[list[tuple[int, int]]]

    def steps_with(self, *gammas: int) -> int:
        """Steps whose γ is one of these."""
        return sum(gamma in gammas for run in self.steps for gamma, _ in run)

    def full_then_plain(self) -> int:
        """Steps that kept all of γ >= 2 draft tokens and were followed by one of the policy's γ=0.

        A last step has γ=0 whatever the policy says, so it does not count.
        """
        return sum(
            before[0] >= 2 and before[0] == before[1] and after[0] == 0
            for run in self.steps
            for before, after in pairwise(run[:-1])
        )

    @property
    def acceptance(self) -> float:
        """Accepted over drafted tokens."""
        pairs = [pair for run in self.steps for pair in run]
        return sum(a for _, a in pairs) / sum(g for g, _ in pairs)


def run(
    setting: Setting, runs: int, operations: object = None, policy: Tensor | None = None
) -> Runs:
    """Decode ``runs`` requests, by the reference's operations or by stand-ins for them."""
    draft = DRAFT[..., _ID_MAP.long()] if setting.trimmed else DRAFT
    capacity = len(setting.prompt) + LENGTH
    ops = reference if operations is None else operations
    with patch.object(eager, "operations", return_value=ops):
        loop = EagerLoop(
            TabularModel(TARGET),
            TabularModel(draft) if setting.model else None,
            batch=min(BATCH, runs),
            capacity=capacity,
            id_map=_ID_MAP if setting.trimmed else None,
            lookup=setting.lookup,
        )
    policy = history_policy() if policy is None else policy
    tokens: list[list[int]] = []
    steps: list[list[tuple[int, int]]] = []
    for first in range(0, runs, BATCH):
        size = min(BATCH, runs - first)
        batch = RequestBatch.build(
            [setting.prompt] * size,
            [setting.params] * size,
            eos_ids=[],
            max_length=capacity,
            device=torch.device("cpu"),
            first_request=first,
        )
        new: list[list[int]] = [[] for _ in range(size)]
        taken: list[list[tuple[int, int]]] = [[] for _ in range(size)]
        for records in loop.run(batch, policy):
            for record in records:
                new[record.row] += record.tokens
                if record.gamma >= 0:
                    taken[record.row].append((record.gamma, record.accepted))
        tokens += new
        steps += taken
    return Runs(torch.tensor(tokens), steps)


def plain_tokens(setting: Setting, runs: int) -> Tensor:
    """Tokens [N, LENGTH] of plain sampling: argmax of log-probability and noise, token by token."""
    rows = TARGET.flatten(0, -2)
    kept = torch.tensor([setting.warp(row.tolist()) for row in rows]) > 0
    scaled = rows * torch.tensor(1.0 / setting.temperature)
    scaled = torch.where(kept, scaled, -torch.inf).view_as(TARGET)
    request, ids = torch.arange(runs)[:, None], torch.arange(VOCAB).expand(runs, -1)
    start = len(setting.prompt)
    tokens = torch.tensor(setting.prompt).repeat(runs, 1)
    for position in range(start, start + LENGTH):
        noise = reference.gumbel(setting.seed, request, position, ids)
        logits = scaled[(position - 1) % TARGET.shape[0], tokens[:, -2], tokens[:, -1]]
        tokens = torch.cat([tokens, (logits + noise).argmax(-1, keepdim=True)], 1)
    return tokens[:, start:]


class NoiseTable:
    """Stands in for `reference.philox`: computes the words of a whole batch of runs at once.

    Nine tenths of the reference's time on these models is Philox of five tokens at a time.
    """

    def __init__(self) -> None:
        self._philox = reference.philox
        self._batch: tuple[int, int] | None = None
        self._words: dict[tuple[int, int], list[tuple[Tensor, ...]]] = {}

    def __call__(self, seed: int, c0: Tensor, c1: int, c2: int, c3: int) -> tuple[Tensor, ...]:
        batch, row = (seed, c2 // BATCH), c2 % BATCH
        if batch != self._batch:
            self._batch, self._words = batch, {}
        if (c1, c3) not in self._words:
            quads = torch.arange(-(-VOCAB // 4)).expand(BATCH, -1)
            request = (c2 - row + torch.arange(BATCH))[:, None]
            words = self._philox(seed, quads, c1, request, c3)
            self._words[c1, c3] = list(zip(*(w.unbind(0) for w in words), strict=True))
        return tuple(w[c0] for w in self._words[c1, c3][row])
