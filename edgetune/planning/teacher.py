"""The teacher of a distillation: checked before training; answers of an endpoint, stored one by one."""

from __future__ import annotations

import hashlib
import json
import os
import threading
import time
import urllib.error
import urllib.request
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path
from typing import Any

from edgetune import console
from edgetune.data.chat_rows import ChatRow
from edgetune.data.dataset import encode_all
from edgetune.data.text_tokenizer import TextTokenizer
from edgetune.errors import ConfigError, DataError, EnvironmentProblem
from edgetune.objectives import Objective
from edgetune.objectives.distillation import Distillation
from edgetune.planning.prepare import PreparedRun

PARALLEL = 4
"""Questions that are asked at once."""
TRIES = 4
TIMEOUT = 120.0
"""Seconds without an answer after which a question has failed."""
_PAUSE = 1.0
"""Seconds before the second try; doubled for each further one."""
_SHOWN = 200


def check_teacher(prepared: PreparedRun, file: Path) -> None:
    """Check that the endpoint of a distillation answers, or that a local teacher has the vocabulary of the base.

    The endpoint is not needed if `file` holds its answers already.

    Raises:
        ConfigError: There is no such directory, or its vocabulary is another one.
        EnvironmentProblem: The endpoint cannot be reached, or refuses.
        DataError: Rows without an answer for a local teacher, which does not generate.
    """
    objective: Objective = prepared.config.objective
    if not isinstance(objective, Distillation):
        return
    if objective.is_remote:
        if not file.is_file():
            Endpoint(objective).check()
        return
    for split in (prepared.train, prepared.validation):
        if split.prompts:
            raise DataError(
                f"{split.prompts[0].place}: the row has no answer, and a local teacher generates none",
                "Give rows with answers, or an endpoint as objective.teacher, which answers them",
            )
    _check_vocabulary(Path(objective.teacher), prepared.tokenizer)


def _check_vocabulary(teacher: Path, tokenizer: TextTokenizer) -> None:
    file = teacher / "tokenizer.json"
    if not (teacher / "config.json").is_file() or not file.is_file():
        raise ConfigError(
            f"objective.teacher: {teacher} is no model directory with config.json and tokenizer.json",
            "Give a Hugging Face directory, or the URL of an endpoint (http://HOST/v1)",
        )
    from tokenizers import Tokenizer

    theirs = Tokenizer.from_file(str(file)).get_vocab(with_added_tokens=True)
    ours = tokenizer.backend.get_vocab(with_added_tokens=True)
    if theirs != ours:
        token = next(each for each in sorted(ours.keys() | theirs.keys()) if ours.get(each) != theirs.get(each))
        raise ConfigError(
            f"objective.teacher: {teacher} has another vocabulary than the base: the token {token!r} is "
            f"{theirs.get(token)} there and {ours.get(token)} here",
            "A local teacher needs the same tokenizer; learn the answers of another one through an endpoint",
        )


class Endpoint:
    """An OpenAI-compatible endpoint."""

    def __init__(self, objective: Distillation) -> None:
        self._objective = objective
        self._url = objective.teacher.rstrip("/")

    @property
    def parameters(self) -> dict[str, Any]:
        """What is asked beside the messages."""
        objective = self._objective
        return {
            "model": objective.teacher_model,
            "temperature": objective.answer_temperature,
            "max_tokens": objective.answer_tokens,
        }

    def check(self) -> None:
        """Raise EnvironmentProblem if the endpoint cannot be reached or refuses the key."""
        try:
            self._request("/models", None, timeout=10)
        except urllib.error.HTTPError as error:
            if error.code in (401, 403):
                raise self._problem(f"refuses the key ({error.code})") from None
        except (OSError, ValueError) as error:
            raise self._problem(f"cannot be reached: {_reason(error)}") from None

    def ask(self, messages: Sequence[Mapping[str, Any]], tools: Any = None) -> str:
        """Return the answer of the teacher; failures that may pass are tried again.

        Raises EnvironmentProblem.
        """
        body = {**self.parameters, "messages": list(messages), **({"tools": tools} if tools else {})}
        for number in range(TRIES):
            last = number == TRIES - 1
            try:
                reply = self._request("/chat/completions", body, TIMEOUT)
                return _answer_in(reply)
            except urllib.error.HTTPError as error:
                if last or (error.code != 429 and error.code < 500):
                    text = error.read().decode("utf-8", "replace").strip()[:_SHOWN]
                    raise self._problem(f"answers with the status {error.code}: {text}") from None
            except (KeyError, IndexError, TypeError) as error:
                raise self._problem(f"gives a reply without choices[0].message.content ({error!r})") from None
            except ValueError as error:
                raise self._problem(f"gives no JSON: {error}") from None
            except OSError as error:
                if last:
                    raise self._problem(f"cannot be reached: {_reason(error)}") from None
            time.sleep(_PAUSE * 2**number)
        raise AssertionError("the last try returns or raises")

    def _request(self, path: str, body: Any, timeout: float) -> Any:
        headers = {"Content-Type": "application/json"}
        if key := os.environ.get(self._objective.api_key_variable):
            headers["Authorization"] = f"Bearer {key}"
        data = None if body is None else json.dumps(body).encode()
        request = urllib.request.Request(self._url + path, data, headers)
        with urllib.request.urlopen(request, timeout=timeout) as reply:
            return json.load(reply)

    def _problem(self, what: str) -> EnvironmentProblem:
        return EnvironmentProblem(
            f"the teacher {self._url} {what}",
            f"Start it, correct objective.teacher, or set the key in {self._objective.api_key_variable}; answers so "
            "far are kept for --resume",
        )


