"""Added tokens of every kind, special ids, stop tokens, and BOS and EOS."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from tokenizers import AddedToken, Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers, processors

from edgetune_converters import gguf
from edgetune_converters.errors import TokenizerError
from edgetune_converters.gguf.values import string
from edgetune_converters.gguf.writer import GgufWriter
from edgetune_converters.tokenizers import convert as tokenizers
from edgetune_converters.tokenizers.convert import TokenType, Vocabulary
from edgetune_converters.tokenizers.normalization import Normalization
from tests.converters import corpus, runtime, vocabularies

_AROUND = ("a{0}b", "a {0} b", "a  {0}\n\n b{0}", "{0}", " {0} ", "{0}{0}x", "\t{0}\ty{0}", "x{0}\u3000z")


def _written(directory: Path, rows: int = 600, **options: Any) -> tuple[Path, Vocabulary, Normalization]:
    """The vocabulary of `directory` in a file, and what the runtime would do to a text for it."""
    vocabulary = tokenizers.convert_tokenizer(directory, rows, {}, **options)
    path = directory / "vocab.gguf"
    with GgufWriter.open(path, {"general.architecture": string("llama")} | vocabulary.metadata, []) as writer:
        writer.publish()
    return path, vocabulary, Normalization.from_metadata(gguf.read(path).metadata)


def _assert_same(directory: Path, texts: list[str]) -> Vocabulary:
    path, vocabulary, normalization = _written(directory)
    tokenizer = Tokenizer.from_file(str(directory / "tokenizer.json"))
    expected = [encoding.ids for encoding in tokenizer.encode_batch(texts, add_special_tokens=False)]
    assert runtime.token_ids(path, [normalization.apply(text) for text in texts]) == expected
    return vocabulary


@pytest.mark.parametrize("special", [False, True])
@pytest.mark.parametrize("normalized", [False, True])
@pytest.mark.parametrize("sides", [(), ("lstrip",), ("rstrip",), ("lstrip", "rstrip")])
@pytest.mark.parametrize("make", [vocabularies.byte_level, vocabularies.sentencepiece], ids=["bytes", "pieces"])
def test_added_tokens_give_the_ids_of_the_tokenizer(
    make: Any, sides: tuple[str, ...], normalized: bool, special: bool, tmp_path: Path
) -> None:
    tokenizer = make(tmp_path)
    added = AddedToken("<<x>>", normalized=normalized, special=special, **dict.fromkeys(sides, True))
    (tokenizer.add_special_tokens if special else tokenizer.add_tokens)([added])
    tokenizer.save(str(tmp_path / "tokenizer.json"))
    marks_first = normalized and sides and make is vocabularies.sentencepiece
    around = [text for text in _AROUND if not marks_first or not {"\n", "\t", "\u3000"} & set(text)]
    vocabulary = _assert_same(tmp_path, [*corpus.TEXTS, *(text.format("<<x>>") for text in around)])
    assert any("it leaves the line ends next to" in note for note in vocabulary.notes) == bool(marks_first)
    types = vocabulary.metadata["tokenizer.ggml.token_type"].data
    assert isinstance(types, list)
    kind = TokenType.CONTROL if special else TokenType.USER_DEFINED
    assert types[tokenizer.token_to_id("<<x>>")] == kind
    for side in sides:
        assert any(f"'<<x>>' have {side}" in note for note in vocabulary.notes)


def test_a_token_that_is_a_single_word_is_noted_with_an_example(tmp_path: Path) -> None:
    tokenizer = vocabularies.byte_level(tmp_path)
    tokenizer.add_tokens([AddedToken("wxyz", single_word=True)])
    tokenizer.save(str(tmp_path / "tokenizer.json"))
    notes = tokenizers.convert_tokenizer(tmp_path, 600, {}).notes
    assert any("it takes 'wxyz' inside of words too; the first 'onewxyztwo" in note for note in notes)


def test_runs_of_spaces_as_added_tokens_give_the_ids_of_the_tokenizer(tmp_path: Path) -> None:
    """GPT-NeoX and MPT have runs of spaces as added tokens that are not special."""
    tokenizer = vocabularies.byte_level(tmp_path, "gpt-2")
    tokenizer.add_tokens([AddedToken(" " * width, normalized=True) for width in range(2, 9)])
    tokenizer.save(str(tmp_path / "tokenizer.json"))
    _assert_same(tmp_path, [*corpus.TEXTS, *(f"a{' ' * width}b" for width in range(30))])


def test_runs_of_marks_are_normal_tokens(tmp_path: Path) -> None:
    """Gemma has them both as merged tokens and as added ones that no text contains."""
    tokenizer = vocabularies.sentencepiece(tmp_path)
    marks = "\u2581" * 2
    loaded = json.loads(tokenizer.to_str())
    loaded["model"]["vocab"][marks] = tokenizer.get_vocab_size()
    loaded["model"]["merges"].insert(0, ["\u2581", "\u2581"])
    tokenizer = Tokenizer.from_str(json.dumps(loaded))
    tokenizer.add_tokens([AddedToken(marks, normalized=False)])
    tokenizer.save(str(tmp_path / "tokenizer.json"))
    vocabulary = _assert_same(tmp_path, list(corpus.TEXTS))
    types = vocabulary.metadata["tokenizer.ggml.token_type"].data
    assert isinstance(types, list)
    assert types[tokenizer.get_vocab()[marks]] == TokenType.NORMAL


def test_one_id_with_two_texts_is_the_byte(tmp_path: Path) -> None:
    """Gemma's tab is the byte <0x09> too."""
    vocabularies.sentencepiece(tmp_path)
    path = tmp_path / "tokenizer.json"
    loaded = json.loads(path.read_text(encoding="utf-8"))
    loaded["model"]["vocab"]["\t"] = loaded["model"]["vocab"]["<0x09>"]
    path.write_text(json.dumps(loaded), encoding="utf-8")
    _assert_same(tmp_path, list(corpus.TEXTS))


