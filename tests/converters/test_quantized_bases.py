"""A quantized base of any family gives the tensors of the same weights unquantized, in every format."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

from edgetune_converters.errors import CheckpointError
from edgetune_converters.gguf.reader import read as read_gguf
from edgetune_converters.reading.checkpoint import Checkpoint
from tests.converters import family_models, tiny
from tests.converters.quantized_checkpoints import ENTRIES, WEIGHTS, quantized
from tests.export_requests import export

SLOW = pytest.mark.slow
QUICK = {"gpt2", "mixtral", "phi3", "qwen2", "falcon-7b", "granite"}  # one of each way of storing
# gpt-oss has its experts as parameters without a module, which these methods do not quantize
FAMILIES = [name for name in family_models.CASES if "gpt-oss" not in name]


def _same_tensors(one: Path, other: Path) -> None:
    a, b = read_gguf(one), read_gguf(other)
    assert [(entry.name, entry.shape) for entry in a.tensors] == [(entry.name, entry.shape) for entry in b.tensors]
    for entry in a.tensors:
        assert np.array_equal(a.tensor(entry.name), b.tensor(entry.name)), entry.name


@pytest.mark.parametrize("name", [name if name in QUICK else pytest.param(name, marks=SLOW) for name in FAMILIES])
def test_every_family_reads_gptq_as_the_same_plain_weights(name: str, tmp_path: Path) -> None:
    base = family_models.base(name, tmp_path / "base")
    packed, plain = quantized(base, tmp_path, "gptq")
    (receipt,) = export(packed, {"f32": tmp_path / "packed.gguf"})
    export(plain, {"f32": tmp_path / "plain.gguf"})
    _same_tensors(tmp_path / "packed.gguf", tmp_path / "plain.gguf")
    assert any("weights of the base are quantized (gptq)" in note for note in receipt.notes)


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny.base("llama-tied", tmp_path_factory.mktemp("base"))


@pytest.mark.parametrize("method", ENTRIES)
@pytest.mark.parametrize("order", [False, True])
def test_every_method_gives_the_same_tensors_in_every_format(
    method: str, order: bool, base: Path, tmp_path: Path
) -> None:
    if order and not method.startswith("gptq"):
        pytest.skip("only GPTQ reorders columns")
    packed, plain = quantized(base, tmp_path, method, order=order)
    for directory in (packed, plain):
        export(directory, {"q4_0": directory / "x.gguf"}, safetensors={"f32": directory / "merged"})
    _same_tensors(packed / "x.gguf", plain / "x.gguf")
    one, other = Checkpoint(packed / "merged"), Checkpoint(plain / "merged")
    assert one.tensors.keys() == other.tensors.keys()
    assert all(np.array_equal(one.rows(name, slice(None)), other.rows(name, slice(None))) for name in one.tensors)
    assert "quantization_config" not in one.config


@pytest.mark.parametrize("merge_base", ["original", "nf4"])
def test_an_adapter_is_merged_into_the_dequantized_weights(merge_base: str, base: Path, tmp_path: Path) -> None:
    """Nothing is rounded to NF4: an adapter on GPTQ weights was trained with them as they are."""
    packed, plain = quantized(base, tmp_path, "gptq")
    adapter = tiny.adapter(base, tmp_path / "adapter")
    (receipt,) = export(packed, {"f32": tmp_path / "packed.gguf"}, adapter=adapter, merge_base=merge_base)
    export(plain, {"f32": tmp_path / "plain.gguf"}, adapter=adapter)
    _same_tensors(tmp_path / "packed.gguf", tmp_path / "plain.gguf")
    said = [note for note in receipt.notes if "not rounded to nf4" in note]
    assert len(said) == (merge_base == "nf4")


def test_modules_that_are_not_quantized_are_read_as_they_are(base: Path, tmp_path: Path) -> None:
    packed, plain = quantized(base, tmp_path, "gptq", only=r"self_attn")
    export(packed, {"f32": tmp_path / "packed.gguf"})
    export(plain, {"f32": tmp_path / "plain.gguf"})
    _same_tensors(tmp_path / "packed.gguf", tmp_path / "plain.gguf")


def _edit_entry(directory: Path, **changes: object) -> None:
    path = directory / "config.json"
    config = json.loads(path.read_text())
    entry = config["quantization_config"] | changes
    config["quantization_config"] = {key: value for key, value in entry.items() if value is not None}
    path.write_text(json.dumps(config))


@pytest.mark.parametrize("key", ["dynamic", "extra_config"])
@pytest.mark.parametrize("keeps_index", [True, False])
def test_a_rule_gives_a_module_other_bits(key: str, keeps_index: bool, base: Path, tmp_path: Path) -> None:
    """GPTQModel's `dynamic` and AutoRound's `extra_config`; without g_idx only the rule tells the number of columns."""
    three, _ = quantized(base, tmp_path / "3", "gptq-3bit", only="down_proj")
    packed, plain = quantized(tmp_path / "3" / "plain", tmp_path, "gptq", only="up_proj")
    _add_quantized(three, packed, "down_proj")
    pattern = r"+:.*\.down_proj" if key == "dynamic" else r".*\.down_proj"
    rules = {"-:.*o_proj": {}, pattern: {"bits": 3}} if key == "dynamic" else {pattern: {"bits": 3}}
    _edit_entry(packed, **{key: rules})
    if not keeps_index:
        _drop_tensors(packed, "g_idx")
    export(packed, {"f32": tmp_path / "packed.gguf"})
    export(plain, {"f32": tmp_path / "plain.gguf"})
    _same_tensors(tmp_path / "packed.gguf", tmp_path / "plain.gguf")


def _add_quantized(source: Path, target: Path, part: str) -> None:
    """Take the modules whose names contain `part` from another quantized copy."""
    taken = {name: array for name, array in load_file(source / WEIGHTS).items() if part in name}
    kept = {name: array for name, array in load_file(target / WEIGHTS).items() if part not in name}
    save_file(kept | taken, target / WEIGHTS)


def _drop_tensors(directory: Path, ending: str) -> None:
    tensors = {name: array for name, array in load_file(directory / WEIGHTS).items() if not name.endswith(ending)}
    save_file(tensors, directory / WEIGHTS)


@pytest.mark.parametrize(
    ("method", "file", "entry"),
    [
        ("gptq", "quantize_config.json", {"bits": 4, "group_size": 4, "desc_act": False, "sym": False}),
        ("awq", "quant_config.json", {"w_bit": 4, "q_group_size": 4, "zero_point": True, "version": "GEMM"}),
    ],
)
def test_old_checkpoints_have_their_entry_in_a_file_of_its_own(
    method: str, file: str, entry: dict[str, object], base: Path, tmp_path: Path
) -> None:
    packed, plain = quantized(base, tmp_path, method)
    config = json.loads((packed / "config.json").read_text())
    del config["quantization_config"]
    (packed / "config.json").write_text(json.dumps(config))
    with pytest.raises(CheckpointError, match=r"packed weights \(qweight\), but neither config.json nor quantize"):
        Checkpoint(packed)
    named = {"model_file_base_name": "gptq_model-4bit-4g"}
    (packed / file).write_text(json.dumps(entry | named))
    (packed / WEIGHTS).rename(packed / "gptq_model-4bit-4g.safetensors")
    one, other = Checkpoint(packed), Checkpoint(plain)
    assert all(np.array_equal(one.rows(name, slice(None)), other.rows(name, slice(None))) for name in other.tensors)


def test_autoround_writes_the_files_of_gptq_and_awq(base: Path, tmp_path: Path) -> None:
    for method, packing in (("gptq", "auto_round:auto_gptq"), ("awq", "auto_round:auto_awq")):
        packed, plain = quantized(base, tmp_path / method, method)
        _edit_entry(packed, quant_method="auto-round", packing_format=packing, version=None)
        one, other = Checkpoint(packed), Checkpoint(plain)
        assert all(np.array_equal(one.rows(name, slice(None)), other.rows(name, slice(None))) for name in other.tensors)


@pytest.mark.parametrize(("method", "changes"), [("gptq", {"sym": True}), ("awq", {"zero_point": False})])
def test_symmetric_weights_need_no_zero_points(
    method: str, changes: dict[str, object], base: Path, tmp_path: Path
) -> None:
    """Their zero point is the middle of the codes."""
    packed, _ = quantized(base, tmp_path, method, only="up_proj")
    name = next(name for name in Checkpoint(packed).tensors if "up_proj.weight" in name)
    middle = {"gptq": 0x77777777, "awq": 0x88888888}[method]
    tensors = load_file(packed / WEIGHTS)
    filled = {
        key: np.full_like(array, np.array(middle, np.uint32).view(np.int32)) if key.endswith("qzeros") else array
        for key, array in tensors.items()
    }
    save_file(filled, packed / WEIGHTS)
    wanted = Checkpoint(packed).rows(name, slice(None))
    _drop_tensors(packed, "qzeros")
    with pytest.raises(CheckpointError, match="qzeros is missing"):
        Checkpoint(packed)
    _edit_entry(packed, **changes)
    assert np.array_equal(Checkpoint(packed).rows(name, slice(None)), wanted)


DAMAGE: dict[str, tuple[Callable[[Any], Any], str]] = {
    "scales": (lambda array: array[:, :-1], r"scales is F16 .* was expected"),
    "qzeros": (lambda array: array[:, :-1], r"qzeros is I32 .* was expected"),
    "g_idx": (lambda array: array + 1000, r"g_idx names group 10\d\d"),
    "qweight": (lambda array: array[:-2], r"fits neither the 4 bits"),
}


@pytest.mark.parametrize("part", DAMAGE)
def test_parts_that_do_not_fit_are_refused_together(part: str, base: Path, tmp_path: Path) -> None:
    change, said = DAMAGE[part]
    packed, _ = quantized(base, tmp_path, "gptq", only="up_proj")
    tensors = load_file(packed / WEIGHTS)
    for name in [name for name in tensors if name.endswith(part)]:
        tensors[name] = np.ascontiguousarray(change(tensors[name]))
    save_file(tensors, packed / WEIGHTS)
    with pytest.raises(CheckpointError, match=rf"(?s)3 quantized weights that cannot be read.*{said}"):
        Checkpoint(packed)


def test_scales_that_are_not_finite_stop_the_export(base: Path, tmp_path: Path) -> None:
    packed, _ = quantized(base, tmp_path, "gptq", only="up_proj")
    tensors = load_file(packed / WEIGHTS)
    name = next(name for name in tensors if name.endswith("up_proj.scales"))
    tensors[name][0, 0] = np.nan
    save_file(tensors, packed / WEIGHTS)
    with pytest.raises(CheckpointError, match=rf"{name} holds NaN"):
        export(packed, {"q8_0": tmp_path / "x.gguf"})
    assert not (tmp_path / "x.gguf").exists()


def test_scales_of_cache_and_activations_are_left_out_and_said(base: Path, tmp_path: Path) -> None:
    packed, _ = quantized(base, tmp_path, "pack-quantized")
    one = np.ones(1, np.float32)
    extra = {"self_attn.k_scale": one, "self_attn.v_scale": one, "mlp.up_proj.input_global_scale": one}
    tensors = load_file(packed / WEIGHTS) | {f"model.layers.0.{name}": array for name, array in extra.items()}
    save_file(tensors, packed / WEIGHTS)
    (receipt,) = export(packed, {"q8_0": tmp_path / "x.gguf"})
    assert any("2 tensors with scales of an 8-bit key-value cache are left out" in note for note in receipt.notes)
    assert any("1 tensors with scales of quantized activations are left out" in note for note in receipt.notes)


def test_transformers_loads_the_dequantized_model_and_both_tokenizers(base: Path, tmp_path: Path) -> None:
    """Without GPTQModel; tokenizers of the model directory and of the ONNX folder give the ids of the base."""
    packed, plain = quantized(base, tmp_path, "gptq")
    export(packed, safetensors={"f32": tmp_path / "merged"}, onnx={"f32": tmp_path / "folder"})
    ids = tiny.random_ids()
    assert np.array_equal(tiny.torch_logits(tmp_path / "merged", None, ids), tiny.torch_logits(plain, None, ids))
    wanted = tiny.transformers.AutoTokenizer.from_pretrained(base)
    chat = [{"role": "user", "content": "naïve café 把卧室的灯"}]
    for directory in (tmp_path / "merged", tmp_path / "folder"):
        found = tiny.transformers.AutoTokenizer.from_pretrained(directory)
        assert found("Hello  world\n<|im_end|>")["input_ids"] == wanted("Hello  world\n<|im_end|>")["input_ids"]
        rendered = [each.apply_chat_template(chat, tokenize=False) for each in (found, wanted)]
        assert rendered[0] == rendered[1]
        assert (found.eos_token_id, found.pad_token_id) == (wanted.eos_token_id, wanted.pad_token_id)
