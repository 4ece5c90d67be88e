"""Rows of every kind of file, encoding and compression are the same rows, and damage is named with its line."""

from __future__ import annotations

import bz2
import gzip
import json
import lzma
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from edgetune.config import load_config
from edgetune.data.dataset import read_splits
from edgetune.data.problems import RowProblems
from edgetune.data.sources import SourceName, read_source
from edgetune.errors import DataError, EnvironmentProblem

ROWS = [{"question": f"Lamp {n}?\nNow?", "answer": f'On, "{n}" ä'} for n in range(5)]
JSONL = "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in ROWS)
CSV = "question,answer\r\n" + "".join(
    '"{}","{}"\r\n'.format(row["question"], row["answer"].replace('"', '""')) for row in ROWS
)


def _read(path: Path, **options: Any) -> list[tuple[str, str]]:
    return [(row.messages[0]["content"], row.messages[1]["content"]) for row in read_source(str(path), **options).rows]


EXPECTED = [(row["question"], row["answer"]) for row in ROWS]


def _zstd(data: bytes) -> bytes:
    arrow: Any = pytest.importorskip("pyarrow")
    return bytes(arrow.compress(data, codec="zstd", asbytes=True))


@pytest.mark.parametrize(
    ("name", "text"),
    [
        ("a.jsonl", JSONL), ("a.ndjson", JSONL), ("a.json", JSONL), ("a.json", json.dumps(ROWS)),
        ("a.json", json.dumps({"version": "1", "data": ROWS})), ("a.json", json.dumps({"type": "", "instances": ROWS})),
        ("a.json", json.dumps({"train": ROWS, "test": ROWS[:1]})),
        ("a.json", json.dumps({key: [row[key] for row in ROWS] for key in ROWS[0]})),
        ("a.csv", CSV), ("a.csv", CSV.replace('","', '";"').replace("question,answer", "question;answer")),
        ("a.tsv", CSV.replace('","', '"\t"').replace("question,answer", "question\tanswer")),
        ("a.jsonl", json.dumps(ROWS, indent=2)), ("a.jsonl", "\n[" + ",\n".join(map(json.dumps, ROWS)) + "]"),
        ("a.jsonl", "\n".join(json.dumps(row, indent=1) for row in ROWS)),
        ("a.json", "\n".join(json.dumps(row, indent=1) for row in ROWS)),
        ("a.jsonl", "".join(json.dumps(json.dumps(row)) + "\n" for row in ROWS)),
        ("rows", JSONL), ("rows", json.dumps(ROWS)), ("a.jsonl", JSONL.replace("\n", "\r\n")),
    ],
)  # fmt: skip
@pytest.mark.parametrize("encoding", ["utf-8", "utf-8-sig", "utf-16", "utf-16-le", "utf-32"])
def test_every_kind_and_encoding_gives_the_same_rows(tmp_path: Path, name: str, text: str, encoding: str) -> None:
    if name == "rows" and encoding not in ("utf-8", "utf-8-sig"):
        pytest.skip("a file without a suffix is looked at as UTF-8")
    (tmp_path / name).write_bytes(text.encode(encoding))
    assert _read(tmp_path / name) == EXPECTED


@pytest.mark.parametrize(
    ("suffix", "compress"), [(".gz", gzip.compress), (".bz2", bz2.compress), (".xz", lzma.compress), (".zst", _zstd)]
)
@pytest.mark.parametrize(("name", "text"), [("a.jsonl", JSONL), ("a.csv", CSV), ("a.json", json.dumps(ROWS))])
def test_compressed_files_are_read_and_half_a_file_is_named(
    tmp_path: Path, suffix: str, compress: Callable[[bytes], bytes], name: str, text: str
) -> None:
    data = compress(text.encode())
    path = tmp_path / f"{name}{suffix}"
    path.write_bytes(data)
    assert _read(path) == EXPECTED
    assert _read(path, limit=2) == EXPECTED[:2]
    path.write_bytes(compress((text * 2000).encode())[:-20])
    with pytest.raises(DataError, match=f"{path.name} is a damaged or incomplete"):
        read_source(str(path), problems=RowProblems(skip=True))


