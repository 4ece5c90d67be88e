"""Token ids of the exported vocabulary in llama.cpp are those of the Hugging Face tokenizer, on nasty text."""

from __future__ import annotations

import json
import unicodedata
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from tokenizers import Tokenizer

from edgetune_converters import gguf
from edgetune_converters.errors import TokenizerError
from edgetune_converters.gguf.layout import TensorSpec
from edgetune_converters.gguf.values import string
from edgetune_converters.gguf.writer import GgufWriter
from edgetune_converters.tokenizers import convert as tokenizers
from edgetune_converters.tokenizers import pretokenizers
from edgetune_converters.tokenizers.convert import TokenType, Vocabulary
from edgetune_converters.tokenizers.normalization import Normalization
from edgetune_converters.tokenizers.special import special_token_ids
from tests.converters import corpus, runtime, vocabularies

NONE: list[TensorSpec] = []


def _file(directory: Path, rows: int = 600, **options: Any) -> tuple[Path, Vocabulary]:
    """A GGUF file with the vocabulary of `directory` and no tensors."""
    vocabulary = tokenizers.convert_tokenizer(directory, rows, {}, **options)
    path = directory / "vocab.gguf"
    with GgufWriter.open(path, {"general.architecture": string("llama")} | vocabulary.metadata, NONE) as writer:
        writer.verify()
        writer.publish()
    return path, vocabulary


def _hf_ids(tokenizer: Any, *, special: bool = False) -> list[list[int]]:
    return [tokenizer.encode(text, add_special_tokens=special).ids for text in corpus.TEXTS]


def _metadata(path: Path) -> dict[str, Any]:
    return dict(gguf.read(path).metadata)


@pytest.mark.parametrize("cutter", vocabularies.CUTTERS)
def test_byte_level_ids_are_the_same(cutter: str, tmp_path: Path) -> None:
    tokenizer = vocabularies.byte_level(tmp_path, cutter)
    path, vocabulary = _file(tmp_path)
    assert (vocabulary.model, vocabulary.pre) == ("gpt2", cutter)
    assert runtime.token_ids(path, corpus.TEXTS) == _hf_ids(tokenizer)


# llama.cpp's regular expressions of these do not do all that the tokenizers do
_INEXACT = {
    "tekken": 6,
    "gpt-4o": 1,
    "granite-embed-multi-97m": 1,
    "kimi-k2": 5,
    "deepseek-llm": 1,
    "deepseek-coder": 1,
}
_STEPS = [pytest.param(row, id=f"{row.name}-{len(row.steps[-1])}") for row in pretokenizers.TABLE]


@pytest.mark.parametrize("row", _STEPS)
def test_every_pre_tokenizer_of_the_table(row: pretokenizers.PreTokenizerRow, tmp_path: Path) -> None:
    """Trained on the corpus that it is proven on, so that every cut in it shows in the ids."""
    tokenizer = vocabularies.cut_by(tmp_path, row)
    path, vocabulary = _file(tmp_path, 3000)
    same = {other.name for other in pretokenizers.TABLE if other.steps == row.steps}
    assert vocabulary.pre in same
    wrong = [a for a, b in zip(runtime.token_ids(path, corpus.TEXTS), _hf_ids(tokenizer), strict=True) if a != b]
    assert len(wrong) <= _INEXACT.get(row.name, 0)
    assert any("cuts" in note for note in vocabulary.notes) == bool(wrong)


def test_unigram_ids_are_the_same(tmp_path: Path) -> None:
    tokenizer = vocabularies.unigram(tmp_path)
    path, vocabulary = _file(tmp_path)
    assert vocabulary.model == "t5"
    prepare = Normalization.from_metadata(_metadata(path)).apply
    texts = [prepare(text) for text in corpus.TEXTS]
    assert runtime.token_ids(path, texts, special=True) == _hf_ids(tokenizer, special=True)
    found = _metadata(path)
    assert found["tokenizer.ggml.unknown_token_id"] == 2
    assert found["tokenizer.ggml.add_eos_token"] is True


