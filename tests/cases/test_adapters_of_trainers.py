"""Adapters as trainers leave them: their files and fields give the model of the plain adapter, or one sentence."""

from __future__ import annotations

import json
import pickle
import shutil
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from gguf import GGUFReader
from safetensors.torch import load_file, save_file

from edgetune_converters.adapters.adapter import Adapter
from edgetune_converters.errors import AdapterError, CheckpointError
from edgetune_converters.provenance.receipts import Receipt
from tests.cli_runner import edgetune
from tests.converters import runtime, tiny, vocabularies
from tests.export_requests import export

torch: Any = pytest.importorskip("torch")

WEIGHTS, CONFIG = "adapter_model.safetensors", "adapter_config.json"
FOUR_BIT = "unsloth/llama-3.2-1b-instruct-unsloth-bnb-4bit"
Dress = Callable[[Path], None]


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny.base("llama3-rope", tmp_path_factory.mktemp("trainers") / "base")


@pytest.fixture(scope="module")
def plain(base: Path) -> Path:
    options: dict[str, Any] = {
        "target_modules": ["q_proj", "v_proj", "down_proj"],
        "rank_pattern": {r"layers\.1\.self_attn\.q_proj": 2, "down_proj": 5},
        "alpha_pattern": {"v_proj": 3, r"layers\.0\.mlp\.down_proj": 9},
        "layers_to_transform": [0, 2],
        "use_rslora": True,
    }
    return tiny.adapter(base, base.parent / "plain", **options)


def _tensors(file: Path) -> dict[str, bytes]:
    return {tensor.name: tensor.data.tobytes() for tensor in GGUFReader(file).tensors}


@pytest.fixture(scope="module")
def wanted(base: Path, plain: Path) -> dict[str, bytes]:
    """The tensors of the plain adapter, of which the logits are PEFT's."""
    file = base.parent / "plain.gguf"
    export(base, {"f32": file}, adapter=plain)
    ids = tiny.random_ids()
    kld, same = tiny.divergence(tiny.torch_logits(base, plain, ids), runtime.logits(file, ids))
    assert (kld < 1e-8, same) == (True, 1.0)
    return _tensors(file)


def _state(directory: Path, **fields: Any) -> None:
    """Change fields of adapter_config.json."""
    stated = json.loads((directory / CONFIG).read_text()) | fields
    (directory / CONFIG).write_text(json.dumps(stated))


def _files(directory: Path, *names: str) -> None:
    for name in names:
        (directory / name).parent.mkdir(parents=True, exist_ok=True)
        (directory / name).write_text("{}")


def _unsloth(directory: Path) -> None:
    mapping = {"base_model_class": "LlamaForCausalLM", "parent_library": "transformers", "unsloth_fixed": True}
    _state(directory, base_model_name_or_path=FOUR_BIT, auto_mapping=mapping, target_modules="(?:.*?q_proj)")
    vocabularies.byte_level(directory)


def _axolotl(directory: Path) -> None:
    _state(directory, base_model_name_or_path="/workspace/models/x", target_modules=["q_proj"], loftq_config={})
    _files(directory, "config.json", "debug.log", "checkpoint-50/adapter_config.json", "runs/events.out.tfevents.1")


def _llama_factory(directory: Path) -> None:
    _files(directory, "all_results.json", "train_results.json", "trainer_state.json", "trainer_log.jsonl")
    _files(directory, "training_args.bin", "training_loss.png", "llamaboard_config.yaml", "README.md")


def _swift(directory: Path) -> None:
    _files(directory, "args.json", "additional_config.json", "configuration.json", "trainer_state.json")
    _state(directory, swift_type="LORA", lora_dtype="bf16", lorap_lr_ratio=16.0, use_qa_lora=False, enable_lora=None)


def _torchtune(directory: Path) -> None:
    """Few fields, the native weights beside those of PEFT, and the merged model."""
    stated = json.loads((directory / CONFIG).read_text())
    kept = ("r", "lora_alpha", "peft_type", "use_rslora", "rank_pattern", "alpha_pattern")
    (directory / CONFIG).write_text(json.dumps({name: stated[name] for name in kept}))
    torch.save({"layers.0.attn.q_proj.lora_a.weight": torch.ones(2)}, directory / "adapter_model.pt")
    save_file({"x": torch.ones(2)}, directory / "model-00001-of-00001.safetensors")
    _files(directory, "config.json", "model.safetensors.index.json", "original_repo_id.json", "original/params.json")


