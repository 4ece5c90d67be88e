"""Each bad input is one clear sentence, said before torch is imported, and leaves nothing behind."""

from __future__ import annotations

import importlib.util
import json
import re
import shutil
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import transformers

from edgetune import cli
from tests.converters import sentencepiece_files
from tests.training import runs

Said = Any


@pytest.fixture
def train(base: Path, tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> Said:
    """Run `edgetune train` on a changed configuration that must fail; returns what was said."""

    def call(code: int = 1, /, *flags: str, **sections: Any) -> str:
        values = runs.settings(base, tmp_path)
        for key, value in sections.items():
            values[key] = {**values[key], **value} if isinstance(value, dict) and key in values else value
        config = runs.write_config(tmp_path / "config.yaml", values)
        path = tmp_path / "run"
        assert cli.run(["train", str(config), "-o", str(path), *flags]) == code
        assert not path.exists()
        written = capfd.readouterr()
        assert written.out == ""
        return written.err

    return call


def test_a_missing_base_is_refused(train: Said, tmp_path: Path) -> None:
    assert f"there is no model directory {tmp_path / 'nothing'}" in train(base=str(tmp_path / "nothing"))


def test_an_empty_base_is_refused(train: Said, tmp_path: Path) -> None:
    (tmp_path / "empty").mkdir()
    assert "is empty" in train(base=str(tmp_path / "empty"))
    assert "base is empty; name a Hugging Face directory" in train(2, base="")


def test_pickles_are_refused(train: Said, base: Path, tmp_path: Path) -> None:
    pickled = shutil.copytree(base, tmp_path / "pickled")
    (pickled / "model.safetensors").rename(pickled / "pytorch_model.bin")
    said = train(base=str(pickled))
    assert "holds pickled weights (pytorch_model.bin); safetensors only" in said


def test_damaged_weights_are_refused(train: Said, base: Path, tmp_path: Path) -> None:
    damaged = shutil.copytree(base, tmp_path / "damaged")
    weights = damaged / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-10])
    assert "is truncated" in train(base=str(damaged))


def test_unknown_architecture(train: Said, base: Path, tmp_path: Path) -> None:
    other = shutil.copytree(base, tmp_path / "other")
    config = json.loads((other / "config.json").read_text())
    (other / "config.json").write_text(json.dumps({**config, "model_type": "hal", "architectures": ["HalForCausalLM"]}))
    said = train(base=str(other))
    assert "hal" in said.lower()
    assert "LlamaForCausalLM" in said


def test_base_without_template(train: Said, base: Path, tmp_path: Path) -> None:
    bare = shutil.copytree(base, tmp_path / "bare")
    (bare / "chat_template.jinja").unlink(missing_ok=True)
    config = json.loads((bare / "tokenizer_config.json").read_text())
    config.pop("chat_template", None)
    (bare / "tokenizer_config.json").write_text(json.dumps(config))
    said = train(base=str(bare))
    assert "has no chat template" in said
    assert "data.chat_template: alpaca" in said


def test_line_that_is_not_json(train: Said, tmp_path: Path) -> None:
    (tmp_path / "bad.jsonl").write_text('{"prompt": "q", "completion": "a"}\nhello\n')
    assert "bad.jsonl, line 2: not JSON" in train(data={"train": str(tmp_path / "bad.jsonl")})


def test_row_in_no_known_format(train: Said, tmp_path: Path) -> None:
    (tmp_path / "bad.jsonl").write_text('{"lines": "q"}\n')
    said = train(data={"train": str(tmp_path / "bad.jsonl")})
    assert "bad.jsonl, line 1: in no known format; its keys are lines" in said
    assert "docs/data.md" in said


def test_a_missing_data_file_is_refused(train: Said, tmp_path: Path) -> None:
    assert "there is no data file" in train(data={"validation": str(tmp_path / "nothing.jsonl")})