def test_unigram_with_bytes_is_refused(tmp_path: Path) -> None:
    vocabularies.unigram(tmp_path, byte_fallback=True)
    with pytest.raises(TokenizerError, match="falls back to bytes"):
        tokenizers.convert_tokenizer(tmp_path, 600, {})


@pytest.mark.parametrize("prefix", [False, True])
@pytest.mark.parametrize("bos", [False, True])
def test_sentencepiece_ids_are_the_same(prefix: bool, bos: bool, tmp_path: Path) -> None:
    tokenizer = vocabularies.sentencepiece(tmp_path, prefix=prefix, bos=bos)
    path, vocabulary = _file(tmp_path)
    assert vocabulary.model == "llama"
    assert runtime.token_ids(path, corpus.TEXTS, special=True) == _hf_ids(tokenizer, special=True)
    assert _metadata(path)["tokenizer.ggml.add_bos_token"] is bos


def test_token_types_and_padding_rows(tmp_path: Path) -> None:
    tokenizer = vocabularies.byte_level(tmp_path)
    path, _ = _file(tmp_path, rows=509)
    found = _metadata(path)
    texts, types = found["tokenizer.ggml.tokens"], found["tokenizer.ggml.token_type"]
    kinds = dict(zip(texts, types, strict=True))
    assert kinds["<|im_end|>"] == TokenType.CONTROL
    assert kinds["<tool>"] == TokenType.USER_DEFINED
    assert kinds["a"] == TokenType.NORMAL
    assert len(texts) == 509
    assert texts[-1] == "[PAD508]"
    assert types[tokenizer.get_vocab_size() :] == [TokenType.UNUSED] * (509 - tokenizer.get_vocab_size())


def test_sentencepiece_token_types(tmp_path: Path) -> None:
    vocabularies.sentencepiece(tmp_path)
    path, _ = _file(tmp_path, rows=500)
    found = _metadata(path)["tokenizer.ggml.token_type"]
    assert found[:3] == [TokenType.UNKNOWN, TokenType.CONTROL, TokenType.CONTROL]
    assert found[3:259] == [TokenType.BYTE] * 256
    assert set(found[259:-1]) <= {TokenType.NORMAL, TokenType.UNUSED}


def test_a_tokenizer_larger_than_the_embedding_is_refused(tmp_path: Path) -> None:
    vocabularies.byte_level(tmp_path)
    with pytest.raises(TokenizerError, match=r"has 503 tokens, the model only 400 rows"):
        tokenizers.convert_tokenizer(tmp_path, 400, {})


# -- special tokens ----------------------------------------------------------------------------------------------------


def test_special_ids_by_text_as_transformers_4_and_5_write_them(tmp_path: Path) -> None:
    vocabularies.byte_level(tmp_path, pad_token={"content": "<|endoftext|>", "special": True}, bos_token=None)
    path, _ = _file(tmp_path)
    found = _metadata(path)
    assert found["tokenizer.ggml.eos_token_id"] == 501
    assert found["tokenizer.ggml.padding_token_id"] == 0
    assert "tokenizer.ggml.bos_token_id" not in found
    assert found["tokenizer.ggml.add_bos_token"] is False


def test_special_ids_by_number_from_the_model_config(tmp_path: Path) -> None:
    vocabularies.byte_level(tmp_path, eos_token=None)
    found = tokenizers.convert_tokenizer(tmp_path, 600, {"bos_token_id": 7, "eos_token_id": [501, 0]}).metadata
    assert (found["tokenizer.ggml.bos_token_id"].data, found["tokenizer.ggml.eos_token_id"].data) == (7, 501)


def test_stop_tokens_of_the_generation_config_reach_the_file(tmp_path: Path) -> None:
    tokenizer = vocabularies.byte_level(tmp_path)
    stop = tokenizer.token_to_id("<tool>")
    (tmp_path / "generation_config.json").write_text(json.dumps({"eos_token_id": [501, 0, stop]}))
    assert tokenizers.convert_tokenizer(tmp_path, 600, {}).metadata["tokenizer.ggml.eot_token_id"].data == stop


