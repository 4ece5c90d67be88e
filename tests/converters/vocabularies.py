"""Small tokenizers, trained in a second and saved as Hugging Face saves them."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from tokenizers import AddedToken, Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers, processors, trainers

from edgetune_converters.tokenizers import pretokenizers
from tests.converters import corpus

QWEN2 = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n]*"
    r"|\s*[\r\n]+|\s+(?!\S)|\s+"
)
LLAMA3 = QWEN2.replace(r"|\p{N}|", r"|\p{N}{1,3}|")
TEKKEN = (
    r"[^\r\n\p{L}\p{N}]?[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]*[\p{Ll}\p{Lm}\p{Lo}\p{M}]+|[^\r\n\p{L}\p{N}]?"
    r"[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]+[\p{Ll}\p{Lm}\p{Lo}\p{M}]*|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n/]*"
    r"|\s*[\r\n]+|\s+(?!\S)|\s+"
)

_BYTE_LEVEL = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
CUTTERS: dict[str, Any] = {
    "gpt-2": pre_tokenizers.ByteLevel(add_prefix_space=False),
    "smollm": pre_tokenizers.Sequence(
        [pre_tokenizers.Digits(individual_digits=True), pre_tokenizers.ByteLevel(add_prefix_space=False)]
    ),
    "qwen2": pre_tokenizers.Sequence([pre_tokenizers.Split(Regex(QWEN2), "isolated"), _BYTE_LEVEL]),
    "llama-bpe": pre_tokenizers.Sequence([pre_tokenizers.Split(Regex(LLAMA3), "isolated"), _BYTE_LEVEL]),
    "tekken": pre_tokenizers.Sequence([pre_tokenizers.Split(Regex(TEKKEN), "isolated"), _BYTE_LEVEL]),
}

TEMPLATE = "{% for m in messages %}<|im_start|>{{ m.role }}\n{{ m.content }}<|im_end|>\n{% endfor %}"


def byte_level(directory: Path, cutter: str = "qwen2", size: int = 500, **config: Any) -> Tokenizer:
    """Train a byte-level BPE with two ChatML tokens and save it with a tokenizer_config.json."""
    tokenizer = Tokenizer(models.BPE(ignore_merges=cutter in ("llama-bpe", "tekken")))
    tokenizer.pre_tokenizer = CUTTERS[cutter]
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=size,
        show_progress=False,
        special_tokens=["<|endoftext|>"],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
    )
    tokenizer.train_from_iterator(corpus.TRAINING, trainer)
    tokenizer.add_special_tokens(["<|im_start|>", "<|im_end|>"])
    tokenizer.add_tokens([AddedToken("<tool>", normalized=False)])
    save(tokenizer, directory, **{"eos_token": "<|im_end|>", "chat_template": TEMPLATE} | config)
    return tokenizer


def sentencepiece(
    directory: Path, size: int = 500, *, prefix: bool = False, bos: bool = False, over_lines: bool = True
) -> Tokenizer:
    """Train a BPE with byte fallback as converted from SentencePiece: every way of merging a token is listed.

    `over_lines`: include tokens with a line end next to other text.
    """
    normalizer: list[Any] = [normalizers.Replace(" ", "\u2581")]
    if prefix:
        normalizer.insert(0, normalizers.Prepend("\u2581"))
    trained = Tokenizer(models.BPE())
    trained.normalizer = normalizers.Sequence(normalizer)
    trained.pre_tokenizer = pre_tokenizers.Split("\u2581", "merged_with_next")
    trained.train_from_iterator(corpus.TRAINING, trainers.BpeTrainer(vocab_size=size - 259, show_progress=False))
    vocab = json.loads(trained.to_str())["model"]["vocab"]
    kept = {text: number for text, number in vocab.items() if over_lines or not text.strip("\n") or "\n" not in text}
    tokenizer = Tokenizer(_all_merges(kept))
    tokenizer.normalizer = normalizers.Sequence(normalizer)
    tokenizer.decoder = decoders.Sequence([decoders.Replace("\u2581", " "), decoders.ByteFallback(), decoders.Fuse()])
    tokenizer.add_special_tokens(["<unk>", "<s>", "</s>"])
    single = ("<s> " if bos else "") + "$A"
    tokenizer.post_processor = processors.TemplateProcessing(
        single=single, pair=single + " $B", special_tokens=[("<s>", 1)] if bos else []
    )
    save(tokenizer, directory, bos_token="<s>", eos_token="</s>", unk_token="<unk>")
    return tokenizer


def without_a_merge(directory: Path) -> Tokenizer:
    """The tokenizer of `directory` with one merge fewer, so that merging by score differs from merging by rank."""
    path = directory / "tokenizer.json"
    loaded = json.loads(path.read_text(encoding="utf-8"))
    loaded["model"]["merges"].pop(len(loaded["model"]["merges"]) // 2)
    path.write_text(json.dumps(loaded), encoding="utf-8")
    return Tokenizer.from_file(str(path))


def _all_merges(trained: dict[str, int]) -> models.BPE:
    """A model whose tokens merge in the order of their training, whichever way they are split."""
    pieces = ["<unk>", "<s>", "</s>", *(f"<0x{byte:02X}>" for byte in range(256))]
    pieces += sorted(trained, key=lambda piece: trained[piece])
    vocab = {piece: number for number, piece in enumerate(pieces)}
    merges = [
        (piece[:cut], piece[cut:])
        for piece in pieces[259:]
        for cut in range(1, len(piece))
        if piece[:cut] in trained and piece[cut:] in trained
    ]
    return models.BPE(vocab=vocab, merges=merges, unk_token="<unk>", byte_fallback=True, fuse_unk=True)


def cut_by(directory: Path, row: pretokenizers.PreTokenizerRow, size: int = 3000) -> Tokenizer:
    """A byte-level BPE that splits by the steps of a row of the table, trained on the text that verifies it."""
    tokenizer = Tokenizer(models.BPE(ignore_merges=row.ignore_merges))
    loaded = json.loads(tokenizer.to_str()) | {"pre_tokenizer": _cutter(row.steps)}
    tokenizer = Tokenizer.from_str(json.dumps(loaded))
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=size, show_progress=False, special_tokens=["<|endoftext|>"],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
    )  # fmt: skip
    tokenizer.train_from_iterator([*corpus.TRAINING, *corpus.TEXTS, *corpus.TEXTS], trainer)
    save(tokenizer, directory, eos_token="<|endoftext|>")
    return tokenizer


def _cutter(steps: tuple[str, ...]) -> dict[str, Any]:
    """Steps of the table as tokenizer.json writes them."""
    parts: list[dict[str, Any]] = []
    for step in steps:
        plain = step.removeprefix("after bytes: ")
        if plain.startswith("Punctuation:"):
            parts.append({"type": "Punctuation", "behavior": plain.removeprefix("Punctuation:")})
        elif plain == pretokenizers.GPT2:
            parts.append(_BYTES | {"use_regex": True})
        else:
            parts.append({"type": "Split", "pattern": {"Regex": plain}, "behavior": "Isolated", "invert": False})
    if not any(part["type"] == "ByteLevel" for part in parts):
        parts.append(_BYTES | {"use_regex": False})
    return {"type": "Sequence", "pretokenizers": parts}


_BYTES = {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": True}


def unigram(directory: Path, size: int = 400, **model: Any) -> Tokenizer:
    """A unigram tokenizer as in XLM-R and T5: split at white space, a mark before each word."""
    tokenizer = Tokenizer(models.Unigram())
    tokenizer.normalizer = normalizers.NFKC()  # the trainer reads text after the table of replacements
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence([pre_tokenizers.WhitespaceSplit(), pre_tokenizers.Metaspace()])
    trainer = trainers.UnigramTrainer(
        vocab_size=size, show_progress=False, special_tokens=["<pad>", "</s>", "<unk>"], unk_token="<unk>"
    )
    tokenizer.train_from_iterator(corpus.TRAINING, trainer)
    loaded = json.loads(tokenizer.to_str()) | {"normalizer": None}
    loaded["model"] |= model
    tokenizer = Tokenizer.from_str(json.dumps(loaded))
    tokenizer.add_tokens([AddedToken("<tool>", normalized=False)])
    tokenizer.post_processor = processors.TemplateProcessing(single="$A </s>", special_tokens=[("</s>", 1)])
    save(tokenizer, directory, eos_token="</s>", unk_token="<unk>", pad_token="<pad>")
    return tokenizer


def save(tokenizer: Tokenizer, directory: Path, **config: Any) -> None:
    """Write tokenizer.json and tokenizer_config.json."""
    directory.mkdir(parents=True, exist_ok=True)
    tokenizer.save(str(directory / "tokenizer.json"))
    (directory / "tokenizer_config.json").write_text(json.dumps(config), encoding="utf-8")
