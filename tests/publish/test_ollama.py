"""From a fine-tune to Ollama: the files of an export have the forms that Ollama reads; it cannot be run here.

Sources: Ollama's pages on the Modelfile (instructions) and on templates (their variables).
"""

from __future__ import annotations

import json
import re
from pathlib import Path

import pytest

from edgetune.publish import go_templates, modelfile
from edgetune_converters.gguf import reader
from tests.cli_runner import edgetune_process
from tests.converters import tiny
from tests.runtime import models

INSTRUCTIONS = {"FROM", "PARAMETER", "TEMPLATE", "SYSTEM", "ADAPTER", "LICENSE", "MESSAGE", "REQUIRES"}
ROOT = Path(__file__).parents[2]


def parse(text: str) -> list[tuple[str, str]]:
    """Read a Modelfile as Ollama does: an instruction, then a text up to the end of the line or in triple quotes."""
    found, at = [], 0
    pattern = re.compile(r'([A-Za-z]+)[ \t]+(?:"""(.*?)"""|([^\n]*))(?:\n|\Z)', re.DOTALL)
    while at < len(text):
        if text[at] in "#\n":
            at = text.index("\n", at) + 1
            continue
        match = pattern.match(text, at)
        assert match is not None, text[at : at + 60]
        assert match[1].upper() in INSTRUCTIONS
        found.append((match[1].upper(), match[3] if match[2] is None else match[2]))
        at = match.end()
    return found


@pytest.fixture(scope="module")
def artifacts(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """What `merge-export` writes of a base and an adapter."""
    folder = tmp_path_factory.mktemp("ollama")
    base = models.base(folder / "base")
    adapter = tiny.adapter(base, folder / "mine")
    result = edgetune_process(
        "merge-export", "--base", base, "--adapter", adapter, "--format", "gguf,gguf-lora", "-q", "q8_0", "--modelfile",
        "-o", folder / "out",
    )  # fmt: skip
    assert result.returncode == 0, result.stderr.decode()
    return folder / "out"


def test_the_modelfile_names_the_file_the_template_and_the_stops(artifacts: Path) -> None:
    (path,) = artifacts.glob("*.Modelfile")
    lines = parse(path.read_text())
    file = (artifacts / dict(lines)["FROM"]).resolve()
    assert file.is_file()
    assert [name for name, _ in lines] == ["FROM", "TEMPLATE", "PARAMETER"]
    metadata = reader.read(file).metadata
    stops = [json.loads(value.removeprefix("stop ")) for name, value in lines if name == "PARAMETER"]
    assert stops == modelfile.stop_texts(metadata)
    asked = [{"role": "user", "content": "dim the lights"}]
    prompt = "<|im_start|>user\ndim the lights<|im_end|>\n<|im_start|>assistant\n"
    assert go_templates.render(dict(lines)["TEMPLATE"], asked) == prompt


def test_the_adapter_has_the_keys_by_which_ollama_knows_one(artifacts: Path) -> None:
    (path,) = artifacts.glob("*-lora*.gguf")
    file = reader.read(path)
    base = reader.read(next(artifacts.glob("*-q8_0.gguf")))
    assert file.metadata["general.type"] == "adapter"
    assert file.metadata["adapter.type"] == "lora"
    assert file.metadata["general.architecture"] == base.metadata["general.architecture"]
    names = {tensor.name for tensor in file.tensors}
    assert names
    assert {name.removesuffix(".lora_a").removesuffix(".lora_b") for name in names} <= {
        tensor.name for tensor in base.tensors
    }
    assert {name.removesuffix("_a") + "_b" for name in names if name.endswith("_a")} <= names


def test_the_modelfiles_in_the_docs_are_ones() -> None:
    text = (ROOT / "docs/ollama.md").read_text()
    blocks = [block for block in re.findall(r"```\w*\n(.*?)```", text, re.DOTALL) if block.startswith("FROM")]
    assert len(blocks) == 2
    merged, adapted = map(parse, blocks)
    assert [name for name, _ in merged][:2] == ["FROM", "TEMPLATE"]
    assert ("ADAPTER", "./smart-home-lora.gguf") in adapted
    metadata = reader.read(ROOT / "samples/smart-home/smart-home-q4_k_m.gguf").metadata
    for lines in (merged, adapted):
        assert dict(lines)["TEMPLATE"] == modelfile.derive_template(metadata).template
        stops = [
            json.loads(value.removeprefix("stop ")) for name, value in lines if name == "PARAMETER" and "stop" in value
        ]
        assert set(stops) <= set(modelfile.stop_texts(metadata))
