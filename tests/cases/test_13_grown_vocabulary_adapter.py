"""An adapter trained after the vocabulary grew brings embedding and head; PEFT's own doubles are one tensor."""

from __future__ import annotations

import json
import re
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from gguf import GGUFReader
from numpy.typing import NDArray
from safetensors.numpy import load_file, save_file
from tokenizers import Tokenizer

from edgetune_converters.errors import AdapterError, EdgetuneError
from edgetune_converters.provenance.receipts import Receipt
from tests.converters import runtime, tiny, vocabularies
from tests.converters.onnx import session
from tests.export_requests import export

torch: Any = pytest.importorskip("torch")
peft: Any = pytest.importorskip("peft")
transformers: Any = pytest.importorskip("transformers")

# transformers and PEFT warn about each other's names, and about tied and resized embeddings
pytestmark = pytest.mark.filterwarnings("ignore::UserWarning", "ignore::FutureWarning")

TOKENS = 503
ENDS: dict[str, Any] = {"modules_to_save": ["embed_tokens", "lm_head"]}
Bases = dict[str, Path]


def adapted(
    base: Path, out: Path, rows: int = TOKENS, *, save: bool | str = "auto", **options: Any
) -> tuple[Path, Path]:
    """An adapter over `base` with `rows` rows, and the base that PEFT loads it over."""
    model = transformers.AutoModelForCausalLM.from_pretrained(base, dtype=torch.float32)
    if rows != TOKENS:
        model.resize_token_embeddings(rows, mean_resizing=False)
    grown, directory = out / "grown", out / "adapter"
    model.save_pretrained(grown)
    settings = {"r": 4, "lora_alpha": 6, "target_modules": ["q_proj"], "task_type": "CAUSAL_LM"} | options
    wrapped = peft.get_peft_model(model, peft.LoraConfig(**settings))
    torch.manual_seed(5)
    with torch.no_grad():
        for name, parameter in wrapped.named_parameters():
            if "lora_" in name:
                parameter.normal_(0, 0.1)
            elif parameter.requires_grad:
                parameter.add_(torch.randn_like(parameter) * 0.1)
    wrapped.save_pretrained(directory, save_embedding_layers=save)
    _write_tokenizer(directory, min(rows, TOKENS + 5))
    return grown, directory


def _write_tokenizer(directory: Path, tokens: int) -> None:
    vocabularies.byte_level(directory)
    tokenizer = Tokenizer.from_file(str(directory / "tokenizer.json"))
    first = tokenizer.get_vocab_size()
    tokenizer.add_special_tokens([f"<|new{number}|>" for number in range(max(0, tokens - first))])
    tokenizer.save(str(directory / "tokenizer.json"))


@pytest.fixture(scope="module")
def bases(tmp_path_factory: pytest.TempPathFactory) -> Bases:
    root = tmp_path_factory.mktemp("grown")
    return {
        "own head": tiny.base("llama", root / "base", vocab_size=TOKENS),
        "wide": tiny.base("llama", root / "wide", vocab_size=523),
        "tied": tiny.base("llama-tied", root / "tied", vocab_size=TOKENS),
    }


@pytest.fixture(scope="module")
def both(bases: Bases) -> tuple[Path, Path]:
    return adapted(bases["own head"], bases["own head"].parent / "both", 508, **ENDS)


def _export(bases: Bases, kind: str, adapter: Path, out: Path) -> list[Receipt]:
    return export(bases[kind], {"f32": out}, adapter=adapter, tokenizer=adapter)


CASES: dict[str, tuple[str, int, dict[str, Any]]] = {
    "the embedding alone": ("own head", 508, {"modules_to_save": ["embed_tokens"]}),
    "LoRA on both": ("own head", 508, {"target_modules": ["q_proj", "embed_tokens", "lm_head"]}),
    "nothing of it trained": ("own head", 508, {}),
    "padded to 512 rows": ("own head", 512, ENDS),
    "fewer rows than the base": ("wide", 508, ENDS),
    "one matrix for both ends": ("tied", 508, {"modules_to_save": ["embed_tokens"]}),
    "both ends trained as one": ("tied", 508, {"modules_to_save": ["embed_tokens"], "ensure_weight_tying": True}),
    "LoRA on one matrix for both ends": ("tied", 508, {"target_modules": ["q_proj", "embed_tokens"]}),
    "no growth, saved all the same": ("own head", TOKENS, ENDS | {"save": True}),
    "rows of some tokens": ("own head", TOKENS, {"trainable_token_indices": [1, 5, 7]}),
    "rows of some tokens of one matrix": ("tied", TOKENS, {"trainable_token_indices": [1, 5, 7]}),
    "rows of each end": ("own head", TOKENS, {"trainable_token_indices": {"embed_tokens": [1, 5], "lm_head": [2]}}),
    "rows of new tokens": ("own head", 508, {"trainable_token_indices": [503, 507, 4]}),
    "rows of new tokens of one matrix": ("tied", 508, {"trainable_token_indices": [503, 507, 4]}),
}


