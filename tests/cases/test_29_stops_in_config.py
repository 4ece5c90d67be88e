"""Stop tokens of config.json alone are those of transformers: the list, where no generation_config.json states any."""

from __future__ import annotations

import json
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import pytest

from edgetune import runtime
from edgetune.data.text_tokenizer import TextTokenizer
from edgetune_converters import gguf
from edgetune_converters.gguf import keys
from edgetune_converters.tokenizers.special import special_token_ids
from tests.converters import tiny
from tests.export_requests import export
from tests.training import runs

transformers = tiny.transformers


@pytest.fixture(scope="module")
def plain(tmp_path_factory: pytest.TempPathFactory) -> Path:
    base = runs.make_base(tmp_path_factory.mktemp("stops") / "base")
    (base / "generation_config.json").unlink(missing_ok=True)
    return base


def _eos(base: Path) -> int:
    found = special_token_ids(base, {}, None, 512).stops
    return found[0]


def _stated(base: Path, value: Any, generation: Any = None) -> None:
    config = json.loads((base / "config.json").read_text())
    (base / "config.json").write_text(json.dumps(config | {"eos_token_id": value}))
    path = base / "generation_config.json"
    path.unlink(missing_ok=True)
    if generation is not None:
        path.write_text(json.dumps({"eos_token_id": generation}))


def _of_transformers(base: Path) -> set[int]:
    stops = transformers.AutoModelForCausalLM.from_pretrained(base).generation_config.eos_token_id
    return set(stops) if isinstance(stops, list) else {stops}


def _in_files(base: Path, folder: Path) -> tuple[list[int | None], list[int], list[set[int]], list[str]]:
    """The stop keys of the GGUF file, those carried, what both runtimes stop at, and the notes."""
    receipts = export(base, {"f32": folder / "m.gguf"}, onnx={"f32": folder / "onnx"})
    metadata: dict[str, Any] = gguf.read(folder / "m.gguf").metadata
    named = [metadata.get(f"tokenizer.ggml.{key}_token_id") for key in ("eos", "eot", "eom")]
    found: list[set[int]] = []
    for path in (folder / "m.gguf", folder / "onnx"):
        with runtime.load(path) as model:
            found.append(set(model.stop_tokens))
    return named, metadata.get(keys.STOPS, []), found, [note for receipt in receipts for note in receipt.notes]


def _genai(folder: Path) -> Any:
    return json.loads((folder / "onnx" / "genai_config.json").read_text())["model"]["eos_token_id"]


@pytest.mark.parametrize(
    ("config", "generation"),
    [
        pytest.param([0, 40, 41], None, id="three in config.json"),
        pytest.param(40, None, id="one number in config.json"),
        pytest.param([0, 40, 41, 42], None, id="four"),
        pytest.param([40, 41, 42], [43], id="generation_config.json counts alone"),
        pytest.param([40, 41], [40, 43], id="both"),
    ],
)
def test_the_files_stop_where_transformers_does(config: Any, generation: Any, plain: Path, tmp_path: Path) -> None:
    own = _eos(plain)
    _stated(plain, [own if id_ == 0 else id_ for id_ in config] if isinstance(config, list) else config, generation)
    named, carried, found, _ = _in_files(plain, tmp_path)
    expected = _of_transformers(plain) | {own}
    turn_end = TextTokenizer.from_directory(plain).id_of("<|im_end|>")
    assert turn_end is not None
    assert {id_ for id_ in [*named, *carried] if id_ is not None} == expected | {turn_end}
    # <|endoftext|> is a stop token of llama.cpp by its text
    known = TextTokenizer.from_directory(plain).id_of("<|endoftext|>")
    assert [stops - {known} for stops in found] == [(expected | {turn_end}) - {known}] * 2
    assert set(_listed(_genai(tmp_path))) == expected | {turn_end}
    assert TextTokenizer.from_directory(plain).stop_ids == expected


def _listed(value: Any) -> Iterable[int]:
    return value if isinstance(value, list) else [value]


def test_a_stop_token_without_a_place_in_gguf_is_named_and_carried(plain: Path, tmp_path: Path) -> None:
    _stated(plain, [40, 41, 42, 43])
    _, carried, found, notes = _in_files(plain, tmp_path)
    assert carried
    assert {40, 41, 42, 43} <= found[0]
    assert [note for note in notes if "have no place in GGUF" in note]
    export(tmp_path / "m.gguf", {"f16": tmp_path / "again.gguf"})
    assert gguf.read(tmp_path / "again.gguf").metadata[keys.STOPS] == carried


def test_the_list_may_be_in_the_text_part_of_the_config(plain: Path, tmp_path: Path) -> None:
    _stated(plain, None)
    config = json.loads((plain / "config.json").read_text())
    nested = {**config, "text_config": {"eos_token_id": [40, 41]}}
    (plain / "config.json").write_text(json.dumps(nested))
    try:
        named, carried, *_ = _in_files(plain, tmp_path)
        assert {40, 41} <= TextTokenizer.from_directory(plain).stop_ids
    finally:
        (plain / "config.json").write_text(json.dumps(config))
    assert {40, 41} <= {*named, *carried}


def test_a_number_that_is_no_token_is_left_out(plain: Path, tmp_path: Path) -> None:
    _stated(plain, [40, 9999, -1])
    named, carried, *_ = _in_files(plain, tmp_path)
    assert 40 in named
    assert not {9999, -1} & {*named, *carried}


# -- the length that other runtimes reserve ---------------------------------------------------------------------------


@pytest.mark.parametrize(("context", "length"), [(131072, 4096), (4096, 4096), (256, 256)])
def test_an_onnx_folder_reserves_no_more_than_4096_tokens(
    context: int, length: int, plain: Path, tmp_path: Path
) -> None:
    config = json.loads((plain / "config.json").read_text())
    (plain / "config.json").write_text(json.dumps(config | {"max_position_embeddings": context}))
    export(plain, {}, onnx={"int4": tmp_path / "onnx"})
    (plain / "config.json").write_text(json.dumps(config))
    stated = json.loads((tmp_path / "onnx" / "genai_config.json").read_text())
    assert (stated["search"]["max_length"], stated["model"]["context_length"]) == (length, context)
