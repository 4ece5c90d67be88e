"""Files and hub datasets, whole and damaged."""

from __future__ import annotations

import hashlib
import json
import sys
import types
from pathlib import Path
from typing import Any

import pytest

from edgetune.config import load_config
from edgetune.data import sources
from edgetune.data.hubs import HubDataset
from edgetune.data.sources import SourceName, read_source
from edgetune.errors import DataError

ROW = {"prompt": "q", "completion": "a"}


def _file(path: Path, text: str) -> str:
    path.write_text(text, encoding="utf-8")
    return str(path)


def test_jsonl_with_blank_lines_and_byte_order_mark(tmp_path: Path) -> None:
    name = _file(tmp_path / "a.jsonl", "\ufeff" + json.dumps(ROW) + "\n\n" + json.dumps(ROW) + "\n")
    source = read_source(name)
    assert len(source.rows) == 2
    assert source.formats == ["prompt-completion"]
    digest = hashlib.sha256(Path(name).read_bytes()).hexdigest()
    assert source.identity == {"path": name, "sha256": digest, "rows": 2}


def test_json_array_object_and_lines(tmp_path: Path) -> None:
    assert len(read_source(_file(tmp_path / "a.json", json.dumps([ROW] * 3))).rows) == 3
    assert len(read_source(_file(tmp_path / "b.json", json.dumps({"data": [ROW]}))).rows) == 1
    assert len(read_source(_file(tmp_path / "c.json", json.dumps(ROW) + "\n" + json.dumps(ROW))).rows) == 2


def test_parquet_rows_are_read(tmp_path: Path) -> None:
    arrow: Any = pytest.importorskip("pyarrow")
    parquet: Any = pytest.importorskip("pyarrow.parquet")
    table = arrow.table({"instruction": ["q"], "input": [None], "output": ["a"], "messages": [None]})
    parquet.write_table(table, tmp_path / "a.parquet")
    assert read_source(str(tmp_path / "a.parquet")).formats == ["alpaca"]


def test_a_damaged_parquet_file_is_refused(tmp_path: Path) -> None:
    pytest.importorskip("pyarrow")
    with pytest.raises(DataError, match=r"bad.parquet is not a parquet file"):
        read_source(_file(tmp_path / "bad.parquet", "PAR1 not really"))


def test_a_number_after_the_name_takes_the_first_rows(tmp_path: Path) -> None:
    name = _file(tmp_path / "a.jsonl", (json.dumps(ROW) + "\n") * 9)
    assert len(read_source(f"{name}#5").rows) == 5
    assert len(read_source(f"{name}#5", limit=2).rows) == 2
    assert read_source(f"{name}#5").notes == read_source(f"{name}#5000", limit=2).notes == []
    rows = len(read_source(name).rows)
    assert read_source(f"{name}#5000").notes == [f"#5000 asks for more rows than there are: all {rows} are used"]


def test_every_bad_line_is_named(tmp_path: Path) -> None:
    name = _file(tmp_path / "a.jsonl", "\n".join([json.dumps(ROW), '{"prompt": ', json.dumps(ROW), "[1]", '{"x": 1}']))
    with pytest.raises(DataError) as caught:
        read_source(name)
    message = caught.value.message
    assert "3 problems in the data" in message
    assert "a.jsonl, line 2: not JSON: Expecting value" in message
    assert "a.jsonl, line 4: not an object but list" in message
    assert "a.jsonl, line 5: in no known format; its keys are x; looked for messages" in message


@pytest.mark.parametrize(
    ("name", "text", "problem"),
    [
        ("a.jsonl", "", "is empty: it holds no rows"),
        ("a.json", "  \n", "is empty"),
        ("a.json", "[]", "is empty"),
        ("a.json", '[{"prompt": 1,]', "a.json, line 1: not JSON"),
        ("a.json", "3", "holds int, not an array"),
        ("a.xyz", "x", "a.xyz is of an unknown kind"),
        ("a.txt", "x", "a.txt is plain text: these are rows for the objective pretrain"),
    ],
)
def test_unusable_files_are_refused(tmp_path: Path, name: str, text: str, problem: str) -> None:
    with pytest.raises(DataError, match=problem):
        read_source(_file(tmp_path / name, text))


