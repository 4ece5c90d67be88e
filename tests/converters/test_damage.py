"""Configs, tokenizers and adapters in which one value is anything at all: an EdgetuneError or a file, nothing else."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from edgetune_converters import gguf
from edgetune_converters.errors import EdgetuneError
from tests.converters import tiny
from tests.export_requests import export

_ANYTHING = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=4) | st.sampled_from(["BPE", "default"]),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=4), inner, max_size=3),
    max_leaves=4,
)
_FILES = ["config.json", "tokenizer.json", "tokenizer_config.json", "generation_config.json", "adapter_config.json"]


@pytest.fixture(scope="module")
def pair(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    """A base with adapter of one layer, small enough to export a hundred times."""
    base = tiny.base("qwen2", tmp_path_factory.mktemp("base"), num_hidden_layers=1)
    return base, tiny.adapter(base, tmp_path_factory.mktemp("adapter"))


def _replace(value: Any, new: Any, choices: list[int], depth: int = 0) -> Any:
    """`value` with the part that `choices` lead to replaced by `new`."""
    if not value or not isinstance(value, dict | list) or depth == len(choices):
        return new
    keys = sorted(value) if isinstance(value, dict) else list(range(len(value)))
    chosen = keys[choices[depth] % len(keys)]
    copy = value.copy()
    copy[chosen] = _replace(value[chosen], new, choices, depth + 1)
    return copy


@given(name=st.sampled_from(_FILES), new=_ANYTHING, choices=st.lists(st.integers(0, 10**6), min_size=1, max_size=3))
def test_one_value_may_be_anything(
    name: str, new: Any, choices: list[int], pair: tuple[Path, Path], tmp_path: Path
) -> None:
    directories = [tmp_path / "base", tmp_path / "adapter"]
    for source, target in zip(pair, directories, strict=True):
        shutil.copytree(source, target, dirs_exist_ok=True)
    damaged = next(path for path in (directory / name for directory in directories) if path.exists())
    damaged.write_text(json.dumps(_replace(json.loads(damaged.read_text(encoding="utf-8")), new, choices)))
    output = tmp_path / "out" / "x.gguf"
    output.unlink(missing_ok=True)
    try:
        export(directories[0], {"f32": output}, adapter=directories[1])
    except EdgetuneError:
        assert not output.exists()
        assert not list((tmp_path / "out").glob("*.partial"))
    else:
        assert gguf.read(output).tensors
