"""Reward models: the loss on scores of the last token; the head and the scores are in the run."""

from __future__ import annotations

import json
import math
import re
from dataclasses import replace
from pathlib import Path
from typing import Any
from xml.etree import ElementTree

import numpy as np
import pytest
import safetensors.numpy
import torch
import transformers

import edgetune
from edgetune import cli
from edgetune.config import parse_config
from edgetune.errors import ConfigError, RunDirectoryError, RuntimeProblem
from edgetune.exporting.options import resolve_options
from edgetune.exporting.request import export_request
from edgetune.exporting.source import find_source
from edgetune.publish.model_card import format_card
from edgetune.reference.reward_scores import RewardScores
from edgetune.report.gather import gather
from edgetune.report.page import render
from edgetune.runs.directory import RunDirectory
from edgetune.runtime import load
from edgetune.training.run import train
from edgetune.validation.results import ValidationResults
from edgetune.validation.scores import NO_HEAD
from edgetune_converters import exporting
from edgetune_converters.provenance.receipts import Receipt
from edgetune_converters.request import Target
from tests.training.objectives import encoded


def _score(model: Any, head: Any, ids: list[int]) -> float:
    """The score of a row by itself, from the hidden states of the network."""
    with torch.no_grad():
        hidden = model.get_base_model().base_model(input_ids=torch.tensor([ids])).last_hidden_state[0, -1]
        return float(hidden.double() @ head.weight[0].double())


@pytest.mark.parametrize("centering", [0.0, 0.5])
def test_the_loss_compares_scores_of_the_last_tokens(centering: float, base: Path, tmp_path: Path) -> None:
    prepared = encoded.prepare(encoded.settings(base, tmp_path, {"kind": "reward", "centering": centering}))
    trainer = encoded.trainer_of(prepared, tmp_path / "checkpoints")
    trainer.model.eval()
    pairs = prepared.validation.pairs[:4]
    expected = 0.0
    for pair in pairs:
        good, bad = (
            _score(trainer.model, trainer.score_head, side.row.input_ids) for side in (pair.chosen, pair.rejected)
        )
        expected += math.log1p(math.exp(bad - good)) + centering * (good + bad) ** 2
    batch = trainer.data_collator([trainer.eval_dataset[number] for number in range(len(pairs))])
    with torch.no_grad():
        loss = trainer.compute_loss(trainer.model, batch)
    assert float(loss) == pytest.approx(expected / len(pairs), rel=1e-5)


@pytest.fixture(scope="module")
def run(base: Path, tmp_path_factory: pytest.TempPathFactory) -> RunDirectory:
    """A reward model with all its files."""
    folder = tmp_path_factory.mktemp("reward")
    values = encoded.settings(base, folder, {"kind": "reward"}, max_steps=30, learning_rate=1e-2, eval_steps=30)
    values["reference"]["rows"] = 8
    return train(parse_config(values), folder / "run")


@pytest.fixture(scope="module")
def files(run: RunDirectory) -> dict[str, Path]:
    receipts = [
        *edgetune.export(run, formats=["gguf", "onnx", "safetensors"], types=["f32"]),
        *edgetune.export(run, formats=["gguf"], types=["q8_0", "q4_k_m"], allow_fallback=True),
        *edgetune.export(run, formats=["onnx"], types=["int4"]),
    ]
    return {f"{receipt.format} {receipt.recipe}": Path(receipt.artifact) for receipt in receipts}


def test_the_head_and_the_scores_of_the_trained_model_are_in_the_run(run: RunDirectory) -> None:
    head = safetensors.numpy.load_file(run.score_head)["score.weight"]
    assert head.shape == (1, 64)
    assert head.dtype == np.float32
    stored = RewardScores.of_run(run)
    assert stored is not None
    assert len(stored.pairs) == 8
    assert run.train_results.metrics["reward_accuracy"] > 0.8
    assert sum(pair.chosen > pair.rejected for pair in stored.pairs) >= 6
    names = safetensors.numpy.load_file(run.adapter / "adapter_model.safetensors")
    assert not [name for name in names if "score" in name]  # the adapter is one of the language model


