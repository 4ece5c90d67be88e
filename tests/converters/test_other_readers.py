"""gguf-py, its scripts and llama.cpp's own interface read from our files what we wrote."""

from __future__ import annotations

import ctypes
import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import gguf
import llama_cpp
import numpy as np
import pytest
from gguf.quants import dequantize

from edgetune import runtime as runtimes
from edgetune.data.chat import ChatTemplate
from edgetune_converters.gguf import reader
from edgetune_converters.reading.gguf_base import open_base
from tests.converters import runtime, tiny
from tests.export_requests import export

SAMPLE = Path(__file__).parents[2] / "samples/smart-home/smart-home-q4_k_m.gguf"
NAMES = {
    "token_embd.weight": "model.embed_tokens.weight",
    "blk.1.ffn_down.weight": "model.layers.1.mlp.down_proj.weight",
}
TYPES = ("f32", "bf16", "q8_0", "q4_0", "q5_1", "iq4_nl")


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny.base("llama-tied", tmp_path_factory.mktemp("base"))


@pytest.fixture(scope="module")
def files(base: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    folder = tmp_path_factory.mktemp("files")
    found = {type_: folder / f"{type_}.gguf" for type_ in TYPES}
    export(base, found)
    return found | {"q4_k_m": SAMPLE}


def _script(name: str, *arguments: object) -> str:
    asked = [sys.executable, "-W", "ignore", "-m", f"gguf.scripts.{name}", *map(str, arguments)]
    done = subprocess.run(asked, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    return done.stdout


@pytest.mark.parametrize("type_", [*TYPES, "q4_k_m"])
def test_gguf_py_dequantizes_the_tensors_as_we_do(type_: str, files: dict[str, Path]) -> None:
    ours = open_base(files[type_])
    stored = {tensor.name: tensor for tensor in gguf.GGUFReader(files[type_]).tensors}
    assert list(stored) == [entry.name for entry in reader.read(files[type_]).tensors]
    for theirs, name in NAMES.items():
        tensor = stored[theirs]
        values = dequantize(tensor.data, tensor.tensor_type)
        assert np.array_equal(values, ours.rows(name, slice(None)))


def test_gguf_dump_shows_every_key_and_tensor(files: dict[str, Path]) -> None:
    for path in files.values():
        ours = reader.read(path)
        dumped = json.loads(_script("gguf_dump", path, "--json", "--json-array"))
        found = {key: entry["value"] for key, entry in dumped["metadata"].items() if not key.startswith("GGUF.")}
        assert found.keys() == ours.metadata.keys()
        for key, value in ours.metadata.items():
            assert found[key] == (pytest.approx(value) if isinstance(value, float) else value), key
        assert {name: entry["shape"][::-1] for name, entry in dumped["tensors"].items()} == {
            entry.name: list(entry.shape) for entry in ours.tensors
        }
    assert "token_embd.weight" in _script("gguf_dump", SAMPLE)
    assert "token_embd.weight" in _script("gguf_dump", SAMPLE, "--markdown")
    assert int(_script("gguf_dump", SAMPLE, "--data-alignment")) == 32


def test_metadata_changed_by_its_scripts_leave_a_file_that_we_read(files: dict[str, Path], tmp_path: Path) -> None:
    """The weights keep their hash, and the file its golden conversations."""
    copy = tmp_path / "copy.gguf"
    _script("gguf_new_metadata", SAMPLE, copy, "--general-name", "another")
    _script("gguf_set_metadata", copy, "llama.context_length", 128, "--force")
    before, after = reader.read(SAMPLE), reader.read(copy)
    assert after.metadata["general.name"] == "another"
    assert after.metadata["llama.context_length"] == 128
    kept = before.metadata.keys() - {"general.name", "llama.context_length"}
    assert {key: after.metadata[key] for key in kept} == {key: before.metadata[key] for key in kept}
    with runtimes.load(copy) as opened:
        opened.verify()
    ids = tiny.random_ids(20, 2000)
    assert np.array_equal(runtime.logits(copy, ids), runtime.logits(SAMPLE, ids))


@pytest.mark.parametrize("type_", ["f32", "q8_0", "q4_0"])
def test_big_endian_and_back_is_the_same_file(type_: str, files: dict[str, Path], tmp_path: Path) -> None:
    copy = tmp_path / "x.gguf"
    copy.write_bytes(files[type_].read_bytes())
    for order in ("big", "little"):
        asked = [sys.executable, "-m", "gguf.scripts.gguf_convert_endian", str(copy), order]
        done = subprocess.run(asked, input="YES\n", capture_output=True, text=True, check=False)
        assert done.returncode == 0, done.stderr
    assert copy.read_bytes() == files[type_].read_bytes()


def test_special_tokens_are_those_that_gguf_py_finds_in_the_base(base: Path, files: dict[str, Path]) -> None:
    theirs = gguf.SpecialVocab(base, load_merges=True)
    ours = reader.read(files["f32"]).metadata
    for name, number in theirs.special_token_ids.items():
        assert ours[f"tokenizer.ggml.{name}_token_id"] == number
    for name, flag in theirs.add_special_token.items():
        assert ours.get(f"tokenizer.ggml.add_{name}_token", False) == flag
    assert ours["tokenizer.ggml.merges"] == theirs.merges
    assert ours["tokenizer.chat_template"] == theirs.chat_template


def _text(call: Any, *arguments: Any) -> str:
    buffer = ctypes.create_string_buffer(1 << 16)
    assert call(*arguments, buffer, len(buffer)) >= 0
    return buffer.value.decode()


@pytest.mark.parametrize("type_", ["f32", "q4_k_m"])
def test_llama_cpp_has_the_metadata_the_template_and_the_stop_tokens(type_: str, files: dict[str, Path]) -> None:
    ours: Any = reader.read(files[type_])
    with runtimes.load(files[type_]) as opened, runtime._model(files[type_], vocab_only=True) as model:
        vocabulary = llama_cpp.llama_model_get_vocab(model)
        count = llama_cpp.llama_vocab_n_tokens(vocabulary)
        assert count == len(ours.metadata["tokenizer.ggml.tokens"])
        stops = {token for token in range(count) if llama_cpp.llama_vocab_is_eog(vocabulary, token)}
        assert stops == opened.stop_tokens
        assert llama_cpp.llama_vocab_eos(vocabulary) == ours.metadata["tokenizer.ggml.eos_token_id"]
        if (bos := ours.metadata.get("tokenizer.ggml.bos_token_id")) is not None:  # 11 without one, and not added
            assert llama_cpp.llama_vocab_bos(vocabulary) == bos
        assert llama_cpp.llama_vocab_get_add_bos(vocabulary) == ours.metadata["tokenizer.ggml.add_bos_token"]
        template = llama_cpp.llama_model_chat_template(model, None)
        assert template.decode() == ours.metadata["tokenizer.chat_template"]
        assert isinstance(opened.chat_template, ChatTemplate)
        keys = [
            _text(llama_cpp.llama_model_meta_key_by_index, model, index)
            for index in range(llama_cpp.llama_model_meta_count(model))
        ]
        plain = {key for key, value in ours.metadata.items() if not isinstance(value, list)}
        assert plain <= set(keys)
        for key in plain:
            found = _text(llama_cpp.llama_model_meta_val_str, model, key.encode())
            value = ours.metadata[key]
            if isinstance(value, str):
                assert found == value, key


def test_llama_cpp_finds_named_templates(base: Path, tmp_path: Path) -> None:
    named = tmp_path / "named"
    named.mkdir()
    for path in base.iterdir():
        (named / path.name).write_bytes(path.read_bytes())
    stated = json.loads((named / "tokenizer_config.json").read_text())
    plain = stated["chat_template"]
    stated["chat_template"] = [
        {"name": "default", "template": plain}, {"name": "tool_use", "template": "{{ tools }}" + plain},
    ]  # fmt: skip
    (named / "tokenizer_config.json").write_text(json.dumps(stated))
    export(named, {"f32": tmp_path / "x.gguf"})
    with runtime._model(tmp_path / "x.gguf", vocab_only=True) as model:
        assert llama_cpp.llama_model_chat_template(model, None).decode() == plain
        assert llama_cpp.llama_model_chat_template(model, b"tool_use").decode() == "{{ tools }}" + plain
