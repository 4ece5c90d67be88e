"""Blocks chosen by measured errors: better than the fixed mix for the same bytes, and said why."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from edgetune.commands.export_paths import Outputs
from edgetune.commands.onnx_export import refuse_tuning
from edgetune.config import ExportConfig
from edgetune.errors import ConfigError
from edgetune.rows import Rows
from edgetune.validation import tuning
from edgetune_converters.export import export, plan_onnx
from edgetune_converters.onnx.places import Source
from edgetune_converters.onnx.plan import Settings
from edgetune_converters.onnx.storage import Codes
from tests.converters import tiny


def rows_of(base: Path) -> Rows:
    ids = np.array(tiny.random_ids(300), np.int32)
    offsets = np.array([0, 150, 300])
    return Rows(ids, offsets, np.setdiff1d(np.arange(300), offsets[:-1]))


def test_a_choice_is_better_than_the_fixed_mix_for_its_bytes(tmp_path: Path) -> None:
    even: dict[str, Any] = {"hidden_size": 128, "intermediate_size": 256, "head_dim": 32, "initializer_range": 0.05}
    base = tiny.base("llama-tied", tmp_path / "base", **even)
    (plan,) = plan_onnx(base, ["int4"])
    counted: list[tuple[int, int]] = []

    def make(settings: Settings, folder: Path) -> None:
        export(base, {}, onnx={"int4": folder}, onnx_settings=settings)

    settings = tuning.tune(make, plan, rows_of(base), tmp_path, lambda *done: counted.append(done))
    report = settings.tuning
    assert report is not None
    assert counted[-1][0] == counted[-1][1] == len(counted)
    assert report["kld_tuned"] < report["kld_of_the_least"]
    assert report["kept"].startswith(
        "the measured" if report["kld_tuned"] < report["kld_of_the_fixed_mix"] else "the fixed"
    )
    (tuned,) = plan_onnx(base, ["int4"], settings)
    assert tuned.bytes <= plan.bytes
    (receipt,) = export(base, {}, onnx={"int4": tmp_path / "tuned"}, onnx_settings=settings)
    assert receipt.tuning == report
    assert {path.name for path in tmp_path.iterdir()} == {"base", "tuned"}


def test_the_ends_of_a_deep_model_are_measured_apart(tmp_path: Path) -> None:
    base = tiny.base("llama-tied", tmp_path / "base", num_hidden_layers=8)
    (plan,) = plan_onnx(base, ["int4"])
    names = [group.name for group in tuning.groups_of(plan)]
    assert len(names) == 12
    assert names[-3:] == ["down of layers 0 to 1", "down of layers 2 to 5", "down of layers 6 to 7"]


def _groups(errors: Mapping[str, float]) -> list[tuning.Group]:
    sources = [Source(number, (name, 0, "weight"), (64, 1024), "F32") for number, name in enumerate(errors)]
    return [tuning.Group(source.slot[0], (source,), errors[source.slot[0]]) for source in sources]


def test_bytes_are_spent_where_they_gain_most() -> None:
    left = {tuning.LEAST: 1.0, tuning.BETWEEN[0]: 0.8, tuning.BETWEEN[1]: 0.6, tuning.WHOLE: 0.0}
    groups = _groups({"quiet": 0.1, "loud": 0.9})
    least = sum(group.bytes(tuning.LEAST) for group in groups)
    step = groups[0].bytes(tuning.WHOLE) - groups[0].bytes(tuning.LEAST)

    def chosen(budget: int) -> list[Codes]:
        return list(tuning._choose(groups, tuning.Measured(1.0, left), budget).values())

    assert chosen(least) == [tuning.LEAST, tuning.LEAST]
    assert chosen(least + step)[1] != tuning.LEAST
    assert chosen(least + 2 * step) == [tuning.WHOLE, tuning.WHOLE]
    for budget in range(least, least + 2 * step, step // 7):
        spent = sum(group.bytes(kind) for group, kind in zip(groups, chosen(budget), strict=True))
        assert spent <= budget


@pytest.mark.parametrize(
    ("options", "paths", "message"),
    [
        ({"block_size": 32}, {"int4": Path("x")}, "chooses the blocks itself"),
        ({"portable": True}, {"int4": Path("x")}, "chooses the blocks itself"),
        ({}, {"f32": Path("x")}, "none is asked for"),
    ],
)
def test_what_leaves_nothing_to_choose(options: dict[str, object], paths: dict[str, Path], message: str) -> None:
    config = ExportConfig.model_validate({"tune": True, **options})
    with pytest.raises(ConfigError, match=message):
        refuse_tuning(config, Outputs({}, {}, {}, paths))
