"""A merged model as a Hugging Face directory that transformers loads: weights in shards, index, config, tokenizer."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from edgetune_converters.errors import ArtifactError, CheckpointError, RecipeError
from edgetune_converters.files.companions import (
    CompanionFiles,
    check_tokenizer,
    copy_if_present,
    copy_tokenizer,
    tokenizer_notes,
    write_json,
)
from edgetune_converters.files.hashed_file import HashedFile
from edgetune_converters.gguf import keys
from edgetune_converters.merging.base_layout import BaseTensor
from edgetune_converters.merging.score_head import ScoreTensor
from edgetune_converters.merging.stream import RowBlock
from edgetune_converters.outputs.base import OutputSummary, StreamedOutput, StreamTensor
from edgetune_converters.outputs.staging import DirectoryKind, DirectoryOutput
from edgetune_converters.provenance.hashing import InputHashes
from edgetune_converters.provenance.receipts import tool_versions
from edgetune_converters.quantization.encode import encode_rows
from edgetune_converters.reading.safetensors_file import SafetensorsFile
from edgetune_converters.reading.weight_files import INDEX_FILE, SINGLE_FILE

BASE_TYPE = "base"
TYPES = ("bf16", "f16", "f32")
DEFAULT_SHARD = 5 * 10**9
_TAGS = {"f32": "F32", "f16": "F16", "bf16": "BF16"}
# GPTQ and AWQ: in f16, the type of their scales, the weights are those that their libraries dequantize
_OF_BASE = {"F32": "f32", "F64": "f32", "F16": "f16", "BF16": "bf16", "GPTQ": "f16", "AWQ": "f16"}
_BYTES = {"f32": 4, "f16": 2, "bf16": 2}
_TORCH = {"f32": "float32", "f16": "float16", "bf16": "bfloat16"}
_GENERATION_FILE = "generation_config.json"
_DESCRIBING = (".json", ".jinja", ".model", ".txt", ".py")
# what this output states otherwise: templates in their own file, weights that are not quantized; an adapter; texts
_REPLACED = ("chat_template", "quantize_config", "quant_config", "adapter_config", "LICENSE", "NOTICE", "README")
_ABOUT_TRAINING = ("trainer_state", "training_args", "all_results", "train_results", "eval_results")
_PROCESSOR_FILES = ("preprocessor_config.json", "processor_config.json", "video_preprocessor_config.json")
"""How a multimodal model prepares pictures."""


class _Entry(NamedTuple):
    name: str
    shape: tuple[int, ...]
    type: str

    @property
    def bytes(self) -> int:
        return math.prod(self.shape) * _BYTES[self.type]


def check_type(name: str) -> str:
    """Return a storage type of safetensors in lower case. Raises RecipeError."""
    if name.lower() in (*TYPES, BASE_TYPE):
        return name.lower()
    raise RecipeError(f"safetensors cannot be written as {name!r}", f"Give one of {', '.join(TYPES)} with -q")


def _is_exported(path: Path) -> bool:
    try:
        return any(keys.VERSION in SafetensorsFile(file).metadata for file in sorted(path.glob("*.safetensors"))[:1])
    except CheckpointError:
        return False


SAFETENSORS_MODEL = DirectoryKind("a safetensors model", _is_exported)


def check_replaceable(path: Path) -> None:
    """Check that an export may write to `path`. Raises EdgetuneError."""
    SAFETENSORS_MODEL.check_replaceable(path)


class SafetensorsOutput(DirectoryOutput, StreamedOutput):
    """The directory. The type "base" keeps the type of each tensor."""

    def __init__(
        self,
        path: Path,
        type_name: str,
        tensors: Sequence[BaseTensor | ScoreTensor],
        companions: CompanionFiles,
        shard: int | None,
    ) -> None:
        """Plan the shards, of at most `shard` bytes each. Raises TokenizerError when there is no tokenizer to copy."""
        super().__init__(path, SAFETENSORS_MODEL)
        self._type = type_name
        self._companions = companions
        check_tokenizer(companions.tokenizer)
        self._tensors = tensors
        self._entries = [_Entry(tensor.name, tensor.shape, stored_as(tensor, type_name)) for tensor in tensors]
        self._shards = _shards(self._entries, shard or DEFAULT_SHARD)
        self._names = _shard_names(len(self._shards))
        self._headers = [_header(entries) for entries in self._shards]
        self._open: list[HashedFile] = []
        self._not_copied: list[str] = []
        self._left = 0  # bytes that the last open shard still expects

    @property
    def tensors(self) -> Sequence[StreamTensor]:
        return self._tensors

    @property
    def size(self) -> int:
        return sum(len(header) for header in self._headers) + sum(entry.bytes for entry in self._entries)

    def _open_files(self) -> None:
        self._next_shard()

    def _close_files(self) -> None:
        for file in self._open:
            file.close()

    def convert(self, index: int, block: RowBlock, threads: int) -> NDArray[Any]:
        entry = self._entries[index]
        rows = block.rows if len(entry.shape) > 1 else block.rows.reshape(1, -1)
        return encode_rows(rows, entry.type, entry.name, threads)

    def append(self, rows: NDArray[Any]) -> None:
        if rows.nbytes > self._left:
            raise ArtifactError(f"{self._staged.partial}: more rows than planned")
        self._open[-1].write(np.ascontiguousarray(rows).reshape(-1).view(np.uint8).data)
        self._left -= rows.nbytes
        if not self._left:
            self._open[-1].end()
            if len(self._open) < len(self._shards):
                self._next_shard()

    def finish(self, inputs: InputHashes) -> None:
        self._write_companions()

    def verify(self) -> None:
        if self._left or len(self._open) != len(self._shards):
            raise ArtifactError(f"{self._staged.partial}: not all tensors were written")
        for file, name, entries in zip(self._open, self._names, self._shards, strict=True):
            file.sync()
            self._staged.hashes[name] = file.hexdigest()
            found = SafetensorsFile(self._staged.partial / name).tensors
            planned = {entry.name: (_TAGS[entry.type], entry.shape) for entry in entries}
            if {info.name: (info.dtype, info.shape) for info in found.values()} != planned:
                raise ArtifactError(f"{self._staged.partial / name} does not hold what was planned")

    def _summary(self) -> OutputSummary:
        weights = sum(math.prod(entry.shape) for entry in self._entries)
        size = sum(entry.bytes for entry in self._entries)
        types: dict[str, int] = {}
        for entry in self._entries:
            types[entry.type] = types.get(entry.type, 0) + entry.bytes
        return OutputSummary(
            artifact=self.path,
            sha256=self._staged.sha256,
            size=self.size,
            format="safetensors",
            recipe=self._type,
            types=types,
            tensors={entry.name: entry.type for entry in self._entries},
            weights=weights,
            bits_per_weight=round(size * 8 / weights, 4),
            files=self._staged.hashes,
            notes=(
                *self._companions.notes,
                *tokenizer_notes(self._companions.tokenizer, self._companions.config),
                *self._notes_on_files,
            ),
        )

    @property
    def _notes_on_files(self) -> list[str]:
        return [f"files of the base that are not copied: {', '.join(self._not_copied)}"] if self._not_copied else []

    def _next_shard(self) -> None:
        number = len(self._open)
        self._open.append(HashedFile(self._staged.partial / self._names[number]))
        self._open[-1].write(self._headers[number])
        self._open[-1].fix_header()
        self._left = sum(entry.bytes for entry in self._shards[number])

    def _write_companions(self) -> None:
        companions = self._companions
        write_json(self._staged.partial / "config.json", _config(companions, self._type))
        copy_tokenizer(companions, self._staged.partial)
        generation = next(
            (d for d in (companions.tokenizer, companions.base) if (d / _GENERATION_FILE).is_file()), None
        )
        if generation is not None:
            copy_if_present(generation / _GENERATION_FILE, self._staged.partial / _GENERATION_FILE)
        for name in _PROCESSOR_FILES:
            copy_if_present(companions.base / name, self._staged.partial / name)
        if companions.config.get("auto_map") and companions.base.is_dir():  # the model's own Python code
            for source in sorted(companions.base.glob("*.py")):
                copy_if_present(source, self._staged.partial / source.name)
        if len(self._shards) > 1:
            write_json(self._staged.partial / INDEX_FILE, _index(self._names, self._shards))
        self._not_copied = _not_copied(companions.base, self._staged.partial)


def _not_copied(base: Path, directory: Path) -> list[str]:
    """Return the files of a base that say something about the model and are not in `directory`."""
    if not base.is_dir():  # a GGUF file
        return []
    files = [path for path in sorted(base.iterdir()) if path.is_file() and path.suffix in _DESCRIBING]
    known = (*_REPLACED, *_ABOUT_TRAINING)
    return [
        path.name
        for path in files
        if not (directory / path.name).exists() and not path.name.startswith(known) and path.name != INDEX_FILE
    ]


def stored_as(tensor: BaseTensor | ScoreTensor, type_name: str) -> str:
    """Return the storage type of a tensor in a directory of the type `type_name`; a score head stays in f32."""
    if isinstance(tensor, ScoreTensor):
        return "f32"
    return _OF_BASE.get(tensor.source.dtype, "bf16") if type_name == BASE_TYPE else type_name


def _shards(entries: Sequence[_Entry], limit: int) -> list[list[_Entry]]:
    """Return the tensors of each shard: as many as fit into `limit` bytes, at least one."""
    shards: list[list[_Entry]] = [[]]
    size = 0
    for entry in entries:
        if shards[-1] and size + entry.bytes > limit:
            shards.append([])
            size = 0
        shards[-1].append(entry)
        size += entry.bytes
    return shards


def _shard_names(count: int) -> list[str]:
    if count == 1:
        return [SINGLE_FILE]
    return [f"model-{number:05d}-of-{count:05d}.safetensors" for number in range(1, count + 1)]


def _header(entries: Sequence[_Entry]) -> bytes:
    described: dict[str, Any] = {"__metadata__": {"format": "pt", keys.VERSION: tool_versions()["edgetune"]}}
    position = 0
    for entry in entries:
        offsets = [position, position + entry.bytes]
        described[entry.name] = {"dtype": _TAGS[entry.type], "shape": list(entry.shape), "data_offsets": offsets}
        position += entry.bytes
    text = json.dumps(described, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)
    return len(text).to_bytes(8, "little") + text


def _index(names: Sequence[str], shards: Sequence[Sequence[_Entry]]) -> dict[str, Any]:
    total = sum(entry.bytes for entries in shards for entry in entries)
    places = {entry.name: name for name, entries in zip(names, shards, strict=True) for entry in entries}
    return {"metadata": {"total_size": total}, "weight_map": dict(sorted(places.items()))}


def _config(companions: CompanionFiles, type_name: str) -> dict[str, Any]:
    """Return config.json of the merged model: unquantized, and tied only if embedding and output are still equal."""
    config = dict(companions.config)
    config.pop("quantization_config", None)
    if type_name != BASE_TYPE:
        config = _of_type(config, _TORCH[type_name])
        if "dtype" not in config:
            config["torch_dtype"] = _TORCH[type_name]
    if companions.tied:
        return config
    text = config.get("text_config")
    own = {"text_config": {**text, "tie_word_embeddings": False}} if isinstance(text, Mapping) else {}
    return config | own | {"tie_word_embeddings": False}


def _of_type(config: Mapping[str, Any], dtype: str) -> dict[str, Any]:
    """Return a config and its parts with another type where they state one."""
    parts = {key: _of_type(value, dtype) for key, value in config.items() if isinstance(value, Mapping)}
    return {**config, **parts, **{key: dtype for key in ("dtype", "torch_dtype") if key in config}}
