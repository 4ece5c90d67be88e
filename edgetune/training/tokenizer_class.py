"""transformers beside tokenizer.json: its rendering of the template must be equal, the ids of its class may differ.

tokenizer.json fixes the ids that are trained on and exported. The class that AutoTokenizer chooses by the name in
tokenizer_config.json or by the type of the model may build another tokenizer from the vocabulary.
"""

from __future__ import annotations

import tempfile
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import datetime
from pathlib import Path
from types import SimpleNamespace
from typing import Any

from transformers import AutoTokenizer
from transformers.utils import chat_template_utils

from edgetune import console
from edgetune.errors import DataError
from edgetune.planning.prepare import PreparedRun
from edgetune.planning.tokenizer_files import save_tokenizer
from edgetune.training.loading import load_tokenizer

_SAMPLES = (
    "Hello",
    " Hello  world ",
    "</s>Hello",
    "</s> Hello",
    "<s> </s> <|im_end|>",
    "e\u0301 \uff21 naïve",
    "1234567",
)
_FOLLOWS = "the run's tokenizer_config.json names PreTrainedTokenizerFast, which follows tokenizer.json"


@dataclass(frozen=True)
class ClassComparison:
    """The class of transformers for a tokenizer directory, compared with tokenizer.json."""

    name: str | None
    """None: the tokenizer cannot be loaded."""
    differing: int
    compared: int
    detail: str = ""
    """The first difference, or why the tokenizer cannot be loaded."""

    @property
    def follows(self) -> bool:
        """Whether the class gives the ids of tokenizer.json."""
        return self.name is not None and not self.differing


def check_against_transformers(prepared: PreparedRun) -> bool:
    """Whether transformers' class gives the ids of tokenizer.json for the golden conversations; if not, print that.

    Loads no weights. Raises DataError if transformers renders a golden conversation differently.
    """
    texts = list(dict.fromkeys((*_SAMPLES, *(entry["text"] for entry in prepared.contract))))
    theirs, found = _compare(prepared, prepared.base.directory, texts)
    check_rendering(prepared, theirs)
    if found.follows:
        return True
    with tempfile.TemporaryDirectory() as folder:
        save_tokenizer(prepared.base.directory, prepared.template, Path(folder), names_fast_class=True)
        _, after = _compare(prepared, Path(folder), texts)
    _print_note(found, after)
    return False


def _compare(prepared: PreparedRun, directory: Path, texts: Sequence[str]) -> tuple[Any, ClassComparison]:
    """Return the tokenizer that AutoTokenizer loads from a directory, None if it fails, and the comparison."""
    try:
        theirs = AutoTokenizer.from_pretrained(directory, trust_remote_code=prepared.config.trust_remote_code)
        other = theirs(list(texts), add_special_tokens=False, truncation=False, padding=False)["input_ids"]
    except Exception as error:  # noqa: BLE001 - classes and the Rust library raise many kinds
        reason = (str(error).strip().splitlines() or [type(error).__name__])[0]
        return None, ClassComparison(None, 0, len(texts), reason)
    ours = [each.ids for each in prepared.tokenizer.backend.encode_batch(list(texts), add_special_tokens=False)]
    pairs = zip(texts, ours, other, strict=True)
    different = [(text, mine, ids) for text, mine, ids in pairs if mine != list(ids)]
    detail = _describe(theirs, *different[0]) if different else ""
    return theirs, ClassComparison(type(theirs).__name__, len(different), len(texts), detail)


def _describe(theirs: Any, text: str, mine: Sequence[int], other: Sequence[int]) -> str:
    at = next((i for i, (a, b) in enumerate(zip(mine, other, strict=False)) if a != b), min(len(mine), len(other)))
    ours, its = (theirs.convert_ids_to_tokens(list(ids[at : at + 3])) for ids in (mine, other))
    return f"the first is {text[:40]!r} at token {at}: {ours} in tokenizer.json, {its} in the class"


def _print_note(found: ClassComparison, after: ClassComparison) -> None:
    what = (
        f"transformers' class {found.name} gives other ids than tokenizer.json for {found.differing} of "
        f"{found.compared} sample texts ({found.detail})"
        if found.name
        else f"transformers cannot load this tokenizer ({found.detail})"
    )
    remedy = (
        _FOLLOWS
        if after.follows
        else "AutoTokenizer has no class that follows it here; load outputs with PreTrainedTokenizerFast"
    )
    console.note(f"{what}; tokenizer.json is trained on and exported, and {remedy}")


def check_rendering(prepared: PreparedRun, theirs: Any = None) -> None:
    """Raise DataError if transformers (its tokenizer `theirs`) renders a golden conversation differently."""
    template = prepared.template
    theirs = load_tokenizer(prepared) if theirs is None else theirs
    for entry in prepared.contract:
        try:
            with _stopped_clock(template.clock.moment):
                expected = theirs.apply_chat_template(
                    entry["messages"],
                    tools=entry.get("tools"),
                    chat_template=template.source_for(entry.get("tools")),
                    tokenize=False,
                    add_generation_prompt=entry["add_generation_prompt"],
                    **template.options | entry.get("options", {}),
                )
        except Exception as error:  # noqa: BLE001 - a template can raise anything
            expected = f"{type(error).__name__}: {error}"
        text = entry["text"]
        if text != expected:
            raise DataError(
                f"the chat template renders {text[:80]!r} here and {expected[:80]!r} in transformers",
                "Please report this template; meanwhile use another one (data.chat_template)",
            )


@contextmanager
def _stopped_clock(moment: datetime | None) -> Iterator[None]:
    """Stop the clock of transformers' strftime_now, which takes no other time, at the moment of our rendering."""
    module: Any = chat_template_utils
    before = module.datetime
    module.datetime = SimpleNamespace(now=lambda: moment or before.now())
    try:
        yield
    finally:
        module.datetime = before
