"""Bytes of tokens to text, as they come."""

from __future__ import annotations

import codecs


class Utf8Stream:
    """Holds back the bytes of an unfinished character: a token may end in the middle of 灯 or of an emoji.

    Bytes that can never become a character are shown as U+FFFD, as a decoder of the whole text would.
    """

    def __init__(self) -> None:
        self._decoder = codecs.getincrementaldecoder("utf-8")("replace")

    def feed(self, piece: bytes) -> str:
        """The characters that are complete now."""
        return self._decoder.decode(piece)

    def finish(self) -> str:
        """What is left when no more bytes come."""
        return self._decoder.decode(b"", final=True)
