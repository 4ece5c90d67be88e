"""The arguments of a training by another program, from the files that it left beside the adapter."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from edgetune.adoption import readers
from edgetune.adoption.readers import ArgumentsFile
from edgetune.config import TrainingConfig
from edgetune_converters.adapters.peft_config import PeftConfig

_OPTIONS: Mapping[str, tuple[str, ...]] = {
    "batch_size": ("micro_batch_size", "per_device_train_batch_size", "train_batch_size", "batch_size"),
    "gradient_accumulation": ("gradient_accumulation_steps", "grad_accumulation_steps"),
    "learning_rate": ("learning_rate", "lr"),
    "epochs": ("num_train_epochs", "num_epochs", "epochs", "max_epochs"),
    "max_steps": ("max_steps", "iters", "train_iters"),
    "max_length": ("cutoff_len", "sequence_len", "max_seq_length", "max_seq_len", "max_length"),
    "scheduler": ("lr_scheduler_type", "lr_scheduler", "lr_decay_style"),
    "optimizer": ("optim", "optimizer"),
    "weight_decay": ("weight_decay",),
    "warmup_ratio": ("warmup_ratio",),
    "seed": ("seed",),
}
"""Options of the section `training` -> their names in the files of other programs."""
_BASE = ("base_model", "model_name_or_path", "model_path", "model", "checkpoint_dir")
_DATA = ("datasets", "dataset", "train_dataset", "data", "train_data_path")
_TEMPLATES = ("chat_template", "template")
_SYSTEM = ("default_system_message", "default_system", "system")
_STAGES = ("stage", "rlhf_type", "rl")
_SCORERS = ("rm", "reward")
_BITSANDBYTES = (None, "", "bnb", "bitsandbytes")
_OWN_TEMPLATE = ("tokenizer_default", "tokenizer", "default")
"""Values of a template that name the template of the tokenizer itself."""
_DIFFERENT_MODEL: Mapping[str, str] = {
    "rope_scaling": "positions were scaled in training, and the base has its own RoPE parameters here",
    "shift_attn": "attention was computed in shifted groups, and is full here",
    "mixture_of_depths": "layers were skipped by a router, and none is skipped here",
}
"""Arguments that make another model than the base with the adapter -> why."""


@dataclass(frozen=True)
class Statement:
    """A value, and the file and the key that state it."""

    value: Any
    source: str
    """Such as `quantization_bit in training_args.yaml`."""


@dataclass(frozen=True)
class Precision:
    """The precision of the frozen base in a training."""

    bits: int | None
    """4, 8 or 16; None: nothing states it."""
    reason: str
    """A clause that says from what it is known, or why it is not."""
    type: str = "nf4"
    double_quant: bool = True
    other: str | None = None
    """The quantization, where it is not that of bitsandbytes: its numbers cannot be computed here."""


@dataclass(frozen=True)
class TrainerArguments:
    """What is known of a training."""

    trainer: str
    """The program: PEFT where nothing names another one."""
    files: tuple[Path, ...]
    """The files that were read."""
    bases: tuple[Statement, ...]
    """The names of the base, that of adapter_config.json first."""
    revision: str | None
    precision: Precision
    training: dict[str, Any] = field(default_factory=dict)
    """Options of the section `training` under edgetune's names, where they are known and have such values here."""
    other_options: dict[str, Any] = field(default_factory=dict)
    """The same where edgetune has no such value, such as another optimizer."""
    data: tuple[str, ...] = ()
    """The names of the training rows."""
    template: Statement | None = None
    """The name of the chat template."""
    system: Statement | None = None
    """The system prompt that the trainer wrote before conversations without one."""
    stage: Statement | None = None
    """The objective, if it was not supervised fine-tuning."""
    differences: tuple[str, ...] = ()
    """Arguments by which the trained model differs from the base with the adapter, each a sentence."""

    @property
    def is_scorer(self) -> bool:
        """Whether a reward model was trained."""
        return self.stage is not None and str(self.stage.value).lower() in _SCORERS


