"""`template.options`, and a row's own `chat_template_kwargs`, reach the template as in transformers."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from edgetune.config import Config, load_config
from edgetune.data.chat import ChatTemplate, options_metadata, stored_options
from edgetune.data.dataset import EncodedSplit, encode_all
from edgetune.data.preview import highlight_row
from edgetune.data.sources import read_source
from edgetune.errors import ConfigError, DataError
from edgetune.training.resume import changed_options
from edgetune_converters import chat_template
from edgetune_converters.gguf import keys
from tests.cases.rendering import tokenizer_in, write_jsonl

TEMPLATE = (
    "{%- if documents %}{{- '<docs>' + (documents | tojson) + '\n' }}{%- endif %}"
    "{%- if not effort is defined %}{%- set effort = 'high' %}{%- endif %}{{- 'effort ' + effort + '\n' }}"
    "{%- for message in messages %}{{- '<|im_start|>' + message.role + '\n' }}"
    "{%- if message.role == 'assistant' and enable_thinking is defined and enable_thinking is false %}"
    "{{- '<think>\n\n</think>\n\n' }}{%- endif %}{{- message.content + '<|im_end|>\n' }}{%- endfor %}"
    "{%- if add_generation_prompt %}{{- '<|im_start|>assistant\n' }}{%- endif %}"
)
MESSAGES = [{"role": "user", "content": "2 + 3?"}, {"role": "assistant", "content": "5"}]


def _encode(folder: Path, row: dict[str, Any], options: dict[str, Any] | None = None) -> EncodedSplit:
    rows = read_source(write_jsonl(folder / "rows.jsonl", [row])).rows
    template = ChatTemplate(TEMPLATE, options=options or {})
    return encode_all(template, tokenizer_in(folder / "base"), rows, 4096)


@pytest.mark.parametrize(
    "options",
    [{}, {"enable_thinking": False}, {"effort": "low", "enable_thinking": True}, {"documents": [{"title": "a é"}]}],
)
def test_options_are_rendered_as_transformers_does(options: dict[str, Any]) -> None:
    utils: Any = pytest.importorskip("transformers.utils.chat_template_utils")
    (expected,), _ = utils.render_jinja_template([MESSAGES], chat_template=TEMPLATE, **options)
    assert ChatTemplate(TEMPLATE).with_options(options).render(MESSAGES) == expected


def test_the_names_of_options_are_those_that_the_template_reads() -> None:
    assert chat_template.option_names(TEMPLATE) == ("effort", "enable_thinking")
    nothing = "{{ bos_token }}{% for m in messages %}{% set x = namespace(y=1) %}{{ m.content }}{% endfor %}"
    assert chat_template.option_names(nothing) == ()


@pytest.mark.parametrize(
    ("name", "message", "hint"),
    [
        ("enable_thinkin", "does not read the option enable_thinkin", "It reads effort, enable_thinking"),
        ("tools", "the template option tools is reserved: messages, tools, documents", "Remove it"),
        ("eos_token", "does not read the option eos_token", "It reads effort"),
    ],
)
def test_an_option_that_the_template_does_not_read_is_refused(name: str, message: str, hint: str) -> None:
    with pytest.raises(ConfigError, match=message) as caught:
        ChatTemplate(TEMPLATE).check_options({name: 1})
    assert (caught.value.hint or "").startswith(hint)


def test_a_template_without_options_has_none_to_offer() -> None:
    with pytest.raises(ConfigError, match="does not read the option effort") as caught:
        ChatTemplate("{{ messages }}").check_options({"effort": "low"})
    assert caught.value.hint == "It reads no options: remove it"


def _config(folder: Path, *overrides: str, section: str = "") -> Config:
    path = folder / "config.yaml"
    path.write_text(f"base: here\ndata: {{train: rows.jsonl}}\n{section}", encoding="utf-8")
    return load_config(path, overrides)


def test_options_are_set_in_the_configuration_and_on_the_command_line(tmp_path: Path) -> None:
    section = "template: {options: {enable_thinking: false, effort: low}}"
    assert _config(tmp_path, section=section).template.options == {"enable_thinking": False, "effort": "low"}
    assert _config(tmp_path, "template.options.enable_thinking=false").template.options == {"enable_thinking": False}
    with pytest.raises(ConfigError, match="put texts that look like dates in quotes"):
        _config(tmp_path, "template.options.date=2024-07-26")


def test_a_run_of_an_older_edgetune_resumes_unless_options_are_set(tmp_path: Path) -> None:
    stored = _config(tmp_path).model_dump(mode="json")
    del stored["template"]
    assert changed_options(stored, _config(tmp_path).model_dump(mode="json")) == []
    now = _config(tmp_path, "template.options.effort=low").model_dump(mode="json")
    assert changed_options(stored, now) == ["template.options"]


@pytest.mark.parametrize(
    ("given", "options"),
    [({"enable_thinking": False}, {}), ({"enable_thinking": False, "effort": None}, {"enable_thinking": True})],
)
def test_the_options_of_a_row_take_precedence(tmp_path: Path, given: dict[str, Any], options: dict[str, Any]) -> None:
    encoded = _encode(tmp_path, {"messages": MESSAGES, "chat_template_kwargs": given}, options)
    picture = highlight_row(encoded.rows[0], tokenizer_in(tmp_path / "base"), color=False).plain
    assert picture.endswith("<|im_start|>assistant\n⟦<think>\n\n</think>\n\n5<|im_end|>⟧\n")
    assert encoded.usage.unused == {}
    assert encoded.chats[0].options == {"enable_thinking": False}


def test_options_of_a_row_that_the_template_does_not_read_are_counted(tmp_path: Path) -> None:
    row = {"messages": MESSAGES, "chat_template_kwargs": '{"effort": "low", "thinking": true}'}
    encoded = _encode(tmp_path, row)
    assert encoded.usage.describe() == [
        "chat_template_kwargs.thinking, which the chat template does not read: 1 row, for example rows.jsonl, line 1"
    ]
    assert encoded.chats[0].options == {"effort": "low"}


@pytest.mark.parametrize(
    ("given", "message"),
    [({"tools": []}, "sets tools, which only the row itself can set"), ([1], "is not an object of template options")],
)
def test_options_of_a_row_that_cannot_be_given_are_refused(tmp_path: Path, given: Any, message: str) -> None:
    with pytest.raises(DataError, match=rf"rows.jsonl, line 1.*chat_template_kwargs {message}"):
        _encode(tmp_path, {"messages": MESSAGES, "chat_template_kwargs": given})


def test_documents_of_a_row_are_rendered_or_counted(tmp_path: Path) -> None:
    row = {"messages": MESSAGES, "documents": [{"title": "t", "text": "five"}]}
    encoded = _encode(tmp_path, row)
    text = tokenizer_in(tmp_path / "base").decode(encoded.rows[0].input_ids)
    assert text.startswith('<docs>[{"title": "t", "text": "five"}]\n')
    assert encoded.usage.unused == {}
    source = read_source(write_jsonl(tmp_path / "rows.jsonl", [row]))
    plain = encode_all(ChatTemplate(TEMPLATE.replace("documents", "papers")), tokenizer_in(tmp_path / "base"),
                       source.rows, 4096)  # fmt: skip
    assert plain.usage.describe() == [
        "documents, which the chat template does not render: 1 row, for example rows.jsonl, line 1"
    ]


def test_options_survive_in_the_metadata_of_a_file() -> None:
    options = {"enable_thinking": False, "note": "é\u200b", "levels": [1, {"a": None}]}
    metadata = options_metadata(options)
    assert stored_options(metadata) == options
    assert all(text.isascii() for text in metadata.values())
    assert options_metadata({}) == {}
    assert stored_options({}) == {}
    with pytest.raises(DataError, match=r"edgetune\.template\.options of the file is not a JSON object"):
        stored_options({keys.TEMPLATE_OPTIONS: "[1"})
