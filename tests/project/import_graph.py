"""The imports of the three packages, read from their syntax trees: which module imports which, and where."""

from __future__ import annotations

import ast
from collections.abc import Callable, Iterable, Iterator, Mapping
from functools import cache
from pathlib import Path
from typing import NamedTuple

ROOT = Path(__file__).parents[2]
PACKAGES = {
    "edgetune_native": ROOT / "native/edgetune_native",
    "edgetune_converters": ROOT / "converters/edgetune_converters",
    "edgetune": ROOT / "edgetune",
}


class Import(NamedTuple):
    """One imported module; `name` is what is imported from it, if anything."""

    importer: str
    target: str
    name: str | None
    line: int


def module_name(file: Path) -> str:
    package, folder = next(item for item in PACKAGES.items() if item[1] in file.parents)
    parts = [package, *file.relative_to(folder).with_suffix("").parts]
    return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)


@cache
def modules() -> dict[str, Path]:
    """Every module of the three packages and its file."""
    return {module_name(file): file for folder in PACKAGES.values() for file in sorted(folder.rglob("*.py"))}


@cache
def tree(file: Path) -> ast.Module:
    return ast.parse(file.read_text(encoding="utf-8"))


def runtime_nodes(node: ast.AST) -> Iterator[ast.AST]:
    """Every node, function bodies included, except what stands under `if TYPE_CHECKING`."""
    for child in ast.iter_child_nodes(node):
        if isinstance(child, ast.If) and "TYPE_CHECKING" in ast.unparse(child.test):
            for other in child.orelse:
                yield other
                yield from runtime_nodes(other)
            continue
        yield child
        yield from runtime_nodes(child)


def imports_of(module: str) -> Iterator[Import]:
    """All imports of a module at run time, also those inside functions and those of foreign packages."""
    file = modules()[module]
    for node in runtime_nodes(tree(file)):
        if isinstance(node, ast.Import):
            for alias in node.names:
                yield Import(module, alias.name, None, node.lineno)
        elif isinstance(node, ast.ImportFrom):
            source = absolute_name(module, file, node)
            for alias in node.names:
                submodule = f"{source}.{alias.name}"
                if submodule in modules():
                    yield Import(module, submodule, None, node.lineno)
                else:
                    yield Import(module, source, alias.name, node.lineno)


def absolute_name(module: str, file: Path, node: ast.ImportFrom) -> str:
    if not node.level:
        return node.module or ""
    parts = module.split(".")
    keep = len(parts) - node.level + (file.name == "__init__.py")
    return ".".join([*parts[:keep], *([node.module] if node.module else [])])


@cache
def internal_imports() -> tuple[Import, ...]:
    """Imports of one module of the three packages by another."""
    return tuple(
        found
        for module in modules()
        for found in imports_of(module)
        if found.target in modules() and found.target != module
    )


def contract(imports: Iterable[Import], box: Callable[[str], str]) -> dict[tuple[str, str], list[Import]]:
    """Arrows between boxes of modules, each with the imports that make it."""
    arrows: dict[tuple[str, str], list[Import]] = {}
    for found in imports:
        ends = box(found.importer), box(found.target)
        if ends[0] != ends[1]:
            arrows.setdefault(ends, []).append(found)
    return arrows


def circles(arrows: Iterable[tuple[str, str]]) -> list[list[str]]:
    """The strongly connected components of more than one node (Tarjan)."""
    graph: dict[str, list[str]] = {}
    for start, end in arrows:
        graph.setdefault(start, []).append(end)
        graph.setdefault(end, [])
    return [sorted(component) for component in strongly_connected(graph) if len(component) > 1]


def strongly_connected(graph: Mapping[str, list[str]]) -> Iterator[list[str]]:
    index: dict[str, int] = {}
    low: dict[str, int] = {}
    stack: list[str] = []

    def visit(node: str) -> Iterator[list[str]]:
        index[node] = low[node] = len(index)
        stack.append(node)
        for neighbor in graph[node]:
            if neighbor not in index:
                yield from visit(neighbor)
                low[node] = min(low[node], low[neighbor])
            elif neighbor in stack:
                low[node] = min(low[node], index[neighbor])
        if low[node] == index[node]:
            start = stack.index(node)
            component = stack[start:]
            del stack[start:]
            yield component

    for node in graph:
        if node not in index:
            yield from visit(node)


def location(found: Import) -> str:
    """An import as file:line."""
    what = found.target if found.name is None else f"{found.target}.{found.name}"
    return f"{modules()[found.importer].relative_to(ROOT)}:{found.line} imports {what}"
