"""`edgetune make-rules`: the pipeline of a configuration as rules for GNU make.

Every product is a file with the files it is made from as prerequisites, so make knows what is out of date: touching
the data trains and exports again, touching nothing does nothing. `.DELETE_ON_ERROR` removes the report of a gate that
failed. Of grouped targets make would remove all but the first whether the failed command had touched them or not, so
those that edgetune itself puts into place whole, when they are finished, are `.PRECIOUS`.
"""

from __future__ import annotations

import os
import shlex
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import click

from edgetune.config import Config, load_config
from edgetune.exporting.targets import targets_of
from edgetune.planning.tokenizer_files import TOKENIZER_FILES
from edgetune.runs.directory import RunDirectory
from edgetune.storage_types import are_given
from edgetune_converters.names import FormatName

HEADER = """\
# Written by `edgetune make-rules`; make writes it again when the configuration changes.
EDGETUNE ?= edgetune
.DELETE_ON_ERROR:
.PRECIOUS: {run_json} {reference}{whole}
.PHONY: {target}
{target}: {goals}
"""
TRAIN = """
{run_json} {reference} &: {prerequisites}
	$(EDGETUNE) train {config} -o {run} --resume --overwrite
"""
EXPORT = """
{products} &: {run_json}{measured_on}
{before}	$(EDGETUNE) merge-export {run} --format {formats}{types}{split} --overwrite
{after}"""
VALIDATE = """
{report}: {product} {reference}
	$(EDGETUNE) validate {run} {artifact} --json {report_argument}
"""
BASE_PATTERNS = ("*.safetensors", "*.safetensors.index.json", "tokenizer*", "*.jinja", *TOKENIZER_FILES)


@click.command(name="make-rules")
@click.argument("config", type=click.Path(path_type=Path))
@click.option("-o", "--run", "run", type=click.Path(path_type=Path), help="Run directory. Default: runs/NAME.")
@click.option("--target", default="pipeline", show_default=True, help="Name of the target that makes everything.")
def command(config: Path, run: Path | None, target: str) -> None:
    """Print make rules for CONFIG: from its data to the run directory, the exported files and their validations.

    GNU make 4.3 or newer is needed. In a Makefile:

    \b
    Example:
      .edgetune.mk: config.yaml
              edgetune make-rules $< > $@.tmp && mv $@.tmp $@
      include .edgetune.mk
    """
    click.echo(make_rules(config, load_config(config), run, target), nl=False)


@dataclass(frozen=True)
class Product:
    """One artifact: `file` stands for it in make, `argument` in the shell; `parts` match the files that it is cut into.

    A directory is stood for by its receipt, which is written when the directory is there. How many parts a split GGUF
    has shows after the export: it is stood for by a list of them.
    """

    path: Path
    file: Path
    argument: str
    is_model: bool
    parts: str | None = None

    @property
    def report(self) -> Path:
        """Where `edgetune validate` writes what it measured."""
        return self.path.with_name(self.path.name + ".validation.json")


def products_of(config: Config, folder: Path) -> list[Product]:
    """What the configuration's export makes. Errors: ConfigError for types that no format has."""
    make_product: Mapping[FormatName, Callable[[Path], Product]] = {
        "gguf": _split if config.export.split_max_size else partial(_single, is_model=True),
        "onnx": partial(_directory, is_model=True),
        "safetensors": partial(_directory, is_model=False),
        "gguf-lora": partial(_single, is_model=False),
    }
    targets = targets_of(config.export, config.name, folder, None, are_given(config.export))
    return [
        make(target.path) for format_, make in make_product.items() for target in targets if target.format == format_
    ]


def _single(path: Path, *, is_model: bool) -> Product:
    return Product(path, path, argument(path), is_model)


def _directory(path: Path, *, is_model: bool) -> Product:
    return Product(path, path.with_name(path.name + ".receipt.json"), argument(path), is_model)


