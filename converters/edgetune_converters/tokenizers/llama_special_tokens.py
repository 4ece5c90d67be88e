"""Tokens that llama.cpp treats as special because of their text, whatever the file says about them.

It makes them control tokens: text that spells one is split at it, and some end generation. A tokenizer may have such a
token as plain text ("</s>" in Qwen, which is also HTML); then llama.cpp would tokenize it differently.
"""

from __future__ import annotations

from edgetune_converters.tokenizers.files import TokenizerFiles
from edgetune_converters.tokenizers.vocabulary import TokenTable, TokenType

STOP_TEXTS = (
    "<|eot_id|>", "<|im_end|>", "<|end|>", "<|return|>", "<|call|>", "<|flush|>", "<|calls|>", "<end_of_turn>",
    "<|endoftext|>", "</s>", "<|eom_id|>", "<EOT>", "_<EOT>", "[EOT]", "[EOS]", "<|end_of_text|>",
    "<end_of_utterance>", "<eos>", "<turn|>", "<|tool_response>", "<｜end▁of▁sentence｜>", "[e~[",
)  # fmt: skip
"""Generation ends at these."""

_FILL_IN = (
    "<|fim_prefix|>", "<fim-prefix>", "<fim_prefix>", "<｜fim▁begin｜>", "<PRE>", "▁<PRE>", "<|code_prefix|>",
    "<|prefix|>", "<|fim_suffix|>", "<fim-suffix>", "<fim_suffix>", "<｜fim▁hole｜>", "<SUF>", "▁<SUF>",
    "<|code_suffix|>", "<|suffix|>", "<|fim_middle|>", "<fim-middle>", "<fim_middle>", "<｜fim▁end｜>", "<MID>",
    "▁<MID>", "<|code_middle|>", "<|middle|>", "<|fim_pad|>", "<fim-pad>", "<fim_pad>", "<PAD>", "[PAD]",
    "<|fim_repo|>", "<|repo_name|>", "<fim-repo>", "<REPO>", "<reponame>", "<|file_sep|>", "<|channel|>",
    "<|message|>", "<|start|>", "<|constrain|>",
)  # fmt: skip
"""For fill-in-the-middle, and for the channels of one family."""

SPECIAL_TEXTS = (*STOP_TEXTS, *_FILL_IN)


def rename_colliding_tokens(files: TokenizerFiles, table: TokenTable) -> list[str]:
    """Rename plain tokens whose text llama.cpp treats as special, where no text is tokenized into them.

    Their rows keep their ids; only the text changes. Returns the colliding tokens that text can be tokenized into: they
    stay as they are, and llama.cpp splits at them in more places than the tokenizer.
    """
    colliding = []
    numbers = {text: number for number, text in enumerate(table.tokens)}
    for text in SPECIAL_TEXTS:
        number = numbers.get(text)
        if number is None or table.types[number] != TokenType.NORMAL:
            continue
        if any(number in ids for ids in files.encode([text, f"a{text}", f" {text}", f"a {text} b"])):
            colliding.append(text)
            continue
        table.tokens[number] = f"[UNREACHABLE{number}]"
        table.types[number] = TokenType.UNUSED
    return colliding
