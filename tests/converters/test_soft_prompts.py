"""Soft prompts become rows of the vocabulary: the files compute and generate what PEFT does."""

from __future__ import annotations

import json
from pathlib import Path

import llama_cpp
import numpy as np
import pytest
from safetensors.numpy import load_file, save_file
from tokenizers import Tokenizer

from edgetune_converters.errors import AdapterError, ArchitectureError, TokenizerError
from edgetune_converters.gguf import reader
from tests.converters import family_models, runtime, soft_prompts, tiny, vocabularies
from tests.converters.onnx import session
from tests.converters.soft_prompts import COUNT
from tests.export_requests import export

ROWS = 523
TOKENS = 503  # of the tiny tokenizer: 20 rows of the embedding are unused
IDS = tiny.random_ids(60, TOKENS)
# f32 against f32: the order of sums; activations of llama.cpp are tables of 16-bit floats
FLOOR = 1e-8
CHAT = "{% for m in messages %}<|im_start|>{{ m.role }}\n{{ m.content }}<|im_end|>\n{% endfor %}<|im_start|>assistant\n"


def soft_ids(first: int) -> list[int]:
    return list(range(first, first + COUNT))


@pytest.mark.parametrize("family", ["llama", "gemma3", "granite", "gpt2", "qwen3"])
def test_logits_are_those_of_peft_where_the_embedding_has_unused_rows(family: str, tmp_path: Path) -> None:
    base = family_models.base(family, tmp_path / "base")
    adapter = soft_prompts.write("prompt-tuning", base, tmp_path / "adapter")
    (receipt,) = export(base, {"f32": tmp_path / "f32.gguf"}, adapter=adapter)
    place = soft_prompts.place(reader.read(tmp_path / "f32.gguf").metadata)
    assert (place["first"], place["added"]) == (TOKENS, 0)
    wanted = soft_prompts.logits(base, adapter, IDS)
    found = runtime.logits(tmp_path / "f32.gguf", [*soft_ids(TOKENS), *IDS])[COUNT:]
    assert found.shape == wanted.shape  # nothing is added: the whole distribution is that of PEFT
    kld, same = tiny.divergence(wanted, found)
    assert kld < (1e-6 if family in ("gemma3", "gpt2") else FLOOR)
    assert same == 1
    assert any("unused by the base" in note for note in receipt.notes)


@pytest.mark.parametrize("name", ["llama", "llama-tied", "qwen2"])
def test_new_rows_have_the_mean_logit_and_change_nothing_else(name: str, tmp_path: Path) -> None:
    base = tiny.base(name, tmp_path / "base", vocab_size=TOKENS)
    adapter = soft_prompts.write("prompt-tuning", base, tmp_path / "adapter")
    export(base, {"f32": tmp_path / "f32.gguf"}, adapter=adapter)
    wanted = soft_prompts.logits(base, adapter, IDS)
    found = runtime.logits(tmp_path / "f32.gguf", [*soft_ids(TOKENS), *IDS])[COUNT:]
    assert found.shape[1] == TOKENS + COUNT
    kld, same = tiny.divergence(wanted, found[:, :TOKENS])
    assert (kld < FLOOR, same) == (True, 1)
    new = found[:, TOKENS:]
    assert np.abs(new - found[:, :TOKENS].mean(1, keepdims=True)).max() < 1e-4
    assert (new.max(1) < found[:, :TOKENS].max(1)).all()
    assert (np.exp(soft_prompts.log_softmax(found)[:, TOKENS:]) <= 1 / TOKENS).all()


@pytest.mark.parametrize("kind", ["p-tuning-mlp", "p-tuning-lstm", "multitask"])
def test_every_kind_of_soft_prompt_is_read(kind: str, tmp_path: Path) -> None:
    base = tiny.base("llama", tmp_path / "base")
    adapter = soft_prompts.write(kind, base, tmp_path / "adapter")
    task = 1 if kind == "multitask" else None
    export(base, {"f32": tmp_path / "f32.gguf"}, adapter=adapter, prompt_task=task)
    wanted = soft_prompts.logits(base, adapter, IDS, task)
    found = runtime.logits(tmp_path / "f32.gguf", [*soft_ids(TOKENS), *IDS])[COUNT:]
    kld, same = tiny.divergence(wanted, found)
    assert (kld < FLOOR, same) == (True, 1)


