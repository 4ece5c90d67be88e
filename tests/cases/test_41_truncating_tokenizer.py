"""What is written beside weights neither truncates nor pads, whatever tokenizer.json has kept of a training script."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from tokenizers import Tokenizer

from edgetune import cli
from edgetune.data.chat import ChatTemplate
from edgetune.planning.tokenizer_files import changed_tokenizer_files, save_tokenizer
from edgetune.runs.directory import RunDirectory
from edgetune_converters.files.companions import tokenizer_notes, without_limits
from tests.converters import tiny
from tests.data import templates
from tests.export_requests import export
from tests.training import runs

TEXT = "dim the lights please " * 40


def _truncating(tokenizer: Tokenizer) -> None:
    tokenizer.enable_truncation(max_length=32)


def _truncating_left(tokenizer: Tokenizer) -> None:
    tokenizer.enable_truncation(max_length=32, stride=4, direction="left", strategy="only_first")


def _padding(tokenizer: Tokenizer) -> None:
    tokenizer.enable_padding(length=64, pad_id=0, pad_token="<|endoftext|>")


def _padding_to_the_longest(tokenizer: Tokenizer) -> None:
    tokenizer.enable_padding(pad_to_multiple_of=8)


def _both(tokenizer: Tokenizer) -> None:
    _truncating(tokenizer)
    _padding(tokenizer)


LIMITS: dict[str, tuple[Callable[[Tokenizer], None], str]] = {
    "both": (_both, "truncates texts to 32 tokens and pads texts to 64 tokens"),
    "truncation": (_truncating, "tokenizer.json truncates texts to 32 tokens:"),
    "left, with stride": (_truncating_left, "tokenizer.json truncates texts to 32 tokens:"),
    "padding": (_padding, "tokenizer.json pads texts to 64 tokens:"),
    "padding to the longest": (_padding_to_the_longest, "tokenizer.json pads texts:"),
}


@pytest.fixture(scope="module")
def plain(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return runs.make_base(tmp_path_factory.mktemp("truncating") / "plain")


def _with_limits(plain: Path, directory: Path, limits: Callable[[Tokenizer], None]) -> Path:
    shutil.copytree(plain, directory)
    tokenizer = Tokenizer.from_file(str(plain / "tokenizer.json"))
    limits(tokenizer)
    tokenizer.save(str(directory / "tokenizer.json"))
    assert len(Tokenizer.from_file(str(directory / "tokenizer.json")).encode(TEXT).ids) != 240
    return directory


def _ids(directory: Path) -> list[int]:
    found: list[int] = Tokenizer.from_file(str(directory / "tokenizer.json")).encode(TEXT).ids
    return found


@pytest.mark.parametrize("kind", LIMITS)
def test_copies_give_the_ids_of_the_whole_text(kind: str, plain: Path, tmp_path: Path) -> None:
    limits, words = LIMITS[kind]
    base = _with_limits(plain, tmp_path / "base", limits)
    receipts = export(base, {}, safetensors={"base": tmp_path / "merged"}, onnx={"f32": tmp_path / "onnx"})
    for folder, receipt in zip(("merged", "onnx"), receipts, strict=True):
        assert _ids(tmp_path / folder) == _ids(plain)
        assert tiny.transformers.AutoTokenizer.from_pretrained(tmp_path / folder)(TEXT)["input_ids"] == _ids(plain)
        assert [words in note for note in receipt.notes] == [True]


def test_the_other_bytes_are_unchanged(plain: Path, tmp_path: Path) -> None:
    base = _with_limits(plain, tmp_path / "base", _both)
    stated = json.loads((base / "tokenizer.json").read_bytes())
    last = {key: stated[key] for key in stated if key not in ("truncation", "padding")}
    last |= {"padding": stated["padding"], "truncation": stated["truncation"]}
    for text in (json.dumps(stated, indent=7), json.dumps(last), json.dumps(stated, separators=(" ,", "\t:\n"))):
        copied = without_limits(text.encode()).decode()
        assert json.loads(copied) == stated | {"truncation": None, "padding": None}
        before = next(i for i, pair in enumerate(zip(text, copied, strict=False)) if pair[0] != pair[1])
        assert copied[:before] == text[:before]
    whole = Tokenizer.from_file(str(base / "tokenizer.json"))
    whole.no_truncation()
    whole.no_padding()
    whole.save(str(tmp_path / "whole.json"))
    assert without_limits((base / "tokenizer.json").read_bytes()) == (tmp_path / "whole.json").read_bytes()


@pytest.mark.parametrize("content", [b"", b"{", b"[]", b"\xff{", b'{"truncation": {', b'{"truncation" 1}'])
def test_what_is_no_tokenizer_is_left_as_it_is(content: bytes) -> None:
    assert without_limits(content) == content


def test_an_adapter_with_such_a_tokenizer_beside_it(plain: Path, tmp_path: Path) -> None:
    adapter = tiny.adapter(plain, tmp_path / "adapter")
    beside = _with_limits(plain, tmp_path / "beside", _both)
    for name in ("tokenizer.json", "tokenizer_config.json"):
        shutil.copy(beside / name, adapter / name)
    out = tmp_path / "merged"
    flags = ["--base", str(plain), "--adapter", str(adapter), "--format", "safetensors", "-o", str(out)]
    assert cli.run(["merge-export", *flags]) == 0
    assert _ids(out) == _ids(plain)


def test_a_run_keeps_the_whole_text_and_its_identity(
    plain: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    base = _with_limits(plain, tmp_path / "base", _both)
    config = runs.write_config(tmp_path / "c.yaml", runs.settings(base, tmp_path, max_steps=2))
    train = ["train", str(config), "-o", str(tmp_path / "run")]
    assert cli.run(train) == 0
    assert capsys.readouterr().err.replace("\n", " ").count("truncates texts to 32 tokens and pads texts to 64") == 1
    run = RunDirectory.open(tmp_path / "run")
    assert _ids(run.tokenizer) == _ids(plain)
    assert cli.run([*train, "--resume"]) == 0
    assert "step 1" not in capsys.readouterr().err
    assert cli.run(["merge-export", str(run.path), "-q", "q8_0"]) == 0


def test_a_run_of_an_older_version_is_still_the_same(plain: Path, tmp_path: Path) -> None:
    base = _with_limits(plain, tmp_path / "base", _both)
    save_tokenizer(base, ChatTemplate(templates.CHATML), tmp_path / "run")
    assert changed_tokenizer_files(base, ChatTemplate(templates.CHATML), tmp_path / "run") == []
    shutil.copy(base / "tokenizer.json", tmp_path / "run" / "tokenizer.json")  # as before: byte for byte
    assert changed_tokenizer_files(base, ChatTemplate(templates.CHATML), tmp_path / "run") == []
    assert changed_tokenizer_files(plain, ChatTemplate(templates.CHATML), tmp_path / "run") == []
    tokenizer = json.loads((plain / "tokenizer.json").read_bytes())
    tokenizer["added_tokens"][0]["lstrip"] = True
    (tmp_path / "run" / "tokenizer.json").write_text(json.dumps(tokenizer))
    assert changed_tokenizer_files(base, ChatTemplate(templates.CHATML), tmp_path / "run") == ["tokenizer.json"]


@pytest.mark.parametrize(("limit", "noted"), [(32, True), (256, False), (10**30, False), (None, False)])
def test_a_short_model_max_length_is_named(limit: Any, noted: bool, plain: Path, tmp_path: Path) -> None:
    shutil.copytree(plain, tmp_path / "base")
    stated = json.loads((plain / "tokenizer_config.json").read_text())
    (tmp_path / "base" / "tokenizer_config.json").write_text(json.dumps(stated | {"model_max_length": limit}))
    notes = tokenizer_notes(tmp_path / "base", {"max_position_embeddings": 256})
    assert ["states model_max_length 32, the model's context is 256" in note for note in notes] == [True] * noted