def test_files_give_the_scores_of_the_trained_model(run: RunDirectory, files: dict[str, Path]) -> None:
    kinds = ("gguf f32", "onnx f32", "gguf q8_0", "gguf q4_k_m", "onnx int4")
    results = edgetune.validate(run, [files[kind] for kind in kinds])
    found = {kind: rung.scores for kind, rung in zip(kinds, results.files, strict=True)}
    for kind, figures in found.items():
        assert figures is not None
        assert figures.pairs == 8
        print(kind, figures)
    exact, graph, eight = (found[kind] for kind in kinds[:3])
    assert exact is not None
    assert graph is not None
    assert eight is not None
    # llama.cpp keeps keys and values in 16 bits: 2**-11 of scores of about 5; ONNX Runtime in 32
    assert exact.max_difference < 1e-3 < exact.trained_spread
    assert graph.max_difference < 2e-5
    assert exact.flips == graph.flips == 0
    assert exact.correlation > 0.999999
    assert graph.correlation > 0.999999
    assert exact.max_difference < eight.max_difference < 0.05 * eight.trained_spread
    trained = results.rung("trained")
    assert trained is not None
    assert trained.scores is not None
    assert trained.scores.max_difference == trained.scores.flips == 0
    assert trained.scores.accuracy == exact.accuracy == exact.trained_accuracy
    assert results.files[0].meaning[-1].startswith("it is a reward model")
    assert ValidationResults.model_validate_json(results.model_dump_json()).files[0].scores == exact


def test_transformers_scores_conversations_with_the_safetensors_directory(
    run: RunDirectory, files: dict[str, Path]
) -> None:
    folder = files["safetensors f32"]
    model = transformers.AutoModelForSequenceClassification.from_pretrained(folder, dtype=torch.float32).eval()
    tokenizer = transformers.AutoTokenizer.from_pretrained(folder)
    stored = RewardScores.of_run(run)
    assert stored is not None
    given = tokenizer.pad({"input_ids": stored.rows}, return_tensors="pt")  # with the token that the directory names
    with torch.no_grad():
        found = model(**given).logits[:, 0].numpy()
    np.testing.assert_allclose(found, stored.scores, rtol=0, atol=2e-5)
    rows = [json.loads(line) for line in Path(run.manifest.config["data"]["validation"]).read_text().splitlines()]
    talk = [{"role": "user", "content": rows[0]["prompt"]}, {"role": "assistant", "content": rows[0]["chosen"]}]
    rendered = tokenizer.apply_chat_template(talk, return_dict=True)["input_ids"]
    assert rendered[: len(stored.rows[0])] == stored.rows[0]


