"""The engine: a target, a draft, a policy, and requests."""

from __future__ import annotations

import time
import warnings
from collections.abc import Generator, Sequence
from contextlib import closing
from functools import cached_property
from statistics import fmean
from threading import Lock
from typing import Any

import torch
from torch import Tensor

from .decoding.calibrate import calibrated
from .decoding.choice import Choice, Loop, Loops
from .decoding.current import OnDevice, on_device
from .decoding.eager import StepRecord
from .decoding.lookup import Lookup, parse_draft
from .decoding.requests import RequestBatch
from .decoding.stats import Stats
from .decoding.trained import FALLBACK, identify, trained_policy, warn_untrained
from .errors import SpeckvError
from .inputs import Prompt as Prompt
from .inputs import is_ids, is_one
from .kernels.checks import dtype_name
from .kernels.layout import DONE_LENGTH, DONE_STOP
from .models.base import CausalModel
from .models.loading import load_model
from .models.pairing import eos_token_ids, load_draft
from .models.tokenizers import apply_chat_template
from .policies import CostTable, Policy, parse_policy
from .results import Chunk, GenerationInterrupted, Result
from .sampling import SamplingParams
from .text import TextStream

_WAYS_OF_SAMPLING: tuple[dict[str, Any], ...] = (
    {},
    {"temperature": 1.0},
    {"temperature": 1.0, "top_k": 2},
    {"temperature": 1.0, "coupling": "rejection"},
)
_FINISH = {DONE_STOP: "stop", DONE_LENGTH: "length"}


