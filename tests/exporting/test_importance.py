"""`--imatrix auto`: the importance matrix of a run's own training rows."""

from __future__ import annotations

import shutil
import threading
from pathlib import Path
from typing import Any

import gguf as gguf_package
import numpy as np
import pytest

from edgetune.config import ExportConfig, load_config, parse_section
from edgetune.data.encoded_rows import EncodedRows
from edgetune.data.masks import EncodedRow
from edgetune.errors import ConfigError, RunDirectoryError
from edgetune.exporting.run import export_run, prepare_export
from edgetune.exporting.source import find_source
from edgetune.reference.calibration import MOST_TOKENS, CalibrationRows
from edgetune.runs.directory import RunDirectory
from edgetune.runtime.llama.runtime import LlamaRuntime
from edgetune_converters.quantization.imatrix import read_imatrix
from tests.converters import tiny
from tests.runtime import models
from tests.validation.runs import make_run

QUANTIZED: dict[str, Any] = {"types": ["q4_0"], "imatrix": "auto", "allow_fallback": True}


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> RunDirectory:
    folder = tmp_path_factory.mktemp("importance")
    base = models.base(folder / "base")
    run = make_run(folder / "run", base, models.gguf(base, folder / "f32.gguf"))
    tiny.adapter(base, run.adapter)
    rows = [tiny.random_ids(count, seed=count) for count in (90, 30, 200)]
    CalibrationRows.choose(EncodedRows(EncodedRow(row, [True] * len(row)) for row in rows)).write(run.calibration)
    return run


@pytest.fixture
def run(made: RunDirectory, tmp_path: Path) -> RunDirectory:
    return RunDirectory(Path(shutil.copytree(made.path, tmp_path / "run")))


def test_the_matrix_is_that_of_the_merged_model_and_weights_the_export(run: RunDirectory, tmp_path: Path) -> None:
    (receipt,) = export_run(run, **QUANTIZED, formats=["gguf"], out=tmp_path / "auto")
    matrix = tmp_path / "auto/run.imatrix"
    export_run(run, types=["q8_0"], out=tmp_path / "m.gguf", allow_fallback=True)
    with LlamaRuntime(tmp_path / "m.gguf", context=200, threads=1) as runtime:
        sums = runtime.add_up_activations(CalibrationRows.read(run.calibration).first(1000))
    found = read_imatrix(matrix)
    assert found.entries.keys() == sums.keys()
    for name, entry in sums.items():
        np.testing.assert_array_equal(found.entries[name], entry.sums[0] / np.float32(320))
    assert (receipt.imatrix or {})["sha256"] == found.sha256
    options = QUANTIZED | {"imatrix": str(matrix)}
    (given,) = export_run(run, **options, formats=["gguf"], out=tmp_path / "given")
    plain = export_run(run, **QUANTIZED | {"imatrix": None}, formats=["gguf"], out=tmp_path / "plain")[0]
    tensors = [_tensors(Path(each.artifact)) for each in (receipt, given, plain)]
    assert (tensors[0] == tensors[1], tensors[0] == tensors[2]) == (True, False)
    assert not list(tmp_path.glob("auto/*partial*"))


def test_other_readers_open_the_matrix(run: RunDirectory, tmp_path: Path) -> None:
    export_run(run, **QUANTIZED, out=tmp_path / "auto")
    reader = gguf_package.GGUFReader(tmp_path / "auto/run.imatrix")
    assert reader.get_field("general.type").contents() == "imatrix"
    assert reader.get_field("imatrix.datasets").contents() == ["3 training rows of run"]
    assert [reader.get_field(f"imatrix.chunk_{what}").contents() for what in ("count", "size")] == [1, 512]
    names = [tensor.name for tensor in reader.tensors]
    weights = sorted({name.rsplit(".", 1)[0] for name in names})
    assert names == [f"{name}.{part}" for name in weights for part in ("in_sum2", "counts")]
    by_name = {tensor.name: tensor for tensor in reader.tensors}
    assert by_name["blk.0.ffn_down.weight.counts"].data.tolist() == [[320.0]]
    assert by_name["blk.0.ffn_down.weight.in_sum2"].shape.tolist() == [160, 1]


