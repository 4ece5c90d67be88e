"""From a row of any kind to token ids: the chat is rendered and masked once, whatever the objective reads beside it."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

from edgetune.data.chat import ChatTemplate
from edgetune.data.chat_rows import ChatRow, Columns, Label, Pair, PlainText
from edgetune.data.encoded_split import EncodedSplit
from edgetune.data.fitting import KeyUsage, fit_to_template
from edgetune.data.key_names import COMPLETION_KEYS, KeyFinder
from edgetune.data.masks import EncodedConversation, EncodedRow, encode_conversation
from edgetune.data.objective_rows import EncodedAnswer, EncodedLabelled, EncodedPair, EncodedPrompt
from edgetune.data.problems import RowProblem
from edgetune.data.text_tokenizer import TextTokenizer
from edgetune.errors import DataError

_REFERENCE_KEYS = ("ground_truth", *COMPLETION_KEYS)
"""Columns of a prompt that may state its answer."""
_KEPT_UNDESIRABLE = 500
"""Answers that are measured where none is desirable."""


@dataclass
class RowEncoder:
    """Encodes rows one by one, and counts what became of them."""

    template: ChatTemplate
    tokenizer: TextTokenizer
    max_length: int
    result: EncodedSplit
    _undesirable: list[tuple[ChatRow, EncodedAnswer]] = field(default_factory=list)

    def add(self, row: ChatRow) -> None:
        """Encode a row and add it to the result.

        Raises:
            RowProblem: If the row cannot be trained on.
            DataError: If the template refuses it.
        """
        match row.beside:
            case None:
                self._add_conversation(row)
            case Pair():
                self._add_pair(row, row.beside)
            case Label(desirable):
                self._add_labelled(row, desirable)
            case Columns(values):
                self._add_prompt(row, values)
            case PlainText(text):
                self._add_text(row, text)

    def finish(self) -> None:
        """Add the last tokens of plain text: one block, or two so that none has a single token.

        Where no answer is labelled as desirable, the others are what reference and ladder measure.
        """
        if not self.result.rows:
            for row, answer in self._undesirable:
                self.result.chats.append(row)
                self._add_good(answer)
        pending, self.result.pending_text = self.result.pending_text, []
        if len(pending) > self.max_length:
            self._add_block(pending[: self.max_length - 1])
            pending = pending[self.max_length - 1 :]
        if pending:
            self._add_block(pending)

    def _add_conversation(self, given: ChatRow) -> None:
        row = fit_to_template(self.template, self.result.trailing.leave_out(given), self.result.usage)
        encoded = self._encode(row, given)
        self._add_chat(row)
        self.result.untrained_turns += len(row.untrained)
        if encoded.split_reason:
            self.result.split += 1
            where = f"; for example {given.place}" if given.place else ""
            self.result.split_reason = self.result.split_reason or encoded.split_reason + where
        self.result.completed += encoded.completed
        for each in encoded.rows:
            self.result.add_row(each, self.max_length, self.tokenizer)
        if given.task is not None:
            self.result.tasks += [given.task] * (len(self.result.rows) - len(self.result.tasks))

    def _encode(self, row: ChatRow, given: ChatRow) -> EncodedConversation:
        encoded = encode_conversation(
            self.template.with_options(row.options), self.tokenizer, row.messages, tools=row.tools,
            untrained=row.untrained, following=given.messages[len(row.messages) :],
        )  # fmt: skip
        for each in encoded.rows:
            self._check_ids(each.input_ids)
        return encoded

    def _check_ids(self, ids: Sequence[int]) -> None:
        """Raise RowProblem for a token without a row in the model's embedding."""
        if problem := self.tokenizer.without_row(ids):
            raise RowProblem(problem)

    def _add_chat(self, row: ChatRow) -> None:
        self.result.chats.append(row)
        self._count_texts(row)

    def _count_texts(self, row: ChatRow) -> None:
        self.result.written.count(self.tokenizer, row)
        if blank := sum(_is_blank(row.messages[index]) for index in row.answers):
            self.result.blank_example = self.result.blank_example or row.place
            self.result.blank += blank

    def _add_pair(self, given: ChatRow, pair: Pair) -> None:
        usage = KeyUsage(nested=self.result.usage.nested)
        found = []
        for side in (replace(given, beside=None), pair.rejected):
            row = fit_to_template(self.template, self.result.trailing.leave_out(side), usage)
            found.append((row, self._encode_answer(row, side)))
        (chosen, better), (rejected, worse) = found
        if better is not None and worse is not None and better.prompt_ids != worse.prompt_ids:
            raise RowProblem("the chat template renders the prompt of the two answers differently")
        for label in usage.unused:
            self.result.usage.add(label, given.place)
        self._add_chat(chosen)
        self._count_texts(rejected)
        if better is None or worse is None:
            self.result.drop(EncodedRow([], []), self.tokenizer)
            return
        self.result.count_length(max(len(better.row.input_ids), len(worse.row.input_ids)), self.max_length)
        cut = EncodedPair(better.cut(self.max_length), worse.cut(self.max_length), pair.margin)
        if not (cut.chosen_ids and cut.rejected_ids) or cut.chosen_ids == cut.rejected_ids:
            self.result.drop(cut.chosen.row, self.tokenizer)
            return
        self.result.pairs.append(cut)
        self._add_good(cut.chosen)

    def _add_labelled(self, given: ChatRow, desirable: bool) -> None:
        side = replace(given, beside=None)
        row = fit_to_template(self.template, self.result.trailing.leave_out(side), self.result.usage)
        answer = self._encode_answer(row, side)
        self._count_texts(row)
        if answer is not None:
            self.result.count_length(len(answer.row.input_ids), self.max_length)
        cut = None if answer is None else answer.cut(self.max_length)
        if cut is None or not cut.answer_ids:
            self.result.drop(EncodedRow([], []) if cut is None else cut.row, self.tokenizer)
            return
        self.result.labelled.append(EncodedLabelled(cut, desirable))
        if desirable:
            self.result.chats.append(row)
            self._add_good(cut)
        elif len(self._undesirable) < _KEPT_UNDESIRABLE:
            self._undesirable.append((row, cut))

    def _add_good(self, answer: EncodedAnswer) -> None:
        """Add the row of a good answer to the rows that reference and ladder measure."""
        self.result.rows.append(answer.row)
        self.result.turn_ends |= answer.row.endings & self.tokenizer.ending_ids

    def _encode_answer(self, row: ChatRow, given: ChatRow) -> EncodedAnswer | None:
        """Return the tokens of a prompt and its answer; None if nothing of it is trained on."""
        encoded = self._encode(row, given)
        if len(encoded.rows) > 1:
            raise RowProblem(f"the answer has several turns that do not fit into one row: {encoded.split_reason}")
        self.result.completed += encoded.completed
        (found,) = encoded.rows
        if not any(found.supervised):
            return None
        end = len(found.supervised) - found.supervised[::-1].index(True)
        return EncodedAnswer(found.cut(end), found.supervised.index(True))

    def _add_prompt(self, given: ChatRow, columns: dict[str, Any]) -> None:
        row = fit_to_template(self.template, replace(given, beside=None), self.result.usage)
        template = self.template.with_options(row.options)
        text = template.render(row.messages, add_generation_prompt=True, tools=row.tools)
        ids, _ = self.tokenizer.encode(text)
        self._check_ids(ids)
        if not ids:
            raise RowProblem("has no prompt: the chat template renders nothing before the answer")
        if len(ids) >= self.max_length:
            raise RowProblem(
                f"the prompt has {len(ids)} tokens, which leaves no room for an answer within training.max_length "
                f"({self.max_length})",
                "Raise training.max_length, or shorten the row",
            )
        self.result.prompts.append(EncodedPrompt(ids, row.messages, row.tools, dict(row.options), columns, row.place))
        answered = self._with_stated_answer(row, columns)
        if answered is None:
            self.result.rows.append(EncodedRow(ids, [False, *[True] * (len(ids) - 1)]))
            self._add_chat(row)
            return
        chat, answer = answered
        self._add_chat(chat)
        self.result.add_row(answer.row, self.max_length, self.tokenizer)

    def _with_stated_answer(self, row: ChatRow, columns: Mapping[str, Any]) -> tuple[ChatRow, EncodedAnswer] | None:
        """Return a prompt with the answer that a column states, for reference and ladder; None without one."""
        key = KeyFinder(key for key, value in columns.items() if isinstance(value, str | int | float)).first(
            _REFERENCE_KEYS
        )
        if key is None or not str(columns[key]).strip():
            return None
        answer = {"role": "assistant", "content": str(columns[key])}
        chat = replace(row, messages=[*row.messages, answer])
        try:
            encoded = self._encode_answer(chat, chat)
        except (DataError, RowProblem):
            return None
        return None if encoded is None else (chat, encoded)

    def _add_text(self, row: ChatRow, text: str) -> None:
        ids = self.tokenizer.encode_document(text)
        self._check_ids(ids)
        end = self._end_of_text()
        for label in row.unread:
            self.result.usage.add(label, row.place)
        self.result.written.count_text(self.tokenizer, text, row.place)
        self.result.texts += 1
        pending = self.result.pending_text
        pending += ids if ids[-1:] == [end] else [*ids, end]
        start = 0
        while len(pending) - start > self.max_length + 1:  # the last block needs two tokens
            self._add_block(pending[start : start + self.max_length])
            start += self.max_length
        del pending[:start]

    def _end_of_text(self) -> int:
        """Return the token that ends a document."""
        end = self.tokenizer.id_of(self.tokenizer.named.get("eos_token"))
        if end is None:
            end = next(iter(self.tokenizer.declared_stops), None)
        if end is None:
            raise DataError(
                "the base has no end-of-text token (eos_token), which separates documents",
                "Declare eos_token in tokenizer_config.json",
            )
        return end

    def _add_block(self, ids: list[int]) -> None:
        row = EncodedRow(ids, [False, *[True] * (len(ids) - 1)])
        self.result.longest_uncut = max(self.result.longest_uncut, len(ids))
        self.result.rows.append(row)
        self.result.turn_ends |= self.tokenizer.stop_ids & {self._end_of_text()}


def _is_blank(message: Mapping[str, Any]) -> bool:
    """Whether a message says nothing: white space beside no other key with a value."""
    return not any(
        value.strip() if isinstance(value, str) else value for key, value in message.items() if key != "role"
    )
