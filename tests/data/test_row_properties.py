"""The law of rows over random templates, tokenizers and conversations: see edgetune/data/masks.py.

Templates are written out twice (schemes.py), so what is given and what is generated is known independently.
"""

from __future__ import annotations

import unicodedata
from collections.abc import Callable
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers import AddedToken, Tokenizer, decoders, normalizers, pre_tokenizers

from edgetune.data.chat import ChatTemplate
from edgetune.data.masks import EncodedRow, encode_answer, encode_conversation
from edgetune.data.text_tokenizer import TextTokenizer
from tests.converters import vocabularies
from tests.data.schemes import SCHEMES, Message, Scheme, conversations

MARKERS = ("<|im_start|>", "<|im_end|>", "<|endoftext|>")


def _metaspace(scheme: str) -> Callable[[Path], None]:
    def make(folder: Path) -> None:
        tokenizer = vocabularies.sentencepiece(folder)
        tokenizer.normalizer = None
        tokenizer.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme=scheme, split=False)
        tokenizer.decoder = decoders.Sequence(
            [decoders.ByteFallback(), decoders.Metaspace(prepend_scheme=scheme), decoders.Fuse()]
        )
        tokenizer.add_special_tokens(list(MARKERS))
        vocabularies.save(tokenizer, folder, eos_token="<|im_end|>")

    return make


def _sentencepiece(prefix: bool, bos: bool) -> Callable[[Path], None]:
    def make(folder: Path) -> None:
        tokenizer = vocabularies.sentencepiece(folder, prefix=prefix, bos=bos)
        tokenizer.add_special_tokens(list(MARKERS))
        vocabularies.save(tokenizer, folder, bos_token="<s>", eos_token="<|im_end|>")

    return make


def _byte_level(cutter: str, nfc: bool = False, **flags: bool) -> Callable[[Path], None]:
    def make(folder: Path) -> None:
        tokenizer = vocabularies.byte_level(folder, cutter)
        if nfc:
            tokenizer.normalizer = normalizers.NFC()
        if flags:
            loaded = Tokenizer.from_str(tokenizer.to_str())
            loaded.add_special_tokens([AddedToken(text, special=True, **flags) for text in MARKERS])
            tokenizer = loaded
        vocabularies.save(tokenizer, folder, eos_token="<|im_end|>")

    return make


TOKENIZERS: dict[str, Callable[[Path], None]] = {
    **{cutter: _byte_level(cutter) for cutter in vocabularies.CUTTERS},
    "composed": _byte_level("qwen2", nfc=True),
    "takes white space behind markers": _byte_level("gpt-2", rstrip=True),
    "takes white space before markers": _byte_level("gpt-2", lstrip=True),
    "sentencepiece": _sentencepiece(prefix=False, bos=True),
    "sentencepiece, a space before each part": _sentencepiece(prefix=True, bos=True),
    "metaspace, first": _metaspace("first"),
    "metaspace, always": _metaspace("always"),
    "metaspace, never": _metaspace("never"),
}
EXACT = {*vocabularies.CUTTERS}


class _Tokenizers(dict[str, TextTokenizer]):
    def __repr__(self) -> str:
        return "tokenizers"


@pytest.fixture(scope="module")
def tokenizers_by_name(tmp_path_factory: pytest.TempPathFactory) -> _Tokenizers:
    found = _Tokenizers()
    for name, make in TOKENIZERS.items():
        folder = tmp_path_factory.mktemp("tokenizer")
        make(folder)
        found[name] = TextTokenizer.from_directory(folder)
    return found


def _decode(tokenizer: TextTokenizer, ids: list[int]) -> str:
    text = unicodedata.normalize("NFC", tokenizer.decode(ids))
    added = tokenizer.backend.get_added_tokens_decoder().values()
    return "".join(text.split()) if any(token.lstrip or token.rstrip for token in added) else text


