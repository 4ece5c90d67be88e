"""A token whose id lies past the last row of the embedding is left out; nothing that is trained on may hold it."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from gguf import GGUFReader

from edgetune import cli
from edgetune.config import load_config
from edgetune.data.chat import ChatTemplate
from edgetune.data.text_tokenizer import TextTokenizer
from edgetune.errors import DataError
from edgetune.planning.golden_conversations import build_contract
from edgetune.planning.prepare import prepare_run
from edgetune.runtime.loading import load
from edgetune_converters.errors import TokenizerError
from tests.converters import runtime, tiny, vocabularies
from tests.data import templates
from tests.export_requests import export
from tests.training import runs

torch, transformers = tiny.torch, tiny.transformers
ROWS = 503
IMAGE = "<image_soft_token>"
TEXT = "Dim the lamp, please: 30 % at 7:05 pm.\n\nNaïve café 把灯"


def _model(directory: Path) -> Path:
    torch.manual_seed(0)
    shape = {**runs.SHAPE, "vocab_size": ROWS}
    transformers.LlamaForCausalLM(transformers.LlamaConfig(**shape)).save_pretrained(directory)
    return directory


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    directory = tmp_path_factory.mktemp("beyond") / "base"
    vocabularies.byte_level(directory, chat_template=templates.CHATML, pad_token="<|endoftext|>")
    return _model(directory)


def with_tokens(base: Path, directory: Path, *texts: str, special: bool = True, **config: Any) -> Path:
    """A copy of the base with further tokens; `config` goes into tokenizer_config.json."""
    shutil.copytree(base, directory, dirs_exist_ok=True)
    tokenizer = json.loads((base / "tokenizer.json").read_text(encoding="utf-8"))
    flags = dict.fromkeys(("single_word", "lstrip", "rstrip", "normalized"), False)
    for number, text in enumerate(texts, ROWS):
        tokenizer["added_tokens"].append({"id": number, "content": text, "special": special, **flags})
    (directory / "tokenizer.json").write_text(json.dumps(tokenizer), encoding="utf-8")
    stated = json.loads((base / "tokenizer_config.json").read_text(encoding="utf-8")) | config
    (directory / "tokenizer_config.json").write_text(json.dumps(stated), encoding="utf-8")
    return directory


BEYOND: dict[str, dict[str, Any]] = {
    "one": {"texts": [IMAGE]},
    "several": {"texts": [f"<image{number}>" for number in range(5)]},
    "not special": {"texts": [IMAGE], "special": False},
    "the pad token": {"texts": ["<|PAD_TOKEN|>"], "pad_token": "<|PAD_TOKEN|>"},
    "a stop token of llama.cpp": {"texts": ["<|eot_id|>"]},
}


@pytest.mark.parametrize("kind", BEYOND)
def test_the_files_are_those_without_the_token(kind: str, base: Path, tmp_path: Path) -> None:
    options = dict(BEYOND[kind])
    texts = options.pop("texts")
    beyond = with_tokens(base, tmp_path / "beyond", *texts, **options)
    receipts = export(beyond, {"f32": tmp_path / "m.gguf"}, onnx={"f32": tmp_path / "onnx"})
    for receipt in receipts:
        (note,) = [note for note in receipt.notes if "none for the token" in note]
        assert repr(texts[0]) in note
    ids = tiny.random_ids(48, ROWS)
    expected = tiny.torch_logits(base, None, ids)
    found = runtime.logits(tmp_path / "m.gguf", ids)
    assert found.shape == expected.shape
    assert tiny.divergence(expected, found)[0] < 1e-6
    theirs = transformers.AutoTokenizer.from_pretrained(beyond)
    for path in (tmp_path / "m.gguf", tmp_path / "onnx"):
        with load(path) as loaded:
            assert loaded.tokenize(TEXT) == theirs(TEXT)["input_ids"]
            assert max(loaded.tokenize(f"a {texts[0]} b")) < ROWS
            (block,) = loaded.score(np.array(ids, np.int32), np.array([len(ids) - 1]))
            assert np.abs(block[0] - expected[-2]).max() < 1e-3


def test_tokens_and_tensors_are_those_of_the_base(base: Path, tmp_path: Path) -> None:
    beyond = with_tokens(base, tmp_path / "beyond", IMAGE)
    export(beyond, {"f32": tmp_path / "beyond.gguf"})
    export(base, {"f32": tmp_path / "base.gguf"})
    one, other = (GGUFReader(tmp_path / name) for name in ("beyond.gguf", "base.gguf"))
    assert [(t.name, t.data.tobytes()) for t in one.tensors] == [(t.name, t.data.tobytes()) for t in other.tensors]
    tokens = [reader.fields["tokenizer.ggml.tokens"].contents() for reader in (one, other)]
    assert tokens[0] == tokens[1]


def test_an_adapter_with_such_a_tokenizer_beside_it(base: Path, tmp_path: Path) -> None:
    adapter = tiny.adapter(base, tmp_path / "adapter")
    beyond = with_tokens(base, tmp_path / "beyond", "<|PAD_TOKEN|>", pad_token="<|PAD_TOKEN|>")
    (receipt,) = export(base, {"f32": tmp_path / "m.gguf"}, adapter=adapter, tokenizer=beyond)
    assert "'<|PAD_TOKEN|>' (503)" in " ".join(receipt.notes)
    ids = tiny.random_ids(48, ROWS)
    kld, _ = tiny.divergence(tiny.torch_logits(base, adapter, ids), runtime.logits(tmp_path / "m.gguf", ids))
    assert kld < 1e-6


def test_a_sentencepiece_tokenizer(tmp_path: Path) -> None:
    directory = tmp_path / "base"
    tokenizer = vocabularies.sentencepiece(directory, ROWS, bos=True)
    assert tokenizer.get_vocab_size() <= ROWS
    tokenizer.add_special_tokens([f"<filler{number}>" for number in range(ROWS - tokenizer.get_vocab_size())])
    tokenizer.add_special_tokens([IMAGE])
    assert tokenizer.token_to_id(IMAGE) == ROWS
    vocabularies.save(tokenizer, directory, bos_token="<s>", eos_token="</s>", unk_token="<unk>")
    _model(directory)
    (receipt,) = export(directory, {"f32": tmp_path / "m.gguf"})
    assert f"{IMAGE!r} (503)" in " ".join(receipt.notes)
    assert runtime.token_ids(tmp_path / "m.gguf", [TEXT]) == [tokenizer.encode(TEXT, add_special_tokens=False).ids]


REFUSED: dict[str, tuple[dict[str, Any], str]] = {
    "end of sequence": ({"texts": ["<|stop|>"], "eos_token": "<|stop|>"}, "end-of-sequence token '<|stop|>'"),
    "end of a turn": (
        {"texts": ["<|end|>"], "chat_template": templates.CHATML.replace("<|im_end|>", "<|end|>")},
        "'<|end|>', which ends a turn",
    ),
}


@pytest.mark.parametrize("kind", REFUSED)
@pytest.mark.parametrize("form", ["gguf", "onnx"])
def test_a_stop_token_without_a_row_is_refused(kind: str, form: str, base: Path, tmp_path: Path) -> None:
    options = dict(REFUSED[kind][0])
    beyond = with_tokens(base, tmp_path / "beyond", *options.pop("texts"), **options)
    paths: Any = {form: {"f32": tmp_path / "m"}}
    with pytest.raises(TokenizerError) as refusal:
        export(beyond, **paths)
    assert REFUSED[kind][1] in refusal.value.message
    assert "could never stop" in refusal.value.message


def test_a_token_around_every_text_is_refused(base: Path, tmp_path: Path) -> None:
    beyond = with_tokens(base, tmp_path / "beyond", "<bos>", bos_token="<bos>")
    stated = json.loads((beyond / "tokenizer.json").read_text(encoding="utf-8"))
    token = {"SpecialToken": {"id": "<bos>", "type_id": 0}}
    text = {"Sequence": {"id": "A", "type_id": 0}}
    special = {"<bos>": {"id": "<bos>", "ids": [ROWS], "tokens": ["<bos>"]}}
    stated["post_processor"] = {
        "type": "TemplateProcessing", "single": [token, text], "pair": [token, text], "special_tokens": special,
    }  # fmt: skip
    (beyond / "tokenizer.json").write_text(json.dumps(stated), encoding="utf-8")
    with pytest.raises(TokenizerError, match=r"adds '<bos>' \(503\) to every text"):
        export(beyond, {"f32": tmp_path / "m.gguf"})


def test_the_tokenizer_of_another_model_is_still_refused(base: Path, tmp_path: Path) -> None:
    other = tmp_path / "other"
    vocabularies.byte_level(other, size=600, chat_template=templates.CHATML)
    with pytest.raises(TokenizerError, match=r"has \d+ tokens, the model only 503 rows"):
        export(base, {"f32": tmp_path / "m.gguf"}, tokenizer=other)


@pytest.mark.parametrize("number", [ROWS, -1])
def test_a_number_in_config_json_alone_is_harmless(number: int, base: Path, tmp_path: Path) -> None:
    copy = with_tokens(base, tmp_path / "copy", pad_token=None)
    config = json.loads((copy / "config.json").read_text())
    (copy / "config.json").write_text(json.dumps(config | {"pad_token_id": number}))
    export(copy, {"f32": tmp_path / "m.gguf"}, onnx={"f32": tmp_path / "onnx"})
    assert "tokenizer.ggml.padding_token_id" not in GGUFReader(tmp_path / "m.gguf").fields
    genai = json.loads((tmp_path / "onnx" / "genai_config.json").read_text())
    assert 0 <= genai["model"]["pad_token_id"] < ROWS


def _config(base: Path, folder: Path, **data: Any) -> Path:
    folder.mkdir()
    values = runs.settings(base, folder)
    values["data"] |= data
    return runs.write_config(folder / "c.yaml", values)


def test_training_pads_with_a_token_that_has_a_row(base: Path, tmp_path: Path) -> None:
    beyond = with_tokens(base, tmp_path / "beyond", "<|PAD_TOKEN|>", "<|reserved_pad|>", pad_token="<|PAD_TOKEN|>")
    prepared = prepare_run(load_config(_config(beyond, tmp_path / "run")))
    assert prepared.pad_id < ROWS
    assert prepared.pad_id not in prepared.stop_ids
    assert "no row for the tokenizer's pad token <|PAD_TOKEN|>" in prepared.pad_reason


@pytest.mark.parametrize("split", ["train", "validation", "test"])
def test_rows_that_hold_the_token_are_named(split: str, base: Path, tmp_path: Path) -> None:
    beyond = with_tokens(base, tmp_path / "beyond", IMAGE)
    path = _config(beyond, tmp_path / "run")
    rows = tmp_path / "run" / f"{split}.jsonl"
    holding = {"messages": [{"role": "user", "content": f"A {IMAGE}?"}, {"role": "assistant", "content": "red"}]}
    rows.write_text(rows.read_text() + json.dumps(holding) + "\n")
    with pytest.raises(DataError, match=rf"{split}.jsonl, line \d+: holds '{IMAGE}' \(token 503\).*only 503 rows"):
        prepare_run(load_config(path))
    skipping = load_config(path, ["data.on_bad_row=skip"])
    assert prepare_run(skipping).problems.count == 1


def test_a_golden_conversation_that_holds_the_token_is_left_out(base: Path, tmp_path: Path) -> None:
    beyond = with_tokens(base, tmp_path / "beyond", "<unk>")
    contracts = []
    for directory in (base, beyond):
        template = ChatTemplate.from_directory(directory, None)
        contracts.append(build_contract(template, TextTokenizer.from_directory(directory, ROWS), []))
    assert len(contracts[1]) == len(contracts[0]) - 1
    assert all(max(entry["ids"]) < ROWS for entry in contracts[1])


def test_a_run_is_trained_exported_and_validated(
    base: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    beyond = with_tokens(base, tmp_path / "beyond", IMAGE)
    config = _config(beyond, tmp_path / "inputs")
    run = str(tmp_path / "run")
    assert cli.run(["train", str(config), "-o", run, "--set", "training.max_steps=2"]) == 0
    out = tmp_path / "out"
    assert cli.run(["merge-export", run, "--format", "gguf,onnx", "-q", "f32", "-o", str(out)]) == 0
    for artifact in (path for path in out.iterdir() if path.suffix == ".gguf" or path.is_dir()):
        assert cli.run(["validate", run, str(artifact)]) in (0, 3)
        assert "contract holds" in capsys.readouterr().out
    text = tmp_path / "text.txt"
    text.write_text(f"words and {IMAGE} " * 600)
    assert cli.run(["reference", run, "--llama-kld", str(tmp_path / "base.kld"), "--llama-text", str(text)]) == 1
    assert f"holds '{IMAGE}' (token 503)" in capsys.readouterr().err
