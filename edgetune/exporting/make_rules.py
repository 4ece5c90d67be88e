"""The pipeline of a configuration as rules for GNU make.

Each product is a file whose prerequisites are the files that it is made from, so that make knows what is out of date.
`.DELETE_ON_ERROR` removes the validation of a file that missed a threshold. If the command of grouped targets fails,
make would remove all targets but the first, even those that the command did not touch. Therefore the targets that
edgetune itself renames into place when they are complete are `.PRECIOUS`.
"""

from __future__ import annotations

import os
import shlex
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from functools import partial
from pathlib import Path

from edgetune.config import Config
from edgetune.data.sources import local_files
from edgetune.exporting.targets import targets_of
from edgetune.planning.tokenizer_files import TOKENIZER_FILES
from edgetune.runs.directory import RunDirectory
from edgetune.storage_types import are_given
from edgetune_converters.names import AUTO, FormatName

HEADER = """\
# Written by `edgetune make-rules`; make rewrites it when the configuration changes.
EDGETUNE ?= edgetune
.DELETE_ON_ERROR:
.PRECIOUS: {run_json} {reference}{precious}
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


@dataclass(frozen=True)
class Product:
    """One artifact of the export, and how it is represented in make."""

    path: Path
    file: Path
    """The target in make. For a directory its receipt, which is written last; for a split GGUF a list of its files,
    whose number is not known before the export."""
    argument: str
    """The artifact as a word of a shell command."""
    is_model: bool
    """Whether it can be validated."""
    parts: str | None = None
    """Shell pattern of the files of a split GGUF."""

    @property
    def report(self) -> Path:
        """Return where `edgetune validate` writes its results."""
        return self.path.with_name(self.path.name + ".validation.json")


def products_of(config: Config, folder: Path) -> list[Product]:
    """Return the products of the configuration's export. Raises ConfigError for types that no format has."""
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
    """Return the rules as text.

    Args:
        path: The file of the configuration.
        config: The configuration.
        run: The run directory; runs/NAME by default.
        target: Name of the target that makes everything.
    """
    run = run or Path("runs", config.name)
    products = products_of(config, run / "artifacts")
    models = [product for product in products if product.is_model]
    # a missing artifact is made, with all others, before make checks what depends on them
    goals = [product.file for product in products if not product.is_model] + [product.report for product in models]
    split = [product for product in products if product.parts]
    size = config.export.split_max_size
    names = {
        "target": target,
        "goals": _file_names(goals),
        "config": argument(path),
        "run": argument(run),
        "run_json": file_name(RunDirectory(run).finished_file),
        "reference": file_name(RunDirectory(run).reference_file),
        # the export depends on the reference only if options are measured on it
        "measured_on": f" {file_name(RunDirectory(run).reference_file)}" if _is_measured(config) else "",
        "prerequisites": _file_names(prerequisites(path, config)),
        # a list of parts is written by the shell, so an incomplete one must be removed
        "precious": "".join(f" {file_name(product.file)}" for product in products if not product.parts),
        "products": _file_names(product.file for product in products),
        "formats": ",".join(config.export.formats),
        "types": f" -q {','.join(config.export.types)}" if are_given(config.export) else "",
        "split": f" --split-max-size {argument(Path(size))}" if size else "",
        # an earlier export may have had more parts; a model that fits in one file is not split
        "before": "".join(f"\trm -f {product.parts} {argument(product.path)}\n" for product in split),
        "after": "".join(
            f"\tls {product.parts} > {argument(product.file)} 2>/dev/null || "
            f"ls {argument(product.path)} > {argument(product.file)}\n"
            for product in split
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
    return config.export.search_types or config.export.merge_base == AUTO


def _file_names(paths: Iterable[Path]) -> str:
    return " ".join(map(file_name, paths))


def prerequisites(path: Path, config: Config) -> list[Path]:
    """Return the local files that training reads: the configuration, the data, the template and the base."""
    data = config.data
    train = [data.train] if isinstance(data.train, str) else data.train
    rows = [*train, data.validation, data.test]
    files = [path, *(file for name in rows if name for file in local_files(name, data.split))]
    if data.chat_template and Path(data.chat_template).is_file():
        files.append(Path(data.chat_template))
    base = Path(config.base)
    if base.is_dir():
        files += sorted({file for pattern in BASE_PATTERNS for file in base.glob(pattern)})
    return list(_relative(files))


def _relative(files: Iterable[Path]) -> Iterable[Path]:
    """Return paths below the working directory as relative ones, so that the project can be moved."""
    here = Path.cwd()
    for file in files:
        yield file.relative_to(here) if file.is_absolute() and file.is_relative_to(here) else file


def file_name(path: Path) -> str:
    """Return a path as a target or prerequisite of make: blanks, `#`, `:` and `$` are escaped."""
    text = os.fspath(path).replace("\\", "\\\\").replace("$", "$$")
    for special in " #:":
        text = text.replace(special, "\\" + special)
    return text


def argument(path: Path) -> str:
    """Return a path as a word of a recipe: quoted for the shell, then for make."""
    return shlex.quote(os.fspath(path)).replace("$", "$$")
