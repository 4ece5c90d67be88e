"""`edgetune run`: the answer on standard output and nothing else, whatever happens."""

from __future__ import annotations

import os
import pty
import signal
import subprocess
import time
from pathlib import Path

import pytest

from edgetune.runtime import Sampling, load
from tests.cli_runner import COMMAND, edgetune, edgetune_process, sentence
from tests.runtime import models

PROMPT = "dim the lights"


def expected(file: Path, text: str, max_tokens: int) -> bytes:
    with load(file) as runtime:
        ids = list(runtime.generate(runtime.tokenize(text), Sampling(), max_tokens))
        return (runtime.detokenize(ids) + "\n").encode()


def chat(text: str, system: str = "") -> str:
    before = f"<|im_start|>system\n{system}<|im_end|>\n" if system else ""
    return f"{before}<|im_start|>user\n{text}<|im_end|>\n<|im_start|>assistant\n"


def test_the_template_is_applied_and_only_the_answer_is_printed(file: Path) -> None:
    result = edgetune("run", file, "-p", PROMPT, "--max-tokens", "12")
    assert result.returncode == 0
    assert result.stdout == expected(file, chat(PROMPT), 12)
    assert result.stderr == b""


@pytest.mark.parametrize(
    ("command", "said"),
    [("run", "Give a prompt with -p, such as -p 'dim the lights'"), ("chat", "edgetune run FILE -p")],
)
def test_a_prompt_without_its_option_is_explained(file: Path, command: str, said: str) -> None:
    for words in ([PROMPT], PROMPT.split()):
        result = edgetune(command, file, *words)
        assert result.returncode == 2
        assert said in " ".join(sentence(result).split())


def test_raw_continues_plain_text(file: Path) -> None:
    assert edgetune("run", file, "--raw", "-p", PROMPT, "--max-tokens", "12").stdout == expected(file, PROMPT, 12)


@pytest.mark.parametrize("options", [["--raw"], []])
def test_an_answer_that_stops_at_once_prints_nothing(file: Path, tmp_path: Path, options: list[str]) -> None:
    """The first token of the answer is made the stop token."""
    with load(file) as runtime:
        prompt = runtime.tokenize(PROMPT if options else chat(PROMPT))
        first = next(runtime.generate(prompt, Sampling(), 1))
    before, key, after = file.read_bytes().partition(b"tokenizer.ggml.eos_token_id" + (4).to_bytes(4, "little"))
    stopping = tmp_path / "stopping.gguf"
    stopping.write_bytes(before + key + first.to_bytes(4, "little") + after[4:])
    result = edgetune("run", stopping, *options, "-p", PROMPT)
    assert (result.returncode, result.stdout) == (0, b"")


def test_a_system_message_comes_first(file: Path) -> None:
    found = edgetune("run", file, "-p", PROMPT, "--system", "Be brief.", "--max-tokens", "12").stdout
    assert found == expected(file, chat(PROMPT, "Be brief."), 12)


def test_the_prompt_can_come_from_a_pipe_in_any_locale(file: Path) -> None:
    text = "把卧室的灯调暗\nplease"
    result = edgetune_process(
        "run", file, "-p", "-", "--max-tokens", "12", stdin=f"{text}\n".encode(), LC_ALL="C", PYTHONUTF8="0"
    )
    assert result.stdout == expected(file, chat(text), 12)


def test_a_pipe_without_an_option_is_the_prompt(file: Path) -> None:
    result = edgetune("run", file, "--max-tokens", "12", stdin="把卧室的灯调暗\n".encode())
    assert result.stdout == expected(file, chat("把卧室的灯调暗"), 12)


def test_sampling_options_reach_the_sampler(file: Path) -> None:
    def sample(*options: str) -> bytes:
        return edgetune("run", file, "--raw", "-p", PROMPT, "--max-tokens", "12", "--temperature", "2", *options).stdout

    greedy = expected(file, PROMPT, 12)
    assert sample("--seed", "1", "--top-k", "0", "--min-p", "0", "--top-p", "1") != greedy
    assert sample("--seed", "1") == sample("--seed", "1")
    for only in (["--top-k", "1"], ["--top-p", "1e-9"], ["--min-p", "1"]):
        assert sample(*only) == greedy


def test_verbose_prints_the_speed_on_standard_error(file: Path) -> None:
    result = edgetune("run", file, "-p", PROMPT, "--max-tokens", "12", "--verbose", "--threads", "2")
    assert b"12 tokens" in result.stderr
    assert b"(2 threads)" in result.stderr
    assert result.stdout == expected(file, chat(PROMPT), 12)


def test_the_speed_is_printed_on_a_terminal(file: Path) -> None:
    ours, theirs = pty.openpty()
    result = subprocess.run(
        [*COMMAND, "run", str(file), "-p", PROMPT, "--max-tokens", "4"],
        stdout=subprocess.PIPE,
        stderr=theirs,
        timeout=60,
    )
    os.close(theirs)
    assert b"tokens/s" in os.read(ours, 4096)
    os.close(ours)
    assert result.stdout == expected(file, chat(PROMPT), 4)


