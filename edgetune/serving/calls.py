"""A call of a route: its fields, and what answering it needs."""

from __future__ import annotations

import time
import uuid
from collections.abc import AsyncIterator, Awaitable, Callable, Iterable, Mapping
from contextlib import AsyncExitStack
from dataclasses import dataclass, field
from typing import Any, Generic, TypeVar

import edgetune
from edgetune.runtime.sampling import Sampling
from edgetune.runtime.ticket import Ticket
from edgetune.serving.answers import AnswerStream, cancel_all, merge, submit
from edgetune.serving.api_errors import ErrorFormat
from edgetune.serving.conversation import Conversation, Decoding, Delta, End, TokenUsage, check_tools
from edgetune.serving.loaded_files import ModelPool, ModelUse
from edgetune.serving.metrics import Metrics
from edgetune.serving.prompting import PreparedAnswer, prepare
from edgetune.serving.request_fields import Fields
from edgetune.serving.security import AccessRules
from edgetune.serving.worker_threads import run_in_thread

_UNCHECKED_HEADER = "x-edgetune-unchecked-patterns"
"""Tools whose schema has a pattern with look-around or back-references."""
SKIPPED_TOOLS_HEADER = "x-edgetune-skipped-tools"
"""Types of tools that only OpenAI, Anthropic or the client could run."""
_MOST_NAMED = 20


@dataclass(frozen=True)
class ServerSettings:
    """Limits of the server, and what requests leave open.

    Attributes:
        access: Who may ask.
        max_body: Bytes of a request.
        max_requests: Requests that are answered at once.
        request_seconds: Time for a request, from its first byte to the last of its reply.
        body_seconds: Time for a request's body to arrive.
        sampling: Sampling where a request gives none.
        is_exact: Whether one request is decoded at a time and without a cache, so that the result depends on it alone.
    """

    access: AccessRules = field(default_factory=AccessRules)
    max_body: int = 16 << 20
    max_requests: int = 256
    request_seconds: float = 600.0
    body_seconds: float = 30.0
    sampling: Sampling = field(default_factory=lambda: Sampling(temperature=1.0))
    is_exact: bool = False


@dataclass
class Server:
    """What all calls share."""

    pool: ModelPool
    settings: ServerSettings
    metrics: Metrics = field(default_factory=Metrics)
    started: float = field(default_factory=time.time)
    is_draining: bool = False
    """Whether the server is shutting down: no new request is answered."""


F = TypeVar("F", bound=Fields)


@dataclass
class Call(Generic[F]):
    """A request that is being answered."""

    server: Server
    fields: F
    path_parameters: Mapping[str, str]
    headers: Mapping[str, str]
    resources: AsyncExitStack
    """Released after the last byte of the reply."""
    reply_headers: dict[str, str] = field(default_factory=dict)
    created: int = field(default_factory=lambda: int(time.time()))

    def note(self, header: str, names: Iterable[str]) -> None:
        """Name what has no effect in a header of the reply, each thing once, the first twenty of them."""
        chosen = list(dict.fromkeys(names))[:_MOST_NAMED]
        if chosen:
            text = ", ".join(chosen).encode("ascii", "backslashreplace").decode()
            self.reply_headers[header] = "".join(each if each.isprintable() else " " for each in text)

    async def model(self, name: str | None) -> ModelUse:
        """Return the model that the request names, loaded; kept until the end of the reply."""
        return await self.resources.enter_async_context(self.server.pool.use(name))

    def fingerprint(self, model: ModelUse) -> str:
        """Return what determines an answer beside the request: edgetune, the file, and how it is decoded."""
        mode = "exact" if self.server.settings.is_exact else "batched"
        return f"edgetune-{edgetune.__version__}-{model.named.digest()[:12]}-{mode}"

    async def answer(
        self, model: ModelUse, conversation: Conversation, decoding: Decoding
    ) -> tuple[int, AsyncIterator[tuple[int, Delta]]]:
        """Queue the answers to a conversation.

        Returns:
            The tokens of the prompt, and the pieces (number of the choice, piece) as they come.

        Raises:
            ApiError: The request cannot be done.
        """
        check_tools(conversation.tools, conversation.tool_choice)

        def queue() -> tuple[PreparedAnswer, list[Ticket]]:
            prepared = prepare(model.runtime, conversation)
            return prepared, submit(model, prepared, decoding, field=conversation.messages_field)

        prepared, tickets = await run_in_thread(queue, discard=lambda queued: cancel_all(queued[1]))
        for ticket in tickets:
            self.resources.callback(ticket.cancel)
        if prepared.toolbox is not None:
            self.note(_UNCHECKED_HEADER, prepared.toolbox.unchecked)
        streams = [AnswerStream(ticket, prepared, decoding, model.runtime).deltas() for ticket in tickets]
        return len(prepared.ids), self._counted(merge(streams))

    async def _counted(self, deltas: AsyncIterator[tuple[int, Delta]]) -> AsyncIterator[tuple[int, Delta]]:
        async for index, delta in deltas:
            if isinstance(delta, End):
                self.server.metrics.count_tokens(delta.usage)
            yield index, delta


def new_id(prefix: str) -> str:
    """Return a new identifier of a reply."""
    return prefix + uuid.uuid4().hex[:24]


def total_usage(ends: list[End]) -> TokenUsage:
    """Return the tokens of several choices: the prompt counts once."""
    generated = sum(end.usage.generated for end in ends)
    return TokenUsage(ends[0].usage.prompt, ends[0].usage.cached, generated) if ends else TokenUsage()


Handler = Callable[[Call[Any]], Awaitable[Any]]


@dataclass(frozen=True)
class RouteSpec:
    """A row of the table of routes.

    Attributes:
        method: GET, POST or DELETE.
        path: Path, with parameters as Starlette writes them.
        handle: Answers a call with a JSON value, a Raw or a Stream.
        fields: Fields of the body.
        error: How its errors are written.
        is_open: Whether no API key is needed.
    """

    method: str
    path: str
    handle: Handler
    error: ErrorFormat
    fields: type[Fields] = Fields
    is_open: bool = False