@pytest.mark.parametrize("name", CASES)
def test_logits_over_all_rows_are_those_of_peft(name: str, bases: Bases, tmp_path: Path) -> None:
    kind, rows, options = CASES[name]
    grown, adapter = adapted(bases[kind], tmp_path, rows, **options)
    file = tmp_path / "made.gguf"
    _write_tokenizer(adapter, rows)
    _export(bases, kind, adapter, file)
    ids = tiny.random_ids(64, rows)
    expected, found = tiny.torch_logits(grown, adapter, ids), runtime.logits(file, ids)
    assert found.shape == expected.shape == (64, rows)
    divergence, same = tiny.divergence(expected, found)
    assert divergence < 1e-6
    assert same == 1


def test_every_format_has_the_rows_and_the_new_tokens(bases: Bases, both: tuple[Path, Path], tmp_path: Path) -> None:
    grown, adapter = both
    receipts = export(
        bases["own head"],
        {"f32": tmp_path / "made.gguf"},
        safetensors={"f32": tmp_path / "made"},
        onnx={"f32": tmp_path / "onnx"},
        adapter=adapter,
        tokenizer=adapter,
    )
    fields = GGUFReader(tmp_path / "made.gguf").fields
    assert fields["llama.vocab_size"].contents() == 508
    assert fields["tokenizer.ggml.tokens"].contents()[503:] == [f"<|new{number}|>" for number in range(5)]
    config = json.loads((tmp_path / "made" / "config.json").read_text())
    assert config["vocab_size"] == 508
    ids = tiny.random_ids(64, 508)
    expected = tiny.torch_logits(grown, adapter, ids)
    for found in (tiny.torch_logits(tmp_path / "made", None, ids), session.logits(tmp_path / "onnx", ids)):
        assert found.shape == expected.shape
        assert tiny.divergence(expected, found)[0] < 1e-6
    tokenizer = Tokenizer.from_file(str(tmp_path / "made" / "tokenizer.json"))
    assert tokenizer.token_to_id("<|new4|>") == 507
    for receipt in receipts:
        assert any("508 rows of embeddings, the base has 503" in note for note in receipt.notes)
        assert any("the values before training; left out" in note for note in receipt.notes)


def test_a_gguf_base_grows_too(bases: Bases, both: tuple[Path, Path], tmp_path: Path) -> None:
    grown, adapter = both
    export(bases["own head"], {"f32": tmp_path / "base.gguf"})
    for name, tokenizer in (("own", adapter), ("none", tmp_path / "base.gguf")):
        export(tmp_path / "base.gguf", {"f32": tmp_path / f"{name}.gguf"}, adapter=adapter, tokenizer=tokenizer)
        ids = tiny.random_ids(64, 508)
        assert (
            tiny.divergence(tiny.torch_logits(grown, adapter, ids), runtime.logits(tmp_path / f"{name}.gguf", ids))[0]
            < 1e-6
        )
    tokens = GGUFReader(tmp_path / "none.gguf").fields["tokenizer.ggml.tokens"].contents()
    assert tokens[503:] == [f"[PAD{number}]" for number in range(503, 508)]


def test_a_gguf_base_grows_in_every_format(bases: Bases, both: tuple[Path, Path], tmp_path: Path) -> None:
    grown, adapter = both
    export(bases["own head"], {"f32": tmp_path / "base.gguf"})
    folders = {"f32": tmp_path / "made"}, {"f32": tmp_path / "onnx"}
    export(tmp_path / "base.gguf", safetensors=folders[0], onnx=folders[1], adapter=adapter)
    ids = tiny.random_ids(64, 508)
    expected = tiny.torch_logits(grown, adapter, ids)
    for found in (tiny.torch_logits(tmp_path / "made", None, ids), session.logits(tmp_path / "onnx", ids)):
        assert found.shape == expected.shape
        assert tiny.divergence(expected, found)[0] < 1e-6
    for folder in ("made", "onnx"):
        assert Tokenizer.from_file(str(tmp_path / folder / "tokenizer.json")).token_to_id("<|new4|>") == 507


def test_rows_without_tokens_are_noted(bases: Bases, both: tuple[Path, Path], tmp_path: Path) -> None:
    shutil.copytree(both[1], tmp_path / "adapter", ignore=shutil.ignore_patterns("tokenizer*"))
    (receipt,) = export(bases["own head"], {"f32": tmp_path / "made.gguf"}, adapter=tmp_path / "adapter")
    assert any("no tokenizer beside the adapter" in note for note in receipt.notes)


