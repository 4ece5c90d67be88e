"""Rewards: what they give for an answer, short forms in YAML, and errors that show the row."""

from __future__ import annotations

from pathlib import Path
from typing import Any, cast

import pytest

from edgetune.config import Config, load_config, parse_config
from edgetune.data.objective_rows import EncodedPrompt
from edgetune.errors import ConfigError, DataError
from edgetune.objectives.online import Online
from edgetune.objectives.rewards import RewardConfig
from edgetune.planning.rewards import Reward, check_generation, leftover_prompts, make_rewards, try_rewards

MINIMAL = {"base": "b", "data": {"train": "t.jsonl"}}


def row(**columns: Any) -> EncodedPrompt:
    return EncodedPrompt([1], [{"role": "user", "content": "?"}], None, {}, columns, "train.jsonl, line 3")


def reward(value: Any) -> Reward:
    return Reward(RewardConfig.model_validate(value))


@pytest.mark.parametrize(
    ("config", "columns", "answer", "score"),
    [
        ("exact", {"answer": "red"}, " red\n", 1),
        ("exact", {"answer": "red"}, "red.", 0),
        ({"exact": "gold"}, {"gold": "red"}, "red", 1),
        ("json", {"answer": '{"a": 1, "b": 2}'}, '{"b": 2, "a": 1}', 1),
        ("json", {"answer": '{"a": 1}'}, "no json", 0),
        ("number", {"answer": 72}, "so she has 7 * 10 + 2 = 72.", 1),
        ("number", {"answer": "72"}, "71", 0),
        ({"kind": "exact", "extract": "<a>(.*)</a>"}, {"answer": "4"}, "<think>2\n+2</think><a>4</a>", 1),
        ({"kind": "exact", "extract": "<a>(.*)</a>"}, {"answer": "4"}, "4", 0),
        ({"regex": r"\bplease\b"}, {}, "yes, please do", 1),
        ("regex", {"answer": "^r.d$"}, "red", 1),
        ({"format": "<answer>.*</answer>"}, {}, "<answer>4</answer>", 1),
        ({"format": "<answer>.*</answer>"}, {}, "so <answer>4</answer>", 0),
    ],
)  # fmt: skip
def test_rewards_compare_the_answer_with_the_row(config: Any, columns: dict[str, Any], answer: str, score: int) -> None:
    assert reward(config).score(answer, row(**columns)) == score


def test_a_function_of_the_user_gets_the_answer_and_the_row(tmp_path: Path) -> None:
    file = tmp_path / "rewards.py"
    file.write_text("def score(answer, row):\n    return len(answer) / row['size'] + len(row['messages'])\n")
    assert reward({"python": f"{file}:score"}).score("abc", row(size=6)) == 1.5


@pytest.mark.parametrize(
    ("body", "message"),
    [
        ("return 'good'", r"with the answer 'red', returns 'good', which is no finite number"),
        ("return None", "returns None"),
        ("return float('nan')", "returns nan"),
        ("return [0.5, 0.5]", r"returns \[0.5, 0.5\], which is no finite number"),
        ("import numpy; return numpy.zeros(2)", r"returns array\(\[0., 0.\]\), which is no finite number"),
        ("return 10**400", r"returns 10+ \.\.\., which is no finite number"),
        ("raise SystemExit(0)", "raises SystemExit: 0"),
        ("raise ValueError('no\\nunit')", "raises ValueError: no unit"),
        ("return row['size']", r"train.jsonl, line 3, with the answer 'red', raises KeyError: 'size'"),
    ],
)
def test_a_function_that_fails_or_gives_no_number_is_an_error_with_the_row(
    body: str, message: str, tmp_path: Path
) -> None:
    file = tmp_path / "rewards.py"
    file.write_text(f"def score(answer, row):\n    {body}\n")
    rewards = make_rewards([RewardConfig.model_validate({"python": f"{file}:score"})])
    with pytest.raises(DataError, match=message):
        try_rewards(rewards, [row(answer="red")])


def test_a_row_without_the_expected_answer_is_named_before_training() -> None:
    with pytest.raises(DataError, match=r"line 3: the reward number reads the column 'answer', which the row does not"):
        try_rewards(make_rewards([RewardConfig.model_validate("number")]), [row(gold="4")])
    with pytest.raises(DataError, match="line 3: the reward number: the expected answer 'four' holds no number"):
        try_rewards(make_rewards([RewardConfig.model_validate("number")]), [row(answer="four")])


def test_a_function_that_is_not_there_is_named(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="there is no file"):
        reward({"python": f"{tmp_path}/none.py:score"}).score("", row())
    file = tmp_path / "rewards.py"
    file.write_text("other = 1\n")
    with pytest.raises(ConfigError, match="has no function 'score'"):
        reward({"python": f"{file}:score"}).score("", row())
    file.write_text("import sys\nsys.exit()\n")
    with pytest.raises(ConfigError, match="cannot be run: SystemExit"):
        reward({"python": f"{file}:score"}).score("", row())
    file.write_text("def score(:\n")
    with pytest.raises(ConfigError, match="cannot be run: SyntaxError"):
        reward({"python": f"{file}:score"}).score("", row())


