"""Other outputs of the pass: a directory that transformers loads, an adapter that llama.cpp lays over its base."""

from __future__ import annotations

import json
import math
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from safetensors.numpy import load_file

from edgetune_converters import gguf
from edgetune_converters.errors import AdapterError, EdgetuneError, RecipeError, TokenizerError
from edgetune_converters.files import atomic
from edgetune_converters.provenance.receipts import Receipt
from edgetune_converters.reading.checkpoint import Checkpoint
from tests.converters import runtime, tiny, vocabularies
from tests.converters.test_flagship import ADAPTERS, F32_KLD
from tests.export_requests import export

transformers: Any = pytest.importorskip("transformers")


# -- safetensors -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", ADAPTERS)
@pytest.mark.parametrize("name", tiny.MODELS)
def test_transformers_loads_the_trained_model(name: str, kind: str, tmp_path: Path) -> None:
    base = tiny.base(name, tmp_path / "base")
    adapter = tiny.adapter(base, tmp_path / "adapter", **ADAPTERS[kind])
    (receipt,) = export(base, {}, safetensors={"base": tmp_path / "merged"}, adapter=adapter)
    ids = tiny.random_ids()
    trained = tiny.torch_logits(base, adapter, ids)
    kld, same = tiny.divergence(trained, tiny.torch_logits(tmp_path / "merged", None, ids))
    assert (kld < F32_KLD, same) == (True, 1.0)
    assert Checkpoint(tmp_path / "merged").tensors.keys() == Checkpoint(base).tensors.keys() == receipt.tensors.keys()
    assert not list(tmp_path.glob("*.partial"))


@pytest.mark.parametrize(
    "options",
    [{"target_modules": ["q_proj", "lm_head"]}, {"target_modules": ["embed_tokens"]}, {"modules_to_save": ["lm_head"]}],
)
def test_an_adapter_on_one_end_of_a_tied_model_unties_it(options: dict[str, Any], tmp_path: Path) -> None:
    base = tiny.base("llama3-rope", tmp_path / "base")
    adapter = tiny.adapter(base, tmp_path / "adapter", **{"target_modules": ["q_proj"]} | options)
    export(base, {}, safetensors={"base": tmp_path / "merged"}, adapter=adapter)
    assert json.loads((tmp_path / "merged" / "config.json").read_text())["tie_word_embeddings"] is False
    ids = tiny.random_ids()
    kld, same = tiny.divergence(
        tiny.torch_logits(base, adapter, ids), tiny.torch_logits(tmp_path / "merged", None, ids)
    )
    assert (kld < F32_KLD, same) == (True, 1.0)


@pytest.mark.parametrize("dtype", ["bfloat16", "float16", "float32"])
def test_a_base_without_an_adapter_keeps_every_bit(dtype: str, tmp_path: Path) -> None:
    base = tiny.base("llama", tmp_path / "base", dtype=dtype)
    export(base, {}, safetensors={"base": tmp_path / "merged"})
    before, after = Checkpoint(base), Checkpoint(tmp_path / "merged")
    for name, info in before.tensors.items():
        other = after.tensors[name]
        assert (info.dtype, info.shape) == (other.dtype, other.shape)
        one, two = (i.file.read_bytes()[i.start : i.start + i.bytes] for i in (info, other))
        assert one == two


def test_shards_of_a_size_with_an_index(tmp_path: Path) -> None:
    base = tiny.base("qwen2", tmp_path / "base")
    adapter = tiny.adapter(base, tmp_path / "adapter")
    (receipt,) = export(base, {}, safetensors={"bf16": tmp_path / "m"}, adapter=adapter, max_shard_size=150_000)
    shards = sorted((tmp_path / "m").glob("*.safetensors"))
    assert len(shards) > 3
    assert shards[0].name == f"model-00001-of-{len(shards):05d}.safetensors"
    index = json.loads((tmp_path / "m" / "model.safetensors.index.json").read_text())
    assert index["metadata"]["total_size"] == receipt.weights * 2
    model = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "m")
    assert str(model.dtype) == "torch.bfloat16"
    receipt.write()
    read = Receipt.read(tmp_path / "m")
    read.check()
    assert {path.name for path in shards} < read.files.keys()
    tokenizer = transformers.AutoTokenizer.from_pretrained(tmp_path / "m")
    assert tokenizer.chat_template == vocabularies.TEMPLATE


