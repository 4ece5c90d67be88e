"""Pretrain the base model from scratch: tokenizer and weights, from the text of make_corpus.py.

    python pretrain.py --out base            about 20 minutes on two cores; needs edgetune[train]

Every row of a batch is one document from its first token on, as in fine-tuning, and rows of like length share a
batch, so nothing is packed and little is padded. The loss counts what the assistant says and running text, not what
the user says. Muon moves the matrices, AdamW the embedding and the norms. The run is seeded; CPUs round
bf16 products differently, so the committed weights, not the script, are the reference.
"""

from __future__ import annotations

import argparse
import itertools
import math
import random
import time
from collections.abc import Iterator
from pathlib import Path

import torch  # noqa: TID251  (a training script of its own)
from make_corpus import Document, documents
from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import GenerationConfig, LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

VOCABULARY = 2048
CONTEXT = 512
TOKENIZER_DOCUMENTS = 20_000
SHARD_DOCUMENTS = 4096  # sorted by length and cut into batches together
IGNORED = -100

PAD, START, END = "<|endoftext|>", "<|im_start|>", "<|im_end|>"
# The pre-tokenizer of Qwen2, to the letter: llama.cpp knows it as "qwen2".
PIECES = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}"
    r"| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)
CHAT_TEMPLATE = (
    "{% for message in messages %}"
    "{{ '<|im_start|>' + message['role'] + '\\n' + message['content'] + '<|im_end|>' + '\\n' }}"
    "{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\\n' }}{% endif %}"
)


def train_tokenizer(seed: int) -> PreTrainedTokenizerFast:
    """A byte-level BPE of the corpus's own, holding all 256 bytes."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(Regex(PIECES), behavior="isolated"),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
        ]
    )
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=VOCABULARY,
        special_tokens=[PAD, START, END],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    corpus = documents(seed, TOKENIZER_DOCUMENTS)
    words = (f"{turn['role']}\n{turn['content']}" for document in corpus for turn in document)
    tokenizer.train_from_iterator(words, trainer)
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        pad_token=PAD,
        eos_token=END,
        additional_special_tokens=[START],
        chat_template=CHAT_TEMPLATE,
        clean_up_tokenization_spaces=False,
        model_max_length=CONTEXT,
    )


Row = tuple[list[int], list[int]]  # token ids, labels


class Encoder:
    """Turns documents into token ids and labels."""

    def __init__(self, tokenizer: PreTrainedTokenizerFast) -> None:
        self._encode = tokenizer.backend_tokenizer.encode
        self._end = tokenizer.convert_tokens_to_ids(END)
        self._newline = self._ids("\n")

    def _ids(self, text: str) -> list[int]:
        ids: list[int] = self._encode(text, add_special_tokens=False).ids
        return ids

    def __call__(self, document: Document) -> Row:
        """The ids of a document and its labels: what the user says and the template's own tokens are ignored."""
        ids: list[int] = []
        labels: list[int] = []
        for turn in document:
            chat = turn["role"] != "text"
            head = self._ids(f"{START}{turn['role']}\n") if chat else []
            body = [*self._ids(turn["content"]), self._end]
            tail = self._newline if chat else []
            ids += head + body + tail
            labels += [IGNORED] * len(head) + (body if turn["role"] != "user" else [IGNORED] * len(body))
            labels += [IGNORED] * len(tail)
        return ids, labels


Batch = tuple[torch.Tensor, torch.Tensor]


def batches(encode: Encoder, seed: int, batch_tokens: int, pad: int) -> Iterator[Batch]:
    """Endless batches of about so many tokens; shard by shard, every shard with documents never used before."""
    for shard in itertools.count(1):
        fresh = documents(seed * 1_000_003 + shard, SHARD_DOCUMENTS)
        rows = sorted((encode(document) for document in fresh), key=lambda row: len(row[0]))
        groups: list[list[Row]] = [[]]
        for row in rows:
            if len(row[0]) * (len(groups[-1]) + 1) > batch_tokens:
                groups.append([])
            groups[-1].append(row)
        random.Random(shard).shuffle(groups)
        for group in groups:
            width = max(len(ids) for ids, _ in group)
            yield (
                torch.tensor([ids + [pad] * (width - len(ids)) for ids, _ in group]),
                torch.tensor([labels + [IGNORED] * (width - len(labels)) for _, labels in group]),
            )


