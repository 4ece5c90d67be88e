"""Errors of a request: an HTTP status, one sentence, and the field that is wrong; each dialect has its own object."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from edgetune.console import end_sentence
from edgetune.errors import ConfigError, DataError, EdgetuneError, RuntimeProblem

RETRY_SECONDS = 1
"""After which a client may try again when the server is full."""
ENGINE_CLOSED = "engine_closed"
"""Code of a request whose engine was ended by an error, or closed."""


class ApiError(Exception):
    """A request that cannot be answered.

    Attributes:
        status: HTTP status.
        message: One sentence with the value that is wrong.
        field: Name of the field that is wrong, such as messages.0.role.
        code: Word for programs, in place of that of the status.
        headers: Further headers of the reply.
    """

    def __init__(
        self, status: int, message: str, field: str | None = None, code: str | None = None, **headers: str
    ) -> None:
        super().__init__(message)
        self.status, self.message, self.field, self.code = status, message, field, code
        self.headers = {name.replace("_", "-"): value for name, value in headers.items()}
        if status in (429, 503):
            self.headers.setdefault("retry-after", str(RETRY_SECONDS))


def bad_request(message: str, field: str | None = None, code: str | None = None) -> ApiError:
    """Return the error of a request with a wrong field."""
    return ApiError(400, message, field, code)


def from_problem(problem: EdgetuneError, field: str | None = None) -> ApiError:
    """Return the error for a problem that the runtime has with a request."""
    status = 400 if isinstance(problem, RuntimeProblem | DataError | ConfigError) else 500
    hint = f". {end_sentence(problem.hint)}" if problem.hint else ""
    return ApiError(status, f"{problem.message}{hint}", field)


_WORDS = {
    400: "invalid_request_error", 401: "authentication_error", 403: "permission_error", 404: "not_found_error",
    405: "invalid_request_error", 408: "timeout_error", 413: "request_too_large", 429: "rate_limit_error",
    500: "api_error", 503: "overloaded_error",
}  # fmt: skip


def word_of(status: int) -> str:
    """Return the word of Anthropic and OpenAI for an HTTP status."""
    return _WORDS.get(status, "invalid_request_error" if status < 500 else "api_error")


def openai_error(error: ApiError) -> dict[str, Any]:
    """Return an error as OpenAI's API writes it."""
    return {
        "error": {
            "message": error.message, "type": word_of(error.status), "param": error.field, "code": error.code,
        }
    }  # fmt: skip


def anthropic_error(error: ApiError) -> dict[str, Any]:
    """Return an error as Anthropic's API writes it."""
    about = {"type": word_of(error.status), "message": error.message}
    return {"type": "error", "error": about | ({"param": error.field} if error.field else {})}


def ollama_error(error: ApiError) -> dict[str, Any]:
    """Return an error as Ollama writes it."""
    return {"error": error.message} | ({"param": error.field} if error.field else {})


ErrorFormat = Callable[[ApiError], dict[str, Any]]


def format_of(path: str) -> ErrorFormat:
    """Return the error format of a path that has no route."""
    if path.startswith("/v1/messages"):
        return anthropic_error
    return ollama_error if path.startswith("/api/") else openai_error
