"""tokenizer.json is trained on and exported where transformers' class builds another tokenizer, with a note."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
from tokenizers import Tokenizer

from edgetune import cli
from edgetune.data.chat import ChatTemplate
from edgetune.planning.tokenizer_files import save_tokenizer
from edgetune.training import adapters, environment, loading
from tests.converters import tiny, vocabularies
from tests.data import templates
from tests.training import runs

transformers = tiny.transformers

TEXTS = ("Hello", "<|user|>\nHello</s>\n<|assistant|>\n", "</s>Hello", "</s> Hello", " e\u0301  \uff21", "7 12 1234567")
TEMPLATE = (
    "{% for m in messages %}{{ '<|' + m.role + '|>\n' + m.content + eos_token + '\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|assistant|>\n' }}{% endif %}"
)


@pytest.fixture(scope="module")
def weights(tmp_path_factory: pytest.TempPathFactory) -> Path:
    with environment.silence_libraries():
        return runs.make_base(tmp_path_factory.mktemp("weights") / "base")


def _change(path: Path, **entries: Any) -> None:
    stated = json.loads(path.read_text(encoding="utf-8")) | entries
    path.write_text(json.dumps({name: value for name, value in stated.items() if value is not None}))


def _base(weights: Path, folder: Path, *, model_type: str = "llama", spaced: bool = False, **config: Any) -> Path:
    """The weights with a tokenizer: of a SentencePiece BPE that puts a space before a text, or byte-level."""
    base = shutil.copytree(weights, folder / "base")
    if spaced:
        vocabularies.sentencepiece(base, prefix=True, bos=True)
        _change(base / "tokenizer_config.json", chat_template=TEMPLATE)
    else:
        vocabularies.byte_level(base, chat_template=templates.CHATML, pad_token="<|endoftext|>")
    _change(base / "tokenizer_config.json", **config)
    _change(base / "config.json", model_type=model_type)
    return base


def _ids_of_file(base: Path) -> list[list[int]]:
    loaded = Tokenizer.from_file(str(base / "tokenizer.json"))
    return [loaded.encode(text, add_special_tokens=False).ids for text in TEXTS]


def _ids_of_transformers(directory: Path) -> list[list[int]] | None:
    """None if the class cannot be loaded."""
    try:
        loaded = transformers.AutoTokenizer.from_pretrained(directory)
        found: list[list[int]] = loaded(list(TEXTS), add_special_tokens=False)["input_ids"]
    except Exception:  # noqa: BLE001 - what its classes raise
        return None
    return found


def _edgetune(*arguments: object) -> int:
    return cli.run([str(argument) for argument in arguments])


def _config(base: Path, folder: Path) -> Path:
    values = runs.settings(base, folder, max_steps=2)
    values["data"].pop("test")
    return runs.write_config(folder / "config.yaml", values)


@pytest.mark.parametrize(
    ("spaced", "stated"),
    [
        (True, {"tokenizer_class": "LlamaTokenizer", "legacy": False}),
        (True, {"tokenizer_class": "LlamaTokenizerFast", "legacy": True}),
        (True, {"tokenizer_class": "PreTrainedTokenizerFast"}),
        *((False, {"model_type": name}) for name in ("qwen3", "phi", "gpt2", "starcoder2", "gpt_neox", "mpt")),
        *((False, {"model_type": name}) for name in ("cohere", "gemma", "gemma3_text", "mistral", "phi3", "internlm2")),
        *((False, {"model_type": name}) for name in ("qwen2", "bloom", "granite", "smollm3")),
        (True, {"model_type": "gemma"}),
        (False, {"tokenizer_class": "LlamaTokenizer"}),
        (False, {"tokenizer_class": "Nowhere"}),
        (False, {"auto_map": {"AutoTokenizer": ["code.Slow", None]}}),
    ],
)
def test_dry_run_passes_and_says_whether_the_class_follows_tokenizer_json(
    weights: Path,
    tmp_path: Path,
    capfd: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
    spaced: bool,
    stated: dict[str, Any],
) -> None:
    base = _base(weights, tmp_path, spaced=spaced, **stated)
    # model_type chooses the tokenizer's class here; the weights stay those of a Llama, which is not the question
    monkeypatch.setattr(loading, "load_empty_model", lambda *_: None)
    monkeypatch.setattr(adapters, "add_adapter", lambda *_: None)
    monkeypatch.setattr(adapters, "count_trainable", lambda *_: 1)
    with environment.silence_libraries():
        follows = _ids_of_transformers(base) == _ids_of_file(base)
    assert _edgetune("train", _config(base, tmp_path), "-o", tmp_path / "run", "--dry-run") == 0
    said = " ".join(capfd.readouterr().err.split())
    noted = "tokenizer.json is trained on and exported" in said
    assert noted or follows
    if not noted:
        return
    save_tokenizer(base, ChatTemplate(TEMPLATE), tmp_path / "saved", names_fast_class=True)
    with environment.silence_libraries():
        after = _ids_of_transformers(tmp_path / "saved")
    assert ("names PreTrainedTokenizerFast, which follows" in said) == (after == _ids_of_file(base))


def test_a_tokenizer_like_llama_2s_is_trained_and_its_outputs_load_with_the_ids_of_training(
    weights: Path, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    base = _base(weights, tmp_path, spaced=True, tokenizer_class="LlamaTokenizer", legacy=False)
    config, run = _config(base, tmp_path), tmp_path / "run"
    with environment.silence_libraries():
        assert _ids_of_transformers(base) != _ids_of_file(base)
    assert _edgetune("train", config, "-o", run) == 0
    said = " ".join(capfd.readouterr().err.split())
    assert said.count("class LlamaTokenizer gives other ids than tokenizer.json for ") == 1
    contract = json.loads((run / "reference/reference.json").read_text())["contract"]
    plain = Tokenizer.from_file(str(base / "tokenizer.json"))
    assert {tuple(entry["ids"][1:]) for entry in contract} == {
        tuple(plain.encode(entry["text"], add_special_tokens=False).ids) for entry in contract
    }
    assert _edgetune("merge-export", run, "-q", "f32", "--format", "gguf,onnx,safetensors") == 0
    with environment.silence_libraries():
        for output in (run / "tokenizer", run / "artifacts/run-f32", run / "artifacts/run-f32-onnx"):
            assert _ids_of_transformers(output) == _ids_of_file(base)
    assert _edgetune("train", config, "-o", run, "--resume") == 0
    assert "there is nothing to resume" in capfd.readouterr().err
    assert _edgetune("validate", run, run / "artifacts/run-f32.gguf") == 0
    assert _edgetune("verify", run / "artifacts/run-f32-onnx") == 0


def test_the_special_tokens_that_a_class_supplied_stay(weights: Path, tmp_path: Path) -> None:
    base = _base(weights, tmp_path, spaced=True, tokenizer_class="LlamaTokenizer")
    _change(base / "tokenizer_config.json", bos_token=None, eos_token=None, unk_token=None)
    save_tokenizer(base, ChatTemplate(TEMPLATE), tmp_path / "saved", names_fast_class=True)
    stated = json.loads((tmp_path / "saved/tokenizer_config.json").read_text())
    assert (stated["bos_token"], stated["eos_token"], stated["unk_token"]) == ("<s>", "</s>", "<unk>")
