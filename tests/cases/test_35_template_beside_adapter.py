"""Chat template and special tokens beside an adapter are those of the training, with and without a vocabulary there."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from gguf import GGUFReader
from tokenizers import Tokenizer

from edgetune.exporting.source import find_source
from edgetune_converters.errors import TokenizerError
from edgetune_converters.provenance.receipts import Receipt
from tests.cli_runner import edgetune
from tests.converters import tiny, vocabularies
from tests.export_requests import export

transformers: Any = pytest.importorskip("transformers")

OWN = "OWN {% for message in messages %}<|im_start|>{{ message.content }}<|im_end|>{% endfor %}"
TOOLS = "TOOLS " + OWN
NAMED = [{"name": "default", "template": OWN}, {"name": "tool_use", "template": TOOLS}]


def _config(directory: Path, **entries: Any) -> None:
    (directory / "tokenizer_config.json").write_text(json.dumps(entries))


def _jinja(directory: Path) -> None:
    (directory / "chat_template.jinja").write_text(OWN)


def _whole(directory: Path) -> None:
    vocabularies.byte_level(directory, chat_template=OWN)


def _larger(directory: Path) -> None:
    """The vocabulary of the base with a token more, which has a row."""
    _whole(directory)
    tokenizer = Tokenizer.from_file(str(directory / "tokenizer.json"))
    tokenizer.add_special_tokens(["<|extra|>"])
    tokenizer.save(str(directory / "tokenizer.json"))


def _several_files(directory: Path) -> None:
    _jinja(directory)
    (directory / "additional_chat_templates").mkdir()
    (directory / "additional_chat_templates" / "tool_use.jinja").write_text(TOOLS)


WAYS: dict[str, Callable[[Path], None]] = {
    "chat_template.jinja": _jinja,
    "tokenizer_config.json": lambda d: _config(d, chat_template=OWN, tokenizer_class="PreTrainedTokenizerFast"),
    "the whole tokenizer": _whole,
    "a larger tokenizer": _larger,
    "several in a list": lambda d: _config(d, chat_template=NAMED),
    "several in files": _several_files,
}


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny.base("qwen2", tmp_path_factory.mktemp("base") / "base")


@pytest.fixture(scope="module")
def bare(base: Path) -> Path:
    """An adapter without anything beside it."""
    return tiny.adapter(base, base.parent / "bare", target_modules=["q_proj"])


@pytest.fixture(scope="module")
def as_gguf(base: Path) -> Path:
    export(base, {"f32": base.parent / "base.gguf"})
    return base.parent / "base.gguf"


def _adapter(bare: Path, directory: Path, make: Callable[[Path], None]) -> Path:
    shutil.copytree(bare, directory)
    make(directory)
    return directory


def _named(file: Path) -> dict[str, Any]:
    """The templates of a GGUF file by name."""
    fields = GGUFReader(file).fields
    start = "tokenizer.chat_template"
    found = {key: field.contents() for key, field in fields.items() if key == start or key.startswith(f"{start}.")}
    return {key.removeprefix(start).lstrip(".") or "default": text for key, text in found.items()}


def _expected(way: str) -> dict[str, str]:
    return {"default": OWN} | ({"tool_use": TOOLS} if way.startswith("several") else {})


def _loaded(directory: Path) -> dict[str, str]:
    found = transformers.AutoTokenizer.from_pretrained(directory).chat_template
    return {"default": found} if isinstance(found, str) else dict(found)


def _notes(receipts: list[Receipt]) -> list[str]:
    return [note for receipt in receipts for note in receipt.notes if "chat template" in note]


@pytest.mark.parametrize("way", WAYS)
def test_each_output_has_the_templates_of_the_adapter(way: str, base: Path, bare: Path, tmp_path: Path) -> None:
    adapter = _adapter(bare, tmp_path / "adapter", WAYS[way])
    receipts = export(
        base,
        {"f32": tmp_path / "x.gguf"},
        safetensors={"f32": tmp_path / "st"},
        onnx={"f32": tmp_path / "onnx"},
        adapter=adapter,
    )
    assert _named(tmp_path / "x.gguf") == _expected(way)
    for folder in (tmp_path / "st", tmp_path / "onnx"):
        assert _loaded(folder) == _expected(way)
        source = adapter if (adapter / "tokenizer.json").is_file() else base
        theirs, ours = (transformers.AutoTokenizer.from_pretrained(place) for place in (source, folder))
        assert theirs.get_vocab() == ours.get_vocab()
        assert theirs.eos_token == ours.eos_token
    assert len(_notes(receipts)) == 3


@pytest.mark.parametrize("way", WAYS)
def test_a_gguf_base_gets_the_templates_of_the_adapter(way: str, as_gguf: Path, bare: Path, tmp_path: Path) -> None:
    adapter = _adapter(bare, tmp_path / "adapter", WAYS[way])
    folders = {"f32": tmp_path / "st"}, {"f32": tmp_path / "onnx"}
    export(as_gguf, {"f32": tmp_path / "x.gguf"}, safetensors=folders[0], onnx=folders[1], adapter=adapter)
    assert _named(tmp_path / "x.gguf") == _expected(way)
    for folder in (tmp_path / "st", tmp_path / "onnx"):
        assert _loaded(folder) == _expected(way)
        assert transformers.AutoTokenizer.from_pretrained(folder).eos_token == "<|im_end|>"


def test_without_files_beside_the_adapter_the_base_speaks(base: Path, bare: Path, tmp_path: Path) -> None:
    (receipt,) = export(base, {"f32": tmp_path / "x.gguf"}, adapter=bare)
    assert _named(tmp_path / "x.gguf") == {"default": vocabularies.TEMPLATE}
    assert _notes([receipt]) == []


def test_a_vocabulary_without_a_template_keeps_that_of_the_base(
    base: Path, as_gguf: Path, bare: Path, tmp_path: Path
) -> None:
    def make(directory: Path) -> None:
        vocabularies.byte_level(directory)
        _config(directory, eos_token="<|im_end|>")

    adapter = _adapter(bare, tmp_path / "adapter", make)
    receipts = export(base, {"f32": tmp_path / "x.gguf"}, safetensors={"f32": tmp_path / "st"}, adapter=adapter)
    export(as_gguf, {"f32": tmp_path / "y.gguf"}, adapter=adapter)
    for file in (tmp_path / "x.gguf", tmp_path / "y.gguf"):
        assert _named(file) == {"default": vocabularies.TEMPLATE}
    assert _loaded(tmp_path / "st") == {"default": vocabularies.TEMPLATE}
    assert (
        _notes(receipts) == ["the tokenizer beside the adapter has no chat template: that of the base is written"] * 2
    )


@pytest.mark.parametrize("kind", ["directory", "gguf"])
def test_special_tokens_beside_the_adapter_count(
    kind: str, base: Path, as_gguf: Path, bare: Path, tmp_path: Path
) -> None:
    def make(directory: Path) -> None:
        _config(directory, eos_token="<|endoftext|>", pad_token={"__type": "AddedToken", "content": "<tool>"})
        (directory / "special_tokens_map.json").write_text(json.dumps({"eos_token": "<|endoftext|>"}))

    adapter = _adapter(bare, tmp_path / "adapter", make)
    export(base if kind == "directory" else as_gguf, {"f32": tmp_path / "x.gguf"}, adapter=adapter)
    fields = GGUFReader(tmp_path / "x.gguf").fields
    numbers = Tokenizer.from_file(str(base / "tokenizer.json")).token_to_id
    for role, text in (("eos", "<|endoftext|>"), ("padding", "<tool>")):
        assert fields[f"tokenizer.ggml.{role}_token_id"].contents() == numbers(text)
    if kind == "directory":
        export(base, safetensors={"f32": tmp_path / "st"}, adapter=adapter)
        loaded = transformers.AutoTokenizer.from_pretrained(tmp_path / "st")
        assert (loaded.eos_token, loaded.pad_token) == ("<|endoftext|>", "<tool>")
        assert _loaded(tmp_path / "st") == {"default": vocabularies.TEMPLATE}


@pytest.mark.parametrize("kind", ["directory", "gguf"])
def test_a_special_token_that_the_base_lacks(kind: str, base: Path, as_gguf: Path, bare: Path, tmp_path: Path) -> None:
    model = base if kind == "directory" else as_gguf
    adapter = _adapter(bare, tmp_path / "pad", lambda d: _config(d, pad_token="[PAD]"))
    (receipt,) = export(model, {"f32": tmp_path / "x.gguf"}, adapter=adapter)
    assert any(
        "the pad_token '[PAD]', which the tokenizer of the base lacks; left out" in note for note in receipt.notes
    )
    adapter = _adapter(bare, tmp_path / "eos", lambda d: _config(d, eos_token="<|end|>"))
    with pytest.raises(TokenizerError, match=r"name the eos_token '<\|end\|>', which the tokenizer of the base lacks"):
        export(model, {"f32": tmp_path / "y.gguf"}, adapter=adapter)


def test_the_stop_tokens_of_the_base_stay_with_the_tokenizer_of_the_adapter(
    base: Path, bare: Path, tmp_path: Path
) -> None:
    own = tmp_path / "base"
    shutil.copytree(base, own)
    number = Tokenizer.from_file(str(base / "tokenizer.json")).token_to_id
    stops = [number("<tool>"), number("<|im_end|>")]
    (own / "generation_config.json").write_text(json.dumps({"eos_token_id": stops}))
    adapter = _adapter(bare, tmp_path / "adapter", _whole)
    export(own, {"f32": tmp_path / "x.gguf"}, safetensors={"f32": tmp_path / "st"}, adapter=adapter)
    assert json.loads((tmp_path / "st" / "generation_config.json").read_text()) == {"eos_token_id": stops}
    fields = GGUFReader(tmp_path / "x.gguf").fields
    assert {fields[f"tokenizer.ggml.{key}_token_id"].contents() for key in ("eos", "eot")} == set(stops)


def test_the_adapter_of_a_run_brings_the_tokenizer_of_the_run(tmp_path: Path) -> None:
    run = tmp_path / "run"
    for folder in ("adapter", "tokenizer", "checkpoints/checkpoint-5"):
        (run / folder).mkdir(parents=True)
    assert find_source(None, tmp_path / "base", run / "adapter").tokenizer is None
    (run / "run.json").write_text("{}")
    for adapter in (run, run / "adapter", run / "checkpoints" / "checkpoint-5"):
        assert find_source(None, tmp_path / "base", adapter).tokenizer == run / "tokenizer"
    assert find_source(None, tmp_path / "base", tmp_path).tokenizer is None


@pytest.mark.parametrize("kind", ["directory", "gguf"])
@pytest.mark.parametrize("named", ["the checkpoint", "the directory around it"])
def test_tokenizer_files_beside_the_checkpoint_count(
    kind: str, named: str, base: Path, as_gguf: Path, bare: Path, tmp_path: Path
) -> None:
    training = tmp_path / "training"
    shutil.copytree(bare, training / "checkpoint-50")
    _jinja(training)
    adapter = training / "checkpoint-50" if named == "the checkpoint" else training
    model = base if kind == "directory" else as_gguf
    (receipt,) = export(model, {"f32": tmp_path / "x.gguf"}, adapter=adapter)
    assert _named(tmp_path / "x.gguf") == {"default": OWN}
    assert f"the tokenizer files are those of {training}, beside the checkpoint checkpoint-50" in receipt.notes


def test_a_damaged_file_beside_the_adapter_is_named(base: Path, bare: Path, tmp_path: Path) -> None:
    def make(directory: Path) -> None:
        (directory / "tokenizer_config.json").write_text("{")

    adapter = _adapter(bare, tmp_path / "adapter", make)
    with pytest.raises(TokenizerError, match=r"adapter/tokenizer_config\.json"):
        export(base, {"f32": tmp_path / "x.gguf"}, adapter=adapter)


def test_a_dry_run_says_which_template_is_written(base: Path, as_gguf: Path, bare: Path, tmp_path: Path) -> None:
    adapter = _adapter(bare, tmp_path / "adapter", _jinja)
    for model in (base, as_gguf):
        result = edgetune("merge-export", "--base", model, "--adapter", adapter, "-q", "f32", "--dry-run")
        assert result.returncode == 0
        said = "the chat template is that beside the adapter, which is not the base's"
        assert said in " ".join(result.stderr.decode().split())
    _config(adapter, eos_token="<|end|>")
    result = edgetune("merge-export", "--base", base, "--adapter", adapter, "-q", "f32", "--dry-run")
    assert result.returncode == 1
    assert "name the eos_token '<|end|>'" in result.stderr.decode()
