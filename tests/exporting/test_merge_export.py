"""`edgetune merge-export` and `edgetune card` as a user meets them: every output of one pass, and its documents."""

from __future__ import annotations

import json
import os
import pty
import re
import sys
from contextlib import suppress
from pathlib import Path

import pytest
import yaml

from edgetune.publish import model_card
from edgetune.runs.manifest import RunManifest
from edgetune_converters import gguf
from edgetune_converters.provenance.receipts import Receipt
from tests.cli_runner import edgetune, sentence
from tests.converters import tiny
from tests.runtime import models


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    made = models.base(tmp_path_factory.mktemp("base") / "tiny-base", "llama")
    (made / "README.md").write_text("---\nlicense: apache-2.0\nlanguage:\n- en\n---\n# The base\n", encoding="utf-8")
    return made


@pytest.fixture(scope="module")
def adapter(base: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny.adapter(base, tmp_path_factory.mktemp("adapter") / "mine")


def test_everything_from_one_read(base: Path, adapter: Path, tmp_path: Path) -> None:
    result = edgetune(
        "merge-export", "--base", base, "--adapter", adapter, "--format", "gguf,safetensors,gguf-lora",
        "-q", "q8_0,f16", "--tensor-type", "attn_v=q5_0", "--modelfile", "--card", "--max-shard-size", "400KB",
        "-o", tmp_path,
    )  # fmt: skip
    assert result.returncode == 0, result.stderr.decode()
    made = ["mine-q8_0.gguf", "mine-f16.gguf", "mine-f16", "mine-lora-f16.gguf"]
    documents = ["mine-q8_0.Modelfile", "mine-f16.Modelfile", "README.md"]
    receipts = [f"{name}.receipt.json" for name in made]
    assert sorted(path.name for path in tmp_path.iterdir()) == sorted([*made, *documents, *receipts])
    for name in made:
        Receipt.read(tmp_path / name).check()
    receipt = Receipt.read(tmp_path / "mine-q8_0.gguf")
    assert (receipt.overrides, receipt.tensors["blk.0.attn_v.weight"]) == (["--tensor-type attn_v=q5_0"], "q5_0")
    assert len(list((tmp_path / "mine-f16").glob("model-*.safetensors"))) > 1
    assert (tmp_path / "mine-f16" / "README.md").is_file()
    assert (tmp_path / "mine-q8_0.Modelfile").read_text().startswith("# Made by edgetune")


def test_the_card_says_what_is_known_and_no_more(base: Path, adapter: Path, tmp_path: Path) -> None:
    result = edgetune("merge-export", "--base", base, "--adapter", adapter, "-q", "q8_0", "--card", "-o", tmp_path)
    assert result.returncode == 0, result.stderr.decode()
    text = (tmp_path / "README.md").read_text()
    head = yaml.safe_load(text.split("---\n")[1])
    assert head == {
        "license": "apache-2.0", "language": ["en"], "library_name": "gguf", "pipeline_tag": "text-generation",
        "tags": ["edgetune", "gguf", "lora", "llama"],
    }  # fmt: skip
    receipt = Receipt.read(tmp_path / "mine-q8_0.gguf")
    for known in (receipt.sha256, *receipt.base.values(), *(receipt.adapter or {}).values(), "`tiny-base`", "q8_0"):
        assert known in text
    assert "How it was trained" not in text
    assert "What was measured" not in text
    assert str(tmp_path) not in text
    assert str(base.parent) not in text


def test_a_card_after_validation_has_the_figures(base: Path, tmp_path: Path) -> None:
    file = models.gguf(base, tmp_path / "m-q8_0.gguf", "q8_0")
    figures = {
        "kld": {"value": 0.00123, "error": 0.1},
        "same_top": {"value": 0.987},
        "recovery": 0.99,
        "perplexity": {"value": None},
    }
    report = {"version": 1, "rungs": [{"name": "m-q8_0.gguf", "file": "m-q8_0.gguf", "figures": figures}]}
    (tmp_path / "m-q8_0.gguf.validation.json").write_text(json.dumps(report))
    result = edgetune("card", file, "--base", base, "--name", "My model")
    assert (result.returncode, result.stdout.decode().strip()) == (0, str(tmp_path / "README.md"))
    text = (tmp_path / "README.md").read_text()
    assert "# My model" in text
    assert "| `m-q8_0.gguf` | 0.00123 | 98.7% |  | 0.99 |" in text
    os.utime(tmp_path / "m-q8_0.gguf.validation.json", (0, 0))
    assert edgetune("card", file, "--base", base).returncode == 0
    assert "0.00123" not in (tmp_path / "README.md").read_text(), "a report of an older file says nothing of this one"


def test_a_card_of_a_run_says_how_it_was_trained(base: Path, adapter: Path, tmp_path: Path) -> None:
    file = models.gguf(base, tmp_path / "m.gguf")
    manifest = {
        "base": {"name": "owner/name"},
        "config": {
            "adapter": {"r": 8, "alpha": 16, "use_rslora": True},
            "training": {"epochs": 2, "learning_rate": 2e-4},
        },
        "data": {"train": [{"path": "/home/someone/rows.jsonl", "rows": 12}], "test": []},
        "stages": {"train": {"steps": 70, "loss_last": 0.25}},
        "device": {"type": "cuda", "name": "A GPU"},
        "versions": {"torch": "2.13.0"},
    }
    text = model_card.format_card("m", [Receipt.read(file)], base, RunManifest.model_validate(manifest))
    assert yaml.safe_load(text.split("---\n")[1])["base_model"] == "owner/name"
    for row in (
        "adapter | rsLoRA, r 8, alpha 16",
        "epochs | 2",
        "train rows | 12 of rows.jsonl",
        "steps | 70",
        "loss last | 0.2500",
        "device | A GPU",
    ):
        assert f"| {row} |" in text


def test_a_readme_of_ones_own_is_not_replaced(base: Path, tmp_path: Path) -> None:
    (tmp_path / "README.md").write_text("mine")
    arguments: list[str | Path] = ["merge-export", "--base", base, "-q", "q8_0", "--card", "-o", tmp_path]
    assert "README.md was not made by edgetune" in sentence(edgetune(*arguments))
    assert list(tmp_path.iterdir()) == [tmp_path / "README.md"]
    assert edgetune(*arguments, "--overwrite").returncode == 0
    assert edgetune(*arguments, "--overwrite").returncode == 0


def test_a_split_file_by_its_first_part(base: Path, tmp_path: Path) -> None:
    arguments: list[str | Path] = [
        "merge-export",
        "--base",
        base,
        "-q",
        "f32",
        "--split-max-size",
        "300KB",
        "--modelfile",
        "-o",
        tmp_path,
    ]
    result = edgetune(*arguments)
    assert result.returncode == 0, result.stderr.decode()
    first = Path(result.stdout.decode().split()[0])
    assert "-00001-of-" in first.name
    assert "Ollama does not open a split file" in result.stderr.decode()
    assert gguf.read(first).metadata["split.no"] == 0
    assert "exists already" in sentence(edgetune(*arguments))


def test_the_plan_names_overrides_and_stops(base: Path, tmp_path: Path) -> None:
    result = edgetune(
        "merge-export", "--base", base, "-q", "q8_0", "--output-type", "f16", "--dry-run", "-o", tmp_path, COLUMNS="60"
    )
    assert result.returncode == 0, result.stderr.decode()
    row = next(line for line in result.stdout.decode().splitlines() if "output.weight" in line)
    assert row.split()[3] == "f16"
    assert row.rstrip().endswith("--output-tensor-type f16")
    assert list(tmp_path.iterdir()) == []


def test_a_terminal_shows_bytes_a_second_and_the_time_left(base: Path, tmp_path: Path) -> None:
    child, terminal = pty.fork()
    if child == 0:
        os.environ |= {"COLUMNS": "100", "TERM": "xterm"}
        arguments = ["merge-export", "--base", str(base), "-q", "q8_0", "-o", str(tmp_path / "x.gguf")]
        os.execv(sys.executable, [sys.executable, "-m", "edgetune", *arguments])
    shown = b""
    with suppress(OSError), os.fdopen(terminal, "rb", buffering=0) as file:  # it fails when the other end is closed
        while piece := file.read(4096):
            shown += piece
    assert os.waitpid(child, 0)[1] == 0
    plain = re.sub(rb"\x1b\[[0-9;?]*[A-Za-z]", b"", shown).decode()
    last = [line for line in re.split(r"[\r\n]+", plain) if line.startswith("export")][-1]
    assert re.search(r" (\S+)/\1 (bytes|[kMG]B) +\S+ ([kMG]B|bytes)/s 0:00:00", last), last


def test_the_plan_shows_every_format(base: Path, adapter: Path, tmp_path: Path) -> None:
    result = edgetune(
        "merge-export", "--base", base, "--adapter", adapter, "--format", "gguf,safetensors,gguf-lora", "-q", "bf16",
        "--dry-run", "-o", tmp_path, COLUMNS="60",
    )  # fmt: skip
    assert result.returncode == 0, result.stderr.decode()
    rows = [line.split() for line in result.stdout.decode().splitlines()]
    named = {row[0]: row for row in rows if row}
    assert named["blk.0.attn_q.weight"][3] == "bf16"
    assert named["model.layers.0.self_attn.q_proj.weight"][3:] == ["bf16", *named["blk.0.attn_q.weight"][4:5], "merged"]
    assert named["model.norm.weight"][5:] == ["as", "in", "the", "base"]
    assert named["blk.0.attn_q.weight.lora_b"][2:4] == ["adapter", "bf16"]
    assert sum(row[-4:] == ["than", "asked", "for"] or "weight," in row for row in rows) >= 3
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--tensor-type", "attn_v"], "is not of the form REGEX=TYPE"),
        (["--tensor-type", "nothing=q8_0"], "it matches no tensor of this model"),
        (["--token-embedding-type", "q4_k_m"], "'q4_k_m' is not a type of a tensor"),
        (["--imatrix", "nowhere.gguf"], "cannot read nowhere.gguf"),
        (["--split-max-size", "much"], "--split-max-size 'much' is not a size"),
        (["--format", "ggml"], "formats"),
        (["--format", "gguf-lora", "--dry-run"], "there is no adapter to write"),
        (["--format", "gguf-lora"], "there is no adapter to write"),
    ],
)
def test_bad_options_are_answered_with_a_sentence(
    arguments: list[str], message: str, base: Path, tmp_path: Path
) -> None:
    types = [] if "--format" in arguments else ["-q", "q8_0"]
    assert message in sentence(edgetune("merge-export", "--base", base, *types, *arguments, "-o", tmp_path / "out"))
    assert not (tmp_path / "out").exists()


def test_the_former_name_of_search_types_is_refused_with_the_new_one() -> None:
    result = edgetune("merge-export", "run", "--tune")
    assert result.returncode == 2
    assert "--tune is now called --search-types" in sentence(result)
