"""gpt-oss as published, with its experts in MXFP4: the values that transformers decodes."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from safetensors.torch import load_file, save_file

import edgetune_native
from edgetune_converters import gguf
from edgetune_converters.errors import CheckpointError
from edgetune_converters.quantization.overrides import overrides_of
from edgetune_converters.reading.checkpoint import Checkpoint
from tests.converters import family_models, runtime, tiny
from tests.export_requests import export

torch: Any = pytest.importorskip("torch")
mxfp4: Any = pytest.importorskip("transformers.integrations.mxfp4")

_SIZES: dict[str, Any] = {"hidden_size": 64, "intermediate_size": 96, "num_hidden_layers": 2, "num_attention_heads": 4}
_NAME = "model.layers.1.mlp.experts.gate_up_proj"


@pytest.fixture(scope="module")
def pair(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    return make_pair(tmp_path_factory.mktemp("plain") / "base", **_SIZES)


def make_pair(plain: Path, **sizes: Any) -> tuple[Path, Path]:
    """A checkpoint in MXFP4 with any codes, and before it the same as transformers decodes it."""
    family_models.base("gpt-oss", plain, **sizes)
    packed = plain.with_name("packed")
    packed.mkdir()
    tensors = load_file(plain / "model.safetensors")
    coded = dict(tensors)
    torch.manual_seed(1)
    for name in [name for name in tensors if name.endswith(("gate_up_proj", "down_proj"))]:
        experts, columns, rows = tensors[name].shape  # transposed
        blocks = torch.randint(0, 256, (experts, rows, columns // 32, 16), dtype=torch.uint8)
        scales = torch.randint(117, 124, blocks.shape[:-1], dtype=torch.uint8)
        del coded[name]
        coded |= {f"{name}_blocks": blocks, f"{name}_scales": scales}
        tensors[name] = mxfp4.convert_moe_packed_tensors(blocks, scales, dtype=torch.float32).contiguous()
    save_file(tensors, plain / "model.safetensors", {"format": "pt"})
    save_file(coded, packed / "model.safetensors", {"format": "pt"})
    for file in plain.glob("*.json"):
        (packed / file.name).write_bytes(file.read_bytes())
    config = json.loads((plain / "config.json").read_text("utf-8"))
    (packed / "config.json").write_text(json.dumps(config | {"quantization_config": {"quant_method": "mxfp4"}}))
    return plain, packed


def test_the_file_is_that_of_the_decoded_model(pair: tuple[Path, Path], tmp_path: Path) -> None:
    for base, name in zip(pair, ("plain", "packed"), strict=True):
        export(base, {"f32": tmp_path / f"{name}.gguf", "q8_0": tmp_path / f"{name}.q8.gguf"}, allow_fallback=True)
    for ending in ("gguf", "q8.gguf"):
        one, other = gguf.read(tmp_path / f"plain.{ending}"), gguf.read(tmp_path / f"packed.{ending}")
        assert [entry.name for entry in one.tensors] == [entry.name for entry in other.tensors]
        assert all(np.array_equal(one.tensor(entry.name), other.tensor(entry.name)) for entry in one.tensors)


def test_experts_stay_what_they_are_in_mxfp4(pair: tuple[Path, Path], tmp_path: Path) -> None:
    """As llama.cpp's own files of gpt-oss have them: coded anew, and not a number is another."""
    export(pair[1], {"f32": tmp_path / "f32.gguf"})
    export(pair[1], {"bf16": tmp_path / "x.gguf"}, overrides=overrides_of(["_exps=mxfp4"]), allow_fallback=True)
    whole, coded = gguf.read(tmp_path / "f32.gguf"), gguf.read(tmp_path / "x.gguf")
    kinds = {entry.name: (entry.type, entry.shape) for entry in coded.tensors}
    for name in [name for name in kinds if name.endswith("_exps.weight")]:
        assert kinds[name][0] == "mxfp4"
        found = edgetune_native.dequantize(coded.tensor(name), "mxfp4", kinds[name][1][-1])
        assert np.array_equal(found, whole.tensor(name).view(np.float32))


