"""A tiny base that learns rows by heart in seconds, with tokens for thoughts (not special) and channels (special)."""

from __future__ import annotations

from pathlib import Path

from edgetune.runs.directory import RunDirectory
from edgetune.training.run import train
from tests.cases.rendering import write_jsonl
from tests.converters import vocabularies
from tests.data import templates
from tests.training import runs

COLORS = ("red", "green", "blue", "white")


def make_base(folder: Path) -> Path:
    """The usual tiny base with larger embeddings, so that its logits can become sure."""
    import torch
    import transformers
    from tokenizers import AddedToken, Tokenizer

    base = runs.make_base(folder)
    torch.manual_seed(0)
    model = transformers.LlamaForCausalLM(transformers.LlamaConfig(**runs.SHAPE, initializer_range=0.1))
    with torch.no_grad():
        model.model.embed_tokens.weight.normal_(0, 0.4)
    model.to(torch.bfloat16).save_pretrained(base)
    tokenizer = Tokenizer.from_file(str(base / "tokenizer.json"))
    tokenizer.add_tokens([AddedToken(text, special=False, normalized=False) for text in ("<think>", "</think>")])
    tokenizer.add_special_tokens([AddedToken(text, normalized=False) for text in ("<|channel|>", "<|message|>")])
    vocabularies.save(
        tokenizer, base, eos_token="<|im_end|>", pad_token="<|endoftext|>", chat_template=templates.CHATML
    )
    return base


def write_rows(folder: Path, answer: str = "{color}") -> None:
    """Write train.jsonl, held.jsonl and test.jsonl with the question `lamp N color?`; the answers are learned."""
    rows = [
        {"messages": [{"role": "user", "content": f"lamp {number} {color}?"},
                      {"role": "assistant", "content": answer.replace("{color}", color)}]}
        for number in range(84)
        for color in [COLORS[number % 4]]
    ]  # fmt: skip
    for name, part in (("train", rows[:64]), ("held", rows[64:72]), ("test", rows[72:])):
        write_jsonl(folder / f"{name}.jsonl", part)


def train_by_heart(base: Path, folder: Path, template: str, *overrides: str, answer: str = "{color}") -> RunDirectory:
    """Train on 64 rows until they are known by heart."""
    folder.mkdir(parents=True, exist_ok=True)
    write_rows(folder, answer)
    (folder / "template.jinja").write_text(template, encoding="utf-8")
    (folder / "config.yaml").write_text(
        f"base: {base}\n"
        "data: {train: train.jsonl, validation: held.jsonl, test: test.jsonl, chat_template: template.jinja,\n"
        f"  choices: [{', '.join(COLORS)}]}}\n"
        "adapter: {r: 16, alpha: 32}\n"
        "training: {max_length: 96, max_steps: 80, batch_size: 8, learning_rate: 1.0e-2, logging_steps: 50,\n"
        "  save_steps: 1000}\n"
        "reference: {rows: 8, max_new_tokens: 64}\n"
        "export: {types: [q8_0]}\n",
        encoding="utf-8",
    )
    return train(folder / "config.yaml", folder / "run", overrides=overrides)
