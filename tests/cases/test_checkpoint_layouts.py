"""Checkpoints as they are found: indexes and shards, names without their first level, heads and buffers saved too."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from gguf import GGUFReader
from safetensors.torch import load_file, save_file

from edgetune import cli
from edgetune.config import load_config
from edgetune.planning.base_model import find_base
from edgetune_converters.errors import ArchitectureError, CheckpointError, EdgetuneError
from edgetune_converters.reading.checkpoint import Checkpoint
from edgetune_converters.reading.weight_files import INDEX_FILE, SINGLE_FILE
from tests.converters import family_models, runtime, tiny
from tests.export_requests import export
from tests.training import runs

torch, transformers = tiny.torch, tiny.transformers
ONE, TWO, THREE = (f"model-{number:05d}-of-00002.safetensors" for number in (1, 2, 3))
HEAD = "lm_head.weight"

Tensors = dict[str, Any]


@pytest.fixture(scope="module")
def plain(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return family_models.base("llama", tmp_path_factory.mktemp("layouts") / "plain")


@pytest.fixture(scope="module")
def tensors(plain: Path) -> Tensors:
    found: Tensors = load_file(plain / SINGLE_FILE)
    return found


@pytest.fixture(scope="module")
def expected(plain: Path) -> list[tuple[str, bytes]]:
    return _exported(plain, plain.parent / "m.gguf")


def _exported(base: Path, path: Path) -> list[tuple[str, bytes]]:
    export(base, {"f32": path})
    return [(tensor.name, tensor.data.tobytes()) for tensor in GGUFReader(path).tensors]


def _layout(
    plain: Path,
    directory: Path,
    files: Mapping[str, Tensors],
    weight_map: Mapping[str, str] | None = None,
    **config: Any,
) -> Path:
    """A copy of the base with its weights in these files, and an index."""
    shutil.copytree(plain, directory)
    (directory / SINGLE_FILE).unlink()
    for name, held in files.items():
        save_file({key: value.clone() for key, value in held.items()}, directory / name, {"format": "pt"})
    if weight_map is not None:
        (directory / INDEX_FILE).write_text(json.dumps({"metadata": {}, "weight_map": weight_map}))
    stated = json.loads((directory / "config.json").read_text())
    (directory / "config.json").write_text(json.dumps(stated | config))
    return directory


def _shards(tensors: Tensors) -> tuple[Tensors, Tensors, dict[str, str]]:
    names = sorted(tensors)
    first = {name: tensors[name] for name in names[:10]}
    second = {name: tensors[name] for name in names[10:]}
    return first, second, {**dict.fromkeys(first, ONE), **dict.fromkeys(second, TWO)}


# -- shards and indexes ------------------------------------------------------------------------------------------------

Arrange = Callable[[Tensors], tuple[dict[str, Tensors], dict[str, str] | None]]


def _sharded(tensors: Tensors) -> tuple[dict[str, Tensors], dict[str, str] | None]:
    first, second, places = _shards(tensors)
    return {ONE: first, TWO: second}, places


def _with_a_further_shard(tensors: Tensors) -> tuple[dict[str, Tensors], dict[str, str] | None]:
    first, second, places = _shards(tensors)
    return {ONE: first, TWO: second, THREE: {HEAD: tensors[HEAD] + 1}}, places


def _with_a_key_twice(tensors: Tensors) -> tuple[dict[str, Tensors], dict[str, str] | None]:
    first, second, places = _shards(tensors)
    return {ONE: first, TWO: second | {HEAD: tensors[HEAD]}}, places


def _with_a_key_left_out(tensors: Tensors) -> tuple[dict[str, Tensors], dict[str, str] | None]:
    first, second, places = _shards(tensors)
    return {ONE: first, TWO: second}, {name: file for name, file in places.items() if name != HEAD}


def _with_a_key_elsewhere(tensors: Tensors) -> tuple[dict[str, Tensors], dict[str, str] | None]:
    first, second, places = _shards(tensors)
    return {ONE: first, TWO: second}, places | {HEAD: TWO}


def _single_with_a_stale_index(tensors: Tensors) -> tuple[dict[str, Tensors], dict[str, str] | None]:
    return {SINGLE_FILE: tensors}, _shards(tensors)[2]


def _single_with_other_shards(tensors: Tensors) -> tuple[dict[str, Tensors], dict[str, str] | None]:
    first, second, places = _shards({name: value + 1 for name, value in tensors.items()})
    return {SINGLE_FILE: tensors, ONE: first, TWO: second}, places


READ: dict[str, tuple[Arrange, str | None]] = {
    "shards": (_sharded, None),
    "a shard that the index does not name": (_with_a_further_shard, f"{THREE} left aside: the index does not name it"),
    "a key in two shards": (_with_a_key_twice, f"several shards hold {HEAD}, with the same numbers"),
    "a key that the index lacks": (_with_a_key_left_out, f"the index has no or another file for {HEAD}"),
    "a key in another shard": (_with_a_key_elsewhere, f"the index has no or another file for {HEAD}"),
    "one file and a stale index": (_single_with_a_stale_index, f"{INDEX_FILE} left aside"),
    "one file and other shards": (_single_with_other_shards, f"{ONE} and 2 more left aside: the weights are in"),
}


@pytest.mark.parametrize("name", READ)
def test_weights_are_those_that_transformers_reads(
    name: str, plain: Path, tensors: Tensors, expected: list[tuple[str, bytes]], tmp_path: Path
) -> None:
    arrange, note = READ[name]
    base = _layout(plain, tmp_path / "base", *arrange(tensors))
    assert _exported(base, tmp_path / "m.gguf") == expected
    assert Checkpoint(base).notes == [] if note is None else note in " ".join(Checkpoint(base).notes)
    ids = tiny.random_ids(32)
    assert (tiny.torch_logits(base, None, ids) == tiny.torch_logits(plain, None, ids)).all()


def test_complete_shards_without_an_index_are_exported_and_not_trained_on(
    plain: Path, tensors: Tensors, expected: list[tuple[str, bytes]], tmp_path: Path
) -> None:
    base = _layout(plain, tmp_path / "base", _sharded(tensors)[0])
    assert _exported(base, tmp_path / "m.gguf") == expected
    config = load_config(runs.write_config(tmp_path / "c.yaml", runs.settings(base, tmp_path)))
    with pytest.raises(CheckpointError, match=r"has shards and no model\.safetensors\.index\.json"):
        find_base(config)
    assert cli.run(["merge-export", "--base", str(base), "--format", "safetensors", "-o", str(tmp_path / "whole")]) == 0
    assert cli.run(["train", str(tmp_path / "c.yaml"), "--set", f"base={tmp_path / 'whole'}", "--dry-run"]) == 0


REFUSED: dict[str, tuple[Callable[[Tensors], Any], str]] = {
    "a missing shard": (
        lambda tensors: ({ONE: _shards(tensors)[0]}, _shards(tensors)[2]), f"the shard {TWO} of the index is missing",
    ),
    "a missing shard and no index": (lambda tensors: ({TWO: _shards(tensors)[1]}, None), "1 of 2 shards are there"),
    "other numbers in two shards": (
        lambda tensors: (
            {ONE: _shards(tensors)[0], TWO: _shards(tensors)[1] | {HEAD: tensors[HEAD] + 1}}, _shards(tensors)[2]
        ),
        f"{HEAD} is in {ONE} and in {TWO}, with different numbers",
    ),
    "Mistral's own file": (
        lambda tensors: ({"consolidated.safetensors": tensors}, None), "the layout of Mistral's own tools",
    ),
    "another name": (
        lambda tensors: ({"weights.safetensors": tensors}, None), f"holds no {SINGLE_FILE}, but weights.safetensors",
    ),
}  # fmt: skip


@pytest.mark.parametrize("name", REFUSED)
def test_other_files_are_refused_in_one_sentence_with_a_remedy(
    name: str, plain: Path, tensors: Tensors, tmp_path: Path
) -> None:
    arrange, message = REFUSED[name]
    base = _layout(plain, tmp_path / "base", *arrange(tensors))
    with pytest.raises(CheckpointError) as refusal:
        Checkpoint(base)
    assert message in refusal.value.message
    assert refusal.value.hint


def test_sharded_pickles_are_refused_unless_safetensors_is_there(plain: Path, tensors: Tensors, tmp_path: Path) -> None:
    base = _layout(plain, tmp_path / "base", {})
    for number in (1, 2):
        (base / f"pytorch_model-{number:05d}-of-00002.bin").write_bytes(b"pickle")
    (base / "pytorch_model.bin.index.json").write_text("{}")
    with pytest.raises(CheckpointError, match=r"pickled weights .pytorch_model-00001-of-00002\.bin and 1 more"):
        Checkpoint(base)
    save_file(tensors, base / SINGLE_FILE)
    assert Checkpoint(base).notes == []


# -- names -------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["llama", "qwen3", "mixtral", "neox", "gpt2", "olmo2", "gemma3", "command-r"])
@pytest.mark.parametrize("form", ["names", "class too"])
def test_a_model_saved_without_its_head_is_read(name: str, form: str, tmp_path: Path) -> None:
    whole = family_models.base(name, tmp_path / "whole")
    stated = json.loads((whole / "config.json").read_text())
    tensors = load_file(whole / SINGLE_FILE)
    prefix = next(key for key in sorted(tensors) if ".0." in key).partition(".")[0] + "."
    bare = {key.removeprefix(prefix): value for key, value in tensors.items()}
    own = stated["architectures"][0].replace("LMHeadModel", "Model").replace("ForCausalLM", "Model")
    changed: dict[str, Any] = {"architectures": [own]} if form == "class too" else {}
    base = _layout(whole, tmp_path / "base", {SINGLE_FILE: bare}, **changed)
    assert _exported(base, tmp_path / "m.gguf") == _exported(whole, tmp_path / "whole.gguf")
    ids = tiny.random_ids(32)
    assert (tiny.torch_logits(base, None, ids) == tiny.torch_logits(whole, None, ids)).all()
    export(base, safetensors={"base": tmp_path / "merged"})
    assert load_file(tmp_path / "merged" / SINGLE_FILE).keys() == bare.keys()


def test_an_adapter_of_the_whole_model_fits_the_bare_one(plain: Path, tensors: Tensors, tmp_path: Path) -> None:
    bare = {name.removeprefix("model."): value for name, value in tensors.items()}
    base = _layout(plain, tmp_path / "base", {SINGLE_FILE: bare})
    adapter = tiny.adapter(plain, tmp_path / "adapter")
    export(base, {"f32": tmp_path / "bare.gguf"}, adapter=adapter)
    export(plain, {"f32": tmp_path / "m.gguf"}, adapter=adapter)
    found, wanted = (
        [(tensor.name, tensor.data.tobytes()) for tensor in GGUFReader(tmp_path / name).tensors]
        for name in ("bare.gguf", "m.gguf")
    )
    assert found == wanted


def test_a_bare_model_without_a_head_is_refused_unless_tied(plain: Path, tensors: Tensors, tmp_path: Path) -> None:
    bare = {name.removeprefix("model."): value for name, value in tensors.items() if name != HEAD}
    untied = _layout(plain, tmp_path / "untied", {SINGLE_FILE: bare})
    with pytest.raises(ArchitectureError, match=r"lm_head\.weight is missing"):
        export(untied, {"f32": tmp_path / "m.gguf"})
    tied = _layout(plain, tmp_path / "tied", {SINGLE_FILE: bare}, tie_word_embeddings=True)
    export(tied, {"f32": tmp_path / "m.gguf"})
    ids = tiny.random_ids(64)
    kld, _ = tiny.divergence(tiny.torch_logits(tied, None, ids), runtime.logits(tmp_path / "m.gguf", ids))
    assert kld < 1e-5


def test_a_tensor_under_both_names_is_refused(plain: Path, tensors: Tensors, tmp_path: Path) -> None:
    whole = family_models.base("gpt2", tmp_path / "whole")
    held = load_file(whole / SINGLE_FILE)
    doubled = held | {"wte.weight": held["transformer.wte.weight"] + 1}
    base = _layout(whole, tmp_path / "base", {SINGLE_FILE: doubled})
    with pytest.raises(ArchitectureError, match="are one tensor under two names"):
        export(base, {"f32": tmp_path / "m.gguf"})


@pytest.mark.parametrize("same", [True, False])
def test_a_tied_head_that_is_saved_too_is_what_transformers_makes_of_it(
    same: bool, plain: Path, tensors: Tensors, tmp_path: Path
) -> None:
    head = tensors["model.embed_tokens.weight"] if same else tensors[HEAD]
    held = tensors | {HEAD: head}
    base = _layout(plain, tmp_path / "base", {SINGLE_FILE: held}, tie_word_embeddings=True)
    export(base, {"f32": tmp_path / "m.gguf"})
    ids = tiny.random_ids(64)
    kld, _ = tiny.divergence(tiny.torch_logits(base, None, ids), runtime.logits(tmp_path / "m.gguf", ids))
    assert kld < 1e-5


# -- buffers -----------------------------------------------------------------------------------------------------------

BUFFERS: dict[str, tuple[str, dict[str, Any]]] = {
    "frequencies of each layer": (
        "llama",
        {f"model.layers.{i}.self_attn.rotary_emb.inv_freq": (12,) for i in range(3)},
    ),
    "frequencies once": ("llama", {"model.rotary_emb.inv_freq": (12,)}),
    "cached tables": ("qwen3", {"model.layers.0.self_attn.rotary_emb.cos_cached": (4, 12)}),
    "masks of GPT-NeoX": ("neox", {"gpt_neox.layers.0.attention.masked_bias": (1,)}),
    "masks of GPT-2": ("gpt2", {f"transformer.h.{i}.attn.bias": (1, 1, 4, 4) for i in range(3)}),
    "position ids": ("llama", {"model.position_ids": (1, 16)}),
}


@pytest.mark.parametrize("kind", BUFFERS)
def test_buffers_are_left_out_with_one_note(kind: str, tmp_path: Path) -> None:
    family, shapes = BUFFERS[kind]
    whole = family_models.base(family, tmp_path / "whole")
    extra = {name: torch.ones(shape) for name, shape in shapes.items()}
    base = _layout(whole, tmp_path / "base", {SINGLE_FILE: load_file(whole / SINGLE_FILE) | extra})
    receipts = export(base, {"f32": tmp_path / "m.gguf"}, safetensors={"base": tmp_path / "merged"})
    for receipt in receipts:
        (note,) = [note for note in receipt.notes if "computed when the model is loaded" in note]
        assert next(iter(shapes)) in note
        assert len(shapes) == 1 or f"and {len(shapes) - 1} more" in note
    assert not extra.keys() & load_file(tmp_path / "merged" / SINGLE_FILE).keys()


def test_an_unknown_tensor_is_still_refused_by_name(plain: Path, tensors: Tensors, tmp_path: Path) -> None:
    extra = {"model.layers.0.mystery.weight": torch.ones(2, 2)}
    base = _layout(plain, tmp_path / "base", {SINGLE_FILE: tensors | extra})
    with pytest.raises(EdgetuneError, match=r"model\.layers\.0\.mystery\.weight is not known"):
        export(base, {"f32": tmp_path / "m.gguf"})


# -- experts -----------------------------------------------------------------------------------------------------------


def _fused(tensors: Tensors, gate: str, up: str, down: str) -> Tensors:
    """The experts as transformers 5 holds them in memory: all gates and ups in one tensor, all downs in another."""
    found: dict[str, dict[tuple[int, str], Any]] = {}
    kept = {}
    for name, value in tensors.items():
        module, _, rest = name.partition(".experts.")
        number, _, part = rest.removesuffix(".weight").partition(".")
        if number.isdecimal():
            found.setdefault(module + ".experts", {})[int(number), part] = value
        else:
            kept[name] = value
    for name, parts in found.items():
        numbers = sorted({number for number, _ in parts})
        kept[name + ".gate_up_proj"] = torch.stack([torch.cat([parts[n, gate], parts[n, up]]) for n in numbers])
        kept[name + ".down_proj"] = torch.stack([parts[n, down] for n in numbers])
    return kept


@pytest.mark.parametrize(
    ("name", "parts"),
    [
        ("mixtral", ("w1", "w3", "w2")),
        ("qwen2moe", ("gate_proj", "up_proj", "down_proj")),
        ("qwen3moe", ("gate_proj", "up_proj", "down_proj")),
        ("deepseek-v3", ("gate_proj", "up_proj", "down_proj")),
    ],
)
def test_fused_and_single_experts_are_one_file(name: str, parts: tuple[str, str, str], tmp_path: Path) -> None:
    single = family_models.base(name, tmp_path / "single")
    held = load_file(single / SINGLE_FILE)
    fused = _fused(held, *parts)
    assert len(fused) < len(held)
    base = _layout(single, tmp_path / "fused", {SINGLE_FILE: fused})
    assert _exported(base, tmp_path / "fused.gguf") == _exported(single, tmp_path / "single.gguf")
    export(base, safetensors={"base": tmp_path / "merged"})
    assert load_file(tmp_path / "merged" / SINGLE_FILE).keys() == fused.keys()
    ids = tiny.random_ids(32)
    assert np.abs(tiny.torch_logits(base, None, ids) - tiny.torch_logits(single, None, ids)).max() < 1e-5


# -- files beside the model --------------------------------------------------------------------------------------------


def test_the_models_own_code_goes_with_a_merged_model(plain: Path, tmp_path: Path) -> None:
    base = tmp_path / "base"
    shutil.copytree(plain, base)
    (base / "modeling_own.py").write_text("x = 1\n")
    export(base, safetensors={"base": tmp_path / "without"})
    assert not (tmp_path / "without" / "modeling_own.py").exists()
    config = json.loads((base / "config.json").read_text())
    own = {"auto_map": {"AutoModelForCausalLM": "modeling_own.Own"}}
    (base / "config.json").write_text(json.dumps(config | own))
    export(base, safetensors={"base": tmp_path / "with"})
    assert (tmp_path / "with" / "modeling_own.py").read_text() == "x = 1\n"


def test_files_that_are_not_copied_are_named(plain: Path, tmp_path: Path) -> None:
    base = tmp_path / "base"
    shutil.copytree(plain, base)
    (receipt,) = export(base, safetensors={"base": tmp_path / "nothing"})
    assert not [note for note in receipt.notes if "not copied" in note]
    for name in ("tekken.json", "params.json", "README.md", "LICENSE.txt", "trainer_state.json", "modeling_own.py"):
        (base / name).write_text("{}")
    (receipt,) = export(base, safetensors={"base": tmp_path / "merged"})
    (note,) = [note for note in receipt.notes if "not copied" in note]
    assert note == "files of the base that are not copied: modeling_own.py, params.json, tekken.json"


SAMPLING: list[tuple[dict[str, Any], str | None]] = [
    ({"do_sample": True, "temperature": 0.6, "top_p": 0.95, "top_k": 20}, "temperature 0.6, top_p 0.95, top_k 20"),
    ({"repetition_penalty": 1.05}, "repetition_penalty 1.05"),
    ({"do_sample": False, "temperature": 0.6}, None),
    ({"eos_token_id": 1, "temperature": None}, None),
]


@pytest.mark.parametrize(("stated", "words"), SAMPLING)
def test_sampling_settings_that_no_runtime_reads_are_named(
    stated: dict[str, Any], words: str | None, plain: Path, tmp_path: Path
) -> None:
    base = tmp_path / "base"
    shutil.copytree(plain, base)
    (base / "generation_config.json").write_text(json.dumps(stated))
    outputs: dict[str, Any] = {"onnx": {"f32": tmp_path / "onnx"}, "safetensors": {"base": tmp_path / "merged"}}
    for receipt in export(base, {"f32": tmp_path / "m.gguf"}, **outputs):
        found = [note for note in receipt.notes if "asks for" in note]
        assert len(found) == (words is not None and receipt.format != "safetensors")
        assert words is None or not found or words in found[0]
    assert json.loads((tmp_path / "merged" / "generation_config.json").read_text()) == stated
