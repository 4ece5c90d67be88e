"""Streaming never shows half a character and never loses one."""

from __future__ import annotations

import itertools

import pytest
from hypothesis import given
from hypothesis import strategies as st

from edgetune.runtime.text import Utf8Stream


def cut(raw: bytes, cuts: list[int]) -> list[bytes]:
    places = [0, *sorted(place % (len(raw) + 1) for place in cuts), len(raw)]
    return [raw[start:stop] for start, stop in itertools.pairwise(places)]


@given(st.text(), st.lists(st.integers(0, 10**6), max_size=20))
def test_text_in_any_pieces_is_decoded_completely(text: str, cuts: list[int]) -> None:
    raw = text.encode("utf-8", "surrogatepass") if text.isprintable() else text.encode("utf-8", "replace")
    stream = Utf8Stream()
    shown = [stream.feed(piece) for piece in cut(raw, cuts)]
    assert "".join(shown) + stream.finish() == raw.decode("utf-8", "replace")


@given(st.binary(), st.lists(st.integers(0, 10**6), max_size=20))
def test_invalid_bytes_are_decoded_as_a_decoder_of_the_whole_text_would(raw: bytes, cuts: list[int]) -> None:
    stream = Utf8Stream()
    assert "".join(map(stream.feed, cut(raw, cuts))) + stream.finish() == raw.decode("utf-8", "replace")


@pytest.mark.parametrize("character", ["灯", "é", "👍", "\u200b"])
def test_a_character_appears_with_its_last_byte(character: str) -> None:
    stream = Utf8Stream()
    *first, last = (bytes([byte]) for byte in character.encode())
    assert [stream.feed(piece) for piece in first] == [""] * len(first)
    assert stream.feed(last) == character
    assert stream.finish() == ""
