"""An Ollama Modelfile for a GGUF file, with the chat template of the file as a Go template.

Jinja templates cannot be translated into Go templates in general. But most chat templates only write text around each
message that depends on its role. Therefore the template of the file is rendered with marked messages, and the text
between the marks becomes a Go template. The Go template must render a set of conversations exactly as the template
of the file does. If it does not, the Modelfile has no TEMPLATE, and a comment gives the reason.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import edgetune
from edgetune.data.chat import ChatTemplate, Message
from edgetune.errors import DataError
from edgetune.publish import go_templates
from edgetune_converters.files import atomic
from edgetune_converters.gguf import reader

SUFFIX = ".Modelfile"
_STOPS = ("eos", "eot", "eom")
_MARKS = ("zqASystemqz", "zqBQuestionqz", "zqCAnswerqz", "zqDQuestionqz")
_WITHOUT = "Ollama then uses a template of its own that resembles the file's, or the bare prompt"


class TemplateResult(NamedTuple):
    """A verified Go template, or the reason why there is none; and a note for the user."""

    template: str | None
    reason: str = ""
    note: str = ""


class _ElsewhereError(Exception):
    """The system message is not at the beginning."""


class _Turn(NamedTuple):
    """The text before and after a message."""

    before: str
    after: str


class _Shape(NamedTuple):
    """A chat template as text around messages; `head` begins a conversation without a system message."""

    head: str
    system: _Turn | None
    user: _Turn
    assistant: _Turn
    prompt: str


def modelfile_path(artifact: Path) -> Path:
    """Return the path of the Modelfile: model-q4_k_m.gguf has model-q4_k_m.Modelfile beside it."""
    return artifact.with_suffix(SUFFIX)


def write_modelfile(artifact: Path) -> tuple[Path, TemplateResult]:
    """Write the Modelfile of a GGUF file; the finished file is renamed into place."""
    metadata = reader.read(artifact).metadata
    derived = derive_template(metadata)
    path = modelfile_path(artifact)
    atomic.write_text(path, format_modelfile(artifact.name, metadata, derived))
    return path, derived


def format_modelfile(file: str, metadata: Mapping[str, Any], derived: TemplateResult) -> str:
    """Return the text of the Modelfile."""
    name = modelfile_path(Path(file)).name
    lines = [f"# Made by edgetune {edgetune.__version__}. To use it: ollama create NAME -f {name}", f"FROM ./{file}"]
    if derived.template is None:
        lines.append(f"# No TEMPLATE: {derived.reason}. {_WITHOUT}.")
    else:
        lines += [f"# {derived.note}"] if derived.note else []
        lines.append(f'TEMPLATE """{derived.template}"""')
    lines += [f"PARAMETER stop {json.dumps(stop, ensure_ascii=False)}" for stop in stop_texts(metadata)]
    return "\n".join(lines) + "\n"


def stop_texts(metadata: Mapping[str, Any]) -> list[str]:
    """Return the texts of the stop tokens."""
    tokens: list[str] = metadata.get("tokenizer.ggml.tokens", [])
    ids = [metadata.get(f"tokenizer.ggml.{name}_token_id") for name in _STOPS]
    return list(dict.fromkeys(tokens[id_] for id_ in ids if isinstance(id_, int) and 0 <= id_ < len(tokens)))


def derive_template(metadata: Mapping[str, Any]) -> TemplateResult:
    """Translate the chat template of the file into a Go template, and verify it on conversations."""
    template = ChatTemplate.from_gguf(metadata)
    if template is None:
        return TemplateResult(None, "the file has no chat template")
    if "strftime_now" in template.source:
        return TemplateResult(None, "the chat template uses the current date, which an Ollama template cannot")
    strips = bool(metadata.get("tokenizer.ggml.add_bos_token"))
    shape = _shape(template, strips)
    if shape is None:
        return TemplateResult(None, "the chat template does more than put text around messages")
    source = _go_template(shape)
    if (difference := _difference(source, template, strips, shape.system is not None)) is not None:
        return TemplateResult(
            None, f"the chat template treats {difference} in a way that an Ollama template cannot express"
        )
    if source.endswith('"') or '"""' in source:
        return TemplateResult(None, "the chat template has quotation marks that a Modelfile cannot contain")
    return TemplateResult(
        source, note="" if shape.system else "the chat template has no system message: a system message is ignored"
    )


def _rendered(template: ChatTemplate, messages: Sequence[Message], strips: bool, prompt: bool = True) -> str:
    """Render as Ollama needs it: the tokenizer adds the BOS token, not the template."""
    found = template.render(messages, add_generation_prompt=prompt)
    return found.removeprefix(template.bos_token) if strips and template.bos_token else found