def test_no_end_of_sequence_token_is_refused(tmp_path: Path) -> None:
    vocabularies.byte_level(tmp_path, eos_token=None)
    with pytest.raises(TokenizerError, match="names no end-of-sequence token"):
        tokenizers.convert_tokenizer(tmp_path, 600, {})


def test_added_tokens_decoder_alone_is_enough(tmp_path: Path) -> None:
    tokenizer = vocabularies.byte_level(tmp_path)
    number = tokenizer.get_vocab_size()
    decoder = {str(number): {"content": "<|extra|>", "special": True, "lstrip": False}}
    vocabularies.save(tokenizer, tmp_path, eos_token="<|im_end|>", added_tokens_decoder=decoder)
    found = tokenizers.convert_tokenizer(tmp_path, 600, {}).metadata
    tokens, types = found["tokenizer.ggml.tokens"].data, found["tokenizer.ggml.token_type"].data
    assert isinstance(tokens, list)
    assert isinstance(types, list)
    assert (tokens[number], types[number]) == ("<|extra|>", TokenType.CONTROL)


# -- chat templates ----------------------------------------------------------------------------------------------------


def test_the_chat_template_is_carried_and_can_be_replaced(tmp_path: Path) -> None:
    vocabularies.byte_level(tmp_path)
    key = "tokenizer.chat_template"
    assert tokenizers.convert_tokenizer(tmp_path, 600, {}).metadata[key].data == vocabularies.TEMPLATE
    (tmp_path / "chat_template.jinja").write_text("from the file")
    assert tokenizers.convert_tokenizer(tmp_path, 600, {}).metadata[key].data == "from the file"
    assert tokenizers.convert_tokenizer(tmp_path, 600, {}, chat_template="mine").metadata[key].data == "mine"


def test_several_templates_keep_their_names(tmp_path: Path) -> None:
    named = [{"name": "default", "template": "a"}, {"name": "tool_use", "template": "b"}]
    vocabularies.byte_level(tmp_path, chat_template=named)
    found = tokenizers.convert_tokenizer(tmp_path, 600, {}).metadata
    assert found["tokenizer.chat_template"].data == "a"
    assert found["tokenizer.chat_template.tool_use"].data == "b"
    assert found["tokenizer.chat_templates"].data == ["tool_use"]


_MARKED = (
    "{% for m in messages %}<|im_start|>{{ m.role }}\n{% generation %}{{ m.content }}<|im_end|>{% endgeneration %}\n"
    "{% endfor %}"
)
_DATED = "{{ strftime_now('%d %B %Y') }}" + vocabularies.TEMPLATE
_STRICT = "{% if messages[0].role == 'system' %}{{ raise_exception('no system') }}{% endif %}" + vocabularies.TEMPLATE


@pytest.mark.parametrize("template", [vocabularies.TEMPLATE, _MARKED, _DATED, _STRICT])
def test_the_end_of_a_turn_is_found_whatever_the_template_uses(template: str, tmp_path: Path) -> None:
    """`{% generation %}`, `strftime_now` and `raise_exception` are known to transformers, not to plain Jinja."""
    tokenizer = vocabularies.byte_level(tmp_path, eos_token="<|endoftext|>", chat_template=template)
    stop = tokenizer.token_to_id("<|im_end|>")
    vocabulary = tokenizers.convert_tokenizer(tmp_path, 600, {})
    assert vocabulary.metadata["tokenizer.ggml.eot_token_id"].data == stop
    assert not any("chat template" in note for note in vocabulary.notes)
    found = special_token_ids(tmp_path, {}, None, 600)
    assert found.stops == (tokenizer.token_to_id("<|endoftext|>"), stop)
    assert not found.notes


def test_the_end_of_a_turn_may_be_a_token_of_the_tokenizer_class(tmp_path: Path) -> None:
    """As in training: transformers' class supplies eos_token where the files name none."""
    template = "{% for m in messages %}{{ m.content }}{{ eos_token }}{% endfor %}"
    tokenizer = vocabularies.byte_level(tmp_path, tokenizer_class="GPT2TokenizerFast", chat_template=template)
    path = tmp_path / "tokenizer_config.json"
    stated = json.loads(path.read_text(encoding="utf-8"))
    del stated["eos_token"]
    path.write_text(json.dumps(stated), encoding="utf-8")
    found = special_token_ids(tmp_path, {"eos_token_id": 7}, None, 600)
    assert found.stops == (7, tokenizer.token_to_id("<|endoftext|>"))


