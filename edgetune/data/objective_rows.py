"""Encoded rows of the objectives beside supervised fine-tuning: preference pairs, labelled answers and prompts.

All come from the chat rendering and the loss masks of masks.py. The law of the tokens holds for them too: a whole row
begins with the ids of its prompt, tokenized as it is when the model is asked, and an answer ends with its stop token.
Continued pretraining has no class of its own: a block of text is an EncodedRow whose tokens are all trained on.
"""

from __future__ import annotations

import marshal
from abc import abstractmethod
from array import array
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Generic, TypeVar, overload

from edgetune.data.encoded_rows import EncodedRows
from edgetune.data.masks import EncodedRow

Item = TypeVar("Item")


@dataclass(frozen=True)
class EncodedAnswer:
    """A prompt and an answer as token ids."""

    row: EncodedRow
    """All tokens: the prompt, then the answer up to its stop token or to max_length."""
    prompt_length: int
    """Number of tokens of the prompt, at least 1."""

    def cut(self, length: int) -> EncodedAnswer:
        """Return the first `length` tokens; the answer may be empty then."""
        return EncodedAnswer(self.row.cut(length), min(self.prompt_length, length))

    @property
    def prompt_ids(self) -> list[int]:
        """Ids of the prompt, with the generation prompt of the chat template."""
        return self.row.input_ids[: self.prompt_length]

    @property
    def answer_ids(self) -> list[int]:
        """Ids of the answer, at least one; the stop token is the last one if the row was not cut."""
        return self.row.input_ids[self.prompt_length :]

    @property
    def answer_mask(self) -> list[bool]:
        """Which ids of the answer the assistant wrote; False for tool results and user turns within the answer."""
        return self.row.supervised[self.prompt_length :]


@dataclass(frozen=True)
class EncodedPair:
    """A prompt with a better and a worse answer. Both rows begin with the ids of the prompt."""

    chosen: EncodedAnswer
    rejected: EncodedAnswer
    margin: float | None = None
    """By how much the chosen answer is better, where the row states it (`margin`)."""

    @property
    def prompt_ids(self) -> list[int]:
        """Ids of the shared prompt."""
        return self.chosen.prompt_ids

    @property
    def chosen_ids(self) -> list[int]:
        """Ids of the better answer behind the prompt."""
        return self.chosen.answer_ids

    @property
    def rejected_ids(self) -> list[int]:
        """Ids of the worse answer behind the prompt."""
        return self.rejected.answer_ids


@dataclass(frozen=True)
class EncodedLabelled:
    """A prompt with an answer that is labelled as desirable or not (KTO)."""

    answer: EncodedAnswer
    label: bool
    """True for an answer that is to become more likely."""

    @property
    def prompt_ids(self) -> list[int]:
        """Ids of the prompt."""
        return self.answer.prompt_ids

    @property
    def completion_ids(self) -> list[int]:
        """Ids of the answer behind the prompt."""
        return self.answer.answer_ids


@dataclass(frozen=True)
class EncodedPrompt:
    """A prompt that the model answers during training (GRPO, RLOO) or that a teacher answers (distillation)."""

    prompt_ids: list[int]
    """Ids of the rendered prompt, with the generation prompt of the chat template."""
    messages: list[dict[str, Any]]
    """The messages of the prompt, as the template renders them."""
    tools: list[dict[str, Any]] | None
    """The tools that the template describes."""
    options: dict[str, Any]
    """Template options of the row alone."""
    columns: Mapping[str, Any]
    """All other keys of the row with their values, for the reward functions: {"answer": "72"}."""
    place: str
    """The place of the row for messages: 'train.jsonl, line 3'."""


class _Rows(Sequence[Item], Generic[Item]):
    """A sequence that makes its items when they are asked for."""

    @abstractmethod
    def _item(self, index: int) -> Item: ...

    def __iter__(self) -> Iterator[Item]:
        return map(self._item, range(len(self)))

    @overload
    def __getitem__(self, index: int) -> Item: ...
    @overload
    def __getitem__(self, index: slice) -> list[Item]: ...
    def __getitem__(self, index: int | slice) -> Item | list[Item]:
        """Return an item, or a list of items."""
        if isinstance(index, slice):
            return [self._item(each) for each in range(*index.indices(len(self)))]
        return self._item(range(len(self))[index])


class AnswerRows(_Rows[EncodedAnswer]):
    """Prompts with an answer, in a few arrays; it grows at its end."""

    def __init__(self) -> None:
        """Make an empty sequence."""
        self.rows = EncodedRows()
        self._prompts = array("Q")

    def __len__(self) -> int:
        return len(self._prompts)

    def append(self, answer: EncodedAnswer) -> None:
        """Add an answer at the end."""
        self.rows.append(answer.row)
        self._prompts.append(answer.prompt_length)

    def _item(self, index: int) -> EncodedAnswer:
        return EncodedAnswer(self.rows[index], self._prompts[index])


class PairRows(_Rows[EncodedPair]):
    """Preference pairs, in a few arrays; it grows at its end."""

    def __init__(self) -> None:
        """Make an empty sequence."""
        self.chosen = AnswerRows()
        self.rejected = AnswerRows()
        self._margins = array("d")  # NaN for none

    def __len__(self) -> int:
        return len(self.chosen)

    def append(self, pair: EncodedPair) -> None:
        """Add a pair at the end."""
        self.chosen.append(pair.chosen)
        self.rejected.append(pair.rejected)
        self._margins.append(float("nan") if pair.margin is None else pair.margin)

    def _item(self, index: int) -> EncodedPair:
        margin = self._margins[index]
        return EncodedPair(self.chosen[index], self.rejected[index], None if margin != margin else margin)


class LabelledRows(_Rows[EncodedLabelled]):
    """Labelled answers, in a few arrays; it grows at its end."""

    def __init__(self) -> None:
        """Make an empty sequence."""
        self.answers = AnswerRows()
        self._labels = bytearray()

    def __len__(self) -> int:
        return len(self.answers)

    @property
    def desirable(self) -> int:
        """Number of answers that are labelled as desirable."""
        return self._labels.count(1)

    def append(self, labelled: EncodedLabelled) -> None:
        """Add an answer at the end."""
        self.answers.append(labelled.answer)
        self._labels.append(labelled.label)

    def _item(self, index: int) -> EncodedLabelled:
        return EncodedLabelled(self.answers[index], bool(self._labels[index]))


class PromptRows(_Rows[EncodedPrompt]):
    """Prompts with the columns of their rows; it grows at its end."""

    def __init__(self) -> None:
        """Make an empty sequence."""
        self._rows: list[bytes] = []

    def __len__(self) -> int:
        return len(self._rows)

    def append(self, prompt: EncodedPrompt) -> None:
        """Add a prompt at the end."""
        fields = (
            array("i", prompt.prompt_ids).tobytes(), prompt.messages, prompt.tools, prompt.options,
            dict(prompt.columns), prompt.place,
        )  # fmt: skip
        self._rows.append(marshal.dumps(fields))

    def _item(self, index: int) -> EncodedPrompt:
        ids, *rest = marshal.loads(self._rows[index])
        return EncodedPrompt(array("i", ids).tolist(), *rest)
