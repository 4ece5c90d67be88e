"""`edgetune run --input`: rows in, rows with answers out, and what happens at a stop."""

from __future__ import annotations

import json
import signal
import subprocess
import time
from pathlib import Path
from typing import Any

import pytest

from edgetune.runtime import load
from tests.cli_runner import COMMAND, edgetune, sentence
from tests.runtime import models

MAX = ("--max-tokens", "8")


@pytest.fixture(scope="module", params=["gguf", "onnx"])
def artifact(request: pytest.FixtureRequest, base: Path, file: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return file if request.param == "gguf" else models.onnx(base, tmp_path_factory.mktemp("onnx") / "tiny-f32")


def answers(file: Path, *conversations: list[dict[str, str]], max_tokens: int = 8) -> list[str]:
    with load(file) as runtime:
        return [runtime.chat(messages, max_tokens=max_tokens).text() for messages in conversations]


def user(text: str) -> dict[str, str]:
    return {"role": "user", "content": text}


def write(path: Path, *rows: Any) -> Path:
    path.write_text("".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows), encoding="utf-8")
    return path


def read(path: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]


ROWS: list[Any] = [
    {"prompt": "one", "id": 7},
    "把灯调暗",
    {"messages": [user("two"), {"role": "assistant", "content": "so far"}, user("three")]},
    {"question": "four", "answer": "the known one"},
    [user("five")],
    {"conversations": [{"from": "human", "value": "six"}, {"from": "gpt", "value": "known"}]},
    {"prompt": "seven", "chosen": "good", "rejected": "bad"},
    {"prompt": "eight", "completion": "x", "label": True},
    {"text": "nine"},
]
CONVERSATIONS = [
    [user("one")],
    [user("把灯调暗")],
    [user("two"), {"role": "assistant", "content": "so far"}, user("three")],
    *([user(text)] for text in ("four", "five", "six", "seven", "eight", "nine")),
]


def test_each_row_is_answered_and_keeps_its_keys(artifact: Path, tmp_path: Path) -> None:
    rows, output = write(tmp_path / "rows.jsonl", *ROWS), tmp_path / "answers.jsonl"
    result = edgetune("run", artifact, "--input", rows, "--output", output, *MAX)
    assert result.returncode == 0, result.stderr
    assert result.stdout == b""
    found = read(output)
    assert [row["generated"] for row in found] == answers(artifact, *CONVERSATIONS)
    given = [
        {"prompt": row} if isinstance(row, str) else {"messages": row} if isinstance(row, list) else row for row in ROWS
    ]
    kept = [{key: value for key, value in row.items() if not key.startswith("generated")} for row in found]
    assert kept == given
    assert {row["generated_finish"] for row in found} <= {"stop", "length"}
    assert sorted(path.name for path in tmp_path.iterdir()) == ["answers.jsonl", "rows.jsonl"]


def test_rows_come_from_other_files_and_go_to_standard_output(file: Path, tmp_path: Path) -> None:
    (tmp_path / "rows.txt").write_text("one\n\ntwo\n")
    (tmp_path / "rows.csv").write_text("id,question\n1,one\n2,two\n")
    expected = answers(file, [user("one")], [user("two")])
    for name in ("rows.txt", "rows.csv"):
        result = edgetune("run", file, "--input", tmp_path / name, *MAX)
        assert [json.loads(line)["generated"] for line in result.stdout.splitlines()] == expected
    result = edgetune("run", file, "--input", "-", *MAX, stdin=b'"one"\n"two"\n')
    assert [json.loads(line)["generated"] for line in result.stdout.splitlines()] == expected


def test_plain_text_is_continued_with_raw(file: Path, tmp_path: Path) -> None:
    rows = write(tmp_path / "rows.jsonl", {"text": "dim the"}, {"prompt": "dim the"}, "dim the")
    result = edgetune("run", file, "--raw", "--input", rows, *MAX)
    with load(file) as runtime:
        expected = runtime.complete("dim the", max_tokens=8).text()
    assert [json.loads(line)["generated"] for line in result.stdout.splitlines()] == [expected] * 3


def test_a_system_message_goes_to_rows_without_one(file: Path, tmp_path: Path) -> None:
    own = {"role": "system", "content": "own"}
    rows = write(tmp_path / "rows.jsonl", "one", {"messages": [own, user("two")]})
    result = edgetune("run", file, "--system", "Be brief.", "--input", rows, *MAX)
    expected = answers(file, [{"role": "system", "content": "Be brief."}, user("one")], [own, user("two")])
    assert [json.loads(line)["generated"] for line in result.stdout.splitlines()] == expected
    assert b"1 row has a system message of its own" in result.stderr


BAD = (
    '{"prompt": "one"}\nnonsense\n{"messages": [{"role": "system", "content": "s"}]}\n3\n'
    f'{{"prompt": "{"dim the lights " * 100}"}}\n{{"prompt": "x", "generated": 1}}\n{{"prompt": "two"}}\n'
)
NAMED = {
    2: "not JSON", 3: "", 4: "is int, not an object or a text", 5: "but the context is 256", 6: "'generated'",
}  # fmt: skip


