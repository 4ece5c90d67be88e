"""Rows of tokens that are trained alone, of old tokens and of new ones: what is stored, and the exported files."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import peft
import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM

from edgetune.config import parse_config
from edgetune.planning.base_model import Base, find_base
from edgetune.training import adapters
from edgetune.training.loading import load_model
from tests.converters import runtime, tiny
from tests.export_requests import export

F32_KLD = 1e-8
OLD, NEW = ["a", "b"], ["hello there", "lamp"]


def _base(name: str, tmp_path: Path, new: list[str]) -> tuple[Base, Any]:
    """A base of 523 rows, and the configuration of a training of some of its tokens."""
    path = tiny.base(name, tmp_path / "base")
    config = parse_config({
        "base": str(path), "data": {"train": "rows.jsonl"}, "quantization": {"bits": 16},
        "adapter": {"kind": "trainable-tokens", "tokens": OLD, "new_tokens": new},
    })  # fmt: skip
    return find_base(config), config


def _many(count: int) -> list[str]:
    """More new tokens than the embedding has rows for."""
    return [*NEW, *(f"<new {number}>" for number in range(count))]


def _trained(base: Base, config: Any) -> Any:
    model = adapters.add_adapter(load_model(base, config), config.adapter, base.layers)
    torch.manual_seed(1)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter.add_(torch.randn_like(parameter) * 0.3)
    return model.eval()


def _logits(model: Any, ids: list[int]) -> np.ndarray[Any, Any]:
    with torch.no_grad():
        return np.asarray(model(torch.tensor([ids])).logits[0].float().numpy())


def _ids(base: Base, config: Any) -> list[int]:
    known = base.layers.token_ids([*config.adapter.tokens, *config.adapter.added])
    return [*(id_ for id_ in known.values() if id_ is not None), *tiny.random_ids(60)]


@pytest.mark.parametrize("extra", [0, 300])
@pytest.mark.parametrize("name", ["llama", "qwen3"])
def test_an_exported_file_answers_as_the_model_with_the_trained_rows(name: str, extra: int, tmp_path: Path) -> None:
    base, config = _base(name, tmp_path, _many(extra))
    model = _trained(base, config)
    rows = model.get_input_embeddings().weight.shape[0]
    assert rows == base.rows
    assert (rows > 523) == bool(extra)
    model.save_pretrained(tmp_path / "adapter")
    export(
        base.path, {"f32": tmp_path / "f32.gguf"}, safetensors={"f32": tmp_path / "merged"},
        adapter=tmp_path / "adapter", tokenizer=base.directory,
    )  # fmt: skip
    ids = _ids(base, config)
    trained = _logits(model, ids)
    with model.disable_adapter():
        assert tiny.divergence(trained, _logits(model, ids))[0] > 1e-3
    kld, same = tiny.divergence(trained, runtime.logits(tmp_path / "f32.gguf", ids))
    assert (kld < F32_KLD, same) == (True, 1.0)
    merged = AutoModelForCausalLM.from_pretrained(tmp_path / "merged").eval()
    assert merged.config.vocab_size == rows
    assert np.allclose(_logits(merged, ids), trained, atol=1e-4)


@pytest.mark.parametrize("name", ["llama", "qwen3"])
def test_peft_reads_what_is_stored(name: str, tmp_path: Path) -> None:
    base, config = _base(name, tmp_path, _many(300))
    model = _trained(base, config)
    model.save_pretrained(tmp_path / "adapter")
    stated = json.loads((tmp_path / "adapter" / "adapter_config.json").read_text())
    assert stated["peft_type"] == "TRAINABLE_TOKENS"
    shapes = {tuple(rows.shape) for rows in load_file(tmp_path / "adapter" / "adapter_model.safetensors").values()}
    assert shapes == {(len(OLD) + len(NEW) + 300, 96)}
    theirs = peft.PeftModel.from_pretrained(load_model(base, config), tmp_path / "adapter").eval()
    ids = _ids(base, config)
    assert np.allclose(_logits(theirs, ids), _logits(model, ids), atol=1e-5)


def test_a_new_row_starts_as_the_mean_of_its_former_tokens(tmp_path: Path) -> None:
    base, config = _base("llama", tmp_path, _many(300))
    before = AutoModelForCausalLM.from_pretrained(base.path, dtype=torch.float32).get_input_embeddings().weight
    from tokenizers import Tokenizer

    own = Tokenizer.from_file(str(base.own_directory / "tokenizer.json"))
    pieces = own.encode("hello there", add_special_tokens=False).ids
    id_ = base.layers.token_ids(["hello there"])["hello there"]
    row = load_model(base, config).get_input_embeddings().weight[id_]
    assert len(pieces) > 1
    assert torch.allclose(row, before[pieces].mean(0), atol=1e-6)


def test_a_text_with_a_new_token_is_one_token_there(tmp_path: Path) -> None:
    from tokenizers import Tokenizer

    base, _ = _base("llama", tmp_path, NEW)
    tokenizer = Tokenizer.from_file(str(base.directory / "tokenizer.json"))
    ids = tokenizer.encode("say hello there now", add_special_tokens=False).ids
    assert base.layers.token_ids(["hello there"])["hello there"] in ids
    assert tokenizer.decode(ids) == "say hello there now"
