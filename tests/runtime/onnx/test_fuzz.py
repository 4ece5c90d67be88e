"""Truncated and flipped graphs: an error in one sentence, or a result; never the end of the process.

Each attempt runs in a forked child, so that a crash would be seen as one.
"""

from __future__ import annotations

import os
import random
import resource
import shutil
import signal
from collections import Counter
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
import pytest

from edgetune.errors import EdgetuneError
from edgetune.runtime import load
from tests.converters import tiny
from tests.runtime.scores import scored

IDS = tiny.random_ids(24)
SAME, ERROR, DIFFERENT, TRACEBACK = range(4)


@pytest.fixture
def copy(folder: Path, tmp_path: Path) -> Path:
    """Without a receipt beside it: with one, every change is an error before anything is looked at."""
    return shutil.copytree(folder, tmp_path / "model")


def answer(folder: Path) -> np.ndarray:
    with load(folder, threads=1, context=32) as runtime:
        return scored(runtime, IDS, list(range(1, 24)))


def outcome(folder: Path, expected: np.ndarray) -> int:
    """One of the four, or minus the number of the signal that ended the process."""
    child = os.fork()
    if child == 0:
        resource.setrlimit(resource.RLIMIT_AS, (16 << 30, 16 << 30))
        signal.alarm(300)
        os._exit(_outcome(folder, expected))
    return os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])


def _outcome(folder: Path, expected: np.ndarray) -> int:
    try:
        found = answer(folder)
    except EdgetuneError:
        return ERROR
    except BaseException as error:  # noqa: BLE001 - what else may come is the question
        print(repr(error))
        return TRACEBACK
    return SAME if np.array_equal(found, expected) else DIFFERENT


def flips(raw: bytes, count: int) -> Iterator[bytes]:
    for seed in range(count):
        chosen = random.Random(seed)
        damaged = bytearray(raw)
        for _ in range(chosen.choice([1, 1, 3, 20])):
            damaged[chosen.randrange(len(raw))] ^= 1 << chosen.randrange(8)
        yield bytes(damaged)


def cuts(raw: bytes, count: int) -> Iterator[bytes]:
    return (raw[: i * len(raw) // count] for i in range(count))


@pytest.mark.parametrize(("damage", "count"), [(flips, 60), (cuts, 20)])
@pytest.mark.filterwarnings("ignore:.*fork.*:DeprecationWarning")
def test_a_damaged_graph_is_an_error_and_never_a_crash(
    copy: Path, damage: Callable[[bytes, int], Iterator[bytes]], count: int
) -> None:
    raw, expected = (copy / "model.onnx").read_bytes(), answer(copy)
    outcomes: Counter[int] = Counter()
    for damaged in damage(raw, count):
        (copy / "model.onnx").write_bytes(damaged)
        outcomes[outcome(copy, expected)] += 1
    assert set(outcomes) <= {SAME, ERROR, DIFFERENT}
    assert outcomes[ERROR] > count // 2
    assert outcomes[DIFFERENT] <= count // 20, "a bit of a number, which only a receipt can tell"


def test_with_a_receipt_every_change_is_found(folder: Path, tmp_path: Path) -> None:
    copy = shutil.copytree(folder, tmp_path / folder.name)
    shutil.copy(folder.with_name(folder.name + ".receipt.json"), tmp_path)
    raw = (copy / "model.onnx").read_bytes()
    for damaged in (*flips(raw, 30), *cuts(raw, 10)):
        (copy / "model.onnx").write_bytes(damaged)
        with pytest.raises(EdgetuneError, match=r"model\.onnx"):
            load(copy)
