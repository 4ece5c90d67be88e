"""Adapters that the converters cannot merge themselves: PEFT merges their layers first, where torch is there."""

from __future__ import annotations

import importlib.util
import tempfile
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING

from edgetune import console
from edgetune.errors import ConfigError, EnvironmentProblem
from edgetune_converters.names import ORIGINAL, MergeBaseOption

if TYPE_CHECKING:
    from edgetune_converters.errors import OnlyPeftError
    from edgetune_converters.request import ExportRequest

_NEEDED = ("torch", "transformers", "peft")


@contextmanager
def with_merged_layers(request: ExportRequest, merge_base: MergeBaseOption) -> Iterator[ExportRequest]:
    """Yield the request with temporary adapters of merged layers in place of those that PEFT alone can merge.

    Args:
        request: The request.
        merge_base: The merge base that the options ask for.

    Raises:
        EnvironmentProblem: torch, transformers or PEFT is missing.
        ConfigError: The base is one that transformers does not load in f32, or is rounded in the merge.
        AdapterError: PEFT cannot merge the adapter.
    """
    made = request.combination
    paths = made.adapters if made is not None else (request.adapter,) if request.adapter else ()
    with ExitStack() as stack:
        found = {path: error for path in paths if (error := _why_only_peft(path)) is not None}
        replaced = {path: _merged(stack, request.base, merge_base, path, error) for path, error in found.items()}
        if not replaced:
            yield request
        elif made is None:
            assert request.adapter is not None
            yield replace(request, adapter=replaced[request.adapter])
        else:
            places = tuple(replaced.get(path, path) for path in made.adapters)
            yield replace(request, adapter=places[0], combination=replace(made, adapters=places))


def _why_only_peft(path: Path) -> OnlyPeftError | None:
    from edgetune_converters.adapters.soft_prompt import open_adapter
    from edgetune_converters.errors import AdapterError, OnlyPeftError

    try:
        open_adapter(path)
    except OnlyPeftError as error:
        return error
    except AdapterError:  # raised again, with its message, by the export
        return None
    return None


def _merged(stack: ExitStack, base: Path, merge_base: MergeBaseOption, path: Path, error: OnlyPeftError) -> Path:
    """Return a temporary adapter of the layers that PEFT merges."""
    from edgetune_converters.adapters.directory import find_adapter

    if missing := [name for name in _NEEDED if importlib.util.find_spec(name) is None]:
        raise EnvironmentProblem(
            f"{error.message}; {', '.join(missing)} is not installed", "Run `pip install 'edgetune[train]'`"
        )
    if not base.is_dir():
        raise ConfigError(f"{error.message}; PEFT needs a model directory, and {base} is none", _DIRECTORY)
    if merge_base != ORIGINAL:
        raise ConfigError(
            f"{error.message}; PEFT merges into the base as it is stored, and --merge-base is {merge_base}",
            "Leave out --merge-base",
        )
    console.note(f"{error.message}; PEFT merges it now, layer by layer, which needs memory for the base in f32")
    from edgetune.training.peft_merge import write_merged_layers

    place = find_adapter(path)
    folder = Path(stack.enter_context(tempfile.TemporaryDirectory(prefix="edgetune-merged-"))) / path.resolve().name
    folder.mkdir()
    count = write_merged_layers(base, place.path, folder, place.identity())
    own = {place.path / place.config, *place.weights}
    for file in place.path.iterdir():  # the tokenizer and the template of the training
        if file.is_file() and file not in own:
            (folder / file.name).symlink_to(file.resolve())
    console.note(f"PEFT merged {count} layers of {path}")
    return folder


_DIRECTORY = "Give the model directory with --base"
