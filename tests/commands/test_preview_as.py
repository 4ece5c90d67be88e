"""`edgetune preview --as messages`: rows on standard output or in a file; the rest on standard error."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from tests.cli_runner import edgetune

ROWS = [
    {"frage": "Lamp?", "antwort": "On.", "id": 1},
    {"conversations": [{"from": "human", "value": "Lamp?"}, {"from": "gpt", "value": "Aus."}]},
]
WRITTEN = [
    {"messages": [{"role": "user", "content": "Lamp?"}, {"role": "assistant", "content": "On."}]},
    {"messages": [{"role": "user", "content": "Lamp?"}, {"role": "assistant", "content": "Aus."}]},
]


@pytest.fixture
def config(tmp_path: Path) -> Path:
    (tmp_path / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in ROWS))
    path = tmp_path / "config.yaml"
    path.write_text(
        "base: nowhere/nothing\ndata: {train: rows.jsonl, validation: rows.jsonl#1, "
        "columns: {user: frage, assistant: antwort}}\n"
    )
    return path


def test_rows_are_written_to_standard_output_without_a_base(config: Path) -> None:
    done = edgetune("preview", config, "--as", "messages")
    assert done.returncode == 0
    assert [json.loads(line) for line in done.stdout.splitlines()] == WRITTEN
    assert done.stderr.decode().splitlines() == [
        "prompt-completion, sharegpt: 2 rows of data.train as messages",
        "keys that are not used:",
        "  id: 1 row, for example rows.jsonl, line 1",
    ]


def test_rows_are_written_to_a_file_whole_or_not_at_all(config: Path, tmp_path: Path) -> None:
    output = tmp_path / "out" / "rows.jsonl"
    assert edgetune("preview", config, "--as", "messages", "--of", "validation", "-o", output).returncode == 0
    assert [json.loads(line) for line in output.read_text().splitlines()] == WRITTEN[:1]
    with (tmp_path / "rows.jsonl").open("a") as file:
        file.write('{"x": 1}\n')
    output.unlink()
    done = edgetune("preview", config, "--as", "messages", "-o", output)
    assert (done.returncode, output.exists()) == (1, False)
    assert b"rows.jsonl, line 3: in no known format" in done.stderr
    done = edgetune("preview", config, "--as", "messages", "-o", output, "--set", "data.on_bad_row=skip", "--rows", "1")
    assert done.returncode == 0
    assert len(output.read_text().splitlines()) == 1
    assert b"1 row is left out (data.on_bad_row: skip):" in done.stderr


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--as", "messages", "--of", "test"], b"data.test is not set"),
        (["-o", "x.jsonl"], b"--output needs --as messages"),
    ],
)
def test_what_cannot_be_written_is_answered(config: Path, options: list[str], message: bytes) -> None:
    done = edgetune("preview", config, *options)
    assert done.returncode != 0
    assert message in done.stderr


def test_pairs_of_ranked_answers_are_written_with_their_number(tmp_path: Path) -> None:
    (tmp_path / "rows.jsonl").write_text(json.dumps({"prompt": "Lamp?", "responses": ["On.", "Aus.", "Off."]}) + "\n")
    config = tmp_path / "config.yaml"
    config.write_text("base: nowhere/nothing\ndata: {train: rows.jsonl}\nobjective: {kind: dpo}\n")
    done = edgetune("preview", config, "--as", "messages")
    rows = [json.loads(line) for line in done.stdout.splitlines()]
    assert [(row["chosen"][0]["content"], row["rejected"][0]["content"]) for row in rows] == [
        ("On.", "Aus."), ("On.", "Off."), ("Aus.", "Off."),
    ]  # fmt: skip
    assert done.stderr.decode().splitlines() == [
        "ranked: 3 rows of data.train as messages",
        "ranked answers of 1 row became 3 pairs: one for each two answers of different ranks",
    ]


@pytest.mark.parametrize(
    ("objective", "row", "shown"),
    [
        ("dpo", {"prompt": "Lamp?", "chosen": "On.", "rejected": "Off."}, ("pair 1, rejected: ", "⟦Off.<|im_end|>⟧")),
        (
            "kto",
            {"prompt": "Lamp?", "completion": "On.", "label": False},
            ("answer 1, undesirable: ", "⟦On.<|im_end|>⟧"),
        ),
        ("grpo", {"question": "Lamp?", "answer": "On."}, ("prompt 1 (answer='On.'): ", "with answer for the reward")),
        ("pretrain", {"text": "A lamp gives light."}, ("block 1: ", "packed into blocks")),
        (
            "sft",
            {"prompt": "Lamp?", "chosen": "On.", "rejected": "Off."},
            ("rows.jsonl, line 1: has chosen and rejected",),
        ),
        ("dpo", {"prompt": "Lamp?", "completion": "On."}, ("these are rows for the objectives sft, distillation",)),
    ],
    ids=str,
)
def test_preview_shows_the_rows_of_an_objective_or_refuses_them_by_name(
    tmp_path: Path, objective: str, row: dict[str, object], shown: tuple[str, ...]
) -> None:
    pytest.importorskip("torch")
    from tests.training import runs

    base = runs.make_base(tmp_path / "base")
    (tmp_path / "rows.jsonl").write_text((json.dumps(row) + "\n") * 2)
    config = tmp_path / "config.yaml"
    config.write_text(f"base: {base}\ndata: {{train: rows.jsonl}}\nobjective: {{kind: {objective}}}\n")
    done = edgetune("preview", config, "--rows", "1")
    said = (done.stdout + done.stderr).decode()
    assert all(part in said for part in shown), said
    assert done.returncode == (1 if "these are rows" in said else 0)