def test_a_plain_token_that_llama_cpp_treats_as_special_is_renamed(tmp_path: Path) -> None:
    """Qwen has </s> as a token that no text is ever cut into; llama.cpp would cut HTML at it and stop there."""
    tokenizer = vocabularies.byte_level(tmp_path)
    path = tmp_path / "tokenizer.json"
    loaded = json.loads(path.read_text(encoding="utf-8"))
    number = tokenizer.get_vocab_size() - 3 - 1
    text = next(text for text, id_ in loaded["model"]["vocab"].items() if id_ == number)
    loaded["model"]["vocab"]["</s>"] = loaded["model"]["vocab"].pop(text)
    loaded["model"]["merges"] = [pair for pair in loaded["model"]["merges"] if "".join(pair) != text]
    path.write_text(json.dumps(loaded), encoding="utf-8")
    vocabulary = _assert_same(tmp_path, ["<s>struck</s> out", "</s>", "a</s>"])
    tokens = vocabulary.metadata["tokenizer.ggml.tokens"].data
    assert isinstance(tokens, list)
    assert tokens[number] == f"[UNREACHABLE{number}]"


# -- spaces before a text ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("scheme", ["always", "first", "never"])
@pytest.mark.parametrize("bos", [False, True])
def test_metaspace_gives_the_ids_of_the_tokenizer(scheme: str, bos: bool, tmp_path: Path) -> None:
    """As transformers 5 saves Llama's tokenizers."""
    tokenizer = vocabularies.sentencepiece(tmp_path, bos=bos)
    tokenizer.normalizer = normalizers.Sequence([])
    tokenizer.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme=scheme, split=False)
    tokenizer.save(str(tmp_path / "tokenizer.json"))
    texts = [*corpus.TEXTS, "<s>a</s> b", "x</s>y", "  <s> a"]
    vocabulary = _assert_same(tmp_path, [text for text in texts if scheme != "always" or text != " "])
    assert any("no single space" in note for note in vocabulary.notes) == (scheme == "always")


def test_a_byte_level_prefix_space_gives_the_ids_of_the_tokenizer(tmp_path: Path) -> None:
    tokenizer = vocabularies.byte_level(tmp_path, "gpt-2")
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=True)
    tokenizer.save(str(tmp_path / "tokenizer.json"))
    vocabulary = _assert_same(tmp_path, [*corpus.TEXTS, "a<tool>b <tool> c", "<|im_start|>user"])
    assert any("puts a space before a text" in note for note in vocabulary.notes)


