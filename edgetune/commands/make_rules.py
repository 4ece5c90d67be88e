"""`edgetune make-rules`: the pipeline of a configuration as rules for GNU make.

Every product is a file with the files it is made from as prerequisites, so make knows what is out of date: touching
the data trains and exports again, touching nothing does nothing. `.DELETE_ON_ERROR` removes the report of a gate that
failed.
"""

from __future__ import annotations

import os
import shlex
from collections.abc import Iterable
from pathlib import Path

import click

from edgetune.config import Config, load_config
from edgetune.errors import ConfigError

HEADER = """\
# Written by `edgetune make-rules`; make writes it again when the configuration changes.
EDGETUNE ?= edgetune
.DELETE_ON_ERROR:
.PHONY: {target}
{target}: {reports}
"""
TRAIN = """
{run_json}: {prerequisites}
	$(EDGETUNE) train {config} -o {run} --resume --overwrite
"""
EXPORT = """
{artifacts} &: {run_json}
	$(EDGETUNE) merge-export {run} --format gguf -q {types} -o {folder} --overwrite
"""
VALIDATE = """
{report}: {artifact} {run_json}
	$(EDGETUNE) validate {run} {artifact_argument} --json {report_argument}
"""
BASE_PATTERNS = ("*.safetensors", "*.safetensors.index.json", "config.json", "tokenizer*", "*.jinja")


@click.command(name="make-rules", short_help="Write the pipeline of a configuration as rules for make.")
@click.argument("config", type=click.Path(path_type=Path))
@click.option("-o", "--run", "run", type=click.Path(path_type=Path), help="Run directory. Default: runs/NAME.")
@click.option("--target", default="pipeline", show_default=True, help="Name of the rule that makes everything.")
def command(config: Path, run: Path | None, target: str) -> None:
    """Print make rules: CONFIG and its data -> run directory -> artifacts -> reports. Needs GNU make 4.3.

    \b
    .edgetune.mk: config.yaml
            edgetune make-rules $< > $@
    include .edgetune.mk
    """
    click.echo(make_rules(config, load_config(config), run, target), nl=False)


def make_rules(path: Path, config: Config, run: Path | None = None, target: str = "pipeline") -> str:
    """The rules as text; `path` is where `config` was read from."""
    if config.export.split_max_size is not None:
        raise ConfigError(
            f"{path}: export.split_max_size gives files whose number is not known before the export",
            "Leave it out, and give --split-max-size to `edgetune merge-export` afterwards.",
        )
    run = run or Path("runs", config.name)
    folder = run / "artifacts"
    artifacts = [folder / f"{config.name}-{type_}.gguf" for type_ in config.export.types]
    reports = [artifact.with_name(artifact.name + ".validation.json") for artifact in artifacts]
    names = {
        "target": target,
        "config": argument(path),
        "run": argument(run),
        "run_json": file_name(run / "run.json"),
        "folder": argument(folder),
        "types": ",".join(config.export.types),
        "prerequisites": " ".join(map(file_name, prerequisites(path, config))),
        "artifacts": " ".join(map(file_name, artifacts)),
        "reports": " ".join(map(file_name, reports)),
    }
    validations = [
        VALIDATE.format(
            artifact=file_name(artifact),
            artifact_argument=argument(artifact),
            report=file_name(report),
            report_argument=argument(report),
            **names,
        )
        for artifact, report in zip(artifacts, reports, strict=True)
    ]
    return "".join([HEADER.format(**names), TRAIN.format(**names), EXPORT.format(**names), *validations])


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