def build_model(tokenizer: PreTrainedTokenizerFast, layers: int, feed_forward: int) -> LlamaForCausalLM:
    """A small Llama, every matrix row of which divides into K-quant blocks of 256."""
    config = LlamaConfig(
        vocab_size=VOCABULARY,
        hidden_size=256,
        intermediate_size=feed_forward,
        num_hidden_layers=layers,
        num_attention_heads=8,
        num_key_value_heads=4,
        head_dim=32,
        max_position_embeddings=CONTEXT,
        rms_norm_eps=1e-5,
        tie_word_embeddings=True,
        bos_token_id=None,
        eos_token_id=tokenizer.convert_tokens_to_ids(END),
        pad_token_id=tokenizer.convert_tokens_to_ids(PAD),
    )
    model = LlamaForCausalLM(config)
    model.set_attn_implementation("eager")  # on rows this short it takes half the time of the fused kernel's backward
    return model


def build_optimizers(model: LlamaForCausalLM, rate: float) -> list[torch.optim.Optimizer]:
    """Muon for the matrices between layers, AdamW for the tied embedding and the norms."""
    named = dict(model.named_parameters())
    matrices = [p for n, p in named.items() if p.ndim == 2 and "embed_tokens" not in n]
    norms = [p for p in named.values() if p.ndim == 1]
    embedding = [p for n, p in named.items() if "embed_tokens" in n]
    return [
        torch.optim.Muon(matrices, lr=rate, weight_decay=0.05, momentum=0.95, adjust_lr_fn="match_rms_adamw"),
        torch.optim.AdamW(
            [{"params": embedding, "weight_decay": 0.01}, {"params": norms, "weight_decay": 0.0}],
            lr=rate,
            betas=(0.9, 0.98),
        ),
    ]


def rate_factor(done: float, warmup: float = 0.02) -> float:
    """The learning rate over the run: a short rise, then a cosine down to a hundredth."""
    if done < warmup:
        return done / warmup
    return 0.01 + 0.99 * 0.5 * (1 + math.cos(math.pi * (done - warmup) / (1 - warmup)))


def loss_of(model: LlamaForCausalLM, ids: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
    """The mean loss of the counted tokens; the head is applied at those positions only, a third of all."""
    with torch.autocast("cpu", dtype=torch.bfloat16):
        hidden = model.model(input_ids=ids, use_cache=False).last_hidden_state[:, :-1]
        following = labels[:, 1:]
        counted = following != IGNORED
        logits = model.lm_head(hidden[counted])
    return torch.nn.functional.cross_entropy(logits.float(), following[counted])


def train(model: LlamaForCausalLM, stream: Iterator[Batch], steps: int, rate: float) -> int:
    """Train for so many steps and return the number of tokens seen."""
    optimizers = build_optimizers(model, rate)
    schedules = [
        torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: rate_factor(step / steps)) for optimizer in optimizers
    ]
    model.train()
    began, seen = time.monotonic(), 0
    for step, (ids, labels) in enumerate(itertools.islice(stream, steps), start=1):
        loss = loss_of(model, ids, labels)
        torch.autograd.backward(loss)
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        for optimizer, schedule in zip(optimizers, schedules, strict=True):
            optimizer.step()
            schedule.step()
            optimizer.zero_grad(set_to_none=True)
        seen += ids.numel()
        if step % 20 == 0 or step == steps:
            minutes = (time.monotonic() - began) / 60
            left = minutes / step * (steps - step)
            speed = seen / minutes / 60
            print(
                f"step {step}/{steps}  loss {loss.item():.4f}  {speed:,.0f} tokens/s  {left:.1f} min left", flush=True
            )
    return seen


def save(model: LlamaForCausalLM, tokenizer: PreTrainedTokenizerFast, out: Path) -> None:
    """Write a Hugging Face directory in bf16."""
    model.generation_config = GenerationConfig(
        eos_token_id=model.config.eos_token_id, pad_token_id=model.config.pad_token_id, do_sample=False
    )
    model.to(torch.bfloat16).save_pretrained(out)
    tokenizer.save_pretrained(out)


def main() -> None:
    """Train the tokenizer, then the model, and save both."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, default=Path(__file__).parent / "base")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--steps", type=int, default=2400)
    parser.add_argument("--batch-tokens", type=int, default=4096)
    parser.add_argument("--learning-rate", type=float, default=3e-3)
    parser.add_argument("--layers", type=int, default=4)
    parser.add_argument("--feed-forward", type=int, default=512)
    options = parser.parse_args()
    torch.manual_seed(options.seed)
    tokenizer = train_tokenizer(options.seed)
    model = build_model(tokenizer, options.layers, options.feed_forward)
    print(f"{model.num_parameters():,} parameters, {len(tokenizer)} tokens in the vocabulary", flush=True)
    stream = batches(Encoder(tokenizer), options.seed, options.batch_tokens, model.config.pad_token_id)
    seen = train(model, stream, options.steps, options.learning_rate)
    save(model, tokenizer, options.out)
    print(f"{seen:,} tokens seen; saved to {options.out}")


if __name__ == "__main__":
    main()