class Engine:
    """Speculative decoding with one target, one draft and a policy.

    Parameters
    ----------
    target : CausalModel
    tokenizer : transformers tokenizer of the target
    draft : CausalModel, optional
        None, without a lookup, allows ``fixed:0`` only.
    policy : str or Policy
        See `speckv.policies`. ``speckv`` is the policy that was trained for the pair; where none
        was, an `UntrainedPolicyWarning` says what decides instead.
    id_map : int32 [V_draft], optional
        Target id of each draft id; by default they are the same.
    max_batch_size : int
        Longer lists of prompts are decoded in groups of this many.
    cost : CostTable, optional
        Costs for the rate objective; measured and cached by default.
    lookup : Lookup, optional
        Draft from the text so far where it repeats itself, and with the draft model elsewhere.
    loop : "auto" | "device" | "graphed" | "eager"
        How much of a step the host has a hand in; the tokens are the same. ``auto`` takes the first
        that models, device and driver allow; see `describe`.

    Examples
    --------
    >>> engine = Engine.from_pretrained()                                   # doctest: +SKIP
    >>> engine.generate("The capital of France is").text                    # doctest: +SKIP
    """

    def __init__(
        self,
        target: CausalModel,
        tokenizer: Any,
        draft: CausalModel | None = None,
        *,
        policy: str | Policy = "speckv",
        id_map: Tensor | None = None,
        max_batch_size: int = 8,
        cost: CostTable | None = None,
        lookup: Lookup | None = None,
        loop: str = "auto",
    ) -> None:
        if max_batch_size < 1:
            raise ValueError(f"max_batch_size: expected at least 1, got {max_batch_size}")
        if not getattr(target, "width_invariant", True):
            what = "the last bits of a row depend on those beside it, so a token about as likely"
            where = f"{target.name}: in {target.dtype} on {target.device}"
            warnings.warn(f"{where} {what} as plain decoding's may come instead", stacklevel=2)
        self.target, self.tokenizer, self.draft = target, tokenizer, draft
        self.lookup = lookup
        self.policy = self._usable(parse_policy(policy))
        self.max_batch_size = max_batch_size
        self.max_length = target.max_positions
        self._cost = cost
        self._loops = Loops(
            target, draft, id_map=id_map, lookup=lookup, max_length=self.max_length, wanted=loop
        )
        self._busy = Lock()

    @classmethod
    def from_pretrained(
        cls,
        target: str | None = None,
        draft: str | None = None,
        *,
        compression: str | None = None,
        policy: str | Policy = "speckv",
        device: str | torch.device | None = None,
        dtype: str | torch.dtype | None = None,
        id_map: Tensor | None = None,
        max_batch_size: int = 8,
        loop: str = "auto",
        progress: bool = True,
    ) -> Engine:
        """Load a pair of models.

        Parameters
        ----------
        target : str, optional
            Hub id, folder, GGUF file, or a name of `speckv.models.hub`; SmolLM2-135M-Instruct by
            default.
        draft : str, optional
            Likewise, or ``first:N`` for the target's own first N layers; see `load_draft` for the
            default. ``lookup`` drafts without a model, from the text so far (``lookup:N``: by its
            last N tokens at most); ``lookup+DRAFT`` does so where the text repeats itself, and
            with the model elsewhere.
        compression : "fp32" | "fp16" | "bf16" | "int8" | "nf4", optional
            Weight format of the target.
        device : optional
            CUDA where there is one, else the CPU.
        dtype : optional
            Of activations and KV cache.
        id_map : int32 [V_draft], optional
            Target id of each draft id, for a draft of another vocabulary; checked.
        loop : "auto" | "device" | "graphed" | "eager"
            As of `Engine`.
        progress : bool
            Whether slow parts of loading show progress on stderr.

        Raises
        ------
        ValueError
            A bad name, a conflict of compression and dtype, incompatible vocabularies.
        ModelError
            A model that cannot be found, read or fetched.
        """
        parsed = parse_policy(policy)
        lookup, draft = parse_draft(draft)
        model, tokenizer = load_model(
            target, compression=compression, dtype=dtype, device=device, progress=progress
        )
        drafted, id_map = load_draft(draft, model, tokenizer, id_map=id_map, progress=progress)
        return cls(
            model,
            tokenizer,
            drafted,
            policy=parsed,
            id_map=id_map,
            max_batch_size=max_batch_size,
            lookup=lookup,
            loop=loop,
        )

    @property
    def loop(self) -> Choice:
        """Which loop decodes, and why."""
        return self._loops.choice

    def describe(self) -> str:
        """One line: models, weight format, policy, device, and which loop decodes and why."""
        target = self.target
        draft = "+".join(d.name for d in (self.lookup, self.draft) if d is not None) or "none"
        dtype = dtype_name(target.dtype)
        policy = self.policy.name
        if policy == "speckv" and self.draft is not None:
            untrained = f" (none trained for this pair: {FALLBACK})"
            policy += " (trained)" if self.policy.trained else untrained
        return (
            f"target {target.name} ({target.compression}, {dtype}), draft {draft}, "
            f"policy {policy}, {target.device}, {self.loop}"
        )

    def generate(
        self,
        prompt: Prompt | Sequence[Prompt],
        params: SamplingParams | Sequence[SamplingParams] | None = None,
        *,
        chat: bool = False,
        policy: str | Policy | None = None,
        keep_signals: bool = False,
    ) -> Any:
        """Decode one prompt or a list of prompts.

        Parameters
        ----------
        prompt : str, list of int, or a list of either
            With ``chat``: a user's message or a list of messages, or a list of either.
        params : SamplingParams or a list of them, optional
            One for all prompts or one each.
        chat : bool
            Apply the tokenizer's chat template.
        policy : str or Policy, optional
            Instead of the engine's.
        keep_signals : bool
            Bring the draft's signals of every step in `Stats.signals`.

        Returns
        -------
        Result, or a list of Result for a list of prompts

        Raises
        ------
        ValueError, TypeError
            An empty prompt, one beyond the context, a bad policy or parameter.
        NumericsError
            A model's logits held NaN.
        GenerationInterrupted
            Ctrl-C; a KeyboardInterrupt that carries the results so far.
        """
        prompts, many = self._prompts(prompt, chat)
        each = self._params(params, len(prompts))
        chosen = self._policy(policy)
        results: list[Result] = []
        for first in range(0, len(prompts), self.max_batch_size):
            part = slice(first, first + self.max_batch_size)
            run = _Generation(self, prompts[part], each[part], chosen, first, keep_signals)
            for _ in run.chunks():
                pass
            results += run.results()
            if run.interrupted:
                raise GenerationInterrupted(results)
        return results if many else results[0]

    def stream(
        self,
        prompt: Prompt,
        params: SamplingParams | None = None,
        *,
        chat: bool = False,
        policy: str | Policy | None = None,
        keep_signals: bool = False,
    ) -> Generator[Chunk, None, None]:
        """Decode one prompt and yield its text as it is committed.

        The last chunk carries the `Result`. Ctrl-C ends the stream with what there is and the
        finish reason ``interrupted``. Parameters and errors are those of `generate`, raised at the
        call, before the first chunk is asked for.
        """
        prompts, many = self._prompts(prompt, chat)
        if many:
            raise TypeError("prompt: expected one prompt to stream, got a list of them")
        each = self._params(params, 1)
        return _Generation(self, prompts, each, self._policy(policy), 0, keep_signals).chunks()

    def warmup(self, batch_size: int = 1, length: int = 2048) -> None:
        """Prepare for requests of up to ``batch_size`` rows and ``length`` tokens.

        Measures the costs that the policy needs, allocates caches and buffers, and decodes a little
        in every way of sampling, plainly and under the engine's policy, so that every kernel is
        compiled: requests of ``batch_size`` rows within these bounds do none of it. Loops on graphs
        capture anew for another number of rows, and for a policy with another largest γ.
        """
        rows = min(batch_size, self.max_batch_size)
        with on_device(self.target.device):
            self._loops.reserve(rows, min(length, self.max_length))
            self._pack(self.policy, 0.0)
        policies: list[str | Policy] = ["fixed:0"]
        if not self._cannot_draft:
            policies += ["fixed:2", self.policy]
        for policy in policies:
            for options in _WAYS_OF_SAMPLING:
                params = SamplingParams(max_new_tokens=4, seed=0, ignore_eos=True, **options)
                self.generate([[0, 0]] * rows, params, policy=policy)

    def _prompts(self, prompt: Any, chat: bool) -> tuple[list[list[int]], bool]:
        many = not isinstance(prompt, str) and isinstance(prompt, Sequence) and not is_one(prompt)
        prompts = [self.encode(p, chat) for p in (prompt if many else [prompt])]
        if not prompts:
            raise ValueError("prompt: expected at least one, got an empty list")
        return prompts, many

    def encode(self, prompt: Any, chat: bool = False) -> list[int]:
        """Token ids of one prompt, as `generate` would use them; its errors are those."""
        ids: list[int]
        if chat and not is_ids(prompt):
            messages = [{"role": "user", "content": prompt}] if isinstance(prompt, str) else prompt
            if not messages or not all(str(m.get("content", "")).strip() for m in messages):
                raise ValueError("prompt: expected a message that is not empty")
            ids = apply_chat_template(self.tokenizer, list(messages))
        elif isinstance(prompt, str):
            # A tokenizer that adds a first token of its own would make a prompt of nothing.
            ids = self.tokenizer.encode(prompt) if prompt else []
        elif is_ids(prompt):
            ids = [int(token) for token in prompt]
        else:
            raise TypeError(
                f"prompt: expected text or token ids{', or messages with chat=True' * (not chat)}, "
                f"got {type(prompt).__name__}"
            )
        if not ids:
            raise ValueError("prompt: expected at least one token, got an empty prompt")
        bad = [token for token in ids if not 0 <= token < self.target.vocab_size]
        if bad:
            raise ValueError(
                f"prompt: expected token ids from 0 to {self.target.vocab_size - 1}, got {bad[0]}"
            )
        if len(ids) >= self.max_length:
            raise ValueError(
                f"prompt: expected at most {self.max_length - 1} tokens (the context is "
                f"{self.max_length}), got {len(ids)}"
            )
        return ids

    @staticmethod
    def _params(
        params: SamplingParams | Sequence[SamplingParams] | None, count: int
    ) -> list[SamplingParams]:
        if params is None:
            params = SamplingParams()
        each = [params] * count if isinstance(params, SamplingParams) else list(params)
        if len(each) != count:
            raise ValueError(f"params: expected {count}, one for each prompt, got {len(each)}")
        for p in each:
            if not isinstance(p, SamplingParams):
                raise TypeError(f"params: expected SamplingParams, got {type(p).__name__}")
        return [p.seeded() for p in each]

    def _policy(self, policy: str | Policy | None) -> Policy:
        return self.policy if policy is None else self._usable(parse_policy(policy))

    def _usable(self, policy: Policy) -> Policy:
        if self._cannot_draft and not policy.never_drafts:
            raise ValueError(
                f"policy: expected fixed:0, since there is no draft, got {policy.name!r}"
            )
        if policy.name != "speckv" or policy.trained:
            return policy
        if self.draft is not None and self._trained is None:
            warn_untrained(identify(self.target), identify(self.draft))
        return self._trained or policy

    @cached_property
    def _trained(self) -> Policy | None:
        """The policy that was trained for this pair, if one was."""
        if self.draft is None:
            return None
        return trained_policy(identify(self.target), identify(self.draft))

    @property
    def _cannot_draft(self) -> bool:
        return self.draft is None and self.lookup is None

    def _pack(self, policy: Policy, temperature: float) -> Tensor:
        """The policy with this pair's costs, for requests of some mean temperature.

        There is one price of a draft token. Beside a model it is the model's, for looked-up tokens
        too: a step drafts by the one or the other, which is decided after the policy is packed. So
        a policy that weighs costs stops a lookup too early rather than a model too late.
        """
        if policy.needs_cost and self._cost is None and not self._cannot_draft:
            self._cost = calibrated(self.target, self.draft, graphs=self.loop.on_graphs)
        return policy.pack(self.target.compression, self._cost, temperature=temperature)


