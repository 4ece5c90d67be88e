"""`edgetune train` with each method of PEFT: resume, size, and the exports that its facts promise or refuse."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers

from edgetune import cli
from edgetune.config import load_config
from edgetune.errors import EdgetuneError
from edgetune.methods import METHODS, Method
from edgetune.methods.base import LayerMethod
from edgetune.planning.disk import estimate_run_bytes
from edgetune.planning.prepare import prepare_run
from edgetune.reference.store import summary
from edgetune.runs.directory import RunDirectory
from edgetune.training import checkpoints
from edgetune_converters.files.contents import sha256_of
from tests.training import kinds, runs
from tests.training.interruptions import stop_after

F32_KLD = 1e-7
"""f32 on both sides, and the coding of the reference."""
FORMATS = ("gguf", "gguf-lora")
VARIANTS: dict[str, dict[str, Any]] = {
    **{kind: {} for kind, method in METHODS.items() if issubclass(method, LayerMethod)},
    "unilora": {"bound": 0.3},  # its few numbers change less than can be measured otherwise
    "lora with DoRA": {"kind": "lora", "use_dora": True, "rank_pattern": {"q_proj": 3}, "layers": [1]},
    "lora with PiSSA": {"kind": "lora", "init": "pissa", "use_rslora": True},
    "lora with CorDA": {"kind": "lora", "init": "corda", "target_modules": "mlp", "calibration_rows": 8},
    "lora with LoRA-GA": {"kind": "lora", "init": "lora_ga", "calibration_rows": 8},
    "lora with EVA": {"kind": "lora", "init": "eva", "loraplus_lr_ratio": 4, "target_modules": "q_v"},
    "lora with LoftQ": {"kind": "lora", "init": "loftq"},
    "lora with head": {"kind": "lora", "modules_to_save": ["lm_head"], "target_modules": "attention"},
    "lora with embedding": {"kind": "lora", "target_modules": ["q_proj", "embed_tokens"]},
    "lora on the head": {"kind": "lora", "target_modules": ["q_proj", "lm_head"]},
    "lora with DoRA on both ends": {"kind": "lora", "use_dora": True, "target_modules": ["embed_tokens", "lm_head"]},
    "oft on the head": {"kind": "oft", "target_modules": ["v_proj", "lm_head"]},
    "hira with embedding": {"kind": "hira", "target_modules": ["q_proj", "embed_tokens"]},
}
FAST = ("adalora", "oft", "ia3", "lora on the head")
EXPORTED = [name for name in VARIANTS if name not in METHODS or "gguf" not in METHODS[name].facts.not_as]
NAMES = [pytest.param(name, marks=[] if name in FAST else pytest.mark.slow) for name in EXPORTED]


def method_of(name: str) -> Method:
    options = VARIANTS[name]
    return kinds.method_of(options.get("kind", name), **{key: options[key] for key in options.keys() - {"kind"}})


def write_config(base: Path, folder: Path, name: str) -> Path:
    """A configuration on 4 bits where the method trains on them, and no format that it refuses."""
    method = method_of(name)
    trains_on_4 = 4 not in method.facts.not_on and not getattr(method, "moves_base", False)
    values = runs.settings(base, folder, max_steps=8, save_steps=3, eval_steps=4)
    values["adapter"] = method.model_dump(mode="json", exclude_unset=True)
    values["quantization"] = {"bits": 4 if trains_on_4 else 16}
    values["reference"] |= {"task_rows": 0}
    del values["data"]["test"]
    formats = [format_ for format_ in FORMATS if not why_not(method, format_)]
    merge_base = {"merge_base": "nf4"} if trains_on_4 else {}
    values["export"] = {"types": ["f32"], "formats": formats, **merge_base}
    if name == "beft":
        values["base"] = str(with_biases(folder / "base"))
    return runs.write_config(folder / "config.yaml", values)


def why_not(method: Method, format_: str) -> str | None:
    """Why a format is refused, or none of its exact files."""
    if format_ == "gguf-lora" and {"embed_tokens", "lm_head"} & set(getattr(method, "target_modules", [])):
        return "the embedding of this base is its output matrix"
    return method.why_not_as(format_) or (method.no_low_rank if format_ == "gguf-lora" else None)


def with_biases(directory: Path) -> Path:
    """The base with biases of the attention, which BEFT changes."""
    runs.make_base(directory)
    torch.manual_seed(0)
    model = transformers.LlamaForCausalLM(transformers.LlamaConfig(**runs.SHAPE, attention_bias=True))
    model.to(torch.bfloat16).save_pretrained(directory)
    return directory


def digests(run: RunDirectory) -> dict[str, str]:
    return {path.name: sha256_of(path) for path in run.adapter.iterdir()}


@pytest.mark.parametrize("name", NAMES)
def test_a_run_resumes_bit_for_bit_and_its_file_is_the_trained_model(name: str, base: Path, tmp_path: Path) -> None:
    config = write_config(base, tmp_path, name)
    whole, stopped = RunDirectory(tmp_path / "whole"), RunDirectory(tmp_path / "stopped")
    assert cli.run(["train", str(config), "-o", str(whole.path)]) == 0
    with pytest.MonkeyPatch.context() as patch:
        stop_after(5, patch)
        assert cli.run(["train", str(config), "-o", str(stopped.path)]) == 130
    assert [checkpoints.step_of(each) for each in checkpoints.list_complete(stopped.checkpoints)] == [3]
    assert cli.run(["train", str(config), "-o", str(stopped.path), "--resume"]) == 0
    assert digests(whole) == digests(stopped)
    assert not whole.train_results.adapter_is_zero
    entropy = summary(whole).cross_entropy
    assert entropy["trained"] < entropy["base"]

    prepared = prepare_run(load_config(config))
    used = sum(path.stat().st_size for path in whole.path.rglob("*") if path.is_file())
    assert used < estimate_run_bytes(prepared.config, prepared.base.checkpoint, prepared.reference_rows)

    file, measured = tmp_path / "model.gguf", tmp_path / "results.json"
    assert cli.run(["merge-export", str(stopped.path), "--format", "gguf", "-o", str(file)]) == 0
    # 3: this random model may write a stop token of the file within an answer
    assert cli.run(["validate", str(stopped.path), str(file), "--json", str(measured)]) in (0, 3)
    rungs = {rung["kind"]: rung for rung in json.loads(measured.read_text())["rungs"]}
    assert rungs["base"]["figures"]["kld"]["value"] > 1e-6
    assert rungs["file"]["figures"]["kld"]["value"] < F32_KLD


@pytest.mark.slow
@pytest.mark.parametrize("name", [name for name in EXPORTED if name != "lora with LoftQ"])
def test_gguf_lora_is_refused_exactly_where_the_export_refuses_it(
    name: str, base: Path, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    config = write_config(base, tmp_path, name)
    assert cli.run(["train", str(config), "-o", str(tmp_path / "run"), "--set", "training.max_steps=8"]) == 0
    command = [
        "merge-export",
        str(tmp_path / "run"),
        "--format",
        "gguf-lora",
        "-q",
        "f32",
        "-o",
        str(tmp_path / "a.gguf"),
    ]
    assert (cli.run(command) == 0) == (why_not(method_of(name), "gguf-lora") is None)


@pytest.mark.parametrize("kind", sorted(METHODS))
def test_a_format_that_a_method_cannot_have_is_refused_before_training(kind: str, tmp_path: Path) -> None:
    method = METHODS[kind]
    for format_, why in method.facts.not_as.items():
        values = {"base": "b", "data": {"train": "t.jsonl"}, "adapter": {"kind": kind}}
        values |= {"quantization": {"bits": 16}, "export": {"formats": [format_]}}
        with pytest.raises(EdgetuneError) as caught:
            load_config(runs.write_config(tmp_path / "config.yaml", values))
        assert why in caught.value.message