def test_a_compressed_file_under_a_plain_name_is_read(tmp_path: Path) -> None:
    (tmp_path / "a.jsonl").write_bytes(gzip.compress(JSONL.encode()))
    assert _read(tmp_path / "a.jsonl") == EXPECTED


def test_without_a_library_for_zstandard_the_command_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from edgetune.data import compression

    def missing(name: str) -> Any:
        raise ImportError(name)

    monkeypatch.setattr(compression, "import_module", missing)
    (tmp_path / "a.jsonl.zst").write_bytes(b"\x28\xb5\x2f\xfd....")
    with pytest.raises(EnvironmentProblem, match="needs a library for Zstandard"):
        read_source(str(tmp_path / "a.jsonl.zst"))


@pytest.mark.parametrize("kind", ["arrow", "stream", "feather", "parquet"])
def test_tables_are_read(tmp_path: Path, kind: str) -> None:
    arrow: Any = pytest.importorskip("pyarrow")
    table = arrow.Table.from_pylist(ROWS)
    path = tmp_path / f"a.{'arrow' if kind == 'stream' else kind}"
    if kind == "parquet":
        arrow.parquet = pytest.importorskip("pyarrow.parquet")
        arrow.parquet.write_table(table, path)
    elif kind == "feather":
        pytest.importorskip("pyarrow.feather").write_feather(table, str(path))
    else:
        opener = arrow.ipc.new_stream if kind == "stream" else arrow.ipc.new_file
        with opener(str(path), table.schema) as writer:
            writer.write_table(table)
    assert _read(path) == EXPECTED
    assert _read(path, limit=3) == EXPECTED[:3]
    path.write_bytes(path.read_bytes()[:-40])
    if kind != "stream":
        with pytest.raises(DataError, match=rf"{path.name} is not an? (parquet|Arrow) file"):
            read_source(str(path))


def test_the_places_of_records_of_csv_are_their_first_lines(tmp_path: Path) -> None:
    text = 'question,answer,note\nq,a,\n\n"q\nq",a,n\nq,a\n"x"y,b,c\nq,a,n,n\n"open,a\n'
    (tmp_path / "a.csv").write_text(text)
    problems = RowProblems(skip=True)
    rows = read_source(str(tmp_path / "a.csv"), problems=problems).rows
    assert [row.place for row in rows] == ["a.csv, line 2", "a.csv, line 4"]
    assert [row.unread for row in rows] == [(), ("note",)]
    assert problems.rows == [
        "a.csv, line 6: has 2 cells where the header has 3",
        "a.csv, line 7: not CSV: ',' expected after '\"'",
        "a.csv, line 8: has 4 cells where the header has 3",
        "a.csv, line 9: not CSV: unexpected end of data",
    ]


def test_a_declared_delimiter_is_used(tmp_path: Path) -> None:
    (tmp_path / "a.csv").write_text("sep=|\nquestion,x|answer\nq|a\n")
    with pytest.raises(DataError, match=r"a.csv, line 3: in no known format; its keys are question,x, answer"):
        read_source(str(tmp_path / "a.csv"))
    (tmp_path / "a.csv").write_text("sep=;\r\nquestion;answer\r\nq;a\r\n")
    assert _read(tmp_path / "a.csv") == [("q", "a")]


def test_cells_of_csv_can_hold_messages_tools_and_flags(tmp_path: Path) -> None:
    import csv

    talk = [{"role": "user", "content": "q"}, {"role": "assistant", "content": "a"}]
    tools = [{"type": "function", "function": {"name": "f"}}]
    with (tmp_path / "a.csv").open("w", newline="") as file:
        csv.writer(file).writerows(
            [
                ["messages", "tools", "weight", ""],
                [json.dumps(talk), json.dumps(tools), "1", "7"],
                [str(talk), "", "0", ""],
            ]
        )
    first, second = read_source(str(tmp_path / "a.csv")).rows
    assert (first.messages, first.tools, first.untrained, first.unread) == (talk, tools, frozenset(), ("column 4",))
    assert (second.messages, second.tools, set(second.untrained)) == (talk, None, {1})


