"""Storages chosen by measured errors: better than the fixed mix for the same bytes, and said why."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import onnx
import pytest

from edgetune import console
from edgetune.config import ExportConfig
from edgetune.errors import ConfigError
from edgetune.exporting import type_search
from edgetune.exporting.source import Source
from edgetune.planning.export_checks import check_search
from edgetune.reference.scored_rows import ScoredRows
from edgetune.reference.store import Reference
from edgetune.runs.directory import RunDirectory
from edgetune.sensitivity.onnx import knapsack, search
from edgetune.sensitivity.onnx.candidates import COARSEST, Matrix
from edgetune_converters.request import ExportRequest, Target
from tests.converters import tiny
from tests.export_requests import export, plan_onnx, targets

EVEN: dict[str, Any] = {"hidden_size": 128, "intermediate_size": 256, "head_dim": 32, "initializer_range": 0.05}


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny.base("llama-tied", tmp_path_factory.mktemp("tuning") / "base", **EVEN)


def rows_of(count: int = 2, length: int = 150) -> ScoredRows:
    ids, offsets = np.array(tiny.random_ids(count * length), np.int32), np.arange(count + 1) * length
    return ScoredRows(ids, offsets, np.setdiff1d(np.arange(count * length), offsets[:-1]))


def subject(base: Path) -> search.Subject:
    return type_search.search_subject(ExportRequest(base, (), allow_fallback=True, threads=2), rows_of())


def test_a_choice_is_better_than_the_fixed_mix_for_its_bytes(base: Path, tmp_path: Path) -> None:
    counted: list[tuple[int, int]] = []
    (tmp_path / "work").mkdir()
    settings = search.search_types(subject(base), tmp_path / "work", lambda *done: counted.append(done))
    report = settings.type_search
    assert report is not None
    assert counted[-1][0] == counted[-1][1]
    assert [done for done, _ in counted] == sorted(done for done, _ in counted)
    assert report["kld_tuned"] < report["kld_of_the_fixed_mix"] < report["kld_of_the_least"]
    assert report["kept"] == "the measured choice"
    # errors of single matrices add up to what they do together, but for what two of them have in common
    for name in ("kld_of_the_least", "kld_of_the_fixed_mix", "kld_tuned"):
        assert report[f"{name}_expected"] == pytest.approx(report[name], rel=0.25)
    (fixed,) = plan_onnx(base, ["int4"])
    (tuned,) = plan_onnx(base, ["int4"], settings)
    assert tuned.bytes <= fixed.bytes
    (receipt,) = export(base, {}, onnx={"int4": tmp_path / "tuned"}, onnx_settings=settings)
    assert receipt.type_search == report
    assert_written(tmp_path / "tuned", report["matrices"])


def assert_written(folder: Path, matrices: dict[str, dict[str, Any]]) -> None:
    """The graph has the bits, blocks, zero points and accuracy level that the receipt says of every matrix."""
    graph = onnx.load(folder / "model.onnx", load_external_data=False).graph
    found = {}
    for node in graph.node:
        if node.op_type == "MatMulNBits" and node.input[1].startswith("model.layers"):
            stated = {entry.name: entry.i for entry in node.attribute}
            zeros = "z" if len(node.input) > 3 and node.input[3] else ""
            kind = f"int{stated['bits']}/{stated['block_size']}{zeros}"
            found[node.input[1].removesuffix(".codes")] = kind, stated["accuracy_level"]
    wanted = {name: (entry["type"], entry["accuracy_level"]) for name, entry in matrices.items()}
    joined = {name for name in found if "qkv_proj" in name}  # where the three got the same storage
    assert found.keys() - joined == {name for name in wanted if not any(_qkv(name, each) for each in joined)}
    for name, written in found.items():
        assert all(wanted[each] == written for each in wanted if each == name or _qkv(each, name))


def _qkv(name: str, joined: str) -> bool:
    return name in [joined.replace("qkv_proj", f"{which}_proj") for which in "qkv"] and name != joined


def test_the_fixed_mix_stays_where_nothing_better_is_found(
    base: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def worst(measured: list[knapsack.MatrixErrors], budget: float) -> dict[Matrix, object]:
        return {each.matrix: COARSEST for each in measured}

    monkeypatch.setattr(knapsack, "choose", worst)
    settings = search.search_types(subject(base), tmp_path, lambda *_: None)
    assert not settings.choices
    assert settings.type_search is not None
    assert settings.type_search["kld_tuned"] > settings.type_search["kld_of_the_fixed_mix"]
    assert settings.type_search["kept"].startswith("the fixed mix")


def test_nothing_is_left_of_a_measurement_that_was_stopped(
    base: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Ctrl-C after some matrices; and the folder of one that was killed goes first."""
    target = tmp_path / "x-int4-onnx"
    killed = tmp_path / "x-int4-onnx.search.partial" / "whole"
    killed.mkdir(parents=True)

    @contextmanager
    def stopping(_: str) -> Iterator[console.Progress]:
        def progress(done: int, total: int) -> None:
            assert not killed.parent.joinpath("of another pass").exists()
            if done > total // 2:
                raise KeyboardInterrupt

        yield progress

    killed.parent.joinpath("of another pass").touch()
    monkeypatch.setattr(console, "count_progress", stopping)
    monkeypatch.setattr(Reference, "open", lambda path: SimpleNamespace(main_rows=rows_of()))
    source = Source("x", base, None, base, tmp_path, run=RunDirectory(tmp_path))
    with pytest.raises(KeyboardInterrupt):
        type_search.with_searched_types(ExportRequest(base, (Target("onnx", "int4", target),), threads=2), source)
    assert not list(tmp_path.iterdir())


def test_rows_are_cut_to_what_a_pass_may_take() -> None:
    rows = search._first_rows(rows_of(4, 300), 400)
    assert (len(rows), len(rows.positions)) == (4, 4 * 128)  # 128 of each row, 129 tokens are evaluated for them
    assert len(search._first_rows(rows_of(4, 300), 1)) == 1
    assert len(search._first_rows(rows_of(2, 20), 10**6).positions) == 38


@pytest.mark.parametrize(
    ("options", "paths", "message"),
    [
        ({"block_size": 32}, {"int4": Path("x")}, "chooses the blocks itself"),
        ({"portable": True}, {"int4": Path("x")}, "chooses the blocks itself"),
        ({}, {"f32": Path("x")}, "none is exported"),
    ],
)
def test_what_leaves_nothing_to_choose(options: dict[str, object], paths: dict[str, Path], message: str) -> None:
    config = ExportConfig.model_validate({"search_types": True, **options})
    with pytest.raises(ConfigError, match=message):
        check_search(config, targets(onnx=paths))
