"""The documentation: generated pages, links and anchors, code samples that run, command lines that parse."""

from __future__ import annotations

import importlib.util
import re
import shlex
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType
from typing import NamedTuple

import click
import pytest

from edgetune import cli
from tests.project.import_graph import PACKAGES, ROOT

DOCS = ROOT / "docs"
PAGES = sorted(
    path
    for path in [
        *ROOT.glob("*.md"),
        *DOCS.rglob("*.md"),
        *(ROOT / "samples").glob("*/*.md"),
        *ROOT.glob(".github/*.md"),
    ]
    if path.name != "CODE_OF_CONDUCT.md"
)
SOURCES = sorted(
    file
    for folder in [*PACKAGES.values(), ROOT / "native/src", ROOT / "tests", ROOT / "samples"]
    for file in folder.rglob("*")
    if file.suffix in {".py", ".c", ".h", ".yaml", ".html"} and file != Path(__file__)
)
# Pages and options that the texts name before they exist; a line goes when they do.
KNOWN_MISSING_PAGES: set[str] = set()
KNOWN_MISSING_OPTIONS: set[str] = set()
FOREIGN_PAGES = {"docs/ContribOperators.md", "docs/gguf.md"}  # of ONNX Runtime and of ggml
page_ids = pytest.mark.parametrize("page", PAGES, ids=lambda page: str(page.relative_to(ROOT)))


class Block(NamedTuple):
    """A fenced code block: its language and options, its text, and where it is."""

    info: str
    text: str
    line: int


def blocks(page: Path) -> Iterator[Block]:
    fence, info, start, lines = "", "", 0, list[str]()
    for number, line in enumerate(page.read_text(encoding="utf-8").splitlines(), 1):
        match = re.match(r"\s*(`{3,})(.*)", line)
        if not fence and match:
            fence, info, start, lines = match[1], match[2].strip(), number + 1, []
        elif fence and line.strip() == fence:
            yield Block(info, "\n".join(lines), start)
            fence = ""
        elif fence:
            lines.append(line)


def prose(page: Path) -> str:
    """The page without its code blocks and code spans."""
    text = re.sub(r"(?ms)^\s*(`{3,}).*?^\s*\1\s*$", "", page.read_text(encoding="utf-8"))
    return re.sub(r"`[^`\n]*`", "", text)


def anchors(page: Path) -> set[str]:
    """The anchors that GitHub gives to the headings, and those that are set by hand."""
    text = re.sub(r"(?ms)^(`{3,}).*?^\1\s*$", "", page.read_text(encoding="utf-8"))
    found: list[str] = []
    for title in re.findall(r"(?m)^#+\s+(.*?)\s*$", text):
        title = re.sub(r"\[([^\]]*)\]\([^)]*\)", r"\1", title)
        anchor = re.sub(r"[^\w\- ]", "", title.lower()).replace(" ", "-")
        found.append(anchor if anchor not in found else f"{anchor}-{found.count(anchor)}")
    return {*found, *re.findall(r'<a (?:id|name)="([^"]+)"', text)}


def broken_links(page: Path) -> Iterator[str]:
    for target in re.findall(r"\[[^\]]*\]\(\s*<?([^)\s>]+)[^)]*\)", prose(page)):
        if re.match(r"[a-z]+:", target):
            continue
        path, _, anchor = target.partition("#")
        file = (page.parent / path).resolve() if path else page
        if not file.exists():
            yield f"{target}: no such file"
        elif anchor and file.suffix == ".md" and anchor not in anchors(file):
            yield f"{target}: no such heading"