@pytest.mark.parametrize("rows", [ROWS, TOKENS])
def test_onnx_and_safetensors_hold_the_soft_prompt(rows: int, tmp_path: Path) -> None:
    base = tiny.base("qwen2", tmp_path / "base", vocab_size=rows)
    adapter = soft_prompts.write("prompt-tuning", base, tmp_path / "adapter")
    _assert_onnx_and_safetensors_are_peft(base, adapter, rows, tmp_path)
    template = (tmp_path / "onnx" / "chat_template.jinja").read_text()
    assert template.startswith("".join(f"<|soft_{number}|>" for number in range(COUNT)) + "{% for")
    tokenizer = tiny.transformers.AutoTokenizer.from_pretrained(tmp_path / "st")
    conversation = [{"role": "user", "content": "Light on"}]
    found_ids = tokenizer.apply_chat_template(conversation, return_dict=False)
    before = tiny.transformers.AutoTokenizer.from_pretrained(base).apply_chat_template(conversation, return_dict=False)
    assert found_ids == soft_ids(TOKENS) + before


def test_stock_llama_cpp_generates_what_peft_generates(tmp_path: Path) -> None:
    base = tiny.base("llama-tied", tmp_path / "base", vocab_size=TOKENS)
    adapter = soft_prompts.write("prompt-tuning", base, tmp_path / "adapter")
    export(base, {"f32": tmp_path / "f32.gguf"}, adapter=adapter, chat_template=CHAT, onnx={"f32": tmp_path / "onnx"})
    prompt = "<|im_start|>user\nLight on<|im_end|>\n<|im_start|>assistant\n"
    plain = Tokenizer.from_file(str(base / "tokenizer.json")).encode(prompt).ids
    wanted = soft_prompts.generated(base, adapter, plain, 24)
    model = llama_cpp.Llama(str(tmp_path / "f32.gguf"), n_ctx=128, verbose=False)
    assert model.metadata["tokenizer.ggml.add_bos_token"] == "false"
    text = model.metadata["tokenizer.chat_template"].split("{%")[0] + prompt
    ids = model.tokenize(text.encode(), add_bos=False, special=True)
    assert ids == [*soft_ids(TOKENS), *plain]
    steps = model.generate(ids, temp=0.0, repeat_penalty=1.0)
    assert [next(steps) for _ in wanted] == wanted
    text_ids = list(ids)
    for token in wanted:  # ONNX Runtime, the whole text again for each token
        assert int(session.logits(tmp_path / "onnx", text_ids)[-1].argmax()) == token
        text_ids.append(token)


def test_bos_stands_behind_the_soft_prompt(tmp_path: Path) -> None:
    base = tiny.base("llama", tmp_path / "base")
    vocabularies.sentencepiece(base, bos=True)
    adapter = soft_prompts.write("prompt-tuning", base, tmp_path / "adapter")
    template = "[INST] {{ messages[0].content }} [/INST]"
    for source, begins in ((template, "<s>[INST] "), ("{{ bos_token }}" + template, "{{ bos_token }}[INST] ")):
        export(base, {"f32": tmp_path / "f32.gguf"}, adapter=adapter, chat_template=source)
        metadata = reader.read(tmp_path / "f32.gguf").metadata
        place = soft_prompts.place(metadata)
        texts = "".join(f"<|soft_{number}|>" for number in range(COUNT))
        assert str(metadata["tokenizer.chat_template"]).startswith(texts + begins)
        assert metadata["tokenizer.ggml.add_bos_token"] is False
        assert place["adds_bos"] is True
        rendered = texts + "<s>[INST] Light on [/INST]"
        (found,) = runtime.token_ids(tmp_path / "f32.gguf", [rendered], special=True)
        trained = Tokenizer.from_file(str(base / "tokenizer.json")).encode("[INST] Light on [/INST]").ids
        assert found == [*soft_ids(place["first"]), *trained]


def test_a_family_without_an_output_matrix_in_llama_cpp_is_refused(tmp_path: Path) -> None:
    base = family_models.base("gemma", tmp_path / "base")
    adapter = soft_prompts.write("prompt-tuning", base, tmp_path / "adapter")
    with pytest.raises(ArchitectureError, match=r"gguf: .* llama.cpp has none of its own for Gemma"):
        export(base, {"f32": tmp_path / "f32.gguf"}, adapter=adapter, safetensors={"f32": tmp_path / "st"})
    assert sorted(each.name for each in tmp_path.iterdir()) == ["adapter", "base"]


