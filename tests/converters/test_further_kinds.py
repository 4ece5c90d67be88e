"""Adapters of the further kinds of PEFT are merged as PEFT merges them, on models of three families."""

from __future__ import annotations

import json
import warnings
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from numpy.typing import NDArray
from safetensors.numpy import load_file, save_file

from edgetune_converters.adapters.adapter import Adapter
from edgetune_converters.adapters.base_targets import BaseTargets
from edgetune_converters.adapters.torch_random import first_of_permutation
from edgetune_converters.errors import AdapterError
from edgetune_converters.merging.merge_base import merge_base_named
from edgetune_converters.model import open_model
from edgetune_converters.tensors import ALL, Read
from tests.profiles import scaled

torch: Any = pytest.importorskip("torch")
safetensors_torch: Any = pytest.importorskip("safetensors.torch")
peft: Any = pytest.importorskip("peft")
transformers: Any = pytest.importorskip("transformers")

_SIZES = {"vocab_size": 40, "max_position_embeddings": 32, "bos_token_id": None, "eos_token_id": None}
_DECODER = {
    **_SIZES,
    "hidden_size": 24,
    "intermediate_size": 40,
    "num_hidden_layers": 2,
    "num_attention_heads": 3,
    "num_key_value_heads": 1,
}
# family -> configuration of a tiny model, and the modules of two shapes that are adapted
FAMILIES: Mapping[str, tuple[Any, list[str]]] = {
    "llama": (transformers.LlamaConfig(**_DECODER, tie_word_embeddings=False), ["q_proj", "down_proj"]),
    "qwen2": (transformers.Qwen2Config(**_DECODER), ["v_proj", "up_proj", "q_proj"]),
    "gpt2": (
        transformers.GPT2Config(
            vocab_size=40, n_positions=32, n_embd=24, n_layer=2, n_head=4, bos_token_id=None, eos_token_id=None
        ),
        ["c_attn", "mlp.c_proj"],
    ),
}


@dataclass(frozen=True)
class Case:
    """A configuration of PEFT, and the families that its layers support."""

    config: str
    options: Mapping[str, Any] = field(default_factory=dict)
    families: tuple[str, ...] = ("llama", "qwen2")
    targets: tuple[str, ...] = ()


_ALL = tuple(FAMILIES)
CASES: Mapping[str, Case] = {
    "miss": Case("MissConfig", {"r": 5}),
    "miss-bat": Case("MissConfig", {"r": 4, "init_weights": "bat"}),
    "miss-mini": Case("MissConfig", {"r": 3, "mini_r": 4, "init_weights": "mini"}),
    "randlora": Case("RandLoraConfig", {"r": 5}, _ALL),
    "randlora-sparse": Case("RandLoraConfig", {"r": 4, "sparse": True, "randlora_alpha": 30}, _ALL),
    "shira": Case("ShiraConfig", {"r": 2}),
    "delora": Case("DeloraConfig", {"r": 3, "rank_pattern": {"q_proj": 2}}),
    "fourierft": Case("FourierFTConfig", {"n_frequency": 30, "n_frequency_pattern": {"q_proj": 11}}, _ALL),
    "c3a": Case("C3AConfig", {"block_size": 8}),
    "waveft": Case("WaveFTConfig", {"n_frequency": 30}, _ALL),
    "waveft-db2": Case("WaveFTConfig", {"n_frequency": 190, "wavelet_family": "db2", "random_loc_seed": 5}, _ALL),
    "waveft-direct": Case("WaveFTConfig", {"n_frequency": 30, "use_idwt": False, "scaling": 3.0}, _ALL),
    "road_1": Case("RoadConfig", {"group_size": 8}),
    "road_2": Case("RoadConfig", {"group_size": 4, "variant": "road_2"}),
    "road_4": Case("RoadConfig", {"group_size": 8, "variant": "road_4"}),
    "gralora": Case("GraloraConfig", {"r": 4, "alpha": 6}, _ALL),
    "gralora-hybrid": Case("GraloraConfig", {"r": 8, "gralora_k": 4, "hybrid_r": 3}, _ALL),
    "vblora": Case("VBLoRAConfig", {"r": 3, "num_vectors": 9, "vector_length": 4}, _ALL),
    "vblora-topk": Case(
        "VBLoRAConfig",
        {"r": 3, "num_vectors": 9, "vector_length": 8, "topk": 3, "save_only_topk_weights": True},
        _ALL,
    ),
    "unilora": Case("UniLoraConfig", {"r": 3, "theta_d_length": 50, "save_indices": True}, _ALL),
    "pvera": Case("PveraConfig", {"r": 5}, _ALL),
    "hira": Case("HiraConfig", {"r": 3, "rank_pattern": {"q_proj": 2}}, _ALL),
    "glora": Case("GloraConfig", {"r": 3, "config_C": "none"}),
    "glora-vector": Case("GloraConfig", {"config_A_B": "vector", "config_C": "none", "config_D_E": "vector"}),
    "glora-constant": Case("GloraConfig", {"config_A_B": "constant", "config_C": "none"}),
    "glora-coupled": Case("GloraConfig", {"r": 3, "config_D_E": "vector"}),
    "glora-coupled-vector": Case("GloraConfig", {"config_A_B": "constant", "config_C": "vector"}),
    "glora-bias-alone": Case(
        "GloraConfig", {"config_A_B": "none", "config_C": "lora", "config_D_E": "none"}, ("qwen2",)
    ),
    "supertuning": Case("SupertuningConfig", {"sparsity": 0.9}),
    "supertuning-lora": Case("SupertuningConfig", {"sparsity": 0.9, "r": 3, "lora_alpha": 5.0}),
    "peanut": Case("PeanutConfig", {"r": 4}),
    "peanut-deep": Case("PeanutConfig", {"r": 4, "depth": 2, "act_fn": "silu", "scaling": 0.7}),
    "deft": Case("DeftConfig", {"r": 3, "alpha": 6}, _ALL),
    "deft-qr": Case("DeftConfig", {"r": 3, "decomposition_method": "qr"}, _ALL),
    "deft-para": Case("DeftConfig", {"r": 3, "para": True}, _ALL),
    "beft": Case("BeftConfig", {}, ("qwen2",), ("q_proj", "v_proj")),
}


