"""Text that grows token by token."""

from __future__ import annotations

import pytest

from speckv.text import TextStream


class Bytes:
    """A tokenizer with one token a byte: most characters of many languages take several."""

    def decode(self, token_ids: list[int], *, skip_special_tokens: bool = True) -> str:
        return bytes(token_ids).decode("utf8", "replace")


class SpacedWords:
    """A tokenizer that drops the space of the first word, as sentencepiece does."""

    words = ("the", "cat", "sat")

    def decode(self, token_ids: list[int], *, skip_special_tokens: bool = True) -> str:
        return " ".join(self.words[i] for i in token_ids)


class Counting:
    """Bytes, and a token 256 that decodes to nothing; counts the tokens that it decodes."""

    def __init__(self) -> None:
        self.decoded = 0

    def decode(self, token_ids: list[int], *, skip_special_tokens: bool = True) -> str:
        self.decoded += len(token_ids)
        return bytes(i for i in token_ids if i < 256).decode("utf8", "replace")


def feed(stream: TextStream, text: str, size: int = 1) -> list[str]:
    data = list(text.encode())
    pieces = []
    for i in range(0, len(data), size):
        stream.push(data[i : i + size])
        pieces.append(stream.take())
        if stream.stopped:
            break
    return [*pieces, stream.take(final=True)]


@pytest.mark.parametrize("size", [1, 2, 3, 7])
def test_pieces_are_whole_characters_and_add_up(size: int) -> None:
    text = "naïve café, 東京 and 🙂!"
    pieces = feed(TextStream(Bytes()), text, size)
    assert "".join(pieces) == text
    assert not any("\N{REPLACEMENT CHARACTER}" in piece for piece in pieces)


def test_an_incomplete_character_appears_at_the_end_only() -> None:
    stream = TextStream(Bytes())
    stream.push(list("ab€".encode())[:-1])
    assert stream.take() == "" or stream.text.startswith("ab")
    assert stream.take(final=True).endswith("\N{REPLACEMENT CHARACTER}")


def test_words_keep_the_spaces_between_them() -> None:
    stream = TextStream(SpacedWords())
    pieces = []
    for token in (0, 1, 2, 1):
        stream.push([token])
        pieces.append(stream.take())
    assert pieces == ["the", " cat", " sat", " cat"]


def test_a_stop_text_is_found_over_token_borders_and_never_shown() -> None:
    for size in (1, 2, 5, 50):
        stream = TextStream(Bytes(), ["END", "ENOUGH"])
        pieces = feed(stream, "an EN and an ENDING", size)
        assert "".join(pieces) == "an EN and an " == stream.text
        assert stream.stopped


def test_push_tells_how_many_tokens_were_taken() -> None:
    stream = TextStream(Bytes(), ["c"])
    assert stream.push(list(b"ab")) == 2
    assert stream.push(list(b"bcdef")) == 2


def test_what_could_begin_a_stop_text_is_held_back() -> None:
    stream = TextStream(Bytes(), ["xyz"])
    stream.push(list(b"abxy"))
    assert stream.take() == "ab"
    stream.push(list(b"!"))
    assert stream.take() == "xy!"
    stream.push(list(b"x"))
    assert stream.take() == "" and stream.take(final=True) == "x"


@pytest.mark.parametrize(
    ("tokens", "text"),
    [
        (list("a€🙂é ".encode()), "a€🙂é "),
        ([*b"word ", *[256] * 25], "word "),
        ([0xE2, 0x82], None),
        ([256], ""),
    ],
    ids=["text", "some special tokens", "never a character", "special tokens only"],
)
def test_the_work_is_linear_in_the_tokens(tokens: list[int], text: str | None) -> None:
    work = []
    for repeats in (300, 3000):
        tokenizer = Counting()
        stream = TextStream(tokenizer, ["no such text"])
        pieces = []
        for token in tokens * repeats:
            stream.push([token])
            pieces.append(stream.take())
        pieces.append(stream.take(final=True))
        assert "".join(pieces) == stream.text
        if text is not None:
            assert stream.text == text * repeats
        work.append(tokenizer.decoded)
    assert work[1] < 10.5 * work[0]
    assert work[1] < 40 * len(tokens * 3000)


def test_text_goes_on_after_bytes_that_are_no_characters() -> None:
    tokens = [*b"before ", *[0xFF] * 100, *" after €".encode()]
    stream = TextStream(Counting(), ["€"])
    taken = sum(stream.push([token]) for token in tokens)
    assert taken == len(tokens) and stream.stopped
    assert stream.text == "before " + "\N{REPLACEMENT CHARACTER}" * 100 + " after "


def test_special_tokens_within_a_character_do_not_matter() -> None:
    first, *rest = "€".encode()
    stream = TextStream(Counting())
    stream.push([*b"a", first, *[256] * 8, *rest, *b"b"])
    assert stream.take(final=True) == "a€b"
