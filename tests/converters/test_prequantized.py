"""Quantized checkpoints: the values of bitsandbytes, transformers and torch; damage reported in one sentence."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from safetensors.torch import load_file, save_file

from edgetune_converters.errors import CheckpointError, EdgetuneError
from edgetune_converters.reading.checkpoint import Checkpoint
from edgetune_converters.tensors import FLOAT8
from tests.converters import runtime, tiny
from tests.converters.test_merge_base import ODD, _logits, layers, load
from tests.export_requests import export

torch: Any = pytest.importorskip("torch")
functional: Any = pytest.importorskip("bitsandbytes.functional")

WEIGHTS = "model.safetensors"
UP = "model.layers.0.mlp.up_proj"
Tensors = dict[str, Any]


def edited(source: Path, target: Path, edit: Callable[[Tensors], None], **config: Any) -> Path:
    """A copy of a model with other tensors and other entries in config.json."""
    shutil.copytree(source, target, dirs_exist_ok=True)
    tensors = load_file(source / WEIGHTS)
    edit(tensors)
    save_file({name: tensor.contiguous() for name, tensor in tensors.items()}, target / WEIGHTS)
    stated = json.loads((source / "config.json").read_text()) | config
    (target / "config.json").write_text(json.dumps(stated))
    return target


def rows_of(checkpoint: Checkpoint, name: str) -> Any:
    """All rows of a weight, read in several ways that must agree."""
    whole = checkpoint.rows(name, slice(None))
    count = len(whole)
    index = np.random.default_rng(0).permutation(count)[: count // 2]
    assert np.array_equal(checkpoint.rows(name, index), whole[index])
    assert np.array_equal(checkpoint.rows(name, slice(3, 17)), whole[3:17])
    return whole


# -- bitsandbytes ------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def four_bit(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A checkpoint as transformers saves a model in 4 bits."""
    base = tiny.base("qwen3", tmp_path_factory.mktemp("base"), dtype="bfloat16", **ODD)
    return saved(load(base, "bfloat16"), base, tmp_path_factory.mktemp("four"))


def saved(model: Any, base: Path, directory: Path) -> Path:
    """The model as transformers saves it, with the tokenizer of its base."""
    model.save_pretrained(directory)
    for path in base.iterdir():
        if not (directory / path.name).exists():
            shutil.copy(path, directory / path.name)
    return directory


@pytest.mark.parametrize(
    ("dtype", "options"),
    [
        ("bfloat16", {}),
        ("float32", {"bnb_4bit_use_double_quant": False}),
        ("float16", {"bnb_4bit_quant_type": "fp4", "bnb_4bit_quant_storage": torch.bfloat16}),
    ],
)
def test_four_bit_weights_are_those_of_bitsandbytes(dtype: str, options: dict[str, Any], tmp_path: Path) -> None:
    model = load(tiny.base("llama-tied", tmp_path / "base", **ODD), dtype, **options)
    checkpoint = Checkpoint(saved(model, tmp_path / "base", tmp_path / "four"))
    held = layers(model)
    assert {name for name, info in checkpoint.tensors.items() if info.dtype in ("NF4", "FP4")} == held.keys()
    assert len(checkpoint.tensors) == 7 * 3 + 2 * 3 + 2
    for name, module in held.items():
        wanted = functional.dequantize_4bit(module.weight.data, module.weight.quant_state)
        assert np.array_equal(rows_of(checkpoint, name), wanted.float().numpy()), name


@pytest.mark.parametrize("merge_base", ["original", "nf4"])
def test_an_adapter_on_a_four_bit_checkpoint(merge_base: str, four_bit: Path, tmp_path: Path) -> None:
    """The file holds what the adapter was trained against, whatever the merge base is called: nothing is rounded twice.

    The other side is a plain model with the weights that bitsandbytes gives back."""
    plain = tiny.base("qwen3", tmp_path / "plain", dtype="bfloat16", **ODD)
    adapter = tiny.adapter(plain, tmp_path / "adapter")
    model = tiny.transformers.AutoModelForCausalLM.from_pretrained(plain, dtype=torch.float32)
    held = layers(tiny.transformers.AutoModelForCausalLM.from_pretrained(four_bit, device_map={"": "cpu"}))
    with torch.no_grad():
        for name, module in held.items():
            wanted = functional.dequantize_4bit(module.weight.data, module.weight.quant_state)
            model.get_parameter(name).copy_(wanted)
    ids = tiny.random_ids()
    (receipt,) = export(four_bit, {"f32": tmp_path / "x.gguf"}, adapter=adapter, merge_base=merge_base)
    kld, same = tiny.divergence(_logits(model, adapter, ids), runtime.logits(tmp_path / "x.gguf", ids))
    assert (kld < 1e-8, same, receipt.notes) == (True, 1.0, [])