def test_a_full_context_is_a_warning(file: Path) -> None:
    result = edgetune("run", file, "--raw", "-p", PROMPT, "--context", "20")
    assert result.returncode == 0
    assert b"the context of 20 tokens is full" in result.stderr
    assert result.stdout.endswith(b"\n")


def test_a_prompt_that_does_not_fit_is_an_error(file: Path) -> None:
    result = edgetune("run", file, "-p", PROMPT * 20, "--context", "30")
    assert result.returncode == 1
    assert "the context is 30" in sentence(result)


def test_more_context_than_the_model_was_trained_for_is_a_warning(file: Path) -> None:
    result = edgetune("run", file, "-p", PROMPT, "--context", "512", "--max-tokens", "2")
    assert result.returncode == 0
    assert b"the model was trained for 256" in result.stderr


@pytest.fixture(scope="module")
def endless(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("endless")
    return models.gguf(models.endless(folder / "hf"), folder / "endless.gguf")


def interrupt(file: Path, *options: str) -> tuple[int, bytes, bytes]:
    """Start a long answer, wait for its first bytes, press Ctrl-C."""
    command = [*COMMAND, "run", str(file), "-p", PROMPT, "--max-tokens", "1000000", "--context", "100000", *options]
    process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE)
    assert process.stdout is not None
    first = process.stdout.read(1)
    time.sleep(0.2)
    process.send_signal(signal.SIGINT)
    out, said = process.communicate(timeout=60)
    return process.returncode, first + out, said


def test_ctrl_c_ends_the_answer_cleanly(endless: Path) -> None:
    code, out, said = interrupt(endless)
    assert code == 130
    assert out.endswith(b"\n")
    assert b"Traceback" not in said
    assert b"stopped" in said


def test_ctrl_c_while_the_prompt_is_evaluated_ends_at_once(file: Path) -> None:
    """A prompt that takes seconds: the signal arrives while C code computes, and the command ends at once."""
    command = [*COMMAND, "run", str(file), "--raw", "-p", "-", "--max-tokens", "1", "--context", "60000"]
    pipe = subprocess.PIPE
    with subprocess.Popen(command, stdin=pipe, stdout=pipe, stderr=pipe) as process:
        assert process.stdin is not None
        assert process.stdout is not None
        assert process.stderr is not None
        process.stdin.write(b"a b c d e " * 6000)
        process.stdin.close()
        wait_until_mapped(process, file)
        time.sleep(1)
        assert process.poll() is None, "the prompt was meant to take longer"
        process.send_signal(signal.SIGINT)
        sent = time.monotonic()
        process.wait(timeout=60)
        assert time.monotonic() - sent < 5
        assert process.returncode == 130
        assert process.stdout.read() in (b"", b"\n")
        assert b"Traceback" not in process.stderr.read()


def wait_until_mapped(process: subprocess.Popen[bytes], file: Path) -> None:
    """Wait until the process has mapped a file; where that cannot be seen, for two seconds."""
    maps = Path(f"/proc/{process.pid}/maps")
    for _ in range(600):
        if not maps.exists() or process.poll() is not None:
            break
        if file.name in maps.read_text():
            return
        time.sleep(0.1)
    time.sleep(2)


def test_a_reader_that_closes_the_pipe_is_not_an_error(endless: Path) -> None:
    command = [*COMMAND, "run", str(endless), "-p", PROMPT, "--max-tokens", "100000", "--context", "100000"]
    process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE)
    assert process.stdout is not None
    assert process.stderr is not None
    process.stdout.read(1)
    process.stdout.close()
    said = process.stderr.read()
    process.stderr.close()
    assert process.wait(timeout=60) == 0
    assert b"Traceback" not in said
    assert b"Exception" not in said


def test_a_damaged_file_is_an_error_in_one_sentence(bad: Path) -> None:
    result = edgetune("run", bad, "-p", "x")
    assert result.returncode == 1
    assert "bad.gguf" in sentence(result)


def test_a_file_without_a_template_has_a_hint(file: Path, tmp_path: Path) -> None:
    bare = tmp_path / "bare.gguf"
    bare.write_bytes(file.read_bytes().replace(b"tokenizer.chat_template", b"tokenizer.chat_templote"))
    result = edgetune("run", bare, "-p", "x")
    assert result.returncode == 2
    assert "--raw" in sentence(result)


@pytest.mark.parametrize(
    ("options", "what"),
    [
        (["--raw", "--system", "s"], "--system"),
        (["--temperature", "-1"], "--temperature"),
        (["--top-p", "0"], "--top-p"),
        (["--max-tokens", "0"], "--max-tokens"),
        (["--threads", "0"], "--threads"),
    ],
)
def test_invalid_options_are_usage_errors(file: Path, options: list[str], what: str) -> None:
    result = edgetune("run", file, "-p", "x", *options)
    assert result.returncode == 2
    assert what in sentence(result)


def test_a_prompt_that_is_not_utf_8_is_an_error(file: Path) -> None:
    result = edgetune("run", file, "-p", "-", stdin=b"\xff\xfe")
    assert result.returncode == 2
    assert "UTF-8" in sentence(result)
