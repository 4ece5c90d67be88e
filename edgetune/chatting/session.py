"""The conversation of a chat: what was said, how answers are sampled, and the row of data that it is saved as."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from edgetune.data.chat import Message
from edgetune.data.chat_rows import ChatRow, Columns
from edgetune.data.objective_readers import DistillationReader
from edgetune.data.problems import RowProblem
from edgetune.data.row_files import RowFile
from edgetune.errors import ConfigError, DataError, RuntimeProblem
from edgetune.runtime import Answer, Finish, Generation, NoChatTemplate, Runtime, Sampling
from edgetune.runtime.engine import Engine, GenerationRequest, Ticket, Usage
from edgetune_converters.files import atomic

_FORMATS_HINT = "docs/data.md lists the formats of conversations"


@dataclass
class ChatSession:
    """A conversation with a model. A question enters it together with its answer, by `keep`."""

    engine: Engine
    """It keeps keys and values of the conversation, so that only what is new is evaluated."""
    sampling: Sampling
    max_tokens: int | None = None
    """Maximum number of tokens of an answer; None: until it ends or the context is full."""
    template_options: dict[str, Any] = field(default_factory=dict)
    show_thinking: bool = True
    system: str | None = None
    messages: list[Message] = field(default_factory=list)
    """Questions and answers, without the system message."""
    tools: Sequence[Mapping[str, Any]] | None = None
    """JSON schemas of the tools of a loaded conversation."""
    adapters: dict[str, float] = field(default_factory=dict)
    """Names of the adapters in use, with their weights."""
    own_file: Path | None = None
    """The file that was saved or wholly loaded last, which may be overwritten."""
    _ticket: Ticket | None = None
    _pending: list[Message] = field(default_factory=list)
    _repeated: int = 0

    def __post_init__(self) -> None:
        """Raise an error for a model without a chat template, and for options that the template does not read."""
        template = self.runtime.chat_template
        if template is None:
            raise NoChatTemplate(
                f"{self.runtime.path} has no chat template, so it cannot chat",
                "Continue plain text with `edgetune run --raw`, or export with a template",
            )
        template.check_options(self.template_options)
        if self.system is not None:
            self.check_system(self.system)

    @property
    def runtime(self) -> Runtime:
        """The model."""
        return self.engine.runtime

    def ask(self, text: str) -> Answer:
        """Begin the answer to a message of the user.

        Raises:
            RuntimeProblem: The conversation does not fit the context.
            DataError: The template refuses the conversation.
        """
        self._repeated = 0
        return self._begin([*self.messages, {"role": "user", "content": text}])

    def answer_again(self) -> Answer:
        """Begin another answer to the last message of the user; with a seed, from the next seed."""
        messages = list(self.messages)
        while messages and messages[-1]["role"] != "user":
            messages.pop()
        if not messages:
            raise ConfigError("there is no message to answer again", "Write one first")
        self._repeated += 1
        return self._begin(messages)

    def _begin(self, messages: list[Message]) -> Answer:
        self._pending = messages
        sampling = self.sampling
        if sampling.seed is not None and self._repeated:
            sampling = replace(sampling, seed=(sampling.seed + self._repeated) % (2**32 - 1))
        conversation = [*self._system_messages, *messages]
        ids = self.runtime.tokenize_chat(conversation, tools=self.tools, template_options=self.template_options)
        frame = self.runtime.answer_frame(conversation, tools=self.tools, template_options=self.template_options)
        self._ticket = self.engine.submit(
            GenerationRequest(
                ids, sampling, self.max_tokens or self.runtime.context, adapters=tuple(self.adapters.items())
            )
        )
        return Answer(ids, Generation(_events(self._ticket)), self.runtime.token_bytes, frame)

    def stop(self) -> None:
        """End the answer, if it has not ended."""
        if self._ticket is not None:
            self._ticket.cancel()

    @property
    def usage(self) -> Usage:
        """What the last answer has cost."""
        return self._ticket.usage if self._ticket is not None else Usage(0)

    def keep(self, text: str, thought: str = "") -> None:
        """Add the message that was asked last and its answer, or the part of it before it was stopped."""
        reasoning = {"reasoning_content": thought} if thought.strip() else {}
        self.messages = [*self._pending, {"role": "assistant", **reasoning, "content": text}]

    @property
    def _system_messages(self) -> list[Message]:
        return [] if self.system is None else [{"role": "system", "content": self.system}]

    def check_system(self, text: str) -> None:
        """Raise ConfigError if the chat template would leave out a system message, DataError if it refuses one."""
        template = self.runtime.chat_template
        assert template is not None
        question: Message = {"role": "user", "content": "?"}
        told = template.render([{"role": "system", "content": text}, question], add_generation_prompt=True)
        if text.strip() and told == template.render([question], add_generation_prompt=True):
            raise ConfigError(
                "the chat template of the file leaves out system messages", "Put the text into your first message"
            )

    def reset(self) -> None:
        """Forget the conversation; the system message and the settings stay."""
        self.messages, self._pending = [], []

    def undo(self) -> str:
        """Remove the last message of the user and what follows it; return its text."""
        last = next((at for at in reversed(range(len(self.messages))) if self.messages[at]["role"] == "user"), None)
        if last is None:
            raise ConfigError("there is no message to remove", "Write one first")
        removed = str(self.messages[last]["content"])
        del self.messages[last:]
        return removed

    def count_tokens(self) -> int:
        """Return the tokens of the conversation as a prompt."""
        messages = [*self._system_messages, *self.messages]
        if not messages:
            return 0
        try:
            options = self.template_options
            return len(self.runtime.tokenize_chat(messages, tools=self.tools, template_options=options))
        except (DataError, RuntimeProblem):
            return 0

    def use_adapter(self, which: str, weight: float) -> None:
        """Use an adapter with a weight from the next answer on; 0 leaves it out.

        Args:
            which: Name of a loaded adapter, or the file of one, which is loaded unless it is.
            weight: Multiplies its change of the model.

        Raises:
            RuntimeProblem: It is not an adapter of this model, or the weight is not a number.
        """
        name = which if which in self.runtime.adapters else self._load_adapter(Path(which).expanduser())
        self.runtime.find_adapters(((name, weight),))
        self.adapters = {each: value for each, value in {**self.adapters, name: weight}.items() if value}

    def _load_adapter(self, path: Path) -> str:
        """Return the name of the adapter in a file: the file's, or its path where that is taken."""
        loaded = self.runtime.adapters
        same = (name for name, each in loaded.items() if each.path.resolve() == path.resolve())
        return next(same, None) or self.engine.load_adapter(path, str(path) if path.stem in loaded else None)

    def save(self, path: Path) -> None:
        """Write the conversation as one row of data, which `load` and a training read."""
        if not self.messages:
            raise ConfigError("there is nothing to save", "Write a message first")
        if path.exists() and path.resolve() != self.own_file:
            raise ConfigError(f"{path} exists", "Give another name, or remove the file")
        row: dict[str, Any] = {"messages": [*self._system_messages, *self.messages]}
        if self.tools:
            row["tools"] = list(self.tools)
        if self.template_options:
            row["chat_template_kwargs"] = self.template_options
        atomic.write_text(path, json.dumps(row, ensure_ascii=False) + "\n", errors="replace")
        self.own_file = path.resolve()

    def load(self, path: Path) -> list[str]:
        """Continue the conversation in a file; return the keys of the file that are not read.

        Raises:
            DataError: The file is missing, or does not hold one conversation.
        """
        row = read_conversation(path)
        messages = list(row.messages)
        system = str(messages.pop(0)["content"]) if messages and messages[0]["role"] == "system" else None
        assert self.runtime.chat_template is not None
        self.runtime.chat_template.check_options(row.options)
        if system is not None:
            self.check_system(system)
        self.system, self.messages, self.tools = system, list(messages), row.tools
        self.template_options |= row.options
        others = row.beside.values if isinstance(row.beside, Columns) else ()
        unread = [*row.unread, *others]
        self.own_file = None if unread else path.resolve()
        return unread


def _events(ticket: Ticket) -> Iterator[tuple[int, int | Finish]]:
    """Yield the tokens of an answer, and why it ended."""
    for event in ticket:
        yield 0, event.token
    assert ticket.finish is not None
    yield 0, ticket.finish


def read_conversation(path: Path) -> ChatRow:
    """Read the one conversation of a file in any format of rows. Raises DataError."""
    if not path.is_file():
        raise DataError(f"there is no file {path}", "Save a conversation with /save FILE")
    reader = DistillationReader(wanted="a chat continues a conversation")
    rows = []
    for place, row in RowFile(path, str(path)).rows():
        if isinstance(row, RowProblem):
            raise DataError(f"{place}: {row}", row.hint or _FORMATS_HINT)
        try:
            rows.append(reader.read(row, place))
        except RowProblem as problem:
            raise DataError(f"{place}: {problem}", problem.hint or _FORMATS_HINT) from None
        if len(rows) > 1:
            raise DataError(f"{path} holds more than one conversation", "Give a file with one row")
    if not rows:
        raise DataError(f"{path} is empty: it holds no conversation", "Give a file with one row")
    return rows[0]
