"""A GGUF file as the base of a training, from the rows to the validated file."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest

import edgetune
from edgetune.config import parse_config
from edgetune.planning.base_model import find_base
from edgetune.planning.disk import dequantized_bytes
from edgetune.planning.prepare import prepare_run
from edgetune.training.loading import load_model
from edgetune.training.run import train
from edgetune_converters.architectures import Family
from edgetune_converters.files.contents import sha256_of

SAMPLES = Path(__file__).parents[2] / "samples"
FILE = SAMPLES / "smart-home" / "smart-home-q4_k_m.gguf"


def _config(base: Path, **changes: object) -> edgetune.config.Config:
    rows = {"train": str(SAMPLES / "fifty-rows" / "rows.jsonl"), "test": str(SAMPLES / "fifty-rows" / "test.jsonl")}
    training = {"max_steps": 2, "batch_size": 8, "max_length": 64, "learning_rate": 2e-3}
    return parse_config(
        {
            "name": "g", "base": str(base), "data": rows | {"max_rows": 24}, "training": training,
            "reference": {"max_new_tokens": 4, "task_rows": 2}, "export": {"types": ["q8_0"]}, **changes,
        }
    )  # fmt: skip


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> edgetune.RunDirectory:
    return train(_config(FILE), tmp_path_factory.mktemp("run") / "g")


def test_the_run_names_the_file_and_leaves_no_weights_behind(run: edgetune.RunDirectory) -> None:
    manifest = run.manifest
    assert (manifest.base.path, manifest.base.files) == (str(FILE), {FILE.name: sha256_of(FILE)})
    assert not list(run.path.glob("base*"))
    adapter = json.loads((run.adapter / "adapter_config.json").read_text())
    assert adapter["base_model_name_or_path"] == str(FILE)
    assert {"tokenizer.json", "tokenizer_config.json", "chat_template.jinja", "config.json"} <= {
        path.name for path in run.tokenizer.iterdir()
    }


def test_a_merge_into_the_base_of_training_is_the_trained_model(run: edgetune.RunDirectory, tmp_path: Path) -> None:
    """The export checks the scales of every NF4 weight against those of bitsandbytes, bit for bit."""
    (receipt,) = edgetune.export(run, types=["f32"], out=tmp_path / "x.gguf", merge_base="nf4")
    results = edgetune.validate(run, [receipt.artifact], with_task=False)
    (file,) = results.files
    assert file.figures.kld.value < 1e-4
    assert file.contract is not None
    assert file.contract.holds
    assert not file.mismatches


def test_resume_knows_a_file_that_has_changed(run: edgetune.RunDirectory, tmp_path: Path) -> None:
    other = tmp_path / FILE.name
    shutil.copy(FILE, other)
    config = _config(other)
    assert find_base(config).identity["files"] == run.manifest.base.files
    with other.open("r+b") as file:
        file.seek(-1, 2)
        last = file.read(1)
        file.seek(-1, 2)
        file.write(bytes([last[0] ^ 1]))
    assert find_base(config).identity["files"] != run.manifest.base.files


def test_the_plan_counts_the_dequantized_weights(capsys: pytest.CaptureFixture[str]) -> None:
    base = find_base(_config(FILE))
    assert dequantized_bytes(base.checkpoint) == 4 * 2_885_888
    edgetune.training.run.dry_run(_config(FILE), Path("runs") / "nowhere")
    assert "training starts from its dequantized weights, 11 MiB on the disk" in capsys.readouterr().err


def test_what_cannot_be_trained_is_refused_in_prepare(tmp_path: Path) -> None:
    name = len("qwen2").to_bytes(8, "little") + b"qwen2"
    (tmp_path / "x.gguf").write_bytes(FILE.read_bytes().replace(name, name[:-1] + b"X"))
    with pytest.raises(edgetune.EdgetuneError, match=r"llama\.cpp refuses the vocabulary .*qwenX"):
        prepare_run(_config(tmp_path / "x.gguf"))


def test_tensors_that_the_model_does_not_have_are_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    config = _config(FILE, quantization={"bits": 16})
    family = Family
    real = family.stored_name
    monkeypatch.setattr(family, "stored_name", lambda self, name: real(self, name).replace("o_proj", "out"))
    with pytest.raises(edgetune.EdgetuneError, match=r"o_proj|self_attn\.out"):
        load_model(find_base(config), config, tmp_path / "base")