def test_tokenizer_and_template_of_training_go_along(tmp_path: Path) -> None:
    base = tiny.base("llama", tmp_path / "base")
    (base / "generation_config.json").write_text('{"eos_token_id": [1, 2]}')
    own = tmp_path / "tokenizer"
    vocabularies.byte_level(own, chat_template="of training")
    export(base, {}, safetensors={"base": tmp_path / "m"}, tokenizer=own, chat_template="{{ x }}")
    assert (tmp_path / "m" / "chat_template.jinja").read_text() == "{{ x }}"
    assert json.loads((tmp_path / "m" / "generation_config.json").read_text()) == {"eos_token_id": [1, 2]}
    assert transformers.AutoTokenizer.from_pretrained(tmp_path / "m").chat_template == "{{ x }}"


def test_a_model_without_a_tokenizer_is_not_written(tmp_path: Path) -> None:
    base = tiny.base("llama", tmp_path / "base")
    (tmp_path / "empty").mkdir()
    with pytest.raises(TokenizerError, match="has no tokenizer"):
        export(base, {}, safetensors={"base": tmp_path / "m"}, tokenizer=tmp_path / "empty")
    assert not list(tmp_path.glob("m*"))


def test_the_rounded_base_goes_into_the_directory_too(tmp_path: Path) -> None:
    base = tiny.base("llama", tmp_path / "base", hidden_size=128, intermediate_size=192, head_dim=32)
    adapter = tiny.adapter(base, tmp_path / "adapter")
    (receipt,) = export(
        base, {}, safetensors={"f32": tmp_path / "m"}, adapter=adapter, merge_base="nf4", bnb_record=None
    )
    export(base, {"f32": tmp_path / "x.gguf"}, adapter=adapter, merge_base="nf4")
    ids = tiny.random_ids()
    found = tiny.torch_logits(tmp_path / "m", None, ids)
    assert tiny.divergence(found, runtime.logits(tmp_path / "x.gguf", ids))[0] < F32_KLD
    assert tiny.divergence(found, tiny.torch_logits(base, adapter, ids))[0] > 1e-4
    assert (receipt.merge_base, len(receipt.notes)) == ("nf4", 1)


def test_one_read_feeds_both_formats(tmp_path: Path) -> None:
    base = tiny.base("llama", tmp_path / "base")
    adapter = tiny.adapter(base, tmp_path / "adapter", target_modules=["q_proj", "lm_head"])
    together = export(
        base, {"q8_0": tmp_path / "x.gguf"}, safetensors={"f16": tmp_path / "m"}, lora={"f32": tmp_path / "l.gguf"},
        adapter=adapter,
    )  # fmt: skip
    assert [receipt.format for receipt in together] == ["gguf", "safetensors", "gguf-lora"]
    alone = [
        *export(base, {"q8_0": tmp_path / "y.gguf"}, adapter=adapter),
        *export(base, {}, safetensors={"f16": tmp_path / "n"}, adapter=adapter),
        *export(base, {}, lora={"f32": tmp_path / "k.gguf"}, adapter=adapter),
    ]
    assert [receipt.sha256 for receipt in together] == [receipt.sha256 for receipt in alone]


@pytest.mark.parametrize("at", [1, 20])
def test_an_interrupted_export_leaves_no_directory(at: int, tmp_path: Path) -> None:
    base = tiny.base("llama", tmp_path / "base")
    calls = 0

    def interrupt(done: int, total: int) -> None:
        nonlocal calls
        calls += 1
        if calls == at:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        export(base, {}, safetensors={"base": tmp_path / "out" / "m"}, progress=interrupt)
    assert list((tmp_path / "out").iterdir()) == []


