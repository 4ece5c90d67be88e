"""Variants of LoRA, and starts that take a part of the base away, are merged as PEFT computes them."""

from __future__ import annotations

import importlib
import json
import shutil
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
from tests.converters.peft_methods import folded, logits, randomize
from tests.converters.test_adapters import write
from tests.converters.tiny import _between_libraries, peft, torch, transformers

safetensors_torch: Any = pytest.importorskip("safetensors.torch")

ROUNDING = 5e-6
_TARGETS = ["q_proj", "v_proj", "down_proj"]


@pytest.fixture(scope="module", params=["llama", "qwen2"])
def base(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny.base(request.param, tmp_path_factory.mktemp(request.param), tie_word_embeddings=False)


def prepare(model: Any, settings: Any) -> None:
    """Attach to the layers what PEFT computes some starts from: gradients, or covariances of the inputs."""
    ids = torch.tensor([tiny.random_ids(40) for _ in range(4)])
    if settings.init_lora_weights == "lora_ga":
        preprocess = importlib.import_module("peft.tuners.lora.loraga").preprocess_loraga
        preprocess(model, settings, lambda: model(input_ids=ids, labels=ids).loss.backward())
        model.zero_grad()
    if settings.init_lora_weights == "corda":
        preprocess = importlib.import_module("peft.tuners.lora.corda").preprocess_corda
        preprocess(model, settings, run_model=lambda: [model(input_ids=row[None]) for row in ids])


STARTS: dict[str, dict[str, Any]] = {
    "pissa": {},
    "olora": {},
    "corda": {"corda_config": peft.tuners.lora.config.CordaConfig(corda_method="kpm")},
    "lora_ga": {"lora_ga_config": peft.LoraGAConfig(scale="weight_svd")},
}
"""Starts that take a part of the base away -> further options."""


@_between_libraries()
def attached(base: Path, **options: Any) -> Any:
    """The base with a new adapter of PEFT."""
    torch.manual_seed(3)
    model = transformers.AutoModelForCausalLM.from_pretrained(base, dtype=torch.float32)
    settings = peft.LoraConfig(**{"r": 4, "lora_alpha": 6, "target_modules": _TARGETS, **options})
    prepare(model, settings)
    return peft.get_peft_model(model, settings)


def trained(base: Path, directory: Path, *, with_initial: bool = False, **options: Any) -> dict[str, Any]:
    """Write an adapter; return the tensors that PEFT merges."""
    wrapped = attached(base, **options)
    if with_initial:
        wrapped.save_pretrained(directory / "initial_adapter")
    randomize(wrapped)
    wrapped.save_pretrained(directory)
    return {name: value.clone() for name, value in wrapped.eval().merge_and_unload().state_dict().items()}


def assert_equal(ours: dict[str, Any], theirs: dict[str, Any]) -> None:
    for name, values in ours.items():
        largest = float(theirs[name].abs().max())
        assert float((values - theirs[name]).abs().max()) <= ROUNDING * largest, name


@_between_libraries()
def converted(wrapped: Any, directory: Path, initial: Path) -> None:
    """Let PEFT write the trained adapter as plain LoRA on the base as it was."""
    wrapped.save_pretrained(directory, path_initial_model_for_weight_conversion=str(initial))


@_between_libraries()
def forward(model: Any, ids: list[int]) -> Any:
    with torch.no_grad():
        return model.eval()(torch.tensor([ids])).logits[0].numpy()


@pytest.mark.parametrize("start", STARTS)
def test_a_start_is_taken_away_with_the_adapter_before_training(start: str, base: Path, tmp_path: Path) -> None:
    theirs = trained(base, tmp_path, with_initial=True, init_lora_weights=start, **STARTS[start])
    assert_equal(folded(base, tmp_path), theirs)
    assert "initial_adapter/adapter_model.safetensors" in Adapter(tmp_path).identity()


@pytest.mark.parametrize("way", ["initial adapter", "converted", "residual base"])
@pytest.mark.parametrize("start", STARTS)
def test_each_way_to_undo_a_start_gives_the_forward_of_the_trained_model(
    start: str, way: str, base: Path, tmp_path: Path
) -> None:
    wrapped = attached(base, init_lora_weights=start, **STARTS[start])
    ids, before = tiny.random_ids(40), forward(wrapped, tiny.random_ids(40))
    initial = tmp_path / ("initial" if way == "converted" else "adapter/initial_adapter")
    if way == "residual base":  # what is left of the base, without the adapter, and its tokenizer
        shutil.copytree(base, tmp_path / "residual")
        residual = {name: value for name, value in wrapped.state_dict().items() if "lora_" not in name}
        renamed = {
            name.removeprefix("base_model.model.").replace(".base_layer", ""): residual[name] for name in residual
        }
        safetensors_torch.save_file(
            {name: value.clone() for name, value in renamed.items()}, tmp_path / "residual" / "model.safetensors"
        )
        base = tmp_path / "residual"
    else:
        # PEFT reads the adapter before training as plain LoRA, and changes what it is told here in its own object
        wrapped.peft_config["default"].init_lora_weights = True
        wrapped.save_pretrained(initial)
        wrapped.peft_config["default"].init_lora_weights = start
    randomize(wrapped)
    trained_logits = forward(wrapped, ids)
    if way == "converted":
        converted(wrapped, tmp_path / "adapter", initial)
    else:
        wrapped.peft_config["default"].init_lora_weights = True if way == "residual base" else start
        wrapped.save_pretrained(tmp_path / "adapter")
    found = logits(base, folded(base, tmp_path / "adapter"), ids)
    largest = float(np.abs(trained_logits).max())
    assert float(np.abs(trained_logits - before).max()) > 0.01 * largest
    assert float(np.abs(found - trained_logits).max()) < 2e-5 * largest


def test_eva_leaves_the_base_as_it_is(base: Path, tmp_path: Path) -> None:
    wrapped = attached(base, init_lora_weights="eva", eva_config=peft.EvaConfig(rho=1.0))
    rows = [{"input_ids": torch.tensor([tiny.random_ids(40)]), "attention_mask": torch.ones(1, 40)} for _ in range(4)]
    peft.initialize_lora_eva_weights(wrapped, rows, show_progress_bar=False)
    randomize(wrapped)
    wrapped.save_pretrained(tmp_path)
    assert json.loads((tmp_path / "adapter_config.json").read_text())["init_lora_weights"] == "eva"
    ids = tiny.random_ids(40)
    wanted = forward(wrapped, ids)
    found = logits(base, folded(base, tmp_path), ids)
    assert float(np.abs(found - wanted).max()) < 2e-5 * float(np.abs(wanted).max())


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
