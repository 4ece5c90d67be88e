"""The structure of the packages: layers, rooms, circles, sizes, and what a light install and a quick start are."""

from __future__ import annotations

import ast
import re
import subprocess
import sys
import tomllib
from collections.abc import Iterator
from functools import partial
from pathlib import Path

import pytest

from tests.project import rooms
from tests.project.import_graph import (
    PACKAGES,
    ROOT,
    Import,
    circles,
    contract,
    imports_of,
    internal_imports,
    location,
    modules,
    tree,
)

ALLOWED = {
    "edgetune_native": {"edgetune_native"},
    "edgetune_converters": {"edgetune_native", "edgetune_converters"},
    "edgetune": set(PACKAGES),
}
TRAINING_ONLY = {"torch", "transformers", "peft", "bitsandbytes", "accelerate", "trl"}
TERMINAL = {"click", "rich"}
LOOSE_FILES = 8
FUNCTION_LINES = 70
FILE_LINES = 600


def package_of(module: str) -> str:
    return module.partition(".")[0]


def room_of(module: str) -> str:
    """`edgetune.runtime` of `edgetune.runtime.llama.context`; edgetune_native is one room."""
    return ".".join(module.split(".")[: 1 if package_of(module) == "edgetune_native" else 2])


def wrong_imports(package: str, forbidden: set[str], allowed_in: str = "") -> list[str]:
    return [
        location(found)
        for module in modules()
        if package_of(module) == package and not (allowed_in and module.startswith(allowed_in))
        for found in imports_of(module)
        if found.target.partition(".")[0] in forbidden
    ]


@pytest.mark.parametrize("package", PACKAGES)
def test_packages_import_only_lower_packages(package: str) -> None:
    assert not wrong_imports(package, set(PACKAGES) - ALLOWED[package])


@pytest.mark.parametrize("package", PACKAGES)
def test_only_training_imports_torch(package: str) -> None:
    assert not wrong_imports(package, TRAINING_ONLY, allowed_in="edgetune.training")


@pytest.mark.parametrize("package", ["edgetune_native", "edgetune_converters"])
def test_lower_packages_do_not_write_to_the_terminal(package: str) -> None:
    assert not wrong_imports(package, TERMINAL)
    printing = [
        f"{file.relative_to(ROOT)}:{node.lineno} prints"
        for module, file in modules().items()
        if package_of(module) == package
        for node in ast.walk(tree(file))
        if isinstance(node, ast.Call) and isinstance(node.func, ast.Name) and node.func.id == "print"
    ]
    assert not printing


def test_no_command_imports_another() -> None:
    wrong = [
        location(found)
        for found in internal_imports()
        if found.importer.startswith("edgetune.commands.") and found.target.startswith("edgetune.commands.")
    ]
    assert not wrong


def test_rooms_do_not_import_the_package_that_holds_them() -> None:
    """`edgetune` and `edgetune_converters` are front doors for users; inside, only the version is taken from them."""
    wrong = [
        location(found)
        for found in internal_imports()
        if package_of(found.importer) == found.target in rooms.ROOMS and not takes_version(found)
    ]
    assert not wrong


def takes_version(found: Import) -> bool:
    """Whether nothing but `__version__` is taken from the package that holds all rooms."""
    if found.target not in rooms.ROOMS or found.name is not None:
        return found.name == "__version__"
    taken = [
        node.attr
        for node in ast.walk(tree(modules()[found.importer]))
        if isinstance(node, ast.Attribute) and isinstance(node.value, ast.Name) and node.value.id == found.target
    ]
    return set(taken) <= {"__version__"}


def inner_imports(package: str) -> list[Import]:
    """Imports between the modules of one package, except those of and by its front door."""
    return [
        found
        for found in internal_imports()
        if package_of(found.importer) == package_of(found.target) == package
        and package not in {found.importer, found.target}
    ]


@pytest.mark.parametrize("package", rooms.ROOMS)
def test_rooms_import_only_the_rooms_on_the_map(package: str) -> None:
    arrows = contract(inner_imports(package), room_of)
    table = {
        f"{package}.{room}": {f"{package}.{other}" for other in others} for room, others in rooms.ROOMS[package].items()
    }
    unknown = {room for arrow in arrows for room in arrow} - set(table)
    assert not unknown, "a new room needs a line in tests/project/rooms.py"
    wrong = {arrow: found for arrow, found in arrows.items() if arrow[1] not in table[arrow[0]]}
    new = [location(found) for arrow in wrong.keys() - rooms.KNOWN_ARROWS for found in wrong[arrow]]
    assert not new, "this arrow is not on the map in tests/project/rooms.py"
    done = {arrow for arrow in rooms.KNOWN_ARROWS if package_of(arrow[0]) == package} - wrong.keys()
    assert not done, "well done: remove these lines from KNOWN_ARROWS in tests/project/rooms.py"


@pytest.mark.parametrize("package", rooms.ROOMS)
def test_the_map_is_in_order(package: str) -> None:
    """A room imports only rooms that stand above it in the table, so the table has no circle."""
    order = list(rooms.ROOMS[package])
    wrong = [
        (room, other)
        for room, others in rooms.ROOMS[package].items()
        for other in others
        if order.index(other) >= order.index(room)
    ]
    assert not wrong


def test_no_two_files_import_each_other() -> None:
    assert not circles((found.importer, found.target) for found in internal_imports() if not takes_version(found))