def _pickled(directory: Path) -> None:
    tensors = load_file(directory / WEIGHTS)
    torch.save({name: torch.nn.Parameter(tensor) for name, tensor in tensors.items()}, directory / "adapter_model.bin")
    (directory / WEIGHTS).unlink()


def _shards(directory: Path, *, index: bool = True) -> None:
    tensors = load_file(directory / WEIGHTS)
    (directory / WEIGHTS).unlink()
    names = sorted(tensors)
    places = {name: f"adapter_model-{1 + number % 3:05d}-of-00003.safetensors" for number, name in enumerate(names)}
    for file in set(places.values()):
        save_file({name: tensors[name] for name in names if places[name] == file}, directory / file)
    if index:
        content = {"metadata": {"total_size": 1}, "weight_map": places}
        (directory / f"{WEIGHTS}.index.json").write_text(json.dumps(content))


def _inside(name: str) -> Dress:
    def move(directory: Path) -> None:
        (directory / name).mkdir()
        for file in (WEIGHTS, CONFIG):
            (directory / file).rename(directory / name / file)

    return move


DRESSES: dict[str, Dress] = {
    "Unsloth": _unsloth,
    "Axolotl": _axolotl,
    "LLaMA-Factory": _llama_factory,
    "ms-swift": _swift,
    "torchtune": _torchtune,
    "adapter_model.bin": _pickled,
    "shards": _shards,
    "shards without an index": lambda directory: _shards(directory, index=False),
    "a checkpoint inside": _inside("checkpoint-50"),
    "default inside": _inside("default"),
    "an epoch inside": _inside("epoch_0"),
}
# what is said beyond nothing
SAID: dict[str, tuple[str, ...]] = {
    "Unsloth": (f"the adapter was trained on a base in 4 bits ({FOUR_BIT})",),
    "torchtune": ("not used, beside the adapter: adapter_model.pt, model-00001-of-00001.safetensors, model.",),
    "a checkpoint inside": ("the adapter is in checkpoint-50, inside ",),
    "default inside": ("the adapter is in default, inside ",),
    "an epoch inside": ("the adapter is in epoch_0, inside ",),
}


def _export(base: Path, adapter: Path, out: Path, **fields: Any) -> Receipt:
    (receipt,) = export(base, {"f32": out}, adapter=adapter, tokenizer=base, **fields)
    return receipt


@pytest.mark.parametrize("name", DRESSES)
def test_the_file_is_that_of_the_plain_adapter(
    name: str, base: Path, plain: Path, wanted: dict[str, bytes], tmp_path: Path
) -> None:
    adapter = tmp_path / "adapter"
    shutil.copytree(plain, adapter)
    DRESSES[name](adapter)
    receipt = _export(base, adapter, tmp_path / "x.gguf")
    assert _tensors(tmp_path / "x.gguf") == wanted
    assert len(receipt.notes) == len(SAID.get(name, ()))
    assert all(note.startswith(said) for note, said in zip(receipt.notes, SAID.get(name, ()), strict=True))
    assert set(receipt.adapter or ()) == set(Adapter(adapter).identity())


@pytest.mark.parametrize("dtype", ["bfloat16", "float16", "float64"])
def test_factors_in_other_types_are_read_exactly(dtype: str, base: Path, plain: Path, tmp_path: Path) -> None:
    for name, made in (("narrow", dtype), ("wide", "float32")):
        shutil.copytree(plain, tmp_path / name)
        tensors = load_file(plain / WEIGHTS)
        narrow = {key: tensor.to(getattr(torch, dtype)).to(getattr(torch, made)) for key, tensor in tensors.items()}
        save_file(narrow, tmp_path / name / WEIGHTS)
        _export(base, tmp_path / name, tmp_path / f"{name}.gguf")
    assert _tensors(tmp_path / "narrow.gguf") == _tensors(tmp_path / "wide.gguf")


@pytest.mark.parametrize("dtype", ["bfloat16", "float16", "float64"])
def test_pickled_factors_in_other_types(dtype: str, base: Path, plain: Path, tmp_path: Path) -> None:
    for name in ("pickled", "safe"):
        shutil.copytree(plain, tmp_path / name)
        tensors = {key: tensor.to(getattr(torch, dtype)) for key, tensor in load_file(plain / WEIGHTS).items()}
        save_file(tensors, tmp_path / name / WEIGHTS)
    _pickled(tmp_path / "pickled")
    for name in ("pickled", "safe"):
        _export(base, tmp_path / name, tmp_path / f"{name}.gguf")
    assert _tensors(tmp_path / "pickled.gguf") == _tensors(tmp_path / "safe.gguf")


