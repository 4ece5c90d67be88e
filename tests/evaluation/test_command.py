"""`edgetune evaluate`: what it prints, stores and refuses."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from edgetune.evaluation.results import EvaluationResults, read_evaluations
from edgetune.runs.directory import RunDirectory
from tests.cli_runner import Result, edgetune, sentence
from tests.evaluation.conftest import TASKS
from tests.training import runs

ALL = "lamp_choice,lamp_text,lamp_answer"


def evaluate(source: Path, tasks: str, *options: str | Path) -> Result:
    return edgetune("evaluate", source, "--tasks", tasks, "--include-path", TASKS, *options)


@pytest.fixture(scope="module")
def results(run: RunDirectory, tmp_path_factory: pytest.TempPathFactory) -> EvaluationResults:
    """Of the trained model and of all exported files."""
    path = tmp_path_factory.mktemp("evaluation") / "e.json"
    result = evaluate(run.path, "lamps,lamp_answer", "--apply-chat-template", "--num-fewshot", "2", "--json", path)
    assert result.returncode == 0, result.stderr.decode()
    return EvaluationResults.read(path)


def test_a_run_evaluates_the_trained_model_and_all_its_files(results: EvaluationResults) -> None:
    assert results.models == ["trained", "lamp-f32-onnx", "lamp-f32.gguf", "lamp-q8_0.gguf"]
    assert [scores.task for scores in results.tasks] == ["lamp_choice", "lamp_text", "lamp_answer", "lamps"]
    assert {scores.num_fewshot for scores in results.tasks if not scores.is_group} == {2}
    assert results.requests == 24 * 4 + 24 + 24
    assert results.truncation == {}  # no prompt was cut, and every tokenizer gives the same ids
    for scores in results.tasks:
        assert scores.documents == 24
        for metric in scores.metrics:
            assert list(metric.scores) == results.models
            assert list(metric.differences) == results.files


def test_an_unquantized_file_scores_as_the_trained_model_does(results: EvaluationResults) -> None:
    assert results.settings.apply_chat_template
    for name in ("lamp-f32.gguf", "lamp-f32-onnx"):
        for scores in results.tasks:
            for metric in scores.metrics:
                assert metric.scores[name].value == pytest.approx(metric.scores["trained"].value, rel=1e-3)


def test_the_results_are_stored_in_the_run(results: EvaluationResults, run: RunDirectory) -> None:
    stored = [each for each in read_evaluations(run) if each.settings == results.settings]
    assert [each.model_dump_json() for each in stored] == [results.model_dump_json()]


def test_the_same_evaluation_replaces_the_stored_one(run: RunDirectory, file: Path) -> None:
    counts = []
    for limit in ("2", "2", "3"):
        result = evaluate(run.path, "lamp_choice", "--artifact", file, "--limit", limit, "--batch-size", "1")
        assert result.returncode == 0, result.stderr.decode()
        counts.append(len(read_evaluations(run)))
    assert counts[0] == counts[1] == counts[2] - 1


def test_one_file_stands_beside_the_trained_model_with_the_difference(run: RunDirectory, file: Path) -> None:
    result = evaluate(run.path, "lamp_choice", "--artifact", file, "--limit", "4")
    head, *lines = result.stdout.decode().splitlines()
    assert head.split() == ["task", "metric", "n", "trained", "lamp-f32.gguf", "difference"]
    assert [line.split()[:4] for line in lines] == [
        ["lamp_choice", "acc", "↑", "4"],
        ["lamp_choice", "acc_norm", "↑", "4"],
    ]


def test_a_file_is_evaluated_without_torch(file: Path, tmp_path: Path) -> None:
    (tmp_path / "sitecustomize.py").write_text(
        "import sys\n"
        "HIDDEN = {'torch', 'transformers', 'peft', 'bitsandbytes', 'trl', 'accelerate'}\n"
        "class Without:\n"
        "    def __init__(self, finder):\n"
        "        self.finder = finder\n"
        "    def __getattr__(self, name):\n"
        "        return getattr(self.finder, name)\n"
        "    def find_spec(self, name, *others):\n"
        "        return None if name.split('.')[0] in HIDDEN else self.finder.find_spec(name, *others)\n"
        "sys.meta_path[:] = map(Without, sys.meta_path)\n"
    )
    paths = os.pathsep.join([str(tmp_path), *filter(None, [os.environ.get("PYTHONPATH")])])
    command: list[str | Path] = [
        sys.executable,
        "-m",
        "edgetune.cli",
        "evaluate",
        file,
        "--tasks",
        ALL,
        "--include-path",
        TASKS,
    ]
    environment = {
        **os.environ,
        "PYTHONPATH": paths,
        "HF_DATASETS_CACHE": str(tmp_path / "cache"),
        "HF_HUB_OFFLINE": "1",
    }
    result = subprocess.run(
        [*command, "--json", tmp_path / "e.json"], env=environment, capture_output=True, timeout=300
    )
    assert result.returncode == 0, result.stderr.decode()
    found = json.loads((tmp_path / "e.json").read_text())
    assert found["models"] == ["lamp-f32.gguf"]
    assert not any(metric["differences"] for task in found["tasks"] for metric in task["metrics"])
    blocked = subprocess.run([sys.executable, "-c", "import torch"], env=environment, capture_output=True)
    assert blocked.returncode != 0


def test_a_limit_below_the_number_of_documents_is_kept(file: Path, tmp_path: Path) -> None:
    assert evaluate(file, "lamp_answer", "--limit", "3", "--json", tmp_path / "e.json").returncode == 0
    found = EvaluationResults.read(tmp_path / "e.json")
    assert found.tasks[0].documents == found.requests == 3


def test_prompts_that_do_not_fit_are_named(file: Path) -> None:
    result = evaluate(file, "lamp_choice", "--context", "8")
    assert result.returncode == 0
    assert "prompts do not fit the context of 8 tokens and were cut on the left" in result.stderr.decode()


def test_prompts_that_have_other_token_ids_in_a_file_are_counted() -> None:
    from edgetune.evaluation.harness import ModelScores, truncations
    from edgetune.evaluation.results import EvaluationSettings, remarks

    trained = ModelScores("trained", {}, {}, [b"1", b"2", b"3"])
    file = ModelScores("a.gguf", {}, {}, [b"1", b"9", b"3"])
    found = truncations([trained, file])
    assert {name: each.other_tokens for name, each in found.items()} == {"a.gguf": 1}
    settings = EvaluationSettings(tasks=["a"])
    results = EvaluationResults(settings=settings, models=["trained", "a.gguf"], requests=3, truncation=found, tasks=[])
    assert "a.gguf: 1 of 3 prompts have other token ids than those of trained" in remarks(results)[0]


def test_the_report_and_the_card_show_the_scores(results: EvaluationResults, run: RunDirectory, file: Path) -> None:
    assert edgetune("validate", run.path, file, "--no-task").returncode in (0, 3)
    assert edgetune("report", run.path, "-o", run.path / "page.html").returncode == 0
    page = (run.path / "page.html").read_text()
    assert 'id="evaluations"' in page
    assert "lamp-q8_0.gguf − trained" in page
    assert edgetune("card", file, "--run", run.path, "--overwrite").returncode == 0
    card = (run.artifacts / "README.md").read_text()
    assert "## Benchmarks" in card
    assert "lm-evaluation-harness" in card
    row = next(line for line in card.splitlines() if line.startswith("| lamp_choice | acc ↑ | 24 "))
    assert len(row.split("|")) == 3 + 1 + 2 + 1 + 1  # three cells of the row's head, two models, one difference


# -- bad input ---------------------------------------------------------------------------------------------------------


def test_an_unknown_task_names_the_nearest(file: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from lm_eval.tasks import TaskManager

    own = TaskManager(include_path=[TASKS], include_defaults=False)  # reading all tasks of the harness takes seconds
    monkeypatch.setattr("edgetune.evaluation.tasks._manager", lambda names, folders: own)
    said = sentence(evaluate(file, "lamp_chioce"))
    assert "there is no task 'lamp_chioce'" in said
    assert "The nearest names are lamp_choice" in said


@pytest.mark.slow
def test_tasks_of_the_harness_are_known_beside_included_ones(file: Path) -> None:
    said = sentence(evaluate(file, "arc_eazy"))
    assert "there is no task 'arc_eazy'" in said
    assert "arc_easy" in said


@pytest.mark.slow
def test_a_task_whose_data_are_not_here_says_so(file: Path, tmp_path: Path) -> None:
    command: list[str | Path] = [sys.executable, "-m", "edgetune.cli", "evaluate", file, "--tasks", "arc_easy"]
    environment = {**os.environ, "HF_HUB_OFFLINE": "1", "HF_HOME": str(tmp_path)}
    result = subprocess.run(command, env=environment, capture_output=True, timeout=300)
    assert result.returncode == 1
    assert result.stderr.decode().splitlines()[0] == (
        "error: the data set of the task 'arc_easy' is not on this machine, and the hub cannot be reached"
    )


def test_a_missing_extra_says_how_it_is_installed(file: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    import importlib.util

    found = importlib.util.find_spec
    monkeypatch.setattr(
        importlib.util, "find_spec", lambda name, *args: None if name == "lm_eval" else found(name, *args)
    )
    said = sentence(evaluate(file, ALL))
    assert "lm-evaluation-harness is not installed" in said
    assert "pip install 'edgetune[evaluate]'" in said


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--include-path", "none"], "--include-path none is no folder"),
        (["--batch-size", "2"], "--batch-size applies to a run"),
        (["--artifact", "x.gguf"], "--artifact applies to a run"),
        (["--limit", "0"], "Invalid value for '--limit'"),
    ],
    ids=lambda value: value[0] if isinstance(value, list) else None,
)
def test_wrong_options_are_refused(file: Path, options: list[str], message: str) -> None:
    assert message in sentence(evaluate(file, "lamp_choice", *options))


def test_no_task_and_no_file_are_refused(file: Path, tmp_path: Path) -> None:
    assert "names no task" in sentence(evaluate(file, " , "))
    assert "there is no file" in sentence(evaluate(tmp_path / "x.gguf", "lamp_choice"))


def broken(folder: Path, **changes: Any) -> Path:
    """The folder of tasks with changes to lamp_choice.yaml; None removes a key."""
    import yaml

    shutil.copytree(TASKS, folder)
    content = yaml.safe_load((TASKS / "lamp_choice.yaml").read_text()) | changes
    kept = {key: value for key, value in content.items() if value is not None}
    (folder / "lamp_choice.yaml").write_text(yaml.safe_dump(kept))
    return folder


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"dataset_kwargs": {"data_files": {"test": "gone.jsonl"}}}, "cannot be loaded"),
        ({"output_type": "telepathy"}, "cannot be loaded"),
        ({"metric_list": [{"metric": "acc"}], "test_split": "gone"}, "cannot be loaded"),
    ],
    ids=["data", "output type", "split"],
)
def test_a_task_that_cannot_be_loaded_is_named(
    file: Path, tmp_path: Path, changes: dict[str, Any], message: str
) -> None:
    folder = broken(tmp_path / "tasks", **changes)
    said = sentence(edgetune("evaluate", file, "--tasks", "lamp_choice", "--include-path", folder))
    assert "the task 'lamp_choice'" in said
    assert message in said


def test_a_yaml_file_that_is_no_task_is_named(file: Path, tmp_path: Path) -> None:
    folder = broken(tmp_path / "tasks")
    (folder / "bad.yaml").write_text("task: [unclosed\n")
    said = sentence(edgetune("evaluate", file, "--tasks", "lamp_choice", "--include-path", folder))
    assert "bad.yaml is not a task of lm-evaluation-harness" in said


def test_a_model_without_a_chat_template_is_refused(tmp_path: Path) -> None:
    from tests.converters import tiny

    bare = tiny.base("llama-tied", tmp_path / "hf")
    (bare / "chat_template.jinja").unlink(missing_ok=True)
    config = json.loads((bare / "tokenizer_config.json").read_text())
    (bare / "tokenizer_config.json").write_text(json.dumps(config | {"chat_template": None}))
    exported = edgetune("merge-export", "--base", bare, "-q", "f32", "-o", tmp_path / "bare-f32.gguf")
    assert exported.returncode == 0, exported.stderr.decode()
    said = sentence(evaluate(tmp_path / "bare-f32.gguf", "lamp_choice", "--apply-chat-template"))
    assert "bare-f32.gguf has no chat template" in said


def test_more_examples_than_documents_are_refused_before_a_model_is_opened(file: Path) -> None:
    said = sentence(evaluate(file, "lamp_choice", "--num-fewshot", "500"))
    assert "the task lamp_choice has 8 documents to take examples from, too few for 500 examples" in said
    assert "Set --num-fewshot to 8 or less" in said


def test_a_context_beyond_that_of_the_model_is_warned_of(file: Path) -> None:
    result = evaluate(file, "lamp_choice", "--context", "300", "--limit", "2")
    assert result.returncode == 0
    assert "lamp-f32.gguf: --context is 300 tokens, and the model was made for 256" in result.stderr.decode()


def test_a_file_of_another_run_is_warned_of(run: RunDirectory, file: Path, tmp_path: Path) -> None:
    other = tmp_path / "other-f32.gguf"
    exported = edgetune("merge-export", "--base", run.base_directory(), "-q", "f32", "-o", other)
    assert exported.returncode == 0, exported.stderr.decode()
    result = evaluate(run.path, "lamp_choice", "--artifact", other, "--artifact", file, "--limit", "2")
    assert result.returncode == 0
    warnings = [line for line in result.stderr.decode().splitlines() if line.startswith("warning")]
    assert len(warnings) == 1
    assert "other-f32.gguf: the file was not made with this run's adapter" in warnings[0]


def test_a_soft_prompt_takes_its_place_in_the_context(base: Path, tmp_path: Path) -> None:
    settings = runs.settings(base, tmp_path, max_steps=1) | {
        "name": "soft", "adapter": {"kind": "prompt-tuning", "tokens": 20}, "export": {"types": ["f32"]},
    }  # fmt: skip
    run = tmp_path / "run"
    for command in (
        ("train", runs.write_config(tmp_path / "config.yaml", settings), "-o", run),
        ("merge-export", run, "--format", "onnx"),
    ):
        result = edgetune(*command)
        assert result.returncode == 0, result.stderr.decode()
    result = evaluate(run, "lamp_choice,lamp_answer", "--json", tmp_path / "e.json")
    assert result.returncode == 0, result.stderr.decode()
    found = EvaluationResults.read(tmp_path / "e.json")
    assert found.models == ["trained", "soft-f32-onnx"]
    assert found.settings.context == 256 - 20
