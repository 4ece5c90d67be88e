"""Methods of `edgetune.methods` as PEFT's configurations, and on tiny models in each precision."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from peft import PeftModel, PeftType
from peft.mapping import PEFT_TYPE_TO_CONFIG_MAPPING

from edgetune.errors import ConfigError
from edgetune.methods import METHODS, Lora, Method
from edgetune.methods.base import LayerMethod, PerLayerMethod
from edgetune.methods.selective import SelectiveMethod
from edgetune.training import adapters
from edgetune.training.adapters.attach import peft_config
from tests.training import kinds, runs

KINDS = [kind for kind, method in METHODS.items() if issubclass(method, LayerMethod)]
SHAPE = {**runs.SHAPE, "intermediate_size": 192}
PRECISIONS: dict[str, dict[str, Any]] = {
    "nf4": {"load_in_4bit": True, "bnb_4bit_quant_type": "nf4", "bnb_4bit_use_double_quant": True},
    "fp4": {"load_in_4bit": True, "bnb_4bit_quant_type": "fp4"},
    "int8": {"load_in_8bit": True},
}
BITS = {"nf4": 4, "fp4": 4, "int8": 8}
IDS = torch.randint(0, 512, (2, 24), generator=torch.Generator().manual_seed(1))
Loader = Callable[[str | None], Any]


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> dict[bool, Path]:
    """The base without and with biases of the attention."""
    found = {biases: tmp_path_factory.mktemp("shape") for biases in (False, True)}
    for biases, folder in found.items():
        torch.manual_seed(0)
        config = transformers.LlamaConfig(**SHAPE, attention_bias=biases)
        transformers.LlamaForCausalLM(config).save_pretrained(folder)
    return found


@pytest.fixture
def load(folders: dict[bool, Path], request: pytest.FixtureRequest) -> Loader:
    """A function that loads the base in a precision, for BEFT with biases; "nf4!" and others: dequantized again."""
    parameters = request.node.callspec.params if hasattr(request.node, "callspec") else {}
    folder = folders[parameters.get("kind") == "beft"]

    def load_in(precision: str | None = None) -> Any:
        return _load(folder, precision)

    return load_in


def _load(folder: Path, precision: str | None) -> Any:
    if precision and precision.endswith("!"):
        return _dequantized(folder, precision[:-1])
    quantization = transformers.BitsAndBytesConfig(**PRECISIONS[precision]) if precision else None
    model = transformers.AutoModelForCausalLM.from_pretrained(
        folder, dtype=torch.float32, quantization_config=quantization, device_map={"": "cpu"}
    )
    for module in model.modules():
        if hasattr(module, "support_avx512bf16_for_cpu"):
            module.support_avx512bf16_for_cpu = False
    return model


def _dequantized(folder: Path, precision: str) -> Any:
    from peft.utils.integrations import dequantize_module_weight

    model, stored = _load(folder, None), _load(folder, precision)
    modules = dict(model.named_modules())
    for name, module in stored.named_modules():
        if "bit" in type(module).__name__:
            modules[name].weight.data = dequantize_module_weight(module).float().clone()
    return model


def adapted(model: Any, method: Method) -> Any:
    """The model with an adapter whose values are not those of its start."""
    torch.manual_seed(0)
    result = adapters.add_adapter(model, method).eval()
    generator = torch.Generator().manual_seed(5)
    with torch.no_grad():
        for parameter in result.parameters():
            if parameter.requires_grad:
                parameter.add_(torch.randn(parameter.shape, generator=generator) * 0.1)
    return result


def logits(model: Any) -> torch.Tensor:
    with torch.no_grad():
        result: torch.Tensor = model(input_ids=IDS).logits
    return result


@pytest.mark.parametrize("kind", [kind for kind, method in METHODS.items() if method.facts.peft_type])
def test_every_method_is_one_of_peft(kind: str) -> None:
    assert peft_config(METHODS[kind](kind=kind)).peft_type == PeftType(METHODS[kind].facts.peft_type)


@pytest.mark.parametrize("kind", KINDS)
def test_every_option_is_one_of_peft_or_read_here(kind: str) -> None:
    method = METHODS[kind]
    known = {field.name for field in dataclasses.fields(PEFT_TYPE_TO_CONFIG_MAPPING[method.facts.peft_type])}
    for option in method.model_fields.keys() - method.not_for_peft:
        assert method.peft_names.get(option, option) in known
    assert method.fixed_options.keys() <= known
    assert method.not_for_peft <= method.model_fields.keys()


@pytest.mark.parametrize("kind", sorted(METHODS))
def test_a_stored_configuration_with_every_default_is_read_again(kind: str) -> None:
    required = {"tokens": ["a"]} if kind == "trainable-tokens" else {}
    method = METHODS[kind](kind=kind, **required)
    assert METHODS[kind].model_validate(method.model_dump(mode="json")) == method


def test_options_reach_peft() -> None:
    peft = peft_config(Lora(r=4, alpha=6, dropout=0.25, target_modules=["q_proj"], use_rslora=True))
    assert (peft.peft_type, peft.task_type) == ("LORA", "CAUSAL_LM")
    options = {"r": 4, "lora_alpha": 6, "lora_dropout": 0.25, "target_modules": {"q_proj"}, "use_rslora": True}
    assert {name: getattr(peft, name) for name in options} == options


VARIANTS = [
    *[(kind, {}) for kind in KINDS],
    ("lora", {"use_dora": True, "rank_pattern": {"q_proj": 3}}),
    ("loha", {"rank_pattern": {"down_proj": 3}}),
    ("lokr", {"decompose_both": True, "r": 2, "factor": 8}),
    ("oft", {"block_share": True}),
    ("oft", {"block_size": 40}),
    ("miss", {"init": "bat"}),
    ("miss", {"init": "mini", "mini_r": 4}),
    ("road", {"variant": "road_4"}),
    ("gralora", {"hybrid_r": 4}),
    ("fourierft", {"n_frequency_pattern": {"v_proj": 7}}),
    ("tinylora", {"weight_tying": 0.6}),
    ("psoft", {"orthogonal": False, "scale_inputs": False}),
    ("osf", {"effective_rank": 20}),
    ("osf", {"effective_rank": 0.25}),
    ("supertuning", {"r": 3}),
    ("deft", {"para": True}),
    ("peanut", {"depth": 2}),
    ("glora", {"weight_terms": "vector"}),
    ("ia3", {"target_modules": ["q_proj", "down_proj"]}),
]


@pytest.mark.parametrize(("kind", "options"), VARIANTS)
def test_trained_parameters_are_counted_without_torch(kind: str, options: dict[str, Any], load: Loader) -> None:
    method = kinds.method_of(kind, **options)
    assert isinstance(method, LayerMethod)
    model = load(None)
    shapes: dict[str, tuple[int, int]] = {
        name: (module.weight.shape[0], module.weight.shape[1])
        for name, module in model.named_modules()
        if isinstance(module, torch.nn.Linear) and name != "lm_head"
    }
    wanted = method.target_modules
    if wanted != "all-linear":
        ends = ["v_proj"] if wanted == "v" else wanted
        shapes = {name: shape for name, shape in shapes.items() if name.rpartition(".")[2] in ends}
        method = method.model_copy(update={"target_modules": ends})
    assert method.count_trainable(shapes) == adapters.count_trainable(adapters.add_adapter(model, method))


@pytest.mark.parametrize(
    ("parent", "missing"),
    [(LayerMethod, "count_trainable"), (PerLayerMethod, "trainable_in"), (SelectiveMethod, "count_in")],
)
def test_a_method_that_counts_no_parameters_cannot_be_made(parent: Any, missing: str) -> None:
    silent = type("Silent", (parent,), {"__annotations__": {"kind": str}, "kind": "silent", "__module__": __name__})
    with pytest.raises(TypeError, match=f"abstract class Silent .*{missing}"):
        silent()


@pytest.mark.parametrize("coupling", ["lora", "vector", "none"])
@pytest.mark.parametrize("bias_terms", ["vector", "constant", "none"])
def test_terms_of_biases_are_counted(coupling: str, bias_terms: str, folders: dict[bool, Path]) -> None:
    method = kinds.method_of("glora", r=3, coupling=coupling, bias_terms=bias_terms)
    model = _load(folders[True], None)
    linear = {
        name: (module.weight.shape[0], module.weight.shape[1])
        for name, module in model.named_modules()
        if isinstance(module, torch.nn.Linear) and name != "lm_head"
    }
    biased = {name: shape for name, shape in linear.items() if model.get_submodule(name).bias is not None}
    assert biased
    counted = method.count_trainable(linear) + method.count_of_biases(biased)
    assert counted == adapters.count_trainable(adapters.add_adapter(model, method))


@pytest.mark.parametrize("kind", [*KINDS[:2], *[pytest.param(kind, marks=pytest.mark.slow) for kind in KINDS[2:]]])
def test_a_saved_adapter_gives_the_logits_of_the_trained_model(kind: str, load: Loader, tmp_path: Path) -> None:
    model = adapted(load(None), plain(kind))
    expected = logits(model)
    model.save_pretrained(str(tmp_path))
    again = adapters.load_adapter(load(None), tmp_path).eval()
    assert torch.equal(logits(again), expected)
    assert not torch.allclose(expected, logits(load(None)), atol=1e-4)


def plain(kind: str) -> Method:
    """The method on layers that have names in every test."""
    return kinds.method_of(kind, **({"target_modules": ["v_proj"]} if kind == "beft" else {}))


def relative_error(kind: str, precision: str, load: Loader, folder: Path) -> float:
    """How far the logits on a quantized base are from those on the same base dequantized."""
    whole = adapted(load(f"{precision}!"), plain(kind))
    expected = logits(whole)
    whole.save_pretrained(str(folder))
    got = logits(PeftModel.from_pretrained(load(precision), str(folder)).eval())
    return float((got - expected).abs().max() / expected.abs().max())


def supported(precision: str) -> list[str]:
    return [kind for kind in KINDS if BITS[precision] not in METHODS[kind].facts.not_on]


CASES = [(kind, precision) for precision in PRECISIONS for kind in supported(precision)]
REFUSED = [(kind, precision) for precision in PRECISIONS for kind in KINDS if kind not in supported(precision)]
FAST = {("lora", "nf4"), ("oft", "fp4"), ("vera", "int8"), ("hra", "nf4")}


def _slow(cases: list[tuple[str, str]]) -> list[Any]:
    return [pytest.param(*case, marks=[] if case in FAST else pytest.mark.slow) for case in cases]


@pytest.mark.parametrize(("kind", "precision"), _slow(CASES))
def test_a_method_on_a_quantized_base_computes_with_the_weights_of_that_base(
    kind: str, precision: str, load: Loader, tmp_path: Path
) -> None:
    """LLM.int8 also rounds activations, whose error is below a hundredth; the magnitudes of updates multiply it."""
    assert relative_error(kind, precision, load, tmp_path) < (0.1 if precision == "int8" else 1e-5)


@pytest.mark.parametrize(("kind", "precision"), _slow(REFUSED))
def test_a_precision_is_refused_because_peft_fails_or_computes_something_else(
    kind: str, precision: str, load: Loader, tmp_path: Path
) -> None:
    """Something else: most of the adapter's change is lost, or a new adapter, elsewhere the base, is another model."""
    method = plain(kind)
    try:
        whole = adapted(load(f"{precision}!"), method)
        expected = logits(whole)
        whole.save_pretrained(str(tmp_path))
        got = logits(PeftModel.from_pretrained(load(precision), str(tmp_path)).eval())
        start = logits(adapters.add_adapter(load(precision), method).eval())
    except (RuntimeError, ValueError, TypeError, ConfigError):
        return
    change = (expected - logits(load(f"{precision}!"))).abs().max()
    moved = (start - logits(load(precision))).abs().max()
    assert (got - expected).abs().max() > 0.5 * change or moved > 0.01