def test_the_gate_limits_the_scores(
    run: RunDirectory, files: dict[str, Path], tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    file, report = files["gguf q4_k_m"], tmp_path / "report.xml"
    command = ["validate", str(run.path), str(file), "--no-task", "--json", str(tmp_path / "v.json")]
    assert cli.run([*command, "--gate", "score_difference_max=9", "--gate", "pair_flips_max=1"]) == 0
    assert "scores of 8 pairs: accuracy" in " ".join(capfd.readouterr().out.split())
    assert cli.run([*command, "--gate", "score_difference_max=1e-7", "--junit", str(report)]) == 3
    assert "above the limit of 1e-07 (score_difference_max)" in " ".join(capfd.readouterr().err.split())
    cases = {case.get("name"): case.find("failure") for case in ElementTree.parse(report).iter("testcase")}
    assert cases["score_difference_max"] is not None
    assert cli.run([*command, "--rows", "2"]) == 0
    assert "scores of 2 pairs" in capfd.readouterr().out


def test_a_file_without_the_head_is_not_of_this_run(run: RunDirectory, tmp_path: Path) -> None:
    source = find_source(run.path)
    bare = replace(export_request(source, resolve_options(source.export_section, {})), score_head=None)
    exporting.export(replace(bare, targets=(Target("gguf", "f32", tmp_path / "bare.gguf"),)))
    results = edgetune.validate(run, [tmp_path / "bare.gguf"], gates=["pair_flips_max=0.1"])
    assert [miss.sentence for miss in results.misses] == [NO_HEAD]
    assert [each.figure for each in results.unmeasured] == ["pair_flips_max"]
    with load(tmp_path / "bare.gguf") as runtime, pytest.raises(RuntimeProblem, match="no reward model"):
        runtime.reward_scores([[1, 2]])


def test_a_reward_model_that_is_asked_for_texts_says_what_it_gives(
    run: RunDirectory, files: dict[str, Path], capfd: pytest.CaptureFixture[str]
) -> None:
    for kind in ("gguf f32", "onnx f32"):
        file = str(files[kind])
        commands = [["run", file, "--prompt", "lamp"], ["chat", file], ["serve", file, "--port", "0"]]
        for command in commands if kind.startswith("gguf") else commands[:2]:
            assert cli.run(command) == 1, command
            said = " ".join(capfd.readouterr().err.split())
            assert "is a reward model: it gives a score for a text and was not trained to write any" in said, command
            assert "reward_scores([ids])" in said
    pytest.importorskip("lm_eval")
    for source in (run.path, files["gguf f32"]):
        assert cli.run(["evaluate", str(source), "--tasks", "arc_easy"]) != 0
        assert "a reward model" in " ".join(capfd.readouterr().err.split())


def test_bad_rows_and_damaged_scores_are_refused(run: RunDirectory, files: dict[str, Path], tmp_path: Path) -> None:
    for kind in ("gguf f32", "onnx f32"):
        with load(files[kind]) as runtime:
            for rows, message in (([[]], "empty"), ([[9999]], "token 9999 is outside"), ([[1] * 999], "999 tokens")):
                with pytest.raises(RuntimeProblem, match=message):
                    runtime.reward_scores(rows)
            assert len(runtime.reward_scores([])) == 0
            long = list(range(3, 203)) + list(range(3, 53))  # several calls of the library
            assert np.isfinite(runtime.reward_scores([long, [7]])).all()
    (tmp_path / "scores.json").write_text('{"pairs": [{"chosen_ids": [1], "chosen": 1.0}]}')
    with pytest.raises(RunDirectoryError, match=r"scores.json is damaged: pairs\.0\.rejected_ids"):
        RewardScores.read(tmp_path / "scores.json")


def test_scores_of_a_run_without_a_version_are_read(tmp_path: Path) -> None:
    pair = {"chosen_ids": [1, 2], "rejected_ids": [1], "chosen": 0.5, "rejected": -0.5}
    (tmp_path / "scores.json").write_text(json.dumps({"pairs": [pair]}))
    assert RewardScores.read(tmp_path / "scores.json").scores == [0.5, -0.5]


def test_the_adapter_of_a_run_brings_its_head_and_is_not_combined(run: RunDirectory, tmp_path: Path) -> None:
    base = Path(run.manifest.config["base"])
    source = find_source(None, base, run.adapter)
    assert source.score_head is not None
    head = safetensors.numpy.load_file(run.score_head)["score.weight"]
    assert np.array_equal(source.score_head.weight, head[0])
    checkpoint = next(run.checkpoints.glob("checkpoint-*"))
    assert find_source(None, base, checkpoint).score_head is not None
    with pytest.raises(ConfigError, match="is the run of a reward model, whose score head fits its own adapter alone"):
        find_source(None, base, run.adapter, [tmp_path])


def test_report_and_model_card_show_the_scores(run: RunDirectory, files: dict[str, Path]) -> None:
    file = files["gguf q8_0"]
    assert cli.run(["validate", str(run.path), str(file), "--no-task"]) == 0
    page = render(gather(run, [file]))
    text = " ".join(re.sub(r"<[^>]*>", " ", page).split())
    assert "Scores of the reward model Of 8 held-out pairs, run-q8_0 ranks 100.0" in text
    assert "every pair has the same order" in text
    assert "of the training gain survives" not in text.split("Glossary")[0]
    receipt = Receipt.read(file)
    card = format_card("judge", [receipt], Path(run.manifest.config["base"]), run.manifest)
    assert "pipeline_tag: text-classification" in card
    assert "Scores of both answers of 8 held-out pairs" in card
    (row,) = (line for line in card.splitlines() if line.startswith("| `run-q8_0.gguf` | 100.0% | 0.0% | 0.00"))
    assert row.count("|") == 7
    assert "reward_scores" in card
