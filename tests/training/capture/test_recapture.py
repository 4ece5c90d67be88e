"""`edgetune reference`: a finished run's reference written anew, its merged models, and llama.cpp's base file."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import numpy as np
import pytest

from edgetune import cli
from edgetune.exporting.merge_base import MergeBaseComparison, compare_merge_bases
from edgetune.planning.task_rows import GREEDY_ROWS
from edgetune.reference import merged
from edgetune.reference.codecs import F32
from edgetune.reference.llama_kld import KldBaseFile
from edgetune.reference.store import Reference, summary
from edgetune.reference.writer import ReferenceWriter
from edgetune.runs.directory import RunDirectory
from edgetune.validation.greedy import compare_answers
from edgetune.validation.llama_perplexity import measure_against_base_file
from edgetune.validation.results import Mean, results_path
from edgetune_converters import exporting
from edgetune_converters.provenance.receipts import Receipt
from edgetune_converters.request import ExportRequest, Target
from tests.export_requests import export
from tests.training import runs
from tests.validation import stock


@pytest.fixture(scope="module")
def finished(base: Path, tmp_path_factory: pytest.TempPathFactory) -> RunDirectory:
    folder = tmp_path_factory.mktemp("run")
    values = runs.settings(base, folder, max_steps=3)
    values["data"] |= {"answer": "choice", "choices": list(runs.COLOURS)}
    config = runs.write_config(folder / "config.yaml", values)
    assert cli.run(["train", str(config), "-o", str(folder / "run")]) == 0
    return RunDirectory.open(folder / "run")


@pytest.fixture
def run(finished: RunDirectory, tmp_path: Path) -> RunDirectory:
    shutil.copytree(finished.path, tmp_path / "run")
    return RunDirectory.open(tmp_path / "run")


def reference(run: RunDirectory, *arguments: str, code: int = 0) -> Reference:
    assert cli.run(["reference", str(run.path), *arguments]) == code
    return Reference.open(run.reference)


def test_recapturing_gives_the_same_reference(run: RunDirectory) -> None:
    before, manifest = Reference.open(run.reference), run.finished_file.stat()
    after = reference(run)
    np.testing.assert_array_equal(after.rows.tokens, before.rows.tokens)
    np.testing.assert_array_equal(after.log_probs(0, 5), before.log_probs(0, 5))
    assert after.contract == before.contract
    assert after.greedy == before.greedy
    assert after.digest == before.digest
    assert run.finished_file.stat() == manifest  # which make compares with the exports
    assert summary(run).rows == 4


def test_other_rows_and_another_coding(run: RunDirectory, tmp_path: Path) -> None:
    rows = runs.write_rows(tmp_path / "more.jsonl", 12, 500)
    found = reference(run, "--rows", str(rows), "--count", "9", "--top-k", "32")
    assert (len(found.rows), found.coding, found.is_lower_bound) == (9, "top_k", True)
    assert reference(run, "--full-vocab").coding == "u16"


def test_long_rows_come_last_and_are_no_rows_of_the_user(run: RunDirectory) -> None:
    before = Reference.open(run.reference)
    found = reference(run, "--long")
    assert found.long_rows == 1  # this model allows nothing past its context
    assert [len(ids) for ids, _, _ in found.rows][-1] == 256
    np.testing.assert_array_equal(found.main_rows.tokens, before.rows.tokens)
    assert summary(run).cross_entropy["trained"] == pytest.approx(before.trained_nll.mean(), rel=1e-5)


def test_merged_models_are_those_of_the_export(run: RunDirectory, base: Path, tmp_path: Path) -> None:
    """nf4 is what was trained but for rounding; original is the file that is exported, as llama.cpp runs it."""
    kept = Reference.open(run.reference).digest
    found = reference(run, "--merged", "original", "--merged", "nf4")
    assert found.digest == kept
    nf4, original = merged.read(found, "nf4"), merged.read(found, "original")
    assert nf4 is not None
    assert original is not None
    assert 5 * nf4.kld.mean() < original.kld.mean()  # rounding the base to 4 bits is what lies between them
    file = tmp_path / "original.gguf"
    export(base, {"f32": file}, adapter=run.adapter, tokenizer=run.tokenizer)
    from edgetune.runtime import load
    from edgetune.validation import scoring

    with load(file) as runtime:
        said = scoring.score(runtime, found, found.rows, lambda *_: None)
        agreement, fault = compare_answers(runtime, found.greedy, runtime.stop_tokens, lambda *_: None)
    np.testing.assert_allclose(said.nll, original.nll, atol=2e-3)  # llama.cpp keeps keys and values in f16
    assert fault is None
    assert agreement is not None
    assert agreement.rows == GREEDY_ROWS
    assert not list(run.path.glob("*.partial"))


def test_the_merge_base_is_chosen_by_measurement(
    run: RunDirectory, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    """The figures are those that `validate` finds, and the file is that of the merge base by its name."""
    auto, nf4 = tmp_path / "auto.gguf", tmp_path / "nf4.gguf"
    export_ = ["merge-export", str(run.path), "-q", "q8_0", "--merge-base"]
    assert cli.run([*export_, "auto", "-o", str(auto)]) == 0
    assert "merge base nf4; mean KLD from the trained model, in 8 bits: original " in capfd.readouterr().err
    assert cli.run([*export_, "nf4", "-o", str(nf4)]) == 0
    receipt = Receipt.read(auto)
    assert receipt.merge_base == "nf4"
    assert receipt.sha256 == Receipt.read(nf4).sha256
    assert cli.run(["validate", str(run.path), str(auto), "--no-task", "--gate", "mean_kld_max=9"]) == 0
    (figures,) = (
        rung["figures"] for rung in json.loads(results_path(auto).read_text())["rungs"] if rung["name"] == "auto.gguf"
    )
    assert receipt.merge_base_kld is not None
    assert receipt.merge_base_kld["nf4"] == pytest.approx(figures["kld"]["value"], rel=1e-3)
    assert receipt.merge_base_kld["original"] > 2 * receipt.merge_base_kld["nf4"]
    assert not list(tmp_path.glob("*.partial"))


def test_a_merge_base_that_is_not_significantly_closer_is_not_taken(
    run: RunDirectory, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Both files are the same: the base keeps its precision."""
    (receipt,) = export(run.base_directory(), {"q8_0": tmp_path / "one.gguf"}, adapter=run.adapter, allow_fallback=True)

    def copy(request: ExportRequest) -> None:
        (target,) = request.targets
        shutil.copy(receipt.artifact, target.path)

    monkeypatch.setattr(exporting, "export", copy)
    request = ExportRequest(run.base_directory(), (Target("gguf", "q4_k_m", tmp_path / "x.gguf"),))
    found = compare_merge_bases(request, Reference.open(run.reference))
    assert found.best == "original"
    assert found.kld["original"] == found.kld["nf4"]


