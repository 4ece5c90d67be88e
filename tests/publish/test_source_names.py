"""Sources of rows in the model card and in `inspect`: files by their names, datasets of a hub as they are called."""

from __future__ import annotations

import pytest

from edgetune.inspect.run import _format_sources
from edgetune.publish.model_card import _source_name

HUB = {"dataset": "org/name", "split": "train", "revision": None, "rows": 1}
FILE = {"path": "/home/me/rows.jsonl", "sha256": "0", "rows": 2}


@pytest.mark.parametrize(("source", "name"), [(HUB, "org/name"), (FILE, "rows.jsonl")])
def test_the_card_names_a_source_without_the_folders_of_this_machine(source: dict[str, object], name: str) -> None:
    assert _source_name(source) == name


def test_inspect_names_sources_with_their_rows() -> None:
    assert _format_sources([HUB, FILE]) == "org/name (1 row), /home/me/rows.jsonl (2 rows)"
