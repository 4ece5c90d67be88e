"""QLoRA's base, rounded by the installed bitsandbytes: the same rows bit for bit, and the same logits in llama.cpp."""

from __future__ import annotations

import base64
import copy
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from edgetune_converters import gguf
from edgetune_converters.architectures import ModelConfig, bind, family_of
from edgetune_converters.errors import AdapterError, CheckpointError, EdgetuneError
from edgetune_converters.merging.merge_base import FourBitSettings, RoundedReader, merge_base_named, round_to
from edgetune_converters.merging.stream import merged_tensors
from edgetune_converters.model import open_model
from edgetune_converters.reading.checkpoint import Checkpoint
from edgetune_converters.tensors import ALL
from tests.converters import family_models, runtime, tiny
from tests.converters.test_damage import _ANYTHING as ANYTHING
from tests.converters.test_damage import _replace as replaced
from tests.export_requests import export

torch: Any = pytest.importorskip("torch")
pytest.importorskip("bitsandbytes")

from bitsandbytes.functional import dequantize_4bit  # noqa: E402

from edgetune.training import bnb_record  # noqa: E402

# Rows of 172 are no whole number of blocks, which then begin every 16 rows; heads are permuted across them. Rows that
# are no whole number of blocks but of 16 weights, bitsandbytes' AVX-512 code misreads: none of them here.
ODD: dict[str, Any] = {"hidden_size": 172, "intermediate_size": 260, "head_dim": 32}


def load(base: Path, dtype: str, **options: Any) -> Any:
    """The model in 4 bits on the CPU, products in float32, weights as they were quantized."""
    stated = {"load_in_4bit": True, "bnb_4bit_quant_type": "nf4", "bnb_4bit_use_double_quant": True} | options
    model = tiny.transformers.AutoModelForCausalLM.from_pretrained(
        base,
        dtype=getattr(torch, dtype),
        attn_implementation="eager",
        quantization_config=tiny.transformers.BitsAndBytesConfig(bnb_4bit_compute_dtype=torch.float32, **stated),
        device_map={"": "cpu"},
    )
    for module in layers(model).values():
        module.support_avx512bf16_for_cpu = False
    return model


def layers(model: Any) -> dict[str, Any]:
    """The 4-bit layers by the names of their weights."""
    return {f"{name}.weight": module for name, module in model.named_modules() if type(module).__name__ == "Linear4bit"}


