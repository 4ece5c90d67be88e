"""The map of DESIGN, held by tests: who may import whom, and what a light install and a quick start are."""

from __future__ import annotations

import ast
import re
import subprocess
import sys
import tomllib
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
PACKAGES = {
    "edgetune_native": ROOT / "native/edgetune_native",
    "edgetune_converters": ROOT / "converters/edgetune_converters",
    "edgetune": ROOT / "edgetune",
}
ALLOWED = {
    "edgetune_native": {"edgetune_native"},
    "edgetune_converters": {"edgetune_native", "edgetune_converters"},
    "edgetune": set(PACKAGES),
}
TRAINING_ONLY = {"torch", "transformers", "peft", "bitsandbytes", "accelerate", "trl"}
SILENT = {"click", "rich"}


def imports(file: Path) -> Iterator[tuple[str, int]]:
    """Top-level names that a file imports, anywhere in it, but for type checking."""
    tree = ast.parse(file.read_text(encoding="utf-8"))
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            yield from ((alias.name.split(".")[0], node.lineno) for alias in node.names)
        elif isinstance(node, ast.ImportFrom) and node.module and not node.level:
            yield node.module.split(".")[0], node.lineno


def files_of(package: str) -> list[Path]:
    return sorted(PACKAGES[package].rglob("*.py"))


@pytest.mark.parametrize("package", PACKAGES)
def test_imports_point_one_way(package: str) -> None:
    files = files_of(package)
    assert files
    wrong = [
        f"{file.relative_to(ROOT)}:{line} imports {name}"
        for file in files
        for name, line in imports(file)
        if name in PACKAGES and name not in ALLOWED[package]
    ]
    assert not wrong


@pytest.mark.parametrize("package", PACKAGES)
def test_only_the_training_room_knows_torch(package: str) -> None:
    wrong = [
        f"{file.relative_to(ROOT)}:{line} imports {name}"
        for file in files_of(package)
        if ROOT / "edgetune/training" not in file.parents
        for name, line in imports(file)
        if name in TRAINING_ONLY
    ]
    assert not wrong


@pytest.mark.parametrize("package", ["edgetune_native", "edgetune_converters"])
def test_lower_rooms_do_not_talk_to_the_terminal(package: str) -> None:
    wrong = [
        f"{file.relative_to(ROOT)}:{line} imports {name}"
        for file in files_of(package)
        for name, line in imports(file)
        if name in SILENT
    ]
    assert not wrong


def test_metadata_keys_stand_in_one_file() -> None:
    """`"edgetune.recipe"` and the like; names of modules look the same and are left out."""
    keys_file = PACKAGES["edgetune_converters"] / "gguf/keys.py"
    found = {file: set(metadata_keys(file)) for package in PACKAGES for file in files_of(package)}
    assert len(found.pop(keys_file)) > 10
    assert not [f"{file.relative_to(ROOT)}:{line} {key}" for file, uses in found.items() for key, line in uses]


def metadata_keys(file: Path) -> Iterator[tuple[str, int]]:
    for node in ast.walk(ast.parse(file.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Constant) and re.fullmatch(r"edgetune\.[a-z0-9_.]*", str(node.value)):
            path = ROOT / str(node.value).strip(".").replace(".", "/")
            if node.value == "edgetune." or not (path.is_dir() or path.with_suffix(".py").is_file()):
                yield str(node.value), node.lineno


def test_help_is_instant_and_light() -> None:
    """Nothing heavy is imported; how long it takes is measured by `make bench-startup`."""
    code = "import sys; from edgetune.cli import run; run(['--help']); print(sorted(sys.modules), file=sys.stderr)"
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    loaded = ast.literal_eval(result.stderr.strip().splitlines()[-1])
    assert not {"torch", "numpy", "transformers", "rich", "pydantic", "yaml"} & set(loaded)
    assert "merge-export" in result.stdout


def test_versions_are_said_once() -> None:
    """The pinned llama-cpp-python is the same in the build, the dependencies and the constraints."""
    project = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))
    pins = {
        requirement.replace("_", "-")
        for requirement in [
            *project["build-system"]["requires"],
            *project["project"]["dependencies"],
            *(ROOT / "constraints.txt").read_text(encoding="utf-8").splitlines(),
        ]
        if requirement.replace("_", "-").startswith("llama-cpp-python")
    }
    assert len(pins) == 1
    assert "==" in pins.pop()


def test_package_and_project_agree_on_the_version() -> None:
    import edgetune

    project = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))
    assert project["project"]["version"] == edgetune.__version__