def test_biases_that_were_trained_replace_those_of_the_base(tmp_path: Path) -> None:
    base = tiny.base("llama", tmp_path / "base")
    for bias in ("lora_only", "all"):
        adapter = tiny.adapter(base, tmp_path / bias, bias=bias, target_modules=["q_proj", "down_proj"])
        export(base, {"f32": tmp_path / f"{bias}.gguf"}, adapter=adapter)
        ids = tiny.random_ids()
        expected = tiny.torch_logits(base, adapter, ids)
        assert tiny.divergence(expected, runtime.logits(tmp_path / f"{bias}.gguf", ids))[0] < 1e-8


def test_biases_of_b_are_added_to_those_of_the_base(base: Path, tmp_path: Path) -> None:
    own = tiny.base("llama", tmp_path / "base")
    adapter = tiny.adapter(own, tmp_path / "adapter", lora_bias=True, target_modules=["q_proj", "down_proj"])
    export(own, {"f32": tmp_path / "x.gguf"}, adapter=adapter)
    ids = tiny.random_ids()
    assert tiny.divergence(tiny.torch_logits(own, adapter, ids), runtime.logits(tmp_path / "x.gguf", ids))[0] < 1e-8
    with pytest.raises(AdapterError, match="it is a bias"):
        export(own, lora={"f32": tmp_path / "x.lora.gguf"}, adapter=adapter)
    adapter = tiny.adapter(base, tmp_path / "without", target_modules=["q_proj"])
    tensors = load_file(adapter / WEIGHTS)
    biases = {name.replace("weight", "bias"): tensor[:, 0] for name, tensor in tensors.items() if "lora_B" in name}
    save_file(tensors | {name: tensor.contiguous() for name, tensor in biases.items()}, adapter / WEIGHTS)
    with pytest.raises(AdapterError, match=r"3 modules have a LoRA bias \(lora_bias\), for which the base has no bias"):
        export(base, {"f32": tmp_path / "y.gguf"}, adapter=adapter)


def test_a_model_and_an_adapter_that_are_exchanged_are_told_apart(base: Path, plain: Path, tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match="holds an adapter, not a model"):
        export(plain, {"f32": tmp_path / "x.gguf"})
    with pytest.raises(AdapterError, match="holds a model, not an adapter"):
        export(base, {"f32": tmp_path / "x.gguf"}, adapter=base)


def test_unknown_fields_are_said_and_known_ones_are_not(base: Path, plain: Path, tmp_path: Path) -> None:
    shutil.copytree(plain, tmp_path / "adapter")
    _state(tmp_path / "adapter", new_trick={"a": 1}, other_trick=3, switched_off=False, velora_config={"scale": 1})
    receipt = _export(base, tmp_path / "adapter", tmp_path / "x.gguf")
    said = "adapter_config.json has fields that are not known here and not used: new_trick, other_trick"
    assert receipt.notes == [said]


def test_files_that_may_be_a_part_of_the_model_are_said(base: Path, plain: Path, tmp_path: Path) -> None:
    shutil.copytree(plain, tmp_path / "adapter")
    _files(tmp_path / "adapter", "value_head.safetensors", "model.safetensors", "projector.pt", "odd")
    receipt = _export(base, tmp_path / "adapter", tmp_path / "x.gguf")
    assert receipt.notes == [
        "not used, beside the adapter: model.safetensors, odd, projector.pt, value_head.safetensors"
    ]


def test_an_adapter_in_the_directory_of_the_base_is_said(base: Path, plain: Path, tmp_path: Path) -> None:
    shutil.copytree(base, tmp_path / "model")
    shutil.copy(plain / CONFIG, tmp_path / "model")
    (receipt,) = export(tmp_path / "model", {"f32": tmp_path / "x.gguf"})
    assert receipt.notes == ["an adapter lies in the directory of the base and is not merged: adapter_config.json"]
    shutil.copy(plain / WEIGHTS, tmp_path / "model")
    with pytest.raises(AdapterError, match="is given as the base and as the adapter"):
        export(tmp_path / "model", {"f32": tmp_path / "x.gguf"}, adapter=tmp_path / "model")