@pytest.mark.parametrize(
    ("stored", "trained", "options"),
    [
        ("float32", "float32", {}),
        ("bfloat16", "bfloat16", {}),
        ("float32", "bfloat16", {}),
        ("bfloat16", "float32", {"bnb_4bit_quant_type": "fp4"}),
        ("float32", "float16", {"bnb_4bit_use_double_quant": False}),
    ],
)
def test_rows_are_those_of_bitsandbytes_to_the_bit(
    stored: str, trained: str, options: dict[str, Any], tmp_path: Path
) -> None:
    base = tiny.base("llama", tmp_path, dtype=stored, **ODD)
    model = load(base, trained, **options)
    checkpoint = Checkpoint(base)
    config = ModelConfig(checkpoint.config)
    family = family_of(config)
    bound = bind(family, config, checkpoint.tensors)
    merge_base = merge_base_named("nf4", bnb_record.record_quantized_weights(model))
    held = layers(model)
    seen = 0
    for tensor in merge_base.apply(merged_tensors(family, config, checkpoint, bound, {})):
        if not any(part.reader for part in tensor.parts):
            continue
        (part,) = tensor.parts
        weight = held[part.piece.target].weight
        wanted = dequantize_4bit(weight.data, weight.quant_state).float().numpy()
        if part.piece.view.steps:  # llama.cpp has the halves of a rotated pair beside each other
            heads = wanted.reshape(-1, 2, config.head_dim // 2, wanted.shape[-1])
            wanted = heads.swapaxes(1, 2).reshape(wanted.shape)
        for limit in (1, 7 * 4 * 172, 2**23):
            found = np.concatenate([block.rows for block in tensor.blocks(checkpoint, limit)])
            assert np.array_equal(found, wanted), part.piece.target
        seen += 1
    assert seen == len(held) == 7 * 3
    assert merge_base.notes == []


# fused and split tensors, experts, names that differ between model and checkpoint, tensors that are stored transposed
@pytest.mark.parametrize("name", ["phi3", "mixtral", "mixtral-fused", "neox", "gpt2", "stablelm-12b"])
def test_sources_of_other_families_are_rounded_to_the_bit(name: str, tmp_path: Path) -> None:
    base = family_models.base(name, tmp_path)
    live = load(base, "float32")
    record = bnb_record.record_quantized_weights(live)
    merge_base = merge_base_named("nf4", record)
    model = open_model(base, None, merge_base)
    held = {model.family.canonical_name(weight): module.weight for weight, module in layers(live).items()}
    misread = {model.family.canonical_name(weight) for weight in record["misread"]}
    parts = [part for tensor in model.tensors for part in tensor.parts if part.reader]
    assert {part.piece.target for part in parts} == held.keys()
    for part in parts:
        weight = held[part.piece.target]
        wanted = dequantize_4bit(weight.data, weight.quant_state).numpy()
        assert part.reader
        found = part.reader(model.checkpoint, part.piece.source)(ALL, ALL)
        wanted = wanted.T if part.piece.view.transpose else wanted
        assert part.piece.target in misread or np.array_equal(found, wanted), part.piece.target
    assert not merge_base.notes or misread


def test_a_transposed_model_is_the_one_that_was_trained(tmp_path: Path) -> None:
    base = family_models.base("gpt2", tmp_path / "base")
    model = load(base, "float32")
    export(base, {"f32": tmp_path / "x.gguf"}, merge_base="nf4", bnb_record=bnb_record.record_quantized_weights(model))
    ids = family_models.ids("gpt2")
    with torch.no_grad():
        trained = model(torch.tensor([ids])).logits[0].float().numpy()
    assert tiny.divergence(trained, runtime.logits(tmp_path / "x.gguf", ids))[0] < 1e-4  # llama.cpp's GELU is a table


def _logits(model: Any, adapter: Path, ids: list[int]) -> Any:
    with torch.no_grad(), tiny._between_libraries():
        wrapped = tiny.peft.PeftModel.from_pretrained(model, adapter).eval()
        return wrapped(torch.tensor([ids])).logits[0].float().numpy()


@pytest.mark.parametrize("name", ["llama", "qwen3"])
def test_the_file_is_the_model_that_was_trained(name: str, tmp_path: Path) -> None:
    """PEFT on the 4-bit base against llama.cpp: equal with nf4, and another model with the original base."""
    base = tiny.base(name, tmp_path / "base", **ODD)
    adapter = tiny.adapter(base, tmp_path / "adapter")
    model = load(base, "float32")
    ids = tiny.random_ids()
    record = bnb_record.record_quantized_weights(model)
    trained = _logits(model, adapter, ids)
    klds = {}
    for merge_base in ("original", "nf4"):
        path = tmp_path / f"{merge_base}.gguf"
        (receipt,) = export(base, {"f32": path}, adapter=adapter, merge_base=merge_base, bnb_record=record)
        klds[merge_base], _ = tiny.divergence(trained, runtime.logits(path, ids))
        assert receipt.merge_base == gguf.read(path).metadata["edgetune.merge_base"] == merge_base
        assert receipt.notes == []
    print(name, klds)
    assert klds["nf4"] < 1e-7
    assert klds["original"] > 1e3 * klds["nf4"]


def test_without_a_run_the_defaults_are_used_and_noted(tmp_path: Path) -> None:
    base = tiny.base("llama-tied", tmp_path / "base")
    (receipt,) = export(base, {"f32": tmp_path / "x.gguf"}, merge_base="nf4")
    assert any("there is no record of the training" in note for note in receipt.notes)
    export(
        base,
        {"f32": tmp_path / "y.gguf"},
        merge_base="nf4",
        bnb_record=bnb_record.record_quantized_weights(load(base, "float32")),
    )
    (one, other) = (gguf.read(tmp_path / name) for name in ("x.gguf", "y.gguf"))
    for entry in one.tensors:
        assert np.array_equal(one.tensor(entry.name), other.tensor(entry.name)), entry.name


def test_scales_that_are_not_those_of_the_training_are_noted(tmp_path: Path) -> None:
    base = tiny.base("llama-tied", tmp_path / "base")
    record = bnb_record.record_quantized_weights(load(base, "float32"))
    name = "model.layers.1.mlp.up_proj.weight"
    record["groups"][0]["tensors"][name]["scales_sha256"] = "0" * 64
    (receipt,) = export(base, {"f32": tmp_path / "x.gguf"}, merge_base="nf4", bnb_record=record)
    assert any(f"1 rounded tensors (the first is {name})" in note for note in receipt.notes)


# -- bad input ---------------------------------------------------------------------------------------------------------

RECORD: dict[str, Any] = {
    "device": "cpu",
    "torch_threads": 1,
    "groups": [
        {
            "quant_type": "nf4", "blocksize": 64, "double_quant": True, "dtype": "float32",
            "nested_map": base64.b64encode(np.linspace(-1, 1, 256, dtype="<f4").tobytes()).decode(),
            "tensors": {"model.layers.0.mlp.up_proj.weight": {"offset": 0.5, "scales_sha256": "0"}},
        }
    ],
}  # fmt: skip


@pytest.mark.parametrize(
    "changes",
    [
        {"quant_type": "nf5"}, {"blocksize": 63}, {"blocksize": True}, {"blocksize": "64"}, {"double_quant": 1},
        {"dtype": "int8"}, {"dtype": []}, {"nested_map": None}, {"nested_map": "AAAA"}, {"nested_map": "é"},
        {"tensors": []}, {"tensors": {"x": {}}}, {"tensors": {"x": {"offset": None, "scales_sha256": "0"}}},
        {"tensors": {"x": {"offset": float("nan"), "scales_sha256": "0"}}}, {"tensors": None},
    ],
)  # fmt: skip
def test_a_damaged_record_is_refused(changes: dict[str, Any]) -> None:
    record = copy.deepcopy(RECORD)
    record["groups"][0] |= changes
    with pytest.raises(AdapterError, match="record of its 4-bit weights cannot be read"):
        merge_base_named("nf4", record).apply([])


@given(new=ANYTHING, choices=st.lists(st.integers(0, 10**6), min_size=1, max_size=4))
def test_one_value_of_the_record_may_be_anything(new: Any, choices: list[int]) -> None:
    with pytest.raises(AdapterError):  # there are no tensors that it could fit
        merge_base_named("nf4", replaced(copy.deepcopy(RECORD), new, choices) or {}).apply([])


@pytest.mark.parametrize(
    ("record", "message"),
    [
        ({}, "cannot be read"),
        ({"groups": 3}, "cannot be read"),
        ({"groups": []}, "held no weight in 4 bits"),
        (RECORD, r"1 tensors in 4 bits that this base does not have, such as model\.layers\.0"),
    ],
)
def test_records_that_do_not_fit_the_base_are_refused(record: dict[str, Any], message: str) -> None:
    with pytest.raises(AdapterError, match=message):
        merge_base_named("nf4", record).apply([])


def test_an_unknown_merge_base_is_refused(tmp_path: Path) -> None:
    with pytest.raises(EdgetuneError, match="no merge base 'nf5'"):
        merge_base_named("nf5")


@pytest.mark.parametrize(("value", "dtype"), [(np.nan, "f32"), (np.inf, "bf16"), (70000.0, "f16")])
def test_weights_that_are_nan_are_refused(value: float, dtype: str, tmp_path: Path) -> None:
    checkpoint = Checkpoint(tiny.base("llama-tied", tmp_path))
    info = checkpoint.tensors["model.layers.1.mlp.up_proj.weight"]
    with info.file.open("r+b") as file:
        file.seek(info.start + 8)
        file.write(np.float32(value).tobytes())
    with pytest.raises(CheckpointError, match=r"up_proj\.weight holds 1 weights that are NaN or infinite \(as"):
        RoundedReader(Checkpoint(tmp_path), info, FourBitSettings(dtype=dtype))


def test_rounding_is_that_of_torch() -> None:
    bits = np.random.default_rng(0).integers(0, 2**32, 50_000, dtype=np.uint64).astype(np.uint32)
    values = bits.view(np.float32)[np.isfinite(bits.view(np.float32))].reshape(1, -1)
    for name, dtype in (("bf16", torch.bfloat16), ("f16", torch.float16)):
        assert np.array_equal(round_to(values, name), torch.from_numpy(values).to(dtype).float().numpy())
