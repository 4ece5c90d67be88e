"""Distillation: the divergence from a local teacher on our labels; the answers of an endpoint as rows."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import safetensors.torch
import torch

from edgetune.config import parse_config
from edgetune.errors import ConfigError
from edgetune.planning.prepare import prepare_run
from edgetune.training.run import dry_run, train
from tests.planning.openai_server import answer, serving
from tests.training.objectives import encoded


@pytest.fixture(scope="module")
def teacher(base: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The base with sharper probabilities."""
    path = Path(shutil.copytree(base, tmp_path_factory.mktemp("teacher") / "teacher"))
    weights = safetensors.torch.load_file(path / "model.safetensors")
    weights["model.embed_tokens.weight"] *= 4
    safetensors.torch.save_file(weights, path / "model.safetensors", metadata={"format": "pt"})
    return path


@pytest.mark.parametrize("options", [{}, {"beta": 1.0}, {"temperature": 2.0, "sft_weight": 0.5}])
def test_the_loss_is_the_divergence_at_the_trained_tokens(
    options: dict[str, Any], base: Path, teacher: Path, tmp_path: Path
) -> None:
    objective = {"kind": "distillation", "teacher": str(teacher), **options}
    prepared = encoded.prepare(encoded.settings(base, tmp_path, objective))
    trainer = encoded.trainer_of(prepared, tmp_path / "checkpoints")
    trainer.model.eval()
    total, count = 0.0, 0
    temperature = options.get("temperature", 1.0)
    rows = prepared.validation.rows[:4]
    for row in rows:
        ids = torch.tensor([row.input_ids])
        with torch.no_grad():
            theirs, ours = (model(input_ids=ids).logits[0].double() for model in (trainer.teacher, trainer.model))
        p, q = (torch.log_softmax(each / temperature, -1) for each in (theirs, ours))
        if options.get("beta") == 1.0:
            p, q = q, p
        for position in row.scored:
            total += temperature**2 * float((p[position - 1].exp() * (p - q)[position - 1]).sum())
            own = torch.log_softmax(ours[position - 1], -1)[row.input_ids[position]]
            total -= options.get("sft_weight", 0.0) * float(own)
            count += 1
    batch = trainer.data_collator([{"input_ids": row.input_ids, "labels": row.labels} for row in rows])
    with torch.no_grad():
        loss = trainer.compute_loss(trainer.model, batch)
    assert float(loss) == pytest.approx(total / count, rel=1e-4)


def test_a_teacher_with_another_vocabulary_is_refused_before_training(base: Path, tmp_path: Path) -> None:
    other = Path(shutil.copytree(base, tmp_path / "other"))
    content = json.loads((other / "tokenizer.json").read_text())
    vocabulary = content["model"]["vocab"]
    first, second = list(vocabulary)[:2]
    vocabulary[first], vocabulary[second] = vocabulary[second], vocabulary[first]
    (other / "tokenizer.json").write_text(json.dumps(content))
    values = encoded.settings(base, tmp_path, {"kind": "distillation", "teacher": str(other)})
    with pytest.raises(ConfigError, match="has another vocabulary than the base: the token"):
        dry_run(parse_config(values), tmp_path / "run")
    values["objective"]["teacher"] = str(tmp_path)
    with pytest.raises(ConfigError, match="is no model directory"):
        dry_run(parse_config(values), tmp_path / "run")


def test_the_answers_of_an_endpoint_are_trained_on_and_kept_in_the_run(base: Path, tmp_path: Path) -> None:
    with serving(lambda body, _: answer("blue")) as server:
        objective = {"kind": "distillation", "teacher": server.url, "teacher_model": "large"}
        values = encoded.settings(base, tmp_path, objective, max_steps=2)
        rows = [{"prompt": f"lamp {number}?"} for number in range(12)]
        Path(values["data"]["train"]).write_text("".join(json.dumps(row) + "\n" for row in rows))
        config = parse_config(values)
        run = train(config, tmp_path / "run")
        assert len(server.asked) == 12 + 8
    assert run.train_results.steps == 2
    stored = [json.loads(line)["answer"] for line in run.teacher_answers.read_text().splitlines()]
    assert stored == ["blue"] * 20
    blue = prepare_run(config).tokenizer.encode("blue")[0]
    results = run.train_results.rows["train"]
    assert results["supervised_tokens"] == 12 * (len(blue) + 1)
    # the endpoint is gone, and a finished run does not need it
    assert train(config, tmp_path / "run", resume=True).path == run.path
