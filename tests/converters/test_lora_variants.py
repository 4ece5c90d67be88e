"""Variants of LoRA, and starts that take a part of the base away, are merged as PEFT computes them."""

from __future__ import annotations

import json
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest

from edgetune_converters.adapters.adapter import Adapter
from edgetune_converters.adapters.base_targets import BaseTargets
from edgetune_converters.errors import AdapterError
from edgetune_converters.merging.merge_base import merge_base_named
from edgetune_converters.model import open_model
from edgetune_converters.outputs.lora import lora_factors_of_model
from tests.converters import tiny
from tests.converters.peft_methods import folded, randomize
from tests.converters.test_adapters import write
from tests.converters.tiny import _between_libraries, peft, torch, transformers

ROUNDING = 5e-6
_TARGETS = ["q_proj", "v_proj", "down_proj"]


@pytest.fixture(scope="module", params=["llama", "qwen2"])
def base(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny.base(request.param, tmp_path_factory.mktemp(request.param), tie_word_embeddings=False)


@_between_libraries()
def trained(base: Path, directory: Path, *, with_initial: bool = False, **options: Any) -> dict[str, Any]:
    """Write an adapter; return the tensors that PEFT merges."""
    torch.manual_seed(3)
    model = transformers.AutoModelForCausalLM.from_pretrained(base, dtype=torch.float32)
    wrapped = peft.get_peft_model(model, peft.LoraConfig(r=4, lora_alpha=6, target_modules=_TARGETS, **options))
    if with_initial:
        wrapped.save_pretrained(directory / "initial_adapter")
    randomize(wrapped)
    wrapped.save_pretrained(directory)
    return {name: value.clone() for name, value in wrapped.eval().merge_and_unload().state_dict().items()}


def assert_equal(ours: dict[str, Any], theirs: dict[str, Any]) -> None:
    for name, values in ours.items():
        largest = float(theirs[name].abs().max())
        assert float((values - theirs[name]).abs().max()) <= ROUNDING * largest, name


@pytest.mark.parametrize("start", ["pissa", "olora"])
def test_a_start_is_taken_away_with_the_adapter_before_training(start: str, base: Path, tmp_path: Path) -> None:
    theirs = trained(base, tmp_path, with_initial=True, init_lora_weights=start)
    assert_equal(folded(base, tmp_path), theirs)
    assert "initial_adapter/adapter_model.safetensors" in Adapter(tmp_path).identity()


@pytest.mark.parametrize("options", [{}, {"use_rslora": True, "rank_pattern": {"v_proj": 2}}])
def test_the_start_of_olora_is_found_again_in_the_base(options: dict[str, Any], base: Path, tmp_path: Path) -> None:
    theirs = trained(base, tmp_path, init_lora_weights="olora", **options)
    assert_equal(folded(base, tmp_path), theirs)


@pytest.mark.parametrize("start", ["pissa", "pissa_niter_4"])
def test_a_start_that_cannot_be_undone_is_refused_with_both_ways_out(start: str, base: Path, tmp_path: Path) -> None:
    trained(base, tmp_path, init_lora_weights=start)
    with pytest.raises(AdapterError, match=f"was initialized with '{start}', which moves the base") as refused:
        folded(base, tmp_path)
    assert "initial_adapter/" in str(refused.value.hint)
    assert "set init_lora_weights to true" in str(refused.value.hint)


def test_an_initial_adapter_of_other_shapes_is_refused(base: Path, tmp_path: Path) -> None:
    trained(base, tmp_path, with_initial=True, init_lora_weights="pissa")
    trained(base, tmp_path / "other", init_lora_weights=True, rank_pattern={"q_proj": 3})
    (tmp_path / "other" / "adapter_model.safetensors").replace(
        tmp_path / "initial_adapter" / "adapter_model.safetensors"
    )
    with pytest.raises(AdapterError, match="q_proj: initial_adapter has no pair of the same shapes"):
        folded(base, tmp_path)


def test_mica_leaves_the_base_as_it_is(base: Path, tmp_path: Path) -> None:
    theirs = trained(base, tmp_path, init_lora_weights="mica")
    assert_equal(folded(base, tmp_path), theirs)


def test_montecarlo_lora_is_merged_at_its_mean(base: Path, tmp_path: Path) -> None:
    theirs = trained(base, tmp_path, monteclora_config=peft.MontecloraConfig(num_samples=3))
    assert_equal(folded(base, tmp_path), theirs)
    adapter = Adapter(tmp_path)
    shapes = {name: tuple(value.shape) for name, value in theirs.items()}
    adapter.changes(BaseTargets(shapes))
    assert any("drew samples in training; left out" in note for note in adapter.notes)


def test_blocks_of_bdlora_stand_on_the_diagonal(base: Path, tmp_path: Path) -> None:
    blocks = {"target_modules_bd_a": ["down_proj"], "target_modules_bd_b": ["q_proj"], "nblocks": 2}
    settings = peft.tuners.lora.config.BdLoraConfig(**blocks, match_strict=False)
    theirs = trained(base, tmp_path, use_bdlora=settings)
    assert_equal(folded(base, tmp_path), theirs)


@_between_libraries()
def test_replicated_layers_are_copies_with_changes_of_their_own(tmp_path: Path) -> None:
    """PEFT's forward is the reference: its merge adds the changes of all copies to the weights that they share."""
    base = tiny.base("llama", tmp_path / "base")
    torch.manual_seed(3)
    model = transformers.AutoModelForCausalLM.from_pretrained(base, dtype=torch.float32)
    settings = peft.LoraConfig(r=4, lora_alpha=6, target_modules=_TARGETS, layer_replication=[[0, 2], [1, 3]])
    wrapped = peft.get_peft_model(model, settings)
    randomize(wrapped)
    wrapped.save_pretrained(tmp_path / "trained")
    ours = folded(base, tmp_path / "trained")
    larger = transformers.AutoModelForCausalLM.from_config(
        transformers.AutoConfig.from_pretrained(base, num_hidden_layers=4), dtype=torch.float32
    )
    assert not larger.load_state_dict(ours, strict=False).unexpected_keys
    ids = torch.tensor([tiny.random_ids(40)])
    with torch.no_grad():
        wanted = wrapped.eval()(ids, use_cache=False).logits
        assert torch.allclose(larger.eval()(ids).logits, wanted, rtol=1e-4, atol=1e-4)
    with pytest.raises(AdapterError, match="only to a base of the same blocks"):
        lora_factors_of_model(open_model(base, tmp_path / "trained", merge_base_named("original")))


def test_layers_that_are_replicated_in_another_order_are_refused(base: Path, tmp_path: Path) -> None:
    trained(base, tmp_path, layer_replication=[[0, 3], [0, 3]])
    with pytest.raises(AdapterError, match=r"\[0, 1, 2, 0, 1, 2\], which is no expansion of the 3 blocks"):
        folded(base, tmp_path)


def test_groups_of_qalora_are_averaged(tmp_path: Path) -> None:
    """PEFT has QA-LoRA for GPTQ layers alone, so its forward is given the parts of a layer."""
    random = np.random.default_rng(0)
    a, b = (random.normal(size=shape).astype(np.float32) for shape in ((2, 3), (6, 2)))
    weights = {"m.q.lora_A.weight": a, "m.q.lora_B.weight": b}
    adapter = Adapter(write(tmp_path, weights, use_qalora=True, qalora_group_size=4))
    change = adapter.changes(BaseTargets({"m.q.weight": (6, 12)}))["m.q.weight"]
    assert change.factors is not None
    left, right = change.factors()
    module = SimpleNamespace(
        lora_A={"x": SimpleNamespace(weight=torch.from_numpy(a))},
        lora_B={"x": SimpleNamespace(weight=torch.from_numpy(b))},
        lora_dropout={"x": torch.nn.Identity()},
        scaling={"x": 8 / 2},
        qalora_group_size={"x": 4},
        training=False,
        in_features=12,
    )
    variant = peft.tuners.lora.variants.QALoraLinearVariant
    wanted = variant.forward(module, "x", torch.eye(12), torch.zeros(12, 6)).T.numpy()
    assert np.allclose(left @ right, wanted, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize(
    ("config", "message"),
    [
        ({"alora_invocation_tokens": [1, 2]}, "acts from its invocation tokens on: no merged weights equal it"),
        ({"arrow_config": {"top_k": 2}}, "chooses among adapters by the input: no merged weights equal it"),
        ({"use_qalora": True, "qalora_group_size": 3}, "qalora_group_size is 3, which does not divide the 4 inputs"),
        ({"use_bdlora": {"nblocks": 0}}, "nblocks is 0, not a natural number"),
        ({"init_lora_weights": "loftq"}, "was initialized with 'loftq', which moves the base"),
        ({"init_lora_weights": "corda"}, "was initialized with 'corda', which moves the base"),
    ],
)
def test_what_no_weights_equal_is_refused(config: dict[str, Any], message: str, tmp_path: Path) -> None:
    directory = write(tmp_path)
    path = directory / "adapter_config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | config))
    with pytest.raises(AdapterError, match=message):
        Adapter(directory).changes(BaseTargets({"m.q.weight": (6, 4)}))
