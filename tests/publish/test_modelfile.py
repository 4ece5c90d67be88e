"""A Modelfile has the template of the file in Go's language, or says why it has none."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from edgetune.data.chat import BUILT_IN, ChatTemplate, read_override
from edgetune.publish import go_templates, modelfile
from tests.runtime import models

_LLAMA3 = (
    "{{ bos_token }}{% for m in messages %}<|start_header_id|>{{ m.role }}<|end_header_id|>\n\n"
    "{{ m.content | trim }}<|eot_id|>{% endfor %}"
    "{% if add_generation_prompt %}<|start_header_id|>assistant<|end_header_id|>\n\n{% endif %}"
)
_LLAMA2 = (
    "{{ bos_token }}{% if messages[0].role == 'system' %}{% set system = '<<SYS>>\n' + messages[0].content + "
    "'\n<</SYS>>\n\n' %}{% set turns = messages[1:] %}{% else %}"
    "{% set system = '' %}{% set turns = messages %}{% endif %}"
    "{% for m in turns %}{% if m.role == 'user' %}[INST] {{ system if loop.first else '' }}{{ m.content }} [/INST]"
    "{% else %} {{ m.content }}{{ eos_token }}{% endif %}{% endfor %}"
)
_GEMMA = (
    "{{ bos_token }}{% if messages[0].role == 'system' %}{{ raise_exception('no system role') }}{% endif %}"
    "{% for m in messages %}<start_of_turn>{{ 'model' if m.role == 'assistant' else m.role }}\n{{ m.content | trim }}"
    "<end_of_turn>\n{% endfor %}{% if add_generation_prompt %}<start_of_turn>model\n{% endif %}"
)
_PHI = (
    "{% for m in messages %}<|{{ m.role }}|>\n{{ m.content }}<|end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|assistant|>\n{% endif %}"
)
_DEFAULT_SYSTEM = (
    "{% if messages[0].role != 'system' %}<|im_start|>system\nYou help.<|im_end|>\n{% endif %}"
    "{% for m in messages %}<|im_start|>{{ m.role }}\n{{ m.content }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n<think>\n{% endif %}"
)
SHAPES = {
    "llama 3": _LLAMA3, "llama 2": _LLAMA2, "gemma": _GEMMA, "phi": _PHI, "default system": _DEFAULT_SYSTEM,
    "braces": _PHI.replace("<|end|>", "{{ '{{' }}end}}"), **{name: read_override(name) for name in BUILT_IN},
}  # fmt: skip


def metadata(template: str | None, **more: Any) -> dict[str, Any]:
    found = {"tokenizer.chat_template": template, "tokenizer.ggml.tokens": ["<s>", "</s>", "<|im_end|>", '"quoted"']}
    ids = {"tokenizer.ggml.bos_token_id": 0, "tokenizer.ggml.eos_token_id": 1, "tokenizer.ggml.eot_token_id": 2}
    return {**found, **ids, "tokenizer.ggml.add_bos_token": True, **more}


@pytest.mark.parametrize("name", SHAPES)
def test_known_shapes_are_derived_and_proven(name: str) -> None:
    derived = modelfile.derive_template(metadata(SHAPES[name]))
    assert derived.template is not None, derived.reason
    template = ChatTemplate.from_gguf(metadata(SHAPES[name]))
    assert template is not None
    turns = [{"role": role, "content": f"{role} says hello"} for role in ("user", "assistant", "user")]
    wanted = template.render(turns, add_generation_prompt=True).removeprefix("<s>")
    assert go_templates.render(derived.template, turns) == wanted
    assert bool(derived.note) == (name == "gemma")


def test_chatml_reads_as_one_would_write_it() -> None:
    assert modelfile.derive_template(metadata(models.TEMPLATE)).template == (
        '{{ range .Messages }}{{ if eq .Role "system" }}<|im_start|>system\n{{ .Content }}<|im_end|>\n'
        '{{ else if eq .Role "user" }}<|im_start|>user\n{{ .Content }}<|im_end|>\n'
        '{{ else if eq .Role "assistant" }}<|im_start|>assistant\n{{ .Content }}<|im_end|>\n{{ end }}{{ end }}'
        "<|im_start|>assistant\n"
    )


def test_a_default_system_text_gives_way_to_a_message() -> None:
    template = modelfile.derive_template(metadata(_DEFAULT_SYSTEM)).template
    assert template is not None
    assert template.startswith("{{ if not .System }}<|im_start|>system\nYou help.<|im_end|>\n{{ end }}")


@pytest.mark.parametrize(
    ("template", "reason"),
    [
        (None, "the file has no chat template"),
        ("{{ strftime_now('%d %b') }}" + _PHI, "uses the current date"),
        ("{{ messages | length }}" + _PHI, "treats one question in a way"),
        ("{% for m in messages %}{{ m.content | upper }}{% endfor %}", "does more than put text around messages"),
        ("{% for m in messages | reverse %}{{ m.content }}{% endfor %}", "does more than put text around messages"),
        ("{{ raise_exception('no') }}", "does more than put text around messages"),
        # the system message stands in the last question, as in later Mistral templates
        (
            "{% for m in messages if m.role != 'system' %}{% if loop.last and messages[0].role == 'system' %}"
            "{{ messages[0].content }}{% endif %}[{{ m.content }}]{% endfor %}",
            "does more than put text around messages",
        ),
        (_PHI.replace("<|end|>", '"""'), "quotation marks"),
    ],
)
def test_what_cannot_be_said_is_left_out_with_a_sentence(template: str | None, reason: str) -> None:
    derived = modelfile.derive_template(metadata(template))
    assert derived.template is None
    assert reason in derived.reason
    written = modelfile.format_modelfile("x.gguf", metadata(template), derived)
    assert "\nTEMPLATE" not in written
    assert f"# No TEMPLATE: {derived.reason}. Ollama then" in written


def test_stops_are_the_ends_of_the_file() -> None:
    found = metadata(models.TEMPLATE, **{"tokenizer.ggml.eom_token_id": 3})
    written = modelfile.format_modelfile("m-q8_0.gguf", found, modelfile.derive_template(found))
    lines = written.splitlines()
    assert lines[1] == "FROM ./m-q8_0.gguf"
    assert lines[-3:] == ['PARAMETER stop "</s>"', 'PARAMETER stop "<|im_end|>"', r'PARAMETER stop "\"quoted\""']


def test_it_is_written_beside_the_file(tmp_path: Path) -> None:
    base = models.base(tmp_path / "base")
    file = models.gguf(base, tmp_path / "m-f32.gguf")
    path, derived = modelfile.write_modelfile(file)
    assert (path, derived.template is None) == (tmp_path / "m-f32.Modelfile", False)
    assert f'TEMPLATE """{derived.template}"""\nPARAMETER stop "<|im_end|>"' in path.read_text()


@pytest.mark.parametrize("source", ["{{ .Missing }}", "{{ if .System }}", "{{ len .Messages }}", "{{ $x }}"])
def test_more_of_go_is_an_error(source: str) -> None:
    with pytest.raises((ValueError, KeyError)):
        go_templates.render(source, [{"role": "user", "content": "x"}])
