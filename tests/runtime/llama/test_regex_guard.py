"""Texts that would end llama.cpp are refused; long texts of words are not."""

from __future__ import annotations

import pytest

from edgetune.runtime.llama.regex_guard import find_overlong_run


@pytest.mark.parametrize("run", ["a", "中", " ", "\n", "=", "क़", "0"])
def test_a_run_of_8192_characters_is_found_only_for_a_regex_pretokenizer(run: str) -> None:
    by_regex = {"tokenizer.ggml.model": "gpt2", "tokenizer.ggml.pre": "tekken"}
    text = "Hello. " + run * 8192
    assert find_overlong_run(by_regex, text) is not None
    assert find_overlong_run(by_regex, "Hello. " + run * 4000) is None
    assert find_overlong_run(by_regex | {"tokenizer.ggml.pre": "qwen2"}, text) is None
    assert find_overlong_run({"tokenizer.ggml.model": "llama"}, text) is None


@pytest.mark.parametrize("text", ["word " * 9000, "中文没有空格，也不短。" * 3000, "x = [1, 2]\n" * 9000])
def test_long_texts_with_spaces_or_punctuation_are_accepted(text: str) -> None:
    assert find_overlong_run({"tokenizer.ggml.model": "gpt2", "tokenizer.ggml.pre": "tekken"}, text) is None


def test_words_without_a_full_stop_are_one_run_for_exaone_moe() -> None:
    """Its expression also matches spaces: 200,000 characters of words without a full stop crashed the process."""
    exaone = {"tokenizer.ggml.model": "gpt2", "tokenizer.ggml.pre": "exaone-moe"}
    assert find_overlong_run(exaone, "word " * 9000) is not None
    assert find_overlong_run(exaone, "words and a stop. " * 9000) is None