@pytest.mark.parametrize(
    ("template", "reason"),
    [
        ("{% for %}", "line 1: Expected an expression"),
        ("{{ raise_exception('only tools') }}", "only tools"),
        ("{{ messages[0].content.nothing.more }}", "has no attribute"),
        ("{{ 1 / 0 }}", "division by zero"),
        ("{{ ''.__class__.__mro__ }}", "unsafe"),
    ],
)
def test_a_template_that_cannot_be_rendered_is_noted(template: str, reason: str, tmp_path: Path) -> None:
    vocabularies.byte_level(tmp_path, eos_token="<|endoftext|>", chat_template=template)
    vocabulary = tokenizers.convert_tokenizer(tmp_path, 600, {})
    assert vocabulary.metadata["tokenizer.chat_template"].data == template
    assert "tokenizer.ggml.eot_token_id" not in vocabulary.metadata
    for notes in (vocabulary.notes, special_token_ids(tmp_path, {}, None, 600).notes):
        (note,) = (note for note in notes if "the chat template does not render" in note)
        assert reason in note


def test_special_tokens_map_wins_in_older_directories_as_in_training(tmp_path: Path) -> None:
    tokenizer = vocabularies.byte_level(tmp_path, eos_token="<|im_start|>")
    (tmp_path / "special_tokens_map.json").write_text('{"eos_token": {"content": "<|im_end|>"}}')
    eos = tokenizers.convert_tokenizer(tmp_path, 600, {}).metadata["tokenizer.ggml.eos_token_id"].data
    assert eos == tokenizer.token_to_id("<|im_end|>")


# -- what cannot be carried --------------------------------------------------------------------------------------------


def _edit(directory: Path, change: Callable[[dict[str, Any]], Any]) -> None:
    path = directory / "tokenizer.json"
    loaded = json.loads(path.read_text(encoding="utf-8"))
    change(loaded)
    path.write_text(json.dumps(loaded), encoding="utf-8")


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda t: t.update(pre_tokenizer={"type": "Whitespace"}), "cuts text in a way"),
        (lambda t: t["pre_tokenizer"]["pretokenizers"][0].update(behavior="MergedWithNext"), "cuts text in a way"),
        (lambda t: t.update(normalizer={"type": "Lowercase"}), "normalizes text in a way"),
        (lambda t: t["model"].update(type="WordPiece"), "of the kind WordPiece"),
        (
            lambda t: t.update(added_tokens=[], model={"type": "Unigram", "vocab": [["a", -1.0]]}),
            "unk_id",
        ),
        (lambda t: t["model"].update(end_of_word_suffix="</w>"), "uses end_of_word_suffix"),
        (lambda t: t["model"].update(merges=["one", "two three"]), "is not valid"),
        (lambda t: t["model"]["vocab"].update({"x": "y"}), "is not valid"),
        (lambda t: t["added_tokens"].append({"id": 7}), "is not valid"),
        (lambda t: t.update(model=None), "has no model"),
    ],
)
def test_what_llama_cpp_cannot_reproduce_is_refused(change: Any, message: str, tmp_path: Path) -> None:
    vocabularies.byte_level(tmp_path)
    _edit(tmp_path, change)
    with pytest.raises(TokenizerError, match=message):
        tokenizers.convert_tokenizer(tmp_path, 600, {})


def test_an_unreachable_token_under_other_merge_rules_is_refused(tmp_path: Path) -> None:
    """llama-bpe ignores merges for whole words; a tokenizer that does not must be able to build every token."""
    vocabularies.byte_level(tmp_path, "tekken")
    _edit(tmp_path, lambda t: t["model"].update(ignore_merges=False))
    assert tokenizers.convert_tokenizer(tmp_path, 600, {}).pre == "tekken"
    _edit(tmp_path, lambda t: t["model"]["merges"].pop(0))
    with pytest.raises(TokenizerError, match="the merges do not produce the token"):
        tokenizers.convert_tokenizer(tmp_path, 600, {})