def test_a_file_that_is_not_utf8_is_refused(tmp_path: Path) -> None:
    (tmp_path / "a.jsonl").write_bytes(b'{"prompt": "\xff"}')
    with pytest.raises(DataError, match=r"a.jsonl, line 1: not UTF-8 text: byte 13 of the line is 0xff"):
        read_source(str(tmp_path / "a.jsonl"))


def test_missing_file_and_directory(tmp_path: Path) -> None:
    with pytest.raises(DataError, match="there is no data file"):
        read_source(str(tmp_path / "nothing.jsonl"))
    with pytest.raises(DataError, match="there is no data file"):
        read_source("data/nothing.jsonl")
    with pytest.raises(DataError, match="is a directory without data files"):
        read_source(str(tmp_path))


def test_a_missing_relative_path_says_what_it_is_relative_to() -> None:
    with pytest.raises(DataError, match=r"there is no data file gone\.jsonl") as caught:
        read_source("gone.jsonl")
    assert "relative to the folder of the configuration" in (caught.value.hint or "")


@pytest.mark.parametrize(
    ("suffix", "problem"),
    [
        ("@test", "a.jsonl is one file without splits, so @test names nothing"),
        (":sub", "a.jsonl is one file without subsets, so :sub names nothing"),
        ("#0", "a.jsonl#0 takes no rows"),
    ],
)
def test_parts_that_a_file_does_not_have_are_refused(tmp_path: Path, suffix: str, problem: str) -> None:
    name = _file(tmp_path / "a.jsonl", json.dumps(ROW) + "\n")
    with pytest.raises(DataError, match=problem):
        read_source(name + suffix)


def test_a_json_file_with_a_list_for_each_split_is_read_by_split(tmp_path: Path) -> None:
    name = _file(tmp_path / "a.json", json.dumps({"train": [ROW, ROW], "test": [ROW]}))
    assert len(read_source(name + "@test").rows) == 1


def test_a_json_file_that_was_cut_is_said_to_be_incomplete(tmp_path: Path) -> None:
    name = _file(tmp_path / "a.json", "[" + json.dumps(ROW))
    with pytest.raises(DataError, match=r"line 1: not JSON: .* at column 36, where the file ends: it is not complete"):
        read_source(name)
    name = _file(tmp_path / "b.json", '[{"prompt": "q" "completion": "a"}]')
    with pytest.raises(DataError, match=r"line 1: not JSON: .* at column 17$"):
        read_source(name)


def test_nan_is_no_text(tmp_path: Path) -> None:
    name = _file(tmp_path / "a.jsonl", '{"prompt": "q", "completion": NaN}\n')
    with pytest.raises(DataError, match="line 1: completion is NaN, which stands for a missing value"):
        read_source(name)


def test_hub_names_record_the_revision(monkeypatch: pytest.MonkeyPatch) -> None:
    datasets: Any = pytest.importorskip("datasets")
    hub: Any = pytest.importorskip("huggingface_hub")
    asked: dict[str, Any] = {}

    class Api:
        def dataset_info(self, name: str) -> Any:
            return type("Info", (), {"sha": "f" * 40})()

    def load(name: str, subset: str | None, **options: Any) -> list[dict[str, str]]:
        asked.update(options, name=name, subset=subset)
        return [ROW, ROW]

    monkeypatch.setattr(hub, "HfApi", Api)
    monkeypatch.setattr(datasets, "load_dataset", load)
    source = read_source("org/name:main#2", split="test")
    assert asked == {"name": "org/name", "subset": "main", "split": "test[:2]", "revision": "f" * 40}
    assert source.identity["revision"] == "f" * 40


def test_hub_failure_is_one_sentence(monkeypatch: pytest.MonkeyPatch) -> None:
    hub: Any = pytest.importorskip("huggingface_hub")

    class Api:
        def dataset_info(self, name: str) -> Any:
            raise OSError("no network\nand a long story")

    monkeypatch.setattr(hub, "HfApi", Api)
    with pytest.raises(DataError, match=r"neither a file nor a Hugging Face dataset that can be loaded: no network$"):
        read_source("org/name")


