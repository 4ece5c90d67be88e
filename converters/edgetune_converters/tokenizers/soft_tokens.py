"""The tokenizer of a model with a soft prompt: new tokens that the chat template writes first, and no BOS before them.

PEFT puts virtual tokens before a text and its BOS. So no program may add BOS in front: the chat template writes the
soft tokens, and BOS behind them where the tokenizer would have added it.
"""

from __future__ import annotations

import re
import shutil
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from tokenizers import Tokenizer

from edgetune_converters import chat_template
from edgetune_converters.errors import ChatTemplateError, TokenizerError
from edgetune_converters.files.companions import TOKENIZER_FILES, copy_if_present, write_json
from edgetune_converters.tokenizers.chat_files import (
    DEFAULT,
    JSON_FILE,
    chat_templates,
    special_tokens,
    template_files,
)
from edgetune_converters.tokenizers.files import TokenizerFiles, read_tokenizer_files
from edgetune_converters.tokenizers.special import token_id

_TEXT = "<|soft_{}|>"
_STRIPPED = re.compile(r"\A[ \t]+(?=\{[%#](?!\+))")
"""Blanks at the beginning of a template that are not written."""
_SAMPLE = [{"role": "user", "content": "Light on, please."}]
_TOKENIZER, _CONFIG, _GENERATION = "tokenizer.json", "tokenizer_config.json", "generation_config.json"


@dataclass(frozen=True)
class SoftTokens:
    """The tokens of a soft prompt."""

    first: int
    texts: tuple[str, ...]
    adds_bos: bool
    """Whether the tokenizer of training adds BOS to a text."""
    with_bos: tuple[str, ...] = ()
    """Names of the chat templates in which BOS is written behind the soft tokens."""
    notes: tuple[str, ...] = ()


def count_tokens(directory: Path, model_config: Mapping[str, Any], rows: int) -> int:
    """Return the number of tokens of a tokenizer directory: one more than the largest id.

    Raises TokenizerError for a damaged tokenizer, or one with tokens past the last of `rows` rows.
    """
    files = read_tokenizer_files(directory, model_config, rows)
    if files.beyond:
        raise TokenizerError(
            f"the tokenizer in {directory} has {len(files.beyond)} tokens that the embedding has no row for: the ids "
            "behind them cannot be those of a soft prompt",
            "Remove them from tokenizer.json",
        )
    return max(*files.loaded.get_vocab().values(), *files.added) + 1


def write_with_soft_tokens(
    source: Path, out: Path, model_config: Mapping[str, Any], rows: int, count: int, template: str | None = None
) -> SoftTokens:
    """Write the tokenizer of `source` with `count` soft tokens to the directory `out`.

    Args:
        source: The tokenizer of the training.
        out: The directory, which is made.
        model_config: config.json of the model.
        rows: The number of rows of its embedding.
        count: The number of soft tokens.
        template: Replaces the default chat template of `source`; None keeps it.

    Raises:
        TokenizerError: The tokenizer is damaged, or cuts a text behind the soft tokens into other tokens.
    """
    files = read_tokenizer_files(source, model_config, rows)
    first = count_tokens(source, model_config, rows)
    known = files.loaded.get_vocab(with_added_tokens=True)
    start = next(number for number in range(len(known) + 1) if _TEXT.format(number) not in known)
    texts = tuple(_TEXT.format(start + number) for number in range(count))
    bos = token_id(files, "bos", files.loaded.token_to_id)
    bos_text = None if bos is None else files.loaded.id_to_token(bos)
    adds_bos = bos is not None and _adds_bos(files, bos)
    out.mkdir(parents=True, exist_ok=True)
    for name in (*TOKENIZER_FILES, _GENERATION):
        copy_if_present(source / name, out / name)
    if (source / JSON_FILE).is_file():
        shutil.copyfile(source / JSON_FILE, out / JSON_FILE)
    _write_tokenizer(files, out, first, texts, bos_text if adds_bos else None)
    templates = chat_templates(source, files.config) | ({} if template is None else {DEFAULT: template})
    named = special_tokens(files.config, files.special)
    missing = {name: _missing_bos(text, named, bos_text) if adds_bos else "" for name, text in templates.items()}
    prefixed = {name: prefixed_template(text, "".join(texts) + missing[name]) for name, text in templates.items()}
    for name, content in template_files(prefixed).items():
        (out / name).parent.mkdir(exist_ok=True)
        (out / name).write_bytes(content)
    _write_config(files, out, first, texts, has_templates=bool(templates))
    notes = ["the chat template begins with the soft tokens: a text without it, as raw completion, lacks them"]
    if not templates:
        notes = ["there is no chat template to write the soft tokens: programs other than edgetune run without them"]
    with_bos = tuple(name for name, text in missing.items() if text)
    found = SoftTokens(first, texts, adds_bos, with_bos, tuple(notes))
    _check_ids(files, out, found, templates.get(DEFAULT))
    return found


