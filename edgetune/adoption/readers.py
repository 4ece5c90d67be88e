"""The files in which other trainers state their arguments: which there are, what is in them, and whose they are."""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml

from edgetune.errors import ConfigError

PEFT, AXOLOTL, LLAMA_FACTORY, SWIFT = "PEFT", "Axolotl", "LLaMA-Factory", "ms-swift"
UNSLOTH, TORCHTUNE, MLX, TRL = "Unsloth", "torchtune", "MLX", "TRL"

_INNER = re.compile(r"(checkpoint-\w+|epoch_\d+|step_\d+|iter_\d+|default|adapter|lora_adapter|final)")
"""Names of directories inside the output of a training, whose arguments lie one level higher."""
_SMALL = 16 * 2**20
_AXOLOTL_KEYS = {"base_model", "micro_batch_size", "sequence_len", "lora_target_linear", "num_epochs", "datasets"}
_FACTORY_KEYS = {"model_name_or_path", "finetuning_type", "cutoff_len", "stage", "lora_target", "quantization_bit"}
_SWIFT_KEYS = {"swift_version", "tuner_type", "train_type", "sft_type", "tuner_backend"}
_QUANTIZATION = "The following `bitsandbytes` quantization config was used during training:"
_ITEM = re.compile(r"^- (\w+): (.+)$")
_FENCE = re.compile(r"axolotl version: `[^`]*`\s*```yaml\n(.*?)\n```", re.DOTALL)
_FRONT = re.compile(r"\A---\n(.*?)\n---\n", re.DOTALL)


@dataclass(frozen=True)
class ArgumentsFile:
    """A file with arguments."""

    path: Path
    trainer: str
    values: Mapping[str, Any]
    is_whole: bool
    """Whether it holds everything that the training was told, so that what it leaves out was not asked for."""

    @property
    def name(self) -> str:
        """Its file name, for messages."""
        return self.path.name


def find_files(adapter: Path) -> list[ArgumentsFile]:
    """Return the files with arguments beside an adapter, or in the directory of the training around it.

    Raises:
        ConfigError: A file that a trainer writes is damaged.
    """
    folders = [adapter]
    if _INNER.fullmatch(adapter.resolve().name):
        folders.append(adapter.resolve().parent)
    found: list[ArgumentsFile] = []
    for name, read in _FILES.items():
        path = next((folder / name for folder in folders if (folder / name).is_file()), None)
        if path is not None and path.stat().st_size <= _SMALL:
            found += read(path)
    return [*_copied(folders), *(file for file in found if file.values)]


def _copied(folders: Sequence[Path]) -> Iterator[ArgumentsFile]:
    """Yield the YAML files that are arguments of a trainer, copied beside the adapter under any name."""
    for folder in folders:
        for path in sorted([*folder.glob("*.yaml"), *folder.glob("*.yml")]):
            if path.name in _FILES or path.stat().st_size > _SMALL:
                continue
            with suppress(ConfigError):
                yield read_given(path)


def read_given(path: Path) -> ArgumentsFile:
    """Read a file of arguments whatever its name. Raises ConfigError for one of no known trainer."""
    values = _mapping(path, _parse(path))
    keys = values.keys()
    model = values.get("model")
    if keys & _SWIFT_KEYS:
        return ArgumentsFile(path, SWIFT, values, is_whole=True)
    if isinstance(model, Mapping) and "_component_" in model:
        return ArgumentsFile(path, TORCHTUNE, _of_components(values), is_whole=True)
    if "fine_tune_type" in keys or "lora_parameters" in keys:
        return ArgumentsFile(path, MLX, values, is_whole=True)
    if len(keys & _AXOLOTL_KEYS) > 1:
        return ArgumentsFile(path, AXOLOTL, values, is_whole=True)
    if len(keys & _FACTORY_KEYS) > 1 or any(key.startswith("top.") for key in keys):
        return ArgumentsFile(path, LLAMA_FACTORY, _without_prefixes(values), is_whole=True)
    raise ConfigError(
        f"{path} does not hold the arguments of a trainer that is known here",
        "Give the YAML or JSON file of Axolotl, LLaMA-Factory, ms-swift, torchtune or MLX; state single facts with "
        "--set, such as --set quantization.bits=4",
    )


def name_trainer(files: Sequence[ArgumentsFile], adapter_config: Mapping[str, Any]) -> str:
    """Return the program that trained an adapter; PEFT where nothing names another one."""
    mapping = adapter_config.get("auto_mapping")
    if isinstance(mapping, Mapping) and mapping.get("unsloth_fixed"):
        return UNSLOTH
    named = [file.trainer for file in files if file.trainer not in (PEFT, TRL)]
    if named:
        return named[0]
    base = adapter_config.get("base_model_name_or_path")
    if isinstance(base, str) and base.startswith("unsloth/"):
        return UNSLOTH
    return next((file.trainer for file in files), PEFT)


# -- one reader for each file ------------------------------------------------------------------------------------------


def _parse(path: Path) -> Any:
    try:
        text = path.read_text(encoding="utf-8")
        return json.loads(text) if path.suffix == ".json" else yaml.load(text, _PlainLoader)
    except FileNotFoundError:
        raise ConfigError(f"there is no file of arguments {path}", "Give its path with --arguments") from None
    except (OSError, ValueError, yaml.YAMLError, RecursionError) as error:
        reason = str(error).strip().splitlines()[0]
        raise ConfigError(
            f"{path} cannot be read: {reason}", "Restore the file from the training, or move it away"
        ) from None


