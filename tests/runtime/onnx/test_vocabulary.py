"""The words of an ONNX folder are those that llama.cpp reads from the converted tokenizer."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest

from edgetune.runtime.llama.vocabulary import LlamaVocabulary
from edgetune.runtime.llama_library import library
from edgetune.runtime.onnx.vocabulary import OnnxVocabulary
from edgetune_converters.gguf.values import string
from edgetune_converters.gguf.writer import GgufWriter
from edgetune_converters.tokenizers import convert as tokenizers
from tests.converters import vocabularies

SIZE = 620
TEXTS = ("dim the lights", "  two  spaces\n\nand lines\t", "把卧室的灯调暗 👍🏽 e\u0301", "", "</s>", "<s>twice")


@contextmanager
def converted(directory: Path) -> Iterator[LlamaVocabulary]:
    path = directory / "vocabulary.gguf"
    words = tokenizers.convert_tokenizer(directory, SIZE, {}).metadata
    with GgufWriter.open(path, {"general.architecture": string("llama")} | words, []) as writer:
        writer.publish()
    parameters = library().llama_model_default_params()
    parameters.vocab_only = True
    model = library().llama_model_load_from_file(str(path).encode(), parameters)
    yield LlamaVocabulary(library(), model)
    library().llama_model_free(model)


@pytest.mark.parametrize("make", [vocabularies.byte_level, vocabularies.sentencepiece])
def test_bytes_and_ids_are_those_of_llama_cpp(make: Callable[[Path], Any], tmp_path: Path) -> None:
    make(tmp_path)
    ours = OnnxVocabulary(tmp_path, SIZE)
    with converted(tmp_path) as theirs:
        for special in (False, True):
            found, expected = ([w.token_bytes(i, special=special) for i in range(SIZE)] for w in (ours, theirs))
            assert [(i, a, b) for i, (a, b) in enumerate(zip(found, expected, strict=True)) if a != b] == []
        assert [ours.tokenize(text) for text in TEXTS] == [theirs.tokenize(text) for text in TEXTS]
        assert ours.stop_tokens <= theirs.stop_tokens


def test_bos_is_added_once(tmp_path: Path) -> None:
    vocabularies.sentencepiece(tmp_path)
    config = json.loads((tmp_path / "tokenizer_config.json").read_text(encoding="utf-8"))
    (tmp_path / "tokenizer_config.json").write_text(json.dumps({**config, "add_bos_token": True}), encoding="utf-8")
    words = OnnxVocabulary(tmp_path, SIZE)
    assert words.bos is not None
    for text in ("hello", "<s>hello"):
        assert words.tokenize(text).count(words.bos) == 1
        assert words.tokenize(text)[0] == words.bos


def test_a_run_of_spaces_may_be_a_token_of_its_own(tmp_path: Path) -> None:
    """Gemma's added tokens are written with SentencePiece's marks."""
    vocabularies.sentencepiece(tmp_path)
    stored = json.loads((tmp_path / "tokenizer.json").read_text(encoding="utf-8"))
    flags = dict.fromkeys(("special", "lstrip", "rstrip", "single_word", "normalized"), False)
    stored["added_tokens"].append({"id": 610, "content": "\u2581\u2581\u2581", **flags})
    stored["model"]["vocab"] |= {f"filler{i}": i for i in range(len(stored["model"]["vocab"]), 610)}
    (tmp_path / "tokenizer.json").write_text(json.dumps(stored), encoding="utf-8")
    assert OnnxVocabulary(tmp_path, SIZE).token_bytes(610) == b"   "
