"""A runtime puts the soft prompt of a file before every text, and is else that of the model of training."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from tokenizers import Tokenizer

from edgetune.data.text_tokenizer import TextTokenizer
from edgetune.errors import RuntimeProblem
from edgetune.runtime import Runtime, Sampling, load
from edgetune.runtime.hidden_mass import HiddenMass
from edgetune.runtime.soft_prompt import read_soft_prompt
from edgetune_converters.onnx.plan import OnnxSettings
from tests.converters import runtime as stock
from tests.converters import soft_prompts, tiny, vocabularies
from tests.converters.onnx import session
from tests.export_requests import export

IDS = tiny.random_ids(40, 503)
PROMPTS = [IDS[:12], IDS[12:17], IDS[17:36]]
FORMS = ("gguf", "onnx", "onnx-portable")


def write(base: Path, adapter: Path, form: str, folder: Path, **fields: Any) -> Path:
    path = folder / (form + ".gguf" * (form == "gguf"))
    if form == "gguf":
        export(base, {"f32": path}, adapter=adapter, **fields)
    else:
        settings = OnnxSettings(portable=form.endswith("portable"))
        export(base, adapter=adapter, onnx={"f32": path}, onnx_settings=settings, **fields)
    return path


def scores(runtime: Runtime, texts: list[list[int]]) -> list[Any]:
    positions = [np.arange(1, len(ids)) for ids in texts]
    arrays = [np.asarray(ids, np.int32) for ids in texts]
    found: list[list[Any]] = [[] for _ in texts]
    for index, block in runtime.score_batch(list(zip(arrays, positions, strict=True))):
        found[index].append(np.array(block))
    return [np.concatenate(blocks) for blocks in found]


@pytest.mark.parametrize("rows", [523, 503])
@pytest.mark.parametrize("form", FORMS)
def test_scores_and_answers_are_those_of_peft(form: str, rows: int, tmp_path: Path) -> None:
    base = tiny.base("llama-tied", tmp_path / "base", vocab_size=rows, head_dim=32)
    adapter = soft_prompts.write("prompt-tuning", base, tmp_path / "adapter")
    with load(write(base, adapter, form, tmp_path), threads=1) as runtime:
        assert (runtime.vocabulary_size, runtime.trained_context) == (rows, 256 - soft_prompts.COUNT)
        texts = [IDS, *PROMPTS, IDS[20:37]]  # two of nearly the same length, which may share a pass
        for found, ids in zip(scores(runtime, texts), texts, strict=True):
            wanted = soft_prompts.logits(base, adapter, ids)[:-1]
            # the cache of llama.cpp is f16: about 1e-5 in models with such large logits
            assert tiny.divergence(wanted, found)[0] < (1e-4 if form == "gguf" else 1e-9)
        wanted_tokens = [soft_prompts.generated(base, adapter, prompt, 10) for prompt in PROMPTS]
        assert [list(runtime.generate(prompt, max_tokens=10)) for prompt in PROMPTS] == wanted_tokens
        together = runtime.generate_batch(PROMPTS, Sampling(), [10] * len(PROMPTS))
        assert [completion.tokens for completion in together] == wanted_tokens


@pytest.mark.parametrize("form", FORMS)
def test_the_probability_of_the_added_rows_is_that_of_the_plain_library(form: str, tmp_path: Path) -> None:
    base = tiny.base("llama-tied", tmp_path / "base", vocab_size=503, head_dim=32)
    adapter = soft_prompts.write("prompt-tuning", base, tmp_path / "adapter")
    path = write(base, adapter, form, tmp_path)
    mass = HiddenMass()
    with load(path, threads=1) as runtime:
        assert runtime.hidden_rows == soft_prompts.COUNT
        plain = scores(runtime, [IDS, *PROMPTS])
        texts = [(np.asarray(ids, np.int32), np.arange(1, len(ids))) for ids in (IDS, *PROMPTS)]
        found: list[list[Any]] = [[] for _ in texts]
        for index, block in runtime.score_batch(texts, mass):
            found[index].append(np.array(block))
        for blocks, wanted in zip(found, plain, strict=True):
            assert np.array_equal(np.concatenate(blocks), wanted)  # the logits are the same
        assert scores(runtime, [IDS])[0].shape[1] == runtime.vocabulary_size  # and the rows are hidden again
        soft = list(range(503, 503 + soft_prompts.COUNT))
    given = [[*soft, *ids[:-1]] for ids in (IDS, *PROMPTS)]
    logits = [stock.logits(path, ids) if form == "gguf" else session.logits(path, ids) for ids in given]
    behind = np.concatenate([each[soft_prompts.COUNT :] for each in logits]).astype(np.float64)
    weights = np.exp(behind - behind.max(1, keepdims=True))
    shares = weights[:, 503:].sum(1) / weights.sum(1)
    assert mass.positions == len(shares)
    assert mass.mean == pytest.approx(shares.mean(), rel=1e-3)
    assert mass.largest == pytest.approx(shares.max(), rel=1e-3)
    assert mass.divergence == pytest.approx(-np.log1p(-shares).mean(), rel=1e-3)
    assert 0 < mass.largest <= soft_prompts.COUNT / 503  # each row has the mean logit: at most 1 / V


@pytest.mark.parametrize("form", ["gguf", "onnx"])
@pytest.mark.parametrize("begins", ["", "{{ bos_token }}"])
def test_template_and_ids_are_those_of_training(form: str, begins: str, tmp_path: Path) -> None:
    base = tiny.base("llama", tmp_path / "base")
    vocabularies.sentencepiece(base, bos=True)
    adapter = soft_prompts.write("prompt-tuning", base, tmp_path / "adapter")
    template = begins + "[INST] {{ messages[0].content }} [/INST]"
    tokenizer = TextTokenizer.of(Tokenizer.from_file(str(base / "tokenizer.json")), base)
    with load(write(base, adapter, form, tmp_path, chat_template=template), threads=1) as runtime:
        assert runtime.chat_template is not None
        assert runtime.chat_template.source == template
        text = "<s>" * bool(begins) + "[INST] Light on [/INST]"
        assert runtime.tokenize_chat([{"role": "user", "content": "Light on"}]) == tokenizer.encode(text)[0]
        assert runtime.tokenize("Light on") == tokenizer.encode("Light on")[0]


@pytest.mark.parametrize(
    ("stated", "why"),
    [
        ("{", "cannot be read"),
        ("[]", "cannot be read"),
        ({"first": 500, "count": 8, "added": 0, "adds_bos": False}, "8 tokens from 500 on are not in a vocabulary"),
        ({"first": 500, "count": 2, "added": 3, "adds_bos": False}, "3 of 2 tokens are added"),
        ({"first": 500, "count": 2}, "cannot be read"),
    ],
)
def test_damaged_metadata_are_refused(stated: Any, why: str) -> None:
    text = stated if isinstance(stated, str) else json.dumps(stated)
    with pytest.raises(RuntimeProblem, match=why):
        read_soft_prompt({"edgetune.soft_prompt": text}, 503)
