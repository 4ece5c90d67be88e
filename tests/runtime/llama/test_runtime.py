"""What is llama.cpp's own behind the Runtime interface; what all runtimes do is in test_runtimes."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
import warnings
from pathlib import Path
from typing import Any

import numpy as np
import pytest

import edgetune_native
from edgetune import cli
from edgetune.runtime import RuntimeNotice, RuntimeProblem, load
from edgetune.runtime.llama import runtime as implementation
from edgetune.runtime.llama_library import library
from edgetune_converters.errors import ArtifactError
from tests.converters import tiny
from tests.runtime import models
from tests.runtime.scores import assert_same, scored


def test_blocks_of_logits_are_bounded(file: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    ids, positions = tiny.random_ids(200), list(range(1, 200))
    with load(file) as runtime:
        whole = scored(runtime, ids, positions)
    monkeypatch.setattr(implementation, "_OUTPUT_BYTES", 7 * 4 * runtime.vocabulary_size)
    monkeypatch.setattr(implementation, "BATCH", 64)
    with load(file) as bounded:
        blocks = [block.copy() for block in bounded.score(np.array(ids, np.int32), np.array(positions))]
    assert {len(block) for block in blocks} <= {7, 3}
    assert_same(np.concatenate(blocks), whole)


@pytest.mark.parametrize(("wanted", "outputs"), [("1111111", 3), ("0000000", 3), ("0101010", 1), ("1", 1), ("0011", 2)])
def test_pieces_cover_everything_within_the_bound(wanted: str, outputs: int) -> None:
    flags = np.array([int(flag) for flag in wanted], np.int8)
    pieces = list(implementation._pieces(flags, outputs))
    assert [i for start, stop in pieces for i in range(start, stop)] == list(range(len(flags)))
    assert all(flags[start:stop].sum() <= outputs for start, stop in pieces)


@pytest.mark.parametrize("keep", [3, 40, 1000, -1])
def test_truncated_files_are_refused(file: Path, tmp_path: Path, keep: int) -> None:
    cut = tmp_path / "cut.gguf"
    cut.write_bytes(file.read_bytes()[:keep])
    with pytest.raises(ArtifactError, match=r"cut\.gguf"):
        load(cut)


def test_an_error_of_llama_cpp_contains_its_message(file: Path, tmp_path: Path) -> None:
    other = tmp_path / "other.gguf"
    other.write_bytes(file.read_bytes().replace(b"output_norm.weight", b"output_nurm.weight"))
    with pytest.raises(RuntimeProblem, match="output_norm"):
        load(other)


@pytest.mark.parametrize(
    ("advertised", "usable", "safe"), [(True, False, False), (True, True, True), (False, False, True)]
)
def test_amx_that_faults_is_not_used_and_gives_one_notice(
    file: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str], advertised: bool, usable: bool,
    safe: bool,
) -> None:  # fmt: skip
    probe = edgetune_native.AmxProbe(advertised, usable, "AMX faults here")
    monkeypatch.setattr(edgetune_native, "probe_amx", lambda: probe)
    requested: list[bool] = []
    loaded = library().llama_model_load_from_file

    def load_and_note(path: bytes, parameters: Any) -> Any:
        requested.append(parameters.use_extra_bufts)
        return loaded(path, parameters)

    monkeypatch.setattr(library(), "llama_model_load_from_file", load_and_note)
    implementation._can_use_extra_buffers.cache_clear()
    with warnings.catch_warnings(record=True) as noticed:
        warnings.simplefilter("always", RuntimeNotice)
        for _ in range(2):
            load(file).close()
    implementation._can_use_extra_buffers.cache_clear()
    assert requested == [safe, safe]
    assert [str(each.message).startswith("AMX faults here") for each in noticed] == ([] if safe else [True])
    assert capfd.readouterr() == ("", ""), "the runtime itself prints nothing"


def test_a_program_is_silent_and_the_command_line_prints_one_warning(
    file: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    probe = edgetune_native.AmxProbe(True, False, "AMX faults here")
    monkeypatch.setattr(edgetune_native, "probe_amx", lambda: probe)
    for run, printed in ((lambda: load(file).close(), 0), (lambda: cli.run(["run", str(file), "-p", "x"]), 1)):
        implementation._can_use_extra_buffers.cache_clear()
        run()
        assert capfd.readouterr().err.count("warning: AMX faults here") == printed
    implementation._can_use_extra_buffers.cache_clear()


def test_a_notice_is_ignored_unless_a_program_asks_for_it() -> None:
    code = "import warnings, edgetune.errors as e; warnings.warn(e.RuntimeNotice('slow'))"
    silent, shown = (
        subprocess.run([sys.executable, *options, "-c", code], capture_output=True, text=True)
        for options in ([], ["-W", "default"])
    )
    assert (silent.returncode, silent.stderr) == (0, "")
    assert "RuntimeNotice: slow" in shown.stderr


def test_a_directory_or_missing_file_is_an_error_with_a_hint(tmp_path: Path) -> None:
    (tmp_path / "artifacts").mkdir()
    (tmp_path / "artifacts/m.gguf").touch()
    with pytest.raises(RuntimeProblem, match="is a directory") as error:
        load(tmp_path)
    assert "m.gguf" in str(error.value.hint)
    with pytest.raises(RuntimeProblem, match="there is no file"):
        load(tmp_path / "none.gguf")


def test_text_is_normalized_as_in_training(base: Path, tmp_path: Path) -> None:
    tokenizer = json.loads((base / "tokenizer.json").read_text(encoding="utf-8"))
    other = shutil.copytree(base, tmp_path / "base")
    (other / "tokenizer.json").write_text(json.dumps({**tokenizer, "normalizer": {"type": "NFC"}}), encoding="utf-8")
    composed, decomposed = "\u00e9", "e\u0301"
    with load(models.gguf(other, tmp_path / "nfc.gguf")) as normalizing:
        assert normalizing.tokenize(decomposed) == normalizing.tokenize(composed)
    with load(models.gguf(base, tmp_path / "plain.gguf")) as plain:
        assert plain.tokenize(decomposed) != plain.tokenize(composed)