def test_tokens_past_the_rows_of_the_adapter_are_left_out(
    bases: Bases, both: tuple[Path, Path], tmp_path: Path
) -> None:
    shutil.copytree(both[1], tmp_path / "adapter")
    _write_tokenizer(tmp_path / "adapter", 510)
    (receipt,) = export(bases["own head"], {"f32": tmp_path / "made.gguf"}, adapter=tmp_path / "adapter")
    tokens = GGUFReader(tmp_path / "made.gguf").fields["tokenizer.ggml.tokens"].contents()
    assert tokens[503:] == [f"<|new{number}|>" for number in range(5)]
    said = "the embedding has 508 rows, none for the tokens '<|new5|>' (508), '<|new6|>' (509): left out"
    assert said in receipt.notes


def test_a_gguf_adapter_cannot_change_the_vocabulary(bases: Bases, both: tuple[Path, Path], tmp_path: Path) -> None:
    with pytest.raises(AdapterError, match=r"508 rows of embeddings and the base 503: llama\.cpp applies") as raised:
        export(bases["own head"], lora={"f32": tmp_path / "a.gguf"}, adapter=both[1])
    assert raised.value.hint == "Write the merged model instead: --format gguf"


def test_a_gguf_adapter_cannot_replace_rows(bases: Bases, tmp_path: Path) -> None:
    _, adapter = adapted(bases["own head"], tmp_path, trainable_token_indices=[1, 5])
    with pytest.raises(AdapterError, match="rows of it are replaced"):
        export(bases["own head"], lora={"f32": tmp_path / "a.gguf"}, adapter=adapter)


# -- what is refused ---------------------------------------------------------------------------------------------------

Tensors = dict[str, NDArray[Any]]
HEAD = "base_model.model.lm_head."
EMBEDDING = "base_model.model.model.embed_tokens."


def _without(*beginnings: str) -> Callable[[Tensors], Tensors]:
    return lambda tensors: {name: value for name, value in tensors.items() if not name.startswith(beginnings)}


def _unequal(tensors: Tensors) -> Tensors:
    return tensors | {f"{HEAD}weight": tensors[f"{HEAD}weight"] + np.float32(1)}


def _shorter(tensors: Tensors) -> Tensors:
    return _without(HEAD)(tensors) | {f"{HEAD}weight": tensors[f"{HEAD}weight"][:507]}


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (_unequal, "lm_head.modules_to_save.weight and .*lm_head.weight are one tensor with different numbers"),
        (
            _without(HEAD),
            "trained with 508 rows of embeddings, the base has 503, and the adapter has no lm_head.weight",
        ),
        (_without(EMBEDDING), "and the adapter has no model.embed_tokens.weight of 508 rows"),
        (_shorter, "508 rows of embeddings, the base has 503, and the adapter has no lm_head.weight of 508 rows"),
    ],
)
def test_ends_that_do_not_belong_together_are_refused(
    change: Callable[[Tensors], Tensors], message: str, bases: Bases, both: tuple[Path, Path], tmp_path: Path
) -> None:
    shutil.copytree(both[1], tmp_path / "adapter")
    tensors = load_file(both[1] / "adapter_model.safetensors")
    save_file(change(tensors), tmp_path / "adapter" / "adapter_model.safetensors")
    with pytest.raises(AdapterError, match=message) as raised:
        _export(bases, "own head", tmp_path / "adapter", tmp_path / "made.gguf")
    if "508 rows" in message:
        assert "model.resize_token_embeddings(508)" in (raised.value.hint or "")


def test_a_pair_over_a_grown_embedding_that_is_not_there_is_refused(bases: Bases, tmp_path: Path) -> None:
    _, adapter = adapted(bases["own head"], tmp_path, 508, target_modules=["q_proj", "embed_tokens", "lm_head"])
    tensors = load_file(adapter / "adapter_model.safetensors")
    kept = {name: value for name, value in tensors.items() if ".base_layer." not in name}
    save_file(kept, adapter / "adapter_model.safetensors")
    with pytest.raises(AdapterError, match="508 rows of embeddings, the base has 503, and the adapter has no"):
        _export(bases, "own head", adapter, tmp_path / "made.gguf")


@pytest.mark.parametrize("kind", ["head", "rows"])
def test_a_damaged_matrix_is_that_of_the_adapter(kind: str, bases: Bases, tmp_path: Path) -> None:
    options: dict[str, Any] = {"trainable_token_indices": [1, 5]} if kind == "rows" else ENDS
    _, adapter = adapted(bases["own head"], tmp_path, **options)
    tensors = load_file(adapter / "adapter_model.safetensors")
    name = next(name for name in tensors if "lora" not in name)
    tensors[name][0, 0] = np.nan
    save_file(tensors, adapter / "adapter_model.safetensors")
    with pytest.raises(EdgetuneError, match=re.escape(name)) as raised:
        _export(bases, "own head", adapter, tmp_path / "made.gguf")
    assert (raised.value.hint or "").startswith(("The adapter is damaged", "Save it again"))