def read_arguments(adapter: Path, config: PeftConfig, given: Path | None = None) -> TrainerArguments:
    """Read the files that a trainer left.

    Args:
        adapter: The directory with the weights of the adapter.
        config: Its adapter_config.json.
        given: A file of arguments that lies elsewhere.

    Raises:
        ConfigError: A file is damaged, or the given one states no arguments of a training.
    """
    files = readers.find_files(adapter)
    if given is not None:
        files = [readers.read_given(given), *files]
    trainer = readers.name_trainer(files, config.raw)
    template = _first_text(files, _TEMPLATES)
    return TrainerArguments(
        trainer=trainer,
        files=tuple(file.path for file in files),
        bases=tuple(_bases(files, config)),
        revision=_text(config.raw.get("revision")),
        precision=find_precision(files, config, trainer),
        **_training_options(files),
        data=tuple(dict.fromkeys(_data(files))),
        template=None if template is None or template.value in _OWN_TEMPLATE else template,
        system=_first_text(files, _SYSTEM),
        stage=_stage(files),
        differences=tuple(_differences(files)),
    )


# -- precision of the base ---------------------------------------------------------------------------------------------


def find_precision(files: Sequence[ArgumentsFile], config: PeftConfig, trainer: str) -> Precision:
    """Return in how many bits the base was, from the first file that states it."""
    for file in files:
        found = _precision_in(file)
        if found is not None:
            return found
    if config.four_bit_base is not None:
        return Precision(4, f"the adapter was trained on {config.four_bit_base}, a base in 4 bits")
    if config.raw.get("init_lora_weights") == "loftq":
        return Precision(4, "init_lora_weights is loftq in adapter_config.json, which corrects a base in 4 bits")
    whole = next((file for file in files if file.is_whole), None)
    if whole is not None:
        return Precision(16, f"{whole.name} asks for no quantization")
    return Precision(None, "no file beside the adapter states the precision of the base")


def _precision_in(file: ArgumentsFile) -> Precision | None:
    stated = file.values
    if file.trainer == readers.TORCHTUNE:
        return _of_torchtune(file)
    if file.trainer == readers.MLX:
        name = _text(stated.get("model")) or ""
        bits = next((each for each in (2, 3, 4, 6, 8) if f"{each}bit" in name.lower().replace("-", "")), None)
        return None if bits is None else Precision(16, f"model in {file.name}", other=f"{name}, in {bits} bits of MLX")
    method = stated.get("quant_method", stated.get("quantization_method"))
    for key in ("quantization_bit", "quant_bits", "quantization_bits"):
        if key in stated:
            return _of_number(file, key, stated[key], method)
    for key, bits in (("load_in_4bit", 4), ("load_in_8bit", 8)):
        if stated.get(key) is True:
            return _of_bitsandbytes(file, bits, f"{key} is true in {file.name}")
    if stated.get("adapter") == "qlora":
        return _of_bitsandbytes(file, 4, f"adapter is qlora in {file.name}")
    if stated.get("load_in_4bit") is False:
        return Precision(16, f"load_in_4bit is false in {file.name}")
    return None


def _of_number(file: ArgumentsFile, key: str, value: Any, method: Any) -> Precision:
    text = str(value).strip().lower()
    if text in ("none", "", "0", "false"):
        return Precision(16, f"{key} is {text or 'empty'} in {file.name}")
    reason = f"{key} is {text} in {file.name}"
    if method not in _BITSANDBYTES or text not in ("4", "8", "16"):
        return Precision(16, reason, other=f"{text} bits of {method or 'an unknown method'}")
    return _of_bitsandbytes(file, int(text), reason)


def _of_bitsandbytes(file: ArgumentsFile, bits: int, reason: str) -> Precision:
    own = file.values.get("bnb_config_kwargs")
    stated = {**file.values, **(own if isinstance(own, Mapping) else {})}
    type_ = stated.get("bnb_4bit_quant_type", stated.get("quantization_type"))
    double = stated.get("bnb_4bit_use_double_quant", stated.get("double_quantization"))
    return Precision(
        bits, reason, type_ if type_ in ("nf4", "fp4") else "nf4", double if isinstance(double, bool) else True
    )