MOVED: list[dict[str, Any]] = [
    {"init": "pissa"},
    {"init": "pissa_niter_8", "use_rslora": True},
    {"init": "olora", "use_dora": True},
    {"init": "corda", "rank_pattern": {"down_proj": 3}, "alpha_pattern": {"v_proj": 5}},
    {"init": "lora_ga", "rank_pattern": {"down_proj": 3}, "alpha_pattern": {"v_proj": 5}},
]


def sources(load: Loader) -> adapters.StartSources:
    rows = [[int(id_) for id_ in row] for row in IDS.repeat(3, 1)]
    return adapters.StartSources(lambda: [rows[0][:9], *rows], lambda: load(None))


@pytest.mark.parametrize("options", MOVED)
def test_an_adapter_that_starts_from_the_base_is_stored_as_lora_on_the_base_as_it_was(
    options: dict[str, Any], load: Loader, tmp_path: Path
) -> None:
    method = Lora(r=8, alpha=16, **options)
    before = logits(load(None))
    model = adapters.add_adapter(load(None), method, sources=sources(load)).eval()
    weight = model.get_base_model().model.layers[0].mlp.up_proj.base_layer.weight
    assert not torch.allclose(weight, load(None).model.layers[0].mlp.up_proj.weight, atol=1e-3)
    torch.testing.assert_close(logits(model), before, rtol=0, atol=1e-4)
    start = adapters.start_of(model, method)
    assert start
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter.add_(torch.randn(parameter.shape) * 0.05)
    trained = logits(model)
    model.save_pretrained(str(tmp_path))
    adapters.convert_stored(tmp_path, start)
    again = logits(adapters.load_adapter(load(None), tmp_path).eval())
    assert (trained - before).abs().max() > 0.05
    torch.testing.assert_close(again, trained, rtol=0, atol=1e-4)