def test_rewards_are_written_short_in_yaml_and_paths_are_those_of_the_configuration(tmp_path: Path) -> None:
    (tmp_path / "rewards.py").write_text("def score(answer, row):\n    return 1\n")
    file = tmp_path / "config.yaml"
    file.write_text(
        "base: b\ndata: {train: t.jsonl}\nobjective:\n  kind: grpo\n  rewards:\n  - exact\n"
        "  - {format: '<a>.*</a>', weight: 0.2}\n  - {python: './rewards.py:score'}\n"
    )
    rewards = cast(Online, load_config(file).objective).rewards
    assert [(each.name, each.weight) for each in rewards] == [("exact", 1), ("format", 0.2), ("score", 1)]
    assert rewards[2].function == f"{tmp_path / 'rewards.py'}:score"
    again = parse_config(load_config(file).model_dump(mode="json"))  # as run.json stores it
    assert cast(Online, again.objective).rewards == rewards


@pytest.mark.parametrize(
    ("rewards", "message"),
    [
        ([], "objective.rewards is"),
        (["exactly"], "kind is 'exactly'"),
        (["format"], "needs a pattern"),
        ([{"number": "a", "json": "b"}], "names 2 kinds of rewards: give number and json apart"),
        ([{"weight": 2}], "names no kind of reward: give one of exact, json, "),
        ([{"regex": "("}], "not a regular expression"),
        ([{"python": "rewards.py"}], "needs a function"),
        ([{"kind": "exact", "extract": "abc"}], "must have one group"),
        ([{"kind": "exact", "pattern": "abc"}], "reads no pattern"),
        ([{"format": "abc", "column": "key"}], "the reward `format` compares with no column of the row"),
        ([{"python": "file.py:f", "extract": "(.*)"}], "the reward `python` is given the whole answer"),
        ([{"kind": "exact", "weight": 0}], "have no weight"),
        (["exact", {"kind": "exact", "weight": 2}], "have exact twice, which counts twice"),
    ],
)
def test_wrong_rewards_are_refused_by_name(rewards: list[Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        parse_config({**MINIMAL, "objective": {"kind": "grpo", "rewards": rewards}})


def test_a_batch_that_groups_do_not_fit_is_refused() -> None:
    with pytest.raises(ConfigError, match=r"12 answers a step, which objective\.num_generations 8 does not divide"):
        parse_config({**MINIMAL, "objective": {"kind": "grpo"}, "training": {"batch_size": 12}})


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"objective": {"kind": "dpo"}, "adapter": {"init": "pissa"}}, "pissa takes values out of the base"),
        (
            {"objective": {"kind": "reward"}, "export": {"formats": ["gguf", "gguf-lora"]}},
            "gguf-lora has no place for the",
        ),
        ({"objective": {"kind": "reward"}, "adapter": {"kind": "full"}}, "beside the adapter, and adapter.kind: full"),
        ({"objective": {"kind": "rloo"}, "adapter": {"kind": "full"}}, "PEFT alone, which .* full is not"),
    ],
)
def test_methods_and_formats_that_an_objective_cannot_have_are_refused(options: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        parse_config({**MINIMAL, "quantization": {"bits": 16}, **options})
    parse_config({**MINIMAL, "quantization": {"bits": 16}, **options, "objective": {"kind": "sft"}})


def online(**training: int) -> Config:
    objective = {"kind": "grpo", "num_generations": 4}
    return parse_config(MINIMAL | {"objective": objective, "training": {"batch_size": 8, **training}})


def test_prompts_that_fill_no_step_are_an_error_and_leftover_ones_are_told() -> None:
    prompts = [row(answer="red") for _ in range(7)]
    check_generation(online(), None, prompts, prompts)
    assert leftover_prompts(online(), 6) is None
    assert "1 of 7 prompts fill no whole step of 2, so each pass over the prompts leaves out 1" in str(
        leftover_prompts(online(), 7)
    )
    with pytest.raises(DataError, match=r"7 prompts to train on cannot fill a step of 8: training.batch_size 8 times"):
        check_generation(online(gradient_accumulation=4), None, prompts, prompts)


@pytest.mark.parametrize(("prompts", "accumulation", "steps"), [(7, 1, 3), (8, 2, 2), (3, 1, 1)])
def test_the_steps_of_an_epoch_are_those_of_whole_groups_of_answers(
    prompts: int, accumulation: int, steps: int
) -> None:
    config = online(gradient_accumulation=accumulation)
    assert config.objective.steps_per_epoch(prompts, config.training.batching) == steps
