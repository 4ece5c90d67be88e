"""The files of a model directory that hold its weights, and their tensors: chosen as transformers chooses them."""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from pathlib import Path

import numpy as np

from edgetune_converters.errors import CheckpointError
from edgetune_converters.files.contents import DAMAGED, read_json
from edgetune_converters.reading.prequantized import methods
from edgetune_converters.reading.safetensors_file import SafetensorsFile, row_count
from edgetune_converters.tensors import TensorInfo

INDEX_FILE = "model.safetensors.index.json"
SINGLE_FILE = "model.safetensors"
_FETCH = "Fetch the model again"
_SHARD = re.compile(r"model-(\d{5})-of-(\d{5})\.safetensors")
_OWN_LAYOUT = re.compile(r"consolidated.*\.safetensors")  # Mistral's own names, beside those of transformers
_COMPARED_ROWS = 1024


def find_weight_files(path: Path, notes: list[str]) -> list[Path]:
    """Return the safetensors files of a model directory, and add what is left aside to `notes`.

    A single file precedes an index, as in transformers. Shards without an index are read if their numbers are complete.

    Raises:
        CheckpointError: There are none, some are missing, or they are pickled.
    """
    present = sorted(file.name for file in path.glob("*.safetensors"))
    if (path / SINGLE_FILE).is_file():
        files = [path / SINGLE_FILE]
    elif (path / INDEX_FILE).is_file():
        files = _indexed_files(path)
    elif named := methods.named_weights(path):
        return [named]
    elif shards := [name for name in present if _SHARD.fullmatch(name)]:
        files = _numbered_files(path, shards)
        notes.append(f"{INDEX_FILE} is missing: all {len(files)} shards are read")
    else:
        raise _no_weights(path, present)
    read = {file.name for file in files}
    aside = [name for name in present if name not in read and not _OWN_LAYOUT.fullmatch(name)]
    aside += [INDEX_FILE] if SINGLE_FILE in read and (path / INDEX_FILE).is_file() else []
    if aside:
        reason = f"the weights are in {SINGLE_FILE}" if SINGLE_FILE in read else "the index does not name it"
        notes.append(f"{_first_of(aside)} left aside: {reason}")
    return files


def collect_tensors(path: Path, files: Mapping[Path, SafetensorsFile], notes: list[str]) -> dict[str, TensorInfo]:
    """Return all tensors by name. An index need not agree with the shards on the places, but on the names.

    Raises CheckpointError for a tensor that two files hold with different numbers.
    """
    tensors: dict[str, TensorInfo] = {}
    problems, doubles = [], []
    for file in files.values():
        for info in file.tensors.values():
            first = tensors.setdefault(info.name, info)
            if first is info:
                continue
            if _same_numbers(files, first, info):
                doubles.append(info.name)
            else:
                problems.append(f"{info.name} is in {first.file.name} and in {info.file.name}, with different numbers")
    if len(files) > 1 and (path / INDEX_FILE).is_file():
        weight_map = read_json(path / INDEX_FILE)["weight_map"]
        problems += _missing_tensors(weight_map, tensors)
        wrong = [
            name for name, info in tensors.items() if name not in doubles and weight_map.get(name) != info.file.name
        ]
        notes += [f"the index has no or another file for {_first_of(wrong)}: read all the same"] if wrong else []
    if problems:
        raise CheckpointError.of_many(f"contradictions in {path}", problems, _FETCH)
    notes += [f"several shards hold {_first_of(doubles)}, with the same numbers: read once"] if doubles else []
    return tensors


def _no_weights(path: Path, present: list[str]) -> CheckpointError:
    own = [name for name in present if _OWN_LAYOUT.fullmatch(name)]
    if own:
        return CheckpointError(
            f"{path} holds {own[0]}, the layout of Mistral's own tools, and not the files that transformers reads",
            f"Fetch {SINGLE_FILE}, or the shards with {INDEX_FILE}, of the same model",
        )
    if present:
        return CheckpointError(
            f"{path} holds no {SINGLE_FILE}, but {_first_of(present)}, which transformers would not read",
            f"If this is the whole model, rename it to {SINGLE_FILE}",
        )
    pickles = sorted(file.name for file in path.iterdir() if file.suffix in {".bin", ".pt", ".pth"})
    if pickles:
        return CheckpointError(
            f"{path} holds pickled weights ({_first_of(pickles)}); safetensors only, because opening a pickle can run "
            "any code",
            "Convert it once: AutoModelForCausalLM.from_pretrained(DIR).save_pretrained(NEW_DIR)",
        )
    return CheckpointError(f"{path} holds no weights: neither {SINGLE_FILE} nor {INDEX_FILE} is there")


def _indexed_files(path: Path) -> list[Path]:
    weight_map = read_json(path / INDEX_FILE).get("weight_map")
    if not isinstance(weight_map, dict) or not all(isinstance(name, str) for name in weight_map.values()):
        raise CheckpointError(f"{path / INDEX_FILE} has no weight_map from tensor names to file names", DAMAGED)
    files = [path / name for name in sorted(set(weight_map.values()))]
    strays = [file.name for file in files if file.resolve().parent != path.resolve() and not file.is_symlink()]
    missing = [file.name for file in files if not file.is_file()]
    problems = [f"{name} is outside the model directory" for name in strays]
    problems += [f"the shard {name} of the index is missing" for name in missing if name not in strays]
    if problems or not files:
        raise CheckpointError.of_many(
            f"problems with the shards of {path}", problems or [f"{INDEX_FILE} names no files"], _FETCH
        )
    return files


def _numbered_files(path: Path, names: list[str]) -> list[Path]:
    """The shards by their numbers. Raises CheckpointError unless they are all of one model."""
    found = [(int(match[1]), int(match[2])) for name in names if (match := _SHARD.fullmatch(name))]
    count = found[0][1]
    if found != [(number, count) for number in range(1, count + 1)]:
        raise CheckpointError(
            f"{path} holds {_first_of(names)} and no {INDEX_FILE}: {len(names)} of {count} shards are there", _FETCH
        )
    return [path / name for name in names]


def _same_numbers(files: Mapping[Path, SafetensorsFile], one: TensorInfo, other: TensorInfo) -> bool:
    if (one.dtype, one.shape) != (other.dtype, other.shape):
        return False
    count = row_count(one.shape)
    for first in range(0, count, _COMPARED_ROWS):
        last = min(first + _COMPARED_ROWS, count)
        if not np.array_equal(files[one.file].raw(one, first, last), files[other.file].raw(other, first, last)):
            return False
    return True


def _missing_tensors(weight_map: Mapping[str, str], tensors: Mapping[str, TensorInfo]) -> Iterator[str]:
    for name in sorted(weight_map.keys() - tensors.keys()):
        yield f"the index places {name} in {weight_map[name]}, which does not hold it"


def _first_of(names: list[str]) -> str:
    return names[0] + (f" and {len(names) - 1} more" if len(names) > 1 else "")
