"""An ONNX model on disk: a directory with the graph, its weights, the tokenizer's files and genai_config.json.

The layout is that of onnxruntime-genai, whose folders can be read as well as our own.
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
    """Whether this is a graph, or a directory with one."""
    if path.is_dir():
        return (path / GENAI_CONFIG).is_file() or (path / MODEL).is_file()
    return path.suffix.lower() == SUFFIX


@dataclass(frozen=True)
class OnnxFolder:
    """Where things lie, and what the JSON files say about the model. Files that are not there are empty."""

    path: Path
    """As the user gave it: the directory, or the graph in it."""
    graph: Path
    genai: Mapping[str, Any]
    """The `model` section of genai_config.json."""
    config: Mapping[str, Any]
    """config.json of the base."""

    @classmethod
    def open(cls, path: Path) -> OnnxFolder:
        """Errors: ArtifactError when there is no graph, or a JSON file is none."""
        directory = path if path.is_dir() else path.parent
        genai = _object(_read(directory / GENAI_CONFIG).get("model"))
        graph = path if not path.is_dir() else directory / _file_name(directory, genai)
        if not graph.is_file():
            raise ArtifactError(f"{graph} is missing", "Export again, or fetch the whole folder.")
        return cls(path, graph, genai, _read(directory / "config.json"))

    @property
    def directory(self) -> Path:
        """The folder."""
        return self.graph.parent

    @property
    def decoder(self) -> Mapping[str, Any]:
        """What genai_config.json says about the graph."""
        return _object(self.genai.get("decoder"))

    @property
    def trained_context(self) -> int | None:
        """Tokens that the model was made for, if one of the files says."""
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
            "Fetch the folder from where you trust it.",
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
