"""Options of an export that contradict the method by which its adapter was trained."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from edgetune.config import parse_config
from edgetune.errors import ConfigError
from edgetune.exporting.run import prepare_export
from edgetune.exporting.source import find_source

LOFTQ = {"adapter": {"init": "loftq"}, "export": {"merge_base": "nf4"}}


def run_of(folder: Path, sections: dict[str, Any], **changed: Any) -> Path:
    """A finished run that only its manifest makes up."""
    config = parse_config({"base": "b", "data": {"train": "none"}, **sections}).model_dump(mode="json")
    for section, values in changed.items():
        config[section] = {key: value for key, value in {**config[section], **values}.items() if value is not None}
    manifest = {"version": 1, "config": config, "base": {"path": str(folder), "files": {"config.json": "0"}}}
    (folder / "adapter").mkdir(parents=True)
    (folder / "run.json").write_text(json.dumps(manifest))
    return folder


def prepare(run: Path, **given: Any) -> None:
    prepare_export(find_source(run), {"types": ["q8_0"], **given})


@pytest.mark.parametrize("merge_base", ["original", "auto"])
def test_loftq_is_not_merged_into_a_base_that_it_does_not_correct(merge_base: str, tmp_path: Path) -> None:
    run = run_of(tmp_path / "run", LOFTQ)
    prepare(run)
    prepare(run, merge_base="nf4")
    with pytest.raises(ConfigError, match=r"adapter\.init: loftq corrects the rounding of a 4-bit base") as caught:
        prepare(run, merge_base=merge_base)
    assert caught.value.hint is not None
    assert "export.merge_base is --merge-base" in caught.value.hint


def test_the_adapter_of_a_run_is_checked_where_it_is_given_by_its_directory(tmp_path: Path) -> None:
    run = run_of(tmp_path / "run", LOFTQ)
    with pytest.raises(ConfigError, match=r"adapter\.init: loftq"):
        prepare_export(find_source(None, tmp_path, run / "adapter"), {"types": ["q8_0"]})
    prepare_export(find_source(None, tmp_path, run / "adapter"), {"types": ["q8_0"], "merge_base": "nf4"})
    (run / "run.json").write_text("{")  # a damaged manifest is not needed for an adapter and its base
    prepare_export(find_source(None, tmp_path, run / "adapter"), {"types": ["q8_0"]})


@pytest.mark.parametrize(
    ("sections", "given", "message"),
    [
        (LOFTQ, {"formats": ["gguf-lora"]}, "LoRA cannot be exported as gguf-lora: adapter.init: loftq"),
        ({"adapter": {"kind": "prompt-tuning"}}, {"merge_base": "auto"}, "virtual tokens change nothing of the base"),
        ({"adapter": {"kind": "prompt-tuning"}}, {"formats": ["gguf-lora"]}, "a GGUF adapter cannot add tokens"),
        (
            {"adapter": {"kind": "tinylora"}, "quantization": {"bits": 16}},
            {"merge_base": "auto"},
            "PEFT alone merges TinyLoRA",
        ),
    ],
)
def test_every_conflict_of_the_method_is_checked_with_the_options_of_the_export(
    sections: dict[str, Any], given: dict[str, Any], message: str, tmp_path: Path
) -> None:
    run = run_of(tmp_path / "run", sections)
    prepare(run)
    given = {"types": ["f16"], **given}
    with pytest.raises(ConfigError, match=message):
        prepare(run, **given)


@pytest.mark.parametrize(
    "missing", [{"adapter": {"init": None}}, {"adapter": {"kind": None}}, {"quantization": {"bits": None}}]
)
def test_a_run_without_the_information_is_exported_with_either_merge_base(
    missing: dict[str, Any], tmp_path: Path
) -> None:
    run = run_of(tmp_path / "run", {}, **missing)
    for merge_base in ("original", "nf4", "auto"):
        prepare(run, merge_base=merge_base)


def test_options_that_this_version_does_not_know_are_left_to_the_converters(tmp_path: Path) -> None:
    run = run_of(tmp_path / "run", {}, adapter={"kind": "of-a-later-version"})
    prepare(run, merge_base="nf4")


def test_what_contradicts_the_training_alone_does_not_stop_an_export(tmp_path: Path) -> None:
    """An earlier version trained PiSSA on 4 bits, which is refused today."""
    run = run_of(tmp_path / "run", {}, adapter={"init": "pissa"})
    for merge_base in ("original", "nf4"):
        prepare(run, merge_base=merge_base)
