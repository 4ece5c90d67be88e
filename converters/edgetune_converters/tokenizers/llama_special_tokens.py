"""Tokens that llama.cpp takes for special ones by their text, whatever the file says of them.

It makes them control tokens: text that spells one is cut at it, and some end generation. A tokenizer may have such a
token as plain text ("</s>" in Qwen, which HTML spells too), and then llama.cpp would be wrong about it.
"""

from __future__ import annotations

from edgetune_converters.tokenizers.files import TokenizerFiles
from edgetune_converters.tokenizers.vocabulary import TokenTable, TokenType

STOP_TEXTS = (
    "<|eot_id|>", "<|im_end|>", "<|end|>", "<|return|>", "<|call|>", "<|flush|>", "<|calls|>", "<end_of_turn>",
    "<|endoftext|>", "</s>", "<|eom_id|>", "<EOT>", "_<EOT>", "[EOT]", "[EOS]", "<|end_of_text|>",
    "<end_of_utterance>", "<eos>", "<turn|>", "<|tool_response>", "<｜end▁of▁sentence｜>", "[e~[",
)  # fmt: skip
"""At these it ends generation."""

_FILL_IN = (
    "<|fim_prefix|>", "<fim-prefix>", "<fim_prefix>", "<｜fim▁begin｜>", "<PRE>", "▁<PRE>", "<|code_prefix|>",
    "<|prefix|>", "<|fim_suffix|>", "<fim-suffix>", "<fim_suffix>", "<｜fim▁hole｜>", "<SUF>", "▁<SUF>",
    "<|code_suffix|>", "<|suffix|>", "<|fim_middle|>", "<fim-middle>", "<fim_middle>", "<｜fim▁end｜>", "<MID>",
    "▁<MID>", "<|code_middle|>", "<|middle|>", "<|fim_pad|>", "<fim-pad>", "<fim_pad>", "<PAD>", "[PAD]",
    "<|fim_repo|>", "<|repo_name|>", "<fim-repo>", "<REPO>", "<reponame>", "<|file_sep|>", "<|channel|>",
    "<|message|>", "<|start|>", "<|constrain|>",
)  # fmt: skip
"""These belong to filling in the middle, and to one family's channels."""

SPECIAL_TEXTS = (*STOP_TEXTS, *_FILL_IN)


def rename_colliding_tokens(files: TokenizerFiles, table: TokenTable) -> list[str]:
    """Hide from llama.cpp those of its special texts that are plain tokens which no text is ever cut into.

    Their rows stay; only the name changes, which nobody can see. Returns those that text can become: they stay as they
    are, and llama.cpp cuts at them in more places than the tokenizer.
    """
    armed = []
    numbers = {text: number for number, text in enumerate(table.tokens)}
    for text in SPECIAL_TEXTS:
        number = numbers.get(text)
        if number is None or table.types[number] != TokenType.NORMAL:
            continue
        if any(number in ids for ids in files.encode([text, f"a{text}", f" {text}", f"a {text} b"])):
            armed.append(text)
            continue
        table.tokens[number] = f"[UNREACHABLE{number}]"
        table.types[number] = TokenType.UNUSED
    return armed