def _shape(template: ChatTemplate, strips: bool) -> _Shape | None:
    _, question, answer, second = _MARKS
    turns = _conversation(question, answer, second)
    try:
        plain = _between(_rendered(template, turns, strips), (question, answer, second))
        alone = _between(_rendered(template, turns[:1], strips, prompt=False), (question,))
        ended = _between(_rendered(template, turns[:2], strips, prompt=False), (question, answer))
    except DataError:
        return None
    if not (plain and alone and ended):
        return None
    head, to_answer, to_question, tail = plain
    after_user = alone[1] if to_answer.startswith(alone[1]) and tail.startswith(alone[1]) else ""
    try:
        with_system = _with_system(template, turns, strips)
    except _ElsewhereError:
        return None
    heads = [head] + ([with_system[1]] if with_system else [])
    before_user = _common_suffix([*heads, to_question])
    own_end = to_question.removeprefix(ended[2])
    if to_question.startswith(ended[2]) and all(text.endswith(own_end) for text in heads):
        before_user = own_end
    return _Shape(
        head=head.removesuffix(before_user),
        system=_Turn(with_system[0], with_system[1].removesuffix(before_user)) if with_system else None,
        user=_Turn(before_user, after_user),
        assistant=_Turn(to_answer[len(after_user) :], to_question.removesuffix(before_user)),
        prompt=tail[len(after_user) :],
    )


def _with_system(template: ChatTemplate, turns: list[Message], strips: bool) -> tuple[str, str] | None:
    """Return the text before a system message and between it and the question; None without system messages.

    Raises _ElsewhereError if the template puts the system message after the question.
    """
    messages: list[Message] = [{"role": "system", "content": _MARKS[0]}, *turns]
    try:
        rendered = _rendered(template, messages, strips)
    except DataError:
        return None
    found = _between(rendered, _MARKS)
    if found is None and _MARKS[0] in rendered:
        raise _ElsewhereError
    return (found[0], found[1]) if found else None


def _between(rendered: str, marks: Sequence[str]) -> list[str] | None:
    """Return the text before, between and after the marks; None unless each occurs once, in order."""
    pieces = []
    for mark in marks:
        before, found, rendered = rendered.partition(mark)
        if not found:
            return None
        pieces.append(before)
    pieces.append(rendered)
    return None if any(mark in piece for mark in marks for piece in pieces) else pieces


def _common_suffix(texts: Sequence[str]) -> str:
    """Return the longest common suffix."""
    length = 0
    while all(length < len(text) for text in texts) and len({text[-1 - length] for text in texts}) == 1:
        length += 1
    return texts[0][len(texts[0]) - length :]


def _go_template(shape: _Shape) -> str:
    """Return the Go template of a shape."""
    escape = go_templates.escape
    head = escape(shape.head)
    if head and shape.system:
        head = f"{{{{ if not .System }}}}{head}{{{{ end }}}}"
    turns = {"system": shape.system, "user": shape.user, "assistant": shape.assistant}
    cases = [
        f'if eq .Role "{role}" }}}}{escape(turn.before)}{{{{ .Content }}}}{escape(turn.after)}'
        for role, turn in turns.items()
        if turn is not None
    ]
    body = "{{ else ".join(cases)
    return f"{head}{{{{ range .Messages }}}}{{{{ {body}{{{{ end }}}}{{{{ end }}}}{escape(shape.prompt)}"


def _difference(source: str, template: ChatTemplate, strips: bool, system: bool) -> str | None:
    """Return the kind of conversation that the two templates render differently, None if there is none."""
    for kind, messages in _samples(system).items():
        try:
            wanted = _rendered(template, messages, strips)
        except DataError:
            return kind
        if go_templates.render(source, messages) != wanted:
            return kind
    return None


def _samples(system: bool) -> dict[str, list[Message]]:
    texts = (
        "Dim the lights.",
        "They are dimmed: {{ 30 }} % — d'accord?",
        '把灯\n\n关掉 "now"',
        "Done. 🙂",
        "{% if %}",
        "ok",
    )
    samples = {
        "one question": _conversation("Who are you?"),
        "a conversation": _conversation(*texts[:5]),
        "a long conversation": _conversation(*texts, *texts, "And now?"),
    }
    first: Message = {"role": "system", "content": 'Answer in JSON.\n{"state": {}}'}
    named = {"a system message": [first, *samples["one question"]]}
    named["a system message in a conversation"] = [first, *samples["a long conversation"]]
    return {**samples, **(named if system else {})}


def _conversation(*texts: str) -> list[Message]:
    """Alternate user and assistant messages."""
    return [{"role": ("user", "assistant")[index % 2], "content": text} for index, text in enumerate(texts)]
