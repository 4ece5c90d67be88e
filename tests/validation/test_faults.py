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
from edgetune.config import ExportConfig
from edgetune.errors import GateFailure
from edgetune.exporting.request import export_request
from edgetune.exporting.source import find_source
from edgetune.reference import merged
from edgetune.reference.codecs import StoredComparison
from edgetune.reference.store import Reference
from edgetune.runs.directory import RunDirectory
from edgetune.runtime import load
from edgetune.sensitivity.gguf import locate
from edgetune.validation import gate, scoring
from edgetune.validation.ladder import Ladder, Options, measure_ladder
from edgetune.validation.results import Miss
from edgetune_converters.quantization.overrides import overrides_of
from tests.converters import tiny
from tests.export_requests import export
from tests.runtime import models
from tests.validation.runs import make_run

Tensors = dict[str, np.ndarray]
STRICT = ["mean_kld_max=0.001", "same_top_min=0.9", "perplexity_ratio_max=1.05", "recovery_min=0.95"]


def ladder(run: RunDirectory, *files: Path, **options: object) -> Ladder:
    return measure_ladder(run, list(files), Options(**options), console.count_progress)  # type: ignore[arg-type]


def misses(run: RunDirectory, *files: Path, gates: list[str] = STRICT) -> list[Miss]:
    return gate.check(ladder(run, *files, with_task=False).rungs, gate.parse(gates, run.manifest.config)).misses


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


@pytest.fixture(scope="module")
def merged_run(run: RunDirectory, whole: Path, tmp_path_factory: pytest.TempPathFactory) -> RunDirectory:
    """The run with what its merged model says, which is what the f32 file says: the merge is right."""
    copy = RunDirectory(tmp_path_factory.mktemp("merged") / "run")
    shutil.copytree(run.path, copy.path)
    store_merged(copy, whole)
    return copy


def store_merged(run: RunDirectory, file: Path) -> None:
    reference = Reference.open(run.reference)
    with load(file) as runtime:
        said = scoring.score(runtime, reference, reference.rows, lambda *_: None)
    merged.write(reference, "original", StoredComparison(said.kld, said.top, said.nll))


def untie_head(tensors: Tensors) -> None:
    """The head was taken for the embedding, though it is a matrix of its own."""
    tensors["lm_head.weight"] = tensors["model.embed_tokens.weight"] + np.float32(0.05)


def stages(found: list[Miss]) -> dict[str, str]:
    return {miss.figure: miss.stage for miss in found}


@pytest.mark.parametrize("change", [permute_head, transpose_layer])
def test_with_a_merged_rung_wrong_weights_are_lost_at_conversion(
    merged_run: RunDirectory, base: Path, tmp_path: Path, change: Callable[[Tensors], None]
) -> None:
    found = stages(misses(merged_run, changed(base, tmp_path / "changed", change)))
    assert found["mean_kld_max"] == "convert"


def test_a_wrong_merge_is_lost_at_the_merge(run: RunDirectory, base: Path, coarse: Path, tmp_path: Path) -> None:
    wrong = changed(base, tmp_path / "wrong", transpose_layer)
    copy = RunDirectory(tmp_path / "run")
    shutil.copytree(run.path, copy.path)
    store_merged(copy, wrong)
    assert stages(misses(copy, wrong))["mean_kld_max"] == "merge"
    beside = misses(copy, wrong, coarse)
    assert {miss.stage for miss in beside if miss.figure == "mean_kld_max"} == {"merge"}
    assert "--merge-base" in next(str(miss.hint) for miss in beside if miss.figure == "mean_kld_max")


def test_with_a_merged_rung_a_coarse_type_alone_is_conversion_or_quantization(
    merged_run: RunDirectory, whole: Path, coarse: Path
) -> None:
    alone = misses(merged_run, coarse)
    assert {miss.stage.partition(" (")[0] for miss in alone} == {"convert or quantize"}
    assert {miss.stage for miss in misses(merged_run, whole, coarse)} == {"quantize"}


def test_an_untied_head_is_caught(merged_run: RunDirectory, base: Path, tmp_path: Path) -> None:
    directory = tmp_path / "untied"
    shutil.copytree(base, directory)
    config = json.loads((directory / "config.json").read_text())
    (directory / "config.json").write_text(json.dumps(config | {"tie_word_embeddings": False}))
    tensors = load_file(directory / "model.safetensors")
    untie_head(tensors)
    tensors["lm_head.weight"] = np.roll(tensors["lm_head.weight"], 1, axis=0)
    save_file(tensors, directory / "model.safetensors", {"format": "pt"})
    found = stages(misses(merged_run, models.gguf(directory, tmp_path / "untied.gguf")))
    assert found["same_top_min"] == found["mean_kld_max"] == "convert"