# -- stop tokens -------------------------------------------------------------------------------------------------------


def test_the_end_of_a_turn_is_taken_from_the_template(tmp_path: Path) -> None:
    tokenizer = vocabularies.byte_level(tmp_path)
    tokenizer.add_special_tokens(["<over>"])
    template = "{% for m in messages %}{{ m.role }}: {{ m.content }}\n<over>\n{% endfor %}"
    vocabularies.save(tokenizer, tmp_path, eos_token="<|endoftext|>", chat_template=template)
    _, vocabulary, _ = _written(tmp_path)
    assert vocabulary.metadata["tokenizer.ggml.eot_token_id"].data == tokenizer.token_to_id("<over>")
    assert not any("no place" in note for note in vocabulary.notes)


@pytest.mark.parametrize("template", ["{{ 1 / 0 }}", "{% broken", "{{ messages[0].content }}", "{{ raise('no') }}", ""])
def test_a_template_without_an_end_of_turn_changes_nothing(template: str, tmp_path: Path) -> None:
    vocabularies.byte_level(tmp_path, chat_template=template)
    assert "tokenizer.ggml.eot_token_id" not in tokenizers.convert_tokenizer(tmp_path, 600, {}).metadata


def test_every_stop_token_stops_or_is_noted(tmp_path: Path) -> None:
    tokenizer = vocabularies.byte_level(tmp_path)
    tokenizer.add_special_tokens([f"<stop{number}>" for number in range(4)])
    tokenizer.save(str(tmp_path / "tokenizer.json"))
    stops = [tokenizer.token_to_id(f"<stop{number}>") for number in range(4)]
    (tmp_path / "generation_config.json").write_text(json.dumps({"eos_token_id": [501, *stops]}))
    vocabulary = tokenizers.convert_tokenizer(tmp_path, 600, {})
    assert [vocabulary.metadata[f"tokenizer.ggml.{key}_token_id"].data for key in ("eot", "eom")] == stops[:2]
    assert any(f"the stop tokens {stops[2:]} have no place in GGUF" in note for note in vocabulary.notes)


# -- BOS and EOS -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("put", [False, True])
@pytest.mark.parametrize("stated", [None, False, True])
def test_a_contradiction_about_bos_is_resolved_as_in_training(put: bool, stated: bool | None, tmp_path: Path) -> None:
    """tokenizer_config.json has the last word in transformers, and so in edgetune's training."""
    vocabularies.sentencepiece(tmp_path, bos=put)
    config = {"bos_token": "<s>", "eos_token": "</s>"} | ({} if stated is None else {"add_bos_token": stated})
    (tmp_path / "tokenizer_config.json").write_text(json.dumps(config))
    vocabulary = tokenizers.convert_tokenizer(tmp_path, 600, {})
    assert vocabulary.metadata["tokenizer.ggml.add_bos_token"].data is (put if stated is None else stated)
    assert any("which takes precedence" in note for note in vocabulary.notes) == (stated not in (None, put))


def test_other_tokens_at_the_ends_are_refused(tmp_path: Path) -> None:
    tokenizer = vocabularies.sentencepiece(tmp_path)
    tokenizer.post_processor = processors.TemplateProcessing(single="<unk> $A", special_tokens=[("<unk>", 0)])
    tokenizer.save(str(tmp_path / "tokenizer.json"))
    with pytest.raises(
        TokenizerError, match=r"adds \[0\] before and \[\] after a text; llama.cpp adds only BOS and EOS"
    ):
        tokenizers.convert_tokenizer(tmp_path, 600, {})


def test_an_unknown_pre_tokenizer_is_shown_in_the_message(tmp_path: Path) -> None:
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [pre_tokenizers.Split(Regex("abc+"), "isolated"), pre_tokenizers.ByteLevel(use_regex=False)]
    )
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.add_special_tokens(["<eos>"])
    vocabularies.save(tokenizer, tmp_path, eos_token="<eos>")
    with pytest.raises(TokenizerError, match=r"(?s)no pre-tokenizer of llama.cpp.*1\. abc\+") as caught:
        tokenizers.convert_tokenizer(tmp_path, 600, {})
    assert "Known: gpt-2, smollm" in str(caught.value.hint)
