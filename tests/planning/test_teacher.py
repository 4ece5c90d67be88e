"""A teacher behind an OpenAI-compatible endpoint: what it is asked, errors in one sentence, answers that are kept."""

from __future__ import annotations

from pathlib import Path
from typing import Any, cast

import pytest

from edgetune.config import parse_config
from edgetune.data.chat_rows import ChatRow
from edgetune.errors import ConfigError, EnvironmentProblem
from edgetune.objectives.distillation import Distillation
from edgetune.planning import teacher
from edgetune.planning.teacher import AnswerStore, Endpoint, answer_rows
from tests.planning.openai_server import answer, serving


@pytest.fixture(autouse=True)
def _without_pauses(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(teacher, "_PAUSE", 0.0)


def objective(url: str, **options: Any) -> Distillation:
    values = {"kind": "distillation", "teacher": url, "teacher_model": "large", **options}
    return cast(Distillation, parse_config({"base": "b", "data": {"train": "t"}, "objective": values}).objective)


def row(text: str, *more: dict[str, Any]) -> ChatRow:
    return ChatRow([{"role": "user", "content": text}, *more])


def ignore(done: int, total: int) -> None:
    pass


def test_the_last_answer_of_a_row_is_the_teachers(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TEACHER_KEY", "secret")
    rows = [row("1?"), row("2?", {"role": "assistant", "content": "mine"})]
    with serving(lambda body, _: answer(body["messages"][-1]["content"] + "!")) as server:
        endpoint = Endpoint(objective(server.url, answer_tokens=9, api_key_variable="TEACHER_KEY"))
        endpoint.check()
        found = answer_rows(endpoint, rows, AnswerStore(tmp_path / "answers.jsonl"), ignore)
    assert [each.messages[-1] for each in found] == [
        {"role": "assistant", "content": "1?!"}, {"role": "assistant", "content": "2?!"},
    ]  # fmt: skip
    assert [each.answers for each in found] == [[1], [1]]
    assert {(each["model"], each["max_tokens"], each["temperature"]) for each in server.asked} == {("large", 9, 0)}
    assert set(server.keys) == {"Bearer secret"}


def test_stored_answers_are_not_asked_for_again(tmp_path: Path) -> None:
    file = tmp_path / "answers.jsonl"
    rows = [row(f"{number}?") for number in range(20)]
    with serving(lambda body, number: answer("yes") if number < 7 else (401, "no")) as server:
        with pytest.raises(EnvironmentProblem, match="answers with the status 401: no"):
            answer_rows(Endpoint(objective(server.url)), rows, AnswerStore(file), ignore)
        assert 7 < len(server.asked) < 20  # the rest was not asked for after the failure
    file.write_text(file.read_text() + '{"key": "cut off')
    with serving(lambda body, number: answer("no")) as server:
        # the same questions at another address: what is asked decides
        found = answer_rows(Endpoint(objective(server.url)), rows, AnswerStore(file), ignore)
        assert len(server.asked) == 13
        again = answer_rows(Endpoint(objective(server.url)), rows, AnswerStore(file), ignore)
        assert len(server.asked) == 13
    assert [each.messages for each in found] == [each.messages for each in again]
    assert sum(each.messages[-1]["content"] == "yes" for each in found) == 7


def test_failures_that_may_pass_are_tried_again(tmp_path: Path) -> None:
    with serving(lambda body, number: (503, "busy") if number < 3 else answer("yes")) as server:
        assert Endpoint(objective(server.url)).ask([{"role": "user", "content": "?"}]) == "yes"
        assert len(server.asked) == 4
    with serving(lambda body, number: (429, "slow down")) as server:
        with pytest.raises(EnvironmentProblem, match="answers with the status 429: slow down"):
            Endpoint(objective(server.url)).ask([])
        assert len(server.asked) == teacher.TRIES


@pytest.mark.parametrize(
    ("reply", "message"),
    [
        ((200, "<html>"), "gives no JSON"),
        ((200, {"error": "x"}), r"gives a reply without choices\[0\].message.content"),
        (answer(None), "content is None"),
        ((404, "no such model"), "answers with the status 404: no such model"),
    ],
)
def test_a_reply_without_an_answer_is_one_clear_error(reply: Any, message: str) -> None:
    with serving(lambda body, number: reply) as server, pytest.raises(EnvironmentProblem, match=message):
        Endpoint(objective(server.url)).ask([])


def test_an_endpoint_that_is_not_there_is_said_before_training() -> None:
    with pytest.raises(EnvironmentProblem, match=r"the teacher http://127\.0\.0\.1:9/v1 cannot be reached: .*refused"):
        Endpoint(objective("http://127.0.0.1:9/v1")).check()


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"teacher": "http://host/v1"}, "objective.teacher_model is missing"),
        (
            {"teacher": "http://host/v1", "teacher_model": "m", "beta": 0.5},
            "objective.beta is read for a local teacher",
        ),
        ({"teacher": "large", "answer_tokens": 5}, "objective.answer_tokens is read for an endpoint"),
        ({}, "objective.teacher is missing"),
    ],
)
def test_options_of_the_other_kind_of_teacher_are_refused(options: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        parse_config({"base": "b", "data": {"train": "t"}, "objective": {"kind": "distillation", **options}})
