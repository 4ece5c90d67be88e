"""Planted faults, each of which the contract or the gate must catch and name."""

from __future__ import annotations

import json
import shutil
import struct
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

from edgetune import console
from edgetune.errors import GateFailure
from edgetune.run_directory import RunDirectory
from edgetune.validation import gate
from edgetune.validation.ladder import Ladder, Options, climb
from tests.runtime import models

Tensors = dict[str, np.ndarray]
STRICT = ["mean_kld_max=0.001", "same_top_min=0.9", "perplexity_ratio_max=1.05", "recovery_min=0.95"]


def ladder(run: RunDirectory, *files: Path, **options: object) -> Ladder:
    return climb(run, list(files), Options(**options), console.count_progress)  # type: ignore[arg-type]


def misses(run: RunDirectory, *files: Path, gates: list[str] = STRICT) -> list[gate.Miss]:
    return gate.misses(ladder(run, *files, with_task=False), gate.parse(gates, run.manifest["config"]))


def changed(base: Path, directory: Path, change: Callable[[Tensors], None]) -> Path:
    """A copy of the model with other weights, exported in f32."""
    shutil.copytree(base, directory)
    file = directory / "model.safetensors"
    tensors = load_file(file)
    change(tensors)
    save_file(tensors, file, {"format": "pt"})
    return models.gguf(directory, directory.with_suffix(".gguf"))


def permute_head(tensors: Tensors) -> None:
    """The first half of the query rows of the first head swapped with the second: the classical rope fault."""
    name = "model.layers.0.self_attn.q_proj.weight"
    tensors[name][:24] = np.roll(tensors[name][:24], 12, axis=0)


def transpose_layer(tensors: Tensors) -> None:
    name = "model.layers.1.self_attn.o_proj.weight"
    tensors[name] = np.ascontiguousarray(tensors[name].T)


def zero_layer(tensors: Tensors) -> None:
    tensors["model.layers.2.mlp.down_proj.weight"][:] = 0


@pytest.mark.parametrize("change", [permute_head, transpose_layer, zero_layer])
def test_wrong_weights_are_caught_and_are_not_blamed_on_quantization(
    run: RunDirectory, base: Path, tmp_path: Path, change: Callable[[Tensors], None]
) -> None:
    found = misses(run, changed(base, tmp_path / "changed", change))
    assert "mean_kld_max" in {miss.figure for miss in found}
    assert found[0].figure == "origin"  # the weights are not those of the run, and the file says so itself
    assert {miss.stage for miss in found[1:]} == {"merge or convert"}


def test_a_wrong_rope_base_is_caught(run: RunDirectory, base: Path, tmp_path: Path) -> None:
    directory = tmp_path / "rope"
    shutil.copytree(base, directory)
    config = json.loads((directory / "config.json").read_text())
    config["rope_parameters"]["rope_theta"] = 500.0
    (directory / "config.json").write_text(json.dumps(config))
    assert misses(run, models.gguf(directory, tmp_path / "rope.gguf"))


def test_a_coarse_type_is_blamed_on_quantization_when_a_whole_file_shows_it(
    run: RunDirectory, whole: Path, coarse: Path
) -> None:
    alone = misses(run, coarse)
    assert all("validate an f16 export" in miss.stage for miss in alone)
    beside = misses(run, whole, coarse)
    assert {(miss.rung, miss.stage) for miss in beside} == {(coarse.name, "quantize")}
    with pytest.raises(GateFailure, match=r"mean KLD is 0\..*at most 0.001") as failure:
        gate.raise_on(beside)
    assert "finer type" in str(failure.value.hint)


def rewritten(file: Path, path: Path, old: bytes, new: bytes) -> Path:
    """A GGUF file with some bytes of its metadata replaced by as many others."""
    assert len(old) == len(new)
    content = file.read_bytes()
    assert old in content
    path.write_bytes(content.replace(old, new))
    return path


def contract_miss(run: RunDirectory, file: Path) -> gate.Miss:
    found = misses(run, file, gates=[])
    assert {miss.figure for miss in found} == {"contract"}
    return found[0]


def test_a_swapped_template_breaks_the_contract(run: RunDirectory, whole: Path, tmp_path: Path) -> None:
    file = rewritten(
        whole, tmp_path / "t.gguf", b"add_generation_prompt %}<|im_start|>", b"add_generation_prompt %}<|im_stars|>"
    )
    miss = contract_miss(run, file)
    assert miss.stage == "template"
    assert "<|im_stars|>" in miss.sentence


def test_a_missing_template_breaks_the_contract(run: RunDirectory, whole: Path, tmp_path: Path) -> None:
    file = rewritten(whole, tmp_path / "t.gguf", b"tokenizer.chat_template", b"tokenizer.chat_templote")
    assert "no chat template" in contract_miss(run, file).sentence


def test_a_stale_tokenizer_breaks_the_contract_at_the_first_differing_string(
    run: RunDirectory, whole: Path, tmp_path: Path
) -> None:
    """Two tokens have changed places since training."""
    one, other, spare = (struct.pack("<Q", 1) + letter for letter in (b"d", b"m", b"\0"))
    content = whole.read_bytes().replace(one, spare).replace(other, one).replace(spare, other)
    file = tmp_path / "p.gguf"
    file.write_bytes(content)
    miss = contract_miss(run, file)
    assert miss.stage == "tokenizer"
    assert "dim the lights" in miss.sentence
    assert "differs at token" in miss.sentence


def test_another_stop_token_breaks_the_contract(run: RunDirectory, whole: Path, tmp_path: Path) -> None:
    key = b"tokenizer.ggml.eos_token_id" + (4).to_bytes(4, "little")
    file = rewritten(whole, tmp_path / "s.gguf", key + (501).to_bytes(4, "little"), key + (7).to_bytes(4, "little"))
    file = rewritten(file, tmp_path / "s.gguf", b"<|im_end|>", b"<|im_ond|>")
    assert any("stop" in miss.sentence for miss in misses(run, file, gates=[]))


def test_a_bos_too_many_breaks_the_contract(run: RunDirectory, whole: Path, tmp_path: Path) -> None:
    key = b"tokenizer.ggml.add_bos_token" + (7).to_bytes(4, "little")
    file = rewritten(whole, tmp_path / "b.gguf", key + b"\0", key + b"\1")
    assert any("BOS" in miss.sentence for miss in misses(run, file, gates=[]))
