"""A Hugging Face tokenizer as the vocabulary of a GGUF file.

tokenizer.json is the truth: it is what the model was trained with. How llama.cpp has to be told to do the same is
recognised from its structure and then proven: llama.cpp is given the vocabulary and must give the tokenizer's ids. What
it cannot reproduce is an error here, or a note where the reason is known; never a surprise later.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property, partial
from itertools import chain
from pathlib import Path
from typing import Any

from edgetune_converters.errors import TokenizerError
from edgetune_converters.gguf.values import Value, i32s, string, strings
from edgetune_converters.tokenizers import byte_level, llama_special_tokens, sentencepiece, special, templates, unigram
from edgetune_converters.tokenizers import end_of_turn as turns
from edgetune_converters.tokenizers import files as tokenizer_files
from edgetune_converters.tokenizers import vocabulary as tokenizer_rows
from edgetune_converters.tokenizers.candidate import Kind
from edgetune_converters.tokenizers.files import Files
from edgetune_converters.tokenizers.normalization import Preparation
from edgetune_converters.tokenizers.verify_ids import Proof, prove
from edgetune_converters.tokenizers.vocabulary import Rows, TokenType

__all__ = ["Conversion", "Preparation", "TokenType", "Vocabulary", "convert"]


@dataclass(frozen=True)
class Vocabulary:
    """A converted tokenizer. `metadata` holds all `tokenizer.*` keys; `size` counts tokens with padding rows."""

    model: str
    pre: str
    size: int
    metadata: dict[str, Value]
    notes: tuple[str, ...] = ()


@dataclass(frozen=True)
class _Candidate:
    """One way of writing the tokenizer, with all its metadata. It is proven when that is asked for."""

    kind: Kind
    metadata: dict[str, Value]
    prove: Callable[[], Proof | None]

    @cached_property
    def proof(self) -> Proof | None:
        """What llama.cpp makes of it."""
        return self.prove()

    @property
    def faults(self) -> int:
        """How many texts differ."""
        return len(self.proof.differences) if self.proof else 0


def convert(
    directory: Path, rows: int, model_config: Mapping[str, Any], *, chat_template: str | None = None
) -> Vocabulary:
    """Convert the tokenizer of `directory` for an embedding of `rows` rows.

    `model_config` is the model's config.json, asked for special token ids that the tokenizer does not name.
    `chat_template` replaces the directory's own. Errors: TokenizerError.
    """
    return Conversion(directory, rows, model_config, chat_template).proven()


class Conversion:
    """A tokenizer between its conversion and the proof of it. Errors: TokenizerError."""

    def __init__(
        self, directory: Path, rows: int, model_config: Mapping[str, Any], chat_template: str | None = None
    ) -> None:
        files = tokenizer_files.read(directory, model_config)
        table = tokenizer_rows.read(files, rows)
        armed = llama_special_tokens.disarm(files, table)
        template = templates.metadata(files, chat_template)
        turn_end = turns.end_of_turn(files, template.get("tokenizer.chat_template"))
        common = special.ids(files, table.tokens, turn_end)
        common |= special.ends(files, common) | template
        eos = common["tokenizer.ggml.eos_token_id"].data
        assert isinstance(eos, int)
        stops = special.stops(files, eos, rows, turn_end)
        self._files, self._rows = files, rows
        self._limits = _limits(files, armed)
        self._candidates = _candidates(files, table, common, stops)
        self._first = next(self._candidates)

    @property
    def likely(self) -> Vocabulary:
        """What it is unless the proof says otherwise."""
        return self._vocabulary(self._first)

    def proven(self) -> Vocabulary:
        """What it is; of the same metadata, the same object, where that was likely. To be called once.

        Errors: TokenizerError when llama.cpp does not do as the tokenizer does, however it is told.
        """
        chosen = _best(self._files, self._limits, chain([self._first], self._candidates))
        _note(self._files, self._limits, chosen)
        return self._vocabulary(chosen)

    def _vocabulary(self, chosen: _Candidate) -> Vocabulary:
        return Vocabulary(chosen.kind.model, chosen.kind.pre, self._rows, chosen.metadata, tuple(self._files.notes))


def _candidates(files: Files, table: Rows, common: Mapping[str, Value], stops: list[int]) -> Iterator[_Candidate]:
    """Each way of writing the tokenizer, made only when the one before was not good enough."""
    for kind in _kinds(files, table):
        preparation = _preparation(files, kind)
        metadata = {
            "tokenizer.ggml.model": string(kind.model),
            "tokenizer.ggml.pre": string(kind.pre),
            "tokenizer.ggml.tokens": strings(table.tokens),
            "tokenizer.ggml.token_type": i32s(table.types),
            **kind.metadata,
            **preparation.metadata(),
            **common,
        }
        yield _Candidate(kind, metadata, partial(prove, files, metadata, preparation, stops))


def _kinds(files: Files, table: Rows) -> Iterable[Kind]:
    if files.model.get("type") == "Unigram":
        return unigram.kinds(files, table)
    if files.model.get("byte_fallback"):
        return sentencepiece.kinds(files, table)
    return byte_level.kinds(files)


def _preparation(files: Files, kind: Kind) -> Preparation:
    lstrip, rstrip = (tuple(_stripping(files, side, among_marks=False)) for side in _SIDES)
    added = tuple(entry["content"] for entry in files.added.values()) if kind.space else ()
    return Preparation(kind.form, kind.space, lstrip, rstrip, added)


_SIDES = ("lstrip", "rstrip")


def _stripping(files: Files, side: str, *, among_marks: bool) -> list[str]:
    """Added tokens that take the white space on a side of them.

    Those `among_marks` are looked for after spaces have become marks, so that they take line ends and tabs only.
    """
    marks = sentencepiece.marks_first(files.tokenizer)
    chosen = [entry for entry in files.added.values() if entry.get(side)]
    return [entry["content"] for entry in chosen if among_marks == (marks and bool(entry.get("normalized")))]


def _best(files: Files, limits: tuple[str, ...], candidates: Iterable[_Candidate]) -> _Candidate:
    """The first candidate without a difference, else the one with the fewest that can all be explained."""
    tried = []
    for candidate in candidates:
        if not candidate.faults:
            return candidate
        tried.append(candidate)
    explained = [candidate for candidate in tried if candidate.kind.limits or limits]
    if explained:
        return min(explained, key=lambda candidate: candidate.faults)
    worst = min(tried, key=lambda candidate: candidate.faults)
    assert worst.proof is not None
    raise TokenizerError(
        f"llama.cpp does not cut text as the tokenizer in {files.path} does ({worst.kind.model}, {worst.kind.pre}): "
        f"{worst.faults} of {worst.proof.compared} texts differ, the first {worst.proof.differences[0]}"
    )


def _limits(files: Files, armed: list[str]) -> tuple[str, ...]:
    """Known reasons for differences that lie in the tokens. `armed`: plain ones that llama.cpp takes for special."""
    words = [entry["content"] for entry in files.added.values() if entry.get("single_word")]
    beside = [text for side in _SIDES for text in _stripping(files, side, among_marks=True)]
    reasons = {
        "it takes {} inside of words too": words,
        "it leaves the line ends beside {}": beside,
        "it takes the text {} for a special token": armed,
    }
    return tuple(reason.format(_some(texts)) for reason, texts in reasons.items() if texts)


def _some(texts: Sequence[str]) -> str:
    return ", ".join(map(repr, texts[:3])) + (" ..." if len(texts) > 3 else "")


def _note(files: Files, limits: tuple[str, ...], chosen: _Candidate) -> None:
    """Say what stock llama.cpp does not do as the tokenizer does."""
    files.notes += chosen.kind.notes
    for side in _SIDES:
        texts = [entry["content"] for entry in files.added.values() if entry.get(side)]
        if texts:
            files.notes.append(f"of the tokens {_some(texts)} the tokenizer says {side}, which llama.cpp does not do")
    if chosen.proof is None:
        files.notes.append("the ids are not proven: llama.cpp cannot be loaded here")
        return
    if chosen.proof.stops_missed:
        files.notes.append(f"the stop tokens {chosen.proof.stops_missed} have no place in GGUF")
    if chosen.faults:
        files.notes.append(
            f"llama.cpp cuts {chosen.faults} of {chosen.proof.compared} texts differently, as "
            f"{' and '.join((*chosen.kind.limits, *limits))}; the first {chosen.proof.differences[0]}"
        )
