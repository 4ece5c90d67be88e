"""Adapters on the output matrix and on the embedding, tied or not: trained through the model's own forward, merged."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from peft.tuners.tuners_utils import BaseTunerLayer

from edgetune.errors import ConfigError
from edgetune.exporting.run import prepare_export
from edgetune.exporting.source import find_source
from edgetune.methods import Lora
from edgetune.objectives import OBJECTIVES
from edgetune.reference.store import summary
from edgetune.training import adapters
from edgetune.training.run import train
from tests.converters import vocabularies
from tests.training import kinds, runs
from tests.training.objectives import encoded
from tests.training.test_adapters import IDS, KINDS, SHAPE, adapted, logits

SCORING = ("sft", "dpo", "kto", "grpo", "rloo")
"""Objectives whose trainers multiply by the output matrix themselves."""
ONLINE = {"num_generations": 4, "max_completion_length": 6, "rewards": [{"regex": "[aeiou]"}]}
OPTIONS: dict[str, dict[str, Any]] = {"grpo": ONLINE, "rloo": ONLINE}
FAST = ("lora", "oft", "gralora", "osf")


@pytest.fixture(scope="module")
def bases(tmp_path_factory: pytest.TempPathFactory) -> dict[bool, Path]:
    """A base with an output matrix of its own (False), and one that is tied."""
    found = {tied: tmp_path_factory.mktemp("tied" if tied else "untied") for tied in (False, True)}
    for tied, folder in found.items():
        vocabularies.byte_level(folder)
        torch.manual_seed(0)
        config = transformers.LlamaConfig(**{**SHAPE, "tie_word_embeddings": tied})
        transformers.LlamaForCausalLM(config).save_pretrained(folder)
    return found


def load(folder: Path) -> Any:
    return transformers.AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)


def _slow(kind: str) -> list[pytest.MarkDecorator]:
    return [] if kind in FAST else [pytest.mark.slow]


@pytest.mark.parametrize("tied", [False, True])
@pytest.mark.parametrize(("kind", "target"), [
    *[pytest.param(kind, "lm_head", marks=_slow(kind)) for kind in KINDS if kind != "beft"],
    *[(kind, "embed_tokens") for kind in ("lora", "hira", "oft")],
])  # fmt: skip
def test_an_adapted_end_is_merged_as_the_trained_model_has_it(
    kind: str, target: str, tied: bool, bases: dict[bool, Path], tmp_path: Path
) -> None:
    before = logits(load(bases[tied]))
    model = adapted(load(bases[tied]), kinds.method_of(kind, target_modules=["q_proj", target]))
    modules = dict(model.get_base_model().named_modules())
    ends = {name: module for name, module in modules.items() if name.endswith(target)}
    assert [isinstance(module, BaseTunerLayer) for module in ends.values()] == [True]
    expected = logits(model)
    model.save_pretrained(str(tmp_path / "adapter"))
    assert torch.equal(logits(adapters.load_adapter(load(bases[tied]), tmp_path / "adapter").eval()), expected)
    source = find_source(None, bases[tied], tmp_path / "adapter")
    prepare_export(source, {"formats": ["safetensors"], "types": ["f32"]}, tmp_path / "merged").run()
    merged = logits(load(tmp_path / "merged"))
    assert (expected - before).abs().max() > 1e-3
    # f32 rounds each of some hundred terms of a sum by 2^-24 of its size
    torch.testing.assert_close(merged, expected, rtol=0, atol=float(expected.abs().max()) * 2e-6)


def _trainer(base: Path, folder: Path, objective: str, targets: list[str]) -> Any:
    folder.mkdir()
    values = encoded.settings(base, folder, {"kind": objective, **OPTIONS.get(objective, {})})
    values["adapter"] |= {"target_modules": targets}
    return encoded.trainer_of(encoded.prepare(values), folder / "checkpoints")


@pytest.mark.parametrize("objective", SCORING)
def test_trainers_score_an_adapted_head_as_they_score_others(objective: str, base: Path, tmp_path: Path) -> None:
    """A new adapter changes nothing, so that TRL's own computation gives what ours has to give."""
    with_head = _trainer(base, tmp_path / "head", objective, ["q_proj", "lm_head"])
    plain = _trainer(base, tmp_path / "plain", objective, ["q_proj"])
    labels = IDS.clone()
    labels[0, :9] = labels[1, :14] = labels[1, 20:] = -100
    found, wanted = (
        trainer.model.eval()(input_ids=IDS, labels=labels, fused_lm_head=True) for trainer in (with_head, plain)
    )
    names = [name for name, value in wanted.items() if value is not None]
    assert {"loss", "log_probs", "label_mask"} <= set(names)
    for name in names:
        torch.testing.assert_close(found[name], wanted[name], rtol=1e-4, atol=1e-5, msg=name)
    found.loss.backward()
    gradients = {name: float(p.grad.abs().max()) for name, p in with_head.model.named_parameters() if p.requires_grad}
    assert gradients.keys() == {name for name in gradients if ".lora_" in name}
    assert min(size for name, size in gradients.items() if "lm_head" in name and ".lora_B." in name) > 1e-4


