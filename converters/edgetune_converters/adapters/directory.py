"""Where an adapter lies: its configuration and weights in the directory that was given, or in one inside it."""

from __future__ import annotations

import re
from collections.abc import Iterator, Sequence
from fnmatch import fnmatch
from pathlib import Path
from typing import NamedTuple

from edgetune_converters.adapters.mlx import MLX_FILE
from edgetune_converters.adapters.peft_config import CONFIG_FILE, FULL_CONFIG_FILE
from edgetune_converters.errors import AdapterError, CheckpointError
from edgetune_converters.files.contents import DAMAGED, read_json, sha256_of
from edgetune_converters.reading.weight_files import find_weight_files

WEIGHTS_FILE = "adapter_model.safetensors"
_INDEX_FILE = "adapter_model.safetensors.index.json"
_SHARD = re.compile(r"adapter_model-(\d+)-of-(\d+)\.safetensors")
_PICKLED_FILE = "adapter_model.bin"
INITIAL = "initial_adapter"
"""The directory inside an adapter with A and B before training, where they were a part of the base (PiSSA, CorDA)."""
_SHOWN_NAMES = 5
# files beside an adapter that are no part of the model: logs, state of the training, settings of the trainer, documents
_WITHOUT_EFFECT = (
    "README.md", "LICENSE*", "*.log", "*.jsonl", "*.png", "*.yaml", "*.yml", "*.txt", ".git*", ".cache",
    "training_args.bin", "trainer_state.json", "trainer_log*", "optimizer*", "scheduler.pt", "scaler.pt", "rng_state*",
    "global_step*", "zero_to_fp32.py", "latest", "events.out.*", "runs", "logs", "wandb", "checkpoint-*", "ref",
    "*results.json", "args.json", "sft_args.json", "additional_config.json", "configuration.json", "val_*", "images",
    "[0-9]*_adapters.safetensors", "original_repo_id.json",
    "recipe_state*", "profiling_outputs", "preprocessor_config.json", "processor_config.json",
    "video_preprocessor_config.json", "config.json", "original", "tokenizer_state*",
)  # fmt: skip
# read where they are of use (tokenizers/beside_adapter.py)
_OF_TOKENIZER = (
    "tokenizer.json", "tokenizer_config.json", "tokenizer.model", "vocab.json", "merges.txt", "added_tokens.json",
    "special_tokens_map.json", "chat_template.j*", "additional_chat_templates", "generation_config.json",
)  # fmt: skip


class AdapterPlace(NamedTuple):
    """The directory of an adapter, the files of its weights, and what to note about the place."""

    path: Path
    weights: tuple[Path, ...]
    notes: tuple[str, ...] = ()
    config: str = CONFIG_FILE

    @property
    def initial(self) -> tuple[Path, ...]:
        """The files of the weights before training, where they lie inside. Raises AdapterError as `find_adapter`."""
        inside = self.path / INITIAL
        return find_adapter(inside).weights if inside.is_dir() else ()

    def identity(self) -> dict[str, str]:
        """Return the SHA-256 of configuration and weights, by file name."""
        own = {file.name: sha256_of(file) for file in (self.path / self.config, *self.weights)}
        return own | {f"{INITIAL}/{file.name}": sha256_of(file) for file in self.initial}


def find_adapter(path: Path) -> AdapterPlace:
    """Find configuration and weights of an adapter in a directory, or in the only one inside it that has them.

    Raises AdapterError when there is none, when there are several, or when it is of another kind than PEFT's.
    """
    if path.suffix == ".safetensors" and path.is_file():
        path = path.parent
    if not path.is_dir():
        raise AdapterError(
            f"there is no adapter directory {path}",
            "Give a directory that PEFT wrote; fetch one from the hub first: hf download NAME --local-dir DIR",
        )
    if (path / FULL_CONFIG_FILE).is_file():
        notes: list[str] = []
        return AdapterPlace(path, tuple(find_weight_files(path, notes)), tuple(notes), FULL_CONFIG_FILE)
    if not (path / CONFIG_FILE).is_file():
        inside = _inside(path)
        found = find_adapter(inside)
        return found._replace(notes=(f"the adapter is in {inside.relative_to(path)}, inside {path}", *found.notes))
    weights = _weight_files(path)
    if weights is None:
        raise _without_weights(path)
    return AdapterPlace(path, weights, tuple(_unused(path, weights)))