@pytest.mark.parametrize("rows", [ROWS, TOKENS])
@pytest.mark.parametrize("family", ["gemma", "gemma2", "command-r", "command-r7b"])
def test_a_family_without_an_output_matrix_in_llama_cpp_gets_one_in_the_other_formats(
    family: str, rows: int, tmp_path: Path
) -> None:
    base = family_models.base(family, tmp_path / "base", vocab_size=rows)
    adapter = soft_prompts.write("prompt-tuning", base, tmp_path / "adapter")
    _assert_onnx_and_safetensors_are_peft(base, adapter, rows, tmp_path)


def _assert_onnx_and_safetensors_are_peft(base: Path, adapter: Path, rows: int, folder: Path) -> None:
    """Export a base of `rows` tokens with a soft prompt to both formats, and compare logits with PEFT's."""
    export(base, adapter=adapter, onnx={"f32": folder / "onnx"}, safetensors={"f32": folder / "st"})
    wanted = soft_prompts.logits(base, adapter, IDS)
    text = [*soft_ids(TOKENS), *IDS]
    for found in (session.logits(folder / "onnx", text), tiny.torch_logits(folder / "st", None, text)):
        kld, same = tiny.divergence(wanted, found[COUNT:, :rows])
        assert (kld < FLOOR, same) == (True, 1)


def test_faults_of_a_soft_prompt_are_named(tmp_path: Path) -> None:
    base = tiny.base("qwen3", tmp_path / "base")
    out = {"f32": tmp_path / "f32.gguf"}
    adapter = soft_prompts.write("prompt-tuning", base, tmp_path / "adapter")
    with pytest.raises(AdapterError, match="a soft prompt changes no matrix"):
        export(base, lora={"f32": tmp_path / "lora.gguf"}, adapter=adapter)
    with pytest.raises(AdapterError, match="a task was named"):
        export(base, out, adapter=adapter, prompt_task=1)
    weights = adapter / "adapter_model.safetensors"
    values = load_file(weights)["prompt_embeddings"]
    for changed, message in (
        ({"prompt_embeddings": values * np.float32(np.nan)}, "holds NaN"),
        ({"prompt_embeddings": values[:, :8].copy()}, "has a width of 8, the base one of 96"),
        ({"prompt_embeddings": values[:3].copy()}, r"has the shape \[3, 96\]; adapter_config.json states"),
        ({"other": values}, "2 problems with the adapter"),
    ):
        save_file(changed, weights)
        with pytest.raises(AdapterError, match=message):
            export(base, out, adapter=adapter)
    several = soft_prompts.write("multitask", base, tmp_path / "several")
    for task, message in ((None, "the prompts of 3 tasks, and a file holds one"), (3, "has no task 3")):
        with pytest.raises(AdapterError, match=message):
            export(base, out, adapter=several, prompt_task=task)


def test_a_gguf_base_is_refused(tmp_path: Path) -> None:
    base = tiny.base("qwen3", tmp_path / "base")
    adapter = soft_prompts.write("prompt-tuning", base, tmp_path / "adapter")
    export(base, {"f32": tmp_path / "base.gguf"})
    with pytest.raises(TokenizerError, match="is a GGUF file, to which a soft prompt cannot add tokens"):
        export(tmp_path / "base.gguf", {"f32": tmp_path / "f32.gguf"}, adapter=adapter)


@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
def test_a_base_of_16_bits_grows_by_its_mean_row(dtype: str, tmp_path: Path) -> None:
    base = tiny.base("llama-tied", tmp_path / "base", vocab_size=TOKENS, dtype=dtype)
    adapter = soft_prompts.write("prompt-tuning", base, tmp_path / "adapter")
    export(base, adapter=adapter, safetensors={"f32": tmp_path / "st"})
    written = load_file(tmp_path / "st" / "model.safetensors")
    embedding, head = written["model.embed_tokens.weight"], written["lm_head.weight"]
    assert np.array_equal(embedding[:TOKENS], head[:TOKENS])
    assert np.array_equal(embedding[TOKENS:], load_file(adapter / "adapter_model.safetensors")["prompt_embeddings"])
    mean = head[:TOKENS].mean(0, dtype=np.float64)
    assert np.abs(head[TOKENS:] - mean).max() < 2**-9 * np.abs(mean).max()
    config = json.loads((tmp_path / "st" / "config.json").read_text())
    assert (config["vocab_size"], config["tie_word_embeddings"]) == (TOKENS + COUNT, False)