def _reason(error: Exception) -> str:
    return str(getattr(error, "reason", None) or error)


def _answer_in(reply: Any) -> str:
    content = reply["choices"][0]["message"]["content"]
    if not isinstance(content, str):
        raise TypeError(f"content is {content!r}")
    return content


class AnswerStore:
    """The answers of a teacher in a file, a line each, found again by what was asked."""

    def __init__(self, file: Path) -> None:
        self._file = file
        self._lock = threading.Lock()
        self._known: dict[str, str] = {}
        if file.is_file():
            for line in file.read_text(encoding="utf-8").splitlines():
                try:
                    entry = json.loads(line)
                    self._known[entry["key"]] = entry["answer"]
                except (ValueError, KeyError, TypeError):
                    continue  # a line that a kill cut off

    def get(self, key: str) -> str | None:
        """Return a stored answer."""
        return self._known.get(key)

    def add(self, key: str, answer: str) -> None:
        """Store an answer; safe in several threads."""
        with self._lock:
            self._file.parent.mkdir(parents=True, exist_ok=True)
            is_cut = self._file.is_file() and not self._file.read_bytes().endswith(b"\n")
            with self._file.open("a", encoding="utf-8") as lines:
                lines.write(("\n" if is_cut else "") + json.dumps({"key": key, "answer": answer}) + "\n")
            self._known[key] = answer


def answer_rows(
    endpoint: Endpoint, rows: Sequence[ChatRow], store: AnswerStore, progress: Callable[[int, int], None]
) -> list[ChatRow]:
    """Return the rows with the teacher's answer in place of their last one; stored answers are not asked again."""
    prompts = [_prompt_of(row) for row in rows]
    keys = [_key(endpoint.parameters, row) for row in prompts]
    missing = {key: row for key, row in zip(keys, prompts, strict=True) if store.get(key) is None}
    done = len(rows) - len(missing)

    def ask(key: str, row: ChatRow) -> None:
        store.add(key, endpoint.ask(row.messages, row.tools))

    with ThreadPoolExecutor(PARALLEL) as pool:
        running = [pool.submit(ask, key, row) for key, row in missing.items()]
        try:
            for number, future in enumerate(running, 1):
                future.result()
                progress(done + number, len(rows))
        finally:
            for future in running:
                future.cancel()
    answered = []
    for key, row in zip(keys, prompts, strict=True):
        answer = {"role": "assistant", "content": store.get(key)}
        answered.append(_with_messages(row, [*row.messages, answer]))
    return answered


def _prompt_of(row: ChatRow) -> ChatRow:
    """Return a row without its last answer; earlier answers are context."""
    ends_with_answer = row.messages[-1]["role"] == "assistant"
    return _with_messages(row, list(row.messages[:-1] if ends_with_answer else row.messages))


def _with_messages(row: ChatRow, messages: list[dict[str, Any]]) -> ChatRow:
    earlier = frozenset(at for at, message in enumerate(messages[:-1]) if message["role"] == "assistant")
    return ChatRow(messages, row.tools, earlier, row.place, row.options)


def _key(parameters: Mapping[str, Any], row: ChatRow) -> str:
    text = json.dumps([parameters, row.messages, row.tools], sort_keys=True)
    return hashlib.sha256(text.encode()).hexdigest()


def with_teacher_answers(prepared: PreparedRun, file: Path) -> PreparedRun:
    """Return the prepared run with the answers of an endpoint in place of those of the rows; others as they are.

    Answers are stored in `file` as they come, so that an interrupted run asks only for those that are missing.

    Raises:
        EnvironmentProblem: The endpoint fails.
        DataError: An answer cannot be rendered or trained on.
    """
    objective: Objective = prepared.config.objective
    if not isinstance(objective, Distillation) or not objective.is_remote:
        return prepared
    endpoint, store = Endpoint(objective), AnswerStore(file)
    length = prepared.config.training.max_length
    splits = {}
    for name in ("train", "validation"):
        chats = getattr(prepared, name).chats
        with console.count_progress(f"answers of the teacher to the {name} rows", announce=True) as progress:
            rows = answer_rows(endpoint, chats, store, progress)
        splits[name] = encode_all(prepared.template, prepared.tokenizer, rows, length)
    return replace(
        prepared,
        train=splits["train"],
        validation=splits["validation"],
        splits=replace(prepared.splits, train=splits["train"].chats, validation=splits["validation"].chats),
    )
