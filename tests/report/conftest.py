"""A run of a tiny model with a training log, and three exports of it, validated."""

from __future__ import annotations

import copy
import json
from pathlib import Path

import pytest

from edgetune.runs.directory import RunDirectory
from edgetune.validation.validate import validate_run
from tests.converters import tiny
from tests.export_requests import export
from tests.report.factories import Content, files_of, one_file
from tests.runtime import models
from tests.validation.runs import held_out, make_run

TYPES = ("f32", "q8_0", "q4_0")
LAST = 120


@pytest.fixture(scope="session")
def run(tmp_path_factory: pytest.TempPathFactory) -> RunDirectory:
    """The reference is what the export of base and adapter says; the q4_0 file is far from it."""
    folder = tmp_path_factory.mktemp("report")
    base = models.base(folder / "hf")
    adapter = tiny.adapter(base, folder / "adapter")
    files = {type_: folder / f"tiny-{type_}.gguf" for type_ in TYPES}
    for receipt in export(base, files, adapter=adapter, allow_fallback=True, threads=1, measure_survival=True):
        receipt.write()
    made = make_run(folder / "run", base, files["f32"], rows=held_out(7, 200), gate={"mean_kld_max": 0.05})
    made.artifacts.mkdir()
    for file in files.values():
        for path in (file, file.with_name(f"{file.name}.receipt.json")):
            path.rename(made.artifacts / path.name)
    write_log(made)
    return made


def write_log(run: RunDirectory) -> None:
    """As the trainer writes it, with the half line of a kill."""
    run.logs.mkdir()
    lines = []
    for step in range(5, LAST + 1, 5):
        lines.append({"step": step, "loss": 5 / step, "learning_rate": 1e-3 * (1 - step / LAST), "grad_norm": 3 / step})
        if step % 40 == 0:
            lines.append({"step": step, "eval_loss": 6 / step})
    text = "".join(json.dumps(line) + "\n" for line in lines)
    run.metrics_file.write_text(text + '{"step": 125, "lo', encoding="utf-8")


@pytest.fixture(scope="session")
def measured(run: RunDirectory) -> Content:
    return validate_run(run, sorted(run.artifacts.glob("*.gguf"))).content()


@pytest.fixture(scope="session")
def little(measured: Content, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """One file and one row of it, as JSON."""
    content = copy.deepcopy(measured)
    one_file(content)
    del files_of(content)[0]["detail"]["worst_rows"][1:]
    path = tmp_path_factory.mktemp("little") / "validation.json"
    path.write_text(json.dumps(content), encoding="utf-8")
    return path


@pytest.fixture
def content(measured: Content) -> Content:
    """What `validate` measured, to be changed at will."""
    return copy.deepcopy(measured)


@pytest.fixture
def folder(run: RunDirectory, tmp_path: Path) -> Path:
    """Where a validation can be written, with the receipts beside it."""
    for path in run.artifacts.glob("*.receipt.json"):
        (tmp_path / path.name).write_bytes(path.read_bytes())
    return tmp_path