def test_the_merge_base_of_training_is_not_recommended_twice(base: Path, plain: Path, tmp_path: Path) -> None:
    shutil.copytree(plain, tmp_path / "adapter")
    _state(tmp_path / "adapter", base_model_name_or_path=FOUR_BIT)
    receipt = _export(base, tmp_path / "adapter", tmp_path / "x.gguf", merge_base="nf4")
    assert not any("trained on a base in 4 bits" in note for note in receipt.notes)


# -- what is refused, in one sentence ----------------------------------------------------------------------------------


def _mlx(directory: Path, kind: str = "lora", **parameters: Any) -> None:
    """The adapter as MLX writes it, where all modules have one rank and one scale."""
    tensors = load_file(directory / WEIGHTS)
    (directory / WEIGHTS).unlink()
    renamed = {}
    for name, tensor in tensors.items():
        own = name.removeprefix("base_model.model.").replace("lora_embedding_", "lora_").removesuffix(".weight")
        renamed[own[:-1] + own[-1].lower()] = tensor.T.contiguous()
    save_file(renamed, directory / "adapters.safetensors")
    shutil.copy(directory / "adapters.safetensors", directory / "0000100_adapters.safetensors")
    stated = {"rank": 4, "scale": 1.5, "dropout": 0.0} | parameters
    (directory / CONFIG).write_text(json.dumps({"fine_tune_type": kind, "num_layers": 3, "lora_parameters": stated}))


def test_an_adapter_of_mlx_is_that_of_peft(base: Path, tmp_path: Path) -> None:
    adapter = tiny.adapter(base, tmp_path / "adapter", target_modules=["q_proj", "down_proj", "embed_tokens"])
    tensors = load_file(adapter / WEIGHTS)
    save_file({name: tensor for name, tensor in tensors.items() if "base_layer" not in name}, adapter / WEIGHTS)
    _export(base, adapter, tmp_path / "peft.gguf")
    _mlx(adapter)
    receipt = _export(base, adapter, tmp_path / "mlx.gguf")
    assert _tensors(tmp_path / "mlx.gguf") == _tensors(tmp_path / "peft.gguf")
    assert receipt.notes == []
    assert set(receipt.adapter or ()) == {CONFIG, "adapters.safetensors"}


def _experts_of_mlx(directory: Path) -> None:
    _mlx(directory)
    name = "model.layers.0.mlp.switch_mlp.up_proj.lora_a"
    save_file({name: torch.ones(2, 4, 6)}, directory / "adapters.safetensors")


def _native(directory: Path) -> None:
    (directory / WEIGHTS).rename(directory / "adapter_0.pt")


def _checkpoints(directory: Path) -> None:
    for number in (50, 100, 1000):
        (directory / f"checkpoint-{number}").mkdir()
        for file in (WEIGHTS, CONFIG):
            shutil.copy(directory / file, directory / f"checkpoint-{number}")
    for file in (WEIGHTS, CONFIG):
        (directory / file).unlink()


def _model(directory: Path) -> None:
    for file in (WEIGHTS, CONFIG):
        (directory / file).unlink()
    _files(directory, "config.json")


def _lost_shard(directory: Path) -> None:
    _shards(directory)
    (directory / "adapter_model-00002-of-00003.safetensors").unlink()


def _code(directory: Path) -> None:
    """A pickle that would run a command."""

    class Command:
        def __reduce__(self) -> tuple[Any, ...]:
            return (print, ("run",))

    (directory / WEIGHTS).unlink()
    with zipfile.ZipFile(directory / "adapter_model.bin", "w") as archive:
        archive.writestr("adapter_model/data.pkl", pickle.dumps({"x": Command()}))


def _magnitudes(directory: Path) -> None:
    tensors = load_file(directory / WEIGHTS)
    name = "base_model.model.model.layers.0.self_attn.q_proj.lora_magnitude_vector"
    save_file(tensors | {name: torch.ones(160)}, directory / WEIGHTS)