def _inside(path: Path) -> Path:
    """The only directory with an adapter inside `path`."""
    found = sorted((file.parent for file in path.glob(f"*/{CONFIG_FILE}")), key=_in_order)
    if len(found) == 1:
        return found[0]
    if found:
        names = ", ".join(directory.name for directory in found[:_SHOWN_NAMES])
        more = f" and {len(found) - _SHOWN_NAMES} more" if len(found) > _SHOWN_NAMES else ""
        raise AdapterError(
            f"{path} is no adapter, but {len(found)} directories in it are: {names}{more}",
            f"Give one of them, for instance --adapter {found[-1]}",
        )
    if (path / "config.json").is_file():
        raise AdapterError(
            f"{path} holds a model, not an adapter: it has no {CONFIG_FILE}", f"Give it with --base {path}"
        )
    if _weight_files(path):
        raise AdapterError(
            f"{path} has the weights of an adapter, but no {CONFIG_FILE}, in which rank and alpha are stated",
            "Fetch it again, or copy the file from the directory of the training",
        )
    raise AdapterError(
        f"cannot read {path / CONFIG_FILE}: there is no such file", "Give a directory that PEFT wrote with --adapter"
    )


def _in_order(directory: Path) -> tuple[int, str]:
    number = re.search(r"(\d+)$", directory.name)
    return int(number[1]) if number else -1, directory.name


def _weight_files(path: Path) -> tuple[Path, ...] | None:
    """The files of the weights; None if there are none."""
    for name in (WEIGHTS_FILE, MLX_FILE):
        if (path / name).is_file():
            return (path / name,)
    shards = {file.name: match for file in path.iterdir() if (match := _SHARD.fullmatch(file.name))}
    if shards or (path / _INDEX_FILE).is_file():
        return tuple(path / name for name in _checked_shards(path, shards))
    return (path / _PICKLED_FILE,) if (path / _PICKLED_FILE).is_file() else None


def _checked_shards(path: Path, shards: dict[str, re.Match[str]]) -> list[str]:
    """The names of the shards: those of the index, or those that the names count."""
    if (path / _INDEX_FILE).is_file():
        stated = read_json(path / _INDEX_FILE).get("weight_map")
        if not isinstance(stated, dict) or not all(isinstance(name, str) for name in stated.values()):
            raise CheckpointError(f"{path / _INDEX_FILE} has no weight_map from tensor names to file names", DAMAGED)
        wanted = sorted(set(stated.values()))
    else:
        last = next(iter(shards.values()))[2]
        wanted = [f"adapter_model-{number:0{len(last)}d}-of-{last}.safetensors" for number in range(1, int(last) + 1)]
    missing = [name for name in wanted if not (path / name).is_file()]
    if missing or any(Path(name).name != name for name in wanted):
        raise CheckpointError(
            f"{path} lacks the shard {(missing or wanted)[0]} of the adapter", "Fetch the adapter again"
        )
    return wanted


def _without_weights(path: Path) -> AdapterError:
    """Return the error for a directory with a configuration and no weights that are read."""
    if (path / "adapters.npz").is_file():
        return AdapterError(
            f"{path} holds an adapter of an old MLX (adapters.npz), which is not read",
            f"Merge it with MLX, and give the result with --base: mlx_lm.fuse --model BASE --adapter-path {path}",
        )
    own = sorted(file.name for pattern in ("adapter_*.pt", "adapter*.ckpt") for file in path.glob(pattern))
    if own:
        return AdapterError(
            f"{path} holds an adapter under the names of torchtune alone ({own[0]})",
            "Set save_adapter_weights_only or the checkpointer FullModelHFCheckpointer, which also writes "
            f"{WEIGHTS_FILE}",
        )
    return AdapterError(f"{path} has no {WEIGHTS_FILE}", "Was the download or the training interrupted?")


def _unused(path: Path, weights: Sequence[Path]) -> Iterator[str]:
    """Note the files beside an adapter that may be a part of the model and are not used."""
    read = {CONFIG_FILE, _INDEX_FILE, INITIAL, *(file.name for file in weights)}
    names = sorted(file.name for file in path.iterdir() if file.name not in read)
    unused = [name for name in names if not any(fnmatch(name, known) for known in (*_WITHOUT_EFFECT, *_OF_TOKENIZER))]
    if unused:
        shown = ", ".join(unused[:_SHOWN_NAMES])
        more = f" and {len(unused) - _SHOWN_NAMES} more" if len(unused) > _SHOWN_NAMES else ""
        yield f"not used, beside the adapter: {shown}{more}"