@pytest.mark.parametrize(
    ("name", "data", "problem"),
    [
        ("a.csv", b"question,question\nq,a\n", "has two columns 'question'"),
        ("a.csv", b"question,answer\nq,\xe4\n", "a.csv, line 2: not UTF-8 text: byte 3 of the line is 0xe4"),
        ("a.json", b'[\n{"question": "\xe4"}]', "a.json, line 2: not UTF-8 text: byte 15"),
        ("a.jsonl", b"\xff\xfe{\x00\x00\xd8", "a.jsonl is not UTF-16 text"),
        ("a.csv", b"Lamp?,On.\nDoor?,Shut.\n", "its keys are Lamp?, On.; looked for"),
        ("a.parquet.gz", b"\x1f\x8b", "is a compressed parquet file"),
        ("a.xlsx", b"PK", "is a spreadsheet"),
        ("a.zip", b"PK", "is an archive"),
        ("a.py", b"", "a loading script, and edgetune runs no code of a dataset"),
        ("a.jsonl", b"[" * 100_000, "it is nested too deeply"),
        ("a.jsonl", b'{"question": ' + b"9" * 5000 + b"}", "Exceeds the limit"),
    ],
)
def test_files_that_cannot_be_read_are_answered_with_the_line(
    tmp_path: Path, name: str, data: bytes, problem: str
) -> None:
    (tmp_path / name).write_bytes(data)
    with pytest.raises(DataError) as caught:
        read_source(str(tmp_path / name))
    assert problem in caught.value.message


def _fill(folder: Path, *names: str) -> None:
    for number, name in enumerate(names):
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_text(json.dumps({"question": name, "answer": str(number)}) + "\n")


def _questions(name: str, **options: Any) -> list[str]:
    return [row.messages[0]["content"] for row in read_source(name, **options).rows]


def test_a_folder_is_all_of_its_data_files_in_order(tmp_path: Path) -> None:
    _fill(tmp_path, "b.jsonl", "a.jsonl", "part/c.ndjson", ".hidden.jsonl")
    (tmp_path / "README.md").write_text("rows")
    (tmp_path / "dataset_info.json").write_text("{}")
    source = read_source(str(tmp_path))
    assert [row.place for row in source.rows] == ["a.jsonl, line 1", "b.jsonl, line 1", "part/c.ndjson, line 1"]
    assert [each["name"] for each in source.identity["files"]] == ["a.jsonl", "b.jsonl", "part/c.ndjson"]
    assert len(source.identity["sha256"]) == 64
    assert _questions(f"{tmp_path}#2") == ["a.jsonl", "b.jsonl"]
    assert read_source(f"{tmp_path}#2").identity["sha256"] == source.identity["sha256"]


def test_files_whose_names_are_splits_are_taken_by_split(tmp_path: Path) -> None:
    _fill(
        tmp_path, "data/train-00000-of-00002.jsonl", "data/train-00001-of-00002.jsonl", "data/test.jsonl", "dev/x.jsonl"
    )
    _fill(tmp_path, "more.jsonl")
    source = read_source(str(tmp_path))
    assert len(source.rows) == 2
    assert source.notes == [f"{tmp_path}: not read, for their names are of no split: more.jsonl"]
    assert _questions(f"{tmp_path}@test") == ["data/test.jsonl"]
    assert _questions(str(tmp_path), split="validation") == ["dev/x.jsonl"]
    with pytest.raises(DataError, match=r"no files of the split holdout; its files are of test, train, validation"):
        read_source(f"{tmp_path}@holdout")


def test_a_pattern_is_the_files_that_match(tmp_path: Path) -> None:
    _fill(tmp_path, "a-1.jsonl", "a-2.jsonl", "b.jsonl", "in/a-3.jsonl")
    assert _questions(f"{tmp_path}/a-*.jsonl") == ["a-1.jsonl", "a-2.jsonl"]
    assert len(_questions(f"{tmp_path}/**/*.jsonl#3")) == 3
    with pytest.raises(DataError, match="no file matches the pattern"):
        read_source(f"{tmp_path}/c-*.jsonl")


def test_names_of_files_may_hold_the_marks_of_parts(tmp_path: Path) -> None:
    _fill(tmp_path, "a@b.jsonl", "c#1.jsonl", "d:e.jsonl", "f[1].jsonl")
    for name in ("a@b.jsonl", "c#1.jsonl", "d:e.jsonl", "f[1].jsonl"):
        assert _questions(f"{tmp_path / name}#1") == [name]


