"""A draft must propose tokens of its target's vocabulary."""

from __future__ import annotations

import pytest
import torch

from speckv.models.tokenizers import apply_chat_template, check_compatible
from tests.models.conftest import tiny_tokenizer

WORDS = ["red", "green", "blue"]
TEMPLATE = (
    "{% for m in messages %}{{ m.role }} {{ m.content }} </s> {% endfor %}"
    "{% if add_generation_prompt %}red{% endif %}"
)


def test_equal_vocabularies_need_no_map() -> None:
    target, draft = tiny_tokenizer(WORDS), tiny_tokenizer(WORDS)
    assert check_compatible(target, draft, 8, 8) is None


def test_only_the_shared_range_is_compared() -> None:
    target, draft = tiny_tokenizer([*WORDS, "grey"]), tiny_tokenizer([*WORDS, "black"])
    assert check_compatible(target, draft, 8, 6) is None
    with pytest.raises(ValueError, match="id 6 is 'black' in the draft and 'grey' in the target"):
        check_compatible(target, draft, 8, 7)


def test_the_first_difference_is_named() -> None:
    target, draft = tiny_tokenizer(WORDS), tiny_tokenizer(["red", "blue", "green"])
    with pytest.raises(ValueError, match="id 4 is 'blue' in the draft and 'green' in the target"):
        check_compatible(target, draft, 8, 8)
    short = tiny_tokenizer(WORDS[:2])
    with pytest.raises(ValueError, match="id 5 is no token in the draft and 'blue' in the target"):
        check_compatible(target, short, 8, 8)


def test_special_tokens_must_agree() -> None:
    target, draft = tiny_tokenizer(WORDS), tiny_tokenizer(WORDS)
    draft.eos_token = "red"
    with pytest.raises(ValueError, match="its eos token has id 3, the target's has id 2"):
        check_compatible(target, draft, 8, 8)


def test_a_wider_draft_needs_a_map() -> None:
    target, draft = tiny_tokenizer(WORDS), tiny_tokenizer(WORDS)
    with pytest.raises(ValueError, match="has 9 logits, more than the target's 8"):
        check_compatible(target, draft, 8, 9)


def test_a_stated_map_is_checked_and_returned() -> None:
    target, draft = tiny_tokenizer(WORDS), tiny_tokenizer(WORDS[::-1])
    checked = check_compatible(target, draft, 8, 4, torch.tensor([0, 7, 3, 4]))
    assert checked is not None and checked.dtype == torch.int32
    assert checked.tolist() == [0, 7, 3, 4]
    for bad, message in (
        ([0, 1, 2], r"expected shape \(4,\), the draft's vocabulary, got \(3,\)"),
        ([0, 1, 2, 8], "expected ids 0 to 7, got 0 to 8"),
        ([0, 1, -2, 3], "expected ids 0 to 7, got -2 to 3"),
        ([0, 1, 1, 3], "expected an injective map"),
    ):
        with pytest.raises(ValueError, match=f"id_map: {message}"):
            check_compatible(target, draft, 8, 4, torch.tensor(bad))
    with pytest.raises(TypeError, match="id_map: expected a tensor of integers, got torch.float32"):
        check_compatible(target, draft, 8, 4, torch.zeros(4))


def test_chat_template() -> None:
    tokenizer = tiny_tokenizer([*WORDS, "user"], TEMPLATE)
    ids = apply_chat_template(tokenizer, [{"role": "user", "content": "blue green"}])
    assert tokenizer.convert_ids_to_tokens(ids) == ["user", "blue", "green", "</s>", "red"]


def test_chat_template_errors() -> None:
    message = {"role": "user", "content": "blue"}
    with pytest.raises(ValueError, match="tokenizer has no chat template"):
        apply_chat_template(tiny_tokenizer(WORDS), [message])
    refusing = tiny_tokenizer(WORDS, "{{ raise_exception('roles must alternate') }}")
    with pytest.raises(ValueError, match="the chat template refuses them: roles must alternate"):
        apply_chat_template(refusing, [message])
    with pytest.raises(ValueError, match="messages: expected at least one, got none"):
        apply_chat_template(refusing, [])
    with pytest.raises(ValueError, match=r"messages: expected role and content, got \['role'\]"):
        apply_chat_template(refusing, [{"role": "user"}])