def test_a_better_figure_that_is_not_taken_is_explained() -> None:
    better, worse = Mean(value=0.010, error=0.002), Mean(value=0.011, error=0.002)
    unsure = MergeBaseComparison("original", {"original": worse, "nf4": better})
    assert unsure.sentence.endswith(
        "nf4 0.01 ± 0.002; nf4 is not significantly closer (less than two standard errors of the difference)"
    )
    for clear in (
        MergeBaseComparison("nf4", {"original": worse, "nf4": better}),
        MergeBaseComparison("original", {"original": better, "nf4": worse}),
    ):
        assert "significantly" not in clear.sentence


def test_a_merge_base_without_anything_to_choose(
    run: RunDirectory, base: Path, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    options = ["-q", "q8_0", "--merge-base", "auto", "-o", str(tmp_path / "x.gguf")]
    assert cli.run(["merge-export", "--base", str(base), "--adapter", str(run.adapter), *options]) == 2
    assert "--merge-base auto measures on the held-out rows of a run" in capfd.readouterr().err
    manifest = run.manifest.content()
    del manifest["quantized"]
    run.finished_file.write_text(json.dumps(manifest))
    assert cli.run(["merge-export", str(run.path), *options]) == 0
    assert "merge base original: the run was trained on the unquantized base" in capfd.readouterr().err
    assert Receipt.read(tmp_path / "x.gguf").merge_base_kld is None


def test_a_killed_capture_resumes(
    run: RunDirectory, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    """After the first batch, at a batch a row."""
    from edgetune.training.capture import forward

    monkeypatch.setattr(forward, "BATCH_TOKENS", {"cpu": 1})
    before, add, calls = Reference.open(run.reference), ReferenceWriter.add_trained, []

    def stopping(self: ReferenceWriter, logits: F32) -> None:
        calls.append(len(logits))
        if len(calls) == 3:
            raise KeyboardInterrupt
        add(self, logits)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(ReferenceWriter, "add_trained", stopping)
        assert cli.run(["reference", str(run.path)]) == 130
    assert Reference.open(run.reference).digest == before.digest  # the earlier one stays until there is another
    capfd.readouterr()
    after = reference(run)
    assert f"resuming after {sum(calls[:2])} of" in capfd.readouterr().err
    np.testing.assert_allclose(after.trained_nll, before.trained_nll, atol=1e-5)
    np.testing.assert_array_equal(after.trained_top, before.trained_top)
    assert not list(run.path.glob("*.partial"))


def test_choices_are_stored_with_the_task(run: RunDirectory) -> None:
    stored = Reference.open(run.reference).task
    assert stored is not None
    assert stored["kind"] == "choice"
    for row in stored["rows"]:
        assert row["choices"] == list(runs.COLOURS)
        assert {row["trained"], row["base"], row["expected"]} <= set(runs.COLOURS)


def test_the_base_file_for_llama_cpp(run: RunDirectory, base: Path, tmp_path: Path) -> None:
    """Read back by our own reader and compared with the NF4 merge in f32: only the coding and f16 caches differ."""
    path, text = tmp_path / "base.kld", tmp_path / "text.txt"
    text.write_text("lamp 7 green please? the red lamp, the blue lamp. " * 30)
    digest = Reference.open(run.reference).digest
    assert reference(run, "--llama-kld", str(path), "--llama-context", "64", "--llama-text", str(text)).digest == digest
    file = tmp_path / "d.gguf"
    export(base, {"f32": file}, adapter=run.adapter, merge_base="nf4", bnb_record=run.manifest.quantized)
    opened = KldBaseFile(path)
    figures = measure_against_base_file(opened, file, 1, lambda *_: None)
    assert (opened.context, opened.vocab_size) == (64, 512)
    assert opened.chunks > 5
    assert abs(figures.kld.value) < 2e-5
    assert figures.perplexity_ratio.value == pytest.approx(1, abs=1e-3)


@pytest.mark.slow
def test_stock_llama_perplexity_accepts_it(run: RunDirectory, base: Path, tmp_path: Path) -> None:
    path, text = tmp_path / "base.kld", tmp_path / "text.txt"
    text.write_text("lamp 7 green please? the red lamp, the blue lamp. " * 60)
    reference(run, "--llama-kld", str(path), "--llama-context", "64", "--llama-text", str(text))
    file = tmp_path / "d.gguf"
    export(base, {"f32": file}, adapter=run.adapter, merge_base="nf4", bnb_record=run.manifest.quantized)
    found = stock.statistics(file, path, 64, 1)
    assert abs(found["Mean    KLD"][0]) < 2e-5
    assert found["Mean PPL(Q)/PPL(base)"][0] == pytest.approx(1, abs=1e-3)


@pytest.mark.parametrize(
    ("arguments", "code", "what"),
    [
        (["--full-vocab", "--top-k", "5"], 2, "both given"),
        (["--llama-text", "x"], 2, "without --llama-kld"),
        (["--rows", "nowhere.jsonl"], 1, "nowhere.jsonl"),
        (["--base", "."], 1, ""),
        (["--llama-kld", "{tmp}/b.kld", "--llama-text", "{tmp}"], 1, "not a readable text file"),
    ],
)
def test_arguments_that_make_no_sense(
    run: RunDirectory, tmp_path: Path, capfd: pytest.CaptureFixture[str], arguments: list[str], code: int, what: str
) -> None:
    before = Reference.open(run.reference).digest
    reference(run, *(argument.format(tmp=tmp_path) for argument in arguments), code=code)
    said = " ".join(capfd.readouterr().err.split())
    assert "error:" in said
    assert what in said
    assert Reference.open(run.reference).digest == before


def test_another_base_is_refused(
    run: RunDirectory, base: Path, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    other = tmp_path / "other"
    shutil.copytree(base, other)
    content = bytearray((other / "model.safetensors").read_bytes())
    content[-1] ^= 1
    (other / "model.safetensors").write_bytes(content)
    reference(run, "--base", str(other), code=1)
    assert "is not the base that this run was trained on" in " ".join(capfd.readouterr().err.split())
