"""Token ids of a text that continues a prompt, such that the prompt's own ids stay as they are."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence

Encode = Callable[[str], Sequence[int]]
Decode = Callable[[Sequence[int]], str]

_ANCHORS = ("\n", ".", "a", "")


def continue_ids(
    encode: Encode, decode: Decode, prompt: str, prompt_ids: Sequence[int], text: str, markers: Iterable[str] = ()
) -> list[int]:
    """Return the ids of `text` behind those of `prompt`.

    They are the last ids of the whole text, if that begins with the ids of the prompt. Otherwise a token of the whole
    lies across the border, as in "\\n" + "\\nred" or "Assistant: " + "red". A model that is given the prompt cannot
    generate this token, so `text` is tokenized apart, behind a text (a special token if possible) that does not merge
    with it. Tokenized alone, SentencePiece would put a space before it.

    Args:
        encode: Token ids of a text; special tokens in it are parsed.
        decode: The text of token ids.
        prompt: The given text.
        prompt_ids: Its ids.
        text: What follows it.
        markers: Special tokens, as text.
    """
    whole = list(encode(prompt + text))
    if whole[: len(prompt_ids)] == list(prompt_ids):
        return whole[len(prompt_ids) :]
    expected = decode(whole)
    first: list[int] | None = None
    for anchor in (*markers, *_ANCHORS):
        head = list(encode(anchor))
        found = list(encode(anchor + text))
        if found[: len(head)] != head:
            continue
        rest = found[len(head) :]
        if decode([*prompt_ids, *rest]) == expected:
            return rest
        first = rest if first is None else first
    return list(encode(text)) if first is None else first
