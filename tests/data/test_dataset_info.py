"""dataset_info.json of LLaMA-Factory is read as it is: every way to say where rows are and what their keys mean."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from edgetune.data import dataset_info
from edgetune.data.chat_rows import ChatRow, Label, Pair, PlainText
from edgetune.data.hubs import HubDataset
from edgetune.data.objective_readers import reader_for
from edgetune.data.sources import DataSource, local_files, read_source
from edgetune.errors import DataError

USER, ANSWER = {"role": "user", "content": "Lamp?"}, {"role": "assistant", "content": "On."}
TAGS = {"role_tag": "role", "content_tag": "content", "user_tag": "user", "assistant_tag": "assistant"}
ALPACA = {"instruction": "Lamp?", "input": "", "output": "On."}
SHAREGPT = [{"from": "human", "value": "Lamp?"}, {"from": "gpt", "value": "On."}]
WORSE = {"from": "gpt", "value": "Off."}
RANKED = {"messages": "conversations", "chosen": "chosen", "rejected": "rejected"}

ENTRIES: dict[str, tuple[str, dict[str, Any], Any]] = {
    "defaults": ("sft", {}, ALPACA),
    "alpaca": (
        "sft",
        {"columns": {"prompt": "q", "query": "more", "response": "a"}},
        {"q": "Lamp?", "more": "", "a": "On."},
    ),
    "system": (
        "sft",
        {"columns": {"prompt": "q", "response": "a", "system": "rules"}},
        {"q": "Lamp?", "a": "On.", "rules": "Be brief."},
    ),
    "history": (
        "sft",
        {"columns": {"prompt": "q", "response": "a", "history": "past"}},
        {"q": "Lamp?", "a": "On.", "past": [["Hi", "Yes?"]]},
    ),
    "sharegpt": ("sft", {"formatting": "sharegpt"}, {"conversations": SHAREGPT}),
    "tags": (
        "sft",
        {
            "formatting": "sharegpt",
            "columns": {"messages": "talk"},
            "tags": {"role_tag": "who", "content_tag": "said", "user_tag": "caller", "assistant_tag": "clerk"},
        },
        {"talk": [{"who": "caller", "said": "Lamp?"}, {"who": "clerk", "said": "On."}]},
    ),
    "openai": (
        "sft",
        {"formatting": "openai", "columns": {"messages": "messages"}, "tags": TAGS},
        {"messages": [USER, ANSWER]},
    ),
    "ranking": (
        "dpo",
        {"formatting": "sharegpt", "ranking": True, "columns": RANKED},
        {"conversations": SHAREGPT[:1], "chosen": SHAREGPT[1], "rejected": WORSE},
    ),
    "ranking alpaca": (
        "orpo",
        {"ranking": True, "columns": {"prompt": "q", "query": "more", "chosen": "good", "rejected": "bad"}},
        {"q": "Lamp?", "more": "", "good": "On.", "bad": "Off."},
    ),
    "kto": (
        "kto",
        {"formatting": "sharegpt", "columns": {"messages": "messages", "kto_tag": "good"}, "tags": TAGS},
        {"messages": [USER, ANSWER], "good": True},
    ),
    "pretraining": ("pretrain", {"columns": {"prompt": "said"}}, {"said": "Lamp? On."}),
}  # fmt: skip


def _write(folder: Path, entries: dict[str, Any]) -> Path:
    path = folder / "dataset_info.json"
    path.write_text(json.dumps(entries), encoding="utf-8")
    return path


def _read(folder: Path, entry: dict[str, Any], row: Any, objective: str = "sft") -> DataSource:
    (folder / "rows.json").write_text(json.dumps([row, row]), encoding="utf-8")
    file = _write(folder, {"other": {"file_name": "gone.json"}, "one": {"file_name": "rows.json", **entry}})
    reader = reader_for(objective, "auto")
    source = read_source(f"{file}#one", reader=reader)
    reader.check_columns()
    return source


@pytest.mark.parametrize("name", ENTRIES)
def test_what_an_entry_says_is_what_is_read(tmp_path: Path, name: str) -> None:
    objective, entry, row = ENTRIES[name]
    first: ChatRow = _read(tmp_path, entry, row, objective).rows[0]
    assert not first.unread
    if objective == "pretrain":
        assert first.beside == PlainText("Lamp? On.")
        return
    before = {
        "system": [{"role": "system", "content": "Be brief."}],
        "history": [{"role": "user", "content": "Hi"}, {"role": "assistant", "content": "Yes?"}],
    }.get(name, [])
    assert first.messages == [*before, USER, ANSWER]
    if objective == "kto":
        assert first.beside == Label(True)
    if objective in ("dpo", "orpo"):
        assert isinstance(first.beside, Pair)
        assert first.beside.rejected.messages == [USER, {"role": "assistant", "content": "Off."}]


def test_tags_name_the_roles_of_calls_and_results(tmp_path: Path) -> None:
    call = '{"name": "dim", "arguments": {}}'
    row = {
        "conversations": [
            {"from": "rules", "value": "Act."}, {"from": "human", "value": "Dim."}, {"from": "act", "value": call},
            {"from": "seen", "value": "done"}, {"from": "gpt", "value": "Dimmed."},
        ],
        "functions": '[{"name": "dim"}]',
    }  # fmt: skip
    entry = {
        "formatting": "sharegpt",
        "columns": {"messages": "conversations", "tools": "functions"},
        "tags": {"function_tag": "act", "observation_tag": "seen", "system_tag": "rules"},
    }
    read = _read(tmp_path, entry, row).rows[0]
    assert [message["role"] for message in read.messages] == ["system", "user", "assistant", "tool", "assistant"]
    assert read.calls[2][0]["function"]["name"] == "dim"
    assert read.tools


def test_a_folder_with_the_file_is_named_like_the_file(tmp_path: Path) -> None:
    source = _read(tmp_path, {}, ALPACA)
    assert read_source(f"{tmp_path}#one").identity == source.identity
    assert source.identity["entry"] == "one"
    assert source.identity["rows"] == 2
    assert len(read_source(f"{tmp_path}#one#1").rows) == 1
    assert local_files(f"{tmp_path}#one", "train") == [tmp_path / "dataset_info.json", tmp_path / "rows.json"]


def test_a_folder_without_the_name_of_a_dataset_is_read_whole_and_says_so(tmp_path: Path) -> None:
    _read(tmp_path, {}, ALPACA)
    source = read_source(str(tmp_path))
    assert len(source.rows) == 2
    assert source.notes == [
        f"{tmp_path}: all its files were read; dataset_info.json in it describes 2 datasets, which are named as "
        f"{tmp_path}#other"
    ]


def test_num_samples_and_what_is_not_used_are_said(tmp_path: Path) -> None:
    source = _read(tmp_path, {"num_samples": 1, "subset": "en", "weighting": 3}, ALPACA)
    assert len(source.rows) == 1
    assert source.notes == [
        "dataset_info.json, one: not used: weighting",
        "dataset_info.json, one: num_samples takes the first 1 rows, where LLaMA-Factory draws them at random",
        "dataset_info.json, one: not used, for the rows are a file: subset",
    ]


def test_plain_text_is_read_by_lines_as_llama_factory_does(tmp_path: Path) -> None:
    (tmp_path / "wiki.txt").write_text("One.\nTwo.\n\nThree.\n", encoding="utf-8")
    _write(tmp_path, {"wiki": {"file_name": "wiki.txt", "columns": {"prompt": "text"}}})
    reader = reader_for("pretrain", "auto")
    rows = read_source(f"{tmp_path}#wiki", reader=reader).rows
    reader.check_columns()
    assert [row.beside for row in rows] == [PlainText("One."), PlainText("Two."), PlainText("Three.")]


def test_a_folder_of_rows_is_read(tmp_path: Path) -> None:
    (tmp_path / "parts").mkdir()
    for name in "ab":
        (tmp_path / "parts" / f"{name}.jsonl").write_text(json.dumps(ALPACA) + "\n", encoding="utf-8")
    _write(tmp_path, {"parts": {"file_name": "parts"}})
    assert len(read_source(f"{tmp_path}#parts").rows) == 2


@pytest.mark.parametrize(
    ("entry", "hub", "split", "options"),
    [
        ({"hf_hub_url": "org/a", "ms_hub_url": "org/b", "subset": "en", "split": "test"}, "hf", "test", {}),
        ({"ms_hub_url": "org/a", "subset": "en"}, "ms", "train", {}),
        ({"hf_hub_url": "org/a", "subset": "en", "folder": "python"}, "hf", "train", {"data_dir": "python"}),
    ],
)
def test_datasets_of_hubs_are_loaded_with_subset_split_and_folder(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, entry: dict[str, Any], hub: str, split: str, options: Any
) -> None:
    asked: list[Any] = []

    def load(dataset: HubDataset) -> list[Any]:
        asked.append((dataset.hub, dataset.name, dataset.subset, dataset.split, dataset.folder))
        return [ALPACA]

    monkeypatch.setattr(HubDataset, "_load_datasets", load)
    monkeypatch.setattr(HubDataset, "_load_modelscope", load)
    _write(tmp_path, {"one": entry})
    source = read_source(f"{tmp_path}#one")
    assert len(source.rows) == 1
    assert asked == [(hub, "org/a", "en", split, options.get("data_dir"))]


def test_the_folder_of_a_hub_dataset_reaches_the_library(monkeypatch: pytest.MonkeyPatch) -> None:
    datasets = pytest.importorskip("datasets")
    asked: list[Any] = []
    monkeypatch.setattr(datasets.config, "HF_HUB_OFFLINE", True)

    def load(*names: Any, **options: Any) -> list[Any]:
        asked.append(options)
        return []

    monkeypatch.setattr(datasets, "load_dataset", load)
    list(HubDataset("hf", "org/a", None, "train", None, "python").rows())
    assert [options["data_dir"] for options in asked] == ["python"]


@pytest.mark.parametrize(
    ("entry", "objective", "problem"),
    [
        ({"file_name": "gone.json"}, "sft", r"one: there is no file .*gone.json"),
        ({"script_url": "code"}, "sft", r"one: code \(script_url\) is a loading script, and edgetune runs no code"),
        ({"cloud_file_name": "s3://x"}, "sft", r"one: s3://x \(cloud_file_name\) is in a cloud storage"),
        ({"om_hub_url": "a/b"}, "sft", r"one: a/b \(om_hub_url\) is on a hub that edgetune does not read"),
        ({"formatting": "vicuna"}, "sft", "one: formatting is 'vicuna'"),
        ({"columns": {"prompts": "q"}}, "sft", "one: columns has the unknown key 'prompts'"),
        ({"tags": {"user": "q"}}, "sft", "one: tags has the unknown key 'user'"),
        ({"columns": {"prompt": 3}}, "sft", "one: columns.prompt is 3, not a name"),
        ({"num_samples": 0}, "sft", "one: num_samples is 0"),
        ({"ranking": True}, "sft", "one has ranking: true: these are rows for the objectives dpo, .*"),
        ({"columns": {"prompt": "q"}}, "sft", r"dataset_info.json, one names 'q' \(user\), which no row has"),
        ({"columns": {"images": "output"}}, "sft", "output is not empty, and edgetune trains on text only"),
        ({}, "dpo", r"row 1: has instruction and output: these are rows for the objectives sft, "),
    ],
)  # fmt: skip
def test_what_cannot_be_read_is_refused_with_the_reason(
    tmp_path: Path, entry: dict[str, Any], objective: str, problem: str
) -> None:
    with pytest.raises(DataError, match=problem):
        _read(
            tmp_path, {"file_name": None, **entry} if entry.keys() & dataset_info.REFUSED else entry, ALPACA, objective
        )


def test_a_file_without_a_name_and_a_wrong_name_list_the_datasets(tmp_path: Path) -> None:
    file = _write(tmp_path, {"identity": {"file_name": "a.json"}, "other": {"hf_hub_url": "a/b"}})
    with pytest.raises(DataError, match="describes 2 datasets and holds no rows") as caught:
        read_source(str(file))
    assert "dataset_info.json#identity" in str(caught.value.hint)
    with pytest.raises(DataError, match="describes no dataset 'identityx'") as caught:
        read_source(f"{file}#identityx")
    assert "Did you mean identity?" in str(caught.value.hint)


def test_what_the_datasets_library_calls_dataset_info_is_none_of_llama_factorys(tmp_path: Path) -> None:
    _write(tmp_path, {"features": {"text": {"dtype": "string"}}, "splits": {}})
    assert dataset_info.find_file(str(tmp_path)) is None
    assert dataset_info.find_file(str(tmp_path / "none.json")) is None
