"""Prefix tuning beside a file: keys and values that a runtime puts before every text, as PEFT does."""

from __future__ import annotations

import itertools
import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from safetensors.numpy import load_file

from edgetune.errors import RuntimeProblem
from edgetune.publish import model_card
from edgetune.runs.manifest import RunManifest
from edgetune.runtime import Sampling, load
from edgetune.runtime.llama.prefix import with_cache
from edgetune.runtime.prefix_state import PrefixState
from edgetune_converters.errors import AdapterError
from edgetune_converters.gguf import reader
from tests.converters import family_models, soft_prompts, tiny
from tests.export_requests import export
from tests.runtime.test_soft_prompts import FORMS, IDS, PROMPTS, scores, write


@pytest.mark.parametrize("kind", ["prefix-tuning", "prefix-tuning-projected"])
@pytest.mark.parametrize("form", FORMS)
def test_scores_and_answers_are_those_of_peft(form: str, kind: str, tmp_path: Path) -> None:
    base = tiny.base("llama-tied", tmp_path / "base", head_dim=32)
    adapter = soft_prompts.write(kind, base, tmp_path / "adapter", scale=1.0)
    with load(write(base, adapter, form, tmp_path), threads=1) as runtime:
        assert (runtime.vocabulary_size, runtime.trained_context) == (523, 256 - soft_prompts.COUNT)
        for found, ids in zip(scores(runtime, [IDS, *PROMPTS]), [IDS, *PROMPTS], strict=True):
            wanted = soft_prompts.logits(base, adapter, ids)[:-1]
            # the cache of llama.cpp is f16: about 1e-5 in models with such large logits
            assert tiny.divergence(wanted, found)[0] < (1e-4 if form == "gguf" else 1e-9)
            assert tiny.divergence(tiny.torch_logits(base, None, ids)[:-1], found)[0] > 1e-2
        wanted_tokens = [
            list(itertools.takewhile(lambda token: token not in runtime.stop_tokens, generated))
            for generated in (soft_prompts.generated(base, adapter, prompt, 10) for prompt in PROMPTS)
        ]
        assert [list(runtime.generate(prompt, max_tokens=10)) for prompt in PROMPTS] == wanted_tokens
        together = runtime.generate_batch(PROMPTS, Sampling(), [10] * len(PROMPTS))
        assert [completion.tokens for completion in together] == wanted_tokens


@pytest.mark.parametrize("family", ["qwen3", "gpt2", "phi2", "mistral"])
def test_prefixes_of_other_families(family: str, tmp_path: Path) -> None:
    base = family_models.base(family, tmp_path / "base")
    adapter = soft_prompts.write("prefix-tuning", base, tmp_path / "adapter", scale=1.0)
    wanted = soft_prompts.logits(base, adapter, IDS)[:-1]
    for form in ("gguf", "onnx"):
        with load(write(base, adapter, form, tmp_path), threads=1) as runtime:
            (found,) = scores(runtime, [IDS])
            assert tiny.divergence(wanted, found)[0] < (1e-4 if form == "gguf" else 1e-8)


def test_a_missing_or_foreign_prefix_is_refused(tmp_path: Path) -> None:
    base = tiny.base("qwen3", tmp_path / "base")
    adapter = soft_prompts.write("prefix-tuning", base, tmp_path / "adapter")
    (receipt,) = export(base, {"f32": tmp_path / "f32.gguf"}, adapter=adapter)
    assert any("other programs run the base alone" in note for note in receipt.notes)
    stated = json.loads(str(reader.read(tmp_path / "f32.gguf").metadata["edgetune.prefix"]))
    assert stated["tokens"] == soft_prompts.COUNT
    file = tmp_path / "f32.prefix.safetensors"
    assert load_file(file)["prefix.0.key"].shape == (1, soft_prompts.COUNT, 40)
    load(tmp_path / "f32.gguf", threads=1).close()
    content = file.read_bytes()
    file.write_bytes(content[:-4] + b"\0\0\0\1")
    with pytest.raises(RuntimeProblem, match="is not the prefix that was written with"):
        load(tmp_path / "f32.gguf")
    file.unlink()
    with pytest.raises(RuntimeProblem, match=r"its file .*f32\.prefix\.safetensors is missing"):
        load(tmp_path / "f32.gguf")


def test_the_model_card_says_what_other_programs_lack(tmp_path: Path) -> None:
    base = tiny.base("qwen3", tmp_path / "base")
    adapter = soft_prompts.write("prefix-tuning", base, tmp_path / "adapter")
    receipts = export(base, {"f32": tmp_path / "f32.gguf"}, onnx={"f32": tmp_path / "onnx"}, adapter=adapter)
    for receipt in receipts:
        card = model_card.format_card("model", [receipt], base, RunManifest())
        assert "The prefix of 7 keys and values lies beside the model" in card
    soft = soft_prompts.write("prompt-tuning", base, tmp_path / "soft")
    (receipt,) = export(base, {"f32": tmp_path / "soft.gguf"}, adapter=soft)
    assert "The chat template begins with the soft tokens" in model_card.format_card(
        "m", [receipt], base, RunManifest()
    )


@pytest.mark.parametrize("fields", [{"safetensors": {"f32": Path("st")}}, {"lora": {"f32": Path("lora.gguf")}}])
def test_formats_without_a_place_for_a_prefix_are_refused(fields: dict[str, Any], tmp_path: Path) -> None:
    base = tiny.base("qwen3", tmp_path / "base")
    adapter = soft_prompts.write("prefix-tuning", base, tmp_path / "adapter")
    placed: Any = {name: {key: tmp_path / path for key, path in paths.items()} for name, paths in fields.items()}
    with pytest.raises(AdapterError, match="has no place for a prefix of keys and values"):
        export(base, adapter=adapter, **placed)


def test_windows_of_attention_are_for_onnx_alone(tmp_path: Path) -> None:
    base = family_models.base("gemma3", tmp_path / "base")
    adapter = soft_prompts.write("prefix-tuning", base, tmp_path / "adapter", scale=1.0)
    with pytest.raises(AdapterError, match=r"keeps the keys and values of Gemma 3 .*in two caches"):
        write(base, adapter, "gguf", tmp_path)
    wanted = soft_prompts.logits(base, adapter, IDS)[:-1]
    with load(write(base, adapter, "onnx", tmp_path), threads=1) as runtime:
        assert tiny.divergence(wanted, scores(runtime, [IDS])[0])[0] < 1e-8


def test_a_prefix_of_another_base_is_refused(tmp_path: Path) -> None:
    base = tiny.base("qwen3", tmp_path / "base")
    adapter = soft_prompts.write("prefix-tuning", tiny.base("llama", tmp_path / "other"), tmp_path / "adapter")
    with pytest.raises(AdapterError, match="is for 3 layers with 2 heads of 40, the base has 3 layers with 1 heads of"):
        export(base, {"f32": tmp_path / "f32.gguf"}, adapter=adapter)


def test_a_state_of_another_layout_is_refused() -> None:
    arrays = [np.zeros((2, 3, 4), np.float32)]
    with pytest.raises(RuntimeProblem, match="in a way that a prefix cannot be written to"):
        with_cache(bytes(200), PrefixState(arrays, arrays), Path("model.gguf"))
