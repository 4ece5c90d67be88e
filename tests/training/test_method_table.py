"""The facts of docs/methods.md are true: counts of a 1 B shape, and what each method can be exported to."""

from __future__ import annotations

from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch
import transformers

from edgetune.exporting.through_peft import with_merged_layers
from edgetune.methods import METHODS
from edgetune.methods.base import LayerMethod
from edgetune.training import adapters
from edgetune_converters.errors import EdgetuneError
from edgetune_converters.exporting import export
from edgetune_converters.names import FormatName
from edgetune_converters.request import ExportRequest, Target
from tests.training import kinds, runs

FORMATS: dict[FormatName, str] = {"gguf": "f32", "onnx": "f32", "gguf-lora": "f16"}
OF_LAYERS = [kind for kind, method in METHODS.items() if issubclass(method, LayerMethod)]
FAST = {"lora", "vera"}


def _slow(names: list[str]) -> list[Any]:
    return [pytest.param(name, marks=[] if name in FAST else pytest.mark.slow) for name in names]


@pytest.fixture(scope="module")
def table() -> ModuleType:
    return kinds.load_table()


def one_billion(*, biases: bool = False) -> Any:
    """A model of the shape of Llama-3.2-1B, without weights."""
    config = transformers.LlamaConfig(
        vocab_size=128256, hidden_size=2048, intermediate_size=8192, num_hidden_layers=16, num_attention_heads=32,
        num_key_value_heads=8, head_dim=64, tie_word_embeddings=True, attention_bias=biases,
    )  # fmt: skip
    with torch.device("meta"):
        return transformers.AutoModelForCausalLM.from_config(config)


def test_the_shapes_of_the_table_are_those_of_the_model(table: ModuleType) -> None:
    shapes = {name: tuple(parameter.shape) for name, parameter in one_billion().named_parameters()}
    assert shapes == dict(table.SHAPES)
    assert sum(map(torch.Size.numel, map(torch.Size, shapes.values()))) == 1_235_814_400


LONG = ("fourierft", "waveft", "boft")
"""PEFT takes minutes to make them in this size; tests/training/test_adapters.py counts them in a small one."""
COUNTED = [kind for kind in OF_LAYERS if not METHODS[kind](kind=kind).reads_base and kind not in LONG]
PROMPTS = ["prompt-tuning", "p-tuning", "multitask-prompt-tuning", "prefix-tuning", "adaption-prompt", "layernorm"]


@pytest.mark.parametrize("kind", _slow([*COUNTED, *PROMPTS]))
def test_a_method_with_its_defaults_trains_as_many_parameters_of_1_b_as_the_table_says(
    kind: str, table: ModuleType
) -> None:
    method = METHODS[kind](kind=kind)
    model = one_billion(biases=kind == "beft")
    if getattr(method, "target_modules", None) == "v":
        method = method.model_copy(update={"target_modules": ["v_proj"]})
    adapted = adapters.add_adapter(model, method)
    # on the meta device PEFT marks the current ranks of AdaLoRA, a number a layer, as trained
    ranks = sum(".ranknum." in name for name, _ in adapted.named_parameters())
    assert adapters.count_trainable(adapted) - ranks == table.count_trained(METHODS[kind](kind=kind))


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return runs.make_base(tmp_path_factory.mktemp("base") / "hf", "float32")


@pytest.fixture(scope="module")
def base_with_biases(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """With biases of the attention, which BEFT trains."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(runs, "SHAPE", runs.SHAPE | {"attention_bias": True})
        return runs.make_base(tmp_path_factory.mktemp("biased") / "hf", "float32")


def trained(kind: str, base: Path, folder: Path) -> Path:
    """An adapter on the tiny base, as a training leaves it: every trained parameter has moved."""
    options = {"target_modules": ["v_proj"]} if kind == "beft" else {}
    model = transformers.AutoModelForCausalLM.from_pretrained(base, dtype=torch.float32)
    adapted = adapters.add_adapter(model, kinds.method_of(kind, **options))
    torch.manual_seed(3)
    with torch.no_grad():
        for parameter in adapted.parameters():
            if parameter.requires_grad:
                parameter.add_(torch.randn_like(parameter) * 0.02)
    adapted.save_pretrained(folder)
    return folder


@pytest.mark.parametrize("kind", _slow(OF_LAYERS))
def test_a_method_is_exported_to_the_formats_of_the_table_and_to_no_other(
    kind: str, base: Path, base_with_biases: Path, tmp_path: Path, table: ModuleType
) -> None:
    base = base_with_biases if kind == "beft" else base
    adapter = trained(kind, base, tmp_path / "adapter")
    method = METHODS[kind](kind=kind)
    for format_, type_ in FORMATS.items():
        why = failure(ExportRequest(base, (Target(format_, type_, tmp_path / f"out-{format_}"),), adapter=adapter))
        expected = table.refusal(method, 16, format_)
        assert (why is None) == (expected is None), f"{format_}: the table says {expected}, the export {why}"


def failure(request: ExportRequest) -> str | None:
    """Why an export fails; None if it does not."""
    try:
        with with_merged_layers(request, "original") as merged:
            export(merged)
    except EdgetuneError as error:
        return error.message
    return None