def test_merges_that_are_no_scores_are_written_by_rank(tmp_path: Path) -> None:
    vocabularies.sentencepiece(tmp_path, over_lines=False)
    _edit(tmp_path, lambda t: t["model"]["merges"].pop(len(t["model"]["merges"]) // 2))
    path, vocabulary = _file(tmp_path)
    assert not vocabulary.notes
    assert (vocabulary.model, vocabulary.pre) == ("gpt2", "sarvam-moe")
    assert runtime.token_ids(path, corpus.TEXTS) == _hf_ids(Tokenizer.from_file(str(tmp_path / "tokenizer.json")))


def test_what_merging_by_rank_loses_is_noted(tmp_path: Path) -> None:
    vocabularies.sentencepiece(tmp_path)
    _edit(tmp_path, lambda t: t["model"]["merges"].pop(len(t["model"]["merges"]) // 2))
    notes = tokenizers.convert_tokenizer(tmp_path, 600, {}).notes
    assert any("does not merge a line end with other text" in note for note in notes)


def test_merges_that_are_no_scores_after_a_space_are_refused(tmp_path: Path) -> None:
    """llama.cpp puts a space before a text only where it merges by score."""
    vocabularies.sentencepiece(tmp_path, prefix=True)
    _edit(tmp_path, lambda t: t["model"]["merges"].pop(len(t["model"]["merges"]) // 2))
    with pytest.raises(TokenizerError, match="cannot be written as SentencePiece scores"):
        tokenizers.convert_tokenizer(tmp_path, 600, {})


def test_unicode_normalization_is_passed_to_the_runtime(tmp_path: Path) -> None:
    tokenizer = vocabularies.byte_level(tmp_path)
    _edit(tmp_path, lambda t: t.update(normalizer={"type": "NFC"}))
    path, vocabulary = _file(tmp_path)
    assert _metadata(path)["edgetune.tokenizer.normalizer"] == "NFC"
    assert any("NFC" in note for note in vocabulary.notes)
    text = "combining e\u0301"
    composed = unicodedata.normalize("NFC", text)
    assert runtime.token_ids(path, [composed]) == [tokenizer.encode(composed).ids]


def test_damaged_configurations_of_tokenizers_are_refused(tmp_path: Path) -> None:
    vocabularies.byte_level(tmp_path, added_tokens_decoder={"x": {"content": "y"}})
    with pytest.raises(TokenizerError, match=r"added_tokens_decoder\['x'\] is no token"):
        tokenizers.convert_tokenizer(tmp_path, 600, {})
    vocabularies.byte_level(tmp_path)
    (tmp_path / "chat_template.jinja").write_bytes(b"\xff")
    with pytest.raises(TokenizerError, match="cannot read the chat template"):
        tokenizers.convert_tokenizer(tmp_path, 600, {})


def test_an_added_token_that_loads_under_another_id_is_refused(tmp_path: Path) -> None:
    vocabularies.byte_level(tmp_path)
    _edit(tmp_path, lambda t: t["added_tokens"][0].update(content="a"))
    with pytest.raises(TokenizerError, match=r"the token 'a' the id 0, but it is loaded as 65"):
        tokenizers.convert_tokenizer(tmp_path, 600, {})


@pytest.mark.parametrize("content", ["", "not json", "[]", "{}", '{"model": {"type": "BPE", "vocab": []}}'])
def test_a_damaged_tokenizer_is_reported_in_one_sentence(content: str, tmp_path: Path) -> None:
    (tmp_path / "tokenizer.json").write_text(content)
    with pytest.raises(TokenizerError):
        tokenizers.convert_tokenizer(tmp_path, 600, {})


def test_a_missing_tokenizer_says_how_to_make_one(tmp_path: Path) -> None:
    with pytest.raises(TokenizerError, match=r"has no tokenizer.json") as caught:
        tokenizers.convert_tokenizer(tmp_path, 600, {})
    assert "save_pretrained" in str(caught.value.hint)
