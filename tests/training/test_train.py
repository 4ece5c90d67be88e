"""`edgetune train` on a tiny model with real bitsandbytes NF4: what it writes; kills and Ctrl-C cost nothing."""

from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import safetensors.numpy
import torch

from edgetune import cli
from edgetune.config import load_config
from edgetune.data.masks import EncodedRow
from edgetune.planning.golden_conversations import GOLDEN, WITH_TOOLS
from edgetune.planning.prepare import prepare_run
from edgetune.reference.store import Reference, summary
from edgetune.reference.writer import ReferenceWriter
from edgetune.runs.directory import RunDirectory
from edgetune.runtime.ngrams import Answers, NgramTable
from edgetune.training import adapters, checkpoints, fit
from edgetune.training import resume as state
from edgetune.training.callbacks import MetricsCallback
from edgetune.training.capture import generate as outputs
from edgetune.training.capture import reference as capture
from edgetune.training.loading import load_model
from edgetune.training.run import train
from edgetune_converters.files.contents import sha256_of
from tests.data import templates
from tests.training import runs
from tests.training.interruptions import at_step

STEPS, SAVE = 9, 4
"""No multiple of one another, nor of the window of 2 steps that losses are averaged over."""


@pytest.fixture(scope="module")
def config(base: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("train")
    options = {"max_steps": STEPS, "save_steps": SAVE, "eval_steps": 5, "logging_steps": 2}
    return runs.write_config(folder / "config.yaml", runs.settings(base, folder, **options))


@pytest.fixture(scope="module")
def finished(config: Path) -> RunDirectory:
    """An uninterrupted run."""
    path = config.parent / "finished"
    assert cli.run(["train", str(config), "-o", str(path)]) == 0
    return RunDirectory.open(path)


def curve(run: RunDirectory) -> list[dict[str, float]]:
    """The metrics without what depends on the clock."""
    lines = [json.loads(line) for line in run.metrics_file.read_text().splitlines()]
    return [{key: value for key, value in line.items() if key != "tokens_per_second"} for line in lines]


def assert_same_run(run: RunDirectory, other: RunDirectory) -> None:
    assert curve(run) == curve(other)
    assert sha256_of(run.adapter / "adapter_model.safetensors") == sha256_of(
        other.adapter / "adapter_model.safetensors"
    )


def test_training_lowers_loss_and_cross_entropy(finished: RunDirectory) -> None:
    results = finished.train_results
    assert results.steps == STEPS
    assert results.loss_last < results.loss_first - 0.3
    entropy = summary(finished).cross_entropy
    assert entropy["trained"] < entropy["base"]


def test_a_run_directory_holds_adapter_tokenizer_reference_and_checkpoints(finished: RunDirectory, base: Path) -> None:
    assert {path.name for path in finished.path.iterdir()} == {
        "run.json", "answers.ngrams", "calibration.npz", "adapter", "tokenizer", "reference", "checkpoints", "logs"
    }  # fmt: skip
    assert {path.name for path in finished.adapter.iterdir()} == {"adapter_config.json", "adapter_model.safetensors"}
    assert (finished.tokenizer / "tokenizer.json").read_bytes() == (base / "tokenizer.json").read_bytes()
    assert [checkpoints.step_of(path) for path in checkpoints.list_complete(finished.checkpoints)] == [8, STEPS]
    assert any(path.name.startswith("events.out.tfevents") for path in finished.logs.iterdir())


def test_a_run_holds_the_ngrams_of_its_training_answers(finished: RunDirectory, config: Path) -> None:
    table = NgramTable.read(finished.ngrams)
    expected = NgramTable.count(Answers.of(prepare_run(load_config(config)).train.rows))
    assert expected is not None
    assert table.cells.tolist() == expected.cells.tolist()
    assert 0 < np.count_nonzero(table.cells) < len(table.cells)


def test_metrics_hold_windows_evaluations_and_speed(finished: RunDirectory) -> None:
    lines = [json.loads(line) for line in finished.metrics_file.read_text().splitlines()]
    assert [line["step"] for line in lines if "loss" in line] == [2, 4, 6, 8, 9]
    assert [line["step"] for line in lines if "eval_loss" in line] == [5, 9]
    assert all(line["tokens_per_second"] > 0 for line in lines if "loss" in line)
    assert {"loss", "learning_rate", "grad_norm"} <= lines[0].keys()


def test_the_manifest_records_base_data_versions_and_results(finished: RunDirectory, base: Path, config: Path) -> None:
    manifest = finished.manifest
    assert manifest.base.files == {name: sha256_of(base / name) for name in ("config.json", "model.safetensors")}
    assert manifest.config == load_config(config).model_dump(mode="json")
    assert manifest.data["train"][0]["sha256"] == sha256_of(config.parent / "train.jsonl")
    assert manifest.data["formats"] == ["messages"]
    assert manifest.versions["torch"] == torch.__version__
    assert manifest.device["type"] == ("cuda" if torch.cuda.is_available() else "cpu")
    train = finished.train_results
    assert train.stop_tokens == ["<|im_end|>"]
    assert train.pad_token == "<|endoftext|>"
    assert train.rows["train"]["rows"] == 64


def _model_of(run: RunDirectory, config: Path) -> Any:
    options = load_config(config)
    model = adapters.load_adapter(load_model(prepare_run(options).base, options), run.adapter)
    outputs.prepare_for_capture(model)
    return model


def alone(model: Any, row: EncodedRow) -> np.ndarray[Any, Any]:
    """Logits at the scored positions of one row, by a plain forward of that row."""
    logits = model(input_ids=torch.tensor([row.input_ids])).logits[0]
    return np.asarray(logits[torch.tensor(row.scored) - 1].float().numpy())


def test_the_reference_holds_the_log_probabilities_of_the_saved_adapter(finished: RunDirectory, config: Path) -> None:
    reference = Reference.open(finished.reference)
    model = _model_of(finished, config)
    rows = prepare_run(load_config(config)).reference_rows
    with torch.inference_mode():
        logits = np.concatenate([alone(model, row) for row in rows])
    compared = reference.compare(0, logits)
    assert len(compared.kld) == sum(len(row.scored) for row in rows)
    assert float(np.max(compared.kld)) < 1e-4
    log_probs = torch.log_softmax(torch.from_numpy(logits), -1).numpy()
    np.testing.assert_allclose(reference.log_probs(0, len(logits)), log_probs, atol=1e-3)


def test_task_answers_are_those_of_plain_generation(finished: RunDirectory, config: Path) -> None:
    task = json.loads((finished.reference / "reference.json").read_text())["task"]
    plan = prepare_run(load_config(config))
    model = _model_of(finished, config)
    stop = sorted(plan.stop_ids)
    for row, chat in zip(task["rows"], [task.row for task in plan.task], strict=True):
        text = plan.template.render(chat.messages[:-1], add_generation_prompt=True)
        ids = torch.tensor([plan.tokenizer.encode(text)[0]])
        with torch.inference_mode():
            written = model.generate(
                input_ids=ids, max_new_tokens=8, do_sample=False, eos_token_id=stop, pad_token_id=0
            )
        answer = [id_ for id_ in written[0, ids.shape[1] :].tolist() if id_ not in stop]
        assert row["trained"] == plan.tokenizer.decode(answer, skip_special=True)
        assert row["expected"] == chat.messages[-1]["content"]
        assert row["messages"] == chat.messages[:-1]
    scores = summary(finished).task
    assert scores is not None
    assert scores["trained"] == sum(row["trained"].strip() == row["expected"] for row in task["rows"]) / 6


def test_contract_holds_golden_and_own_conversations(finished: RunDirectory, base: Path) -> None:
    import transformers

    contract = json.loads((finished.reference / "reference.json").read_text())["contract"]
    tokenizer = transformers.AutoTokenizer.from_pretrained(base)
    assert len(contract) == len(GOLDEN) + 8 + len(WITH_TOOLS)
    assert sum("tools" in entry for entry in contract) == len(WITH_TOOLS)
    for entry in contract:
        text = tokenizer.apply_chat_template(
            entry["messages"],
            tools=entry.get("tools"),
            tokenize=False,
            add_generation_prompt=entry["add_generation_prompt"],
        )
        assert entry["text"] == text
        assert entry["ids"] == tokenizer(text, add_special_tokens=False)["input_ids"]


def test_only_the_summary_on_stdout_and_no_noise(config: Path, tmp_path: Path) -> None:
    """In a process of its own, as a user runs it."""
    command = [sys.executable, "-m", "edgetune.cli", "train", str(config), "-o", str(tmp_path / "run")]
    result = subprocess.run([*command, "--set", "training.max_steps=2"], capture_output=True, text=True, timeout=180)
    assert result.returncode == 0, result.stderr
    assert result.stdout.startswith("run         ")
    assert result.stdout.splitlines()[-1] == f"next        edgetune merge-export {tmp_path / 'run'}"
    noise = [line for line in result.stderr.splitlines() if any(word in line for word in ("Warning", "it/s", "warn("))]
    assert noise == []
    assert "step 2/2: loss" in result.stderr
    for stage in ("answers to the test rows", "greedy answers", "first tokens of the golden answers"):
        assert stage in result.stderr  # the stages after training are not silent
    if not torch.cuda.is_available():
        assert len([line for line in result.stderr.splitlines() if "paged" in line.lower()]) == 1


KILLED_WHILE_SAVING = f"""
import os, signal, sys
from edgetune import cli
from edgetune.training import checkpoints
mark = checkpoints.mark_complete
def killed(path):
    if checkpoints.step_of(path) == {2 * SAVE}:
        os.kill(os.getpid(), signal.SIGKILL)
    mark(path)
checkpoints.mark_complete = killed
cli.main(sys.argv[1:])
"""


def test_a_run_resumed_after_sigkill_equals_an_uninterrupted_one(
    finished: RunDirectory, config: Path, tmp_path: Path
) -> None:
    """Killed after step 8, while its checkpoint is being written: it goes on from step 4."""
    path = tmp_path / "killed"
    arguments = ["train", str(config), "-o", str(path)]
    killed = subprocess.run([sys.executable, "-c", KILLED_WHILE_SAVING, *arguments], capture_output=True, timeout=180)
    assert killed.returncode == -signal.SIGKILL, killed.stderr.decode()
    run = RunDirectory(path)
    assert not run.is_finished
    assert [checkpoints.step_of(each) for each in checkpoints.list_complete(run.checkpoints)] == [SAVE]
    assert curve(run)[-1]["step"] == 2 * SAVE
    assert cli.run([*arguments, "--resume"]) == 0
    assert_same_run(RunDirectory.open(path), finished)


def test_ctrl_c_saves_a_checkpoint_and_names_the_command_that_resumes(
    finished: RunDirectory, config: Path, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    path = tmp_path / "stopped"
    arguments = ["train", str(config), "-o", str(path)]
    with pytest.MonkeyPatch.context() as patch:
        at_step(3, lambda: os.kill(os.getpid(), signal.SIGINT), patch)
        assert cli.run(arguments) == 130
    written = capfd.readouterr()
    assert written.out == ""
    checkpoint = checkpoints.latest_complete(RunDirectory(path).checkpoints)
    assert checkpoint is not None
    assert 0 < checkpoints.read_elapsed(checkpoint) < 600
    checkpoints.write_elapsed(checkpoint, 10_000)
    assert f"stopped after step 4; resume with `edgetune train {config} -o {path} --resume`" in written.err
    assert not RunDirectory(path).is_finished
    assert cli.run([*arguments, "--resume"]) == 0
    assert_same_run(RunDirectory.open(path), finished)
    assert RunDirectory.open(path).train_results.seconds > 10_000  # all stretches of the training count
    assert f"{STEPS} steps in 100" in capfd.readouterr().out


def test_ctrl_c_in_the_last_step_stops_before_the_reference(
    finished: RunDirectory, config: Path, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    path = tmp_path / "stopped"
    arguments = ["train", str(config), "-o", str(path)]
    with pytest.MonkeyPatch.context() as patch:
        at_step(STEPS, lambda: os.kill(os.getpid(), signal.SIGINT), patch)
        assert cli.run(arguments) == 130
    assert f"stopped after step {STEPS}; resume with" in capfd.readouterr().err
    assert cli.run([*arguments, "--resume"]) == 0
    assert_same_run(RunDirectory.open(path), finished)


def test_a_second_ctrl_c_stops_at_once(config: Path, tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    path = tmp_path / "stopped"

    def twice() -> None:
        os.kill(os.getpid(), signal.SIGINT)
        os.kill(os.getpid(), signal.SIGINT)

    with pytest.MonkeyPatch.context() as patch:
        at_step(2, twice, patch)
        assert cli.run(["train", str(config), "-o", str(path)]) == 130
    assert "resume with `edgetune train" in capfd.readouterr().err
    assert checkpoints.latest_complete(RunDirectory(path).checkpoints) is None


def test_a_failure_in_the_capture_does_not_cost_the_training(
    finished: RunDirectory, config: Path, tmp_path: Path
) -> None:
    path = tmp_path / "captured"
    arguments = ["train", str(config), "-o", str(path)]

    def fail(*_: Any) -> None:
        raise KeyboardInterrupt

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(capture, "capture_task_answers", fail)
        assert cli.run(arguments) == 130
    run = RunDirectory(path)
    assert not run.reference.exists()
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(fit, "_run_trainer", fail)  # it is not trained again
        patch.setattr(ReferenceWriter, "add_trained", fail)  # and what was captured is not captured again
        assert cli.run([*arguments, "--resume"]) == 0
    assert not list(path.glob("*.partial"))
    ours, theirs = Reference.open(run.reference), Reference.open(finished.reference)
    np.testing.assert_array_equal(ours.log_probs(0, ours.size), theirs.log_probs(0, theirs.size))


def test_stopped_between_the_last_step_and_the_end(finished: RunDirectory, config: Path, tmp_path: Path) -> None:
    path = tmp_path / "nearly"
    arguments = ["train", str(config), "-o", str(path)]

    def stop(*_: Any) -> None:
        raise KeyboardInterrupt

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(fit, "_save_adapter", stop)
        assert cli.run(arguments) == 130
    assert cli.run([*arguments, "--resume"]) == 0
    assert_same_run(RunDirectory.open(path), finished)


def one_step(config: Path, run: Path, *flags: str) -> list[str]:
    return ["train", str(config), "-o", str(run), "--set", "training.max_steps=1", *flags]


@pytest.mark.parametrize("ratio", [0.03, 1.0])
def test_one_step_with_warm_up_trains(config: Path, tmp_path: Path, ratio: float) -> None:
    """The first step of a warm-up has the learning rate 0: of a training of one step nothing would be left."""
    assert cli.run(one_step(config, tmp_path / "run", "--set", f"training.warmup_ratio={ratio}")) == 0
    run = RunDirectory.open(tmp_path / "run")
    assert run.train_results.adapter_is_zero is False
    tensors = safetensors.numpy.load_file(run.adapter / "adapter_model.safetensors")
    assert all(tensor.any() for name, tensor in tensors.items() if "lora_B" in name)


def test_an_adapter_that_is_all_zero_is_a_warning(
    config: Path, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    """By training at its end, and by the export, each in one sentence."""
    run = tmp_path / "run"
    assert cli.run(one_step(config, run, "--set", "training.learning_rate=1.0e-300")) == 0  # 0 in 32 bits
    assert capfd.readouterr().out.splitlines()[-1].startswith("warning     the adapter is all zero")
    assert cli.run(["merge-export", str(run), "-q", "q8_0"]) == 1
    said = capfd.readouterr().err
    assert f"the adapter {run / 'adapter'} is all zero" in said
    assert len(said.splitlines()) == 2


def test_a_diverged_training_is_an_error(config: Path, tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(
            MetricsCallback, "on_log", lambda self, args, state, *_, **__: self._stepped(2, 9, {"loss": float("nan")})
        )
        assert cli.run(["train", str(config), "-o", str(tmp_path / "run")]) == 2
    assert "training has diverged: the loss after step 2 is nan" in capfd.readouterr().err


def test_states_of_the_run_directory(
    finished: RunDirectory, config: Path, base: Path, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    def said(*arguments: str, code: int) -> str:
        assert cli.run(["train", str(config), *arguments]) == code
        return capfd.readouterr().err

    run = str(finished.path)
    before = finished.finished_file.read_bytes()
    assert "holds a finished run" in said("-o", run, code=1)
    assert "finished already; there is nothing to resume" in said("-o", run, "--resume", code=0)
    assert finished.finished_file.read_bytes() == before

    unfinished = tmp_path / "unfinished"
    unfinished.mkdir()
    shutil.copy(finished.finished_file, unfinished / "run.unfinished.json")
    assert "holds an unfinished run" in said("-o", str(unfinished), code=1)
    options = ["--resume", "--set", "adapter.r=4", "--set", "training.seed=3", "--set", "training.save_steps=1"]
    assert "other inputs: adapter.r, training.seed differ" in said("-o", str(unfinished), *options, code=1)

    for path, words in ((run, "holds a finished run"), (str(unfinished), "holds an unfinished run")):
        untouched = {file: file.stat().st_mtime_ns for file in Path(path).rglob("*")}
        dry = " ".join(said("-o", path, "--dry-run", code=0).split())
        assert f"warning: {path} {words}; " in dry
        assert "nothing was written" in dry
        assert {file: file.stat().st_mtime_ns for file in Path(path).rglob("*")} == untouched
    assert "warning: " + str(unfinished) not in said("-o", str(unfinished), "--resume", "--dry-run", code=0)

    foreign = tmp_path / "foreign"
    foreign.mkdir()
    (foreign / "thesis.txt").write_text("x")
    assert "exists and is not a run directory" in said("-o", str(foreign), code=1)
    assert "exists and is not a run directory" in said("-o", str(foreign), "--dry-run", code=1)
    assert (foreign / "thesis.txt").exists()


def test_a_finished_run_adopts_options_that_do_not_affect_training(
    finished: RunDirectory, config: Path, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    """As make calls it after a change of the gate: nothing is trained, and the products are as new as the change."""
    run = RunDirectory(shutil.copytree(finished.path, tmp_path / "run"))
    weights = (run.adapter / "adapter_model.safetensors").stat()
    before = run.manifest.content()
    for file in (run.finished_file, run.reference_file):
        os.utime(file, (1, 1))
    arguments = ["train", str(config), "-o", str(run.path), "--resume", "--overwrite"]
    assert cli.run([*arguments, "--set", "gate.recovery_min=0.5", "--set", "export.types=[q8_0, f16]"]) == 0
    assert "nothing to resume; export, gate updated in run.json" in " ".join(capfd.readouterr().err.split())
    after = run.manifest.content()
    assert (after["config"]["gate"]["recovery_min"], after["config"]["export"]["types"]) == (0.5, ["q8_0", "f16"])
    assert {**after["config"], "gate": None, "export": None} == {**before["config"], "gate": None, "export": None}
    assert {**after, "config": None} == {**before, "config": None}
    assert min(file.stat().st_mtime for file in (run.finished_file, run.reference_file)) > 1
    assert (run.adapter / "adapter_model.safetensors").stat() == weights


def test_another_reference_is_captured_without_training(
    finished: RunDirectory, config: Path, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    run = RunDirectory(shutil.copytree(finished.path, tmp_path / "run"))
    assert cli.run(["train", str(config), "-o", str(run.path), "--resume", "--set", "reference.rows=2"]) == 0
    said = " ".join(capfd.readouterr().err.split())
    assert "keeps its adapter; recapturing the reference: its options changed" in said
    assert "the adapter is trained already" in said
    assert (summary(run).rows, run.manifest.config["reference"]["rows"]) == (2, 2)
    assert run.train_results == finished.train_results


def test_replacing_a_finished_run_names_the_reason(
    finished: RunDirectory,
    config: Path,
    base: Path,
    tmp_path: Path,
    capfd: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    run = RunDirectory(shutil.copytree(finished.path, tmp_path / "run"))
    cleared: list[Path] = []

    def stop(run: RunDirectory) -> None:
        cleared.append(run.path)
        raise KeyboardInterrupt

    monkeypatch.setattr("edgetune.training.run.remove_run_files", stop)
    arguments = ["train", str(config), "-o", str(run.path), "--resume"]
    assert cli.run([*arguments, "--set", "adapter.r=4"]) == 1
    assert "finished run with other inputs: adapter.r differ" in " ".join(capfd.readouterr().err.split())
    assert cli.run([*arguments, "--overwrite", "--set", "adapter.r=4"]) == 130
    assert "because adapter.r changed after it" in " ".join(capfd.readouterr().err.split())
    (run.tokenizer / "generation_config.json").write_text("{}")  # as if that of the base had changed since
    assert cli.run([*arguments, "--overwrite"]) == 130
    assert "because the base's generation_config.json changed after it" in " ".join(capfd.readouterr().err.split())
    assert cleared == [run.path] * 2


def test_resume_checks_the_base(
    finished: RunDirectory, config: Path, base: Path, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    other = tmp_path / "base"
    shutil.copytree(base, other)
    unfinished = tmp_path / "unfinished"
    unfinished.mkdir()
    manifest = json.loads(finished.finished_file.read_text())
    manifest["base"]["files"]["model.safetensors"] = "0" * 64
    (unfinished / "run.unfinished.json").write_text(json.dumps(manifest))
    assert cli.run(["train", str(config), "-o", str(unfinished), "--resume"]) == 1
    assert "the base's model.safetensors differ" in capfd.readouterr().err


def _changed(text: str) -> str:
    """The same rows, of which one asks for something else."""
    return text.replace("lamp ", "light ", 1)


@pytest.mark.parametrize(("name", "words"), [("train", "the rows of data.train"), ("validation", "the held-out rows")])
def test_resume_checks_the_rows(
    finished: RunDirectory, config: Path, tmp_path: Path, capfd: pytest.CaptureFixture[str], name: str, words: str
) -> None:
    """Of an unfinished run, and of one for which nothing is left to do."""
    file = config.parent / f"{name}.jsonl"
    before = file.read_text()
    unfinished = tmp_path / "unfinished"
    unfinished.mkdir()
    shutil.copy(finished.finished_file, unfinished / "run.unfinished.json")
    try:
        file.write_text(_changed(before))
        for run in (unfinished, finished.path):
            assert cli.run(["train", str(config), "-o", str(run), "--resume"]) == 1
            said = capfd.readouterr().err.splitlines()[-2:]
            assert f"with other inputs: {words} differ" in said[0]
            assert said[1].lstrip().startswith(("Restore them", "Write elsewhere"))
    finally:
        file.write_text(before)


def test_resume_takes_a_checkout_that_was_moved(
    finished: RunDirectory, config: Path, base: Path, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    moved = tmp_path / "moved"
    shutil.copytree(config.parent, moved / "work", ignore=shutil.ignore_patterns("run*"))
    shutil.copytree(base, moved / "base")
    text = config.read_text().replace(str(base), str(moved / "base")).replace(str(config.parent), str(moved / "work"))
    (moved / "work" / config.name).write_text(text)
    assert cli.run(["train", str(moved / "work" / config.name), "-o", str(finished.path), "--resume"]) == 0
    assert "nothing to resume" in " ".join(capfd.readouterr().err.split())


def test_resume_goes_by_the_rows_and_not_by_the_bytes_of_the_file(finished: RunDirectory) -> None:
    data = finished.manifest.data
    moved = [{**source, "path": "/elsewhere/train.jsonl"} for source in data["train"]]
    respaced = [{**source, "sha256": "0" * 64} for source in data["train"]]
    assert state.changed_rows(data, {**data, "train": moved}) == []
    assert state.changed_rows(data, {**data, "train": respaced}) == []
    assert state.changed_rows({**data, "rows": {}}, {**data, "train": moved}) == []  # of an earlier edgetune
    assert state.changed_rows({**data, "rows": {}}, {**data, "train": respaced}) == ["the rows of data.train"]


def test_resume_checks_the_tokens(
    finished: RunDirectory, config: Path, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    """A chat template that was edited trains on other tokens, with options and data as they were."""
    manifest = json.loads(finished.finished_file.read_text())
    template = tmp_path / "template.jinja"
    template.write_text(templates.CHATML)
    options = ["--set", f"data.chat_template={template}"]
    manifest["config"]["data"]["chat_template"] = str(template)
    (tmp_path / "run").mkdir()
    (tmp_path / "run/run.unfinished.json").write_text(json.dumps(manifest))
    template.write_text(template.read_text().replace("<|im_start|>", "<|im_start|> "))
    assert cli.run(["train", str(config), "-o", str(tmp_path / "run"), "--resume", *options]) == 1
    said = capfd.readouterr().err
    assert "the rows of data.train as tokens (by tokenizer or template), the held-out rows as tokens" in said


def test_resume_with_overwrite_starts_over_only_if_inputs_changed(
    finished: RunDirectory, config: Path, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    unfinished = tmp_path / "unfinished"
    shutil.copytree(finished.path, unfinished)
    (unfinished / "run.json").rename(unfinished / "run.unfinished.json")
    arguments = ["train", str(config), "-o", str(unfinished), "--resume", "--overwrite"]
    adapter = (finished.adapter / "adapter_model.safetensors").read_bytes()
    assert cli.run(arguments) == 0  # trained already: only the capture is made again
    assert "starting over" not in capfd.readouterr().err
    assert (unfinished / "adapter/adapter_model.safetensors").read_bytes() == adapter

    run = RunDirectory(unfinished)
    run.finished_file.rename(run.unfinished_file)
    manifest = json.loads(run.unfinished_file.read_text())
    manifest["data"] |= {"train": [], "rows": {"train": "0"}}
    run.unfinished_file.write_text(json.dumps(manifest))
    assert cli.run(["train", str(config), "-o", str(unfinished), "--resume"]) == 1
    assert "the rows of data.train differ" in capfd.readouterr().err
    assert cli.run(arguments) == 0
    assert "starting over, because the rows of data.train changed" in capfd.readouterr().err


def test_overwrite_replaces_a_run(finished: RunDirectory, config: Path, tmp_path: Path) -> None:
    path = tmp_path / "copy"
    shutil.copytree(finished.path, path)
    (path / "reference" / "stale").touch()
    run = train(config, path, overrides=["training.max_steps=1"], overwrite=True)  # as from Python
    assert run == RunDirectory.open(path)
    assert run.train_results.steps == 1
    assert not (run.reference / "stale").exists()
    assert [line["step"] for line in curve(run) if "loss" in line] == [1]
