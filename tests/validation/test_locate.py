"""The tensors whose types cost most are found by swapping them back."""

from __future__ import annotations

from pathlib import Path

import pytest

from edgetune.commands.validate import _locator
from edgetune.config import ExportConfig
from edgetune.errors import RunDirectoryError
from edgetune.exporting.request import export_request
from edgetune.exporting.source import find_source
from edgetune.reference.store import Reference
from edgetune.runs.directory import RunDirectory
from edgetune.sensitivity.gguf import locate, tensor_groups
from edgetune.validation.validate import validate_run
from edgetune_converters.quantization.overrides import overrides_of
from edgetune_converters.request import ExportRequest
from tests.export_requests import export


def request_of(run: RunDirectory) -> ExportRequest:
    return export_request(find_source(run.path), ExportConfig())


def mixed(base: Path, path: Path, *types: str, recipe: str = "q8_0", embedding: str | None = None) -> Path:
    """A file whose tensors have the types of a recipe but for the named ones."""
    overrides = overrides_of(types, token_embedding_type=embedding)
    for receipt in export(base, {recipe: path}, overrides=overrides, allow_fallback=True, threads=1):
        receipt.write()
    return path


def test_a_coarse_kind_and_a_coarse_layer_come_first(run: RunDirectory, base: Path, tmp_path: Path) -> None:
    """q4_0 loses some 16 times what q8_0 does, in one kind of tensors and there in one layer most (its q4_0 alone)."""
    file = mixed(base, tmp_path / "m.gguf", r"blk.1.ffn_down=q4_0", r"ffn_up=q5_1")
    found = locate(request_of(run), Reference.open(run.reference), file, 60, lambda *_: None)
    assert found.complete
    assert found.kinds[0].tensor == "blk.*.ffn_down.weight"
    assert found.kinds[0].type == "q4_0/q8_0"
    assert found.kinds[0].gain > 0.3 * found.kld
    assert found.kinds[0].kld_without == pytest.approx(found.kld - found.kinds[0].gain)
    assert found.layers[0].tensor == "blk.1.ffn_down.weight"
    assert {swap.tensor for swap in found.layers} == {f"blk.{layer}.ffn_down.weight" for layer in range(3)}
    assert {path.name for path in tmp_path.iterdir()} == {file.name, file.name + ".receipt.json"}


def test_the_embedding_goes_by_its_own_option(run: RunDirectory, base: Path, tmp_path: Path) -> None:
    file = mixed(base, tmp_path / "m.gguf", embedding="q4_0")
    found = locate(request_of(run), Reference.open(run.reference), file, 60, lambda *_: None)
    assert found.kinds[0].tensor == "token_embd.weight"
    assert found.kinds[0].gain > 0.5 * found.kld
    assert found.layers == []  # it is one tensor


def test_when_the_time_is_over_what_was_found_is_said(run: RunDirectory, coarse: Path) -> None:
    found = locate(request_of(run), Reference.open(run.reference), coarse, 1e-9, lambda *_: None)
    assert not found.complete
    assert found.kinds == []


def test_layers_are_tried_from_both_ends(coarse: Path) -> None:
    kinds, layers = tensor_groups(coarse)
    assert [kind.weights for kind in kinds] == sorted((kind.weights for kind in kinds), reverse=True)
    assert [group.layer for group in layers["blk.*.ffn_up.weight"]] == [0, 2, 1]


def test_a_file_of_another_tool_cannot_be_made_again(run: RunDirectory, coarse: Path, tmp_path: Path) -> None:
    file = tmp_path / "other.gguf"
    file.write_bytes(coarse.read_bytes().replace(b"edgetune.recipe", b"edgetune.reciqe"))
    with pytest.raises(RunDirectoryError, match="does not state how it was made"):
        locate(request_of(run), Reference.open(run.reference), file, 60, lambda *_: None)


def test_the_command_locates_only_where_something_is_quantized(run: RunDirectory, whole: Path, coarse: Path) -> None:
    attach = _locator(run, 60)
    found = validate_run(run, [whole, coarse], with_task=False, attach=attach)
    assert found.files[0].located is None
    located = found.files[1].located
    assert located is not None
    assert located.kld == pytest.approx(found.files[1].figures.kld.value)
    assert sum(swap.gain for swap in located.kinds) == pytest.approx(located.kld, rel=0.5)  # nearly additive