@pytest.mark.parametrize(
    ("name", "parts"),
    [
        ("org/name", ("org/name", None, None, None)),
        ("org/name:sub@test#5", ("org/name", "sub", "test", 5)),
        ("org/name@train[:10%]", ("org/name", None, "train[:10%]", None)),
        ("ms::org/name:sub", ("ms::org/name", "sub", None, None)),
        ("hf://datasets/org/name@test", ("hf://datasets/org/name", None, "test", None)),
    ],
)  # fmt: skip
def test_a_name_has_parts(name: str, parts: tuple[Any, ...]) -> None:
    parsed = SourceName.parse(name)
    assert (parsed.location, parsed.subset, parsed.split, parsed.count) == parts


def test_paths_of_all_forms_are_relative_to_the_configuration(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    _fill(tmp_path / "c", "rows/train.jsonl", "rows/test.jsonl")
    (tmp_path / "c/config.yaml").write_text(
        "base: org/model\ndata: {train: ['rows#7', 'rows/*.jsonl'], validation: 'rows@test', test: 'ms::org/name'}"
    )
    data = load_config(tmp_path / "c/config.yaml").data
    folder = tmp_path / "c"
    assert data.train == [f"{folder / 'rows'}#7", f"{folder / 'rows/*.jsonl'}"]
    assert (data.validation, data.test) == (f"{folder / 'rows'}@test", "ms::org/name")


def test_columns_that_no_row_has_are_named_with_the_keys_that_there_are(tmp_path: Path) -> None:
    _fill(tmp_path, "rows.jsonl")
    (tmp_path / "config.yaml").write_text(
        "base: org/model\ndata: {train: rows.jsonl, columns: {user: frage, assistant: answer}}"
    )
    with pytest.raises(DataError, match=r"data.columns names 'frage' \(user\), which no row has") as caught:
        read_splits(load_config(tmp_path / "config.yaml").data, 0)
    assert caught.value.hint == "The keys of the rows are question, answer"


def test_modelscope_without_its_library_is_answered_with_the_command() -> None:
    with pytest.raises(EnvironmentProblem, match=r"the dataset org/name of ModelScope needs modelscope") as caught:
        read_source("ms::org/name:sub@train#5")
    assert caught.value.hint == "Run `pip install modelscope`"


def test_problems_of_files_and_rows_are_one_message(tmp_path: Path) -> None:
    (tmp_path / "a").mkdir()
    (tmp_path / "a/rows.jsonl").write_text('{"x": 1}\n' + JSONL)
    (tmp_path / "rows.jsonl").write_text('{"y": 1}\n' + JSONL)
    (tmp_path / "bad.csv").write_text("question,question\nq,a\n")
    (tmp_path / "config.yaml").write_text(
        "base: org/model\ndata: {train: [a/rows.jsonl, rows.jsonl, bad.csv], validation: gone.jsonl, on_bad_row: skip}"
    )
    with pytest.raises(DataError) as caught:
        read_splits(load_config(tmp_path / "config.yaml").data, 0)
    lines = caught.value.message.splitlines()
    assert lines[0] == "4 problems in the data:"
    assert lines[1].endswith("bad.csv has two columns 'question'")
    assert lines[2].endswith("there is no data file gone.jsonl")
    assert lines[3].startswith(f"  - {tmp_path / 'a/rows.jsonl'}, line 1: in no known format; its keys are x")
    assert lines[4].startswith(f"  - {tmp_path / 'rows.jsonl'}, line 1: in no known format; its keys are y")


def test_the_files_of_a_source_are_prerequisites_of_make(tmp_path: Path) -> None:
    from edgetune.exporting.make_rules import prerequisites

    _fill(tmp_path, "rows/train.jsonl", "rows/test.jsonl", "a.jsonl", "b-1.jsonl", "b-2.jsonl")
    path = tmp_path / "config.yaml"
    path.write_text(
        "base: org/model\n"
        "data: {train: ['a.jsonl#1', 'b-*.jsonl', org/name, gone.jsonl], validation: rows, test: rows@test}"
    )
    named = [file.name for file in prerequisites(path, load_config(path))]
    assert named == ["config.yaml", "a.jsonl", "b-1.jsonl", "b-2.jsonl", "train.jsonl", "test.jsonl"]
