"""Experts as lists of linear layers, in gpt-oss checkpoints and in adapters, are the same weights as fused experts."""

from __future__ import annotations

import json
import re
import shutil
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, NamedTuple

import pytest
from gguf import GGUFReader
from safetensors.torch import load_file, save_file

from edgetune_converters.errors import AdapterError
from tests.converters import family_models, runtime, tiny
from tests.converters.test_mxfp4 import make_pair
from tests.export_requests import export

torch: Any = pytest.importorskip("torch")

RANK, ALPHA = 4, 8
SIZES: dict[str, Any] = {"hidden_size": 64, "intermediate_size": 96, "num_hidden_layers": 2, "num_attention_heads": 4}
FOUR_BIT = {"quant_method": "bitsandbytes", "load_in_4bit": True, "bnb_4bit_quant_type": "nf4"}
Tensors = dict[str, Any]
EXPERT = re.compile(r"(.*mlp\.experts\.)(gate_up|down)_proj(_bias)?")


def as_list(tensors: Mapping[str, Any]) -> Tensors:
    """gpt-oss with two linear layers for each expert, and a linear layer as the router."""
    found: Tensors = {}
    for name, tensor in tensors.items():
        router = re.fullmatch(r"(.*mlp\.router)\.(weight|bias)", name)
        if expert := EXPERT.fullmatch(name):
            for number, one in enumerate(tensor):
                part, value = ("bias", one) if expert[3] else ("weight", one.T.contiguous())
                found[f"{expert[1]}{expert[2]}_projs.{number}.{part}"] = value
        else:
            found[f"{router[1]}.linear.{router[2]}" if router else name] = tensor
    return found


def _pair(module: str, columns: int, rows: int) -> tuple[Tensors, Any]:
    """A random pair of a module, and its product."""
    a, b = torch.randn(RANK, columns) * 0.1, torch.randn(rows, RANK) * 0.1
    prefix = f"base_model.model.{module}."
    return {f"{prefix}lora_A.weight": a, f"{prefix}lora_B.weight": b}, ALPHA / RANK * (b @ a)


def _write_adapter(directory: Path, pairs: Tensors) -> Path:
    directory.mkdir()
    save_file(pairs, directory / "adapter_model.safetensors", {"format": "pt"})
    config = {"peft_type": "LORA", "r": RANK, "lora_alpha": ALPHA, "task_type": "CAUSAL_LM"}
    (directory / "adapter_config.json").write_text(json.dumps(config))
    return directory


def _with_tensors(base: Path, directory: Path, tensors: Tensors, **config: Any) -> Path:
    """A copy of a model with other tensors."""
    shutil.copytree(base, directory)
    save_file(tensors, directory / "model.safetensors", {"format": "pt"})
    stated = json.loads((base / "config.json").read_text())
    (directory / "config.json").write_text(json.dumps(stated | config))
    return directory


def _listed_adapter(base: Path, directory: Path, wanted: Callable[[int], bool] = lambda number: True) -> Path:
    """An adapter with a pair for each expert, the query and the router; beside it the base with the products added."""
    torch.manual_seed(3)
    tensors = load_file(base / "model.safetensors")
    pairs: Tensors = {}
    for name in sorted(tensors):
        if expert := EXPERT.fullmatch(name):
            if expert[3]:
                continue
            for number in filter(wanted, range(len(tensors[name]))):
                module = f"{expert[1]}{expert[2]}_projs.{number}"
                own, product = _pair(module, *tensors[name].shape[1:])
                pairs |= own
                tensors[name][number] += product.T
        elif name.endswith(("q_proj.weight", "router.weight")):
            module = name.removesuffix(".weight").replace("mlp.router", "mlp.router.linear")
            own, product = _pair(module, *tensors[name].shape[::-1])
            pairs |= own
            tensors[name] += product
    _with_tensors(base, directory.with_name(f"{directory.name}-expected"), tensors)
    return _write_adapter(directory, pairs)


class Models(NamedTuple):
    fused: Path
    listed: Path
    packed: Path
    plain: Path


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> Models:
    root = tmp_path_factory.mktemp("oss")
    fused = family_models.base("gpt-oss", root / "fused", **SIZES)
    listed = _with_tensors(fused, root / "listed", as_list(load_file(fused / "model.safetensors")))
    plain, packed = make_pair(root / "mx" / "plain", **SIZES)
    return Models(fused, listed, packed, plain)


def _tensors(base: Path, adapter: Path | None, out: Path) -> dict[str, bytes]:
    export(base, {"f32": out}, adapter=adapter)
    return {tensor.name: tensor.data.tobytes() for tensor in GGUFReader(out).tensors}


