"""Ids of parametrized cases."""

from __future__ import annotations

from dataclasses import dataclass
from enum import Enum

import numpy as np
import pytest

from tests.readable_ids import LONGEST, readable_id


@dataclass(frozen=True)
class Sampling:
    temperature: float = 0.0
    top_k: int = 0


class Kind(Enum):
    ONE = 1


@pytest.mark.parametrize(
    ("value", "expected"),
    [
        pytest.param(False, "value=False", id="bool"),
        pytest.param(None, "value=None", id="none"),
        pytest.param(37, "value=37", id="number"),
        pytest.param("q4_k", "q4_k", id="text"),
        pytest.param("", "value=empty", id="empty text"),
        pytest.param("a\ud800\0灯", r"a\ud800\x00\u706f", id="letters that no terminal shows"),
        pytest.param((37, 301), "37x301", id="shape"),
        pytest.param({"rank": 4, "use_dora": None}, "rank=4,use_dora=None", id="mapping"),
        pytest.param(["--seed", "1"], "--seed,1", id="words"),
        pytest.param(b"GGUF", "4_bytes_47475546", id="bytes"),
        pytest.param(np.zeros((2, 3), np.float32), "float32[2x3]", id="array"),
        pytest.param(Sampling(top_k=1), "top_k=1", id="dataclass"),
        pytest.param(lambda path: path.write_text("{"), "write_text_{", id="lambda"),
        pytest.param(np.float32, None, id="class"),
        pytest.param((np.float32, "f16"), "float32,f16", id="class and text"),
        pytest.param(Kind.ONE, None, id="enum"),
    ],
)
def test_the_id_says_what_the_value_is(value: object, expected: str | None) -> None:
    assert readable_id(value, "value") == expected


def test_a_long_text_is_shortened() -> None:
    found = readable_id("a long\nmessage " * 20, "message")
    assert found is not None
    assert len(found) == LONGEST
    assert found.startswith("a long message a long")