@pytest.mark.parametrize("tensor", ["blk.1.ffn_down", "blk.0.attn_q"])
def test_one_tensor_at_two_bits_is_quantization_and_is_located(
    merged_run: RunDirectory, whole: Path, base: Path, tmp_path: Path, tensor: str
) -> None:
    """The 2-bit types want rows of 256; of what fits these rows iq4_nl and q4_0 are the coarsest, so rows are 4-bit."""
    file = tmp_path / "one.gguf"
    export(base, {"q8_0": file}, overrides=overrides_of([f"{tensor}=q4_0"]), allow_fallback=True, threads=1)
    found = measure_ladder(merged_run, [whole, file], Options(with_task=False), console.count_progress)
    missed = gate.check(found.rungs, gate.parse(["mean_kld_max=0.003"], merged_run.manifest.config)).misses
    assert {(miss.rung, miss.stage) for miss in missed} == {("one.gguf", "quantize")}
    located = locate(
        export_request(find_source(merged_run.path), ExportConfig()), found.reference, file, 60, lambda *_: None
    )
    assert located.layers[0].tensor == f"{tensor}.weight"


def test_a_zeroed_adapter_is_caught(base: Path, tmp_path: Path) -> None:
    """The run's trained model has an adapter; the file was exported as if it were nothing."""
    adapter = tiny.adapter(base, tmp_path / "adapter")
    right, wrong = tmp_path / "right.gguf", tmp_path / "wrong.gguf"
    export(base, {"f32": right}, adapter=adapter, threads=1)
    run = make_run(tmp_path / "run", base, right)
    shutil.copytree(adapter, run.adapter)
    weights = load_file(adapter / "adapter_model.safetensors")
    small = {name: value * 1e-6 if "lora_B" in name else value for name, value in weights.items()}
    save_file(small, adapter / "adapter_model.safetensors", {"format": "pt"})
    export(base, {"f32": wrong}, adapter=adapter, threads=1)
    assert misses(run, right) == []
    found = misses(run, wrong)
    assert found[0].figure == "origin"
    assert stages(found)["mean_kld_max"] == "merge or convert"


def test_a_missing_bos_breaks_the_contract(tmp_path: Path) -> None:
    """A vocabulary that starts every text with BOS, and a file of it that does not."""
    base = tiny.base("llama-tied", tmp_path / "hf")
    (base / "chat_template.jinja").write_text(models.TEMPLATE, encoding="utf-8")
    config = json.loads((base / "tokenizer_config.json").read_text())
    added = {"bos_token": "<|endoftext|>", "add_bos_token": True}
    (base / "tokenizer_config.json").write_text(json.dumps(config | added))
    whole = models.gguf(base, tmp_path / "whole.gguf")
    run = make_run(tmp_path / "run", base, whole)
    assert misses(run, whole, gates=[]) == []
    key = b"tokenizer.ggml.add_bos_token" + (7).to_bytes(4, "little")
    miss = misses(run, rewritten(whole, tmp_path / "b.gguf", key + b"\1", key + b"\0"), gates=[])[0]
    assert (miss.figure, miss.stage) == ("contract", "tokenizer")
    assert "with 1 BOS, the file with 0" in miss.sentence


def test_a_wrong_rope_base_is_caught(run: RunDirectory, base: Path, tmp_path: Path) -> None:
    directory = tmp_path / "rope"
    shutil.copytree(base, directory)
    config = json.loads((directory / "config.json").read_text())
    config["rope_parameters"]["rope_theta"] = 500.0
    (directory / "config.json").write_text(json.dumps(config))
    found = misses(run, models.gguf(directory, tmp_path / "rope.gguf"))
    assert stages(found)["mean_kld_max"] == "merge or convert"


def test_a_coarse_type_is_blamed_on_quantization_when_a_whole_file_shows_it(
    run: RunDirectory, whole: Path, coarse: Path
) -> None:
    alone = misses(run, coarse)
    assert all("validate an f16 export" in miss.stage for miss in alone)
    beside = misses(run, whole, coarse)
    assert {(miss.rung, miss.stage) for miss in beside} == {(coarse.name, "quantize")}
    with pytest.raises(GateFailure, match=r"mean KLD is 0\..*above the limit of 0.001") as failure:
        gate.raise_on(beside)
    assert "finer storage type" in str(failure.value.hint)


def rewritten(file: Path, path: Path, old: bytes, new: bytes) -> Path:
    """A GGUF file with some bytes of its metadata replaced by as many others."""
    assert len(old) == len(new)
    content = file.read_bytes()
    assert old in content
    path.write_bytes(content.replace(old, new))
    return path


def contract_miss(run: RunDirectory, file: Path) -> Miss:
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
