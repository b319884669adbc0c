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