def _check(file: Path, expected: Path) -> None:
    """The file has the logits of transformers."""
    ids = tiny.random_ids(64)
    kld, same = tiny.divergence(tiny.torch_logits(expected, None, ids), runtime.logits(file, ids))
    assert (kld < 1e-6, same) == (True, 1.0)


def test_a_list_is_read_as_the_fused_parameters(models: Models, tmp_path: Path) -> None:
    listed = _tensors(models.listed, None, tmp_path / "listed.gguf")
    assert listed == _tensors(models.fused, None, tmp_path / "fused.gguf")


@pytest.mark.parametrize("adapted", [False, True])
def test_safetensors_of_a_list_are_fused_as_transformers_loads_them(
    adapted: bool, models: Models, tmp_path: Path
) -> None:
    adapter = _listed_adapter(models.fused, tmp_path / "adapter") if adapted else None
    export(models.listed, safetensors={"base": tmp_path / "listed"}, adapter=adapter)
    export(models.fused, safetensors={"base": tmp_path / "fused"}, adapter=adapter)
    made, own = (load_file(tmp_path / folder / "model.safetensors") for folder in ("listed", "fused"))
    assert made.keys() == own.keys()
    assert all(torch.equal(made[name], own[name]) for name in own)
    ids = tiny.random_ids(64)
    expected = tiny.torch_logits(tmp_path / "adapter-expected" if adapted else models.fused, None, ids)
    assert tiny.divergence(expected, tiny.torch_logits(tmp_path / "listed", None, ids))[0] < 1e-6


@pytest.mark.parametrize("only", [None, 2])
def test_an_adapter_of_single_experts_changes_their_slices(models: Models, only: int | None, tmp_path: Path) -> None:
    adapter = _listed_adapter(models.fused, tmp_path / "adapter", lambda number: only in (None, number))
    fused = _tensors(models.fused, adapter, tmp_path / "fused.gguf")
    assert _tensors(models.listed, adapter, tmp_path / "listed.gguf") == fused
    _check(tmp_path / "fused.gguf", tmp_path / "adapter-expected")


def test_an_adapter_of_single_experts_over_the_published_format(models: Models, tmp_path: Path) -> None:
    adapter = _listed_adapter(models.plain, tmp_path / "adapter")
    _tensors(models.packed, adapter, tmp_path / "packed.gguf")
    _check(tmp_path / "packed.gguf", tmp_path / "adapter-expected")


def test_an_adapter_of_all_experts_over_a_list(models: Models, tmp_path: Path) -> None:
    options: dict[str, Any] = {
        "target_modules": ["q_proj"],
        "target_parameters": ["mlp.experts.gate_up_proj", "mlp.experts.down_proj"],
    }
    adapter = tiny.adapter(models.fused, tmp_path / "adapter", **options)
    listed = _tensors(models.listed, adapter, tmp_path / "listed.gguf")
    assert listed == _tensors(models.fused, adapter, tmp_path / "fused.gguf")
    ids = tiny.random_ids(64)
    expected = tiny.torch_logits(models.fused, adapter, ids)
    assert tiny.divergence(expected, runtime.logits(tmp_path / "listed.gguf", ids))[0] < 1e-6


def test_a_list_in_four_bits(models: Models, tmp_path: Path) -> None:
    functional: Any = pytest.importorskip("bitsandbytes.functional")
    listed = load_file(models.listed / "model.safetensors")
    coded, decoded = dict(listed), load_file(models.fused / "model.safetensors")
    for name, tensor in listed.items():
        expert = re.fullmatch(r"(.*mlp\.experts\.)(gate_up|down)_projs\.(\d+)\.weight", name)
        if expert is None:
            continue
        codes, state = functional.quantize_4bit(tensor, quant_type="nf4", blocksize=64)
        coded |= {name: codes} | {f"{name}.{part}": value for part, value in state.as_dict(packed=True).items()}
        decoded[f"{expert[1]}{expert[2]}_proj"][int(expert[3])] = functional.dequantize_4bit(codes, state).T
    four = _with_tensors(models.listed, tmp_path / "four", coded, quantization_config=FOUR_BIT)
    base = _with_tensors(models.fused, tmp_path / "base", decoded)
    adapter = _listed_adapter(base, tmp_path / "adapter")
    own = _tensors(four, adapter, tmp_path / "four.gguf")
    assert own == _tensors(base, adapter, tmp_path / "base.gguf")
    _check(tmp_path / "four.gguf", tmp_path / "adapter-expected")


def test_a_gguf_base_takes_an_adapter_of_single_experts(models: Models, tmp_path: Path) -> None:
    adapter = _listed_adapter(models.fused, tmp_path / "adapter")
    plain = _tensors(models.fused, adapter, tmp_path / "plain.gguf")
    export(models.fused, {"f32": tmp_path / "base.gguf"})
    assert _tensors(tmp_path / "base.gguf", adapter, tmp_path / "again.gguf") == plain