def test_what_counts_as_a_hub_name(tmp_path: Path) -> None:
    for name in ("squad", "org/name", "org/name:sub", "org/name@test"):
        opened = sources._Opening("train", None, None).open(SourceName.parse(name))
        assert isinstance(opened, HubDataset)
        assert opened.hub == "hf"
    for name in ("x.jsonl", "./x", "/x", "a b", "x.csv.gz"):
        with pytest.raises(DataError, match="there is no data file"):
            sources._Opening("train", None, None).open(SourceName.parse(name))


def test_paths_with_a_row_count_are_relative_to_the_configuration(tmp_path: Path) -> None:
    _file(tmp_path / "a.jsonl", (json.dumps(ROW) + "\n") * 9)
    (tmp_path / "config.yaml").write_text("base: org/model\ndata: {train: 'a.jsonl#5', validation: org/name#7}")
    data = load_config(tmp_path / "config.yaml").data
    assert data.train == f"{tmp_path / 'a.jsonl'}#5"
    assert data.validation == "org/name#7"


def test_a_clone_of_a_hub_dataset_is_read_by_subset_and_split(tmp_path: Path) -> None:
    pytest.importorskip("datasets")
    (tmp_path / "README.md").write_text(
        "---\nconfigs:\n- config_name: one\n  default: true\n  data_files:\n  - {split: train, path: a.jsonl}\n"
        "  - {split: held, path: b.jsonl}\n- config_name: two\n  data_files: c.jsonl\n---\n# rows\n"
    )
    for name in "abc":
        _file(tmp_path / f"{name}.jsonl", json.dumps({"prompt": name, "completion": "x"}) + "\n")

    def prompts(name: str) -> list[str]:
        return [row.messages[0]["content"] for row in read_source(name).rows]

    assert prompts(str(tmp_path)) == ["a"]
    assert prompts(f"{tmp_path}@held") == ["b"]
    assert prompts(f"{tmp_path}:two#1") == ["c"]
    assert read_source(f"{tmp_path}:two").identity == {
        "path": str(tmp_path), "subset": "two", "split": "train", "revision": None, "rows": 1,
    }  # fmt: skip
    with pytest.raises(DataError, match=r"cannot be read as a dataset: BuilderConfig 'three' not found"):
        prompts(f"{tmp_path}:three")
    with pytest.raises(DataError, match=r'cannot be read as a dataset: Unknown split "test"'):
        prompts(f"{tmp_path}@test")


def test_what_the_datasets_library_saves_is_read_by_split(tmp_path: Path) -> None:
    datasets: Any = pytest.importorskip("datasets")
    rows = datasets.Dataset.from_list([ROW, ROW])
    datasets.DatasetDict({"train": rows, "test": rows.select([0])}).save_to_disk(tmp_path / "both")
    rows.save_to_disk(tmp_path / "one")
    assert len(read_source(str(tmp_path / "both")).rows) == 2
    assert len(read_source(f"{tmp_path / 'both'}@test").rows) == 1
    assert len(read_source(str(tmp_path / "one")).rows) == 2


def test_names_with_the_prefix_of_a_hub(monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[Any] = []

    class MsDataset:
        @staticmethod
        def load(name: str, **options: Any) -> list[dict[str, str]]:
            asked.append((name, options))
            return [ROW, ROW, ROW]

    monkeypatch.setitem(sys.modules, "modelscope", types.ModuleType("modelscope"))
    module = types.ModuleType("modelscope.msdatasets")
    module.MsDataset = MsDataset  # type: ignore[attr-defined]
    monkeypatch.setitem(sys.modules, "modelscope.msdatasets", module)
    for prefix in ("ms::", "MS::", "https://modelscope.cn/datasets/"):
        name = f"{prefix}org/name:sub@test#2"
        source = read_source(name)
        assert len(source.rows) == 2
        assert source.identity["hub"] == "modelscope"
    assert asked == [("org/name", {"split": "test", "subset_name": "sub"})] * 3
    for name in ("hf::org/name", "https://huggingface.co/datasets/org/name", "hf://datasets/org/name"):
        opened = sources._Opening("train", None, None).open(SourceName.parse(name))
        assert isinstance(opened, HubDataset)
        assert (opened.hub, opened.name) == ("hf", "org/name")