def generator() -> ModuleType:
    spec = importlib.util.spec_from_file_location("generate", DOCS / "generate.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.mark.parametrize("page", ["cli.md", "configuration.md"])
def test_generated_page_is_up_to_date(page: str) -> None:
    assert (DOCS / page).read_text(encoding="utf-8") == generator().PAGES[page](), "run `make docs`"


@page_ids
def test_relative_links_and_anchors_resolve(page: Path) -> None:
    assert not list(broken_links(page))


def test_a_broken_link_is_found(tmp_path: Path) -> None:
    page = tmp_path / "page.md"
    page.write_text("# A `b` title\n[a](#a-b-title) [b](#gone) [c](gone.md) `[d](code.md)`\n", encoding="utf-8")
    assert list(broken_links(page)) == ["#gone: no such heading", "gone.md: no such file"]


def test_pages_that_the_code_cites_exist() -> None:
    missing = {
        cited + anchor: file
        for file in SOURCES
        for cited, anchor in re.findall(r"\b(docs/[\w/-]+\.md)(#[\w-]+)?", file.read_text(encoding="utf-8"))
        if cited not in FOREIGN_PAGES
        and (not (ROOT / cited).is_file() or (anchor and anchor[1:] not in anchors(ROOT / cited)))
    }
    assert {cited: file for cited, file in missing.items() if cited not in KNOWN_MISSING_PAGES} == {}
    assert not KNOWN_MISSING_PAGES - missing.keys(), "well done: remove these lines from KNOWN_MISSING_PAGES"


def test_nothing_cites_a_text_outside_the_repository() -> None:
    citing = {
        str(file.relative_to(ROOT))
        for file in [*SOURCES, *PAGES, ROOT / "pyproject.toml", ROOT / "native/CMakeLists.txt"]
        if re.search(r"\bDESIGN\b(?!_)", file.read_text(encoding="utf-8"))
    }
    assert not citing


PYTHON = {page: [block for block in blocks(page) if block.info.split()[:1] == ["python"]] for page in PAGES}


@pytest.mark.parametrize("page", [page for page in PAGES if PYTHON[page]], ids=lambda page: str(page.relative_to(ROOT)))
def test_python_samples_run(page: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """In order and in one namespace, beside `samples/`. A block that starts with ```python no-run is only compiled."""
    (tmp_path / "samples").symlink_to(ROOT / "samples")
    monkeypatch.chdir(tmp_path)
    names: dict[str, object] = {"__name__": "__main__"}
    for block in PYTHON[page]:
        code = compile("\n" * (block.line - 1) + block.text, str(page), "exec")
        if "no-run" not in block.info.split():
            exec(code, names)


def command_lines(page: Path) -> Iterator[list[str]]:
    """Words of each command line of edgetune, from shell blocks and code spans."""
    texts = [block.text for block in blocks(page) if block.info in {"", "sh", "bash", "console", "shell"}]
    texts += re.findall(r"`(edgetune [a-z][^`\n]*)`", page.read_text(encoding="utf-8"))
    for line in "\n".join(texts).replace("\\\n", " ").splitlines():
        match = re.match(r"\s*(?:\$ )?(?:\S*/)?edgetune ([a-z-]+ .*|[a-z-]+)$", line)
        if match:
            lexer = shlex.shlex(match[1], posix=True, punctuation_chars="|&;<>")
            lexer.whitespace_split = True
            words = list(lexer)
            stop = next((place for place, word in enumerate(words) if re.fullmatch(r"[|&;<>]+", word)), len(words))
            yield words[:stop]


def unknown_words(words: list[str]) -> list[str]:
    """The command if there is no such, or else its options that do not exist."""
    command = cli.cli.get_command(click.Context(cli.cli), words[0])
    if command is None:
        return words[:1]
    known = {name for parameter in command.params for name in [*parameter.opts, *parameter.secondary_opts]}
    options = [word.partition("=")[0] for word in words[1:] if re.match(r"--?[a-z]", word)]
    known |= {"-h", "--help", *(name.split()[1] for name in KNOWN_MISSING_OPTIONS if name.startswith(f"{words[0]} "))}
    return [option for option in options if option not in known]


@page_ids
def test_command_lines_parse(page: Path) -> None:
    wrong = [(" ".join(words), unknown) for words in command_lines(page) if (unknown := unknown_words(words))]
    assert not wrong


def test_an_unknown_option_is_found() -> None:
    assert unknown_words(["run", "x.gguf", "-p", "a b", "--tmperature=1"]) == ["--tmperature"]
    assert unknown_words(["rnu", "x.gguf"]) == ["rnu"]
