"""`edgetune adopt`: run directories around adapters of other trainers, and what follows them; what is refused."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from safetensors.torch import load_file, save_file

from edgetune.reference import store
from edgetune.reference.store import Reference
from edgetune.runs.directory import RunDirectory
from edgetune.training import adopt as adoption
from tests.adoption import trainers
from tests.cli_runner import Result, edgetune, sentence
from tests.converters import tiny, vocabularies
from tests.data import templates
from tests.training import runs

torch: Any = pytest.importorskip("torch")

WEIGHTS, CONFIG = "adapter_model.safetensors", "adapter_config.json"
SHORT = ["--set", "reference.max_new_tokens=4", "--set", "export.types=[q8_0]", "--set", "reference.rows=8"]
Dress = Callable[[Path], Any]


def adopt(adapter: Path, base: Path, rows: Path, out: Path, *options: str | Path) -> Result:
    return edgetune("adopt", adapter, "--base", base, "--data", rows, "-o", out, *SHORT, *options)


def adopted(adapter: Path, base: Path, rows: Path, out: Path, *options: str | Path) -> RunDirectory:
    result = adopt(adapter, base, rows, out, *options)
    assert result.returncode == 0, result.stderr.decode()
    return RunDirectory.open(out)


def entropies(run: RunDirectory) -> dict[str, float]:
    return dict(store.summary(run).cross_entropy)


def dressed(lora: Path, folder: Path, dress: Dress) -> Path:
    shutil.copytree(lora, folder)
    (folder / "README.md").unlink(missing_ok=True)
    dress(folder)
    return folder


def state(folder: Path, **fields: Any) -> None:
    stated = json.loads((folder / CONFIG).read_text())
    (folder / CONFIG).write_text(json.dumps({**stated, **fields}))


@pytest.fixture(scope="module")
def plain(lora: Path, base: Path, rows: Path, tmp_path_factory: pytest.TempPathFactory) -> RunDirectory:
    """The adapter as PEFT left it, on the base as it is stored."""
    return adopted(lora, base, rows, tmp_path_factory.mktemp("plain") / "run")


@pytest.fixture(scope="module")
def rounded(lora: Path, base: Path, rows: Path, tmp_path_factory: pytest.TempPathFactory) -> RunDirectory:
    """The same on the base in 4 bits."""
    return adopted(lora, base, rows, tmp_path_factory.mktemp("rounded") / "run", "--set", "quantization.bits=4")


def test_the_reference_is_that_of_pefts_own_forward(plain: RunDirectory, lora: Path, base: Path) -> None:
    reference = Reference.open(plain.reference)
    ids, scored, where = next(iter(reference.rows))
    for adapter, stored in ((lora, "trained"), (None, "base")):
        logits = torch.from_numpy(tiny.torch_logits(base, adapter, ids.tolist()))
        expected = -torch.log_softmax(logits.double(), -1)[scored - 1, ids[scored]].numpy()
        found = getattr(reference, f"{stored}_nll")[where]
        np.testing.assert_allclose(found, expected, atol=1e-4)
    assert entropies(plain)["trained"] != pytest.approx(entropies(plain)["base"], abs=0.01)


def _mlx(folder: Path) -> None:
    tensors = load_file(folder / WEIGHTS)
    (folder / WEIGHTS).unlink()
    renamed = {}
    for name, tensor in tensors.items():
        own = name.removeprefix("base_model.model.").removesuffix(".weight")
        renamed[own[:-1] + own[-1].lower()] = tensor.T.contiguous()
    save_file(renamed, folder / "adapters.safetensors")
    parameters = {"rank": 4, "scale": 16.0, "dropout": 0.0}
    stated = {"fine_tune_type": "lora", "num_layers": 2, "lora_parameters": parameters, "model": "org/tiny-llama"}
    (folder / CONFIG).write_text(json.dumps(stated))


def _torchtune(folder: Path) -> None:
    stated = json.loads((folder / CONFIG).read_text())
    kept = ("r", "lora_alpha", "peft_type", "base_model_name_or_path")
    (folder / CONFIG).write_text(json.dumps({name: stated[name] for name in kept}))


def _wrapped(folder: Path) -> None:
    tensors = load_file(folder / WEIGHTS)
    renamed = {name.replace(".layers.", "._fsdp_wrapped_module.layers."): each for name, each in tensors.items()}
    save_file(renamed, folder / WEIGHTS)


def _named_adapter(folder: Path) -> None:
    tensors = load_file(folder / WEIGHTS)
    save_file({name.replace(".weight", ".default.weight"): each for name, each in tensors.items()}, folder / WEIGHTS)


def _pickled(folder: Path) -> None:
    torch.save(load_file(folder / WEIGHTS), folder / "adapter_model.bin")
    (folder / WEIGHTS).unlink()


def _checkpoint(folder: Path) -> None:
    (folder / "checkpoint-20").mkdir()
    for name in (WEIGHTS, CONFIG):
        (folder / name).rename(folder / "checkpoint-20" / name)
    trainers.write(folder, args__json=trainers.SWIFT, logging__jsonl=trainers.SWIFT_LOG)


def _swift(folder: Path) -> None:
    trainers.write(folder, args__json=trainers.SWIFT | {"model": "org/tiny-llama"}, logging__jsonl=trainers.SWIFT_LOG)
    state(folder, swift_type="LORA", lora_dtype="bf16", lorap_lr_ratio=16.0)


def _unsloth(folder: Path) -> None:
    mapping = {"base_model_class": "LlamaForCausalLM", "parent_library": "transformers", "unsloth_fixed": True}
    targets = "(?:.*?(?:q_proj|v_proj|down_proj).*?)"
    name = "unsloth/tiny-llama-bnb-4bit"
    state(folder, base_model_name_or_path=name, auto_mapping=mapping, target_modules=targets, task_type=None)


def _factory(folder: Path) -> None:
    trainers.write(folder, training_args__yaml=trainers.FACTORY, trainer_log__jsonl=trainers.FACTORY_LOG)


def _axolotl(folder: Path) -> None:
    trainers.write(folder, README__md=trainers.AXOLOTL_CARD.replace("{config}", trainers.AXOLOTL))


# trainer, bits of the base, steps of the log
DRESSES: dict[str, tuple[Dress, str, int, int]] = {
    "LLaMA-Factory": (_factory, "LLaMA-Factory", 4, 10),
    "Axolotl": (_axolotl, "Axolotl", 4, 20),
    "Unsloth": (_unsloth, "Unsloth", 4, 0),
    "ms-swift": (_swift, "ms-swift", 16, 5),
    "a checkpoint of ms-swift": (_checkpoint, "ms-swift", 16, 5),
    "torchtune": (_torchtune, "PEFT", 16, 0),
    "MLX": (_mlx, "MLX", 16, 0),
    "names of FSDP": (_wrapped, "PEFT", 16, 0),
    "names with the adapter's own": (_named_adapter, "PEFT", 16, 0),
    "a pickle": (_pickled, "PEFT", 16, 0),
}


@pytest.mark.parametrize("name", DRESSES)
def test_an_adapter_of_a_trainer_gives_the_reference_of_the_plain_one(
    name: str, lora: Path, base: Path, rows: Path, plain: RunDirectory, rounded: RunDirectory, tmp_path: Path
) -> None:
    dress, trainer, bits, steps = DRESSES[name]
    run = adopted(dressed(lora, tmp_path / "mine", dress), base, rows, tmp_path / "run")
    manifest = run.manifest
    assert manifest.adopted is not None
    assert manifest.adopted.trainer == trainer
    assert manifest.config["quantization"]["bits"] == bits
    assert manifest.config["export"]["merge_base"] == ("nf4" if bits == 4 else "original")
    assert (manifest.quantized is not None and bool(manifest.quantized["groups"])) is (bits == 4)
    assert entropies(run) == pytest.approx(entropies(rounded if bits == 4 else plain), abs=1e-6)
    assert run.train_results.steps == steps
    assert run.metrics_file.is_file() is (steps > 0)
    assert sorted(path.name for path in run.adapter.iterdir()) == [CONFIG, WEIGHTS]


@pytest.fixture(scope="module")
def of_factory(lora: Path, base: Path, rows: Path, tmp_path_factory: pytest.TempPathFactory) -> RunDirectory:
    folder = tmp_path_factory.mktemp("factory")
    test = runs.write_rows(folder / "test.jsonl", 4, 72)
    run = adopted(dressed(lora, folder / "mine", _factory), base, rows, folder / "run", "--test", test)
    assert edgetune("merge-export", run.path).returncode == 0
    return run


def test_export_validate_verify_and_report_work_as_for_a_run_of_our_own(of_factory: RunDirectory) -> None:
    file = of_factory.artifacts / "mine-q8_0.gguf"
    result = edgetune("validate", of_factory.path, file, "--gate", "mean_kld_max=0.001", "--gate", "task_drop_max=0.5")
    assert result.returncode == 0, result.stderr.decode()
    assert "contract holds" in result.stdout.decode() + result.stderr.decode()
    assert edgetune("verify", file).returncode == 0
    assert edgetune("report", of_factory.path).returncode == 0
    page = (of_factory.path / "report.html").read_text()
    assert "nf4, 4 bits" in page
    assert "LLaMA-Factory" in page
    assert edgetune("card", file, "--run", of_factory.path).returncode == 0
    assert "| trained by | LLaMA-Factory |" in (file.parent / "README.md").read_text()
    assert json.loads((of_factory.artifacts / "mine-q8_0.gguf.receipt.json").read_text())["merge_base"] == "nf4"


def test_the_other_merge_base_is_further_from_the_trained_model(of_factory: RunDirectory, tmp_path: Path) -> None:
    klds = {}
    for merge_base in ("nf4", "original"):
        file = tmp_path / f"{merge_base}.gguf"
        options: list[str | Path] = ["-q", "f32", "--merge-base", merge_base, "-o", file]
        assert edgetune("merge-export", of_factory.path, *options).returncode == 0
        assert edgetune("validate", of_factory.path, file, "--no-task", "--json", tmp_path / "v.json").returncode == 0
        found = json.loads((tmp_path / "v.json").read_text())
        klds[merge_base] = found["rungs"][-1]["figures"]["kld"]["value"]
    assert klds["nf4"] < 1e-7
    assert klds["original"] > 100 * klds["nf4"]


def test_the_manifest_states_what_is_known_and_nothing_else(of_factory: RunDirectory) -> None:
    manifest = of_factory.manifest
    assert manifest.config["training"] == {
        "batch_size": 2, "gradient_accumulation": 8, "learning_rate": 5e-5, "epochs": 3.0, "max_length": 96,
        "scheduler": "cosine", "optimizer": "adamw_torch",
    }  # fmt: skip
    assert manifest.data["train"] == []
    assert manifest.stages.train is not None
    assert manifest.stages.train.loss_last == 1.1
    assert set(manifest.stages.train.rows) == {"validation"}
    assert not of_factory.ngrams.exists()  # no rows of the training are known
    shown = " ".join(edgetune("inspect", of_factory.path).stdout.decode().split())
    assert f"adopted path {of_factory.path.parent / 'mine'} trainer LLaMA-Factory" in shown


def test_the_reference_is_recaptured_like_any_other(of_factory: RunDirectory, tmp_path: Path) -> None:
    copy = tmp_path / "moved"
    shutil.copytree(of_factory.path, copy)
    result = edgetune("reference", copy, "--count", "4")
    assert result.returncode == 0, result.stderr.decode()
    assert store.summary(RunDirectory.open(copy)).rows == 4


# -- tokenizer and template --------------------------------------------------------------------------------------------


def test_tokenizer_and_template_beside_the_adapter_are_those_of_the_run(
    lora: Path, base: Path, rows: Path, tmp_path: Path
) -> None:
    template = templates.CHATML.replace("<|im_end|>", "<tool>")

    def dress(folder: Path) -> None:
        for name in ("tokenizer.json", "tokenizer_config.json"):
            shutil.copy(base / name, folder)
        stated = json.loads((folder / "tokenizer_config.json").read_text())
        stated |= {"eos_token": "<tool>", "chat_template": template}
        (folder / "tokenizer_config.json").write_text(json.dumps(stated))

    adapter = dressed(lora, tmp_path / "mine", dress)
    result = adopt(adapter, base, rows, tmp_path / "run")
    assert result.returncode == 0, result.stderr.decode()
    said = " ".join(result.stderr.decode().split())
    assert f"the chat template is that in {adapter}" in said
    run = RunDirectory.open(tmp_path / "run")
    assert run.train_results.stop_tokens == ["<tool>"]
    assert (run.tokenizer / "chat_template.jinja").read_text() == template
    shutil.rmtree(adapter)  # the run has all that it needs
    assert edgetune("reference", run.path, "--count", "3").returncode == 0
    assert edgetune("merge-export", run.path, "-q", "q8_0").returncode == 0
    assert edgetune("validate", run.path, run.artifacts / "mine-q8_0.gguf", "--no-task").returncode == 0


def test_a_tokenizer_without_template_leaves_that_of_the_base(
    lora: Path, base: Path, rows: Path, tmp_path: Path
) -> None:
    adapter = dressed(lora, tmp_path / "mine", lambda folder: None)
    vocabularies.byte_level(adapter, chat_template=None)
    result = adopt(adapter, base, rows, tmp_path / "run", "--dry-run")
    assert result.returncode == 0, result.stderr.decode()
    assert "the chat template is the base's" in " ".join(result.stderr.decode().split())


def test_the_base_own_tokenizer_is_taken_where_it_is_asked_for(
    lora: Path, base: Path, rows: Path, tmp_path: Path
) -> None:
    adapter = dressed(lora, tmp_path / "mine", lambda folder: None)
    vocabularies.byte_level(adapter, chat_template=templates.MISTRAL)
    result = adopt(adapter, base, rows, tmp_path / "run", "--dry-run", "--set", "tokenizer=null")
    assert "the tokenizer is the base's, as --set says; the chat template is the base's" in " ".join(
        result.stderr.decode().split()
    )


# -- other methods -----------------------------------------------------------------------------------------------------


OTHERS: dict[str, tuple[str, dict[str, Any]]] = {
    "IA3": ("IA3Config", {"feedforward_modules": ["down_proj"]}),
    "LoHa": ("LoHaConfig", {"r": 4}),
    "VeRA": ("VeraConfig", {"r": 4}),
    "DoRA": ("LoraConfig", {"r": 4, "use_dora": True}),
    "PiSSA, whose start moved the base": ("LoraConfig", {"r": 4, "init_lora_weights": "pissa"}),
    "modules that are trained in full": ("LoraConfig", {"r": 4, "modules_to_save": ["lm_head"]}),
}


@pytest.mark.parametrize("name", OTHERS)
def test_adapters_of_other_methods_are_adopted(name: str, base: Path, rows: Path, tmp_path: Path) -> None:
    import peft
    import transformers

    kind, options = OTHERS[name]
    model = transformers.AutoModelForCausalLM.from_pretrained(base, dtype=torch.float32)
    targets = ["q_proj", "down_proj"]
    made = peft.get_peft_model(model, getattr(peft, kind)(task_type="CAUSAL_LM", target_modules=targets, **options))
    torch.manual_seed(3)
    with torch.no_grad():
        for parameter in made.parameters():
            if parameter.requires_grad:
                parameter.add_(torch.randn_like(parameter) * 0.3)
    made.save_pretrained(tmp_path / "mine")
    run = adopted(tmp_path / "mine", base, rows, tmp_path / "run")
    assert edgetune("merge-export", run.path, "-q", "f32").returncode == 0
    file = run.artifacts / "mine-f32.gguf"
    result = edgetune("validate", run.path, file, "--no-task", "--gate", "mean_kld_max=1e-6")
    assert result.returncode == 0, result.stderr.decode()


# -- doubts ------------------------------------------------------------------------------------------------------------


def warned(lora: Path, base: Path, rows: Path, folder: Path, dress: Dress, *options: str | Path) -> str:
    result = adopt(dressed(lora, folder / "mine", dress), base, rows, folder / "run", "--dry-run", *options)
    assert result.returncode == 0, result.stderr.decode()
    assert not (folder / "run").exists()
    return " ".join(result.stderr.decode().split())


def test_a_base_of_another_name_is_warned_of(lora: Path, base: Path, rows: Path, tmp_path: Path) -> None:
    said = warned(lora, base, rows, tmp_path, lambda folder: state(folder, base_model_name_or_path="org/Other-7B"))
    assert "warning: the adapter names another base: org/Other-7B (base_model_name_or_path in " in said


def test_a_copy_of_the_base_is_known_by_its_hashes(lora: Path, base: Path, rows: Path, tmp_path: Path) -> None:
    copy = shutil.copytree(base, tmp_path / "copy")
    said = warned(lora, copy, rows, tmp_path, lambda folder: None)
    assert f"whose weights have the hashes of {base}" in said


def test_a_precision_that_nothing_states_is_warned_of(lora: Path, base: Path, rows: Path, tmp_path: Path) -> None:
    said = warned(lora, base, rows, tmp_path, lambda folder: None)
    assert "warning: no file beside the adapter states the precision of the base" in said
    assert "--set quantization.bits=4" in said


def test_a_quantization_that_is_not_that_of_bitsandbytes_is_warned_of(
    lora: Path, base: Path, rows: Path, tmp_path: Path
) -> None:
    stated = trainers.SWIFT | {"quant_method": "hqq", "quant_bits": 4}
    said = warned(lora, base, rows, tmp_path, lambda folder: trainers.write(folder, args__json=stated))
    assert "warning: the base was 4 bits of hqq in training" in said
    assert "merge base original" in said


def test_a_system_prompt_of_the_training_is_missed_in_the_rows(
    lora: Path, base: Path, rows: Path, tmp_path: Path
) -> None:
    stated = trainers.SWIFT | {"system": "You are a lamp."}
    said = warned(lora, base, rows, tmp_path, lambda folder: trainers.write(folder, args__json=stated))
    assert "24 of 24 held-out rows have none" in said


def test_held_out_rows_that_were_trained_on_are_warned_of(lora: Path, base: Path, rows: Path, tmp_path: Path) -> None:
    stated = trainers.SWIFT | {"dataset": [str(rows)]}
    said = warned(lora, base, rows, tmp_path, lambda folder: trainers.write(folder, args__json=stated))
    assert "are those of the training, as its arguments say" in said
    said = warned(lora, base, rows, tmp_path / "b", lambda folder: None, "--set", f"data.train={rows}")
    assert "24 held-out rows are in data.train too" in said


# -- what is refused ---------------------------------------------------------------------------------------------------


def refused(adapter: Path, base: Path, rows: Path, folder: Path, *options: str | Path) -> str:
    result = adopt(adapter, base, rows, folder / "refused", "--dry-run", *options)
    assert result.returncode in (1, 2)
    assert not (folder / "refused").exists()
    return " ".join(sentence(result).split())


def test_an_adapter_of_another_base_is_refused(lora: Path, rows: Path, tmp_path: Path) -> None:
    other = tiny.base("qwen2", tmp_path / "other")
    vocabularies.byte_level(other, chat_template=templates.CHATML)
    adapter = dressed(lora, tmp_path / "mine", lambda folder: state(folder, base_model_name_or_path="org/other"))
    said = refused(adapter, other, rows, tmp_path)
    assert "Was it trained on this base model?" in said


def test_a_base_with_other_weights_is_refused(lora: Path, base: Path, rows: Path, tmp_path: Path) -> None:
    other = shutil.copytree(base, tmp_path / "other")
    content = bytearray((other / "model.safetensors").read_bytes())
    content[-2] ^= 1
    (other / "model.safetensors").write_bytes(content)
    said = refused(lora, other, rows, tmp_path)
    assert f"it was trained on {base} (base_model_name_or_path in adapter_config.json)" in said
    assert "and model.safetensors differ" in said


@pytest.mark.parametrize(
    ("dress", "words"),
    [
        (lambda folder: state(folder, task_type="SEQ_CLS"), "states the task SEQ_CLS"),
        (
            lambda folder: trainers.write(folder, training_args__yaml=trainers.FACTORY.replace("sft", "rm")),
            "is the adapter of a reward model (stage in training_args.yaml is rm)",
        ),
        (lambda folder: (folder / WEIGHTS).unlink(), "Was the download or the training interrupted?"),
        (lambda folder: trainers.write(folder, args__json="{"), "args.json cannot be read"),
        (lambda folder: state(folder, peft_type="POLY"), "cannot be merged"),
        (lambda folder: state(folder, target_modules=["q_proj", "v_proj"]), "by PEFT"),
    ],
)
def test_what_is_no_adapter_of_a_language_model_is_refused(
    dress: Callable[[Path], Any], words: str, lora: Path, base: Path, rows: Path, tmp_path: Path
) -> None:
    said = refused(dressed(lora, tmp_path / "mine", dress), base, rows, tmp_path)
    assert words in said


def test_an_adapter_with_a_resized_vocabulary_is_refused(base: Path, rows: Path, tmp_path: Path) -> None:
    import peft
    import transformers

    model = transformers.AutoModelForCausalLM.from_pretrained(base, dtype=torch.float32)
    model.resize_token_embeddings(540)
    made = peft.get_peft_model(
        model,
        peft.LoraConfig(task_type="CAUSAL_LM", target_modules=["q_proj"], modules_to_save=["embed_tokens", "lm_head"]),
    )
    with torch.no_grad():
        for name, parameter in made.named_parameters():
            if "lora_B" in name:
                parameter.normal_(0, 0.1)
    made.save_pretrained(tmp_path / "mine")
    said = refused(tmp_path / "mine", base, rows, tmp_path)
    assert "has 540 rows of embeddings and the base 512" in said


def test_the_method_cannot_be_set(lora: Path, base: Path, rows: Path, tmp_path: Path) -> None:
    said = refused(lora, base, rows, tmp_path, "--set", "adapter.r=8")
    assert "the method of an adapter is read from its adapter_config.json" in said


def test_the_adapter_of_a_run_is_refused(plain: RunDirectory, base: Path, rows: Path, tmp_path: Path) -> None:
    said = refused(plain.adapter, base, rows, tmp_path)
    assert "Give the run directory to `edgetune merge-export` and `edgetune validate`" in said


# -- interruptions -----------------------------------------------------------------------------------------------------


def test_a_stopped_adoption_is_resumed(
    lora: Path, base: Path, rows: Path, plain: RunDirectory, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def stop(*_: Any) -> None:
        raise KeyboardInterrupt

    run = tmp_path / "run"
    with monkeypatch.context() as patch:
        patch.setattr("edgetune.training.capture.reference.capture_task_answers", stop)
        result = adopt(lora, base, rows, run)
    assert result.returncode == 130
    assert "--resume" in result.stderr.decode()
    exported = edgetune("merge-export", run)
    assert "edgetune adopt ADAPTER" in " ".join(exported.stderr.decode().split())
    again = adopt(lora, base, rows, run)
    assert "holds an unfinished run" in again.stderr.decode()
    other = adopt(lora, base, rows, run, "--resume", "--set", "quantization.bits=4")
    assert "was started with another adapter, base, rows or options" in " ".join(other.stderr.decode().split())
    resumed = adopt(lora, base, rows, run, "--resume")
    assert resumed.returncode == 0, resumed.stderr.decode()
    assert "resuming after" in resumed.stderr.decode()
    assert entropies(RunDirectory.open(run)) == entropies(plain)
    finished = adopt(lora, base, rows, run, "--resume")
    assert "there is nothing to resume" in finished.stderr.decode()


def test_rows_of_the_training_are_kept_for_guessing_and_calibration(
    lora: Path, base: Path, rows: Path, tmp_path: Path
) -> None:
    train = runs.write_rows(tmp_path / "train.jsonl", 16, 100)
    run = adopted(lora, base, rows, tmp_path / "run", "--set", f"data.train={train}")
    assert run.ngrams.is_file()
    assert run.calibration.is_file()
    assert [source["rows"] for source in run.manifest.data["train"]] == [16]
    without = adopted(lora, base, rows, tmp_path / "other")
    assert not without.calibration.exists()
    result = edgetune("merge-export", without.path, "-q", "q4_k_m", "--allow-fallback", "--imatrix", "auto")
    assert "Adopt it again with --set data.train=ROWS" in " ".join(result.stderr.decode().split())


def test_python_programs_adopt_too(lora: Path, base: Path, rows: Path, tmp_path: Path) -> None:
    from edgetune.adoption.request import AdoptionRequest

    request = AdoptionRequest(lora, str(base), str(rows), overrides=("reference.rows=2", "reference.max_new_tokens=2"))
    run = adoption.adopt(request, tmp_path / "run")
    assert run.is_finished
    assert "perplexity" in adoption.format_summary(run)
