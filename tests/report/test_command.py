"""`edgetune report` and `validate --html` as a user meets them."""

from __future__ import annotations

import json
import os
from pathlib import Path

import pytest

from edgetune.runs.directory import RunDirectory
from tests.cli_runner import edgetune, sentence
from tests.report.factories import Content


def test_a_page_of_all_that_was_validated(run: RunDirectory, content: Content, tmp_path: Path) -> None:
    (tmp_path / "all.json").write_text(json.dumps(content), encoding="utf-8")
    page = tmp_path / "deep" / "page.html"
    result = edgetune("report", run.path, tmp_path / "all.json", "-o", page)
    assert (result.returncode, result.stdout.decode().strip()) == (0, str(page))
    assert all(f"tiny-{type_}.gguf" in page.read_text(encoding="utf-8") for type_ in ("f32", "q8_0", "q4_0"))
    assert [path.name for path in page.parent.iterdir()] == ["page.html"]


def test_nothing_validated_says_what_to_do(run: RunDirectory) -> None:
    result = edgetune("report", run.path)
    assert result.returncode == 1
    said = sentence(result)
    assert "has been validated" in said
    assert "edgetune validate" in said
    assert not (run.path / "report.html").exists()


@pytest.mark.parametrize(
    "text", ["", "{", "[]", '{"version": 99}', '{"version": 1, "rungs": 3}', '{"version": 1, "rungs": []}']
)
def test_what_is_no_validation(run: RunDirectory, tmp_path: Path, text: str) -> None:
    (tmp_path / "bad.json").write_text(text, encoding="utf-8")
    result = edgetune("report", run.path, tmp_path / "bad.json", "-o", tmp_path / "page.html")
    assert result.returncode == 1
    assert "bad.json" in sentence(result)
    assert not (tmp_path / "page.html").exists()


def test_a_file_that_was_not_validated(run: RunDirectory, tmp_path: Path) -> None:
    assert "was not validated" in sentence(edgetune("report", run.path, tmp_path / "other.gguf"))
    for each in run.artifacts.glob("*.validation.json"):
        each.unlink()
    assert f"or name files that were validated elsewhere: `edgetune report {run.path} FILE...`" in sentence(
        edgetune("report", run.path)
    )


def test_validate_writes_the_page_even_when_the_gate_fails(run: RunDirectory, tmp_path: Path) -> None:
    file, page = run.artifacts / "tiny-q4_0.gguf", tmp_path / "page.html"
    options = (
        "--rows",
        "2",
        "--no-task",
        "--gate",
        "mean_kld_max=0.000001",
        "--json",
        tmp_path / "x.json",
        "--html",
        page,
    )
    result = edgetune("validate", run.path, file, *options)
    assert result.returncode == 3
    text = page.read_text(encoding="utf-8")
    assert "Gate failed" in text
    assert "times the limit" in text
    # from what was written, the same page is made again
    again = edgetune("report", run.path, tmp_path / "x.json", "-o", tmp_path / "again.html")
    assert again.returncode == 0


def test_a_file_newer_than_its_validation_is_named(run: RunDirectory, content: Content, tmp_path: Path) -> None:
    content["rungs"] = [each for each in content["rungs"] if each["file"] in (None, "tiny-q4_0.gguf")]
    file = tmp_path / "tiny-q4_0.gguf"
    file.write_bytes(b"another")
    report = tmp_path / "tiny-q4_0.gguf.validation.json"
    report.write_text(json.dumps(content), encoding="utf-8")
    os.utime(report, (1, 1))
    assert edgetune("report", run.path, file, "-o", tmp_path / "page.html").returncode == 0
    assert "is newer than its validation" in (tmp_path / "page.html").read_text(encoding="utf-8")