def _spans(tokenizer: TextTokenizer, row: EncodedRow, turns: list[tuple[str, str]]) -> list[tuple[int, int]]:
    """Return the tokens of each turn: they begin behind the prompt's own, and end with the stop token of the turn."""
    spans = []
    for index, (prompt, answer) in enumerate(turns):
        ids = tokenizer.encode(prompt)[0]
        assert row.input_ids[: len(ids)] == ids
        behind = len(tokenizer.encode(turns[index + 1][0])[0]) if index + 1 < len(turns) else len(row.input_ids)
        part = row.input_ids[len(ids) : behind]
        stops = [place for place, id_ in enumerate(part) if id_ in tokenizer.ending_ids]
        texts = [_decode(tokenizer, row.input_ids[: len(ids) + stop + 1]) for stop in stops]
        wanted = _decode(tokenizer, tokenizer.encode(prompt + answer)[0])
        count = next(stop + 1 for stop, text in zip(stops, texts, strict=True) if text == wanted)
        spans.append((len(ids), len(ids) + count))
    return spans


@settings(deadline=None)
@given(
    scheme=SCHEMES,
    messages=conversations(),
    name=st.sampled_from(sorted(TOKENIZERS)),
    untrained=st.frozensets(st.integers(0, 5), max_size=2),
)
def test_rows_begin_with_the_tokens_of_their_prompts(
    tokenizers_by_name: _Tokenizers,
    scheme: Scheme,
    messages: list[Message],
    name: str,
    untrained: frozenset[int],
) -> None:
    tokenizer = tokenizers_by_name[name]
    if scheme.joins and scheme.thinks not in ("never", "always"):
        untrained = frozenset()  # the border within a joined turn would move with the next message
    template = ChatTemplate(scheme.jinja(), None, "<|im_end|>")
    whole = "".join(piece.text for piece in scheme.pieces(messages))
    assert template.render(messages) == whole
    turns = scheme.turns(messages, untrained)
    encoded = encode_conversation(template, tokenizer, messages, untrained=untrained)
    assert encoded.split_reason is None or len(encoded.rows) == len(turns)
    if not turns:
        assert [any(row.supervised) for row in encoded.rows] == [False]
        return
    assert len(encoded.rows) in (1, len(turns))
    by_row = [turns] if len(encoded.rows) == 1 else [[turn] for turn in turns]
    for row, own in zip(encoded.rows, by_row, strict=True):
        marked = {position for start, end in _spans(tokenizer, row, own) for position in range(start, end)}
        assert row.supervised == [position in marked and position > 0 for position in range(len(row.input_ids))]
        upto = own[-1][0] + own[-1][1]
        if name in EXACT:
            text = tokenizer.decode(row.input_ids)
            assert text.startswith(upto)
            assert whole.startswith(text) or not text[len(upto) :].removesuffix(scheme.end).strip()
    if not scheme.end or sum(message["role"] == "assistant" for message in messages) == 1:
        _check_unchanged(tokenizer, whole, turns, encoded.rows)
    if len(messages) - 1 not in untrained and len(turns) == len(encoded.rows) and not scheme.joins:
        assert encode_answer(template, tokenizer, messages) == encoded.rows[-1]


def _check_unchanged(
    tokenizer: TextTokenizer, whole: str, turns: list[tuple[str, str]], rows: list[EncodedRow]
) -> None:
    """If one tokenization of the whole has the tokens of all prompts, there is one row with just these."""
    ids = tokenizer.encode(whole)[0]
    prompts = [tokenizer.encode(prompt)[0] for prompt, _ in turns]
    appends = all(whole.startswith(prompt + answer) for prompt, answer in turns)
    if appends and all(ids[: len(prompt)] == prompt for prompt in prompts):
        assert [row.input_ids for row in rows] == [ids]


@settings(deadline=None)
@given(scheme=SCHEMES, messages=conversations(), asked=st.text(max_size=5))
def test_the_prompt_of_a_question_is_what_is_asked_in_use(scheme: Scheme, messages: list[Message], asked: str) -> None:
    messages = [*messages, {"role": "user", "content": asked}]
    template = ChatTemplate(scheme.jinja(), None, "<|im_end|>")
    prompt = template.render(messages, add_generation_prompt=True)
    assert prompt == scheme.prompt(messages)
    ((given_text, _),) = scheme.turns([*messages, {"role": "assistant", "content": "a"}], frozenset(range(99)) - {
        len(messages)
    })  # fmt: skip
    assert given_text == prompt