def test_lora_ga_starts_from_the_directions_of_the_gradients_of_the_labelled_tokens(load: Loader) -> None:
    rows = [[int(id_) for id_ in row] for row in IDS.repeat(3, 1)]
    labels = [[-100] * 5 + row[5:] for row in rows]
    known = adapters.StartSources(lambda: rows, lambda: load(None), lambda: labels)
    model = adapters.add_adapter(load(None), Lora(r=4, init="lora_ga"), sources=known)
    base = load(None)
    weight = base.model.layers[1].mlp.down_proj.weight.requires_grad_()
    base.train()
    for row, wanted in zip(rows, labels, strict=True):
        base(input_ids=torch.tensor([row]), labels=torch.tensor([wanted])).loss.backward()
    a = model.get_base_model().model.layers[1].mlp.down_proj.lora_A["default"].weight
    principal = torch.linalg.svd(weight.grad, full_matrices=False).Vh[:4]
    assert a.dtype == torch.float32
    assert torch.linalg.svdvals(a @ principal.T).min() > 0.99  # cosines of the angles between both subspaces
    assert all(each.grad is None for each in model.parameters())


def test_eva_starts_from_principal_directions_of_the_rows_and_keeps_base_and_ranks(load: Loader) -> None:
    method = Lora(r=4, init="eva")
    model = adapters.add_adapter(load(None), method, sources=sources(load)).eval()
    assert torch.equal(logits(model), logits(load(None)))
    inputs: list[torch.Tensor] = []
    base = load(None)
    base.model.layers[1].mlp.down_proj.register_forward_pre_hook(lambda module, x: inputs.append(x[0].flatten(0, 1)))
    logits(base)
    a = model.get_base_model().model.layers[1].mlp.down_proj.lora_A["default"].weight
    principal = torch.linalg.svd(inputs[0] - inputs[0].mean(0), full_matrices=False).Vh[:4]
    assert a.shape == (4, 192)
    shared = torch.linalg.svdvals(a @ principal.T)  # cosines of the angles between both subspaces
    assert shared.mean() > 0.7


