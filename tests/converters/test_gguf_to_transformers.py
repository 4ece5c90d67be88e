"""A model directory made of a GGUF file: transformers loads it, and its logits and ids are those of the original."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
from tokenizers import Tokenizer

from edgetune_converters import gguf
from edgetune_converters.architectures import ModelConfig, family_of
from edgetune_converters.architectures.model_types import MODEL_TYPES
from edgetune_converters.errors import CheckpointError, TokenizerError
from edgetune_converters.gguf.values import Value, ValueKind, encode, string
from edgetune_converters.gguf.writer import GgufWriter
from edgetune_converters.reading.gguf_base import typed_vocabulary
from edgetune_converters.tokenizers import pretokenizers
from edgetune_converters.tokenizers.convert import convert_tokenizer
from edgetune_converters.tokenizers.rebuild import write_tokenizer
from tests.converters import corpus, family_models, runtime, vocabularies
from tests.converters.tiny import torch, transformers
from tests.export_requests import export

QUICK = ["llama", "gemma3", "mixtral", "granitemoe", "falcon-7b", "deepseek-v2-lite", "olmo3", "llama4"]
# families without a class in transformers
REFUSED = {"minicpm": "MiniCPM", "internlm2": "InternLM2", "baichuan": "Baichuan", "baichuan-13b": "Baichuan"}
OTHERS = [name for name in family_models.CASES if name not in QUICK and name not in REFUSED]
ONNX = ("gemma3", "phi3", "phi3-long", "mixtral", "stablelm", "olmo3", "exaone4", "gpt2", "neox", "glm4", "command-r7b")


def _slow(*names: str) -> list[Any]:
    return [pytest.param(name, marks=pytest.mark.slow) for name in names]


def _logits(directory: Path, ids: list[int]) -> Any:
    """The logits of a directory, after checking that its tensors are the very ones of transformers' model."""
    model, info = transformers.AutoModelForCausalLM.from_pretrained(
        directory, dtype=torch.float32, attn_implementation="eager", output_loading_info=True
    )
    assert not info["missing_keys"], info["missing_keys"]
    assert not info["unexpected_keys"], info["unexpected_keys"]
    with torch.no_grad():
        return model.eval()(torch.tensor([ids])).logits[0].float().numpy()


@pytest.mark.parametrize("name", [*QUICK, *_slow(*OTHERS)])
def test_transformers_computes_the_logits_of_the_original(name: str, tmp_path: Path) -> None:
    base = family_models.base(name, tmp_path / "base")
    export(base, {"f32": tmp_path / "x.gguf"})
    export(tmp_path / "x.gguf", safetensors={"f32": tmp_path / "m"})
    expected = family_models.reference(name, base)
    found = _logits(tmp_path / "m", family_models.ids(name))
    assert np.array_equal(found[:, : expected.shape[1]], expected)


@pytest.mark.parametrize("name", ["llama", "gemma2", "qwen3moe", *_slow(*ONNX)])
def test_the_onnx_folder_is_that_of_the_original(name: str, tmp_path: Path) -> None:
    base = family_models.base(name, tmp_path / "base")
    export(base, {"f32": tmp_path / "x.gguf"})
    export(base, onnx={"f32": tmp_path / "one"})
    export(tmp_path / "x.gguf", onnx={"f32": tmp_path / "other"})
    assert _graph(tmp_path / "one") == _graph(tmp_path / "other")
    for file in ("model.onnx.data", "genai_config.json"):
        one, other = ((tmp_path / folder / file).read_bytes() for folder in ("one", "other"))
        assert one == other, file
    assert (tmp_path / "other" / "tokenizer.json").is_file()


def _graph(folder: Path) -> bytes:
    """The graph without its metadata, which name the base."""
    model = onnx.load(folder / "model.onnx", load_external_data=False)
    del model.metadata_props[:]
    return bytes(model.SerializeToString(deterministic=True))


