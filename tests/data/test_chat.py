"""Our rendering against transformers' own, and the ways in which there is no template."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from edgetune.data.chat import BUILT_IN, ChatTemplate, read_override, special_tokens
from edgetune.errors import DataError
from tests.data import templates

CONVERSATIONS: list[list[dict[str, str]]] = [
    [{"role": "user", "content": "hi"}],
    [
        {"role": "user", "content": "  <b>&amp; 'quoted' \"x\" 中文 \u200b\n"},
        {"role": "assistant", "content": "ok\n\n"},
    ],
    [{"role": "system", "content": ""}, {"role": "user", "content": "skip"}],
    [
        {"role": "user", "content": "a"},
        {"role": "assistant", "content": "<think>\nhm\n</think>\n\nb"},
        {"role": "user", "content": "c"},
        {"role": "assistant", "content": "d"},
    ],
    [],
]


@pytest.mark.parametrize("prompt", [False, True])
@pytest.mark.parametrize("name", templates.RENDERED)
def test_renders_as_transformers_does(name: str, prompt: bool) -> None:
    utils: Any = pytest.importorskip("transformers.utils.chat_template_utils")
    source = templates.RENDERED[name]
    template = ChatTemplate(source, "<s>", "</s>", {"pad_token": "<pad>"})
    for conversation in CONVERSATIONS:
        try:
            (expected,), _ = utils.render_jinja_template(
                [conversation], chat_template=source, add_generation_prompt=prompt,
                bos_token="<s>", eos_token="</s>", pad_token="<pad>",
            )  # fmt: skip
        except Exception:  # noqa: BLE001 - whatever transformers refuses, we refuse
            with pytest.raises(DataError, match="refuses a conversation of"):
                template.render(conversation, add_generation_prompt=prompt)
            continue
        assert template.render(conversation, add_generation_prompt=prompt) == expected


def test_tools_reach_the_template() -> None:
    tools = [{"type": "function", "function": {"name": "f"}}]
    assert '"name": "f"' in ChatTemplate(templates.FEATURES).render([], tools=tools)


def test_absent_tokens_are_undefined_and_not_none() -> None:
    assert ChatTemplate("{{ bos_token }}|{{ bos_token is defined }}").render([]) == "|False"


@pytest.mark.parametrize(
    "attack",
    ["{{ ''.__class__.__mro__ }}", "{{ messages.append(1) }}", "{% set ns = namespace() %}{% set ns.__x__ = 1 %}"],
)
def test_templates_are_sandboxed(attack: str) -> None:
    with pytest.raises(DataError, match="refuses"):
        ChatTemplate(attack).render([])


def test_syntax_errors_name_the_line() -> None:
    with pytest.raises(DataError, match="not valid Jinja: line 2"):
        ChatTemplate("ok\n{% for %}").render([])


@pytest.mark.parametrize("name", BUILT_IN)
def test_built_in_templates_end_turns_with_eos_only(name: str) -> None:
    template = ChatTemplate(read_override(name), None, "</s>")
    text = template.render([{"role": "user", "content": "Q"}, {"role": "assistant", "content": "A"}])
    assert text.rstrip("\n").endswith("A</s>")
    assert text.count("</s>") == 1


def _directory(path: Path, config: dict[str, Any], **files: str) -> Path:
    path.mkdir(exist_ok=True)
    (path / "tokenizer_config.json").write_text(json.dumps(config))
    for name, text in files.items():
        (path / name.replace("__", ".")).write_text(text)
    return path


def test_jinja_file_wins_over_tokenizer_config(tmp_path: Path) -> None:
    directory = _directory(tmp_path, {"chat_template": "config"}, chat_template__jinja="file")
    assert ChatTemplate.from_directory(directory).source == "file"


@pytest.mark.parametrize(
    ("stored", "expected"),
    [
        ("one", "one"),
        ([{"name": "tool_use", "template": "t"}, {"name": "default", "template": "d"}], "d"),
        ({"default": "d"}, "d"),
    ],
)
def test_template_forms_of_tokenizer_config(tmp_path: Path, stored: Any, expected: str) -> None:
    assert ChatTemplate.from_directory(_directory(tmp_path, {"chat_template": stored})).source == expected


@pytest.mark.parametrize(
    ("stored", "message", "hint"),
    [
        (None, "has no chat template", "data.chat_template: alpaca"),
        ([{"name": "rag", "template": "r"}], "its templates are called rag", "data.chat_template: rag"),
    ],
)
def test_no_template_says_which_ones_there_are(tmp_path: Path, stored: Any, message: str, hint: str) -> None:
    with pytest.raises(DataError, match=message) as caught:
        ChatTemplate.from_directory(_directory(tmp_path, {"chat_template": stored}))
    assert hint in (caught.value.hint or "")


def test_unknown_override(tmp_path: Path) -> None:
    with pytest.raises(DataError, match=r"neither a readable .jinja file nor one of chatml, alpaca, plain"):
        ChatTemplate.from_directory(tmp_path, "vicuna")


def test_override_is_a_file(tmp_path: Path) -> None:
    (tmp_path / "mine.jinja").write_text("mine {{ eos_token }}")
    _directory(tmp_path, {"eos_token": "E"})
    assert ChatTemplate.from_directory(tmp_path, str(tmp_path / "mine.jinja")).render([]) == "mine E"


@pytest.mark.parametrize(
    ("config", "map_file", "expected"),
    [
        ({"bos_token": "<s>", "eos_token": {"content": "</s>", "__type": "AddedToken"}}, None, ("<s>", "</s>")),
        ({"tokenizer_class": "LlamaTokenizer", "bos_token": None}, None, (None, "</s>")),
        ({"eos_token": "old"}, {"eos_token": {"content": "new"}, "bos_token": "b"}, ("b", "new")),
        ({"eos_token": "kept", "added_tokens_decoder": {}}, {"eos_token": "ignored"}, (None, "kept")),
        ({"add_bos_token": True, "tokenizer_class": "GPT2TokenizerFast"}, None, ("<|endoftext|>", "<|endoftext|>")),
    ],
)
def test_special_tokens(tmp_path: Path, config: Any, map_file: Any, expected: tuple[str | None, str | None]) -> None:
    _directory(tmp_path, config)
    if map_file is not None:
        (tmp_path / "special_tokens_map.json").write_text(json.dumps(map_file))
    found = special_tokens(tmp_path)
    assert (found.get("bos_token"), found.get("eos_token")) == expected


def test_extra_named_tokens(tmp_path: Path) -> None:
    _directory(tmp_path, {"extra_special_tokens": {"image_token": "<img>"}, "chat_template": "{{ image_token }}"})
    assert ChatTemplate.from_directory(tmp_path).render([]) == "<img>"


def test_damaged_tokenizer_config(tmp_path: Path) -> None:
    (tmp_path / "tokenizer_config.json").write_text("{")
    with pytest.raises(DataError, match="is not a JSON object"):
        special_tokens(tmp_path)
