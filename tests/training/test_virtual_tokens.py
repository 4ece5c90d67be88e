"""Methods with virtual tokens from the configuration to the validated file, and resumed bit for bit."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import rich
import torch
import yaml
from peft import PeftModel
from safetensors.numpy import load_file
from transformers import AutoModelForCausalLM, AutoTokenizer

import edgetune
from edgetune import console
from edgetune.config import Config, load_config
from edgetune.errors import ConfigError, DataError, EdgetuneError
from edgetune.exporting.run import export_run
from edgetune.objectives import OBJECTIVES
from edgetune.planning.prepare import prepare_run
from edgetune.reference.store import Reference
from edgetune.runs.directory import RunDirectory
from edgetune.runtime import load
from edgetune.training import checkpoints
from edgetune.training.adapters.virtual_tokens import PARAMETERS_FILE
from edgetune.training.run import dry_run, train
from edgetune.validation import ladder
from edgetune.validation.results import ValidationResults
from edgetune.validation.table import format_table
from edgetune.validation.validate import validate_run
from edgetune_converters.gguf import keys, reader
from tests.converters import family_models
from tests.training import runs
from tests.training.objectives import encoded

TOKENS = 5
SOFT: dict[str, dict[str, Any]] = {
    "prompt-tuning": {},
    "prompt-tuning-text": {"kind": "prompt-tuning", "init": "text", "init_text": "Answer with the color."},
    "p-tuning": {"encoder_hidden_size": 32},
    "p-tuning-lstm": {"kind": "p-tuning", "encoder": "lstm", "encoder_hidden_size": 32},
    "multitask-prompt-tuning": {"ranks": 2},
    "prefix-tuning": {},
    "prefix-tuning-projected": {"kind": "prefix-tuning", "projection": True, "encoder_hidden_size": 32},
}


def config(base: Path, folder: Path, name: str, **training: Any) -> Path:
    adapter = {"kind": name, "tokens": TOKENS, **SOFT.get(name, {})}
    steps = {"max_steps": 6, "save_steps": 3, "eval_steps": 3, "learning_rate": 0.05, **training}
    folder.mkdir(exist_ok=True)
    steps |= {"gradient_checkpointing": False} if adapter["kind"] == "prefix-tuning" else {}
    values = runs.settings(base, folder, **steps) | {"adapter": adapter, "quantization": {"bits": 16}}
    values["export"] = {"types": ["f32"]}
    return runs.write_config(folder / "config.yaml", values)


def peft_logits(base: Path, adapter: Path, ids: list[int]) -> Any:
    model = AutoModelForCausalLM.from_pretrained(base, dtype=torch.float32)
    model = PeftModel.from_pretrained(model, str(adapter)).eval()
    more = {"task_ids": torch.tensor([0])} if model.active_peft_config.peft_type == "MULTITASK_PROMPT_TUNING" else {}
    with torch.no_grad():
        return model(torch.tensor([ids]), **more).logits[0].float().numpy()[-len(ids) :]


@pytest.mark.parametrize("name", SOFT)
def test_a_run_is_exported_validated_and_answers(base: Path, name: str, tmp_path: Path) -> None:
    run = train(config(base, tmp_path / "rows", name), tmp_path / "run")
    results = run.train_results
    assert results.loss_last < results.loss_first
    reference = Reference.open(run.reference)
    ids, positions, where = next(iter(reference.rows))
    wanted = peft_logits(base, run.adapter, ids.tolist())[positions - 1]
    stored = reference.compare(where.start, np.ascontiguousarray(wanted))
    assert stored.kld.max() < 1e-5  # the reference is that of PEFT's own forward; log-probabilities are stored in f16
    (receipt,) = export_run(run)
    found = ladder.measure_ladder(run, [Path(receipt.artifact)], ladder.Options(threads=1), console.count_progress)
    (rung,) = found.files
    assert rung.contract is not None
    assert not rung.contract.differences
    assert rung.mismatches == []
    assert rung.figures.kld.value < 1e-4
    assert rung.task is not None
    assert rung.task.same_as_trained == rung.task.rows
    with load(receipt.artifact, threads=1) as runtime:
        assert runtime.vocabulary_size == reference.vocab_size
        assert runtime.hidden_rows == 0  # the soft prompt has unused rows of the base, and a prefix none
    assert rung.hidden is None


def test_the_probability_of_added_rows_is_in_the_results(
    base: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    full = without_unused_rows(base, tmp_path / "full")
    run = train(config(full, tmp_path / "rows", "prompt-tuning"), tmp_path / "run")
    (receipt,) = export_run(run)
    found = edgetune.validate(run, [receipt.artifact])
    (rung,) = found.files
    assert rung.figures.kld.value < 1e-4  # the figures leave the rows out
    hidden, vocabulary = rung.hidden, Reference.open(run.reference).vocab_size
    assert hidden is not None
    assert hidden.rows == TOKENS
    assert 0 < hidden.mean <= hidden.largest <= TOKENS / vocabulary
    assert hidden.divergence == pytest.approx(hidden.mean, rel=TOKENS / vocabulary)  # -log(1 - x) of a small x
    assert ValidationResults.model_validate_json(found.model_dump_json()).files[0].hidden == hidden
    capsys.readouterr()
    rich.print(format_table(found))
    printed = " ".join(capsys.readouterr().out.split())
    assert f"the {TOKENS} rows that the soft prompt adds to the vocabulary take a share of" in printed


def without_unused_rows(base: Path, directory: Path) -> Path:
    """The base with as many rows of the vocabulary as its tokenizer has tokens."""
    shutil.copytree(base, directory)
    model = AutoModelForCausalLM.from_pretrained(base)
    model.resize_token_embeddings(len(AutoTokenizer.from_pretrained(base)), mean_resizing=False)
    model.save_pretrained(directory)
    return directory


RESUMED = ("prompt-tuning", "p-tuning-lstm", "multitask-prompt-tuning", "prefix-tuning-projected", "adaption-prompt")


@pytest.mark.parametrize("name", RESUMED)
def test_a_resumed_run_equals_an_uninterrupted_one(base: Path, name: str, tmp_path: Path) -> None:
    path = config(base, tmp_path / "rows", name)
    overrides = ["export.formats=[]"] + ["adapter.upper_layers=2"] * (name == "adaption-prompt")
    whole = train(path, tmp_path / "whole", overrides=overrides)
    run = RunDirectory(tmp_path / "stopped")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("edgetune.training.fit._save_adapter", _stop)
        with pytest.raises(InterruptedError):
            train(path, run.path, overrides=overrides)
    last = checkpoints.latest_complete(run.checkpoints)
    assert last is not None
    assert (last / PARAMETERS_FILE).is_file()
    checkpoints.prune(run.checkpoints, 2)
    for later in checkpoints.list_complete(run.checkpoints)[1:]:
        (later / checkpoints.MARKER).unlink()
    resumed = train(path, run.path, resume=True, overrides=overrides)
    weights = [load_file(each.adapter / "adapter_model.safetensors") for each in (whole, resumed)]
    assert weights[0].keys() == weights[1].keys()
    for key, values in weights[0].items():
        assert np.array_equal(values, weights[1][key]), key


def _stop(*arguments: Any) -> None:
    raise InterruptedError


def two_tasks(base: Path, folder: Path) -> Path:
    """Rows of two tasks, which give the same questions other answers; the second task is exported."""
    path = config(base, folder, "multitask-prompt-tuning", max_steps=40, save_steps=20, eval_steps=20)
    values = yaml.safe_load(path.read_text())
    values["adapter"]["tasks"] = ["first", "last"]
    values["data"] |= {"columns": {"task": "kind"}}
    values["export"]["prompt_task"] = 1
    for part in ("train", "validation", "test"):
        file = Path(values["data"][part])
        rows = [json.loads(line) for line in file.read_text().splitlines()]
        found = []
        for row in rows:
            question, answer = row["messages"]
            other = {**answer, "content": answer["content"][::-1]}
            found += [{**row, "kind": "first"}, {"messages": [question, other], "kind": "last"}]
        file.write_text("".join(json.dumps(row) + "\n" for row in found))
    return runs.write_config(path, values)


def test_several_tasks_are_trained_and_one_is_exported(
    base: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path = two_tasks(base, tmp_path / "rows")
    prepared = prepare_run(load_config(path))
    assert set(prepared.train.tasks) == {"first", "last"}
    assert len(prepared.train.tasks) == len(prepared.train.rows)
    assert set(prepared.validation.tasks) == {"last"}
    assert "held-out rows of the task 'last' alone" in " ".join(capsys.readouterr().err.split())
    run = train(path, tmp_path / "run")
    assert run.train_results.loss_last < run.train_results.loss_first
    stored = load_file(run.adapter / "adapter_model.safetensors")
    assert len(stored["prefix_task_cols"]) == 2
    model = PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(base, dtype=torch.float32), run.adapter)
    rows, tasks = prepared.train.rows, prepared.train.tasks
    for own, name in enumerate(("first", "last")):
        of_task = [row for row, task in zip(rows, tasks, strict=True) if task == name]
        losses = [np.mean([_loss(model, row, number) for row in of_task]) for number in (0, 1)]
        assert losses[own] < losses[1 - own] - 0.005
    (receipt,) = export_run(run)
    found = ladder.measure_ladder(run, [Path(receipt.artifact)], ladder.Options(threads=1), console.count_progress)
    assert found.files[0].figures.kld.value < 1e-4
    assert found.files[0].task is not None
    assert found.files[0].task.same_as_trained == found.files[0].task.rows
    _check_file_of_other_task(run, tmp_path, capsys)
    again = train(path, tmp_path / "again")
    adapters = [load_file(each.adapter / "adapter_model.safetensors") for each in (run, again)]
    assert all(np.array_equal(values, adapters[1][name]) for name, values in adapters[0].items())


def _check_file_of_other_task(run: RunDirectory, folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """It is written with a warning and without golden answers, and the validation says that it cannot be compared."""
    own = reader.read(run.artifacts / "run-f32.gguf").metadata
    assert own[keys.PROMPT_TASK] == "1"
    assert keys.GOLDEN in own
    capsys.readouterr()
    (receipt,) = export_run(run, out=folder / "first.gguf", prompt_task="first")
    said = " ".join(capsys.readouterr().err.split())
    assert "prompt of the task 'first', and the reference of the run was captured with that of 'last'" in said
    assert keys.GOLDEN not in reader.read(Path(receipt.artifact)).metadata
    results = validate_run(run, receipt.artifact, with_task=False, threads=1)
    assert not results.passed
    assert "holds the prompt of task 0, and the reference of this run was captured with task 1" in str(results.misses)
    with pytest.raises(ConfigError, match="the adapter has no task 'other'; they are first, last"):
        export_run(run, prompt_task="other")


def _loss(model: Any, row: Any, task: int) -> float:
    ids, labels = torch.tensor([row.input_ids]), torch.tensor([row.labels])
    with torch.no_grad():
        return float(model.eval()(input_ids=ids, labels=labels, task_ids=torch.tensor([task])).loss)


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        (["data.columns.task=null"], "nothing says which rows are of which task"),
        (["adapter.tasks=[first, other]"], "line 2 has the task 'last', and adapter.tasks names first, other"),
        (["adapter.tasks=[first, last, none]"], "no training row is of the task 'none'"),
        (["adapter.tasks=[]", "export.prompt_task=null"], "data.columns.task names the key 'kind'"),
        (["adapter.tasks=[first]"], "adapter.tasks names several different tasks"),
        (["export.prompt_task=2"], "export.prompt_task is 2, and the adapter has 2 tasks, counted from 0"),
        (["export.prompt_task=lst"], "export.prompt_task is 'lst', and adapter.tasks names first, last: correct it"),
        (["data.columns.task=null", "export.prompt_task=lst"], "2 problems with tasks:"),
        (["data.columns.task=other"], "data.columns names 'other' (task), which no row has"),
    ],
)
def test_tasks_that_do_not_fit_the_rows_are_refused(
    overrides: list[str], message: str, base: Path, tmp_path: Path
) -> None:
    path = two_tasks(base, tmp_path / "rows")
    with pytest.raises(EdgetuneError) as refused:
        prepare_run(load_config(path, overrides))
    assert message in refused.value.message


def test_the_loss_is_that_of_peft_on_answers_alone(base: Path, tmp_path: Path) -> None:
    run = train(config(base, tmp_path / "rows", "prompt-tuning"), tmp_path / "run")
    prepared = prepare_run(load_config(tmp_path / "rows/config.yaml", []))
    losses = []
    for row in prepared.validation.rows:
        logits = torch.from_numpy(peft_logits(base, run.adapter, list(row.input_ids)))
        kept = [index for index, label in enumerate(row.labels) if label != -100]
        targets = torch.tensor([row.labels[index] for index in kept])
        rows = logits[[index - 1 for index in kept]]
        losses += torch.nn.functional.cross_entropy(rows, targets, reduction="none").tolist()
    assert run.train_results.eval_loss == pytest.approx(np.mean(losses), rel=2e-3)


def test_a_soft_prompt_longer_than_the_context_is_refused(base: Path, tmp_path: Path) -> None:
    path = config(base, tmp_path / "rows", "prompt-tuning")
    with pytest.raises(ConfigError, match=r"adapter.tokens is 256, and the base was made for 256 tokens"):
        prepare_run(load_config(path, ["adapter.tokens=256"]))
    with pytest.raises(DataError, match=r"the base was made for 256, of which adapter.tokens takes 250"):
        prepare_run(load_config(path, ["adapter.tokens=250"]))
    prepare_run(load_config(path, ["adapter.tokens=128"]))


def test_llama_adapter_is_trained_without_export(base: Path, tmp_path: Path) -> None:
    path = config(base, tmp_path / "rows", "adaption-prompt")
    with pytest.raises(ConfigError, match="LLaMA-Adapter cannot be exported as gguf: its layers attend to the prompt"):
        load_config(path, ["adapter.upper_layers=2"])
    run = train(path, tmp_path / "run", overrides=["adapter.upper_layers=2", "export.formats=[]"])
    assert run.train_results.loss_last < run.train_results.loss_first
    reference = Reference.open(run.reference)
    ids, positions, where = next(iter(reference.rows))
    wanted = peft_logits(base, run.adapter, ids.tolist())[positions - 1]
    assert reference.compare(where.start, np.ascontiguousarray(wanted)).kld.max() < 1e-5
    with pytest.raises(ConfigError, match="LLaMA-Adapter cannot be exported as gguf"):
        export_run(run, formats=["gguf"])


@pytest.mark.parametrize("name", ["prompt-tuning", "p-tuning", "prefix-tuning"])
def test_a_base_in_4_bits_is_trained_and_validated(base: Path, name: str, tmp_path: Path) -> None:
    path = config(base, tmp_path / "rows", name)
    run = train(path, tmp_path / "run", overrides=["quantization.bits=4", "export.merge_base=nf4"])
    (receipt,) = export_run(run)
    found = ladder.measure_ladder(run, [Path(receipt.artifact)], ladder.Options(threads=1), console.count_progress)
    (rung,) = found.files
    assert rung.figures.kld.value < 1e-4


@pytest.mark.parametrize(
    ("name", "overrides", "message"),
    [
        ("prefix-tuning", ["training.gradient_checkpointing=true"], "set training.gradient_checkpointing: false"),
        ("prefix-tuning", ["export.formats=[safetensors]"], "prefix tuning cannot be exported as safetensors"),
        ("prompt-tuning", ["export.formats=[gguf-lora]"], "a soft prompt changes no matrix"),
        ("p-tuning", ["export.merge_base=auto"], "set export.merge_base: original, or nf4"),
    ],
)
def test_contradictions_are_named(base: Path, name: str, overrides: list[str], message: str, tmp_path: Path) -> None:
    path = config(base, tmp_path / "rows", name)
    with pytest.raises(ConfigError, match=message):
        load_config(path, overrides)


@pytest.mark.parametrize("objective", sorted(OBJECTIVES))
@pytest.mark.parametrize("name", ["prompt-tuning", "prefix-tuning"])
def test_an_objective_is_trained_or_refused_before_training(
    base: Path, name: str, objective: str, tmp_path: Path
) -> None:
    path = config(base, tmp_path / "rows", name)
    overrides = [f"objective.kind={objective}", "objective.num_generations=4"][: 1 + (objective in ("grpo", "rloo"))]
    overrides += ["objective.teacher=teacher"] * (objective == "distillation")
    if objective in ("sft", "pretrain"):
        assert load_config(path, overrides).objective.kind == objective
        return
    with pytest.raises(ConfigError) as caught:
        load_config(path, overrides)
    said = f"adapter.kind: {name} cannot be trained with objective.kind: {objective}, whose trainer does not know"
    assert said in caught.value.message


def test_a_soft_prompt_is_pretrained_exported_and_validated(base: Path, tmp_path: Path) -> None:
    path = config(base, tmp_path / "rows", "prompt-tuning")
    files = [encoded.write_rows(tmp_path / f"{split}.jsonl", "pretrain", 24) for split in ("train", "validation")]
    settings = ["objective.kind=pretrain", *(f"data.{file.stem}={file}" for file in files)]
    run = train(path, tmp_path / "run", overrides=settings)
    assert run.train_results.loss_last < run.train_results.loss_first
    (receipt,) = export_run(run)
    (rung,) = edgetune.validate(run, [receipt.artifact]).files
    assert rung.figures.kld.value < 1e-4
    assert rung.contract is not None
    assert rung.contract.holds


@pytest.mark.parametrize("option", ["target_modules", "modules_to_save"])
def test_an_output_matrix_that_llama_cpp_does_not_have_is_refused_before_training(option: str, tmp_path: Path) -> None:
    gemma = family_models.base("gemma", tmp_path / "gemma")
    values = runs.settings(gemma, tmp_path)
    values["adapter"][option] = ["lm_head"]
    values["data"]["chat_template"] = "chatml"
    values["export"] = {"formats": ["gguf", "safetensors"], "types": ["f16"]}
    path = runs.write_config(tmp_path / "config.yaml", values)
    with pytest.raises(ConfigError, match=f"gguf cannot hold what adapter.{option} trains: .* none of its own for Gem"):
        dry_run(path, tmp_path / "run")
    dry_run(path, tmp_path / "run", overrides=["export.formats=[onnx,safetensors]"])


def test_a_gguf_file_of_a_family_without_an_output_matrix_is_refused_before_training(tmp_path: Path) -> None:
    gemma = family_models.base("gemma", tmp_path / "gemma")
    path = config(gemma, tmp_path / "rows", "prompt-tuning")
    prepare_run(load_config(path, ["export.formats=[onnx,safetensors]", "export.types=[f32]"]))
    with pytest.raises(ConfigError, match=r"llama.cpp has none for Gemma"):
        prepare_run(load_config(path, ["data.chat_template=chatml"]))


def test_a_text_to_start_from_needs_its_option(base: Path, tmp_path: Path) -> None:
    path = config(base, tmp_path / "rows", "prompt-tuning")
    for overrides in (
        ["adapter.init=text"],
        ["adapter.init_text=Answer."],
        ["adapter.init=text", "adapter.init_text= "],
    ):
        with pytest.raises(ConfigError, match=r"give adapter.init: text and adapter.init_text together"):
            load_config(path, overrides)
    assert isinstance(load_config(path, ["adapter.init=text", "adapter.init_text=Answer."]), Config)
