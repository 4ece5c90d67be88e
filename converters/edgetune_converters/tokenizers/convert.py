"""Convert a Hugging Face tokenizer to the vocabulary of a GGUF file.

The source of truth is tokenizer.json, with which the model was trained. Its structure suggests how llama.cpp has to be
configured; the conversion is then verified: llama.cpp loads the vocabulary and must produce the tokenizer's ids. A
difference is an error, or a note where the reason is known.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cached_property, partial
from itertools import chain
from pathlib import Path
from typing import Any

from edgetune_converters.errors import TokenizerError
from edgetune_converters.gguf.values import Value, i32s, string, strings
from edgetune_converters.tokenizers import byte_level, llama_special_tokens, sentencepiece, special, unigram
from edgetune_converters.tokenizers.candidate import Candidate
from edgetune_converters.tokenizers.chat_files import DEFAULT, chat_templates, template_metadata
from edgetune_converters.tokenizers.end_of_turn import end_of_turn
from edgetune_converters.tokenizers.files import TokenizerFiles, read_tokenizer_files
from edgetune_converters.tokenizers.normalization import Normalization
from edgetune_converters.tokenizers.verify_ids import IdComparison, verify
from edgetune_converters.tokenizers.vocabulary import TokenTable, TokenType, read_tokens

__all__ = ["Conversion", "TokenType", "Vocabulary", "convert_tokenizer"]


@dataclass(frozen=True)
class Vocabulary:
    """A converted tokenizer. `metadata` holds all `tokenizer.*` keys; `size` counts tokens and padding rows."""

    model: str
    pre: str
    size: int
    metadata: dict[str, Value]
    notes: tuple[str, ...] = ()

    def with_template(self, chat_template: str | None) -> Vocabulary:
        """Return the vocabulary with another default chat template; None keeps its own."""
        if chat_template is None:
            return self
        return replace(self, metadata={**self.metadata, "tokenizer.chat_template": string(chat_template)})


@dataclass(frozen=True)
class _Trial:
    """A candidate with all its metadata, verified on first use."""

    candidate: Candidate
    metadata: dict[str, Value]
    verify: Callable[[], IdComparison | None]

    @cached_property
    def result(self) -> IdComparison | None:
        """The comparison with llama.cpp's ids; None without llama.cpp."""
        return self.verify()

    @property
    def faults(self) -> int:
        """The number of texts with different ids."""
        return len(self.result.differences) if self.result else 0


def convert_tokenizer(
    directory: Path, rows: int, model_config: Mapping[str, Any], *, chat_template: str | None = None
) -> Vocabulary:
    """Convert the tokenizer of `directory` for an embedding of `rows` rows, and verify it.

    `model_config` is the model's config.json, the fallback for ids of special tokens that the tokenizer does not name.
    `chat_template` replaces the directory's own.

    Raises TokenizerError when llama.cpp cannot reproduce the tokenizer.
    """
    return Conversion(directory, rows, model_config, chat_template).verified()


class Conversion:
    """A conversion that is verified separately. Raises TokenizerError."""

    def __init__(
        self, directory: Path, rows: int, model_config: Mapping[str, Any], chat_template: str | None = None
    ) -> None:
        files = read_tokenizer_files(directory, model_config, rows)
        table = read_tokens(files)
        colliding = llama_special_tokens.rename_colliding_tokens(files, table)
        templates = chat_templates(files.path, files.config)
        if chat_template is not None:
            templates[DEFAULT] = chat_template
        turn_end = end_of_turn(files, templates.get(DEFAULT))
        common = special.special_token_metadata(files, table.tokens, turn_end)
        common |= special.bos_eos_flags(files, common) | template_metadata(templates)
        eos = common["tokenizer.ggml.eos_token_id"].data
        assert isinstance(eos, int)
        stops = special.stop_ids(files, eos, turn_end)
        self._files = files
        self._limits = _limits(files, colliding)
        self._trials = _trials(files, table, common, stops)
        self._first = next(self._trials)

    @property
    def likely(self) -> Vocabulary:
        """The likely conversion, not verified yet."""
        return self._vocabulary(self._first)

    def verified(self) -> Vocabulary:
        """Return the verified conversion; call this once.

        Its metadata are the same object as those of `likely` where that candidate was right.

        Raises TokenizerError when llama.cpp cannot reproduce the tokenizer.
        """
        chosen = _best(self._files, self._limits, chain([self._first], self._trials))
        _note(self._files, self._limits, chosen)
        return self._vocabulary(chosen)

    def _vocabulary(self, chosen: _Trial) -> Vocabulary:
        return Vocabulary(
            chosen.candidate.model, chosen.candidate.pre, self._files.rows, chosen.metadata, tuple(self._files.notes)
        )


