"""SmolLM2-135M-Instruct from its Q4_1 GGUF file: transformers' own GGUF reader and llama.cpp give the same."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from edgetune_converters.reading.gguf_base import GgufBase
from edgetune_converters.reading.gguf_companions import write_companions
from tests import smollm2
from tests.converters import corpus, runtime, tiny
from tests.converters.tiny import torch, transformers
from tests.export_requests import export

pytestmark = pytest.mark.slow

ROUNDING = 2e-3
"""Of logits up to 30, after 30 layers in f32 whose products are summed in another order."""


@pytest.fixture(scope="module")
def file() -> Path:
    return smollm2.file()


@pytest.fixture(scope="module")
def rows() -> list[Any]:
    lines = (smollm2.SAMPLE / "data" / "test.jsonl").read_text(encoding="utf-8").splitlines()
    return [json.loads(line)["messages"] for line in lines]


@pytest.fixture(scope="module")
def theirs(file: Path) -> Any:
    """The tokenizer as transformers' own reader makes it."""
    return transformers.AutoTokenizer.from_pretrained(file.parent, gguf_file=file.name)


@pytest.fixture(scope="module")
def ids(theirs: Any, rows: list[Any]) -> list[int]:
    return list(theirs.apply_chat_template(rows[0] + rows[1] + rows[2], tokenize=True)["input_ids"])


@pytest.fixture(scope="module")
def directory(file: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    made = tmp_path_factory.mktemp("smollm2") / "m"
    export(file, safetensors={"f32": made})
    return made


@pytest.fixture(scope="module")
def expected(file: Path, ids: list[int]) -> Any:
    """The logits of transformers' own GGUF reader."""
    model = transformers.AutoModelForCausalLM.from_pretrained(
        file.parent, gguf_file=file.name, dtype=torch.float32,
        quantization_config=transformers.GgufConfig(dequantize=True),
    )  # fmt: skip
    with torch.no_grad():
        return model.eval()(torch.tensor([ids])).logits[0].numpy()


def test_the_logits_are_those_of_transformers_own_reader(directory: Path, expected: Any, ids: list[int]) -> None:
    found = tiny.torch_logits(directory, None, ids)
    assert np.abs(found - expected).max() < ROUNDING


def test_the_logits_are_those_of_llama_cpp(file: Path, expected: Any, ids: list[int], tmp_path: Path) -> None:
    export(file, {"f32": tmp_path / "x.gguf"})
    kld, _ = tiny.divergence(expected, runtime.logits(tmp_path / "x.gguf", ids))
    assert kld < 1e-6


def test_the_ids_are_those_of_llama_cpp_and_of_transformers(
    file: Path, theirs: Any, rows: list[Any], tmp_path: Path
) -> None:
    assert write_companions(GgufBase(file), tmp_path / "made") == []
    ours = transformers.AutoTokenizer.from_pretrained(tmp_path / "made")
    texts = [*corpus.TEXTS, *(ours.apply_chat_template(row, tokenize=False) for row in rows)]
    found = ours(texts, add_special_tokens=False)["input_ids"]
    assert found == runtime.token_ids(file, texts)
    # transformers' reader does not know llama.cpp's names: it splits as GPT-2 does, which leaves numbers whole
    plain = [text for text in texts if not any(letter.isnumeric() for letter in text)]
    assert len(plain) > 100
    assert ours(plain, add_special_tokens=False)["input_ids"] == theirs(plain, add_special_tokens=False)["input_ids"]
    assert (ours.eos_token, ours.bos_token, ours.chat_template) == (
        theirs.eos_token, theirs.bos_token, theirs.chat_template
    )  # fmt: skip


def test_rows_of_576_need_the_fallback(file: Path, tmp_path: Path) -> None:
    (receipt,) = export(file, {"q4_k_m": tmp_path / "x.gguf"}, allow_fallback=True)
    assert receipt.fallback_share > 0.5
    assert set(receipt.types) & {"q5_0", "q8_0", "q5_1"}