def test_a_matrix_is_computed_once_for_the_same_model(
    run: RunDirectory, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    matrix = tmp_path / "run.imatrix"
    times = []
    fewer = {"imatrix_tokens": 256}
    variants: list[dict[str, Any]] = [{}, {"types": ["q4_1"]}, fewer, fewer | {"merge_base": "nf4"}]
    for options in variants:
        export_run(run, **QUANTIZED | options, out=tmp_path, overwrite=True)
        times.append(matrix.stat().st_mtime_ns)
        said = " ".join(capfd.readouterr().err.split())
        assert ("of an earlier export of this model" in said) is (len(times) == 2)
    assert (times[0] == times[1], len(set(times))) == (True, 3)
    counts = {tensor.data.item() for tensor in gguf_package.GGUFReader(matrix).tensors if "counts" in tensor.name}
    assert counts == {256}


@pytest.mark.parametrize("types", [["q8_0"], ["f16"], ["f16", "q8_0"]])
def test_nothing_is_computed_for_types_that_are_not_weighted(
    run: RunDirectory, tmp_path: Path, types: list[str], capfd: pytest.CaptureFixture[str]
) -> None:
    export_run(run, types=types, imatrix="auto", allow_fallback=True, out=tmp_path / "out")
    assert "none of the storage types asked for is weighted" in " ".join(capfd.readouterr().err.split())
    assert not (tmp_path / "out/run.imatrix").exists()


def test_onnx_takes_the_matrix_too(run: RunDirectory, tmp_path: Path) -> None:
    (receipt,) = export_run(run, formats=["onnx"], types=["int4"], imatrix="auto", out=tmp_path / "out")
    assert (receipt.imatrix or {})["file"] == "run.imatrix"


def test_what_is_missing_is_said_before_anything_is_read(run: RunDirectory, tmp_path: Path) -> None:
    base = Path(str(run.manifest.base.path))
    with pytest.raises(ConfigError, match="no run is given"):
        prepare_export(find_source(None, base, run.adapter), dict(QUANTIZED), tmp_path / "m.gguf")
    run.calibration.unlink()
    with pytest.raises(ConfigError, match="keeps no training rows"):
        prepare_export(find_source(run.path), dict(QUANTIZED))


def test_a_foreign_file_is_not_overwritten(run: RunDirectory, tmp_path: Path) -> None:
    (tmp_path / "run.imatrix").write_bytes(b"mine")
    with pytest.raises(ConfigError, match=r"run\.imatrix exists and is no importance matrix that edgetune wrote"):
        export_run(run, **QUANTIZED, out=tmp_path, overwrite=True)
    assert (tmp_path / "run.imatrix").read_bytes() == b"mine"
    run.calibration.write_bytes(b"PK")
    with pytest.raises(RunDirectoryError, match=r"calibration\.npz cannot be read"):
        export_run(run, **QUANTIZED, out=tmp_path / "elsewhere")


def test_an_interrupt_leaves_nothing_behind(run: RunDirectory, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def interrupted(*_: Any) -> Any:
        assert threading.current_thread() is not threading.main_thread()
        raise KeyboardInterrupt

    monkeypatch.setattr(LlamaRuntime, "add_up_activations", interrupted)
    with pytest.raises(KeyboardInterrupt):
        export_run(run, **QUANTIZED, out=tmp_path / "out")
    assert not [path for path in tmp_path.rglob("*") if "partial" in path.name or path.suffix in (".gguf", ".imatrix")]


def test_no_more_tokens_can_be_asked_for_than_a_run_keeps() -> None:
    with pytest.raises(ConfigError, match=f"less than or equal to {MOST_TOKENS}"):
        parse_section(ExportConfig, {"imatrix_tokens": MOST_TOKENS + 1}, "export")
    assert parse_section(ExportConfig, {"imatrix_tokens": MOST_TOKENS}, "export").imatrix_tokens == MOST_TOKENS


def test_auto_is_no_path_in_a_configuration(tmp_path: Path) -> None:
    (tmp_path / "auto").write_text("a file of that name")
    (tmp_path / "rows.jsonl").write_text("{}")
    config = tmp_path / "config.yaml"
    config.write_text("base: b\ndata: {train: rows.jsonl}\nexport: {imatrix: auto}\n")
    assert load_config(config).export.imatrix == "auto"


def _tensors(path: Path) -> dict[str, bytes]:
    return {tensor.name: tensor.data.tobytes() for tensor in gguf_package.GGUFReader(path).tensors}
