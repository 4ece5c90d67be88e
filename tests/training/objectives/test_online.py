"""GRPO and RLOO: prompts are our token ids, answers are read as in validation, and rewards rise."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

import pytest
import safetensors.torch
import torch

from edgetune.config import parse_config
from edgetune.errors import DataError, RunDirectoryError
from edgetune.report.facts import run_facts
from edgetune.training.objectives.online import TRAIN, PromptIds
from edgetune.training.run import train
from tests.training.objectives import encoded


def _settings(base: Path, folder: Path, objective: dict[str, Any], **training: Any) -> dict[str, Any]:
    options = {"num_generations": 4, "max_completion_length": 6, "rewards": ["exact"], **objective}
    return encoded.settings(base, folder, options, **training)


@pytest.mark.parametrize("kind", ["grpo", "rloo"])
def test_the_model_is_given_our_prompts_and_stops_at_our_stop_tokens(kind: str, base: Path, tmp_path: Path) -> None:
    prepared = encoded.prepare(_settings(base, tmp_path, {"kind": kind}))
    trainer = encoded.trainer_of(prepared, tmp_path / "checkpoints")
    seen: list[Any] = []
    generate = trainer._generate_single_turn

    def watched(ids: Any, *rest: Any) -> Any:
        seen.append(ids)
        return generate(ids, *rest)

    trainer._generate_single_turn = watched
    trainer.model.eval()
    rows = [trainer.train_dataset[0]] * 4
    batch = trainer._generate_and_score_completions(rows)
    expected = prepared.train.prompts[0].prompt_ids
    assert seen == [[expected] * 4]
    assert batch["prompt_ids"].tolist() == [expected] * 4
    assert trainer.generation_config.eos_token_id == sorted(prepared.stop_ids)


def test_an_answer_is_read_without_its_stop_token(base: Path, tmp_path: Path) -> None:
    prepared = encoded.prepare(_settings(base, tmp_path, {"kind": "grpo"}))
    prompts = PromptIds(prepared)
    (stop,) = prepared.stop_ids
    for number in range(4):
        key = f"{TRAIN} {number}"
        expected = prompts[key].columns["answer"]
        ids = prepared.tokenizer.encode(expected)[0]
        assert prompts.read(key, [*ids, stop]) == prompts.read(key, ids) == expected
        assert expected.startswith(prompts.read(key, ids[:1]))


@pytest.mark.parametrize("kind", ["grpo", "rloo"])
def test_the_reward_rises(kind: str, base: Path, tmp_path: Path) -> None:
    """A random base answers with any byte; after a few steps nearly all are lower case letters."""
    sharp = shutil.copytree(base, tmp_path / "sharp")  # the tiny base is so flat that no adapter could change much
    weights = safetensors.torch.load_file(sharp / "model.safetensors")
    weights["model.embed_tokens.weight"] *= 10
    safetensors.torch.save_file(weights, sharp / "model.safetensors", metadata={"format": "pt"})
    file = tmp_path / "rewards.py"
    file.write_text("def letters(answer, row):\n    return sum(map(str.islower, answer)) / max(1, len(answer))\n")
    objective = {"kind": kind, "rewards": [{"python": f"{file}:letters"}], "num_generations": 8}
    prepared = encoded.prepare(
        _settings(sharp, tmp_path, objective, max_steps=12, batch_size=32, learning_rate=1e-2, optimizer="adamw_torch",
                  gradient_checkpointing=False, eval_steps=1000, save_steps=1000, scheduler="constant")
    )  # fmt: skip
    trainer = encoded.trainer_of(prepared, tmp_path / "checkpoints")
    trainer.train()
    rewards = [entry["reward"] for entry in trainer.state.log_history if "reward" in entry]
    assert len(rewards) == 12
    assert max(rewards[:3]) < 0.5 < min(rewards[-2:])


def test_an_evaluation_leaves_the_random_numbers_of_training_alone(base: Path, tmp_path: Path) -> None:
    trainer = encoded.trainer_of(encoded.prepare(_settings(base, tmp_path, {"kind": "grpo"})), tmp_path / "checkpoints")
    before = torch.get_rng_state()
    first = trainer.evaluate()
    assert torch.equal(torch.get_rng_state(), before)
    assert first["eval_reward"] == trainer.evaluate()["eval_reward"]


def test_a_function_that_fails_during_training_stops_it_with_the_row(base: Path, tmp_path: Path) -> None:
    file = tmp_path / "rewards.py"
    file.write_text("def score(answer, row):\n    return 1 if answer == row['answer'] else 1 / 0\n")
    objective = {"kind": "grpo", "rewards": [{"python": f"{file}:score"}]}
    trainer = encoded.trainer_of(encoded.prepare(_settings(base, tmp_path, objective)), tmp_path / "checkpoints")
    with pytest.raises(DataError, match=r"train\.jsonl, line \d+, with the answer .* raises ZeroDivisionError"):
        trainer.train()


def test_a_run_whose_reward_function_has_changed_is_not_resumed(base: Path, tmp_path: Path) -> None:
    file = tmp_path / "rewards.py"
    file.write_text("def score(answer, row):\n    return len(answer)\n")
    objective = {"kind": "grpo", "rewards": [{"python": f"{file}:score"}]}
    config = parse_config(_settings(base, tmp_path, objective, max_steps=1))
    run = train(config, tmp_path / "run")
    assert train(config, tmp_path / "run", resume=True).path == run.path
    facts = dict(run_facts(run.manifest))
    assert facts["objective"] == "grpo"
    assert float(facts["held-out reward"]) > 0
    file.write_text("def score(answer, row):\n    return -len(answer)\n")
    with pytest.raises(RunDirectoryError, match=r"the objective's rewards\.py differ"):
        train(config, tmp_path / "run", resume=True)
