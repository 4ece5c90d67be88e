"""A few steps of training under each real template: every kind of prompt, turn and stop token reaches the trainer."""

from __future__ import annotations

import json
import math
from pathlib import Path

import pytest

from edgetune.training.run import train
from tests.converters import vocabularies
from tests.data.template_tokenizers import tokenizer_for
from tests.data.test_real_templates import OPTIONS, TEMPLATES
from tests.training import runs

NEEDS_TOOLS = ("CohereForAI-c4ai-command-r-plus-tool_use", "NousResearch-Hermes-2-Pro-Llama-3-8B-tool_use",
               "NousResearch-Hermes-3-Llama-3.1-8B-tool_use")  # fmt: skip
NOT_TRAINED = ("llama-cpp-rwkv-world",)
"""Refused for every row, since it has no stop token."""


def _make_base(folder: Path, name: str) -> Path:
    """A random Llama with the template, and a tokenizer with its tags."""
    import torch
    import transformers

    folder.mkdir()
    vocabularies.byte_level(folder)
    tokenizer = tokenizer_for(name, TEMPLATES[name], folder)
    stops = [tokenizer.text_of(id_) for id_ in tokenizer.declared_stops]
    named = {"bos_token": "<s>", "eos_token": stops[0], "pad_token": "<pad>", "add_bos_token": False}
    vocabularies.save(tokenizer.backend, folder, chat_template=TEMPLATES[name], **named)
    (folder / "generation_config.json").write_text(json.dumps({"eos_token_id": list(tokenizer.declared_stops)}))
    size = -(-tokenizer.backend.get_vocab_size() // 64) * 64
    shape = {**runs.SHAPE, "vocab_size": size, "max_position_embeddings": 8192}
    torch.manual_seed(0)
    model = transformers.LlamaForCausalLM(transformers.LlamaConfig(**shape))
    model.to(torch.bfloat16).save_pretrained(folder)
    return folder


@pytest.mark.slow
@pytest.mark.parametrize("name", [name for name in TEMPLATES if name not in (*NEEDS_TOOLS, *NOT_TRAINED)])
def test_a_few_steps_are_trained_under_a_real_template(tmp_path: Path, name: str) -> None:
    base = _make_base(tmp_path / "base", name)
    values = runs.settings(base, tmp_path, max_steps=2, batch_size=2, max_length=8192, eval_steps=2, save_steps=2)
    values["template"] = {"options": OPTIONS.get(name, {})}
    values["data"] |= {"max_rows": 8, "validation": str(runs.write_rows(tmp_path / "held.jsonl", 2, 90))}
    values["data"] |= {"test": str(runs.write_rows(tmp_path / "test.jsonl", 2, 70))}
    values["reference"] = {"rows": 2, "task_rows": 2, "max_new_tokens": 4}
    run = train(runs.write_config(tmp_path / "config.yaml", values), tmp_path / "run")
    assert run.train_results.steps == 2
    assert math.isfinite(run.train_results.eval_loss)
    assert run.manifest.template_options == OPTIONS.get(name, {})
