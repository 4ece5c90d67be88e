"""Tokenizer files that are cut short, with bits flipped, or with one value replaced: an error of ours, or right ids."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers import Tokenizer

from edgetune_converters import gguf
from edgetune_converters.errors import EdgetuneError
from edgetune_converters.gguf.values import string
from edgetune_converters.gguf.writer import GgufWriter
from edgetune_converters.tokenizers import convert as tokenizers
from edgetune_converters.tokenizers.normalization import Normalization
from tests.converters import runtime, sentencepiece_files, vocabularies
from tests.profiles import scaled

_FILES = ("tokenizer.json", "tokenizer_config.json", "generation_config.json")
_TEXTS = ("Hello, world! 12345\n\n  x", "把卧室的灯 🙂 \x00", "<|im_end|> a<tool>b")
_KINDS: dict[str, Callable[[Path], Any]] = {
    "bytes": vocabularies.byte_level,
    "pieces": lambda directory: vocabularies.sentencepiece(directory, prefix=True, bos=True),
    "unigram": vocabularies.unigram,
}
_ANYTHING = st.recursive(
    st.none() | st.booleans() | st.integers(-5, 10**12) | st.floats() | st.text(max_size=4)
    | st.sampled_from(["BPE", "Unigram", "ByteLevel", "Metaspace", "Sequence", "\u2581", "</s>", "first", "<0x0A>"]),
    lambda inner: st.lists(inner, max_size=3)
    | st.dictionaries(st.sampled_from(["type", "content", "pattern", "Regex", "id", "normalizers"]), inner, max_size=3),
    max_leaves=5,
)  # fmt: skip


@pytest.fixture(scope="module", params=_KINDS)
def whole(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    directory = tmp_path_factory.mktemp(str(request.param))
    _KINDS[request.param](directory)
    (directory / "generation_config.json").write_text(json.dumps({"eos_token_id": [1, 2]}))
    return directory


def _convert(directory: Path) -> None:
    """What comes of it must be an error of ours, or a file with the ids of the tokenizer."""
    try:
        vocabulary = tokenizers.convert_tokenizer(directory, 600, {"eos_token_id": 2})
        path = directory / "vocab.gguf"
        with GgufWriter.open(path, {"general.architecture": string("llama")} | vocabulary.metadata, []) as writer:
            writer.publish()
    except EdgetuneError as error:
        assert error.message  # noqa: PT017 - either outcome is right
        return
    if any("cuts" in note for note in vocabulary.notes):
        return
    tokenizer = Tokenizer.from_file(str(directory / "tokenizer.json"))
    tokenizer.no_truncation()
    tokenizer.no_padding()
    prepare = Normalization.from_metadata(gguf.read(path).metadata).apply
    found = runtime.token_ids(path, [prepare(text) for text in _TEXTS])
    assert found == [tokenizer.encode(text, add_special_tokens=False).ids for text in _TEXTS]


def _damaged(whole: Path, tmp_path_factory: pytest.TempPathFactory, name: str, content: bytes) -> Path:
    directory = tmp_path_factory.mktemp("damaged")
    for file in _FILES:
        shutil.copy(whole / file, directory / file)
    (directory / name).write_bytes(content)
    return directory


@settings(max_examples=scaled(0.5))
@given(name=st.sampled_from(_FILES), at=st.floats(0, 1))
def test_truncated_files_are_an_error_or_harmless(
    name: str, at: float, whole: Path, tmp_path_factory: pytest.TempPathFactory
) -> None:
    content = (whole / name).read_bytes()
    _convert(_damaged(whole, tmp_path_factory, name, content[: int(at * (len(content) - 1))]))


@settings(max_examples=scaled(0.5))
@given(
    name=st.sampled_from(_FILES),
    flips=st.lists(st.tuples(st.integers(0, 10**9), st.integers(0, 7)), min_size=1, max_size=3),
)
def test_flipped_bits_are_an_error_or_harmless(
    name: str, flips: list[tuple[int, int]], whole: Path, tmp_path_factory: pytest.TempPathFactory
) -> None:
    content = bytearray((whole / name).read_bytes())
    for at, bit in flips:
        content[at % len(content)] ^= 1 << bit
    _convert(_damaged(whole, tmp_path_factory, name, bytes(content)))


@settings(max_examples=scaled(0.5))
@given(name=st.sampled_from(_FILES), new=_ANYTHING, choices=st.lists(st.integers(0, 10**6), min_size=1, max_size=5))
def test_one_value_may_be_anything(
    name: str, new: Any, choices: list[int], whole: Path, tmp_path_factory: pytest.TempPathFactory
) -> None:
    loaded = json.loads((whole / name).read_text(encoding="utf-8"))
    content = json.dumps(_replace(loaded, new, choices)).encode()
    _convert(_damaged(whole, tmp_path_factory, name, content))


def _replace(value: Any, new: Any, choices: list[int]) -> Any:
    """`value` with the part that `choices` lead to replaced by `new`."""
    if not value or not isinstance(value, dict | list) or not choices:
        return new
    keys = sorted(value) if isinstance(value, dict) else list(range(len(value)))
    copy = value.copy()
    chosen = keys[choices[0] % len(keys)]
    copy[chosen] = _replace(value[chosen], new, choices[1:])
    return copy


@settings(max_examples=scaled(0.5))
@given(at=st.integers(0, 10**9), bit=st.integers(0, 7), cut=st.none() | st.floats(0, 1))
def test_a_damaged_sentencepiece_model(
    at: int, bit: int, cut: float | None, tmp_path_factory: pytest.TempPathFactory
) -> None:
    content = bytearray(sentencepiece_files.bpe())
    content[at % len(content)] ^= 1 << bit
    directory = tmp_path_factory.mktemp("damaged")
    (directory / "tokenizer.model").write_bytes(content if cut is None else content[: int(cut * len(content))])
    (directory / "tokenizer_config.json").write_text(json.dumps({"eos_token": "</s>"}))
    try:
        tokenizers.convert_tokenizer(directory, 600, {})
    except EdgetuneError as error:
        assert error.message  # noqa: PT017 - either outcome is right