@pytest.mark.parametrize("dtype", ["float16", "bfloat16"])
def test_eight_bit_weights_are_those_of_bitsandbytes(dtype: str, tmp_path: Path) -> None:
    base = tiny.base("llama-tied", tmp_path / "base", dtype=dtype, **ODD)

    def quantize(tensors: Tensors) -> None:
        for name in [name for name in tensors if name.endswith("proj.weight")]:
            codes, scales, _ = functional.int8_vectorwise_quant(tensors[name].half())
            module = name.removesuffix(".weight")
            tensors |= {
                name: codes,
                f"{module}.SCB": scales,
                f"{module}.weight_format": torch.tensor(0, dtype=torch.uint8),
            }

    method = {"quant_method": "bitsandbytes", "load_in_8bit": True}
    directory = edited(base, tmp_path / "eight", quantize, quantization_config=method)
    stored, checkpoint = load_file(directory / WEIGHTS), Checkpoint(directory)
    decoded = {name for name, info in checkpoint.tensors.items() if info.dtype == "INT8"}
    assert len(decoded) == 7 * 3
    for name in decoded:
        wanted = functional.int8_vectorwise_dequant(stored[name], stored[name.removesuffix("weight") + "SCB"])
        assert np.array_equal(rows_of(checkpoint, name), wanted.numpy()), name
    export(directory, {"bf16": tmp_path / "x.gguf"})


# -- 8-bit floats ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("label", "dtype"), [("F8_E4M3", torch.float8_e4m3fn), ("F8_E5M2", torch.float8_e5m2)])
def test_tables_are_those_of_torch(label: str, dtype: Any) -> None:
    wanted = torch.arange(256, dtype=torch.uint8).view(dtype).float().numpy()
    assert np.array_equal(FLOAT8[label], wanted, equal_nan=True)