def _trials(
    files: TokenizerFiles, table: TokenTable, common: Mapping[str, Value], stops: list[int]
) -> Iterator[_Trial]:
    """Each way of writing the tokenizer, made only when the one before was not exact."""
    for candidate in _candidates(files, table):
        normalization = _normalization(files, candidate)
        metadata = {
            "tokenizer.ggml.model": string(candidate.model),
            "tokenizer.ggml.pre": string(candidate.pre),
            "tokenizer.ggml.tokens": strings(table.tokens),
            "tokenizer.ggml.token_type": i32s(table.types),
            **candidate.metadata,
            **normalization.metadata(),
            **common,
        }
        yield _Trial(candidate, metadata, partial(verify, files, metadata, normalization, stops))


def _candidates(files: TokenizerFiles, table: TokenTable) -> Iterable[Candidate]:
    if files.model.get("type") == "Unigram":
        return unigram.candidates(files, table)
    if files.model.get("byte_fallback"):
        return sentencepiece.candidates(files, table)
    return byte_level.candidates(files)


def _normalization(files: TokenizerFiles, candidate: Candidate) -> Normalization:
    lstrip, rstrip = (tuple(_stripping(files, side, among_marks=False)) for side in _SIDES)
    added = tuple(entry["content"] for entry in files.added.values()) if candidate.space else ()
    return Normalization(candidate.form, candidate.space, lstrip, rstrip, added)


_SIDES = ("lstrip", "rstrip")


def _stripping(files: TokenizerFiles, side: str, *, among_marks: bool) -> list[str]:
    """Added tokens that take the white space on one side of them.

    Those `among_marks` are matched after spaces have become marks, so that they take only line ends and tabs.
    """
    marks = sentencepiece.marks_first(files.tokenizer)
    chosen = [entry for entry in files.added.values() if entry.get(side)]
    return [entry["content"] for entry in chosen if among_marks == (marks and bool(entry.get("normalized")))]


def _best(files: TokenizerFiles, limits: tuple[str, ...], trials: Iterable[_Trial]) -> _Trial:
    """The first exact trial, else the one with the fewest differences that all have known reasons."""
    tried = []
    for trial in trials:
        if not trial.faults:
            return trial
        tried.append(trial)
    explained = [trial for trial in tried if trial.candidate.limits or limits]
    if explained:
        return min(explained, key=lambda trial: trial.faults)
    worst = min(tried, key=lambda trial: trial.faults)
    assert worst.result is not None
    form = f"{worst.candidate.model}, {worst.candidate.pre}"
    raise TokenizerError(
        f"llama.cpp does not cut text as the tokenizer in {files.path} does ({form}): "
        f"{worst.faults} of {worst.result.compared} texts differ, the first {worst.result.differences[0]}"
    )


def _limits(files: TokenizerFiles, colliding: list[str]) -> tuple[str, ...]:
    """Return the known reasons for differences that lie in the added tokens.

    `colliding`: plain tokens that llama.cpp takes for special ones.
    """
    words = [entry["content"] for entry in files.added.values() if entry.get("single_word")]
    stripping = [text for side in _SIDES for text in _stripping(files, side, among_marks=True)]
    reasons = {
        "it takes {} inside of words too": words,
        "it leaves the line ends next to {}": stripping,
        "it takes the text {} for a special token": colliding,
    }
    return tuple(reason.format(_some(texts)) for reason, texts in reasons.items() if texts)


def _some(texts: Sequence[str]) -> str:
    return ", ".join(map(repr, texts[:3])) + (" ..." if len(texts) > 3 else "")


def _note(files: TokenizerFiles, limits: tuple[str, ...], chosen: _Trial) -> None:
    """Note what stock llama.cpp does differently."""
    files.notes += chosen.candidate.notes
    for side in _SIDES:
        texts = [entry["content"] for entry in files.added.values() if entry.get(side)]
        if texts:
            files.notes.append(f"the tokens {_some(texts)} have {side}, which llama.cpp does not support")
    if chosen.result is None:
        files.notes.append("the ids are not verified: llama.cpp cannot be loaded here")
        return
    if chosen.result.stops_missed:
        files.notes.append(
            f"the stop tokens {chosen.result.stops_missed} have no place in GGUF: llama.cpp goes on after them"
        )
    if chosen.faults:
        files.notes.append(
            f"llama.cpp cuts {chosen.faults} of {chosen.result.compared} texts differently, as "
            f"{' and '.join((*chosen.candidate.limits, *limits))}; the first {chosen.result.differences[0]}"
        )