def _split(path: Path) -> Product:
    listed = path.with_name(path.name + ".parts")
    first = f'"$$(head -n 1 {argument(listed)})"'
    return Product(path, listed, first, is_model=True, parts=f"{argument(path.with_suffix(''))}-?????-of-?????.gguf")


def make_rules(path: Path, config: Config, run: Path | None = None, target: str = "pipeline") -> str:
    """The rules as text; `path` is where `config` was read from."""
    run = run or Path("runs", config.name)
    products = products_of(config, run / "artifacts")
    models = [product for product in products if product.is_model]
    # one that is missing is made, with all others, before make looks at what depends on those
    goals = [product.file for product in products if not product.is_model] + [product.report for product in models]
    cut = [product for product in products if product.parts]
    size = config.export.split_max_size
    names = {
        "target": target,
        "goals": _file_names(goals),
        "config": argument(path),
        "run": argument(run),
        "run_json": file_name(RunDirectory(run).finished_file),
        "reference": file_name(RunDirectory(run).reference_file),
        # what is exported depends on the reference only where choices are measured on it
        "measured_on": f" {file_name(RunDirectory(run).reference_file)}" if _is_measured(config) else "",
        "prerequisites": _file_names(prerequisites(path, config)),
        # a list of parts is written by the shell, and half of one must not stay
        "whole": "".join(f" {file_name(product.file)}" for product in products if not product.parts),
        "products": _file_names(product.file for product in products),
        "formats": ",".join(config.export.formats),
        "types": f" -q {','.join(config.export.types)}" if are_given(config.export) else "",
        "split": f" --split-max-size {argument(Path(size))}" if size else "",
        # parts of an earlier export that was cut otherwise would lie beside those of this one; what fits is not cut
        "before": "".join(f"\trm -f {product.parts} {argument(product.path)}\n" for product in cut),
        "after": "".join(
            f"\tls {product.parts} > {argument(product.file)} 2>/dev/null || "
            f"ls {argument(product.path)} > {argument(product.file)}\n"
            for product in cut
        ),
    }
    validations = [
        VALIDATE.format(
            product=file_name(product.file),
            artifact=product.argument,
            report=file_name(product.report),
            report_argument=argument(product.report),
            **names,
        )
        for product in models
    ]
    return "".join([HEADER.format(**names), TRAIN.format(**names), EXPORT.format(**names), *validations])


def _is_measured(config: Config) -> bool:
    return config.export.search_types or config.export.merge_base == "auto"


def _file_names(paths: Iterable[Path]) -> str:
    return " ".join(map(file_name, paths))


def prerequisites(path: Path, config: Config) -> list[Path]:
    """The local files that training reads: the configuration, the data, the template and the base."""
    data = config.data
    train = [data.train] if isinstance(data.train, str) else data.train
    named = [*train, data.validation, data.test, data.chat_template]
    files = [path, *(Path(name) for name in named if name and Path(name).is_file())]
    base = Path(config.base)
    if base.is_dir():
        files += sorted({file for pattern in BASE_PATTERNS for file in base.glob(pattern)})
    return list(_relative(files))


def _relative(files: Iterable[Path]) -> Iterable[Path]:
    """Relative to here where they lie below, so that the rules read well and survive a move of the project."""
    here = Path.cwd()
    for file in files:
        yield file.relative_to(here) if file.is_absolute() and file.is_relative_to(here) else file


def file_name(path: Path) -> str:
    """A path as make reads it in a target or prerequisite: blanks, `#`, `:` and `$` escaped."""
    text = os.fspath(path).replace("\\", "\\\\").replace("$", "$$")
    for special in " #:":
        text = text.replace(special, "\\" + special)
    return text


def argument(path: Path) -> str:
    """A path as a word of a recipe: quoted for the shell, then for make."""
    return shlex.quote(os.fspath(path)).replace("$", "$$")
