"""What the files of other trainers tell: base, precision, options of the training, rows, template, log."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from edgetune.adoption.arguments import TrainerArguments, read_arguments
from edgetune.adoption.method import method_of
from edgetune.adoption.training_log import read_log
from edgetune.errors import ConfigError
from edgetune.methods import Lora
from edgetune_converters.adapters.peft_config import PeftConfig
from tests.adoption import trainers


def read(folder: Path, given: Path | None = None, **fields: Any) -> TrainerArguments:
    if not (folder / "adapter_config.json").exists():
        trainers.config(folder, **fields)
    return read_arguments(folder, PeftConfig(folder / "adapter_config.json"), given)


def test_llama_factory_states_everything_in_training_args_yaml(tmp_path: Path) -> None:
    found = read(trainers.write(tmp_path, training_args__yaml=trainers.FACTORY))
    assert found.trainer == "LLaMA-Factory"
    assert (found.precision.bits, found.precision.reason) == (4, "quantization_bit is 4 in training_args.yaml")
    assert [(each.value, each.source) for each in found.bases] == [("BASE", "model_name_or_path in training_args.yaml")]
    assert found.training == {
        "batch_size": 2, "gradient_accumulation": 8, "learning_rate": 5e-5, "epochs": 3.0, "max_length": 96,
        "scheduler": "cosine", "optimizer": "adamw_torch",
    }  # fmt: skip
    assert found.data == ("mine", "identity")
    assert found.template is not None
    assert found.template.value == "qwen"


def test_the_form_of_llama_board_is_read_without_its_panels(tmp_path: Path) -> None:
    found = read(trainers.write(tmp_path, llamaboard_config__yaml=trainers.BOARD))
    assert (found.trainer, found.precision.bits) == ("LLaMA-Factory", 8)
    assert found.training == {"batch_size": 2, "learning_rate": 5e-5, "epochs": 3.0, "max_length": 96}
    assert found.template is None  # `default` is that of the tokenizer


@pytest.mark.parametrize("name", ["axolotl.yaml", "config.yml", "my-qlora.yml"])
def test_a_configuration_of_axolotl_is_read_under_any_name(name: str, tmp_path: Path) -> None:
    found = read(trainers.write(tmp_path, **{name.replace(".", "__"): trainers.AXOLOTL}))
    assert (found.trainer, found.precision.bits, found.template) == ("Axolotl", 4, None)
    assert found.precision.reason == f"load_in_4bit is true in {name}"
    assert found.training["batch_size"] == 2
    assert found.training["optimizer"] == "paged_adamw_8bit"
    assert found.data == ("data/rows.jsonl",)


def test_axolotl_puts_its_configuration_into_the_model_card(tmp_path: Path) -> None:
    card = trainers.AXOLOTL_CARD.replace("{config}", trainers.AXOLOTL)
    found = read(trainers.write(tmp_path, README__md=card))
    assert (found.trainer, found.precision.bits) == ("Axolotl", 4)
    log = read_log(tmp_path)
    assert log.lines == (
        {"step": 1, "epoch": 0.014, "eval_loss": 0.3703},
        {"step": 10, "epoch": 0.1399, "loss": 0.2705, "eval_loss": 0.1777},
        {"step": 20, "epoch": 0.2797, "loss": 0.1263, "eval_loss": 0.0097},
    )
    assert log.results["eval_loss"] == 0.0097


def test_settings_of_bitsandbytes_in_axolotl_take_precedence(tmp_path: Path) -> None:
    text = trainers.AXOLOTL + "bnb_config_kwargs: {bnb_4bit_quant_type: fp4, bnb_4bit_use_double_quant: false}\n"
    found = read(trainers.write(tmp_path, axolotl__yaml=text)).precision
    assert (found.bits, found.type, found.double_quant) == (4, "fp4", False)


def test_a_whole_file_without_quantization_means_none(tmp_path: Path) -> None:
    text = trainers.AXOLOTL.replace("load_in_4bit: true\nadapter: qlora", "adapter: lora")
    found = read(trainers.write(tmp_path, axolotl__yaml=text.replace("load_in_8bit: false\n", ""))).precision
    assert (found.bits, found.reason) == (16, "axolotl.yaml asks for no quantization")


@pytest.mark.parametrize(
    ("stated", "bits", "other"),
    [
        ({}, 16, None),
        ({"quant_method": "bnb", "quant_bits": 4}, 4, None),
        ({"quant_method": "bnb", "quant_bits": 8}, 8, None),
        ({"quant_method": "hqq", "quant_bits": 4}, 16, "4 bits of hqq"),
    ],
)
def test_ms_swift_states_method_and_bits(stated: dict[str, Any], bits: int, other: str | None, tmp_path: Path) -> None:
    found = read(trainers.write(tmp_path, args__json=trainers.SWIFT | stated))
    assert found.trainer == "ms-swift"
    assert (found.precision.bits, found.precision.other) == (bits, other)
    assert found.training["seed"] == 42
    assert "max_steps" not in found.training  # -1 asks for none
    assert found.stage is None


def test_the_log_of_ms_swift_lies_one_directory_higher(tmp_path: Path) -> None:
    trainers.write(tmp_path, logging__jsonl=trainers.SWIFT_LOG, args__json=trainers.SWIFT)
    found = read(tmp_path / "checkpoint-93") if trainers.config(tmp_path / "checkpoint-93") else None
    assert found is not None
    assert found.trainer == "ms-swift"
    log = read_log(tmp_path / "checkpoint-93")
    assert [line["step"] for line in log.lines] == [1, 5, 5]
    assert log.results == {"steps": 5, "epochs": 0.05, "loss_first": 2.5, "loss_last": 1.5, "eval_loss": 1.75}


def test_a_cut_line_of_a_log_is_left_out(tmp_path: Path) -> None:
    log = read_log(trainers.write(tmp_path, trainer_log__jsonl=trainers.FACTORY_LOG))
    assert log.results == {"steps": 10, "epochs": 1.0, "loss_first": 1.9, "loss_last": 1.1, "eval_loss": 1.25}


def test_torchtune_rounds_by_torchao(tmp_path: Path) -> None:
    trainers.write(tmp_path, torchtune_config__yaml=trainers.TORCHTUNE)
    trainers.config(tmp_path / "epoch_0")
    found = read(tmp_path / "epoch_0")
    assert (found.trainer, found.precision.bits, found.precision.other) == ("torchtune", 16, "NF4 of torchao")
    assert found.training == {
        "batch_size": 2, "learning_rate": 3e-4, "epochs": 1.0, "max_length": 96, "weight_decay": 0.01,
    }  # fmt: skip


def test_unsloth_is_known_by_its_mapping_and_its_base(tmp_path: Path) -> None:
    name = "unsloth/llama-3.2-1b-instruct-unsloth-bnb-4bit"
    mapping = {"base_model_class": "LlamaForCausalLM", "unsloth_fixed": True}
    found = read(tmp_path / "a", base_model_name_or_path=name, auto_mapping=mapping)
    assert (found.trainer, found.precision.bits) == ("Unsloth", 4)
    plain = read(tmp_path / "b", base_model_name_or_path="unsloth/llama-3.2-1b-instruct")
    assert (plain.trainer, plain.precision.bits) == ("Unsloth", None)


def test_a_4_bit_base_of_mlx_is_none_of_bitsandbytes(tmp_path: Path) -> None:
    stated = {"fine_tune_type": "lora", "lora_parameters": {"rank": 4, "scale": 2.0}, "iters": 600, "batch_size": 4}
    model = "mlx-community/Qwen2.5-0.5B-Instruct-4bit"
    found = read(trainers.write(tmp_path, adapter_config__json={**stated, "model": model, "max_seq_length": 2048}))
    assert (found.trainer, found.precision.bits) == ("MLX", 16)
    assert found.precision.other == f"{model}, in 4 bits of MLX"
    assert found.training == {"batch_size": 4, "max_steps": 600, "max_length": 2048}


def test_a_model_card_of_peft_lists_the_quantization(tmp_path: Path) -> None:
    found = read(trainers.write(tmp_path, README__md=trainers.OLD_PEFT_CARD))
    assert (found.trainer, found.precision.bits, found.precision.type) == ("PEFT", 4, "fp4")
    assert not found.precision.double_quant


def test_a_card_tells_options_and_no_precision(tmp_path: Path) -> None:
    found = read(trainers.write(tmp_path, README__md=trainers.TRAINER_CARD))
    assert (found.trainer, found.precision.bits) == ("LLaMA-Factory", None)
    assert found.training["optimizer"] == "adamw_torch"
    assert found.training["learning_rate"] == 5e-5


def test_options_that_edgetune_does_not_have_are_kept_apart(tmp_path: Path) -> None:
    text = trainers.FACTORY.replace("optim: adamw_torch", "optim: came_pytorch")
    found = read(trainers.write(tmp_path, training_args__yaml=text))
    assert "optimizer" not in found.training
    assert found.other_options == {"optimizer": "came_pytorch"}


def test_a_file_from_elsewhere_comes_before_those_beside_the_adapter(tmp_path: Path) -> None:
    given = trainers.write(tmp_path / "elsewhere", run__yaml=trainers.AXOLOTL) / "run.yaml"
    found = read(trainers.write(tmp_path / "adapter", README__md=trainers.TRAINER_CARD), given)
    assert (found.trainer, found.precision.bits) == ("Axolotl", 4)


def test_a_file_of_no_trainer_is_refused(tmp_path: Path) -> None:
    given = trainers.write(tmp_path, docker__yaml="services: {web: {}}\n") / "docker.yaml"
    assert read(tmp_path).trainer == "PEFT"  # and one that merely lies there is passed over
    with pytest.raises(ConfigError, match="does not hold the arguments of a trainer that is known here"):
        read(tmp_path, given)
    with pytest.raises(ConfigError, match="there is no file of arguments"):
        read(tmp_path, tmp_path / "missing.yaml")


def test_a_damaged_file_is_an_error_and_not_a_guess(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"args\.json cannot be read"):
        read(trainers.write(tmp_path / "a", args__json='{"model": '))
    with pytest.raises(ConfigError, match=r"training_args\.yaml holds no mapping"):
        read(trainers.write(tmp_path / "b", training_args__yaml="- a\n"))


def test_objects_of_python_in_yaml_are_not_made(tmp_path: Path) -> None:
    text = trainers.FACTORY + f"extra: !!python/object/apply:os.mkdir ['{tmp_path / 'made'}']\n"
    assert read(trainers.write(tmp_path, training_args__yaml=text)).precision.bits == 4
    assert not (tmp_path / "made").exists()


def test_arguments_that_make_another_model_are_named(tmp_path: Path) -> None:
    text = trainers.FACTORY + "rope_scaling: linear\nshift_attn: false\ndefault_system: Be brief.\n"
    found = read(trainers.write(tmp_path, training_args__yaml=text))
    assert len(found.differences) == 1
    assert "rope_scaling is 'linear' in training_args.yaml" in found.differences[0]
    assert found.system is not None
    assert found.system.value == "Be brief."


def test_the_options_of_lora_come_from_adapter_config_json(tmp_path: Path) -> None:
    trainers.config(
        tmp_path, r=8, lora_alpha=16, lora_dropout=0.1, use_rslora=True, bias="lora_only", rank_pattern={"q_proj": 2},
        init_lora_weights="pissa_niter_4", layers_to_transform=[0, 2], modules_to_save=["lm_head"],
    )  # fmt: skip
    method = method_of(PeftConfig(tmp_path / "adapter_config.json"))
    assert isinstance(method, Lora)
    assert method == Lora(
        r=8, alpha=16, dropout=0.1, use_rslora=True, bias="adapted", rank_pattern={"q_proj": 2}, layers=[0, 2],
        target_modules=["q_proj"], modules_to_save=["lm_head"],
    )  # fmt: skip


def test_a_value_that_edgetune_does_not_have_leaves_the_default(tmp_path: Path) -> None:
    trainers.config(tmp_path, alpha_pattern={"q_proj": 0}, r=2)
    method = method_of(PeftConfig(tmp_path / "adapter_config.json"))
    assert method == Lora(r=2, alpha=8, target_modules=["q_proj"])


@pytest.mark.parametrize(
    ("fields", "kind"),
    [
        ({"peft_type": "LOHA", "alpha": 4}, "loha"),
        ({"peft_type": "IA3"}, "ia3"),
        ({"peft_type": "PROMPT_TUNING", "num_virtual_tokens": 7}, "prompt-tuning"),
        ({"peft_type": "OFT", "r": 0, "oft_block_size": 8}, "oft"),
        ({"peft_type": "VERA", "r": 4}, "vera"),
    ],
)
def test_other_methods_are_recognized(fields: dict[str, Any], kind: str, tmp_path: Path) -> None:
    method = method_of(PeftConfig(trainers.config(tmp_path, **fields) / "adapter_config.json"))
    assert method.kind == kind
    assert method.virtual_tokens == fields.get("num_virtual_tokens", 0)