class _PlainLoader(yaml.SafeLoader):
    """A loader that reads the tags of Python objects, which some trainers write, as nothing."""


def _ignored(loader: yaml.SafeLoader, suffix: str, node: yaml.Node) -> None:
    return None


_PlainLoader.add_multi_constructor("tag:yaml.org,2002:python/", _ignored)


def _mapping(path: Path, values: Any) -> dict[str, Any]:
    if not isinstance(values, dict):
        raise ConfigError(
            f"{path} holds no mapping of arguments", "Restore the file from the training, or move it away"
        )
    return {str(key): value for key, value in values.items()}


def _without_prefixes(values: Mapping[str, Any]) -> dict[str, Any]:
    """Return the values of LlamaBoard's form without the names of its panels: `top.template` is `template`."""
    return {key.rpartition(".")[2]: value for key, value in values.items()}


def _of_components(values: Mapping[str, Any]) -> dict[str, Any]:
    """Return the arguments of a recipe of torchtune with those of its optimizer, tokenizer and checkpoint."""
    found = dict(values)
    for part, names in {"optimizer": ("lr", "weight_decay"), "checkpointer": ("checkpoint_dir",)}.items():
        inner = values.get(part)
        found |= {name: inner[name] for name in names if name in inner} if isinstance(inner, Mapping) else {}
    tokenizer = values.get("tokenizer")
    if isinstance(tokenizer, Mapping) and tokenizer.get("max_seq_len") is not None:
        found["max_seq_len"] = tokenizer["max_seq_len"]
    found.pop("optimizer", None)
    return found


def _factory(path: Path) -> list[ArgumentsFile]:
    values = _without_prefixes(_mapping(path, _parse(path)))
    return [ArgumentsFile(path, LLAMA_FACTORY, values, is_whole=True)]


def _swift(path: Path) -> list[ArgumentsFile]:
    values = _mapping(path, _parse(path))
    return [ArgumentsFile(path, SWIFT, values, is_whole=True)] if values.keys() & _SWIFT_KEYS else []


def _axolotl(path: Path) -> list[ArgumentsFile]:
    values = _mapping(path, _parse(path))
    return [ArgumentsFile(path, AXOLOTL, values, is_whole=True)] if len(values.keys() & _AXOLOTL_KEYS) > 1 else []


def _torchtune(path: Path) -> list[ArgumentsFile]:
    return [ArgumentsFile(path, TORCHTUNE, _of_components(_mapping(path, _parse(path))), is_whole=True)]


def _mlx(path: Path) -> list[ArgumentsFile]:
    values = _mapping(path, _parse(path))
    is_mlx = "peft_type" not in values and ("fine_tune_type" in values or "lora_parameters" in values)
    return [ArgumentsFile(path, MLX, values, is_whole=True)] if is_mlx else []


def _readme(path: Path) -> list[ArgumentsFile]:
    """Read a model card: the configuration that Axolotl puts into it, or what Trainer and PEFT write."""
    text = path.read_text(encoding="utf-8", errors="replace")
    fence = _FENCE.search(text)
    if fence is not None:
        try:
            values = yaml.load(fence[1], _PlainLoader)
        except yaml.YAMLError:
            values = None
        if isinstance(values, dict):
            return [ArgumentsFile(path, AXOLOTL, {str(key): value for key, value in values.items()}, is_whole=True)]
    front = _FRONT.match(text)
    try:
        head = yaml.load(front[1], _PlainLoader) if front else {}
    except yaml.YAMLError:
        head = {}
    head = head if isinstance(head, dict) else {}
    values = _listed(text)
    base = head.get("base_model")
    base = base[0] if isinstance(base, list) and base else base
    if isinstance(base, str):
        values["base_model"] = base
    return [ArgumentsFile(path, _trainer_of_tags(head.get("tags")), values, is_whole=False)]


_TAGS = {"llama-factory": LLAMA_FACTORY, "axolotl": AXOLOTL, "unsloth": UNSLOTH, "swift": SWIFT, "trl": TRL}


def _trainer_of_tags(tags: Any) -> str:
    listed = {str(tag).lower() for tag in tags} if isinstance(tags, list) else set()
    return next((trainer for tag, trainer in _TAGS.items() if tag in listed), PEFT)


def _listed(text: str) -> dict[str, Any]:
    """Return the values that a model card lists: the hyperparameters, and the quantization of bitsandbytes."""
    found: dict[str, Any] = {}
    for heading in ("The following hyperparameters were used during training:", _QUANTIZATION):
        _, _, rest = text.partition(heading)
        for line in rest.strip().splitlines():
            match = _ITEM.match(line.strip())
            if match is None:
                break
            found.setdefault(match[1], yaml.safe_load(match[2]) if heading == _QUANTIZATION else match[2])
    if "optimizer" in found:
        name = re.match(r"(?:Use )?(?:OptimizerNames\.)?(\w+)", found["optimizer"])
        found["optimizer"] = name[1].lower() if name else ""
    return found


_FILES: Mapping[str, Callable[[Path], list[ArgumentsFile]]] = {
    "training_args.yaml": _factory,
    "llamaboard_config.yaml": _factory,
    "args.json": _swift,
    "sft_args.json": _swift,
    **dict.fromkeys(
        ("axolotl_config.yaml", "axolotl_config.yml", "axolotl.yaml", "config.yaml", "config.yml"), _axolotl
    ),
    "torchtune_config.yaml": _torchtune,
    "logs/torchtune_config.yaml": _torchtune,
    "adapter_config.json": _mlx,
    "README.md": _readme,
}
"""Names of files with arguments -> their readers, the most detailed first."""