def test_expected_answers_are_checked_before_training(train: Said) -> None:
    assert "the expected answer 'red' is not JSON" in train(data={"answer": "json"})


def test_an_unknown_key_is_named_with_its_nearest_match(train: Said) -> None:
    assert "unknown key training.learnin_rate, did you mean training.learning_rate?" in train(
        2, training={"learnin_rate": 1}
    )


def test_unknown_export_type(train: Said) -> None:
    assert "'q9_9' is not a storage type" in train(2, export={"types": ["q9_9"]})
    said = " ".join(train(2, export={"types": ["q4km"]}).split())
    assert "'q4km' is not a storage type that can be written, did you mean q4_k_m?" in said


@pytest.mark.parametrize(
    "export",
    [
        {"formats": ["gguf", "onnx"], "types": ["q8_0", "q4_k_m", "int4"], "allow_fallback": True},
        {"formats": ["onnx"], "types": ["int4"]},
    ],
)
def test_types_of_every_format_are_taken(train: Said, export: dict[str, Any]) -> None:
    """As merge-export and make-rules take them."""
    assert "nothing was written" in train(0, "--dry-run", export=export)


def test_a_type_of_a_format_that_is_not_asked_for(train: Said) -> None:
    said = " ".join(train(2, "--dry-run", export={"types": ["q8_0", "int4"]}).split())
    assert "int4 is a type of onnx, not of gguf" in said
    assert "Add onnx to the formats" in said


