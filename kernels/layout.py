"""Shapes and word positions of the tensors that the kernels, the reference and the loop share.

Row state (``StepState``) lives on the device for the whole generation. One int32 row of counters
and one float32 row of running features per sequence keep the kernels' argument lists short; the
names below are the only way either is indexed.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch
from torch import Tensor

GAMMA_MAX = 15
"""Most draft tokens in one step: a verification is then at most 16 rows, one MMA tile."""
WIDTH_MAX = GAMMA_MAX + 1
MATCH_MAX = 4
"""Most last tokens that are looked for in the text before them."""

# Words of a row of `StepState.rows` (int32 [B, ROW_WORDS]).
LENGTH = 0  # committed tokens in `sequence`, prompt included
LIMIT = 1  # length at which the row ends
DRAFTED = 2  # draft tokens of the step under way; they stand at sequence[LENGTH:LENGTH + DRAFTED]
STOP = 3  # non-zero: no more drafting in this step
DONE = 4  # one of RUNNING, DONE_STOP, DONE_LENGTH, DONE_ERROR
GAMMA = 5  # of the last step: draft tokens verified
ACCEPTED = 6  # of the last step: draft tokens kept
COMMITTED = 7  # of the last step: tokens appended to the sequence
STEP = 8  # verifications so far, that after prefill included; keys rejection's noise
PLAIN_RUN = 9  # consecutive steps with γ=0
REQUEST = 10  # request id, keys the noise
ERROR = 11  # bits ERROR_DRAFT, ERROR_TARGET
DRAFT_LENGTH = 12  # committed tokens that the draft's cache holds; loops without a host keep it
REPORTED = 13  # non-zero: the row's error stands in `LoopState.records`
MATCH = 14  # where the text that the last committed tokens repeat went on, a place in `sequence`
MATCH_LENGTH = 15  # how many tokens it repeats; 0 once a draft token is not what came there
ROW_WORDS = 16

RUNNING, DONE_STOP, DONE_LENGTH, DONE_ERROR = range(4)
ERROR_DRAFT, ERROR_TARGET = 1, 2

# Words of a row of `StepState.running` (float32 [B, RUNNING_WORDS]): features of the step so far,
# kept until the next step's first draft token overwrites them. Entropies in bits.
MEAN_ENTROPY = 0
MAX_ENTROPY = 1
MEAN_CONFIDENCE = 2
MIN_CONFIDENCE = 3
LAST_ENTROPY = 4  # negative: no draft token yet in this request
LAST_CONFIDENCE = 5
LAST_MARGIN = 6
ACCEPTANCE = 7  # exponential moving average of accepted / γ over the steps with γ > 0
RUNNING_WORDS = 8
RUNNING_START = (0.0,) * LAST_ENTROPY + (-1.0, 0.0, 0.0, 0.5)
"""A row of `StepState.running` where nothing was drafted yet."""

# Words of `StepState.signals` (float32 [B, GAMMA_MAX, SIGNALS]), from the raw temperature-1 logits.
ENTROPY, CONFIDENCE, MARGIN, TOKEN_PROBABILITY = range(4)
SIGNALS = 4

# The packed policy buffer (float32 [POLICY_WORDS]): a header, the costs, the MLP.
MODE = 0  # MODE_FIXED, MODE_ENTROPY, MODE_CONFIDENCE, MODE_MLP
MLP_LAYOUT = 1  # LAYOUT_SURVIVAL, LAYOUT_PAPER
OBJECTIVE = 2  # OBJECTIVE_TOKENS, OBJECTIVE_RATE
GAMMA_CAP = 3  # fixed γ of MODE_FIXED; largest γ of the other modes
THRESHOLD = 4  # bits (MODE_ENTROPY) or probability (MODE_CONFIDENCE)
RATE = 5  # λ of OBJECTIVE_RATE, tokens per ms
PROBE_EVERY = 6  # after so many steps with γ=0 in a row, draft once; 0: never
COMPRESSION = 7  # index of the one-hot: fp16 (also bf16, fp32) 0, int8 1, nf4 2
CANDIDATES = 8  # bit γ set: γ may be chosen by the MLP
EMA_WEIGHT = 9  # weight of the newest step in ACCEPTANCE
EXPECTED_ACCEPTANCE = 10  # below it the MLP's predictions are scaled down; 0: taken as they are
MATCHES = 11  # 1: the MLP sees FEATURE_MATCH, so MATCH and MATCH_LENGTH are kept
TEMPERATURE = 12  # of the requests, on average; 0 is greedy
HEADER_WORDS = 16
FEATURES, HIDDEN, OUTPUTS = 16, 16, 16
COST = HEADER_WORDS  # ms of a step that verifies γ draft tokens, γ = 0..15, at context 0
COST_PER_TOKEN = COST + WIDTH_MAX  # its slope, ms per token of context
FEATURE_MEAN = COST_PER_TOKEN + WIDTH_MAX
FEATURE_SCALE = FEATURE_MEAN + FEATURES  # reciprocal standard deviation
HIDDEN_WEIGHT = FEATURE_SCALE + FEATURES  # [FEATURES, HIDDEN]: by what it is multiplied with
HIDDEN_BIAS = HIDDEN_WEIGHT + HIDDEN * FEATURES
OUTPUT_WEIGHT = HIDDEN_BIAS + HIDDEN  # [HIDDEN, OUTPUTS], likewise
OUTPUT_BIAS = OUTPUT_WEIGHT + OUTPUTS * HIDDEN
POLICY_WORDS = OUTPUT_BIAS + OUTPUTS

MODE_FIXED, MODE_ENTROPY, MODE_CONFIDENCE, MODE_MLP = range(4)
LAYOUT_SURVIVAL, LAYOUT_PAPER = range(2)
OBJECTIVE_TOKENS, OBJECTIVE_RATE = range(2)

# The MLP's inputs: 0..6 are words 0..6 of `running`; then
FEATURE_DRAFTED = 7
FEATURE_COMPRESSION = 8  # one-hot over 8, 9, 10
FEATURE_ACCEPTANCE = 11
FEATURE_MATCH = 12  # word MATCH_LENGTH of `rows`
FEATURE_TEMPERATURE = 13
FEATURE_GAMMA = 15  # LAYOUT_PAPER only: the candidate γ; LAYOUT_SURVIVAL sees zero

# Words of `LoopState.control` (int32 [CONTROL_WORDS]).
GENERATION = 0  # number of the generation under way, from 1: marks every word meant for the host
STEPS = 1  # steps closed
MOST_STEPS = 2  # bound of STEPS
TICKET = 3  # how often the conditions were published
CONTROL_WORDS = 4

# Words of `LoopState.passes` (int32 [PASS_WORDS]): the bound of the loops within a step.
PASSES = 0  # how often the conditions were published since a step was closed
MOST_PASSES = 1  # after so many nothing drafts or lags: each catch-up and each draft token is one
PASS_WORDS = 2

# Words of `LoopState.conditions`.
RUNNING_ROWS = 0  # 1: some row is not done, and STEPS is below its bound
DRAFTING_ROWS = 1  # 1: some row is neither done nor stopped, and PASSES is within its bound
LAGGING_ROWS = 2  # 1: so, and the draft's cache lacks more than two tokens of such a row
MOST_DRAFTED = 3  # the largest DRAFTED of the rows that are not done
FIXED_GAMMA = 4  # how many tokens the step drafts, as long as nothing but its length is decided by
CONDITIONS = 5

# Bits of a word of `LoopState.records`, below the generation's number.
RECORD_ACCEPTED = 8
RECORD_COMMITTED = 16
RECORD_DONE = 24
RECORD_ERROR = 28

# What a forward of `step_inputs` is for.
INPUTS_CATCH_UP, INPUTS_FIRST, INPUTS_NEXT, INPUTS_VERIFY = range(4)
INPUT_WIDTHS = (WIDTH_MAX, 2, 1)
"""Tokens a row that the three forwards of the draft take."""

# Purposes of random draws: the lowest byte of the fourth Philox counter word.
NOISE_COUPLED, NOISE_DRAFT, NOISE_ACCEPT, NOISE_RESIDUAL, NOISE_BONUS = range(5)


@dataclass(frozen=True)
class StepState:
    """The device state of a batch of B sequences; every tensor is mutated in place by the kernels.

    Attributes
    ----------
    rows : int32 [B, ROW_WORDS], contiguous
    running : float32 [B, RUNNING_WORDS], contiguous
    sequence : int32 [B, S], unit stride in S
        Target token ids: the committed ones up to LENGTH, then the step's draft tokens.
    signals : float32 [B, GAMMA_MAX, SIGNALS], contiguous
    """

    rows: Tensor
    running: Tensor
    sequence: Tensor
    signals: Tensor

    @classmethod
    def allocate(cls, batch: int, capacity: int, device: torch.device | str = "cpu") -> StepState:
        """State for ``batch`` sequences of at most ``capacity`` tokens; call `reset` before use."""
        return cls(
            rows=torch.zeros(batch, ROW_WORDS, dtype=torch.int32, device=device),
            running=torch.zeros(batch, RUNNING_WORDS, dtype=torch.float32, device=device),
            sequence=torch.zeros(batch, capacity, dtype=torch.int32, device=device),
            signals=torch.zeros(batch, GAMMA_MAX, SIGNALS, dtype=torch.float32, device=device),
        )

    def narrow(self, batch: int) -> StepState:
        """A view of the first ``batch`` rows."""
        return StepState(
            self.rows[:batch], self.running[:batch], self.sequence[:batch], self.signals[:batch]
        )

    def reset(self, row: int, prompt: list[int], limit: int, request: int) -> None:
        """Start row ``row`` on ``prompt``; it ends at a total length of ``limit`` tokens.

        The row is stopped with no draft tokens, so the first `verify` commits the token that
        prefill yields.
        """
        words = [0] * ROW_WORDS
        words[LENGTH], words[LIMIT], words[STOP] = len(prompt), limit, 1
        words[REQUEST] = request
        self.rows[row] = torch.tensor(words, dtype=torch.int32)
        self.running[row] = torch.tensor(RUNNING_START)
        self.sequence[row, : len(prompt)] = torch.tensor(prompt, dtype=torch.int32)


@dataclass(frozen=True)
class LoopState:
    """What a loop without a host, and the host that watches it, tell each other.

    A word for the host holds the number of the generation, or the ticket, in its upper half: the
    host knows a word by it, so none is ever cleared, and nothing is waited for but the word.

    Attributes
    ----------
    control : int32 [CONTROL_WORDS]
    passes : int32 [PASS_WORDS]
    conditions : int64 [CONDITIONS]
        ``ticket << 32 | value``.
    ended : int64 [1]
        ``generation << 32 | steps`` once RUNNING_ROWS is 0: no step follows.
    cancel : int32 [B]
        Non-zero: the row ends with the step under way. Written by the host.
    tokens : int64 [B, S]
        ``generation << 32 | token`` of every committed position.
    records : int64 [B, S]
        Of every step of a row, that after prefill first: ``generation << 32``, ERROR, DONE,
        COMMITTED, ACCEPTED and γ.
    signals : float32 [B, S, GAMMA_MAX, SIGNALS] or None
        Of the draft tokens of the steps in ``records``.
    """

    control: Tensor
    passes: Tensor
    conditions: Tensor
    ended: Tensor
    cancel: Tensor
    tokens: Tensor
    records: Tensor
    signals: Tensor | None = None

    @classmethod
    def allocate(
        cls,
        batch: int,
        capacity: int,
        device: torch.device | str = "cpu",
        *,
        conditions_on_host: bool = True,
        signals: bool = False,
    ) -> LoopState:
        """For ``batch`` sequences of at most ``capacity`` tokens.

        On CUDA what the host reads or writes is pinned memory, which both see at one address;
        ``conditions_on_host`` says whether the conditions are.
        """
        on_cuda = torch.device(device).type == "cuda"

        def shared(*shape: int, dtype: torch.dtype) -> Tensor:
            return torch.zeros(*shape, dtype=dtype, pin_memory=on_cuda)

        if conditions_on_host:
            conditions = shared(CONDITIONS, dtype=torch.int64)
        else:
            conditions = torch.zeros(CONDITIONS, dtype=torch.int64, device=device)
        # A step catches up with a whole sequence at most, and is closed and begun besides.
        most_passes = -(-capacity // WIDTH_MAX) + GAMMA_MAX + 2
        kept = None
        if signals:
            kept = torch.zeros(batch, capacity, GAMMA_MAX, SIGNALS, device=device)
        return cls(
            control=torch.zeros(CONTROL_WORDS, dtype=torch.int32, device=device),
            passes=torch.tensor([0, most_passes], dtype=torch.int32, device=device),
            conditions=conditions,
            ended=shared(1, dtype=torch.int64),
            cancel=shared(batch, dtype=torch.int32),
            tokens=shared(batch, capacity, dtype=torch.int64),
            records=shared(batch, capacity, dtype=torch.int64),
            signals=kept,
        )

    def narrow(self, batch: int) -> LoopState:
        """A view of the first ``batch`` rows."""
        return replace(
            self,
            cancel=self.cancel[:batch],
            tokens=self.tokens[:batch],
            records=self.records[:batch],
            signals=None if self.signals is None else self.signals[:batch],
        )
