"""A run exported from Python, without the command line."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
from safetensors.numpy import load_file, save_file

from edgetune.data.encoded_rows import EncodedRows
from edgetune.data.masks import EncodedRow
from edgetune.errors import ConfigError, RunDirectoryError
from edgetune.exporting.run import export_run, prepare_export
from edgetune.exporting.source import find_source
from edgetune.runs.directory import RunDirectory
from edgetune.runtime.ngrams import Answers, NgramTable, path_beside, vocabulary_hash
from edgetune_converters.gguf import reader
from edgetune_converters.provenance.receipts import Receipt
from tests.converters import tiny
from tests.runtime import models
from tests.validation.runs import make_run


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> RunDirectory:
    folder = tmp_path_factory.mktemp("export-run")
    base = models.base(folder / "base")
    made = make_run(folder / "run", base, models.gguf(base, folder / "f32.gguf"))
    tiny.adapter(base, made.adapter)
    return made


def test_a_run_is_exported_as_by_the_command(run: RunDirectory, tmp_path: Path) -> None:
    receipts = export_run(
        run.path, formats=["gguf", "safetensors"], types=["q8_0", "f16"], out=tmp_path, modelfile=True
    )
    assert [Path(receipt.artifact).name for receipt in receipts] == ["run-q8_0.gguf", "run-f16.gguf", "run-f16"]
    assert (tmp_path / "run-q8_0.Modelfile").is_file()
    for receipt in receipts:
        assert Receipt.read(Path(receipt.artifact)) == receipt
        receipt.check()
    with pytest.raises(ConfigError, match="exists already"):
        export_run(run.path, types=["q8_0"], out=tmp_path)
    assert export_run(run.path, types=["q8_0"], out=tmp_path, overwrite=True)


def test_an_adapter_on_another_base_than_that_of_its_run_is_said(
    run: RunDirectory, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    base = Path(str(run.manifest.base.path))
    other = shutil.copytree(base, tmp_path / "other")
    tensors = load_file(other / "model.safetensors")
    save_file({name: values + 1 for name, values in tensors.items()}, other / "model.safetensors")
    for directory, is_said in ((base, False), (other, True)):
        source = find_source(None, directory, run.adapter)
        prepare_export(source, {"types": ["q8_0"]}, tmp_path / f"{directory.name}.gguf").run()
        assert ("model.safetensors differ" in " ".join(capfd.readouterr().err.split())) is is_said


def test_the_ngrams_of_a_run_lie_beside_its_gguf_files(run: RunDirectory, tmp_path: Path) -> None:
    row = EncodedRow([1, 2, 3, 4], [False, False, True, True])
    table = NgramTable.count(Answers.of(EncodedRows([row, row])))
    assert table is not None
    copy = RunDirectory(Path(shutil.copytree(run.path, tmp_path / "run")))
    table.write(copy.ngrams)
    export_run(copy, formats=["gguf", "safetensors"], types=["q8_0", "f16"], out=tmp_path / "out")
    found = path_beside(tmp_path / "out/run-q8_0.gguf")
    assert sorted(each.name for each in (tmp_path / "out").glob("*.ngrams")) == ["run-f16.gguf.ngrams", found.name]
    tokens = reader.read(tmp_path / "out/run-q8_0.gguf").metadata["tokenizer.ggml.tokens"]
    assert NgramTable.read(found).vocabulary == vocabulary_hash(tokens)  # type: ignore[arg-type]
    assert NgramTable.read(found).cells.tolist() == table.cells.tolist()
    export_run(copy, types=["q8_0"], out=tmp_path / "out", overwrite=True, no_ngrams=True)
    assert not found.exists(), "that of the earlier file is of no use"


def test_options_from_python_are_checked_as_flags_are(run: RunDirectory, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="--block-size is for int4 or int8 in ONNX"):
        export_run(run.path, types=["q8_0"], out=tmp_path, block_size=32)
    with pytest.raises(ConfigError, match="unknown key blocksize, did you mean"):
        export_run(run.path, types=["q8_0"], out=tmp_path, blocksize=32)
    assert not list(tmp_path.iterdir())


def test_an_export_from_python_needs_no_command_line(run: RunDirectory, tmp_path: Path) -> None:
    code = (
        "import sys; from pathlib import Path; from edgetune.exporting.run import export_run\n"
        "export_run(Path(sys.argv[1]), types=['q8_0'], out=Path(sys.argv[2]))\n"
        "assert not {'click', 'torch', 'edgetune.cli'} & set(sys.modules)"
    )
    subprocess.run([sys.executable, "-c", code, str(run.path), str(tmp_path)], check=True)
    assert (tmp_path / "run-q8_0.gguf").is_file()


@pytest.mark.parametrize("lost", ["files", "path"])
def test_a_manifest_that_lost_the_identity_of_the_base_is_refused(lost: str, run: RunDirectory, tmp_path: Path) -> None:
    """Otherwise the adapter would be merged into any base without a check."""
    copy = tmp_path / "run"
    shutil.copytree(run.path, copy)
    manifest = json.loads((copy / "run.json").read_text(encoding="utf-8"))
    del manifest["base"][lost]
    (copy / "run.json").write_text(json.dumps(manifest), encoding="utf-8")
    with pytest.raises(RunDirectoryError, match=r"run\.json is damaged: it "):
        export_run(copy, types=["q8_0"], out=tmp_path / "x.gguf")
    assert not list(tmp_path.glob("x.gguf*"))
