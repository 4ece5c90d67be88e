"""Of a model that sees, the text part is trained; the rest is carried into safetensors unchanged, and never adapted."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import peft
import pytest
from safetensors.torch import load_file, save_file

from edgetune import cli
from edgetune.config import load_config
from edgetune.errors import ConfigError
from edgetune.training import adapters, loading
from edgetune_converters.errors import AdapterError
from tests.converters import family_models, runtime, tiny, vocabularies
from tests.data import templates
from tests.export_requests import export
from tests.training import runs

torch, transformers = tiny.torch, tiny.transformers

EYES = {
    "hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2, "image_size": 32,
    "patch_size": 8, "vision_use_head": False,
}  # fmt: skip
TEXT = {
    "vocab_size": 512, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 2,
    "num_key_value_heads": 1, "head_dim": 16, "query_pre_attn_scalar": 16, "max_position_embeddings": 256,
    "sliding_window": 128,
}  # fmt: skip


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    directory = tmp_path_factory.mktemp("seeing") / "base"
    config = transformers.Gemma3Config(
        text_config=transformers.Gemma3TextConfig(**TEXT), vision_config=transformers.SiglipVisionConfig(**EYES),
        mm_tokens_per_image=4, vocab_size=TEXT["vocab_size"],
    )  # fmt: skip
    torch.manual_seed(0)
    model = transformers.Gemma3ForConditionalGeneration(config)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.ndim > 1:
                parameter.normal_(0, 0.2)
    model.to(torch.bfloat16).save_pretrained(directory)
    vocabularies.byte_level(
        directory, chat_template=templates.CHATML, pad_token="<|endoftext|>", tokenizer_class="PreTrainedTokenizerFast"
    )
    (directory / "preprocessor_config.json").write_text('{"image_processor_type": "Gemma3ImageProcessor"}')
    return directory


def _adapter(base: Path, directory: Path, *, vision: float, text: float = 0.1) -> Path:
    """q_proj and v_proj of text and vision, as PEFT adapts them; `vision` and `text` are the spreads of B."""
    model = transformers.Gemma3ForConditionalGeneration.from_pretrained(base, dtype=torch.float32)
    settings = peft.LoraConfig(r=4, lora_alpha=6, target_modules=["q_proj", "v_proj"], task_type="CAUSAL_LM")
    with tiny._between_libraries():
        wrapped = peft.get_peft_model(model, settings)
    torch.manual_seed(1)
    with torch.no_grad():
        for name, parameter in wrapped.named_parameters():
            if "lora_" in name:
                spread = vision if "vision" in name else text
                parameter.normal_(0, spread if "lora_B" in name else 0.1)
    wrapped.save_pretrained(directory)
    return directory


def _seeing_logits(directory: Path, ids: list[int]) -> Any:
    auto = transformers.AutoModelForImageTextToText
    model, report = auto.from_pretrained(directory, dtype=torch.float32, output_loading_info=True)
    assert not any(report[kind] for kind in ("missing_keys", "unexpected_keys", "mismatched_keys"))
    with torch.no_grad():
        return model(input_ids=torch.tensor([ids])).logits[0].numpy()


# -- training ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("targets", ["all-linear", ["q_proj", "v_proj"]])
def test_training_adapts_the_text_part_and_its_outputs_hold_it(
    targets: Any, base: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    values = runs.settings(base, tmp_path, max_steps=2)
    values["adapter"]["target_modules"] = targets
    values["export"] = {"types": ["f32"]}
    config = runs.write_config(tmp_path / "c.yaml", values)
    assert cli.run(["train", str(config), "-o", str(tmp_path / "run"), "--dry-run"]) == 0
    said = capsys.readouterr().err.replace("\n", " ")
    assert "only the text part is adapted; multi_modal_projector and vision_tower stay as they are" in said
    assert cli.run(["train", str(config), "-o", str(tmp_path / "run")]) == 0
    adapter = tmp_path / "run" / "adapter"
    names = list(load_file(adapter / "adapter_model.safetensors"))
    assert names
    assert not [name for name in names if "vision" in name or "projector" in name]
    export(base, {"f32": tmp_path / "m.gguf"}, adapter=adapter, safetensors={"f32": tmp_path / "merged"})
    ids = tiny.random_ids(48, 512)
    trained = tiny.torch_logits(base, adapter, ids)
    assert tiny.divergence(trained, runtime.logits(tmp_path / "m.gguf", ids))[0] < 1e-6
    assert tiny.divergence(trained, _seeing_logits(tmp_path / "merged", ids))[0] < 1e-9


@pytest.mark.parametrize("targets", [["fc1"], ["out_proj", "q_proj"], ".*vision.*fc1"])
def test_layers_that_see_cannot_be_named(targets: Any, base: Path, tmp_path: Path) -> None:
    values = runs.settings(base, tmp_path)
    values["adapter"]["target_modules"] = targets
    config = load_config(runs.write_config(tmp_path / "c.yaml", values))
    from edgetune.planning.base_model import find_base

    found = find_base(config)
    model = loading.load_empty_model(found, config)
    with pytest.raises(ConfigError, match=r"fits? no l.*ayer") as refusal:
        adapters.add_adapter(model, config.adapter, found.layers)
    assert "The l" in str(refusal.value.hint)
    assert "fc1" not in str(refusal.value.hint)


def test_a_layer_that_the_family_does_not_export_is_refused_before_training(base: Path, tmp_path: Path) -> None:
    from edgetune.planning.base_model import find_base

    config = load_config(runs.write_config(tmp_path / "c.yaml", runs.settings(base, tmp_path)))
    found = find_base(config)
    model = loading.load_empty_model(found, config)
    model.model.language_model.layers[0].extra = torch.nn.Linear(4, 4)
    refused = pytest.raises(ConfigError, match=r"model\.language_model\.layers\.0\.extra\.weight could not be exported")
    with tiny._between_libraries(), refused:
        adapters.add_adapter(model, config.adapter, found.layers)


# every family that transformers can build: all-linear takes only what is exported
FAMILIES = [name for name, case in family_models.CASES.items() if case.after is None]


@pytest.mark.parametrize("name", FAMILIES)
def test_all_linear_takes_only_layers_that_are_exported(name: str, tmp_path: Path) -> None:
    from edgetune.planning.base_model import find_base

    base = family_models.base(name, tmp_path / "base")
    config = load_config(runs.write_config(tmp_path / "c.yaml", runs.settings(base, tmp_path)))
    found = find_base(config)
    with tiny._between_libraries():
        adapted = adapters.add_adapter(loading.load_empty_model(found, config), config.adapter, found.layers)
    assert adapters.count_trainable(adapted) > 0


# -- adapters of other trainers ----------------------------------------------------------------------------------------


def test_zero_pairs_of_layers_that_see_are_left_out_with_a_note(base: Path, tmp_path: Path) -> None:
    adapter = _adapter(base, tmp_path / "adapter", vision=0.0)
    outputs: dict[str, Any] = {"onnx": {"f32": tmp_path / "onnx"}, "safetensors": {"f32": tmp_path / "merged"}}
    receipts = export(base, {"f32": tmp_path / "m.gguf"}, adapter=adapter, **outputs)
    for receipt in receipts:
        (note,) = [note for note in receipt.notes if "are zero: left out" in note]
        assert "2 layers (model.vision_tower.encoder.layers.0.self_attn.q_proj, " in note
    ids = tiny.random_ids(48, 512)
    trained = tiny.torch_logits(base, adapter, ids)
    assert tiny.divergence(trained, runtime.logits(tmp_path / "m.gguf", ids))[0] < 1e-6
    assert tiny.divergence(trained, _seeing_logits(tmp_path / "merged", ids))[0] < 1e-9


def test_a_lora_file_leaves_them_out_too(base: Path, tmp_path: Path) -> None:
    adapter = _adapter(base, tmp_path / "adapter", vision=0.0)
    export(base, {"f32": tmp_path / "base.gguf"})
    (receipt,) = export(base, lora={"f32": tmp_path / "l.gguf"}, adapter=adapter)
    assert any("are zero: left out" in note for note in receipt.notes)
    ids = tiny.random_ids(48, 512)
    found = runtime.logits(tmp_path / "base.gguf", ids, tmp_path / "l.gguf")
    assert tiny.divergence(tiny.torch_logits(base, adapter, ids), found)[0] < 1e-6


@pytest.mark.parametrize("form", ["gguf", "safetensors", "onnx"])
def test_other_pairs_of_layers_that_see_are_refused_by_name(form: str, base: Path, tmp_path: Path) -> None:
    adapter = _adapter(base, tmp_path / "adapter", vision=0.1)
    outputs: Any = {form: {"f32": tmp_path / "m"}}
    with pytest.raises(AdapterError, match="only the text part of a multimodal model can be merged") as refusal:
        export(base, adapter=adapter, **outputs)
    assert "model.vision_tower.encoder.layers.0.self_attn.q_proj" in refusal.value.message


@pytest.mark.parametrize("name", ["IA3Config", "LoHaConfig", "OFTConfig", "HRAConfig"])
def test_other_methods_leave_layers_that_see_alone_or_are_refused(name: str, base: Path, tmp_path: Path) -> None:
    own: dict[str, dict[str, Any]] = {
        "IA3Config": {"feedforward_modules": []},
        "OFTConfig": {"oft_block_size": 4},
        "HRAConfig": {"r": 2},
    }
    model = transformers.Gemma3ForConditionalGeneration.from_pretrained(base, dtype=torch.float32)
    settings = getattr(peft, name)(target_modules=["q_proj", "v_proj"], task_type="CAUSAL_LM", **own.get(name, {}))
    with tiny._between_libraries():
        wrapped = peft.get_peft_model(model, settings)
    torch.manual_seed(1)
    trained = {key: value for key, value in wrapped.named_parameters() if value.requires_grad}
    with torch.no_grad():
        for key in (key for key in trained if "vision" not in key):
            trained[key].add_(torch.randn_like(trained[key]) * 0.1)
        wrapped.save_pretrained(tmp_path / "text")
        for key in (key for key in trained if "vision" in key):
            trained[key].add_(torch.randn_like(trained[key]) * 0.1)
        wrapped.save_pretrained(tmp_path / "both")
    (receipt,) = export(base, {"f32": tmp_path / "m.gguf"}, adapter=tmp_path / "text")
    assert any("changes nothing in 2 layers" in note and note.endswith("left out") for note in receipt.notes)
    ids = tiny.random_ids(48, 512)
    wanted = tiny.torch_logits(base, tmp_path / "text", ids)
    assert tiny.divergence(wanted, runtime.logits(tmp_path / "m.gguf", ids))[0] < 1e-6
    with pytest.raises(AdapterError, match="only the text part of a multimodal model can be merged"):
        export(base, {"f32": tmp_path / "m.gguf"}, adapter=tmp_path / "both")


def test_an_adapter_of_zero_pairs_alone_is_all_zero(base: Path, tmp_path: Path) -> None:
    adapter = _adapter(base, tmp_path / "adapter", vision=0.0)
    file = adapter / "adapter_model.safetensors"
    save_file({name: value for name, value in load_file(file).items() if "vision" in name}, file)
    with pytest.raises(AdapterError, match="is all zero"):
        export(base, {"f32": tmp_path / "m.gguf"}, adapter=adapter)


# -- the merged directory ----------------------------------------------------------------------------------------------


def test_the_towers_are_carried_bit_for_bit(base: Path, tmp_path: Path) -> None:
    adapter = _adapter(base, tmp_path / "adapter", vision=0.0)
    (receipt,) = export(base, safetensors={"base": tmp_path / "merged"}, adapter=adapter)
    before, after = (load_file(path / "model.safetensors") for path in (base, tmp_path / "merged"))
    assert before.keys() == after.keys()
    towers = [name for name in before if "vision_tower" in name or "multi_modal_projector" in name]
    assert len(towers) > 10
    assert all(torch.equal(before[name], after[name]) for name in towers)
    assert not any("only the text part" in note for note in receipt.notes)
    stated, own = (json.loads((path / "config.json").read_text()) for path in (tmp_path / "merged", base))
    assert stated == own
    assert (tmp_path / "merged" / "preprocessor_config.json").is_file()


def test_gguf_and_onnx_say_that_they_hold_the_text_part_alone(base: Path, tmp_path: Path) -> None:
    for receipt in export(base, {"f32": tmp_path / "m.gguf"}, onnx={"f32": tmp_path / "onnx"}):
        assert ["only the text part is exported" in note for note in receipt.notes] == [True]


def _as_published(name: str) -> str:
    """Names as published checkpoints spell them: `language_model.model.`, `vision_tower.vision_model.`"""
    name = name.replace("model.language_model.", "language_model.model.")
    return name.replace("model.vision_tower.", "vision_tower.vision_model.").replace("model.multi_modal", "multi_modal")


RENAMES: dict[str, Callable[[str], str]] = {"as saved": str, "as published": _as_published}


@pytest.mark.parametrize("spelling", RENAMES)
@pytest.mark.parametrize("type_", ["bf16", "f32"])
def test_transformers_loads_the_merged_model_as_one_that_sees(
    spelling: str, type_: str, base: Path, tmp_path: Path
) -> None:
    other = tmp_path / "base"
    other.mkdir()
    for file in base.iterdir():
        (other / file.name).write_bytes(file.read_bytes())
    tensors = load_file(base / "model.safetensors")
    save_file({RENAMES[spelling](name): value for name, value in tensors.items()}, other / "model.safetensors")
    export(other, safetensors={type_: tmp_path / "merged"})
    ids = tiny.random_ids(48, 512)
    assert (_seeing_logits(base, ids) == _seeing_logits(tmp_path / "merged", ids)).all()
    text = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "merged", dtype=torch.float32)
    with torch.no_grad():
        assert (text(input_ids=torch.tensor([ids])).logits[0].numpy() == _seeing_logits(base, ids)).all()


@pytest.mark.parametrize("name", ["gemma3-seeing", "llama4-seeing"])
def test_every_family_that_sees_keeps_its_eyes(name: str, tmp_path: Path) -> None:
    base = family_models.base(name, tmp_path / "base")
    export(base, safetensors={"base": tmp_path / "merged"})
    ids = tiny.random_ids(32)
    assert (_seeing_logits(base, ids) == _seeing_logits(tmp_path / "merged", ids)).all()
