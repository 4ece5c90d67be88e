"""The contract: the file renders, tokenizes and stops exactly as training did. One difference breaks it.

The reference holds the expected values: golden conversations as transformers rendered and tokenized them.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator, Mapping, Sequence
from itertools import zip_longest
from pathlib import Path
from typing import Any

from edgetune.data.text_tokenizer import TextTokenizer
from edgetune.errors import DataError
from edgetune.runtime import Runtime
from edgetune.validation.results import Contract, Difference

GoldenConversation = Mapping[str, Any]
"""{"messages", "add_generation_prompt", "text", "ids"}, and "tools" and "options" where the template was given some."""


def check(
    runtime: Runtime, golden: Sequence[GoldenConversation], tokenizer: Path, options: Mapping[str, Any]
) -> Contract:
    """Check a file against the golden conversations of the reference, and tokenizer and template options of the run."""
    checks: list[Callable[[], str | None]] = [
        lambda: template_difference(runtime, tokenizer) or options_difference(runtime, options),
        lambda: first(rendering_difference(runtime, entry) for entry in golden),
        lambda: first(bos_difference(runtime, entry) for entry in golden),
        lambda: first(token_difference(runtime, entry) for entry in golden),
        lambda: stop_difference(runtime, tokenizer),
    ]
    names = ("template", "rendering", "BOS", "tokens", "stop")
    found = ((name, look()) for name, look in zip(names, checks, strict=True))
    differences = [Difference(what=name, detail=detail) for name, detail in found if detail is not None]
    return Contract(conversations=len(golden), differences=differences)


def first(details: Iterator[str | None]) -> str | None:
    """Return the first that is not None."""
    return next((detail for detail in details if detail is not None), None)


def template_difference(runtime: Runtime, tokenizer: Path) -> str | None:
    """Compare the chat template of the file with that of training, character by character."""
    path = tokenizer / "chat_template.jinja"
    if not path.is_file():
        return None
    wanted = path.read_text(encoding="utf-8")
    if runtime.chat_template is None:
        return "the file has no chat template"
    found = runtime.chat_template.source
    return None if found == wanted else "the file's chat template is another: " + _first_difference(wanted, found)


def options_difference(runtime: Runtime, options: Mapping[str, Any]) -> str | None:
    """Compare the template options of the file with those of training."""
    if runtime.chat_template is None or runtime.chat_template.options == options:
        return None
    found, wanted = (json.dumps(each, ensure_ascii=False) for each in (runtime.chat_template.options, options))
    return f"the file gives the template the options {found}, training gave {wanted}"


def rendering_difference(runtime: Runtime, entry: GoldenConversation) -> str | None:
    """Compare the rendered text of a conversation."""
    if runtime.chat_template is None:
        return None  # template_difference reports it
    template = runtime.chat_template.as_rendered(entry)
    try:
        found = template.render(
            entry["messages"], add_generation_prompt=entry["add_generation_prompt"], tools=entry.get("tools")
        )
    except DataError as error:
        return error.message
    if found == entry["text"]:
        return None
    why = "; the template prints the time, which this reference does not hold: train again, or compare on that day"
    undated = template.clock.is_read and "rendered_at" not in entry
    return _first_difference(entry["text"], found) + (why if undated else "")


def bos_difference(runtime: Runtime, entry: GoldenConversation) -> str | None:
    """Compare the number of leading BOS tokens; the usual faults are none and two."""
    wanted, found = (_leading(ids, runtime.bos_token) for ids in (entry["ids"], runtime.tokenize(entry["text"])))
    if wanted == found:
        return None
    return f"training starts {_quoted(entry['text'])} with {wanted} BOS, the file with {found}"


def token_difference(runtime: Runtime, entry: GoldenConversation) -> str | None:
    """Compare the token ids of a conversation."""
    wanted, found = entry["ids"], runtime.tokenize(entry["text"])
    for index, (theirs, ours) in enumerate(zip_longest(wanted, found)):
        if theirs != ours:
            return (
                f"{_quoted(entry['text'])} differs at token {index}: {_token(runtime, theirs)} in training, "
                f"{_token(runtime, ours)} in the file"
            )
    return None


def stop_difference(runtime: Runtime, tokenizer: Path) -> str | None:
    """Check that generation stops at every stop token of training."""
    if not (tokenizer / "tokenizer.json").is_file():
        return None
    missing = sorted(TextTokenizer.from_directory(tokenizer).stop_ids - runtime.stop_tokens)
    return f"the file does not stop at {_token(runtime, missing[0])}" if missing else None


def _leading(ids: Sequence[int], bos: int | None) -> int:
    return next((index for index, token in enumerate(ids) if token != bos), len(ids))


def _token(runtime: Runtime, token: int | None) -> str:
    if token is None:
        return "nothing"
    if token >= runtime.vocabulary_size:
        return f"{token} (not in the file)"
    return f"{token} {runtime.token_bytes(token, special=True).decode('utf-8', 'replace')!r}"


def _quoted(text: str) -> str:
    return repr(text if len(text) <= 60 else text[:57] + "...")


def _first_difference(wanted: str, found: str) -> str:
    pairs = enumerate(zip(wanted, found, strict=False))
    index = next((i for i, (a, b) in pairs if a != b), min(len(wanted), len(found)))
    start = max(0, index - 15)
    return f"at character {index} {wanted[start : index + 25]!r} in training, {found[start : index + 25]!r} in the file"
