"""Whether a draft speaks its target's vocabulary, and chat templates."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

__all__ = ["apply_chat_template", "check_compatible", "encode_prompts"]

_ROLES = ("bos", "eos", "unk")


def check_compatible(
    target_tokenizer: PreTrainedTokenizerBase,
    draft_tokenizer: PreTrainedTokenizerBase,
    target_vocab: int,
    draft_vocab: int,
    id_map: Tensor | None = None,
) -> Tensor | None:
    """Check that every token a draft may propose is a token of the target.

    Without a map both tokenizers must give every id that both models can produce the same token,
    and agree on the ids of the beginning, end and unknown tokens (padding is never decoded). With a
    map the tokenizers are not compared: the map is the caller's statement.

    Parameters
    ----------
    target_tokenizer, draft_tokenizer : PreTrainedTokenizerBase
        Tokenizers of the two models.
    target_vocab, draft_vocab : int
        Widths of their logits.
    id_map : Tensor [draft_vocab] int, optional
        Target id of each draft id.

    Returns
    -------
    Tensor [draft_vocab] int32 or None
        The checked map, or None where draft ids are target ids.

    Raises
    ------
    ValueError
        Naming the first difference, or what is wrong with the map.
    TypeError
        If the map is not a tensor of integers.
    """
    if id_map is not None:
        return _checked_map(id_map, target_vocab, draft_vocab)
    if draft_vocab > target_vocab:
        raise ValueError(
            f"draft: it has {draft_vocab} logits, more than the target's {target_vocab}, so it "
            "could propose ids the target does not have; state an id map"
        )
    target_tokens = _tokens_by_id(target_tokenizer, draft_vocab)
    draft_tokens = _tokens_by_id(draft_tokenizer, draft_vocab)
    for token_id in sorted(target_tokens.keys() | draft_tokens.keys()):
        ours, theirs = target_tokens.get(token_id), draft_tokens.get(token_id)
        if ours != theirs:
            raise ValueError(
                f"draft: its vocabulary is not the target's: id {token_id} is "
                f"{_shown(theirs)} in the draft and {_shown(ours)} in the target; state an id map "
                "or choose a draft of the same family"
            )
    for role in _ROLES:
        ours = getattr(target_tokenizer, f"{role}_token_id", None)
        theirs = getattr(draft_tokenizer, f"{role}_token_id", None)
        if ours != theirs:
            raise ValueError(
                f"draft: its {role} token has id {theirs}, the target's has id {ours}; state an id "
                "map or choose a draft of the same family"
            )
    return None


def _tokens_by_id(tokenizer: PreTrainedTokenizerBase, limit: int) -> dict[int, str]:
    return {index: token for token, index in tokenizer.get_vocab().items() if index < limit}


def _shown(token: object) -> str:
    return "no token" if token is None else repr(token)


def _checked_map(id_map: Tensor, target_vocab: int, draft_vocab: int) -> Tensor:
    if not isinstance(id_map, Tensor) or id_map.is_floating_point() or id_map.dtype == torch.bool:
        got = id_map.dtype if isinstance(id_map, Tensor) else type(id_map).__name__
        raise TypeError(f"id_map: expected a tensor of integers, got {got}")
    if tuple(id_map.shape) != (draft_vocab,):
        raise ValueError(
            f"id_map: expected shape ({draft_vocab},), the draft's vocabulary, "
            f"got {tuple(id_map.shape)}"
        )
    low, high = int(id_map.min()), int(id_map.max())
    if low < 0 or high >= target_vocab:
        raise ValueError(f"id_map: expected ids 0 to {target_vocab - 1}, got {low} to {high}")
    if torch.unique(id_map).numel() != draft_vocab:
        raise ValueError("id_map: expected an injective map, got a target id more than once")
    return id_map.to(torch.int32)


def apply_chat_template(
    tokenizer: PreTrainedTokenizerBase, messages: Sequence[Mapping[str, Any]]
) -> list[int]:
    """Token ids of a conversation, up to where the model's answer begins.

    Parameters
    ----------
    tokenizer : PreTrainedTokenizerBase
        A tokenizer with a chat template.
    messages : sequence of mappings
        Each with ``role`` and ``content``, in order.

    Raises
    ------
    ValueError
        If there is no template, no message, or the template refuses the messages.
    """
    if not messages:
        raise ValueError("messages: expected at least one, got none")
    for message in messages:
        if not {"role", "content"} <= message.keys():
            raise ValueError(f"messages: expected role and content, got {sorted(message)}")
    if not getattr(tokenizer, "chat_template", None):
        raise ValueError(
            "chat: this model's tokenizer has no chat template; use a plain prompt instead"
        )
    try:
        ids = tokenizer.apply_chat_template(
            [dict(message) for message in messages],
            add_generation_prompt=True,
            tokenize=True,
            return_dict=False,
        )
    except Exception as error:  # a template is a program of the checkpoint: it raises what it likes
        raise ValueError(f"messages: the chat template refuses them: {error}") from error
    return [int(i) for i in ids]


def encode_prompts(
    tokenizer: PreTrainedTokenizerBase, texts: Sequence[str], max_positions: int
) -> list[list[int]]:
    """Token ids of users' messages: through the chat template if there is one, else as they are.

    Raises
    ------
    ValueError
        A text fills the context of ``max_positions`` tokens.
    """
    if getattr(tokenizer, "chat_template", None):
        messages = [[{"role": "user", "content": text}] for text in texts]
        encoded = [apply_chat_template(tokenizer, message) for message in messages]
    else:
        encoded = [tokenizer.encode(text) for text in texts]
    longest = max(map(len, encoded), default=0)
    if longest >= max_positions:
        raise ValueError(
            f"prompts: expected at most {max_positions - 1} tokens each, got {longest}"
        )
    return encoded