def prefixed_template(template: str, text: str) -> str:
    """Return a chat template that writes `text` first, and then what `template` writes.

    Jinja strips blanks before a tag that begins a line (`lstrip_blocks`). Behind `text` it no longer does.
    """
    return text + _STRIPPED.sub("", template)


def _adds_bos(files: TokenizerFiles, bos: int) -> bool:
    """Whether encoding puts BOS before a text; tokenizer_config.json takes precedence, as in training."""
    stated = files.config.get("add_bos_token")
    return stated if isinstance(stated, bool) else files.encode(["a"], special=True)[0][:1] == [bos]


def _missing_bos(template: str, named: Mapping[str, str], bos: str | None) -> str:
    """The BOS that the tokenizer would add to a rendered text, as text; empty where the template writes it."""
    if bos is None:
        return ""
    text = _rendered(template, named)
    begins = (bos in template or "bos_token" in template) if text is None else text.startswith(bos)
    return "" if begins else bos


def _rendered(template: str, named: Mapping[str, str]) -> str | None:
    try:
        return chat_template.render(template, _SAMPLE, named, add_generation_prompt=True)
    except ChatTemplateError:
        return None


def _write_tokenizer(files: TokenizerFiles, out: Path, first: int, texts: Sequence[str], bos: str | None) -> None:
    stated = dict(files.tokenizer)
    added = [*(stated.get("added_tokens") or ()), *({"id": first + i, **_entry(text)} for i, text in enumerate(texts))]
    stated |= {"added_tokens": added, "truncation": None, "padding": None}
    if bos is not None:
        stated["post_processor"] = _without_bos(stated.get("post_processor"), bos)
    write_json(out / _TOKENIZER, stated)


def _entry(text: str) -> dict[str, Any]:
    flags = dict.fromkeys(("single_word", "lstrip", "rstrip", "normalized"), False)
    return {"content": text, **flags, "special": True}


def _without_bos(processor: Any, bos: str) -> Any:
    """A post-processor that does not put BOS before a text."""
    if not isinstance(processor, dict):
        return processor
    if isinstance(processor.get("processors"), list):
        return {**processor, "processors": [_without_bos(each, bos) for each in processor["processors"]]}
    if processor.get("type") != "TemplateProcessing":
        return processor
    kept = {
        key: [part for part in processor.get(key) or () if part.get("SpecialToken", {}).get("id") != bos]
        for key in ("single", "pair")
    }
    return {**processor, **kept}


def _write_config(files: TokenizerFiles, out: Path, first: int, texts: Sequence[str], *, has_templates: bool) -> None:
    config = {**files.config, "add_bos_token": False}
    if has_templates:  # they stand in files of their own
        config.pop("chat_template", None)
        (out / JSON_FILE).unlink(missing_ok=True)
    decoder = config.get("added_tokens_decoder")
    if isinstance(decoder, dict):
        config["added_tokens_decoder"] = decoder | {
            str(first + number): _entry(text) for number, text in enumerate(texts)
        }
    write_json(out / _CONFIG, config)


def _check_ids(files: TokenizerFiles, out: Path, found: SoftTokens, template: str | None) -> None:
    """Check that a text behind the soft tokens has the ids that it has alone. Raises TokenizerError."""
    written = Tokenizer.from_file(str(out / _TOKENIZER))
    text = None if template is None else _rendered(template, special_tokens(files.config, files.special))
    expected = [found.first + number for number in range(len(found.texts))]
    for sample in ("Light on, please.", text):
        if sample is None:
            continue
        ids = written.encode("".join(found.texts) + sample).ids
        if ids[: len(expected)] != expected:
            raise TokenizerError(f"the tokenizer in {files.path} does not take the soft tokens as tokens: {ids[:8]}")
        if sample is text and ids[len(expected) :] != files.encode([sample])[0]:
            raise TokenizerError(
                f"the tokenizer in {files.path} cuts a text behind the soft tokens into other tokens than alone",
                f"Its chat template has to begin with a special token; this one begins {sample[:30]!r}",
            )