REFUSED: dict[str, tuple[Dress, str]] = {
    "DoRA of MLX": (lambda directory: _mlx(directory, "dora"), "of MLX's kind 'dora'"),
    "MLX without a rank": (lambda directory: _mlx(directory, rank=None), "has the rank None and the scale 1.5"),
    "experts of MLX": (_experts_of_mlx, "pairs of experts from MLX cannot be merged yet"),
    "torchtune's own names": (_native, r"under the names of torchtune alone \(adapter_0\.pt\)"),
    "several checkpoints": (
        _checkpoints,
        "is no adapter, but 3 directories in it are: checkpoint-50, checkpoint-100, checkpoint-1000",
    ),
    "a model": (_model, "holds a model, not an adapter"),
    "a lost shard": (_lost_shard, r"lacks the shard adapter_model-00002-of-00003\.safetensors"),
    "code in a pickle": (_code, r"cannot be read without running its code: it asks for builtins\.print"),
    "DoRA by its tensors": (
        _magnitudes,
        r"has a lora_magnitude_vector \(DoRA\), and adapter_config.json does not state",
    ),
    "DoRA without magnitudes": (lambda directory: _state(directory, use_dora=True), "have no lora_magnitude_vector"),
    "PiSSA": (lambda directory: _state(directory, init_lora_weights="pissa_niter_16"), "which moves the base"),
    "CorDA": (lambda directory: _state(directory, init_lora_weights="corda"), "which moves the base"),
    "merged linear layers": (lambda directory: _state(directory, use_merged_linear=True), "use_merged_linear"),
    "another kind": (lambda directory: _state(directory, peft_type="UNHEARD_OF"), "of the kind UNHEARD_OF"),
}


@pytest.mark.parametrize("name", REFUSED)
def test_what_cannot_be_merged_is_refused_in_one_sentence(
    name: str, base: Path, plain: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    adapter = tmp_path / "adapter"
    shutil.copytree(plain, adapter)
    dress, message = REFUSED[name]
    dress(adapter)
    with pytest.raises(AdapterError, match=message) as raised:
        _export(base, adapter, tmp_path / "x.gguf")
    assert "\n" not in raised.value.message
    assert raised.value.hint
    assert not (tmp_path / "x.gguf").exists()
    assert "run" not in capsys.readouterr().out.splitlines()


def test_an_adapter_that_is_not_there_is_refused(base: Path, tmp_path: Path) -> None:
    with pytest.raises(AdapterError, match="there is no adapter directory") as raised:
        _export(base, tmp_path / "someone" / "lora", tmp_path / "x.gguf")
    assert "hf download" in (raised.value.hint or "")


def test_the_weights_may_be_named_instead_of_their_directory(
    base: Path, plain: Path, wanted: dict[str, bytes], tmp_path: Path
) -> None:
    _export(base, plain / WEIGHTS, tmp_path / "x.gguf")
    assert _tensors(tmp_path / "x.gguf") == wanted


def test_a_pickle_whose_tensors_are_transposed_views_is_refused(plain: Path, tmp_path: Path) -> None:
    shutil.copytree(plain, tmp_path / "adapter")
    (tmp_path / "adapter" / WEIGHTS).unlink()
    torch.save({"x.lora_A.weight": torch.ones(3, 2).T}, tmp_path / "adapter" / "adapter_model.bin")
    with pytest.raises(AdapterError, match=r"x\.lora_A\.weight is not stored row by row"):
        Adapter(tmp_path / "adapter")


def test_views_into_one_storage_are_read_from_a_pickle(plain: Path, tmp_path: Path) -> None:
    shutil.copytree(plain, tmp_path / "adapter")
    (tmp_path / "adapter" / WEIGHTS).unlink()
    whole = torch.arange(24, dtype=torch.float32).reshape(6, 4)
    torch.save({"a": whole[2:4], "b": whole[4:]}, tmp_path / "adapter" / "adapter_model.bin")
    file = Adapter(tmp_path / "adapter").file
    assert np.array_equal(file.rows(file.tensors["a"], slice(None)), whole[2:4].numpy())
    assert np.array_equal(file.rows(file.tensors["b"], slice(1, 2)), whole[5:].numpy())


def test_a_dry_run_says_what_the_export_will_say(base: Path, plain: Path, tmp_path: Path) -> None:
    shutil.copytree(plain, tmp_path / "adapter")
    _files(tmp_path / "adapter", "value_head.safetensors")
    options: list[str | Path] = ["--base", base, "--adapter", tmp_path / "adapter", "-q", "f32", "--dry-run"]
    result = edgetune("merge-export", *options)
    assert result.returncode == 0
    assert "not used, beside the adapter: value_head.safetensors" in result.stderr.decode()
