"""The conversation of a chat, and its commands."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import pytest

from edgetune.chatting.session import ChatSession
from edgetune.chatting.slash_commands import COMMANDS, SETTINGS, EndChat, run_command
from edgetune.data.formats import to_chat_row
from edgetune.errors import ConfigError, DataError, EdgetuneError, RuntimeProblem
from edgetune.generation.options import sampling_defaults
from edgetune.runtime import Answer, NoChatTemplate, Runtime, Sampling, load
from edgetune.runtime.engine import Engine


def say(session: ChatSession, text: str) -> str:
    answer = session.ask(text)
    said = answer.text()
    session.keep(said, answer.thought)
    return said


def command(session: ChatSession, line: str) -> str:
    reply = run_command(session, line)
    assert isinstance(reply, str)
    return reply


def expected(alone: Runtime, messages: list[dict[str, str]]) -> str:
    return alone.chat(messages, max_tokens=8).text()


def test_each_answer_is_that_of_the_whole_conversation(session: ChatSession, alone: Runtime) -> None:
    session.system = "Be brief."
    first, second = say(session, "dim the lights"), say(session, "and the radio")
    messages = [{"role": "system", "content": "Be brief."}, {"role": "user", "content": "dim the lights"}]
    assert first == expected(alone, messages)
    messages += [{"role": "assistant", "content": first}, {"role": "user", "content": "and the radio"}]
    assert second == expected(alone, messages)


def test_what_was_evaluated_before_is_taken_from_the_cache(engine: Engine) -> None:
    session = ChatSession(engine, Sampling(), max_tokens=8)
    say(session, "dim the lights of the bedroom")
    say(session, "and the radio")
    if engine.runtime.format == "gguf":
        assert session.usage.cached_tokens > 10
    assert session.usage.prompt_tokens > session.usage.cached_tokens


def test_undo_removes_one_exchange_and_reset_all(session: ChatSession) -> None:
    say(session, "one")
    say(session, "two\nlines")
    assert command(session, "/undo") == "removed: two..."
    assert [message["role"] for message in session.messages] == ["user", "assistant"]
    assert session.messages[0]["content"] == "one"
    command(session, "/reset")
    assert session.messages == []
    with pytest.raises(ConfigError, match="no message to remove"):
        run_command(session, "/undo")


def test_regen_replaces_the_answer_and_takes_the_next_seed(session: ChatSession, alone: Runtime) -> None:
    session.sampling = Sampling(temperature=5, seed=7)
    first = say(session, "one")
    again = run_command(session, "/regen")
    assert isinstance(again, Answer)
    text = again.text()
    session.keep(text)
    assert text != first
    assert [message["role"] for message in session.messages] == ["user", "assistant"]
    question = [{"role": "user", "content": "one"}]
    assert text == alone.chat(question, sampling=Sampling(temperature=5, seed=8), max_tokens=8).text()
    session.reset()
    with pytest.raises(ConfigError, match="no message to answer again"):
        run_command(session, "/regen")


def test_a_message_that_does_not_fit_changes_nothing(session: ChatSession) -> None:
    say(session, "one")
    before = list(session.messages)
    with pytest.raises(RuntimeProblem, match="but the context is 256"):
        session.ask("dim the lights " * 100)
    assert session.messages == before


def test_a_saved_conversation_is_a_row_that_load_and_training_read(session: ChatSession, tmp_path: Path) -> None:
    session.system = "Be brief."
    say(session, "dim 灯")
    path = tmp_path / "chat.json"
    assert command(session, f"/save {path}") == f"saved 2 messages to {path}"
    row = to_chat_row(json.loads(path.read_text(encoding="utf-8")))
    assert [message["role"] for message in row.messages] == ["system", "user", "assistant"]
    other = ChatSession(session.engine, Sampling(), 8)
    assert command(other, f"/load {path}") == f"loaded 2 messages from {path}"
    assert (other.system, other.messages) == ("Be brief.", session.messages)
    say(session, "more")
    say(other, "more")
    assert other.messages == session.messages
    command(other, f"/save {path}")  # its own file
    assert len(json.loads(path.read_text(encoding="utf-8"))["messages"]) == 5
    with pytest.raises(ConfigError, match="exists"):
        run_command(ChatSession(session.engine, Sampling(), 8, messages=session.messages), f"/save {path}")


def test_load_reads_other_formats_and_a_question_without_answer(session: ChatSession, tmp_path: Path) -> None:
    path = tmp_path / "row.jsonl"
    path.write_text('{"conversations": [{"from": "human", "value": "hi"}], "mood": "good"}\n')
    assert command(session, f"/load {path}") == (
        f"loaded 1 message from {path}; not read: mood; the last one has no answer: /regen writes it"
    )
    answer = run_command(session, "/regen")
    assert isinstance(answer, Answer)
    session.keep(answer.text())
    with pytest.raises(ConfigError, match="exists"):  # saving would lose what was not read
        run_command(session, f"/save {path}")


@pytest.mark.parametrize(
    ("content", "said"),
    [
        (None, "there is no file"),
        ("", "is empty"),
        ("{}\n", "line 1"),
        ("nonsense\n", "line 1: not JSON"),
        ('{"prompt": "a", "completion": "b"}\n' * 2, "more than one conversation"),
        ('{"messages": 3}\n', "messages"),
    ],
)
def test_a_file_without_a_conversation_is_named(
    session: ChatSession, tmp_path: Path, content: str | None, said: str
) -> None:
    path = tmp_path / "row.jsonl"
    if content is not None:
        path.write_text(content)
    say(session, "one")
    with pytest.raises(DataError, match=said) as caught:
        run_command(session, f"/load {path}")
    assert str(path) in caught.value.message
    assert len(session.messages) == 2


def test_system_is_shown_set_and_removed(session: ChatSession) -> None:
    assert command(session, "/system") == "no system message"
    command(session, "/system Be brief.")
    assert command(session, "/system") == "Be brief."
    command(session, '/system ""')
    assert session.system is None


def test_a_system_message_that_the_template_leaves_out_is_refused(session: ChatSession, engine: Engine) -> None:
    opened = engine.runtime
    assert opened.chat_template is not None
    source = "{% for m in messages %}{% if m.role != 'system' %}{{ m.content }}{% endif %}{% endfor %}"
    whole = opened.chat_template
    try:
        opened.chat_template = replace(whole, source=source)
        with pytest.raises(ConfigError, match="leaves out system messages"):
            run_command(session, "/system Be brief.")
        with pytest.raises(ConfigError, match="leaves out system messages"):
            ChatSession(engine, Sampling(), system="Be brief.")
    finally:
        opened.chat_template = whole


def test_settings_reach_the_sampler_and_are_checked(session: ChatSession) -> None:
    assert command(session, "/set temperature 0.5") == "temperature is 0.5"
    assert command(session, "/set top-k 3") == "top_k is 3"
    assert session.sampling == Sampling(temperature=0.5, top_k=3)
    assert command(session, "/set seed 1") == "seed is 1"
    assert command(session, "/set seed none") == "seed is none"
    assert command(session, "/set max_tokens 3") == "max_tokens is 3"
    assert len(session.ask("x").text()) >= 0
    assert command(session, "/set thinking hide") == "thinking is hide"
    assert not session.show_thinking
    listed = command(session, "/set")
    assert all(name in listed for name in SETTINGS)


def test_mirostat_switches_off_the_filters_that_it_replaces(session: ChatSession) -> None:
    session.sampling = replace(sampling_defaults(), temperature=1.0)
    assert command(session, "/set mirostat 2") == "mirostat is 2"
    assert session.sampling == Sampling(temperature=1.0, mirostat=2)
    with pytest.raises(EdgetuneError, match="mirostat takes the place of top_k"):
        run_command(session, "/set top_k 5")
    assert session.sampling.top_k == 0


@pytest.mark.parametrize(
    ("line", "said", "hint"),
    [
        ("/regn", "no command /regn", "Did you mean /regen"),
        ("/set temperat 1", "no setting temperat", "Did you mean temperature"),
        ("/set temperature hot", "temperature cannot be 'hot'", "not a valid float"),
        ("/set top_k -1", "top_k cannot be '-1'", "x>=0"),
        ("/set thinking maybe", "thinking cannot be 'maybe'", "'show', 'hide'"),
        ("/set template x=1", "does not read the option x", "no options"),
        ("/set template x", "NAME=VALUE", ""),
        ("/undo 2", "/undo takes no argument", "Write /undo alone"),
        ("/save", "/save needs the name of a file", "chat.json"),
        ("/save x.json", "nothing to save", "Write a message first"),
        ("/load nowhere.json", "there is no file nowhere.json", "/save"),
    ],
)
def test_what_cannot_be_done_is_one_sentence(session: ChatSession, line: str, said: str, hint: str) -> None:
    with pytest.raises(EdgetuneError) as caught:
        run_command(session, line)
    assert said in caught.value.message
    assert hint in (caught.value.hint or "")


def test_an_adapter_is_loaded_weighted_and_left_out(file: Path, adapter: Path) -> None:
    question = [{"role": "user", "content": "dim the lights"}]
    with load(file) as runtime, load(adapter.with_name("merged.gguf")) as other:
        plain, changed = (expected(each, question) for each in (runtime, other))
    assert plain != changed
    with load(file) as runtime, Engine(runtime, slots=1) as engine:
        session = ChatSession(engine, Sampling(), max_tokens=8)
        assert command(session, "/adapter") == "no adapter is loaded"
        assert command(session, f"/adapter {adapter}") == "change  weight 1"
        assert say(session, "dim the lights") == changed
        for line, shown in (("/adapter change 0", "change  not in use"), ("/adapter change", "change  weight 1")):
            assert command(session, line) == shown
        assert command(session, f"/adapter {adapter} 0.5") == "change  weight 0.5", "it is not loaded again"
        assert command(session, "/adapter none") == "change  not in use"
        session.reset()
        assert say(session, "dim the lights") == plain


def test_an_adapter_that_cannot_be_used_changes_nothing(session: ChatSession, file: Path, tmp_path: Path) -> None:
    for argument in (str(file), str(tmp_path / "none.gguf"), f"{tmp_path / 'none.gguf'} 0.5", "name 2"):
        with pytest.raises(RuntimeProblem) as caught:
            run_command(session, f"/adapter {argument}")
        assert ("takes no adapters" in str(caught.value)) is (session.runtime.format == "onnx")
    assert session.adapters == {}


def test_a_weight_that_is_no_number_is_refused(file: Path, adapter: Path) -> None:
    with load(file) as runtime, Engine(runtime, slots=1) as engine:
        session = ChatSession(engine, Sampling(), max_tokens=8)
        with pytest.raises(RuntimeProblem, match="the weight of adapter 'change' is nan"):
            run_command(session, f"/adapter {adapter} nan")
        assert session.adapters == {}


def test_help_lists_every_command_and_exit_ends(session: ChatSession) -> None:
    listed = command(session, "/help")
    assert all(f"/{name}" in listed for name in COMMANDS)
    with pytest.raises(EndChat):
        run_command(session, "/exit")


def test_show_prints_the_conversation(session: ChatSession) -> None:
    assert command(session, "/show") == "the conversation is empty"
    session.system = "Be brief."
    session.messages = [{"role": "user", "content": "hi"}]
    assert command(session, "/show") == "system: Be brief.\n\nuser: hi"


def test_reasoning_is_kept_for_the_template(session: ChatSession) -> None:
    session.ask("hi")
    session.keep("hello", "hm")
    assert session.messages[-1] == {"role": "assistant", "reasoning_content": "hm", "content": "hello"}


def test_a_file_without_a_template_cannot_chat(file: Path, tmp_path: Path) -> None:
    bare = tmp_path / "bare.gguf"
    bare.write_bytes(file.read_bytes().replace(b"tokenizer.chat_template", b"tokenizer.chat_templote"))
    with load(bare) as runtime, Engine(runtime, slots=1) as engine, pytest.raises(NoChatTemplate, match="cannot chat"):
        ChatSession(engine, Sampling())