def test_bad_rows_are_all_named_before_the_first_is_answered(file: Path, tmp_path: Path) -> None:
    rows, output = tmp_path / "rows.jsonl", tmp_path / "answers.jsonl"
    rows.write_text(BAD)
    result = edgetune("run", file, "--input", rows, "--output", output, *MAX)
    assert result.returncode == 1
    said = sentence(result)
    assert "5 rows cannot be answered" in said
    assert "--skip-bad-rows" in said
    for number, problem in NAMED.items():
        line = next(line for line in said.splitlines() if f"{rows}, line {number}:" in line)
        assert problem in line
    assert list(tmp_path.iterdir()) == [rows]


def test_bad_rows_can_be_left_out(file: Path, tmp_path: Path) -> None:
    rows, output = tmp_path / "rows.jsonl", tmp_path / "answers.jsonl"
    rows.write_text(BAD)
    result = edgetune("run", file, "--input", rows, "--output", output, "--skip-bad-rows", *MAX)
    assert result.returncode == 0
    assert [row["generated"] for row in read(output)] == answers(file, [user("one")], [user("two")])
    said = result.stderr.decode()
    assert "5 of 7 rows are left out" in said
    assert all(f"line {number}:" in said for number in NAMED)


def test_a_finished_output_is_not_replaced_unless_asked_for(file: Path, tmp_path: Path) -> None:
    rows, output = write(tmp_path / "rows.jsonl", "one"), tmp_path / "answers.jsonl"
    output.write_text("mine\n")
    result = edgetune("run", file, "--input", rows, "--output", output, *MAX)
    assert result.returncode == 2
    assert f"{output} exists" in sentence(result)
    assert output.read_text() == "mine\n"
    assert edgetune("run", file, "--input", rows, "--output", output, "--overwrite", *MAX).returncode == 0
    assert len(read(output)) == 1


@pytest.fixture(scope="module")
def endless(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("endless")
    return models.gguf(models.endless(folder / "hf"), folder / "endless.gguf")


@pytest.mark.parametrize("signal_", [signal.SIGINT, signal.SIGKILL])
def test_a_stopped_command_is_continued(endless: Path, tmp_path: Path, signal_: signal.Signals) -> None:
    rows = write(tmp_path / "rows.jsonl", *(f"row {number}" for number in range(200)))
    output, partial = tmp_path / "answers.jsonl", tmp_path / "answers.jsonl.partial"
    options = ["--input", str(rows), "--output", str(output), "--max-tokens", "100"]
    process = subprocess.Popen([*COMMAND, "run", str(endless), *options], stderr=subprocess.PIPE)
    assert process.stderr is not None
    for _ in range(3000):
        if partial.exists() and partial.stat().st_size:
            break
        time.sleep(0.01)
    process.send_signal(signal_)
    said = process.stderr.read()
    process.stderr.close()
    process.wait(60)
    if signal_ == signal.SIGINT:
        assert process.returncode == 130
        assert b"the same command continues" in said
    assert not output.exists()
    with partial.open("ab") as stream:
        stream.write(b'{"half a line')
    begun = len(partial.read_bytes().splitlines()) - 1
    assert 0 < begun < 200
    result = edgetune("run", endless, *options[:-1], "99")
    assert result.returncode == 2
    assert "max_tokens 100, now 99" in sentence(result)
    result = edgetune("run", endless, *options)
    assert result.returncode == 0
    assert f"{begun} of 200 rows are answered already".encode() in result.stderr
    found = read(output)
    assert [row["prompt"] for row in found] == [f"row {number}" for number in range(200)]
    picked = [0, begun - 1, begun, 199]
    expected = answers(endless, *([user(f"row {number}")] for number in picked), max_tokens=100)
    assert [found[number]["generated"] for number in picked] == expected
    assert sorted(path.name for path in tmp_path.iterdir()) == ["answers.jsonl", "rows.jsonl"]


@pytest.mark.parametrize(
    ("options", "said"),
    [
        ([], "There is no prompt"),
        (["-p", "x", "--input", "rows.jsonl"], "--prompt and --input cannot be used together"),
        (["-p", "x", "--output", "out.jsonl"], "--output is for the rows of --input"),
        (["-p", "x", "--skip-bad-rows"], "--skip-bad-rows is for the rows of --input"),
        (["--input", "rows.jsonl", "--raw", "--system", "s"], "--system cannot be used with --raw"),
    ],
)
def test_options_that_do_not_fit_are_errors(file: Path, options: list[str], said: str) -> None:
    result = edgetune("run", file, *options)
    assert result.returncode == 2
    assert said in sentence(result)


@pytest.mark.parametrize(("content", "said"), [(None, "there is no file"), ("", "holds no rows")])
def test_an_input_without_rows_is_an_error(file: Path, tmp_path: Path, content: str | None, said: str) -> None:
    rows = tmp_path / "rows.jsonl"
    if content is not None:
        rows.write_text(content)
    result = edgetune("run", file, "--input", rows)
    assert result.returncode == 1
    assert said in sentence(result)
