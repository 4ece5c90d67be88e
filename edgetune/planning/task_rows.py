"""Test rows and greedy prompts: rendered, tokenized and checked before training, so that capture only computes."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field, replace

from edgetune.config import DataConfig
from edgetune.data.answer_frame import NO_FRAME, AnswerFrame, find_frame, read_answer
from edgetune.data.chat import ChatTemplate
from edgetune.data.fitting import KeyUsage, fit_to_template
from edgetune.data.formats import ChatRow
from edgetune.data.masks import encode_answer
from edgetune.data.messages import check_characters
from edgetune.data.problems import RowProblem, RowProblems
from edgetune.data.text_tokenizer import TextTokenizer
from edgetune.data.trailing import TrailingTurns
from edgetune.data.written_tokens import WrittenTokens
from edgetune.errors import DataError
from edgetune.validation.answers import CHOICE, answer_matches
from edgetune.validation.choices import tokenize_choices

GREEDY_ROWS = 8
"""Number of held-out prompts whose greedy answer is stored token by token."""


@dataclass(frozen=True)
class RenderedPrompt:
    """A conversation up to an assistant's turn, as the model is given it."""

    text: str
    ids: list[int]
    frame: AnswerFrame = NO_FRAME
    """What the template writes around the answer."""


@dataclass(frozen=True)
class TaskRow:
    """A test row with a checkable answer."""

    row: ChatRow
    """The messages up to the expected answer, which is the last one."""
    prompt: RenderedPrompt
    expected: str
    """The expected answer: the content, or what the template makes of it, as of a tool call."""


@dataclass
class TaskRows:
    """The test rows without a problem."""

    chats: list[ChatRow] = field(default_factory=list)
    """All of them, up to the expected answer."""
    used: list[TaskRow] = field(default_factory=list)
    """Those that base and trained model answer (`reference.task_rows`)."""
    usage: KeyUsage = field(default_factory=KeyUsage)
    trailing: TrailingTurns = field(default_factory=TrailingTurns)
    written: WrittenTokens = field(default_factory=WrittenTokens)


def prepare_task_rows(
    template: ChatTemplate,
    tokenizer: TextTokenizer,
    rows: Sequence[ChatRow],
    data: DataConfig,
    limit: int,
    problems: RowProblems,
) -> TaskRows:
    """Check all test rows, and render, tokenize and check the expected answers of the first `limit` of them.

    Problems of rows are added to `problems`. Raises DataError for a choice that is no text.
    """
    _check_choices(data)
    result = TaskRows()
    for given in rows:
        try:
            row = fit_to_template(template, result.trailing.leave_out(given), result.usage)
            if not row.answers:
                raise RowProblem("has no expected answer: every assistant message is excluded by a flag")
            row = replace(row, messages=row.messages[: row.answers[-1] + 1])
            prompt = render_prompt(template, tokenizer, row)
            if len(result.used) < limit:
                prompt = replace(prompt, frame=_find_frame(template, tokenizer, row))
                expected = _expected_answer(template, tokenizer, row, prompt.frame)
                _check_answer(tokenizer, prompt, expected, data)
                result.used.append(TaskRow(row, prompt, expected))
        except DataError as error:
            problems.add(given.place, error.message, error.hint)
        except RowProblem as problem:
            problems.add(given.place, str(problem))
        else:
            result.chats.append(row)
            result.written.count(tokenizer, row)
    return result


def greedy_prompts(
    template: ChatTemplate, tokenizer: TextTokenizer, rows: Sequence[ChatRow], problems: RowProblems
) -> list[RenderedPrompt]:
    """Return the prompts of the first GREEDY_ROWS held-out rows that end with an answer.

    Rows whose prompt cannot be rendered are added to `problems`.
    """
    prompts: list[RenderedPrompt] = []
    for row in rows:
        if row.messages[-1]["role"] != "assistant" or len(row.messages) < 2:
            continue
        try:
            prompt = render_prompt(template, tokenizer, row)
            prompts.append(replace(prompt, frame=_find_frame(template, tokenizer, row)))
        except DataError as error:
            problems.add(row.place, error.message, error.hint)
        except RowProblem as problem:
            problems.add(row.place, str(problem))
        if len(prompts) == GREEDY_ROWS:
            break
    return prompts


def render_prompt(template: ChatTemplate, tokenizer: TextTokenizer, row: ChatRow) -> RenderedPrompt:
    """Render a row up to its last message, which is the answer. Raises DataError, or RowProblem for an empty prompt."""
    if len(row.messages) < 2:
        raise RowProblem("has no prompt: no message precedes the expected answer")
    text = template.with_options(row.options).render(row.messages[:-1], add_generation_prompt=True, tools=row.tools)
    ids, _ = tokenizer.encode(text)
    if not ids:
        raise RowProblem("has no prompt: the chat template renders nothing before the answer")
    if problem := tokenizer.without_row(ids):
        raise RowProblem(problem)
    return RenderedPrompt(text, ids)


def _find_frame(template: ChatTemplate, tokenizer: TextTokenizer, row: ChatRow) -> AnswerFrame:
    """Find what the template writes around the last message of a row."""
    stops = [tokenizer.text_of(id_) for id_ in tokenizer.ending_ids]
    return find_frame(template.with_options(row.options), row.messages[:-1], row.tools, stops)


def _expected_answer(template: ChatTemplate, tokenizer: TextTokenizer, row: ChatRow, frame: AnswerFrame) -> str:
    answer = row.messages[-1]
    content = None if answer.get("tool_calls") else str(answer["content"])
    try:
        encoded = encode_answer(template.with_options(row.options), tokenizer, row.messages, tools=row.tools)
    except DataError:
        if content is None:
            raise
        return content
    turn = [encoded.input_ids[i] for i in encoded.scored]
    if turn and turn[-1] in tokenizer.ending_ids:
        turn.pop()
    rendered = read_answer(frame, tokenizer.pieces(turn))
    return rendered if content is None or content.strip() != rendered.strip() else content


def _check_choices(data: DataConfig) -> None:
    for choice in data.choices:
        try:
            check_characters(choice)
        except RowProblem as problem:
            raise DataError(f"an entry of data.choices {problem}", "Correct data.choices") from None


def _check_answer(tokenizer: TextTokenizer, prompt: RenderedPrompt, expected: str, data: DataConfig) -> None:
    """Raise DataError for an expected answer that no answer can be compared with, or a choice without a token."""
    answer_matches(data.answer, expected, "")
    if data.answer != CHOICE:
        return
    if expected not in data.choices:
        raise DataError(
            f"the expected answer {expected[:60]!r} is none of data.choices", f"They are {', '.join(data.choices)}"
        )
    found = tokenize_choices(tokenizer, prompt.text, data.choices, prompt.frame.prefix)
    for choice, (_, positions) in zip(data.choices, found, strict=True):
        if not len(positions):
            raise DataError(f"the choice {choice!r} adds no token to the prompt", "Correct data.choices")