def test_one_pair_for_all_experts_and_one_for_each_are_refused(models: Models, tmp_path: Path) -> None:
    adapter = _listed_adapter(models.fused, tmp_path / "adapter")
    whole = tiny.adapter(
        models.fused, tmp_path / "whole", target_modules=[], target_parameters=["mlp.experts.down_proj"]
    )
    tensors = load_file(adapter / "adapter_model.safetensors") | load_file(whole / "adapter_model.safetensors")
    save_file(tensors, adapter / "adapter_model.safetensors")
    with pytest.raises(AdapterError, match=r"is the pair of one expert, and .* that of all of them"):
        export(models.fused, {"f32": tmp_path / "x.gguf"}, adapter=adapter)


def test_a_pair_of_a_wrong_shape_is_refused_with_its_module(models: Models, tmp_path: Path) -> None:
    adapter = _listed_adapter(models.fused, tmp_path / "adapter")
    tensors = load_file(adapter / "adapter_model.safetensors")
    name = "base_model.model.model.layers.1.mlp.experts.down_projs.2.lora_B.weight"
    save_file(tensors | {name: tensors[name][:60].contiguous()}, adapter / "adapter_model.safetensors")
    with pytest.raises(AdapterError, match=r"down_projs\.2: A \[4, 96\] and B \[60, 4\] do not fit \[64, 96\]"):
        export(models.fused, {"f32": tmp_path / "x.gguf"}, adapter=adapter)


def test_an_expert_that_the_model_does_not_have_is_refused(models: Models, tmp_path: Path) -> None:
    adapter = _write_adapter(tmp_path / "adapter", _pair("model.layers.0.mlp.experts.down_projs.99", 96, 64)[0])
    with pytest.raises(AdapterError, match=r"down_projs\.99 is not a module of the base model"):
        export(models.fused, {"f32": tmp_path / "x.gguf"}, adapter=adapter)


# -- other families ----------------------------------------------------------------------------------------------------

ONE_BY_ONE = {
    "mixtral": ("block_sparse_moe.experts.{n}.{part}", ("w1", "w3", "w2")),
    "qwen3moe": ("mlp.experts.{n}.{part}", ("gate_proj", "up_proj", "down_proj")),
}


def _fused(base: Path, directory: Path, block: str, parts: tuple[str, str, str]) -> Path:
    """A checkpoint with its experts fused, as transformers 5 has them in memory."""
    tensors = load_file(base / "model.safetensors")
    pattern = re.compile(
        r"(.*\.)" + re.escape(block).replace(r"\{n\}", "0").replace(r"\{part\}", parts[0]) + r"\.weight"
    )
    for match in [match for name in list(tensors) if (match := pattern.fullmatch(name))]:
        names = [[f"{match[1]}{block.format(n=n, part=part)}.weight" for part in parts] for n in range(5)]
        own = [[tensors.pop(name) for name in row] for row in names]
        start = match[1] + block.split("{n}", maxsplit=1)[0]
        tensors[start + "gate_up_proj"] = torch.stack([torch.cat(row[:2]) for row in own])
        tensors[start + "down_proj"] = torch.stack([row[2] for row in own])
    return _with_tensors(base, directory, tensors)


@pytest.mark.parametrize("family", ONE_BY_ONE)
def test_an_adapter_of_single_experts_over_fused_ones(family: str, tmp_path: Path) -> None:
    """The pairs speak of experts one by one, as those of transformers 4; both layouts give the same bytes."""
    block, parts = ONE_BY_ONE[family]
    base = family_models.base(family, tmp_path / "base")
    torch.manual_seed(3)
    tensors: Tensors = load_file(base / "model.safetensors")
    pairs: Tensors = {}
    for layer in range(json.loads((base / "config.json").read_text())["num_hidden_layers"]):
        for number, part in [(0, parts[0]), (0, parts[1]), (0, parts[2]), (3, parts[1]), (4, parts[2])]:
            module = f"model.layers.{layer}.{block.format(n=number, part=part)}"
            own, product = _pair(module, *tensors[f"{module}.weight"].shape[::-1])
            pairs |= own
            tensors[f"{module}.weight"] += product
    adapter = _write_adapter(tmp_path / "adapter", pairs)
    expected = _with_tensors(base, tmp_path / "expected", tensors)
    listed = _tensors(base, adapter, tmp_path / "listed.gguf")
    fused = _fused(base, tmp_path / "fused", block, parts)
    assert load_file(fused / "model.safetensors").keys() != tensors.keys()
    assert _tensors(fused, adapter, tmp_path / "fused.gguf") == listed
    ids = family_models.ids(family)
    assert (
        tiny.divergence(tiny.torch_logits(expected, None, ids), runtime.logits(tmp_path / "fused.gguf", ids))[0] < 1e-6
    )