def test_the_loss_is_the_cross_entropy_of_the_changed_logits(base: Path, tmp_path: Path) -> None:
    trainer = _trainer(base, tmp_path / "head", "sft", ["lm_head"])
    torch.manual_seed(3)
    for name, parameter in trainer.model.named_parameters():
        if parameter.requires_grad:
            assert "lm_head" in name
            torch.nn.init.normal_(parameter, std=0.2)
    trainer.model.eval()
    batch = next(iter(trainer.get_train_dataloader()))
    targets = batch["labels"][:, 1:]
    count = (targets != -100).sum()
    with torch.no_grad():
        logs = trainer.model(input_ids=batch["input_ids"], attention_mask=batch["attention_mask"]).logits[:, :-1]
        loss = trainer.compute_loss(trainer.model, dict(batch), num_items_in_batch=count)
    wanted = torch.nn.functional.cross_entropy(logs.flatten(0, 1), targets.flatten(), reduction="sum") / count
    assert float(loss) == pytest.approx(float(wanted), rel=1e-5)


def test_a_batch_without_scored_tokens_has_the_loss_zero(base: Path, tmp_path: Path) -> None:
    trainer = _trainer(base, tmp_path / "head", "sft", ["lm_head"])
    found = trainer.model(input_ids=IDS, labels=torch.full_like(IDS, -100), fused_lm_head=True)
    assert found.loss.item() == 0
    found.loss.backward()


@pytest.mark.parametrize("objective", [
    pytest.param(kind, marks=[] if kind == "dpo" else pytest.mark.slow) for kind in OBJECTIVES if kind != "reward"
])  # fmt: skip
def test_every_objective_trains_an_adapted_head(objective: str, base: Path, tmp_path: Path) -> None:
    values = encoded.settings(base, tmp_path, {"kind": objective, **OPTIONS.get(objective, {})}, max_steps=2)
    values["adapter"] |= {"target_modules": ["lm_head"]}
    if objective == "distillation":
        values["objective"]["teacher"] = str(base)
    path = runs.write_config(tmp_path / "config.yaml", values)
    run = train(path, tmp_path / "run")
    entropy = summary(run).cross_entropy
    assert entropy["trained"] != entropy["base"]
    assert not run.train_results.adapter_is_zero


def test_a_reward_model_has_no_use_for_an_adapted_head(base: Path, tmp_path: Path) -> None:
    values = encoded.settings(base, tmp_path, {"kind": "reward"})
    values["adapter"] |= {"target_modules": ["q_proj", "lm_head"]}
    path = runs.write_config(tmp_path / "config.yaml", values)
    with pytest.raises(ConfigError, match=r"names the output matrix, and objective\.kind: reward trains a score head"):
        train(path, tmp_path / "run")


@pytest.mark.parametrize("init", ["pissa", "olora", "corda", "lora_ga"])
def test_a_start_that_is_taken_out_of_a_tied_head_is_refused(init: str, bases: dict[bool, Path]) -> None:
    method = Lora(r=4, init=init, target_modules=["lm_head"])
    with pytest.raises(ConfigError, match=f"adapter.init: {init} takes its first values out of the output matrix"):
        adapters.add_adapter(load(bases[True]), method)
    if init == "pissa":
        adapters.add_adapter(load(bases[False]), method)


def test_only_kinds_with_layers_for_embeddings_adapt_one(bases: dict[bool, Path]) -> None:
    for kind in KINDS:
        if kind in ("lora", "hira", "oft", "beft"):
            continue
        with pytest.raises(ConfigError, match=r"cannot adapt model\.embed_tokens, which lora, hira, oft can"):
            adapters.add_adapter(load(bases[True]), kinds.method_of(kind, target_modules=["embed_tokens"]))
