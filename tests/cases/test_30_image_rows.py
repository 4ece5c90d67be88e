"""Rows with pictures, sound or film are refused with their number; empty lists are accepted."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from edgetune.errors import DataError
from tests.cases.rendering import encode

EXCHANGE = [{"role": "user", "content": "<image>What is it?"}, {"role": "assistant", "content": "A lamp."}]
TEXT = [{"messages": EXCHANGE, "images": []}, {"messages": EXCHANGE, "images": None, "videos": ""}]


def test_rows_with_empty_lists_are_text(tmp_path: Path) -> None:
    encoding = encode(tmp_path, TEXT)
    assert len(encoding.rows) == 2
    assert not encoding.usage.unused


@pytest.mark.parametrize("key", ["images", "image", "videos", "video", "audios", "audio"])
def test_rows_with_files_are_refused_and_counted(tmp_path: Path, key: str) -> None:
    with pytest.raises(DataError) as caught:
        encode(tmp_path, [{"messages": EXCHANGE, key: ["a"]}] * 3 + TEXT)
    assert caught.value.message == (
        f"rows.jsonl, line 1: {key} is not empty, and edgetune trains on text only "
        "(and 2 more rows: rows.jsonl, line 2; rows.jsonl, line 3)"
    )


@pytest.mark.parametrize(
    ("user", "problem"),
    [
        ({"content": "What is it?", "images": ["a.png"]}, "message 1: images is not empty"),
        (
            {"content": [{"type": "image", "image": "a.png"}, {"type": "text", "text": "What is it?"}]},
            "message 1: part 1 of content is of the type image, and edgetune trains on text only",
        ),
        ({"content": [{"type": "input_audio", "input_audio": {}}]}, "part 1 of content is of the type input_audio"),
    ],
)
def test_files_in_messages_are_refused(tmp_path: Path, user: Any, problem: str) -> None:
    with pytest.raises(DataError, match=problem):
        encode(tmp_path, [{"messages": [{"role": "user", **user}, EXCHANGE[1]]}])