@pytest.fixture(scope="module")
def bases(tmp_path_factory: pytest.TempPathFactory) -> Mapping[str, Path]:
    """A random model of each family."""
    made = {}
    for name, (config, _) in FAMILIES.items():
        torch.manual_seed(len(name))
        model = transformers.AutoModelForCausalLM.from_config(config)
        with torch.no_grad():
            for parameter in model.parameters():
                parameter.normal_(0, 0.2)
        made[name] = tmp_path_factory.mktemp(name)
        model.save_pretrained(made[name])
    return made


def trained(base: Path, directory: Path, case: Case, family: str, seed: int) -> dict[str, NDArray[np.float32]]:
    """Write an adapter with random values; return the weights that PEFT merges."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        model = transformers.AutoModelForCausalLM.from_pretrained(base, dtype=torch.float32)
        config = getattr(peft, case.config)(target_modules=list(case.targets) or FAMILIES[family][1], **case.options)
        model = peft.get_peft_model(model, config)
        torch.manual_seed(seed)
        with torch.no_grad():
            for parameter in model.parameters():
                if parameter.requires_grad:
                    parameter.add_(torch.randn_like(parameter) * 0.2)
        model.save_pretrained(directory)
        ids = torch.arange(12)[None] * 3 % 40
        with torch.no_grad():
            logits = model.eval()(ids).logits
            merged = model.merge_and_unload()
            assert torch.allclose(merged(ids).logits, logits, atol=2e-3), "PEFT's merge is not its forward"
    return {name: value.float().numpy() for name, value in merged.state_dict().items()}


def merged(base: Path, adapter: Path) -> Iterator[tuple[str, NDArray[np.float32]]]:
    """The merged tensors under the names of the base."""
    model = open_model(base, adapter, merge_base_named("original"))
    for tensor in model.in_base_order:
        blocks = [make(1).floats for make in tensor.pieces(model.checkpoint, 2000)]
        yield tensor.name, np.concatenate(blocks).reshape(tensor.shape)


@pytest.mark.parametrize(
    ("name", "family"), [(name, family) for name, case in CASES.items() for family in case.families]
)
def test_merged_weights_are_those_of_peft(name: str, family: str, bases: Mapping[str, Path], tmp_path: Path) -> None:
    wanted = trained(bases[family], tmp_path, CASES[name], family, seed=1)
    base = transformers.AutoModelForCausalLM.from_pretrained(bases[family]).state_dict()
    changed = 0
    for tensor, found in merged(bases[family], tmp_path):
        assert np.allclose(found, wanted[tensor], rtol=1e-5, atol=1e-5), tensor
        changed += not np.array_equal(wanted[tensor], base[tensor].numpy())
    assert changed >= 4


# -- one layer of any shape --------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Layer:
    """A layer with an adapter of PEFT: its weights and bias before and after the merge, [rows, columns] and [rows]."""

    before: Mapping[str, NDArray[np.float32]]
    after: Mapping[str, NDArray[np.float32]]


def adapted_layer(directory: Path, case: Case, shape: tuple[int, int], seed: int, dtype: str, *, bias: bool) -> Layer:
    """Write an adapter of a module `m` with values of a dtype, and merge it with PEFT in f32."""
    torch.manual_seed(seed)
    module = torch.nn.ModuleDict({"m": torch.nn.Linear(shape[1], shape[0], bias=bias)})
    before = {name: value.clone().numpy() for name, value in module.state_dict().items()}
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        model = peft.get_peft_model(module, getattr(peft, case.config)(target_modules=["m"], **case.options))
        with torch.no_grad():
            for parameter in model.parameters():
                if parameter.requires_grad:
                    parameter.add_(torch.randn_like(parameter) * 0.3)
                    parameter.copy_(parameter.to(getattr(torch, dtype)).float())
        model.save_pretrained(directory)
        weights = safetensors_torch.load_file(directory / "adapter_model.safetensors")
        stored = {
            name: value.to(getattr(torch, dtype)) if value.is_floating_point() else value
            for name, value in weights.items()
        }
        safetensors_torch.save_file(stored, directory / "adapter_model.safetensors")
        for name, buffer in model.named_buffers():
            if "m." in name:
                buffer.copy_(buffer.to(getattr(torch, dtype)).float() if buffer.is_floating_point() else buffer)
        after = {name: value.numpy() for name, value in model.merge_and_unload().state_dict().items()}
    return Layer(before, after)


def read_merged(adapter: Path, before: Mapping[str, NDArray[np.float32]], part: str) -> Read:
    """Return a reader of a tensor with its change."""
    shapes = {f"m.{name}": before[f"m.{name}"].shape for name in ("weight", "bias") if f"m.{name}" in before}

    def reader(target: str) -> Read:
        return lambda rows, columns: np.array(before[target].reshape(len(before[target]), -1)[rows][:, columns])

    change = Adapter(adapter).changes(BaseTargets(shapes, reader=reader))[f"m.{part}"]
    values = before[f"m.{part}"].reshape(len(before[f"m.{part}"]), -1)
    if change.factors is not None:
        left, right = change.factors()
        return lambda rows, columns: (values + left @ right)[rows][:, columns]
    assert change.transform is not None
    base = reader(f"m.{part}")
    return change.transform.apply(base, base)


@pytest.mark.parametrize("name", sorted(CASES))
@settings(max_examples=scaled(0.2))
@given(
    shape=st.tuples(st.integers(1, 4), st.integers(1, 4)),
    seed=st.integers(0, 2**31),
    dtype=st.sampled_from(["float32", "bfloat16", "float16"]),
    bias=st.booleans(),
)
def test_layers_of_any_shape_are_merged_as_by_peft(
    name: str, shape: tuple[int, int], seed: int, dtype: str, bias: bool, tmp_path_factory: pytest.TempPathFactory
) -> None:
    directory = tmp_path_factory.mktemp("adapter")
    # rounded logits are equal at times, and the file of -topk holds the softmax of those that PEFT rounds
    dtype = "float32" if name.startswith("vblora") else dtype
    rows, columns = 8 * shape[0], 8 * shape[1] + (0 if name in _DIVIDING else 3)
    case = CASES[name]
    options = {key: value for key, value in case.options.items() if not key.endswith("_pattern")}
    if "n_frequency" in options:
        options["n_frequency"] = rows * columns // 3
    layer = adapted_layer(
        directory, Case(case.config, options), (rows, columns), seed, dtype, bias=bias or name in _OF_BIASES
    )
    random = np.random.default_rng(seed)
    changed = False
    for part in ("weight", "bias"):
        before, after = layer.before.get(f"m.{part}"), layer.after.get(f"m.{part}")
        if before is None or after is None or np.array_equal(before, after):
            continue
        read = read_merged(directory, layer.before, part)
        wanted = after.reshape(len(after), -1)
        some, across = random.permutation(rows)[: rows // 2], random.permutation(wanted.shape[1])
        assert np.allclose(read(ALL, ALL), wanted, rtol=1e-4, atol=1e-4)
        assert np.allclose(read(some, across), wanted[some][:, across], rtol=1e-4, atol=1e-4)
        assert np.allclose(read(slice(2, 5), ALL), wanted[2:5], rtol=1e-4, atol=1e-4)
        changed = True
    assert changed


_OF_BIASES = {"beft", "glora-bias-alone"}
# kinds whose blocks divide rows and columns
_DIVIDING = {
    name for name in CASES if name.startswith(("miss-bat", "c3a", "gralora", "vblora", "randlora", "pvera"))
}  # fmt: skip


@settings(max_examples=scaled(1))
@given(
    count=st.integers(1, 10**6), share=st.floats(0, 1), seed=st.integers(0, 2**63 - 1)
)  # fmt: skip
def test_places_are_those_of_torch_randperm(count: int, share: float, seed: int) -> None:
    wanted = max(1, int(count * share))
    order = torch.randperm(count, generator=torch.Generator().manual_seed(seed))
    assert np.array_equal(first_of_permutation(count, wanted, seed), order[:wanted].numpy())


# -- refusals ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("name", "config", "message"),
    [
        ("waveft", {"wavelet_family": "sym8"}, "uses the wavelet 'sym8'; those that can be merged are db1, db2"),
        ("peanut", {"act_fn": "mish"}, "uses the activation 'mish'"),
        ("deft", {"decomposition_method": "svd"}, "decomposition_method is 'svd', not relu or qr"),
        ("miss", {"peft_type": "LILY"}, "LILY, which cannot be merged: it mixes its matrices by the tokens"),
        ("road_1", {"group_size": 6}, "m has 16 outputs, which groups of 6 do not divide"),
        ("road_1", {"variant": "road_3"}, "the variant of RoAd is 'road_3'"),
        ("fourierft", {"random_loc_seed": -1}, "random_loc_seed is -1, not a natural number"),
    ],
)
def test_what_cannot_be_merged_is_refused(name: str, config: dict[str, Any], message: str, tmp_path: Path) -> None:
    options = {**CASES[name].options} | ({"n_frequency": 9} if "n_frequency" in CASES[name].options else {})
    layer = adapted_layer(tmp_path, Case(CASES[name].config, options), (16, 8), 0, "float32", bias=False)
    path = tmp_path / "adapter_config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | config))
    with pytest.raises(AdapterError, match=message):
        read_merged(tmp_path, layer.before, "weight")


def test_a_bias_where_the_base_has_none_is_refused(tmp_path: Path) -> None:
    layer = adapted_layer(tmp_path, CASES["beft"], (8, 8), 0, "float32", bias=True)
    with pytest.raises(AdapterError, match="m has a bias of BEFT, and the base has no bias there"):
        read_merged(tmp_path, {"m.weight": layer.before["m.weight"]}, "weight")


def test_projections_that_were_not_saved_are_named(tmp_path: Path) -> None:
    case = Case("PveraConfig", {"r": 3, "save_projection": False})
    layer = adapted_layer(tmp_path, case, (8, 8), 0, "float32", bias=False)
    with pytest.raises(AdapterError, match="by PEFT alone: the random projections were not saved"):
        read_merged(tmp_path, layer.before, "weight")


def test_equal_logits_of_a_vector_bank_are_refused(bases: Mapping[str, Path], tmp_path: Path) -> None:
    trained(bases["llama"], tmp_path, CASES["vblora"], "llama", seed=1)
    tensors = load_file(tmp_path / "adapter_model.safetensors")
    name = next(name for name in tensors if "vblora_logits_B" in name)
    tensors[name][..., :3] = 9
    save_file(tensors, tmp_path / "adapter_model.safetensors")
    with pytest.raises(AdapterError, match=r"logits_B holds equal logits, of which PEFT chooses some by chance"):
        list(merged(bases["llama"], tmp_path))
