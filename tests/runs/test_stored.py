"""Documents of an older edgetune (commit 6fa6b1e) are read; those of a newer version are refused in one sentence."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest

from edgetune import cli
from edgetune.errors import RunDirectoryError
from edgetune.reference import merged
from edgetune.reference.manifest import ReferenceManifest
from edgetune.reference.store import Reference
from edgetune.runs.directory import RunDirectory
from edgetune.runs.documents import Document
from edgetune.runs.manifest import RunManifest
from edgetune.runs.status import RunStatus
from edgetune.validation.results import ValidationResults
from edgetune.validation.validate import validate_run
from edgetune.validation.verify import verify
from edgetune_converters.provenance.receipts import Receipt

STORED = Path(__file__).parent / "stored"
FILE = STORED / "tiny-q4_0.gguf"
DOCUMENTS: dict[type[Document], Path] = {
    RunManifest: STORED / "run/run.json",
    ReferenceManifest: STORED / "run/reference/reference.json",
    ValidationResults: STORED / "tiny-q4_0.gguf.validation.json",
}
documents = pytest.mark.parametrize(
    ("document", "path"), DOCUMENTS.items(), ids=[path.name for path in DOCUMENTS.values()]
)


@pytest.fixture
def run(tmp_path: Path) -> RunDirectory:
    return RunDirectory(Path(shutil.copytree(STORED / "run", tmp_path / "run")))


@documents
def test_an_older_document_is_read_and_keeps_its_keys(document: type[Document], path: Path) -> None:
    stored = json.loads(path.read_text(encoding="utf-8"))
    content = document.read(path).content()
    assert content["version"] == stored["version"] == 1
    assert stored.keys() <= content.keys()


@documents
def test_a_written_document_reads_back_as_it_was(document: type[Document], path: Path, tmp_path: Path) -> None:
    first = document.read(path)
    first.write(tmp_path / path.name)
    assert document.read(tmp_path / path.name).content() == first.content()


@documents
def test_a_newer_version_is_refused_in_one_sentence(document: type[Document], path: Path, tmp_path: Path) -> None:
    content = json.loads(path.read_text(encoding="utf-8")) | {"version": document.NEWEST + 1}
    newer = tmp_path / path.name
    newer.write_text(json.dumps(content), encoding="utf-8")
    with pytest.raises(RunDirectoryError, match=r"version 2; this edgetune reads up to version 1$") as error:
        document.read(newer)
    assert error.value.hint == "Update edgetune"


@documents
@pytest.mark.parametrize("text", ["", "[]", "{}", '{"version": "1"}', '{"version": 0}', "\ud800"])
def test_what_is_no_document_is_refused(document: type[Document], path: Path, tmp_path: Path, text: str) -> None:
    (tmp_path / path.name).write_bytes(text.encode("utf-8", "surrogatepass"))
    with pytest.raises(RunDirectoryError, match=path.name):
        document.read(tmp_path / path.name)


def test_the_manifest_of_an_older_run_keeps_its_meaning(run: RunDirectory) -> None:
    before = json.loads(run.finished_file.read_text(encoding="utf-8"))
    assert run.status is RunStatus.FINISHED
    assert run.train_results.steps == 2
    assert run.trained_adapter == {"adapter_config.json": "0" * 64}
    run.update_manifest(device={"type": "cpu"})
    assert json.loads(run.finished_file.read_text(encoding="utf-8")) == before | {"device": {"type": "cpu"}}


def test_the_merged_model_of_an_older_reference_is_the_original_one(run: RunDirectory) -> None:
    reference = Reference.open(run.reference)
    stored = merged.read(reference, "original")
    assert stored is not None
    assert merged.read(reference, "nf4") is None
    assert merged.write(reference, "original", stored).name == "merged-original.npz"
    assert merged.path_of(run.reference, "original").name == "merged-original.npz"


def test_an_older_run_validates_its_file(run: RunDirectory) -> None:
    found = validate_run(run, [FILE])
    assert [rung.name for rung in found.rungs] == ["base", "trained", "merged original", FILE.name]
    earlier = ValidationResults.read(STORED / f"{FILE.name}.validation.json")
    assert found.files[0].figures.kld.value == pytest.approx(earlier.files[0].figures.kld.value, rel=1e-3)
    assert [rung.name for rung in earlier.rungs] == [rung.name for rung in found.rungs]


def test_an_older_file_verifies_and_has_its_receipt() -> None:
    assert verify(FILE, progress=lambda *_: None).failed == []
    assert Receipt.read(FILE).recipe == "q4_0"


def test_an_older_validation_is_shown_on_the_page(run: RunDirectory, tmp_path: Path) -> None:
    page = tmp_path / "page.html"
    assert cli.run(["report", str(run.path), str(FILE), "-o", str(page)]) == 0
    assert "merged original" in page.read_text(encoding="utf-8")


def test_a_run_is_running_while_unfinished_and_locked(tmp_path: Path, run: RunDirectory) -> None:
    assert RunDirectory(tmp_path / "none").status is RunStatus.ABSENT
    assert RunDirectory(STORED).status is RunStatus.FOREIGN
    run.reopen()
    assert run.status is RunStatus.UNFINISHED
    with pytest.raises(RunDirectoryError, match="is not finished"):
        RunDirectory.open(run.path)
