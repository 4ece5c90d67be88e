"""An ONNX model on disk: a directory with the graph, its weights, the tokenizer's files and genai_config.json.

The layout is that of onnxruntime-genai, whose folders can be opened as well as edgetune's.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from edgetune_converters.errors import ArtifactError, CheckpointError
from edgetune_converters.files.contents import read_json

MODEL = "model.onnx"
GENAI_CONFIG = "genai_config.json"
SUFFIX = ".onnx"


def is_onnx(path: Path) -> bool:
    """Whether a path is an .onnx file or a directory with a graph."""
    if path.is_dir():
        return (path / GENAI_CONFIG).is_file() or (path / MODEL).is_file()
    return path.suffix.lower() == SUFFIX


@dataclass(frozen=True)
class OnnxFolder:
    """Paths in the folder, and its JSON files; a missing JSON file is an empty mapping."""

    path: Path
    """The path as it was given: the directory or the graph in it."""
    graph: Path
    genai: Mapping[str, Any]
    """The `model` section of genai_config.json."""
    config: Mapping[str, Any]
    """config.json of the base."""

    @classmethod
    def open(cls, path: Path) -> OnnxFolder:
        """Read the folder. Raises ArtifactError if it has no graph or a malformed JSON file."""
        directory = path if path.is_dir() else path.parent
        genai = _object(_read(directory / GENAI_CONFIG).get("model"))
        graph = path if not path.is_dir() else directory / _file_name(directory, genai)
        if not graph.is_file():
            raise ArtifactError(f"{graph} is missing", "Export again, or download the whole folder")
        return cls(path, graph, genai, _read(directory / "config.json"))

    @property
    def directory(self) -> Path:
        """The folder."""
        return self.graph.parent

    @property
    def decoder(self) -> Mapping[str, Any]:
        """The `decoder` section of genai_config.json."""
        return _object(self.genai.get("decoder"))

    @property
    def trained_context(self) -> int | None:
        """Tokens that the model was trained for, if one of the files gives them."""
        for value in (self.genai.get("context_length"), self.config.get("max_position_embeddings")):
            if type(value) is int and value > 0:
                return value
        return None

    @property
    def stop_ids(self) -> frozenset[int]:
        """The eos ids of genai_config.json."""
        value = self.genai.get("eos_token_id")
        listed = value if isinstance(value, list) else [value]
        return frozenset(number for number in listed if type(number) is int)

    @property
    def size(self) -> int:
        """Bytes of all files in the folder."""
        return sum(file.stat().st_size for file in self.directory.iterdir() if file.is_file())


def _file_name(directory: Path, genai: Mapping[str, Any]) -> str:
    name = _object(genai.get("decoder")).get("filename", MODEL)
    if not isinstance(name, str) or not name or Path(name).name != name:
        raise ArtifactError(
            f"{directory / GENAI_CONFIG} names the graph {name!r}, which is not a file in its folder",
            "Download the folder from a source that you trust",
        )
    return name


def _read(path: Path) -> dict[str, Any]:
    if not path.is_file():
        return {}
    try:
        return dict(read_json(path))
    except CheckpointError as error:
        raise ArtifactError(error.message, error.hint) from None


def _object(value: Any) -> Mapping[str, Any]:
    return value if isinstance(value, Mapping) else {}
