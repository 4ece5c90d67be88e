"""Reward models: the loss on scores of the last token; the head and the scores are in the run."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import safetensors.numpy
import torch

from edgetune import cli
from edgetune.config import parse_config
from edgetune.training.run import train
from edgetune.validation.scores import compare_scores
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


def test_the_head_is_trained_stored_and_exported_with_scores_that_a_file_gives_too(
    base: Path, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    values = encoded.settings(base, tmp_path, {"kind": "reward"}, max_steps=30, learning_rate=1e-2, eval_steps=30)
    run = train(parse_config(values), tmp_path / "run")
    head = safetensors.numpy.load_file(run.score_head)["score.weight"]
    assert head.shape == (1, 64)
    assert head.dtype == np.float32
    pairs = json.loads(run.scores_file.read_text())["pairs"]
    assert len(pairs) == 4
    assert run.train_results.metrics["reward_accuracy"] > 0.8
    assert sum(pair["chosen"] > pair["rejected"] for pair in pairs) >= 3
    assert cli.run(["merge-export", str(run.path), "-q", "f32"]) == 0
    (file,) = run.artifacts.glob("*.gguf")
    compared = compare_scores(run, file)
    assert compared is not None
    # llama.cpp keeps keys and values in 16 bits: 2**-11 of scores of about 5
    assert compared.largest_difference < 1e-3 < compared.spread
    assert compared.agreement == 1
    assert cli.run(["validate", str(run.path), str(file)]) == 0
    assert "scores of 4 pairs: accuracy" in capfd.readouterr().out
    names = safetensors.numpy.load_file(run.adapter / "adapter_model.safetensors")
    assert not [name for name in names if "score" in name]  # the adapter is one of the language model
