"""An Ollama Modelfile for a GGUF file, with the chat template of the file in Ollama's own language.

Ollama's templates are Go's, the file's is Jinja, and neither can be translated into the other in general. But what most
chat templates write is text around each message that depends on its role alone. So the file's template is rendered with
marked messages, the text between the marks becomes a Go template, and that one must render a set of conversations
exactly as the file's template does. Where it does not, the Modelfile has no TEMPLATE and says so.
"""

from __future__ import annotations

import json
import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import edgetune
from edgetune.data.chat import ChatTemplate, Message
from edgetune.errors import DataError
from edgetune.publish import go_templates
from edgetune_converters.gguf import reader

SUFFIX = ".Modelfile"
_STOPS = ("eos", "eot", "eom")
_MARKS = ("zqASystemqz", "zqBQuestionqz", "zqCAnswerqz", "zqDQuestionqz")
_WITHOUT = "Ollama then looks for one of its own that resembles the file's, and else gives the bare prompt"


class TemplateResult(NamedTuple):
    """A Go template that was proven, or why there is none; and what else should be said of it."""

    template: str | None
    reason: str = ""
    note: str = ""


class _ElsewhereError(Exception):
    """The system message does not stand at the beginning."""


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
    """Beside the file: model-q4_k_m.gguf has model-q4_k_m.Modelfile."""
    return artifact.with_suffix(SUFFIX)


def write_modelfile(artifact: Path) -> tuple[Path, TemplateResult]:
    """Write the Modelfile of a GGUF file, whole or not at all."""
    metadata = reader.read(artifact).metadata
    derived = derive_template(metadata)
    path = modelfile_path(artifact)
    partial = path.with_name(f"{path.name}.{os.getpid()}.partial")
    partial.write_text(format_modelfile(artifact.name, metadata, derived), encoding="utf-8")
    partial.replace(path)
    return path, derived


def format_modelfile(file: str, metadata: Mapping[str, Any], derived: TemplateResult) -> str:
    """The Modelfile."""
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
    """The texts of the tokens that end an answer."""
    tokens: list[str] = metadata.get("tokenizer.ggml.tokens", [])
    ids = [metadata.get(f"tokenizer.ggml.{name}_token_id") for name in _STOPS]
    return list(dict.fromkeys(tokens[id_] for id_ in ids if isinstance(id_, int) and 0 <= id_ < len(tokens)))


def derive_template(metadata: Mapping[str, Any]) -> TemplateResult:
    """The file's chat template in Go's language, proven on conversations."""
    template = ChatTemplate.from_gguf(metadata)
    if template is None:
        return TemplateResult(None, "the file has no chat template")
    if "strftime_now" in template.source:
        return TemplateResult(None, "the chat template names the day, which Ollama's templates cannot")
    strips = bool(metadata.get("tokenizer.ggml.add_bos_token"))
    shape = _shape(template, strips)
    if shape is None:
        return TemplateResult(None, "the chat template does more than to put text around messages")
    source = _go(shape)
    if (difference := _difference(source, template, strips, shape.system is not None)) is not None:
        return TemplateResult(
            None, f"the chat template treats {difference} in a way that Ollama's templates cannot say"
        )
    if source.endswith('"') or '"""' in source:
        return TemplateResult(None, "the chat template has quotation marks that a Modelfile cannot hold")
    return TemplateResult(
        source, note="" if shape.system else "the model's template knows no system message: one is left out"
    )


def _rendered(template: ChatTemplate, messages: Sequence[Message], strips: bool, prompt: bool = True) -> str:
    """As Ollama would feed it: the BOS token is added by the tokenizer, not by the template."""
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
    before_user = _shared_end([*heads, to_question])
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
    """The text before a system message and between it and the question, None where the template knows none.

    Errors: _ElsewhereError when the template puts it behind the question.
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
    """The text before, between and after the marks; None unless each is there once, in order."""
    pieces = []
    for mark in marks:
        before, found, rendered = rendered.partition(mark)
        if not found:
            return None
        pieces.append(before)
    pieces.append(rendered)
    return None if any(mark in piece for mark in marks for piece in pieces) else pieces


def _shared_end(texts: Sequence[str]) -> str:
    """The longest text with which all end."""
    length = 0
    while all(length < len(text) for text in texts) and len({text[-1 - length] for text in texts}) == 1:
        length += 1
    return texts[0][len(texts[0]) - length :]


def _go(shape: _Shape) -> str:
    """The Go template of a shape."""
    say = go_templates.escape
    head = say(shape.head)
    if head and shape.system:
        head = f"{{{{ if not .System }}}}{head}{{{{ end }}}}"
    turns = {"system": shape.system, "user": shape.user, "assistant": shape.assistant}
    cases = [
        f'if eq .Role "{role}" }}}}{say(turn.before)}{{{{ .Content }}}}{say(turn.after)}'
        for role, turn in turns.items()
        if turn is not None
    ]
    body = "{{ else ".join(cases)
    return f"{head}{{{{ range .Messages }}}}{{{{ {body}{{{{ end }}}}{{{{ end }}}}{say(shape.prompt)}"


def _difference(source: str, template: ChatTemplate, strips: bool, system: bool) -> str | None:
    """The kind of conversation in which the two render differently, None when there is none."""
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
    """User and assistant in turn."""
    return [{"role": ("user", "assistant")[index % 2], "content": text} for index, text in enumerate(texts)]