def test_loftq_lessens_the_rounding_error_of_a_base_in_4_bits(load: Loader) -> None:
    method = Lora(r=16, alpha=64, init="loftq")
    exact = logits(load(None))
    rounded = (logits(load("nf4")) - exact).norm()
    corrected = (logits(adapters.add_adapter(load("nf4"), method, sources=sources(load)).eval()) - exact).norm()
    assert corrected < 0.8 * rounded


def test_with_loraplus_b_learns_faster_than_a() -> None:
    from types import SimpleNamespace

    model = adapters.add_adapter(transformers.LlamaForCausalLM(transformers.LlamaConfig(**SHAPE)), Lora(r=2))
    options = (torch.optim.AdamW, {"lr": 1e-3, "betas": (0.8, 0.9)})
    trainer: Any = SimpleNamespace(
        model=model, optimizer=None, args=SimpleNamespace(weight_decay=0.1),
        get_optimizer_cls_and_kwargs=lambda args, model: options,
    )  # fmt: skip
    adapters.set_optimizer(trainer, Lora(r=2))
    unset: Any = trainer.optimizer
    assert unset is None
    adapters.set_optimizer(trainer, Lora(r=2, loraplus_lr_ratio=8))
    groups: Any = trainer.optimizer.param_groups
    rates = {id(parameter): group["lr"] for group in groups for parameter in group["params"]}
    for name, parameter in model.named_parameters():
        if parameter.requires_grad:
            assert rates[id(parameter)] == pytest.approx(8e-3 if ".lora_B." in name else 1e-3)
    assert groups[0]["betas"] == (0.8, 0.9)