def test_only_an_exported_directory_is_replaced(tmp_path: Path) -> None:
    base = tiny.base("llama", tmp_path / "base")
    other = tmp_path / "other"
    shutil.copytree(base, other)
    with pytest.raises(EdgetuneError, match="was not made by an export"):
        export(base, {}, safetensors={"base": other})
    assert (other / "config.json").is_file()
    for _ in range(2):
        (receipt,) = export(base, {}, safetensors={"base": tmp_path / "m"})
        receipt.write()
    receipt.check()
    assert sorted(path.name for path in tmp_path.iterdir()) == ["base", "m", "m.receipt.json", "other"]


def test_types_that_a_directory_cannot_have(tmp_path: Path) -> None:
    base = tiny.base("llama", tmp_path / "base")
    with pytest.raises(RecipeError, match="safetensors cannot be written as 'q4_k_m'"):
        export(base, {}, safetensors={"q4_k_m": tmp_path / "m"})
    assert not (tmp_path / "m").exists()


def test_a_killed_pass_does_not_disturb_the_next(tmp_path: Path) -> None:
    base = tiny.base("llama", tmp_path / "base")
    (tmp_path / "m.partial").mkdir()
    (tmp_path / "m.partial" / "model.safetensors").write_bytes(b"half")
    (receipt,) = export(base, {}, safetensors={"base": tmp_path / "m"})
    receipt.check()


# -- the adapter alone -------------------------------------------------------------------------------------------------

_EVERYTHING: dict[str, dict[str, Any]] = ADAPTERS | {
    "ends": {"target_modules": ["q_proj", "lm_head", "embed_tokens"]},
    "one alpha": {"alpha_pattern": {"q_proj": 40}, "rank_pattern": {"k_proj": 1}},
}


# llama.cpp cannot change one side of a tied pair: see below
_CASES = [
    (name, kind)
    for name, (_, options) in tiny.MODELS.items()
    for kind in _EVERYTHING
    if kind != "ends" or not options["tie_word_embeddings"]
]


@pytest.mark.parametrize(("name", "kind"), _CASES)
def test_llama_cpp_lays_the_adapter_over_the_base(name: str, kind: str, tmp_path: Path) -> None:
    base = tiny.base(name, tmp_path / "base")
    adapter = tiny.adapter(base, tmp_path / "adapter", **_EVERYTHING[kind])
    export(base, {"f32": tmp_path / "base.gguf"})
    export(base, {}, lora={"f32": tmp_path / "lora.gguf"}, adapter=adapter)
    ids = tiny.random_ids()
    trained = tiny.torch_logits(base, adapter, ids)
    assert tiny.divergence(trained, runtime.logits(tmp_path / "base.gguf", ids))[0] > 1e-3
    kld, same = tiny.divergence(trained, runtime.logits(tmp_path / "base.gguf", ids, tmp_path / "lora.gguf"))
    print(f"{name} {kind}: {kld:.2e}")
    assert (kld < F32_KLD, same) == (True, 1.0)


def test_the_scale_is_folded_into_b(tmp_path: Path) -> None:
    """So that A is the adapter's own, whatever alpha, its pattern and rsLoRA make of the scale."""
    base = tiny.base("llama", tmp_path / "base")
    options: dict[str, Any] = {"r": 3, "lora_alpha": 5, "use_rslora": True, "alpha_pattern": {"k_proj": 7}}
    adapter = tiny.adapter(base, tmp_path / "adapter", target_modules=["o_proj", "k_proj"], **options)
    export(base, {}, lora={"f32": tmp_path / "lora.gguf"}, adapter=adapter)
    read, own = gguf.read(tmp_path / "lora.gguf"), load_file(adapter / "adapter_model.safetensors")
    for name, module, alpha in (("attn_output", "o_proj", 5), ("attn_k", "k_proj", 7)):
        stored = {part: read.tensor(f"blk.0.{name}.weight.lora_{part}").view(np.float32) for part in "ab"}
        a, b = (own[f"base_model.model.model.layers.0.self_attn.{module}.lora_{part}.weight"] for part in "AB")
        assert np.array_equal(stored["a"], a)
        scaled = b * np.float32(alpha / math.sqrt(3))
        assert np.array_equal(np.sort(stored["b"], axis=0), np.sort(scaled, axis=0))  # rows of heads are turned
        assert name != "attn_output" or np.array_equal(stored["b"], scaled)