def blockwise(weight: Any, block: tuple[int, int], dtype: Any) -> tuple[Any, Any]:
    """Codes and scales of blocks of a weight, as DeepSeek quantizes."""
    rows, columns = (-(-length // size) for length, size in zip(weight.shape, block, strict=True))
    padded = torch.zeros(rows * block[0], columns * block[1])
    padded[: weight.shape[0], : weight.shape[1]] = weight
    tiles = padded.view(rows, block[0], columns, block[1])
    scales = tiles.abs().amax((1, 3)).clamp(min=1e-6) / torch.finfo(dtype).max
    codes = (tiles / scales[:, None, :, None]).reshape(padded.shape)[: weight.shape[0], : weight.shape[1]]
    return codes.to(dtype), scales


# name -> (rows and columns of a block, 0 for all; name of the scales; entry of config.json)
LAYOUTS: dict[str, tuple[tuple[int, int], str, dict[str, Any]]] = {
    "deepseek": ((128, 128), "weight_scale_inv", {"quant_method": "fp8", "weight_block_size": [128, 128]}),
    "small-blocks": ((32, 48), "weight_scale_inv", {"quant_method": "fp8", "weight_block_size": [32, 48]}),
    "per-tensor": ((0, 0), "weight_scale", {"quant_method": "modelopt", "quant_algo": "FP8"}),
    "per-row": ((1, 0), "weight_scale", {"quant_method": "compressed-tensors", "format": "float-quantized"}),
    "grouped": (
        (64, 64), "weight_scale",
        {
            "quant_method": "compressed-tensors", "format": "float-quantized",
            "config_groups": {"group_0": {"weights": {"block_structure": [64, 64]}}},
        },
    ),
}  # fmt: skip


def small_floats(layout: str, source: Path, target: Path, dtype: Any = None, scale_dtype: Any = None) -> Path:
    """A copy of a model with the matrices of its blocks in 8-bit floats."""
    block, scale_name, stated = LAYOUTS[layout]

    def quantize(tensors: Tensors) -> None:
        for name in [name for name in tensors if name.endswith("proj.weight")]:
            sizes = (block[0] or tensors[name].shape[0], block[1] or tensors[name].shape[1])
            codes, scales = blockwise(tensors[name].float(), sizes, dtype or torch.float8_e4m3fn)
            scales = scales.reshape(()) if layout == "per-tensor" else scales
            module = name.removesuffix(".weight")
            tensors |= {name: codes, f"{module}.{scale_name}": scales.to(scale_dtype or torch.float32)}
            tensors[f"{module}.input_scale"] = torch.tensor(1.0)
        tensors["model.layers.0.self_attn.k_scale"] = torch.tensor(0.5)

    return edited(source, target, quantize, quantization_config=stated)


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("dtype", [torch.float8_e4m3fn, torch.float8_e5m2])
def test_small_floats_times_their_scales(layout: str, dtype: Any, tmp_path: Path) -> None:
    base = tiny.base("llama-tied", tmp_path / "base", hidden_size=176, intermediate_size=260)
    scale_dtype = torch.bfloat16 if layout == "per-row" else torch.float32
    directory = small_floats(layout, base, tmp_path / "f8", dtype, scale_dtype)
    stored, checkpoint = load_file(directory / WEIGHTS), Checkpoint(directory)
    block, scale_name, _ = LAYOUTS[layout]
    names = [name for name in checkpoint.tensors if name.endswith("proj.weight")]
    assert len(names) == 7 * 3
    for name in names:
        codes, scales = stored[name].float(), stored[name.removesuffix("weight") + scale_name].float()
        if layout != "per-tensor":
            for axis, size in enumerate(block):
                scales = scales.repeat_interleave(size or codes.shape[axis], axis).narrow(axis, 0, codes.shape[axis])
        assert np.array_equal(rows_of(checkpoint, name), (codes * scales).numpy()), name
    export(directory, {"bf16": tmp_path / "x.gguf"})


def test_decoded_weights_are_those_of_transformers(tmp_path: Path) -> None:
    from transformers.integrations.finegrained_fp8 import Fp8Dequantize

    base = tiny.base("llama-tied", tmp_path / "base", hidden_size=256, intermediate_size=384)
    directory = small_floats("deepseek", base, tmp_path / "f8")
    stored = load_file(directory / WEIGHTS)
    scales = stored[f"{UP}.weight_scale_inv"]
    wanted = Fp8Dequantize(None)._dequantize_one(stored[f"{UP}.weight"], scales, torch.float32)
    assert np.array_equal(Checkpoint(directory).rows(f"{UP}.weight", slice(None)), wanted.numpy())


def test_small_floats_without_scales_are_themselves(tmp_path: Path) -> None:
    """Models that were only cast: no scale, and config.json says nothing."""
    base = tiny.base("llama-tied", tmp_path / "base")

    def cast(tensors: Tensors) -> None:
        tensors[f"{UP}.weight"] = tensors[f"{UP}.weight"].to(torch.float8_e5m2)

    directory = edited(base, tmp_path / "f8", cast)
    wanted = load_file(directory / WEIGHTS)[f"{UP}.weight"].float().numpy()
    assert np.array_equal(rows_of(Checkpoint(directory), f"{UP}.weight"), wanted)


def test_integers_of_llm_compressor_are_decoded(tmp_path: Path) -> None:
    base = tiny.base("llama-tied", tmp_path / "base")

    def quantize(tensors: Tensors) -> None:
        weight = tensors[f"{UP}.weight"]
        scale = weight.abs().amax(1, keepdim=True) / 127
        tensors |= {f"{UP}.weight": (weight / scale).round().to(torch.int8), f"{UP}.weight_scale": scale}

    method = {"quant_method": "compressed-tensors", "format": "int-quantized"}
    directory = edited(base, tmp_path / "i8", quantize, quantization_config=method)
    stored = load_file(directory / WEIGHTS)
    wanted = (stored[f"{UP}.weight"].float() * stored[f"{UP}.weight_scale"]).numpy()
    assert np.array_equal(rows_of(Checkpoint(directory), f"{UP}.weight"), wanted)


# -- bad input ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("stated", "said"),
    [
        ({"quant_method": "aqlm"}, r"\(aqlm\)"),
        ({"quant_method": "gptq", "checkpoint_format": "marlin"}, "checkpoint_format 'marlin'"),
        ({"quant_method": "awq", "version": "marlin"}, "version 'marlin'"),
        ({"quant_method": "auto-round", "packing_format": "auto_round:llm_compressor"}, "packing_format"),
        ({"quant_method": "compressed-tensors", "format": "marlin-24"}, "format 'marlin-24'"),
        (
            {"quant_method": "compressed-tensors", "sparsity_config": {"format": "sparse-24-bitmask"}},
            "sparsity_config 'sparse-24-bitmask'",
        ),
        (
            {
                "quant_method": "compressed-tensors",
                "format": "mixed-precision",
                "config_groups": {"group_1": {"format": "mxfp6-pack-quantized"}},
            },
            "group group_1, format 'mxfp6-pack-quantized'",
        ),
        ({"quant_method": "modelopt", "quant_algo": "W4A8_AWQ"}, "quant_algo 'W4A8_AWQ'"),
        ({"quant_method": "compressed-tensors", "transform_config": {"a": 1}}, "compressed-tensors"),
        ({"quant_method": ["fp8"]}, "already quantized"),
        ({"bits": 4}, r"\(unknown\)"),
        ("fp8", r"\(unknown\)"),
    ],
)
def test_other_methods_are_refused(stated: Any, said: str, tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text(json.dumps({"quantization_config": stated}))
    save_file({f"{UP}.qweight": torch.zeros(2, 2, dtype=torch.int32)}, tmp_path / WEIGHTS)
    with pytest.raises(CheckpointError, match=f"already quantized.*{said}|{said}.*not read"):
        Checkpoint(tmp_path)


STATE = f"{UP}.weight.quant_state.bitsandbytes__nf4"


def _state(change: Callable[[dict[str, Any]], Any]) -> Callable[[Tensors], None]:
    """An edit of the JSON of a quant_state."""

    def edit(tensors: Tensors) -> None:
        facts = json.loads(tensors[STATE].numpy().tobytes())
        raw = json.dumps(change(facts)).encode()
        tensors[STATE] = torch.frombuffer(bytearray(raw), dtype=torch.uint8)

    return edit


def _cut(name: str, count: int) -> Callable[[Tensors], None]:
    return lambda tensors: tensors.update({name: tensors[name][:count]})


def _drop(name: str) -> Callable[[Tensors], None]:
    return lambda tensors: tensors.pop(name)


@pytest.mark.parametrize(
    ("edit", "said"),
    [
        (_drop(STATE), "its quant_state is missing"),
        (_cut(STATE, 20), "quant_state of .* cannot be read"),
        (_cut(STATE, 0), "cannot be (read|decoded)"),
        (_drop(f"{UP}.weight.absmax"), "absmax"),
        (_drop(f"{UP}.weight.quant_map"), "quant_map"),
        (_drop(f"{UP}.weight.nested_quant_map"), "nested_quant_map"),
        (_drop(f"{UP}.weight.nested_absmax"), "absmax has dtype uint8"),
        (_cut(f"{UP}.weight.absmax", 3), "absmax has"),
        (_cut(f"{UP}.weight.nested_absmax", 0), "absmax"),
        (_cut(f"{UP}.weight", 10), "packed holds 10 bytes"),
        (_state(lambda facts: facts | {"shape": [2**40, 2**40]}), "packed holds"),
        (_state(lambda facts: facts | {"shape": "x"}), "shape"),
        (_state(lambda facts: facts | {"dtype": []}), "cannot be read"),
        (_state(lambda facts: facts | {"blocksize": 7}), "blocksize is 7"),
        (_state(lambda facts: facts | {"nested_offset": 10**400}), "cannot be decoded"),
        (_state(lambda facts: facts | {"nested_blocksize": -1}), "nested.blocksize"),
        (_state(lambda facts: [facts]), "cannot be read"),
        (_state(lambda facts: facts | {"quant_type": "fp4"}), "quant_type"),
    ],
)
def test_damaged_four_bit_weights_are_refused(
    edit: Callable[[Tensors], None], said: str, four_bit: Path, tmp_path: Path
) -> None:
    with pytest.raises(CheckpointError, match=f"(?s)mlp.up_proj.weight.*{said}|{said}.*mlp.up_proj.weight"):
        Checkpoint(edited(four_bit, tmp_path / "x", edit))


def test_all_damaged_weights_are_reported_together(four_bit: Path, tmp_path: Path) -> None:
    def edit(tensors: Tensors) -> None:
        del tensors[STATE]
        del tensors["model.layers.2.self_attn.q_proj.weight.absmax"]

    with pytest.raises(
        CheckpointError, match=r"(?s)2 quantized weights.*layers\.0\.mlp\.up_proj.*layers\.2\.self_attn"
    ):
        Checkpoint(edited(four_bit, tmp_path / "x", edit))


@pytest.mark.parametrize(
    ("tensors", "said"),
    [
        ({"weight": "int8"}, r"up_proj\.SCB, the scales of its rows, is missing"),
        ({"weight": "int8", "SCB": torch.ones(3)}, r"SCB is F32 \[3\]"),
        ({"weight": "int8", "SCB": torch.ones(160, dtype=torch.float16)}, "SCB is F16"),
        ({"SCB": torch.ones(160)}, r"weight is F32 \[160, 96\], not a matrix of 8-bit integers"),
        ({"weight": "int8", "SCB": torch.ones(160), "weight_format": torch.ones(1).byte()}, "layout of some GPU"),
        ({"weight": "float8_e4m3fn"}, r"is F8_E4M3, but its scale .* is missing"),
        ({"weight": "float8_e4m3fn", "weight_scale": torch.ones(3)}, "does not fit"),
        ({"weight": "float8_e4m3fn", "weight_scale": torch.ones(2, 2)}, "does not fit"),
        ({"weight": "float8_e4m3fn", "weight_scale": torch.ones(1, 1, 1)}, r"weight_scale is F32 \[1, 1, 1\]"),
        ({"weight": "float8_e4m3fn", "weight_scale": torch.ones(0)}, "does not fit"),
        ({"weight": "float8_e4m3fn", "weight_scale": torch.ones(1).byte()}, "weight_scale is U8"),
        ({"weight": "float8_e4m3fn", "weight_scale": torch.tensor(float("inf"))}, "holds NaN or infinity"),
        ({"weight_scale": torch.ones(1)}, "with a scale 8-bit matrices are read"),
        ({"weight": "int8", "weight_scale": torch.ones(1), "weight_zero_point": torch.ones(2)}, "weight_zero_point is"),
        ({"weight": "uint8"}, "its absmax and quant_map and quant_state are missing"),
    ],
)
def test_damaged_eight_bit_weights_are_refused(tensors: dict[str, Any], said: str, tmp_path: Path) -> None:
    base = tiny.base("llama-tied", tmp_path / "base")

    def edit(stored: Tensors) -> None:
        for part, tensor in tensors.items():
            cast = stored[f"{UP}.weight"].to(getattr(torch, tensor)) if isinstance(tensor, str) else tensor
            stored[f"{UP}.{part}"] = cast

    with pytest.raises(CheckpointError, match=said):
        Checkpoint(edited(base, tmp_path / "x", edit, quantization_config={"quant_method": "fp8"}))


@pytest.fixture(scope="module")
def small(tmp_path_factory: pytest.TempPathFactory) -> list[Path]:
    """A 4-bit and an 8-bit checkpoint of one layer."""
    folder = tmp_path_factory.mktemp("small")
    base = tiny.base("llama-tied", folder / "base", num_hidden_layers=1, vocab_size=300, **ODD)
    four = saved(load(base, "float32"), base, folder / "four")
    return [four, small_floats("deepseek", base, folder / "f8")]


@given(
    which=st.integers(0, 1),
    flips=st.lists(st.tuples(st.floats(0, 1, exclude_max=True), st.integers(0, 7)), min_size=1, max_size=4),
    only_states=st.booleans(),
)
def test_flipped_bits_are_an_error_or_harmless(
    which: int, flips: list[tuple[float, int]], only_states: bool, small: list[Path], tmp_path: Path
) -> None:
    directory = tmp_path / "damaged"
    shutil.copytree(small[which], directory, dirs_exist_ok=True)
    raw = bytearray((directory / WEIGHTS).read_bytes())
    header = 8 + int.from_bytes(raw[:8], "little")
    first = raw.find(b'{"quant_type"') if only_states and not which else 0
    length = 500 if only_states and not which else header
    for place, bit in flips:
        raw[first + int(place * length)] ^= 1 << bit
    (directory / WEIGHTS).write_bytes(raw)
    output = tmp_path / "out" / "x.gguf"
    output.unlink(missing_ok=True)
    try:
        export(directory, {"f32": output})
    except EdgetuneError:
        assert not output.exists()
