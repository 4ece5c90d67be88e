"""Directories with only a SentencePiece model."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from edgetune_converters import gguf
from edgetune_converters.errors import TokenizerError
from edgetune_converters.gguf.values import string
from edgetune_converters.gguf.writer import GgufWriter
from edgetune_converters.tokenizers import convert as tokenizers
from edgetune_converters.tokenizers.convert import TokenType
from edgetune_converters.tokenizers.normalization import Normalization
from tests.converters import runtime, sentencepiece_files

_CONFIG = {"bos_token": "<s>", "eos_token": "</s>", "unk_token": "<unk>"}


def _written(directory: Path, content: bytes, name: str = "tokenizer.model", **config: object) -> Path:
    (directory / name).write_bytes(content)
    (directory / "tokenizer_config.json").write_text(json.dumps(_CONFIG | config))
    vocabulary = tokenizers.convert_tokenizer(directory, 400, {})
    path = directory / "vocab.gguf"
    with GgufWriter.open(path, {"general.architecture": string("llama")} | vocabulary.metadata, []) as writer:
        writer.publish()
    return path


def _texts(path: Path, text: str, *, special: bool = True) -> list[str]:
    tokens = gguf.read(path).metadata["tokenizer.ggml.tokens"]
    assert isinstance(tokens, list)
    prepared = Normalization.from_metadata(gguf.read(path).metadata).apply(text)
    return [str(tokens[id_]) for id_ in runtime.token_ids(path, [prepared], special=special)[0]]


def test_a_bpe_model_is_converted(tmp_path: Path) -> None:
    path = _written(tmp_path, sentencepiece_files.bpe())
    found = gguf.read(path).metadata
    assert (found["tokenizer.ggml.model"], found["tokenizer.ggml.add_space_prefix"]) == ("llama", True)
    assert _texts(path, "the cat") == ["<s>", "▁the", "▁cat"]
    assert _texts(path, "猫 x<tool>") == ["<s>", "▁猫", "▁", "<0x78>", "<tool>"]
    types = found["tokenizer.ggml.token_type"]
    tokens = found["tokenizer.ggml.tokens"]
    assert isinstance(types, list)
    assert isinstance(tokens, list)
    assert types[:4] == [TokenType.UNKNOWN, TokenType.CONTROL, TokenType.CONTROL, TokenType.BYTE]
    assert types[[str(token) for token in tokens].index("<tool>")] == TokenType.USER_DEFINED
    assert types[-1] == TokenType.UNUSED


def test_a_model_without_a_prefix_space_is_converted(tmp_path: Path) -> None:
    path = _written(tmp_path, sentencepiece_files.bpe(prefix=False), add_bos_token=False, add_eos_token=True)
    assert _texts(path, "the cat") == ["the", "▁cat", "</s>"]


def test_a_unigram_model_is_converted(tmp_path: Path) -> None:
    path = _written(tmp_path, sentencepiece_files.unigram(), "spiece.model", add_bos_token=False, add_eos_token=True)
    assert gguf.read(path).metadata["tokenizer.ggml.model"] == "t5"
    assert _texts(path, "the  running ☃ cat ") == ["▁the", "▁running", "▁", "<unk>", "▁cat", "</s>"]


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"", "of a kind that is not read here"),
        (b"\x0a\xff", "is not a SentencePiece model: it ends in the middle"),
        (b"\x0b", "a field has the wire type 3"),
        (sentencepiece_files.model([("a", 0, 1)], 4), "of a kind that is not read here"),
        (sentencepiece_files.model([("a", 0, 1)], 2, charsmap=b"xxxx"), "normalizes text, which llama.cpp does not do"),
    ],
)
def test_models_that_cannot_be_converted_are_refused(content: bytes, message: str, tmp_path: Path) -> None:
    with pytest.raises(TokenizerError, match=message):
        _written(tmp_path, content)
