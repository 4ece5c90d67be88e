"""Template options stored in an exported file are given to its template; a caller can replace them."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest

from edgetune.data.chat import options_metadata
from edgetune.errors import ConfigError
from edgetune.runtime import Runtime, load
from edgetune.validation.contract import options_difference
from tests.cli_runner import edgetune, sentence
from tests.export_requests import export

TEMPLATE = (
    "{% for m in messages %}<|im_start|>{{ m.role }}\n{{ m.content }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{{ effort }}{% endif %}"
)
OPTIONS = {"effort": "low"}
ASK = [{"role": "user", "content": "dim"}]


@pytest.fixture(scope="module")
def files(base: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    folder = tmp_path_factory.mktemp("options")
    paths = {"gguf": folder / "model.gguf", "onnx": folder / "onnx"}
    export(base, {"f32": paths["gguf"]}, onnx={"f32": paths["onnx"]}, chat_template=TEMPLATE, threads=1,
           metadata=options_metadata(OPTIONS))  # fmt: skip
    return paths


@pytest.fixture(params=["gguf", "onnx"])
def configured(request: pytest.FixtureRequest, files: dict[str, Path]) -> Iterator[Runtime]:
    with load(files[request.param]) as opened:
        yield opened


def test_the_stored_options_are_given_to_the_template(configured: Runtime) -> None:
    before = "<|im_start|>user\ndim<|im_end|>\n<|im_start|>assistant\n"
    assert configured.tokenize_chat(ASK) == configured.tokenize(before + "low")
    assert configured.tokenize_chat(ASK, template_options={"effort": "high"}) == configured.tokenize(before + "high")
    with pytest.raises(ConfigError, match="does not read the option style"):
        configured.tokenize_chat(ASK, template_options={"style": 1})


def test_other_options_than_those_of_training_break_the_contract(configured: Runtime) -> None:
    assert options_difference(configured, OPTIONS) is None
    assert options_difference(configured, {"effort": "high"}) == (
        'the file gives the template the options {"effort": "low"}, training gave {"effort": "high"}'
    )
    assert options_difference(configured, {}) is not None


def test_inspect_shows_the_options(files: dict[str, Path]) -> None:
    for path in files.values():
        assert b'{"effort":"low"}' in edgetune("inspect", path).stdout


def test_run_takes_options(files: dict[str, Path]) -> None:
    def answer(*options: str) -> bytes:
        result = edgetune("run", files["gguf"], "-p", "dim", "--max-tokens", "8", *options)
        assert result.returncode == 0
        return result.stdout

    assert answer() == answer("--template-option", "effort=low") == answer("--template-option", 'effort="low"')
    assert answer() != answer("--template-option", "effort=[1]")


@pytest.mark.parametrize(
    ("options", "words"),
    [
        (["--template-option", "style=1"], "does not read the option style"),
        (["--template-option", "effort"], "'effort' is not of the form NAME=VALUE"),
        (["--template-option", "effort=False"], "False is not JSON"),
        (["--template-option", "effort=1", "--raw"], "--template-option cannot be used with --raw"),
    ],
)
def test_run_refuses_other_options(files: dict[str, Path], options: list[str], words: str) -> None:
    result = edgetune("run", files["gguf"], "-p", "dim", *options)
    assert result.returncode == 2
    assert words in sentence(result)
