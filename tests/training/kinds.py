"""Options of each method that fit the tiny bases of these tests, and the table of all methods."""

from __future__ import annotations

import importlib.util
import sys
from pathlib import Path
from types import ModuleType
from typing import Any

from edgetune.methods import METHODS, Method

OPTIONS: dict[str, dict[str, Any]] = {
    "lora": {"r": 8, "alpha": 16},
    "adalora": {"init_r": 6, "target_r": 3},
    "vera": {"r": 16},
    "pvera": {"r": 16},
    "randlora": {"r": 8, "alpha": 160},
    "vblora": {"vector_length": 32, "num_vectors": 16},
    "c3a": {"block_size": 32},
    "fourierft": {"n_frequency": 50},
    "waveft": {"n_frequency": 50},
    "oft": {"block_size": 16},
    "road": {"group_size": 32},
    "psoft": {"r": 16, "alpha": 16},
    "miss": {"r": 8},
    "shira": {"r": 4},
    "supertuning": {"sparsity": 0.9},
    "gralora": {"r": 8, "alpha": 16},
    "hira": {"r": 8},
    "peanut": {"r": 8},
    "adaption-prompt": {"upper_layers": 1},
}


def method_of(kind: str, **options: Any) -> Method:
    """A method with options that fit, and those given."""
    return METHODS[kind](**{"kind": kind, **OPTIONS.get(kind, {}), **options})


def load_table() -> ModuleType:
    """Return the module docs/methods_table.py, which makes the tables of docs/methods.md."""
    path = Path(__file__).parents[2] / "docs/methods_table.py"
    spec = importlib.util.spec_from_file_location("methods_table", path)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules["methods_table"] = module
    spec.loader.exec_module(module)
    return module
