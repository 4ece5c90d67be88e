"""The estimate of memory that `train --dry-run` prints, beside what torch allocates in a training."""

from __future__ import annotations

import gc
import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers

from edgetune.objectives import OBJECTIVES
from edgetune.planning.memory import (
    USABLE,
    Arithmetic,
    MemoryEstimate,
    TrainingLayout,
    choose_layout,
    describe_layout,
    describe_memory,
    estimate_memory,
    layouts,
)
from edgetune.planning.prepare import PreparedRun
from edgetune.training import adapters, environment
from tests.converters import vocabularies
from tests.data import templates
from tests.training import runs
from tests.training.objectives import encoded

BAND = (0.85, 1.25)
"""Estimated bytes over measured ones."""
STORED = ("weights", "adapter", "trained weights in f32")
FLOAT32 = Arithmetic(4, 4)
ONLINE = {"num_generations": 4, "max_completion_length": 24, "rewards": [{"regex": "[a-z]"}], "beta": 0.1}
CASES: Mapping[str, dict[str, Any]] = {
    **{kind: {"objective": {"kind": kind}} for kind in OBJECTIVES if kind not in ("grpo", "rloo", "distillation")},
    "grpo": {"objective": {"kind": "grpo", **ONLINE}},
    "rloo": {"objective": {"kind": "rloo", **ONLINE}},
    "distillation": {"objective": {"kind": "distillation"}},
    "activations stored": {"training": {"gradient_checkpointing": False}},
    "every weight": {"adapter": {"kind": "full"}, "training": {"optimizer": "adamw_torch"}},
    "4 bits": {"quantization": {"bits": 4, "compute_dtype": "float32"}},
}
FAST = ("sft", "dpo", "distillation")


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A random Llama whose logits are larger than its layers, as those of small models are."""
    directory = tmp_path_factory.mktemp("base") / "hf"
    vocabularies.byte_level(directory, chat_template=templates.CHATML, pad_token="<|endoftext|>")
    torch.manual_seed(0)
    shape = runs.SHAPE | {"vocab_size": 4096, "num_hidden_layers": 4}
    transformers.LlamaForCausalLM(transformers.LlamaConfig(**shape)).save_pretrained(directory)
    return directory


def prepare(base: Path, folder: Path, case: dict[str, Any]) -> PreparedRun:
    objective = {"kind": "sft", **case.get("objective", {})}
    if objective["kind"] == "distillation":
        objective["teacher"] = str(base)
    steps = {"max_steps": 2, "eval_steps": 1000, "save_steps": 1000, **case.get("training", {})}
    values = encoded.settings(base, folder, objective, **steps)
    values |= {key: case[key] for key in ("adapter", "quantization") if key in case}
    return encoded.prepare(values)


def peak_of(profile: Any) -> int:
    """The largest number of bytes that torch had at one time, above those at the start of the profile."""
    now = highest = 0
    for event in profile.profiler.kineto_results.events():
        if event.name() == "[memory]":
            now += event.nbytes()
            highest = max(highest, now)
    return highest


def parts(estimate: MemoryEstimate) -> dict[str, float]:
    return {part.name: part.bytes for part in estimate.parts}


@pytest.mark.parametrize("name", [pytest.param(name, marks=[] if name in FAST else pytest.mark.slow) for name in CASES])
def test_the_estimate_is_near_what_torch_allocates(name: str, base: Path, tmp_path: Path) -> None:
    prepared = prepare(base, tmp_path, CASES[name])
    trainer = encoded.trainer_of(prepared, tmp_path / "checkpoints")
    stored = sum(parameter.nbytes for parameter in trainer.model.parameters())
    estimate = estimate_memory(prepared, adapters.count_trainable(trainer.model), FLOAT32)
    found = parts(estimate)
    assert sum(found.get(part, 0) for part in STORED) == pytest.approx(stored, rel=0.05)
    gc.collect()  # the models of earlier tests, whose end would count as memory that is given back here
    activities = [torch.profiler.ProfilerActivity.CPU]
    with environment.silence_libraries(), torch.profiler.profile(activities=activities, profile_memory=True) as profile:
        trainer.train()
    beside = ("teacher", "copy of them as in the base")
    working = estimate.total - sum(found.get(part, 0) for part in (*STORED, *beside))
    assert BAND[0] < working / peak_of(profile) < BAND[1]


def test_a_teacher_is_a_second_model_and_a_reference_model_is_not(base: Path, tmp_path: Path) -> None:
    alone = prepare(base, tmp_path, CASES["sft"])
    taught = prepare(base, tmp_path, CASES["distillation"])
    weights = sum(4 * math.prod(info.shape) for info in alone.base.checkpoint.tensors.values())
    for bits, prepared in ((16, alone), (16, taught)):
        found = estimate_memory(prepared, 1000, FLOAT32)
        assert prepared.config.quantization.bits == bits
        assert parts(found).get("teacher", 0) == (weights if prepared is taught else 0)
        assert "reference model" not in describe_memory(found, prepared.config.objective)
    compared = prepare(base, tmp_path, CASES["dpo"])
    found = estimate_memory(compared, 1000, FLOAT32)
    assert "teacher" not in parts(found)
    assert "the reference model is the base with the trained change switched off, and takes none" in describe_memory(
        found, compared.config.objective
    )


def test_the_fastest_layout_that_fits_is_chosen_and_the_configuration_is_followed(base: Path, tmp_path: Path) -> None:
    quantized = {"bits": 4, "compute_dtype": "float32"}
    auto = {"training": {"gradient_checkpointing": "auto"}, "quantization": quantized}
    open_ = prepare(base, tmp_path, auto)
    sizes = [estimate_memory(open_, 1000, FLOAT32, layout=each).total for each in layouts(open_.config)]
    assert layouts(open_.config)[0] == TrainingLayout(resident=True, checkpointing=False)
    assert layouts(open_.config)[-1] == TrainingLayout(resident=False, checkpointing=True)
    for layout, size in zip(layouts(open_.config), sizes, strict=True):
        if size == min(sizes[: sizes.index(size) + 1]):
            assert choose_layout(open_, 1000, FLOAT32, size / USABLE * 1.001) == layout
    assert choose_layout(open_, 1000, FLOAT32, 0) == TrainingLayout(resident=False, checkpointing=True)
    assert "dequantizing weights at each use and recomputing" in str(
        describe_layout(choose_layout(open_, 1000, FLOAT32, 0), open_.config, 0)
    )
    stated = prepare(
        base, tmp_path, {"training": {"gradient_checkpointing": True}, "quantization": {**quantized, "resident": False}}
    )
    assert choose_layout(stated, 1000, FLOAT32, 1e15) == TrainingLayout(resident=False, checkpointing=True)
    assert describe_layout(layouts(stated.config)[0], stated.config, 1e15) is None
    prefix = prepare(base, tmp_path, {"adapter": {"kind": "prefix-tuning"}})
    assert choose_layout(prefix, 1000, FLOAT32, 0) == TrainingLayout(resident=False, checkpointing=False)
