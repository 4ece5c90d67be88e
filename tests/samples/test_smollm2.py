"""The sample smollm2: data as generated, splits apart, answers that the messages state."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import pytest
import yaml

from edgetune.config import load_config
from tests.smollm2 import SAMPLE, load_script

SPLITS = ("train", "validation", "test")
WORDINGS: dict[str, Any] = yaml.safe_load((SAMPLE / "wordings.yaml").read_text(encoding="utf-8"))


def _rows(split: str) -> list[tuple[str, dict[str, Any]]]:
    """The message and the ticket of every row of a committed split."""
    lines = (SAMPLE / "data" / f"{split}.jsonl").read_text(encoding="utf-8").splitlines()
    turns = [[turn["content"] for turn in json.loads(line)["messages"]] for line in lines]
    return [(message, json.loads(ticket)) for _, message, ticket in turns]


def test_the_script_writes_the_committed_rows(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    script = load_script("make_data")
    (tmp_path / "data").mkdir()
    (tmp_path / "wordings.yaml").write_bytes((SAMPLE / "wordings.yaml").read_bytes())
    monkeypatch.setattr(script, "HERE", tmp_path)
    script.main()
    for split in SPLITS:
        assert (tmp_path / "data" / f"{split}.jsonl").read_bytes() == (SAMPLE / "data" / f"{split}.jsonl").read_bytes()


def test_no_wording_and_no_message_of_the_test_is_trained_on() -> None:
    def plain(part: str) -> set[str]:
        return {re.sub(r"\W+", " ", wording).lower() for wordings in WORDINGS[part].values() for wording in wordings}

    assert not plain("train") & plain("test")
    trained = {message.lower() for split in ("train", "validation") for message, _ in _rows(split)}
    assert not [message for message, _ in _rows("test") if message.lower() in trained]
    messages = [message.lower() for split in SPLITS for message, _ in _rows(split)]
    assert len(messages) == len(set(messages))


def test_items_and_order_numbers_stand_in_the_messages() -> None:
    for split in SPLITS:
        for message, ticket in _rows(split):
            assert list(ticket) == [key for key in ("queue", "item", "order", "urgent") if key in ticket]
            assert ticket["queue"] in load_script("make_data").QUEUES
            assert ticket.get("item", "") in message.lower()
            assert ticket.get("order", "") in message


def test_most_items_of_the_test_are_new() -> None:
    items = WORDINGS["items"]
    assert len(set(items["test"]) - set(items["train"])) >= 14


def test_the_configuration_is_read() -> None:
    config = load_config(SAMPLE / "config.yaml")
    assert config.base == "HuggingFaceTB/SmolLM2-135M-Instruct"
    assert isinstance(config.data.train, str)
    assert Path(config.data.train).is_file()
