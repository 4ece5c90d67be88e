"""`edgetune plan`: the figures are those of the files and of the training, and proposals fit."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import yaml

from edgetune.benchmarking.memory import bytes_per_token
from edgetune.config import load_config, parse_config
from edgetune.errors import ConfigError
from edgetune.planning import target, twin
from edgetune.planning.artifact_figures import CACHE_ELEMENT, PlannedFile, cache_bytes, planned_files, speed_figures
from edgetune.planning.card import CardSection, Figure, PlanCard, format_seconds
from edgetune.planning.memory import Arithmetic, estimate_memory
from edgetune.planning.prepare import PreparedRun, prepare_run
from edgetune.training.time_probe import TimeProbe, why_not_probed
from edgetune_converters.gguf import reader
from tests.cli_runner import edgetune, sentence
from tests.export_requests import export
from tests.training import runs

CPU = Arithmetic(stored=4, computed=4)


@pytest.fixture(scope="module")
def config(base: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("plan")
    return runs.write_config(folder / "config.yaml", runs.settings(base, folder))


@pytest.fixture(scope="module")
def prepared(config: Path) -> PreparedRun:
    return prepare_run(load_config(config))


# -- the card ----------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def card(config: Path) -> dict[str, Any]:
    result = edgetune("plan", config, "--json")
    assert result.returncode == 0, result.stderr.decode()
    found: dict[str, Any] = json.loads(result.stdout)
    return found


def test_every_figure_has_a_reason(card: dict[str, Any]) -> None:
    for title in (
        "memory in training", "disk of the run", "time on this device", "exported files", "key-value cache of a file",
        "decoding on this CPU",
    ):  # fmt: skip
        figures = card["sections"][title]
        assert figures
        assert all(figure["reason"] for figure in figures.values())
    assert len(card["checks"]) == 4
    assert "proposal" not in card


def test_time_is_measured_on_this_device(card: dict[str, Any]) -> None:
    time = card["sections"]["time on this device"]
    assert time["steps"]["value"] == 6
    assert time["training"]["value"] > 0
    assert "24 rows x" in time["training"]["reason"]  # 6 steps of 4 rows


def test_the_memory_is_that_of_the_estimate_before_training(card: dict[str, Any], prepared: PreparedRun) -> None:
    parts = card["sections"]["memory in training"]
    stored = estimate_memory(prepared, int(parts["gradients"]["value"] / 4), CPU)
    assert parts["weights"]["value"] == next(part.bytes for part in stored.parts if part.name == "weights")
    both = [figure["value"] for name, figure in parts.items() if name.startswith("all")]
    assert len(both) == 2
    assert both[0] > both[1]  # storing all, and recomputing


def test_nothing_is_measured_without_a_probe(config: Path) -> None:
    result = edgetune("plan", config, "--no-probe")
    said = result.stdout.decode()
    assert "not measured (--no-probe)" in said
    assert "decoding on this CPU" not in said
    assert "exported files" in said


def test_a_base_that_cannot_be_exported_is_refused_as_before_training(config: Path) -> None:
    result = edgetune("plan", config, "--set", "export.types=[q9_9]", "--no-probe")
    assert result.returncode != 0
    assert "q9_9" in sentence(result)


# -- files -------------------------------------------------------------------------------------------------------------


def test_sizes_and_bytes_per_token_are_those_of_the_files(prepared: PreparedRun, tmp_path: Path) -> None:
    files = {file.type: file for file in planned_files(prepared.base, prepared.config)}
    assert files["q8_0"].is_asked
    export(prepared.base.path, {"q8_0": tmp_path / "q8_0.gguf"})
    written = reader.read(tmp_path / "q8_0.gguf")
    assert files["q8_0"].bytes == sum(tensor.bytes for tensor in written.tensors)
    assert files["q8_0"].read_per_token == bytes_per_token(tmp_path / "q8_0.gguf")


def test_types_that_do_not_fit_the_rows_are_not_listed(prepared: PreparedRun) -> None:
    types = [file.type for file in planned_files(prepared.base, prepared.config)]
    assert types == ["q8_0"]  # rows of 64 fit no K-quant


def test_the_cache_counts_keys_and_values_of_all_layers(prepared: PreparedRun) -> None:
    shape: dict[str, Any] = dict(runs.SHAPE)
    head = shape["hidden_size"] // shape["num_attention_heads"]
    each = 2 * shape["num_hidden_layers"] * shape["num_key_value_heads"] * head * CACHE_ELEMENT
    assert cache_bytes(prepared.base, 100) == 100 * each


def test_speed_is_bandwidth_by_bytes_and_its_doubts_are_stated() -> None:
    file = PlannedFile("gguf", "q8_0", 1000, 8.5, 500.0, 0.0, is_asked=True)
    graph = replace(file, format="onnx", read_per_token=None)
    known, unknown = speed_figures([file, graph], 1e6, 2, cache=10**6)
    assert known.value == 2000
    assert "it fits the cache" in known.reason
    assert unknown.value is None
    assert "edgetune bench" in unknown.reason


# -- time --------------------------------------------------------------------------------------------------------------


def test_layers_are_extrapolated_from_one_and_two() -> None:
    probe = TimeProbe(first=0.5, layer=0.25, layers=5, batch=2)
    assert probe.row == 1.5
    assert probe.seconds(10) == 15


def test_what_cannot_be_measured_says_why(prepared: PreparedRun) -> None:
    assert why_not_probed(prepared) is None
    values = prepared.config.model_dump(mode="json")
    pissa = parse_config({**values, "adapter": {"init": "pissa"}, "quantization": {"bits": 16}})
    assert "starts from the whole base" in str(why_not_probed(replace(prepared, config=pissa)))


def test_a_twin_has_the_first_layers_and_links_to_the_weights(prepared: PreparedRun, tmp_path: Path) -> None:
    found = twin.write_twin(prepared.base, 1, tmp_path)
    assert json.loads((tmp_path / "config.json").read_text())["num_hidden_layers"] == 1
    assert (tmp_path / "model.safetensors").is_symlink()
    assert found.directory == tmp_path
    stated = twin.with_layers(
        {"text_config": {"num_hidden_layers": 3, "layer_types": ["a", "b", "a"], "sizes": [1, 2]}, "vision": [1, 2, 3]},
        2,
    )
    assert stated["text_config"] == {"num_hidden_layers": 2, "layer_types": ["a", "b"], "sizes": [1, 2]}


# -- targets -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("text", "size"),
    [("8GB laptop", 8 * 2**30), ("laptop with 16 GiB", 16 * 2**30), ("24", 24 * 2**30), ("512MB", 512 * 2**20),
     ("1.5g", 1.5 * 2**30), ("1T", 2**40)],
)  # fmt: skip
def test_a_target_is_a_number_with_a_unit(text: str, size: float) -> None:
    assert target.parse_target(text) == size


@pytest.mark.parametrize("text", ["laptop", "", "0GB"])
def test_a_target_without_a_size_is_refused(text: str) -> None:
    with pytest.raises(ConfigError, match="names no size of memory"):
        target.parse_target(text)


def _at(prepared: PreparedRun, room: float) -> target.Proposal:
    files = planned_files(prepared.base, prepared.config)
    return target.propose(prepared, 20_000, CPU, files, target.RESERVED + room)


def test_settings_that_fit_stay_as_they_are(prepared: PreparedRun, config: Path) -> None:
    found = _at(prepared, 2**30)
    assert found.settings["training"]["batch_size"] == 4
    assert found.settings["adapter"] == {"r": 8}
    assert found.settings["export"] == {"formats": ["gguf"], "types": ["q8_0"]}
    values = yaml.safe_load(config.read_text())
    for section, options in found.settings.items():  # the fragment is a part of a configuration
        values[section] = {**values.get(section, {}), **options}
    assert parse_config(values).training.batch_size == 4


def test_the_batch_shrinks_first_and_the_optimizer_sees_the_same_rows(prepared: PreparedRun) -> None:
    training = prepared.config.training.model_copy(update={"batch_size": 32, "gradient_accumulation": 2})
    large = replace(prepared, config=prepared.config.model_copy(update={"training": training}))
    needs = {}
    for batch in (32, 8):
        changed = large.config.model_copy(update={"training": training.model_copy(update={"batch_size": batch})})
        needs[batch] = estimate_memory(replace(large, config=changed), 20_000, CPU).total
    found = _at(large, (needs[32] + needs[8]) / 2 - 1 if needs[32] > needs[8] else needs[8])
    settings = found.settings["training"]
    assert settings["batch_size"] < 32
    assert settings["batch_size"] * settings["gradient_accumulation"] == 64
    assert any("the optimizer sees 64 rows a step, as before" in reason for reason in found.reasons)
    assert found.settings["adapter"] == {"r": 8}


def test_a_machine_too_small_for_any_setting_hears_the_smallest_need(prepared: PreparedRun, config: Path) -> None:
    with pytest.raises(ConfigError, match=r"no setting trains this base in 1\.5 GiB; the smallest takes"):
        _at(prepared, 1024)
    result = edgetune("plan", config, "--target", "1GB netbook", "--no-probe")
    assert result.returncode == 2
    assert "the smallest takes" in " ".join(sentence(result).split())


def test_the_proposal_is_printed_as_yaml(config: Path) -> None:
    result = edgetune("plan", config, "--target", "8GB laptop", "--no-probe")
    _, _, text = result.stdout.decode().partition("proposal\n")
    assert yaml.safe_load(text)["training"]["batch_size"] == 4


# -- the text ----------------------------------------------------------------------------------------------------------


def test_figures_stand_in_columns() -> None:
    figures = (Figure("a", 2**20 * 512, "bytes", "why"), Figure("longer", None, "seconds", "unknown"))
    assert list(PlanCard((CardSection("part", figures),), ("holds",)).lines()) == [
        "part", "  a       512 MiB  why", "  longer        -  unknown", "checked", "  holds",
    ]  # fmt: skip


@pytest.mark.parametrize(
    ("seconds", "text"), [(0.42, "0.4 s"), (59, "59 s"), (600, "10 min"), (7000, "1 h 57 min"), (86400, "24 h 00 min")]
)
def test_durations_have_two_units(seconds: float, text: str) -> None:
    assert format_seconds(seconds) == text