def test_no_two_packages_import_each_other() -> None:
    """At every depth: the files and folders of one package, taken as boxes, have no circle."""
    found = {parent: circles for parent in modules() if (circles := circles_in(parent))}
    assert {parent: circles for parent, circles in found.items() if parent not in rooms.KNOWN_CIRCLES} == {}
    assert not rooms.KNOWN_CIRCLES - found.keys(), (
        "well done: remove these lines from KNOWN_CIRCLES in tests/project/rooms.py"
    )


def circles_in(parent: str) -> list[list[str]]:
    inside = [
        found
        for found in internal_imports()
        if within(found.importer, parent) and within(found.target, parent) and not takes_version(found)
    ]
    if parent in rooms.ROOMS:  # the front door imports what it offers
        inside = [found for found in inside if found.importer != parent]
    arrows = contract(inside, partial(box_in, parent))
    return circles(arrows.keys() - rooms.KNOWN_ARROWS)


def within(module: str, parent: str) -> bool:
    return module == parent or module.startswith(f"{parent}.")


def box_in(parent: str, module: str) -> str:
    """The child of `parent` that holds the module; the parent's own `__init__.py` is a box too."""
    if module == parent:
        return f"{parent}.__init__"
    return ".".join(module.split(".")[: parent.count(".") + 2])


def test_edgetune_has_few_loose_files() -> None:
    loose = sorted(file.name for file in PACKAGES["edgetune"].glob("*.py"))
    assert len(loose) <= LOOSE_FILES, loose


def python_files() -> list[Path]:
    folders = [*PACKAGES.values(), ROOT / "tests", ROOT / "docs", *(ROOT / "samples").glob("*/")]
    return sorted({file for folder in folders for file in folder.rglob("*.py")})


def test_functions_are_shorter_than_70_lines() -> None:
    long = {
        f"{file.relative_to(ROOT)}:{node.name}"
        for file in python_files()
        for node in ast.walk(tree(file))
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef)
        and (node.end_lineno or 0) - node.lineno + 1 >= FUNCTION_LINES
    }
    assert not long - rooms.KNOWN_LONG_FUNCTIONS
    assert not rooms.KNOWN_LONG_FUNCTIONS - long, "well done: remove these lines from KNOWN_LONG_FUNCTIONS"


def test_files_are_shorter_than_600_lines() -> None:
    sources = [*python_files(), *(ROOT / "native").rglob("*.[ch]")]
    lines = {str(file.relative_to(ROOT)): len(file.read_text(encoding="utf-8").splitlines()) for file in sources}
    long = {file for file, count in lines.items() if count >= FILE_LINES}
    assert not long - rooms.KNOWN_LONG_FILES
    assert not rooms.KNOWN_LONG_FILES - long, "well done: remove these lines from KNOWN_LONG_FILES"


def test_metadata_keys_stand_in_one_file() -> None:
    """`"edgetune.recipe"` and the like; names of modules look the same and are left out."""
    found = {module: set(metadata_keys(file)) for module, file in modules().items()}
    assert len(found.pop("edgetune_converters.gguf.keys")) > 10
    literals = [f"{module}:{line} {key}" for module, uses in found.items() for key, line in uses]
    assert not literals, "declare the key in edgetune_converters/gguf/keys.py and use the constant"


def metadata_keys(file: Path) -> Iterator[tuple[str, int]]:
    for node in ast.walk(tree(file)):
        if isinstance(node, ast.Constant) and re.fullmatch(r"edgetune\.[a-z0-9_.]*", str(node.value)):
            path = ROOT / str(node.value).strip(".").replace(".", "/")
            if node.value == "edgetune." or not (path.is_dir() or path.with_suffix(".py").is_file()):
                yield str(node.value), node.lineno


def test_help_is_instant_and_light() -> None:
    """Nothing heavy is imported; how long it takes is measured by `make bench-startup`."""
    code = "import sys; from edgetune.cli import run; run(['--help']); print(sorted(sys.modules), file=sys.stderr)"
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    loaded = ast.literal_eval(result.stderr.strip().splitlines()[-1])
    assert not {"torch", "numpy", "transformers", "rich", "pydantic", "yaml", "importlib.metadata"} & set(loaded)
    assert "merge-export" in result.stdout


def test_llama_cpp_python_is_pinned_once() -> None:
    """The pin is the same in the dependencies and the constraints, and the build does not need llama-cpp-python."""
    project = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))
    pins = {
        requirement.replace("_", "-")
        for requirement in [
            *project["project"]["dependencies"],
            *(ROOT / "constraints.txt").read_text(encoding="utf-8").splitlines(),
        ]
        if requirement.replace("_", "-").startswith("llama-cpp-python")
    }
    assert len(pins) == 1
    assert "==" in pins.pop()
    assert project["build-system"]["requires"] == ["scikit-build-core>=1.1"]


def test_the_version_is_declared_once() -> None:
    import edgetune

    project = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))
    assert project["project"]["dynamic"] == ["version"]
    assert [entry["input"] for entry in project["tool"]["dynamic-metadata"]] == ["edgetune/__init__.py"]
    citation = (ROOT / "CITATION.cff").read_text(encoding="utf-8")
    assert f"\nversion: {edgetune.__version__}\n" in citation
    assert f"\n## {edgetune.__version__} - " in (ROOT / "CHANGELOG.md").read_text(encoding="utf-8")


def test_no_two_public_classes_share_a_name() -> None:
    places: dict[str, list[str]] = {}
    for module, file in modules().items():
        for node in ast.walk(tree(file)):
            if isinstance(node, ast.ClassDef) and not node.name.startswith("_"):
                places.setdefault(node.name, []).append(module)
    assert not {name: found for name, found in places.items() if len(found) > 1}