def test_an_adapter_on_other_tensors_is_merged_as_into_the_decoded_model(
    pair: tuple[Path, Path], tmp_path: Path
) -> None:
    adapter = tiny.adapter(pair[0], tmp_path / "adapter", target_modules=["q_proj", "o_proj"])
    for base, name in zip(pair, ("plain", "packed"), strict=True):
        export(base, {"f32": tmp_path / f"{name}.gguf"}, adapter=adapter)
    one, other = gguf.read(tmp_path / "plain.gguf"), gguf.read(tmp_path / "packed.gguf")
    assert all(np.array_equal(one.tensor(entry.name), other.tensor(entry.name)) for entry in one.tensors)


@pytest.mark.parametrize("width", [96, 64])  # 64: down_proj is square, as in the published models
@pytest.mark.parametrize("patterns", [{}, {"rank_pattern": {"mlp.experts.down_proj": 2}, "alpha_pattern": {".*": 7}}])
def test_an_adapter_on_the_experts(width: int, patterns: dict[str, Any], tmp_path: Path) -> None:
    """PEFT trains them as transformers decodes them, transposed; the published tensors are not."""
    bases = make_pair(tmp_path / "base", **_SIZES | {"intermediate_size": width})
    experts: dict[str, Any] = {"target_parameters": ["mlp.experts.gate_up_proj", "mlp.experts.down_proj"]}
    adapter = tiny.adapter(bases[0], tmp_path / "adapter", target_modules=["q_proj"], **experts, **patterns)
    for base, name in zip(bases, ("plain", "packed"), strict=True):
        export(base, {"f32": tmp_path / f"{name}.gguf"}, adapter=adapter)
    one, other = gguf.read(tmp_path / "plain.gguf"), gguf.read(tmp_path / "packed.gguf")
    for entry in one.tensors:  # products of transposed factors may be added up in another order
        wanted, found = (file.tensor(entry.name).view(np.float32) for file in (one, other))
        assert np.allclose(found, wanted, rtol=1e-5, atol=1e-6), entry.name
    ids = tiny.random_ids(64)
    found = runtime.logits(tmp_path / "packed.gguf", ids)
    kld, _ = tiny.divergence(tiny.torch_logits(bases[0], adapter, ids), found)
    assert kld < 1e-5


@pytest.mark.parametrize(
    ("change", "said"),
    [
        (lambda blocks, scales: (blocks[..., :8], scales), "not blocks of 16 bytes"),
        (lambda blocks, scales: (blocks, scales[:, :-1]), "not a byte for each block"),
        (lambda blocks, scales: (blocks.to(torch.int8), scales), "not blocks of 16 bytes"),
    ],
)
def test_blocks_that_do_not_fit_are_refused(change: Any, said: str, pair: tuple[Path, Path], tmp_path: Path) -> None:
    tensors = load_file(pair[1] / "model.safetensors")
    found = change(tensors[f"{_NAME}_blocks"], tensors[f"{_NAME}_scales"])
    tensors |= {
        f"{_NAME}_{part}": tensor.contiguous() for part, tensor in zip(("blocks", "scales"), found, strict=True)
    }
    (tmp_path / "config.json").write_bytes((pair[1] / "config.json").read_bytes())
    save_file(tensors, tmp_path / "model.safetensors")
    with pytest.raises(CheckpointError, match=said):
        Checkpoint(tmp_path)


def test_a_nan_scale_is_refused(pair: tuple[Path, Path], tmp_path: Path) -> None:
    base = tmp_path / "base"
    base.mkdir()
    for file in pair[1].glob("*.json"):
        (base / file.name).write_bytes(file.read_bytes())
    tensors = load_file(pair[1] / "model.safetensors")
    tensors[f"{_NAME}_scales"][1, 2, 0] = 255
    save_file(tensors, base / "model.safetensors")
    with pytest.raises(CheckpointError, match=r"gate_up_proj_blocks holds 32 weights that are NaN"):
        export(base, {"f32": tmp_path / "x.gguf"})
