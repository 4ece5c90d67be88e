"""`edgetune chat`: in a terminal, and with lines of a pipe."""

from __future__ import annotations

import json
import shutil
import subprocess
from pathlib import Path

import pytest

from edgetune.runtime import load
from tests.cli_runner import COMMAND, edgetune, edgetune_process, sentence
from tests.commands.terminal import Terminal
from tests.runtime import models

CTRL_C, CTRL_D, ENTER = "\x03", "\x04", "\r"
PROMPT = ">"


@pytest.fixture(scope="module", params=["gguf", "onnx"])
def artifact(request: pytest.FixtureRequest, base: Path, file: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return file if request.param == "gguf" else models.onnx(base, tmp_path_factory.mktemp("onnx") / "tiny-f32")


@pytest.fixture(scope="module")
def endless(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("endless")
    return models.gguf(models.endless(folder / "hf"), folder / "endless.gguf")


def conversation(file: Path, *questions: str, max_tokens: int) -> tuple[list[dict[str, str]], str]:
    """The messages of a chat, and its answers as they are written."""
    messages, written = [], ""
    with load(file) as runtime:
        for question in questions:
            messages.append({"role": "user", "content": question})
            text = runtime.chat(messages, max_tokens=max_tokens).text()
            messages.append({"role": "assistant", "content": text})
            written += f"{text}\n" if text else ""
    return messages, written


def test_each_line_of_a_pipe_is_answered(artifact: Path) -> None:
    questions = ("dim the lights", "把灯调暗")
    result = edgetune("chat", artifact, "--max-tokens", "8", stdin=("\n".join(questions)).encode())
    assert result.returncode == 0
    assert result.stdout.decode() == conversation(artifact, *questions, max_tokens=8)[1]
    assert b"tokens/s" not in result.stderr


def test_commands_work_in_a_pipe(file: Path, tmp_path: Path) -> None:
    path = tmp_path / "chat.json"
    lines = f"one\ntwo\n/undo\n/set max_tokens 4\nthree\n/save {path}\n"
    assert edgetune("chat", file, "--max-tokens", "4", stdin=lines.encode()).returncode == 0
    messages, _ = conversation(file, "one", "three", max_tokens=4)
    assert json.loads(path.read_text(encoding="utf-8")) == {"messages": messages}
    result = edgetune("chat", file, "--load", path, "--system", "Be brief.", stdin=b"/show\n")
    assert b"system: Be brief.\n\nuser: one" in result.stderr
    assert result.stdout == b""


def test_an_error_in_a_pipe_is_said_and_the_next_line_is_answered(file: Path) -> None:
    lines = f"/nonsense\n{'dim the lights ' * 100}\none\n"
    result = edgetune("chat", file, "--max-tokens", "8", stdin=lines.encode())
    assert result.returncode == 1
    assert result.stdout.decode() == conversation(file, "one", max_tokens=8)[1]
    said = result.stderr.decode()
    assert "there is no command /nonsense" in said
    assert "but the context is 256" in said
    assert "/undo" in said


def test_options_reach_the_sampler(file: Path) -> None:
    def sample(*options: str) -> bytes:
        return edgetune("chat", file, "--max-tokens", "8", *options, stdin=b"dim the lights").stdout

    greedy = sample()
    assert sample("--temperature", "5", "--seed", "1", "--top-k", "0", "--min-p", "0", "--top-p", "1") != greedy
    assert sample("--temperature", "5", "--seed", "1", "--top-k", "1") == greedy


def test_a_reader_that_closes_the_pipe_is_not_an_error(endless: Path) -> None:
    command = [*COMMAND, "chat", str(endless), "--context", "100000"]
    process = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.PIPE)
    assert process.stdin is not None
    assert process.stdout is not None
    assert process.stderr is not None
    process.stdin.write(b"go on\nand on\n")
    process.stdin.close()
    process.stdout.read(1)
    process.stdout.close()
    said = process.stderr.read()
    process.stderr.close()
    assert process.wait(timeout=60) == 0
    assert b"Traceback" not in said
    assert b"Exception" not in said


def test_ctrl_c_stops_an_answer_and_keeps_the_chat(endless: Path, tmp_path: Path) -> None:
    path = tmp_path / "chat.json"
    command = [*COMMAND, "chat", str(endless), "--context", "100000"]
    with Terminal(command, {"XDG_STATE_HOME": str(tmp_path)}) as terminal:
        terminal.wait_for(PROMPT)
        terminal.press(f"go on{ENTER}")
        terminal.wait_for("go on")
        terminal.wait_for("\n")
        terminal.wait_for("e")  # some text of the answer
        terminal.press(CTRL_C)
        terminal.wait_for("stopped; the answer is kept as far as it was written")
        terminal.wait_for("tokens of the context")
        terminal.wait_for(PROMPT)
        terminal.press(f"/save {path}{ENTER}")
        terminal.wait_for("saved 2 messages")
        terminal.wait_for(PROMPT)
        terminal.press(CTRL_C)
        terminal.wait_for("Ctrl-D leaves")
        terminal.wait_for(PROMPT)
        terminal.press(CTRL_D)
        code, said = terminal.finish()
    assert code == 0
    assert "Traceback" not in said
    assert json.loads(path.read_text(encoding="utf-8"))["messages"][0]["content"] == "go on"


def test_a_terminal_shows_answer_and_speed(artifact: Path, tmp_path: Path) -> None:
    _, expected = conversation(artifact, "dim the lights", max_tokens=8)
    command = [*COMMAND, "chat", str(artifact), "--max-tokens", "8"]
    with Terminal(command, {"XDG_STATE_HOME": str(tmp_path)}) as terminal:
        assert f"{artifact.name}: a context of 256 tokens" in terminal.wait_for("Ctrl-D leaves")
        terminal.wait_for(PROMPT)
        terminal.press(f"dim the lights{ENTER}")
        shown = terminal.wait_for("tokens of the context")
        terminal.wait_for(PROMPT)
        terminal.press(f"/exit{ENTER}")
        assert terminal.finish()[0] == 0
    assert expected.strip().splitlines()[-1] in shown
    assert "tokens/s" in shown
    assert (tmp_path / "edgetune/chat_history").read_text(encoding="utf-8").count("+dim the lights") == 1


def test_commands_lines_and_completion_work_in_a_terminal(file: Path, tmp_path: Path) -> None:
    path = tmp_path / "chat.json"
    messages, _ = conversation(file, "dim\nthe lights", max_tokens=6)
    command = [*COMMAND, "chat", str(file), "--max-tokens", "6", "--no-history"]
    with Terminal(command, {"XDG_STATE_HOME": str(tmp_path)}) as terminal:

        def type_(keys: str, *shown: str) -> None:
            terminal.wait_for(PROMPT)
            terminal.press(keys)
            for text in shown:
                terminal.wait_for(text)

        type_(f"dim\\{ENTER}the lights{ENTER}", "tokens of the context")
        type_(f"/regen{ENTER}", "tokens of the context")
        type_("/sa\t", "ve")
        terminal.press(f" {path}{ENTER}")
        terminal.wait_for("saved 2 messages")
        type_(f"/system Be brief.{ENTER}", "the system message is set")
        type_(f"/adapter{ENTER}", "no adapter is loaded")
        type_(f"/adapter {file}{ENTER}", "is not a GGUF adapter")
        type_(f"/reset{ENTER}", "the conversation is forgotten; the system message stays")
        type_(f"/load {path}{ENTER}", "loaded 2 messages")
        type_(f"/show{ENTER}", "assistant:")
        terminal.wait_for(PROMPT)
        terminal.press(CTRL_D)
        assert terminal.finish()[0] == 0
    assert json.loads(path.read_text(encoding="utf-8")) == {"messages": messages}
    assert not (tmp_path / "edgetune").exists(), "--no-history writes no file"


def test_reasoning_is_dimmed_in_a_terminal(base: Path, tmp_path: Path) -> None:
    copy = tmp_path / "base"
    shutil.copytree(base, copy)
    template = models.TEMPLATE.replace("assistant\n{% endif %}", "assistant\n<think>\n{% endif %}")
    (copy / "chat_template.jinja").write_text(template, encoding="utf-8")
    command = [*COMMAND, "chat", str(models.gguf(copy, tmp_path / "model.gguf")), "--max-tokens", "6"]
    with Terminal(command, {"XDG_STATE_HOME": str(tmp_path)}) as terminal:
        terminal.wait_for(PROMPT)
        terminal.press(f"dim the lights{ENTER}")
        shown = terminal.wait_for("tokens of the context")
        terminal.wait_for(PROMPT)
        terminal.press(CTRL_D)
        assert terminal.finish()[0] == 0
    assert "\x1b[2m" in shown.partition("dim the lights")[2].partition("prompt ")[0]


def test_a_full_context_is_said_with_what_to_do(endless: Path) -> None:
    result = edgetune("chat", endless, "--context", "64", stdin=b"go on\nand on\n/reset\ngo on\n")
    said = result.stderr.decode()
    assert "the context of 64 tokens is full. Remove messages with /undo or /reset" in said
    assert "but the context is 64" in said  # the second message no longer fits
    first, second = result.stdout.decode().rstrip("\n"), result.stdout.decode()
    assert first
    assert second.count(first[: len(first) // 3]) >= 1
    assert result.returncode == 1


def test_thinking_is_hidden_in_a_pipe_unless_it_is_asked_for(file: Path) -> None:
    shown = edgetune("chat", file, "--thinking", "show", stdin=b"/set thinking\n")
    assert b"thinking is show" in shown.stderr
    assert b"thinking is hide" in edgetune("chat", file, stdin=b"/set thinking\n").stderr


@pytest.mark.parametrize(
    ("options", "code", "said"),
    [
        (["--temperature", "-1"], 2, "--temperature"),
        (["--template-option", "x=1"], 2, "does not read the option x"),
        (["--load", "nowhere.json"], 1, "there is no file nowhere.json"),
    ],
)
def test_invalid_options_are_errors(file: Path, options: list[str], code: int, said: str) -> None:
    result = edgetune("chat", file, *options)
    assert result.returncode == code
    assert said in sentence(result)


def test_a_damaged_file_is_an_error_in_one_sentence(bad: Path) -> None:
    result = edgetune("chat", bad)
    assert result.returncode == 1
    assert "bad.gguf" in sentence(result)


def test_a_pipe_loads_no_line_editor(file: Path) -> None:
    result = edgetune_process("chat", file, stdin=b"", PYTHONVERBOSE="1")
    assert b"import 'prompt_toolkit" not in result.stderr