@pytest.mark.parametrize("name", REFUSED)
def test_a_family_that_transformers_does_not_have_is_refused(name: str, tmp_path: Path) -> None:
    export(family_models.base(name, tmp_path / "base"), {"f32": tmp_path / "x.gguf"})
    with pytest.raises(CheckpointError, match=f"family {REFUSED[name]}, for which transformers has no class"):
        export(tmp_path / "x.gguf", safetensors={"f32": tmp_path / "m"})
    assert not (tmp_path / "m").exists()


def test_factors_that_no_parameters_give_are_refused(tmp_path: Path) -> None:
    export(family_models.base("llama4", tmp_path / "base"), {"f32": tmp_path / "x.gguf"})
    path = tmp_path / "x.gguf"
    entry = next(entry for entry in gguf.read(path).tensors if entry.name == "rope_freqs.weight")
    raw = bytearray(path.read_bytes())
    raw[entry.offset : entry.offset + 4] = np.float32(1.25).tobytes()
    path.write_bytes(raw)
    with pytest.raises(CheckpointError, match=r"rope_freqs\.weight, which no RoPE parameters"):
        export(path, safetensors={"f32": tmp_path / "m"})


def test_the_table_of_model_types_is_that_of_transformers() -> None:
    from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES as KNOWN

    assert {name: KNOWN[kind] for name, kind in MODEL_TYPES.items()} == {name: name for name in MODEL_TYPES}


@pytest.mark.parametrize("name", MODEL_TYPES)
def test_a_config_without_architectures_is_of_the_family_of_its_model_type(name: str) -> None:
    stated = family_of(ModelConfig({"architectures": [name]}))
    assert family_of(ModelConfig({"model_type": MODEL_TYPES[name]})) is stated
    assert family_of(ModelConfig({"model_type": MODEL_TYPES[name], "architectures": None})) is stated


# -- tokenizers --------------------------------------------------------------------------------------------------------

CHARSMAP = "tokenizer.ggml.precompiled_charsmap"
TEXTS = [*corpus.TEXTS, "<|im_start|>user\nA b<|im_end|>\n <tool> c<tool>d <|endoftext|>"]


def _vocabulary(directory: Path) -> dict[str, Value]:
    """The vocabulary of a tokenizer directory as keys of a GGUF file."""
    size = max(Tokenizer.from_file(str(directory / "tokenizer.json")).get_vocab().values()) + 1
    return convert_tokenizer(directory, size, {}).metadata


def _file(metadata: Mapping[str, Value], path: Path) -> Path:
    with GgufWriter.open(path, {"general.architecture": string("llama"), **metadata}, []) as writer:
        writer.publish()
    return path


def _rebuild(metadata: Mapping[str, Value], directory: Path) -> list[str]:
    directory.mkdir()
    return write_tokenizer({key: value.data for key, value in metadata.items()}, metadata, 512, directory)


@pytest.mark.parametrize("make", [vocabularies.byte_level, vocabularies.sentencepiece, vocabularies.unigram])
def test_a_vocabulary_that_was_read_has_the_types_that_were_written(
    make: Callable[[Path], Tokenizer], tmp_path: Path
) -> None:
    make(tmp_path / "t")
    written = _vocabulary(tmp_path / "t") | {CHARSMAP: Value(ValueKind.ARRAY, [0, 180, 255], ValueKind.U8)}
    read = typed_vocabulary(gguf.read(_file(written, tmp_path / "x.gguf")).metadata)
    assert {key: encode(value) for key, value in read.items()} == {key: encode(value) for key, value in written.items()}


def test_a_table_of_bytes_that_is_typed_as_signed_is_carried_as_bytes() -> None:
    assert typed_vocabulary({CHARSMAP: [0, -76, -1]}) == {CHARSMAP: Value(ValueKind.ARRAY, [0, 180, 255], ValueKind.U8)}


