"""The options that ``speckv generate`` and ``speckv chat`` share: declarations and checks.

What can be told without a model is checked before one is loaded, so that a typing mistake costs no
time; ``SamplingParams`` checks the sampling options.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

if TYPE_CHECKING:
    from .prompts import Prompt

COMPRESSIONS = ("fp32", "fp16", "bf16", "int8", "nf4")
DTYPES = ("fp32", "fp16", "bf16")
LOOPS = ("auto", "device", "graphed", "eager")
GAMMA_MAX = 15
DEFAULT_POLICY = "speckv"

Target = Annotated[
    str | None,
    typer.Option(help="Hub id, folder or .gguf file of the target. [default: SmolLM2-135M]"),
]
Draft = Annotated[
    str | None,
    typer.Option(
        help="Hub id or folder of the draft; first:N, the target's first N layers; lookup, no model"
        " but the text so far; or lookup+DRAFT, both."
    ),
]
Policy = Annotated[
    str | None,
    typer.Option(
        help="How far to speculate: fixed:K, entropy:T, confidence:T, paper, speckv or file:PATH."
        f" [default: {DEFAULT_POLICY}]"
    ),
]
Gamma = Annotated[int | None, typer.Option(metavar="K", help="Short for --policy fixed:K.")]
Compression = Annotated[
    str | None,
    typer.Option(help=f"Weight format: {', '.join(COMPRESSIONS)}. [default: fits the device]"),
]
Dtype = Annotated[
    str | None,
    typer.Option(
        help=f"Activations and KV cache: {', '.join(DTYPES)}. [default: fits the compression]"
    ),
]
Device = Annotated[
    str | None, typer.Option(help="cpu, cuda or cuda:N. [default: cuda if there is one]")
]
Loop = Annotated[
    str,
    typer.Option(
        help=f"Who steps: {', '.join(LOOPS)}. auto takes the least of the host that works here."
    ),
]
MaxNewTokens = Annotated[int, typer.Option(metavar="N", help="Stop after N new tokens.")]
Temperature = Annotated[float, typer.Option(help="0 is greedy.")]
TopK = Annotated[int, typer.Option(metavar="K", help="Sample among the K best; 0: all.")]
TopP = Annotated[float, typer.Option(metavar="P", help="Sample within probability mass P.")]
Seed = Annotated[
    int | None,
    typer.Option(help="Same seed, same tokens, whatever the policy. [default: drawn and shown]"),
]
Coupling = Annotated[
    str,
    typer.Option(
        help="How sampled drafts are accepted: gumbel (the tokens of plain sampling) or rejection"
        " (its distribution)."
    ),
]
IgnoreEos = Annotated[
    bool, typer.Option("--ignore-eos", help="Do not stop at the end-of-sequence token.")
]
System = Annotated[str | None, typer.Option(help="System message of the chat.")]


@dataclass(frozen=True)
class ModelOptions:
    """What to load, checked.

    Parameters
    ----------
    target, draft, device : str or None
        As for ``Engine.from_pretrained``; ``None`` takes its default.
    compression : str or None
        One of ``COMPRESSIONS``, or ``None`` to let the engine choose.
    dtype : str or None
        One of ``DTYPES``, or ``None`` to follow the compression.
    policy : str
        A policy name such as ``"fixed:4"``; its own syntax is the engine's to check.
    loop : str
        One of ``LOOPS``.

    Raises
    ------
    ValueError
        An unknown name, or a dtype other than the one an uncompressed format states.
    """

    target: str | None
    draft: str | None
    compression: str | None
    dtype: str | None
    policy: str
    device: str | None
    loop: str = "auto"

    def __post_init__(self) -> None:
        if self.compression is not None:
            _one_of("--compression", self.compression, COMPRESSIONS)
        if self.dtype is not None:
            _one_of("--dtype", self.dtype, DTYPES)
            if self.compression in DTYPES and self.dtype != self.compression:
                raise ValueError(
                    f"--dtype: expected {self.compression} with --compression {self.compression}, "
                    f"got {self.dtype}"
                )
        for option, value in (
            ("--target", self.target),
            ("--draft", self.draft),
            ("--policy", self.policy),
        ):
            if value is not None and not value.strip():
                raise ValueError(f"{option}: expected a name, got an empty string")
        _one_of("--loop", self.loop, LOOPS)
        if self.device is not None:
            kind, _, index = self.device.partition(":")
            if kind not in ("cpu", "cuda") or (":" in self.device and not index.isdecimal()):
                raise ValueError(f"--device: expected cpu, cuda or cuda:N, got {self.device!r}")


def resolve_policy(policy: str | None, gamma: int | None) -> str:
    """The policy that ``--policy`` and ``--gamma`` ask for together.

    Raises
    ------
    ValueError
        Both are given, or ``gamma`` is outside 0..15.
    """
    if gamma is None:
        return DEFAULT_POLICY if policy is None else policy
    if policy is not None:
        raise ValueError(
            f"--gamma: expected --gamma or --policy, not both; got --gamma {gamma} "
            f"and --policy {policy}"
        )
    if not 0 <= gamma <= GAMMA_MAX:
        raise ValueError(f"--gamma: expected an integer in 0..{GAMMA_MAX}, got {gamma}")
    return f"fixed:{gamma}"


def read_prompt_file(text: str) -> list[Prompt]:
    """The prompts of the file that ``--prompts`` names.

    Raises
    ------
    ValueError
        It names none, or not one of prompts.
    """
    path = Path(text).expanduser()
    if not path.is_file():
        raise ValueError(f"--prompts: expected a number or a file, got {text!r}")
    from .training.prompts import load_prompts

    return load_prompts(path)


def _one_of(option: str, value: str, allowed: tuple[str, ...]) -> None:
    if value not in allowed:
        raise ValueError(f"{option}: expected one of {', '.join(allowed)}; got {value!r}")