def test_a_full_disk_is_reported_before_training(train: Said, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("edgetune.planning.disk.shutil.disk_usage", lambda path: SimpleNamespace(free=2**20))
    assert "MiB, and its disk has 1 MiB free" in train()


def test_without_the_train_extra(train: Said, monkeypatch: pytest.MonkeyPatch) -> None:
    found = importlib.util.find_spec
    absent = ("trl", "peft")
    monkeypatch.setattr(
        "edgetune.training.environment.importlib.util.find_spec",
        lambda name: None if name in absent else found(name),
    )
    said = train()
    assert "training needs peft, trl" in said
    assert "pip install 'edgetune[train]'" in said


@pytest.mark.parametrize("flags", [[], ["--dry-run"]])
@pytest.mark.parametrize(
    ("targets", "what"),
    [
        (["q_prj", "v_proj", "gate"], "adapter.target_modules: 'q_prj', 'gate' fit no linear layer"),
        (r".*\.nothing", "adapter.target_modules: '.*\\\\.nothing' fits no layer"),
    ],
)
def test_target_modules_are_checked_before_weights_are_loaded(
    train: Said, monkeypatch: pytest.MonkeyPatch, flags: list[str], targets: Any, what: str
) -> None:
    monkeypatch.setattr("edgetune.training.loading.load_model", lambda *_: pytest.fail("weights were loaded"))
    said = train(2, *flags, adapter={"target_modules": targets})
    assert what in said
    assert "q_proj, k_proj, v_proj, o_proj, gate_proj, up_proj, down_proj" in said


def test_a_sentencepiece_model_alone(train: Said, base: Path, tmp_path: Path) -> None:
    """It is not enough: how transformers cuts the text behind a special token depends on the class that reads it."""
    old = shutil.copytree(base, tmp_path / "old")
    (old / "tokenizer.json").unlink()
    (old / "tokenizer.model").write_bytes(sentencepiece_files.bpe())
    names = {"bos_token": "<s>", "eos_token": "</s>", "unk_token": "<unk>", "tokenizer_class": "LlamaTokenizer"}
    (old / "tokenizer_config.json").write_text(json.dumps(names))
    wanted = {"base": str(old), "data": {"chat_template": "plain"}}
    said = " ".join(train(1, "--dry-run", **wanted).split())
    assert "has tokenizer.model and no tokenizer.json" in said
    made = transformers.AutoTokenizer.from_pretrained(old)  # what the hint says
    made.save_pretrained(old)
    assert "nothing was written" in train(0, "--dry-run", **wanted)


def test_empty_answers_are_a_warning(train: Said, tmp_path: Path) -> None:
    rows = [{"instruction": f"question {number}", "output": "yes" if number % 3 else ""} for number in range(9)]
    (tmp_path / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    said = " ".join(train(0, "--dry-run", data={"train": str(tmp_path / "rows.jsonl")}).split())
    assert re.search(r"warning: [23] answers hold no text .* for example rows.jsonl, line \d", said)
    assert "hold no text" not in train(0, "--dry-run")


def test_held_out_rows_that_are_trained_on_are_a_warning(train: Said, tmp_path: Path) -> None:
    rows = [json.dumps({"instruction": f"question {number}", "output": f"yes {number}"}) + "\n" for number in range(9)]
    (tmp_path / "rows.jsonl").write_text("".join(rows))
    (tmp_path / "held.jsonl").write_text("".join(rows[:2]) + json.dumps({"instruction": "new", "output": "yes 1"}))
    for held, words in (("held.jsonl", "2 of 3"), ("rows.jsonl", "9 of 9")):
        data = {"train": str(tmp_path / "rows.jsonl"), "validation": str(tmp_path / held)}
        said = " ".join(train(0, "--dry-run", data=data).split())
        assert f"warning: {words} held-out rows are trained on too" in said
    assert "trained on too" not in train(0, "--dry-run", data={"train": str(tmp_path / "rows.jsonl")})


def test_a_small_held_out_set_is_a_warning(train: Said) -> None:
    said = " ".join(train(0, "--dry-run").split())
    assert re.search(r"warning: 4 held-out rows with \d\d scored tokens are a small sample: a difference in", said)
    assert "the standard errors, which assume independent tokens, are too small" in said


def test_dry_run_checks_everything_and_writes_nothing(train: Said) -> None:
    said = train(0, "--dry-run")
    assert "training: 64 rows" in said
    assert re.search(r"training will take about [\d.]+ MiB of memory .* estimate: weights [\d.]+ MiB, adapter", said)
    assert "nothing was written" in said


def test_fails_fast_without_torch(base: Path, tmp_path: Path) -> None:
    """What is wrong with a dataset is said before anything heavy is imported."""
    values = runs.settings(base, tmp_path)
    config = runs.write_config(tmp_path / "config.yaml", values)
    script = "import sys\nfrom edgetune import cli\ncode = cli.run(sys.argv[1:])\nprint(code, 'torch' in sys.modules)"
    arguments = ["train", str(config), "-o", str(tmp_path / "run")]
    (tmp_path / "train.jsonl").write_text("not json\n")
    failed = subprocess.run([sys.executable, "-c", script, *arguments], capture_output=True, text=True)
    assert failed.stdout.split() == ["1", "False"], failed.stderr
    assert "line 1: not JSON" in failed.stderr


def test_preview_without_color(base: Path, tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    config = runs.write_config(tmp_path / "config.yaml", runs.settings(base, tmp_path))
    assert cli.run(["preview", str(config), "--rows", "2"]) == 0
    out = capfd.readouterr().out
    assert "⟦red<|im_end|>⟧" in out
    assert "⟦green<|im_end|>⟧" in out
    assert "⟦blue" not in out
    assert "messages: 64 rows" in out


def test_preview_needs_neither_torch_nor_the_training_package(base: Path, tmp_path: Path) -> None:
    config = runs.write_config(tmp_path / "config.yaml", runs.settings(base, tmp_path))
    script = (
        "import sys\nfrom edgetune import cli\ncode = cli.run(['preview', sys.argv[1]])\n"
        "print(code, *[name for name in sys.modules if name == 'torch' or name.startswith('edgetune.training')])"
    )
    result = subprocess.run([sys.executable, "-c", script, str(config)], capture_output=True, text=True)
    assert result.stdout.splitlines()[-1] == "0", result.stderr