@pytest.mark.parametrize("optimizer", ["AdamW8bit", "Lion8bit"])
def test_values_in_another_order_are_laid_out_for_optimizers_in_8_bits(optimizer: str) -> None:
    """The first step of both optimizers goes by the sign of each gradient."""
    import bitsandbytes

    layer = torch.nn.Linear(128, 64, bias=False)
    with torch.no_grad():
        layer.weight.data = torch.zeros(128, 64).T
        gradient = torch.randn(64, 128, generator=torch.Generator().manual_seed(2))
    adapters.lay_out_in_order(layer)
    assert layer.weight.is_contiguous()
    layer.weight.grad = gradient
    getattr(bitsandbytes.optim, optimizer)(layer.parameters(), lr=0.5, weight_decay=0, min_8bit_size=1).step()
    assert torch.allclose(layer.weight, -0.5 * gradient.sign(), atol=1e-2)


@pytest.mark.parametrize("init", ["pissa", "olora", "corda", "lora_ga", "eva", "loftq"])
def test_trained_values_of_every_start_lie_in_order(init: str, load: Loader) -> None:
    method = Lora(r=4, init=init)
    model = adapters.add_adapter(load("nf4" if init == "loftq" else None), method, sources=sources(load))
    assert all(parameter.is_contiguous() for parameter in model.parameters() if parameter.requires_grad)


@pytest.mark.parametrize("kind", ["osf", "psoft"])
@pytest.mark.parametrize("device", ["cpu", "meta"])
def test_transposed_layers_are_refused_where_peft_does_not_adapt_them(kind: str, device: str) -> None:
    with torch.device(device):
        model = transformers.GPT2LMHeadModel(transformers.GPT2Config(n_embd=64, n_layer=1, n_head=4, vocab_size=64))
    with pytest.raises(ConfigError, match="does not fit this base"):
        adapters.add_adapter(model, kinds.method_of(kind))