class _Generation:
    """One batch on its way: tokens to text, stop texts, statistics, interruption."""

    def __init__(
        self,
        engine: Engine,
        prompts: list[list[int]],
        params: list[SamplingParams],
        policy: Policy,
        first_request: int,
        keep_signals: bool,
    ) -> None:
        self._engine, self._policy = engine, policy
        self._prompts, self._params = prompts, params
        self._requests = RequestBatch.build(
            prompts,
            params,
            eos_ids=eos_token_ids(engine.target, engine.tokenizer),
            max_length=engine.max_length,
            device=engine.target.device,
            first_request=first_request,
            keep_signals=keep_signals,
        )
        size = len(prompts)
        self._tokens: list[list[int]] = [[] for _ in range(size)]
        self._texts = [TextStream(engine.tokenizer, p.stop) for p in params]
        self._stats = [Stats(prompt_tokens=len(p)) for p in prompts]
        self._finish: list[str | None] = [None] * size
        self.interrupted = False

    def chunks(self) -> Generator[Chunk, None, None]:
        """Run; yields a chunk for each row of each step.

        Raises
        ------
        SpeckvError
            Another request is running: they would share one state.
        """
        engine = self._engine
        if not engine._busy.acquire(blocking=False):
            raise SpeckvError("the engine is busy: finish or close the running request first")
        try:
            yield from self._run(engine)
        finally:
            engine._busy.release()

    def _run(self, engine: Engine) -> Generator[Chunk, None, None]:
        device = engine.target.device
        with on_device(device):
            packed = engine._pack(self._policy, fmean(p.temperature for p in self._params))
            loop = engine._loops.take(self._requests)
        start = time.perf_counter()
        try:
            with closing(OnDevice(device, loop.run(self._requests, packed))) as steps:
                for records in steps:
                    elapsed = time.perf_counter() - start
                    self._add_seconds(loop, elapsed)
                    for record in records:
                        yield self._advance(loop, record, elapsed)
        except SpeckvError:
            # What is not finite now stands in the caches, or the device has not ended.
            engine._loops.drop()
            raise
        except KeyboardInterrupt:
            self.interrupted = True
            self._add_seconds(loop, time.perf_counter() - start)
            self._read_signals(loop)
            for row, finish in enumerate(self._finish):
                if finish is None:
                    yield self._interrupt(row)

    def results(self) -> list[Result]:
        """The results of all rows, in order."""
        return [self._result(row) for row in range(len(self._prompts))]

    def _advance(self, loop: Loop, record: StepRecord, elapsed: float) -> Chunk:
        row, text, stats = record.row, self._texts[record.row], self._stats[record.row]
        kept = record.tokens[: text.push(record.tokens)]
        if record.gamma >= 0:
            stats.steps.append((record.gamma, min(record.accepted, len(kept))))
        self._tokens[row] += kept
        stats.new_tokens += len(kept)
        stats.token_times += [elapsed] * len(kept)
        finish = _FINISH.get(record.done)
        if text.stopped:
            finish = "stop"
            loop.finish(row)
        self._finish[row] = finish
        if finish is None:
            return Chunk(text.take(), kept)
        if all(self._finish):
            self._read_signals(loop)
        return Chunk(text.take(final=True), kept, finish, self._result(row))

    def _read_signals(self, loop: Loop) -> None:
        """Once, after the last word from the device: this waits for it."""
        for row, stats in enumerate(self._stats if self._requests.keep_signals else []):
            kept = loop.signals(row, len(stats.steps)).tolist() if stats.steps else []
            stats.signals = [k[:gamma] for k, (gamma, _) in zip(kept, stats.steps, strict=True)]

    def _interrupt(self, row: int) -> Chunk:
        self._finish[row] = "interrupted"
        return Chunk(self._texts[row].take(final=True), [], "interrupted", self._result(row))

    def _result(self, row: int) -> Result:
        params = self._params[row]
        return Result(
            text=self._texts[row].text,
            token_ids=list(self._tokens[row]),
            finish_reason=self._finish[row] or "interrupted",
            stats=self._stats[row],
            prompt_token_ids=list(self._prompts[row]),
            seed=params.seed if params.temperature > 0 else None,
        )

    def _add_seconds(self, loop: Loop, elapsed: float) -> None:
        parts = loop.seconds
        for stats, finish in zip(self._stats, self._finish, strict=True):
            if finish is None:
                stats.seconds = {
                    "prefill": parts.prefill,
                    "draft": parts.draft,
                    "verify": parts.verify,
                    "decision": parts.decision,
                    "total": elapsed,
                }