@pytest.mark.parametrize("exchangeable", [True, False])
def test_an_older_directory_gives_way(exchangeable: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    base = tiny.base("llama", tmp_path / "base")
    export(base, {}, safetensors={"bf16": tmp_path / "m"})
    (tmp_path / "m" / "mark").touch()
    renamed: list[Path] = []
    rename = Path.rename

    def counted(path: Path, target: Path) -> Path:
        renamed.append(path)
        return rename(path, target)

    monkeypatch.setattr(Path, "rename", counted)
    if not exchangeable:
        monkeypatch.setattr(atomic, "exchange_names", lambda one, other: False)
    export(base, {}, safetensors={"bf16": tmp_path / "m"})
    assert not (tmp_path / "m" / "mark").exists()
    assert (tmp_path / "m" / "model.safetensors").is_file()
    assert {path.name for path in tmp_path.iterdir()} == {"base", "m"}
    # in one step the name never stands for nothing
    assert renamed == ([] if exchangeable else [tmp_path / "m", tmp_path / "m.partial"])


def test_the_adapter_says_what_it_is(tmp_path: Path) -> None:
    base = tiny.base("llama", tmp_path / "base")
    adapter = tiny.adapter(base, tmp_path / "adapter")
    (receipt,) = export(base, {}, lora={"f16": tmp_path / "lora.gguf"}, adapter=adapter)
    read = gguf.read(tmp_path / "lora.gguf")
    wanted = {"general.type": "adapter", "adapter.type": "lora", "general.architecture": "llama"}
    assert {key: read.metadata[key] for key in wanted} == wanted
    assert {entry.type for entry in read.tensors} == {"f16"}
    assert (receipt.format, receipt.recipe, len(receipt.tensors)) == ("gguf-lora", "f16", 2 * 7 * 3)
    ids = tiny.random_ids(64)
    export(base, {"f32": tmp_path / "base.gguf"})
    found = runtime.logits(tmp_path / "base.gguf", ids, tmp_path / "lora.gguf")
    assert tiny.divergence(tiny.torch_logits(base, adapter, ids), found)[0] < 1e-3
    receipt.write()
    Receipt.read(tmp_path / "lora.gguf").check()


@pytest.mark.parametrize(
    ("name", "options", "message"),
    [
        ("llama", {"modules_to_save": ["lm_head"]}, "lm_head.weight: it is replaced whole"),
        ("qwen2", {"bias": "lora_only"}, "is replaced whole"),
        ("qwen3", {"target_modules": ["q_proj", "lm_head"]}, "lm_head.weight: the embedding is also the output matrix"),
    ],
)
def test_what_an_adapter_file_has_no_place_for(
    name: str, options: dict[str, Any], message: str, tmp_path: Path
) -> None:
    base = tiny.base(name, tmp_path / "base")
    adapter = tiny.adapter(base, tmp_path / "adapter", **{"target_modules": ["q_proj"]} | options)
    with pytest.raises(EdgetuneError, match=message):
        export(base, {}, lora={"f32": tmp_path / "lora.gguf"}, adapter=adapter)
    assert not (tmp_path / "lora.gguf").exists()


def test_no_adapter_no_file(tmp_path: Path) -> None:
    base = tiny.base("llama", tmp_path / "base")
    with pytest.raises(AdapterError, match="there is no adapter to write"):
        export(base, {}, lora={"f32": tmp_path / "lora.gguf"})
    with pytest.raises(RecipeError, match="cannot be written as 'q8_0'"):
        export(base, {}, lora={"q8_0": tmp_path / "lora.gguf"}, adapter=tiny.adapter(base, tmp_path / "a"))
    assert not list(tmp_path.glob("lora*"))