def _of_torchtune(file: ArgumentsFile) -> Precision | None:
    model = file.values.get("model")
    model = model if isinstance(model, Mapping) else {}
    component = str(model.get("_component_", ""))
    if model.get("quantize_base") is True or ".qlora_" in component:
        return Precision(16, f"model in {file.name} is {component}", other="NF4 of torchao")
    return Precision(16, f"model in {file.name} is {component or 'not quantized'}")


# -- the rest ----------------------------------------------------------------------------------------------------------


def _bases(files: Sequence[ArgumentsFile], config: PeftConfig) -> list[Statement]:
    found = {}
    own = _text(config.raw.get("base_model_name_or_path"))
    if own is not None:
        found[own] = Statement(own, "base_model_name_or_path in adapter_config.json")
    for file in files:
        for key in _BASE:
            name = _text(file.values.get(key))
            if name is not None:
                found.setdefault(name, Statement(name, f"{key} in {file.name}"))
                break
    return list(found.values())


def _training_options(files: Sequence[ArgumentsFile]) -> dict[str, dict[str, Any]]:
    """Return the options that are known, and those whose values edgetune does not have."""
    known: dict[str, Any] = {}
    other: dict[str, Any] = {}
    for option, names in _OPTIONS.items():
        value = next((file.values[name] for file in files for name in names if _is_plain(file.values.get(name))), None)
        if value is None or (option == "max_steps" and not _positive(value)):
            continue
        (known if _is_valid(option, value) else other)[option] = value
    defaults = TrainingConfig()
    return {
        "training": {name: getattr(TrainingConfig(**{name: _number(known[name])}), name) for name in known},
        "other_options": {name: value for name, value in other.items() if hasattr(defaults, name)},
    }


def _is_plain(value: Any) -> bool:
    return isinstance(value, (str, int, float)) and not isinstance(value, bool) and str(value).strip() != ""


def _is_valid(option: str, value: Any) -> bool:
    try:
        TrainingConfig(**{option: _number(value)})
    except ValueError:
        return False
    return True


def _number(value: Any) -> Any:
    """Return the number that a text states, such as 5e-5 in YAML or 3.0 of a form; other values as they are."""
    if not isinstance(value, str):
        return value
    try:
        number = float(value)
    except ValueError:
        return value
    return int(number) if number.is_integer() and "e" not in value.lower() else number


def _positive(value: Any) -> bool:
    number = _number(value)
    return isinstance(number, (int, float)) and number > 0


def _data(files: Sequence[ArgumentsFile]) -> list[str]:
    names: list[str] = []
    for file in files:
        for key in _DATA:
            stated = file.values.get(key)
            entries = stated if isinstance(stated, list) else [] if stated is None else [stated]
            for entry in entries:
                path = entry.get("path", entry.get("source")) if isinstance(entry, Mapping) else entry
                if isinstance(path, str):
                    names += [each.strip() for each in path.split(",") if each.strip()]
    return names


def _first_text(files: Sequence[ArgumentsFile], names: Sequence[str]) -> Statement | None:
    for file in files:
        for name in names:
            text = _text(file.values.get(name))
            if text is not None:
                return Statement(text, f"{name} in {file.name}")
    return None


def _stage(files: Sequence[ArgumentsFile]) -> Statement | None:
    found = _first_text(files, _STAGES)
    return None if found is None or found.value.lower() in ("sft", "pt", "pretrain") else found


def _differences(files: Sequence[ArgumentsFile]) -> list[str]:
    return [
        f"{key} is {file.values[key]!r} in {file.name}: {why}"
        for file in files
        for key, why in _DIFFERENT_MODEL.items()
        if file.values.get(key) not in (None, False, "", "none")
    ]


def _text(value: Any) -> str | None:
    return value if isinstance(value, str) and value.strip() and value.strip().lower() != "none" else None