@pytest.mark.parametrize("cutter", vocabularies.CUTTERS)
def test_a_byte_level_tokenizer_is_rebuilt(cutter: str, tmp_path: Path) -> None:
    original = vocabularies.byte_level(tmp_path / "t", cutter)
    metadata = _vocabulary(tmp_path / "t")
    _rebuild(metadata, tmp_path / "made")
    rebuilt = Tokenizer.from_file(str(tmp_path / "made" / "tokenizer.json"))
    assert [each.ids for each in rebuilt.encode_batch(TEXTS)] == [each.ids for each in original.encode_batch(TEXTS)]
    assert [rebuilt.decode(rebuilt.encode(text).ids) for text in TEXTS] == [
        original.decode(original.encode(text).ids) for text in TEXTS
    ]
    assert runtime.token_ids(_file(metadata, tmp_path / "x.gguf"), TEXTS) == [
        each.ids for each in rebuilt.encode_batch(TEXTS)
    ]
    loaded = transformers.AutoTokenizer.from_pretrained(tmp_path / "made")
    assert loaded(TEXTS, add_special_tokens=False)["input_ids"] == [each.ids for each in original.encode_batch(TEXTS)]
    assert (loaded.eos_token, loaded.chat_template) == ("<|im_end|>", vocabularies.TEMPLATE)


@pytest.mark.parametrize("options", [{}, {"prefix": True}, {"bos": True}, {"prefix": True, "bos": True}])
def test_a_sentencepiece_tokenizer_is_rebuilt(options: dict[str, bool], tmp_path: Path) -> None:
    original = vocabularies.sentencepiece(tmp_path / "t", **options)
    metadata = _vocabulary(tmp_path / "t")
    _rebuild(metadata, tmp_path / "made")
    rebuilt = Tokenizer.from_file(str(tmp_path / "made" / "tokenizer.json"))
    for special in (False, True):
        expected = [each.ids for each in original.encode_batch(TEXTS, add_special_tokens=special)]
        assert [each.ids for each in rebuilt.encode_batch(TEXTS, add_special_tokens=special)] == expected
    plain = [text for text in TEXTS if "<|" not in text]
    assert [rebuilt.decode(rebuilt.encode(text).ids) for text in plain] == plain


def test_every_row_of_the_table_is_written_as_it_is_recognized() -> None:
    for row in pretokenizers.TABLE:
        made = pretokenizers.as_tokenizer_json(row.steps, add_prefix_space=False)
        tokenizer = {"pre_tokenizer": made, "model": {"ignore_merges": row.ignore_merges}}
        assert row.name in {found.name for found in pretokenizers.recognize(tokenizer)}, row.name


@pytest.mark.parametrize(
    ("name", "other"), [(name, other) for name, others in pretokenizers.SAME.items() for other in others.split()]
)
def test_names_with_the_same_splits_give_the_same_ids_in_llama_cpp(
    name: str, other: str, wide: dict[str, Value], tmp_path: Path
) -> None:
    found = [
        runtime.token_ids(_file({**wide, "tokenizer.ggml.pre": string(each)}, tmp_path / f"{each}.gguf"), TEXTS)
        for each in (name, other)
    ]
    assert found[0] == found[1]


@pytest.fixture(scope="module")
def wide(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Value]:
    """A vocabulary in which splits show: all texts of the corpus are merged far."""
    directory = tmp_path_factory.mktemp("wide")
    vocabularies.byte_level(directory, "qwen2", size=2000)
    return _vocabulary(directory)


@pytest.mark.parametrize(
    ("key", "value", "said"),
    [
        ("pre", "default", "it is not known how llama.cpp's pre-tokenizer 'default' splits text"),
        ("model", "bert", "a vocabulary of the kind 'bert' cannot be rebuilt"),
    ],
)
def test_a_vocabulary_of_an_unknown_kind_is_refused(
    key: str, value: str, said: str, wide: dict[str, Value], tmp_path: Path
) -> None:
    typed = {**wide, f"tokenizer.ggml.{key}": string(value)}
    (tmp_path / "made").mkdir()
    plain = {name: each.data for name, each in typed.items()}
    with pytest.raises(TokenizerError, match=said):
        write_tokenizer(plain, wide, None, tmp_path / "made")


def test_a_vocabulary_of_no_kind_is_refused(wide: dict[str, Value], tmp_path: Path) -> None:
    typed = {name: value for name, value in wide.items() if name != "tokenizer.ggml.model"}
    with pytest.raises(TokenizerError, match=r"llama\.cpp refuses the vocabulary of the tokenizer \(qwen2\)"):
        _rebuild(typed, tmp_path / "made")
