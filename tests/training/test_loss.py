"""What the optimizer sees: the loss of the assistant's tokens, and bitsandbytes' own optimizers and layers."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import pytest
import torch

from edgetune.config import Config, parse_config
from edgetune.data.masks import EncodedRow
from edgetune.errors import ConfigError, DataError
from edgetune.planning.prepare import PreparedRun, prepare_run
from edgetune.training import adapters, environment
from edgetune.training.loading import compute_dtype, four_bit_layers, load_model, load_tokenizer
from edgetune.training.objectives import TrainerInputs, build_trainer
from edgetune.training.objectives.arguments import common_arguments
from edgetune.training.objectives.sft import Collator, SftTrainer, check_batch
from tests.training import runs


@environment.silence_libraries()
def _trainer(config: Config, directory: Path) -> tuple[SftTrainer, PreparedRun]:
    plan = prepare_run(config)
    torch.manual_seed(0)
    model = adapters.add_adapter(load_model(plan.base, config), config.adapter)
    return build_trainer(TrainerInputs(model, load_tokenizer(plan), plan, directory)), plan


@pytest.fixture(scope="module")
def made(base: Path, tmp_path_factory: pytest.TempPathFactory) -> tuple[SftTrainer, PreparedRun]:
    folder = tmp_path_factory.mktemp("loss")
    values = runs.settings(base, folder)
    values["quantization"] = {"compute_dtype": "float32"}
    return _trainer(parse_config(values), folder / "checkpoints")


def _first_batch(trainer: SftTrainer) -> dict[str, Any]:
    return next(iter(trainer.get_train_dataloader()))


def test_loss_is_the_masked_cross_entropy_of_the_assistants_tokens(made: tuple[SftTrainer, PreparedRun]) -> None:
    trainer, plan = made
    batch = _first_batch(trainer)
    ids = batch["input_ids"].tolist()
    by_ids = {tuple(row.input_ids): row for row in plan.train.rows}
    trainer.model.eval()
    total, count = 0.0, 0
    for row_ids, attended in zip(ids, batch["attention_mask"].sum(1).tolist(), strict=True):
        row = by_ids[tuple(row_ids[:attended])]
        with torch.no_grad():
            logits = trainer.model(input_ids=torch.tensor([row.input_ids])).logits[0].double()
        losses = -torch.log_softmax(logits, -1)
        total += sum(float(losses[position - 1, row.input_ids[position]]) for position in row.scored)
        count += len(row.scored)
    with torch.no_grad():
        loss = trainer.compute_loss(trainer.model, dict(batch), num_items_in_batch=torch.tensor(count))
    assert count == int((batch["labels"] != -100).sum())
    assert float(loss) == pytest.approx(total / count, rel=1e-5)


def test_batches_keep_our_masks_and_train_the_stop_token(made: tuple[SftTrainer, PreparedRun]) -> None:
    trainer, plan = made
    batch = _first_batch(trainer)
    trained = batch["labels"] != -100
    stop = plan.tokenizer.id_of("<|im_end|>")
    assert ((batch["labels"] == stop) & trained).sum() == len(batch["labels"])
    assert not (trained & ~batch["attention_mask"].bool()).any()
    assert plan.pad_id not in plan.stop_ids


def test_base_is_nf4_with_double_quantization_and_frozen(made: tuple[SftTrainer, PreparedRun]) -> None:
    trainer, _ = made
    layers = four_bit_layers(trainer.model)
    assert len(layers) == 2 * 7
    state = layers[0].weight.quant_state
    assert (state.quant_type, state.blocksize, state.nested) == ("nf4", 64, True)
    trained = {name: p for name, p in trainer.model.named_parameters() if p.requires_grad}
    assert trained
    assert all("lora_" in name and p.dtype == torch.float32 for name, p in trained.items())


def test_weights_stay_as_quantized_when_evaluated(made: tuple[SftTrainer, PreparedRun]) -> None:
    """bitsandbytes repacks weights on some CPUs in evaluation mode; the model must not change half way."""
    trainer, plan = made
    before = [layer.weight.data.clone() for layer in four_bit_layers(trainer.model)]
    trainer.model.eval()
    with torch.no_grad():
        trainer.model(input_ids=torch.tensor([plan.train.rows[0].input_ids]))
    after = [layer.weight.data for layer in four_bit_layers(trainer.model)]
    assert all(torch.equal(one, other) for one, other in zip(before, after, strict=True))


@pytest.mark.parametrize(
    ("name", "paged", "bits"),
    [("paged_adamw_8bit", True, 8), ("paged_adamw_32bit", True, 32), ("adamw_torch", False, 0)],
)
def test_the_optimizer_is_that_of_the_configuration(
    base: Path, tmp_path: Path, name: str, paged: bool, bits: int
) -> None:
    trainer, _ = _trainer(parse_config(runs.settings(base, tmp_path, optimizer=name)), tmp_path / "checkpoints")
    optimizer = trainer.create_optimizer()
    module = type(optimizer).__module__
    if not paged:
        assert module.startswith("torch.optim")
        return
    assert module.startswith("bitsandbytes.optim")
    assert optimizer.is_paged
    assert optimizer.args.optim_bits == bits


def test_options_reach_the_trainer(base: Path, tmp_path: Path) -> None:
    options = {
        "gradient_accumulation": 3, "weight_decay": 0.25, "max_grad_norm": 0.5, "scheduler": "linear", "seed": 7,
        "warmup_ratio": 0.5, "gradient_checkpointing": False, "max_steps": None, "epochs": 2.5, "eval_steps": 11,
    }  # fmt: skip
    trainer, _ = _trainer(parse_config(runs.settings(base, tmp_path, **options)), tmp_path / "checkpoints")
    args = trainer.args
    assert (args.gradient_accumulation_steps, args.weight_decay, args.max_grad_norm) == (3, 0.25, 0.5)
    assert (args.lr_scheduler_type, args.seed, args.data_seed) == ("linear", 7, 7)
    assert (args.gradient_checkpointing, args.num_train_epochs, args.max_steps) == (False, 2.5, -1)
    assert args.get_warmup_steps(10) == 5
    assert args.get_warmup_steps(3) == 2
    assert args.get_warmup_steps(1) == 0
    assert args.eval_steps == 11
    assert args.bf16 is not environment.emulates_bfloat16()


@pytest.mark.parametrize(
    ("change", "problem"),
    [
        ({"pad": 3}, "the pad token 3 is also a stop token"),
        ({"labels": [[-100, 2, 9, 5]]}, "labels are not the tokens themselves"),
        ({"labels": [[-100] * 4]}, "no token is trained on"),
        ({"labels": [[1, 2, 3, -100]]}, "the first token, which nothing predicts"),
        ({"labels": [[-100, 2, 3, 0]]}, "padding is trained on"),
    ],
)
def test_the_first_batch_is_checked(change: dict[str, Any], problem: str) -> None:
    labels = change.get("labels", [[-100, 2, 3, -100]])
    batch = {
        "input_ids": torch.tensor([[1, 2, 3, 0]]),
        "labels": torch.tensor(labels),
        "attention_mask": torch.tensor([[1, 1, 1, 0]]),
    }
    with pytest.raises(DataError, match=problem):
        check_batch(batch, change.get("pad", 0), frozenset({3}))


def test_collator_pads_on_the_right() -> None:
    rows = [EncodedRow([1, 2, 3], [False, True, True]), EncodedRow([4, 3], [False, True])]
    batch = Collator(0, frozenset({3}))([{"input_ids": row.input_ids, "labels": row.labels} for row in rows])
    assert batch["input_ids"].tolist() == [[1, 2, 3], [4, 3, 0]]
    assert batch["labels"].tolist() == [[-100, 2, 3], [-100, 3, -100]]
    assert batch["attention_mask"].tolist() == [[1, 1, 1], [1, 1, 0]]


_LAYERS = "q_proj, k_proj, v_proj, o_proj, gate_proj, up_proj, down_proj"


@pytest.mark.parametrize(
    ("targets", "problem", "hint"),
    [
        (["q_proj", "query_key_value"], "'query_key_value' fits no linear layer", _LAYERS),
        ([], "the list is empty", _LAYERS),
        (".*attention_xyz", "fits no layer", _LAYERS),
    ],
)
def test_target_modules_that_fit_nothing_are_named(
    base: Path, tmp_path: Path, targets: Any, problem: str, hint: str
) -> None:
    values = runs.settings(base, tmp_path)
    values["adapter"]["target_modules"] = targets
    config = parse_config(values)
    model = load_model(prepare_run(config).base, config)
    with pytest.raises(ConfigError, match=problem) as caught:
        adapters.add_adapter(model, config.adapter)
    assert re.search(hint, caught.value.hint or "")


def test_sixteen_bits_and_some_targets(base: Path, tmp_path: Path) -> None:
    values = runs.settings(base, tmp_path)
    values |= {"quantization": {"bits": 16}, "adapter": {"target_modules": ["q_proj", "v_proj"], "use_rslora": True}}
    config = parse_config(values)
    model = adapters.add_adapter(load_model(prepare_run(config).base, config), config.adapter)
    assert not four_bit_layers(model)
    assert {name.split(".lora_")[0].rpartition(".")[2] for name, p in model.named_parameters() if p.requires_grad} == {
        "q_proj", "v_proj"
    }  # fmt: skip
    assert model.peft_config["default"].use_rslora


@pytest.mark.skipif(torch.cuda.is_available(), reason="float16 is allowed on a GPU")
def test_float16_needs_a_gpu(base: Path, tmp_path: Path) -> None:
    values = runs.settings(base, tmp_path)
    values["quantization"] = {"compute_dtype": "float16"}
    config = parse_config(values)
    with pytest.raises(ConfigError, match="float16 needs a CUDA GPU"):
        load_model(prepare_run(config).base, config)


@pytest.mark.parametrize(
    ("flags", "products"),
    [("fma avx2", torch.float32), ("avx2 avx512_bf16", torch.bfloat16), ("amx_bf16", torch.bfloat16)],
)
def test_a_cpu_that_emulates_bfloat16_computes_in_float32(
    flags: str, products: torch.dtype, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    monkeypatch.setattr(environment, "_cpuinfo", lambda field: flags if field == "flags" else "")
    settings = Config.model_validate({"base": "b", "data": {"train": "t.jsonl"}})
    assert settings.quantization.compute_dtype == "bfloat16"
    assert compute_dtype(settings) is products
    assert common_arguments(settings, tmp_path, checkpointing=False)["bf16"] == (products is torch.bfloat16)
