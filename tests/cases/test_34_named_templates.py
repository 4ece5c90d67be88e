"""Named chat templates and chat_template.json: every output has the set that the base has, by a run and by --base."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest

from edgetune import cli, runtime
from edgetune.data.chat import ChatTemplate, named_templates
from edgetune.errors import DataError
from edgetune.training import environment
from edgetune_converters.gguf import reader
from tests.converters import tiny
from tests.data import templates
from tests.training import runs

transformers = tiny.transformers

PLAIN = templates.CHATML
TOOLS = "{% if tools %}{{ tools | tojson }}\n{% endif %}" + PLAIN
RAG = "{{ '' }}" + PLAIN
TOOL = {"type": "function", "function": {"name": "dim", "parameters": {"type": "object", "properties": {}}}}


@pytest.fixture(scope="module")
def plain(tmp_path_factory: pytest.TempPathFactory) -> Path:
    with environment.silence_libraries():
        base = runs.make_base(tmp_path_factory.mktemp("base") / "base")
    _state(base, chat_template=None)
    return base


def _state(base: Path, **entries: Any) -> None:
    path = base / "tokenizer_config.json"
    stated = json.loads(path.read_text()) | entries
    path.write_text(json.dumps({key: value for key, value in stated.items() if value is not None}))


def _folder(base: Path) -> None:
    (base / "chat_template.jinja").write_text(PLAIN)
    (base / "additional_chat_templates").mkdir()
    (base / "additional_chat_templates/tool_use.jinja").write_text(TOOLS)


def _list(base: Path) -> None:
    _state(base, chat_template=_listed(default=PLAIN, tool_use=TOOLS, rag=RAG))


def _without_default(base: Path) -> None:
    _state(base, chat_template=_listed(tool_use=TOOLS, rag=RAG))


def _json(base: Path) -> None:
    (base / "chat_template.json").write_text(json.dumps({"chat_template": PLAIN}))


def _listed(**named: str) -> list[dict[str, str]]:
    return [{"name": name, "template": text} for name, text in named.items()]


def _base(plain: Path, folder: Path, change: Any) -> Path:
    base = shutil.copytree(plain, folder / "base")
    change(base)
    return base


def _of_transformers(directory: Path) -> Any:
    with environment.silence_libraries():
        found = transformers.AutoTokenizer.from_pretrained(directory).chat_template
    return {"default": found} if isinstance(found, str) else found or {}


def _of_gguf(path: Path) -> dict[str, str]:
    metadata: dict[str, Any] = reader.read(path).metadata
    named = {"default": "tokenizer.chat_template"} | {
        name: f"tokenizer.chat_template.{name}" for name in metadata.get("tokenizer.chat_templates", [])
    }
    return {name: metadata[key] for name, key in named.items() if key in metadata}


def _config(base: Path, folder: Path, *, tools: bool = False, **data: Any) -> Path:
    values = runs.settings(base, folder, max_steps=2, max_length=250)
    values["data"] |= data
    if tools:
        for split in ("train", "validation", "test"):
            path = Path(values["data"][split])
            rows = [json.loads(line) | {"tools": [TOOL]} for line in path.read_text().splitlines()]
            path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return runs.write_config(folder / "config.yaml", values)


def _edgetune(*arguments: object) -> int:
    return cli.run([str(argument) for argument in arguments])


FORMATS = ("--format", "gguf,onnx,safetensors", "-q", "f32")


@pytest.mark.parametrize(
    ("change", "expected"),
    [
        (_folder, {"default": PLAIN, "tool_use": TOOLS}),
        (_list, {"default": PLAIN, "tool_use": TOOLS, "rag": RAG}),
        (_json, {"default": PLAIN}),
        (_without_default, {"tool_use": TOOLS, "rag": RAG}),
    ],
)
def test_every_output_has_the_templates_of_the_base(
    plain: Path, tmp_path: Path, capfd: pytest.CaptureFixture[str], change: Any, expected: dict[str, str]
) -> None:
    base = _base(plain, tmp_path, change)
    if change is not _json:  # which AutoProcessor reads, and AutoTokenizer does not
        assert _of_transformers(base) == expected
    assert _edgetune("merge-export", "--base", base, *FORMATS, "-o", tmp_path / "out") == 0
    outputs = [tmp_path / "out/base-f32", tmp_path / "out/base-f32-onnx"]
    files = [tmp_path / "out/base-f32.gguf"]
    run = tmp_path / "run"
    if change is not _without_default:
        assert _edgetune("train", _config(base, tmp_path), "-o", run) == 0
        assert _edgetune("merge-export", run, *FORMATS) == 0
        outputs += [run / "tokenizer", run / "artifacts/run-f32", run / "artifacts/run-f32-onnx"]
        files.append(run / "artifacts/run-f32.gguf")
    for output in outputs:
        assert _of_transformers(output) == expected, output
        assert named_templates(output) == expected
    for file in files:
        assert _of_gguf(file) == expected, file


def test_without_a_default_the_sentence_names_the_templates(
    plain: Path, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    base = _base(plain, tmp_path, _without_default)
    assert _edgetune("train", _config(base, tmp_path), "-o", tmp_path / "run", "--dry-run") == 1
    said = " ".join(capfd.readouterr().err.split())
    assert "has no default chat template; its templates are called tool_use, rag" in said
    assert "Choose one of them: data.chat_template: tool_use" in said
    assert _edgetune("merge-export", "--base", base, "-q", "f32", "-o", tmp_path / "out") == 0
    assert _edgetune("run", tmp_path / "out/base-f32.gguf", "-p", "lamp?") == 2
    assert "has no default chat template, only rag, tool_use" in capfd.readouterr().err
    with pytest.raises(DataError, match=r"nor one of chatml, alpaca, plain, tool_use, rag"):
        ChatTemplate.from_directory(base, "nothing")


@pytest.mark.parametrize("override", ["rag", "chatml", "own.jinja"])
def test_a_template_of_the_configuration_replaces_the_default_one_and_tool_use(
    plain: Path, tmp_path: Path, capfd: pytest.CaptureFixture[str], override: str
) -> None:
    base, run = _base(plain, tmp_path, _list), tmp_path / "run"
    (tmp_path / "own.jinja").write_text("{{- '' }}" + PLAIN)
    config = _config(base, tmp_path, tools=True, chat_template=override)
    assert _edgetune("train", config, "-o", run) == 0
    assert "also replaces the base's template tool_use" in " ".join(capfd.readouterr().err.split())
    assert _edgetune("merge-export", run, *FORMATS) == 0
    used = {"rag": RAG, "own.jinja": "{{- '' }}" + PLAIN}.get(override) or (
        run / "tokenizer/chat_template.jinja"
    ).read_text()
    expected = {"default": used, "tool_use": used, "rag": RAG}
    assert _of_gguf(run / "artifacts/run-f32.gguf") == expected
    for output in ("tokenizer", "artifacts/run-f32", "artifacts/run-f32-onnx"):
        assert _of_transformers(run / output) == expected
    capfd.readouterr()
    assert _edgetune("train", config, "-o", run, "--resume") == 0
    assert "there is nothing to resume" in capfd.readouterr().err


def test_rows_with_tools_are_trained_and_answered_with_tool_use_as_in_transformers(
    plain: Path, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    base, run = _base(plain, tmp_path, _folder), tmp_path / "run"
    assert _edgetune("train", _config(base, tmp_path, tools=True), "-o", run) == 0
    assert "a template tool_use, which is used for rows with tools (78 rows)" in " ".join(
        capfd.readouterr().err.split()
    )
    with environment.silence_libraries():
        theirs = transformers.AutoTokenizer.from_pretrained(base)
    stored = json.loads((run / "reference/reference.json").read_text())
    for entry in stored["contract"]:
        text = theirs.apply_chat_template(
            entry["messages"], tools=entry.get("tools"), tokenize=False,
            add_generation_prompt=entry["add_generation_prompt"],
        )  # fmt: skip
        assert entry["text"] == text
        assert entry.get("template") == ("tool_use" if "tools" in entry else None)
    assert {row["template"] for row in stored["task"]["rows"]} == {"tool_use"}
    assert _edgetune("merge-export", run, "--format", "gguf,onnx", "-q", "f32") == 0
    question = [{"role": "user", "content": "lamp?"}]
    for name in ("run-f32.gguf", "run-f32-onnx"):
        assert _edgetune("validate", run, run / "artifacts" / name) == 0
        assert _edgetune("verify", run / "artifacts" / name) == 0
        with runtime.load(run / "artifacts" / name) as model:
            for tools in (None, [], [TOOL]):
                ids = theirs.apply_chat_template(question, tools=tools, add_generation_prompt=True, return_dict=False)
                assert model.tokenize_chat(question, tools=tools) == ids


def test_a_reference_of_an_older_version_rendered_tools_with_the_default_template(plain: Path, tmp_path: Path) -> None:
    template = ChatTemplate.from_directory(_base(plain, tmp_path, _list))
    question = [{"role": "user", "content": "lamp?"}]
    assert template.as_rendered({"tools": [TOOL]}).render(question, tools=[TOOL]) == template.render(question)
    assert template.as_rendered({"template": "tool_use"}).render(question, tools=[TOOL]).startswith("[{")


def test_a_name_that_is_no_file_name_is_refused(plain: Path, tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    base = _base(plain, tmp_path, lambda base: _state(base, chat_template=_listed(**{"default": PLAIN, "../x": RAG})))
    assert _edgetune("train", _config(base, tmp_path), "-o", tmp_path / "run", "--dry-run") == 1
    assert "a chat template is called '../x', which is no name of a file" in capfd.readouterr().err


def test_a_gguf_file_as_the_base_keeps_its_templates(plain: Path, tmp_path: Path) -> None:
    base = _base(plain, tmp_path, _list)
    expected = {"default": PLAIN, "tool_use": TOOLS, "rag": RAG}
    assert _edgetune("merge-export", "--base", base, "-q", "f32", "-o", tmp_path / "base.gguf") == 0
    assert _edgetune("merge-export", "--base", tmp_path / "base.gguf", *FORMATS, "-o", tmp_path / "out") == 0
    assert _of_gguf(tmp_path / "out/base-f32.gguf") == expected
    for output in ("base-f32", "base-f32-onnx"):
        assert _of_transformers(tmp_path / "out" / output) == expected


@pytest.mark.parametrize("change", [_folder, _list])
def test_named_templates_beside_an_adapter_reach_every_output(plain: Path, tmp_path: Path, change: Any) -> None:
    adapter = tmp_path / "adapter"
    with environment.silence_libraries():
        tiny.adapter(plain, adapter)
    base = _base(plain, tmp_path, _json)
    (adapter / "tokenizer_config.json").write_text((base / "tokenizer_config.json").read_text())
    change(adapter)
    expected = named_templates(adapter)
    assert set(expected) >= {"default", "tool_use"}
    export = ("merge-export", "--base", base, "--adapter", adapter, *FORMATS, "-o", tmp_path / "out")
    assert _edgetune(*export) == 0
    assert _of_gguf(tmp_path / "out/adapter-f32.gguf") == expected
    for output in ("adapter-f32", "adapter-f32-onnx"):
        assert _of_transformers(tmp_path / "out" / output) == expected
