"""Finished run directories whose "trained model" is an f32 GGUF file: what it says is the reference."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from pathlib import Path

import numpy as np

from edgetune.config import parse_config
from edgetune.data.chat import ChatTemplate
from edgetune.planning.tokenizer_files import save_tokenizer
from edgetune.reference.codecs import F32
from edgetune.reference.scored_rows import ScoredRows
from edgetune.reference.writer import ReferenceWriter
from edgetune.runs.directory import RunDirectory
from edgetune.runtime import Finish, Runtime, Sampling, load
from edgetune_converters.reading.checkpoint import Checkpoint
from tests.converters import tiny
from tests.runtime import models

MAX_TOKENS = 6
QUESTIONS = ("dim the lights", "把卧室的灯调暗", "two  spaces and 12 numbers")


def held_out(count: int = 4, length: int = 40) -> ScoredRows:
    """Random rows of several lengths; the later two thirds of each are scored."""
    lengths = [length + 3 * i for i in range(count)]
    offsets = np.concatenate([[0], np.cumsum(lengths)])
    positions = [np.arange(start + size // 3, start + size) for start, size in zip(offsets, lengths, strict=False)]
    return ScoredRows(np.array(tiny.random_ids(offsets[-1])), offsets, np.concatenate(positions))


def logits(runtime: Runtime, rows: ScoredRows) -> Iterator[F32]:
    for ids, positions, _ in rows:
        for block in runtime.score(ids, positions):
            yield block.copy()


def make_run(
    path: Path, base: Path, file: Path, *, rows: ScoredRows | None = None, full_vocabulary_limit: int = 8192,
    top_k: int = 64, gate: dict[str, float] | None = None,
) -> RunDirectory:  # fmt: skip
    """`file` is the f32 export of `base`; the "base model" of the ladder is the same with noisy logits."""
    run = RunDirectory.create(path)
    config = parse_config(
        {"base": str(base), "data": {"train": "none"}, "reference": {"max_new_tokens": MAX_TOKENS}, "gate": gate or {}}
    )
    identity = {"name": str(base), "path": str(base), "files": Checkpoint(base).identity()}
    run.update_manifest(config=config.model_dump(mode="json"), base=identity, data={}, stages={})
    save_tokenizer(base, ChatTemplate(models.TEMPLATE), run.tokenizer)
    with load(file) as runtime:
        _write_reference(run, runtime, rows or held_out(), full_vocabulary_limit, top_k)
    run.finish()
    return run


def _write_reference(run: RunDirectory, runtime: Runtime, rows: ScoredRows, limit: int, top_k: int) -> None:
    noise = np.random.default_rng(0)
    writer = ReferenceWriter(
        run.reference, rows, vocab_size=runtime.vocabulary_size, full_vocabulary_limit=limit, top_k=top_k,
        info={"device": "cpu", "dtype": "float32"},
    )  # fmt: skip
    with writer:
        for block in logits(runtime, rows):
            writer.add_trained(block)
            # towards the uniform distribution, away from the targets: the base is worse than the trained model
            done = writer._trained
            base = 0.3 * block + noise.normal(size=block.shape).astype(np.float32)
            base[np.arange(len(block)), rows.targets[done - len(block) : done]] -= 3
            writer.add_base(base)
        writer.set_contract(golden(runtime))
        writer.set_greedy(greedy(runtime))
        writer.set_task("exact", answers(runtime))


def golden(runtime: Runtime, questions: Sequence[str] = QUESTIONS) -> list[dict[str, object]]:
    assert runtime.chat_template is not None
    found = []
    for question in questions:
        messages = [{"role": "user", "content": question}]
        text = runtime.chat_template.render(messages, add_generation_prompt=True)
        ids = runtime.tokenize(text)
        entry = {"messages": messages, "add_generation_prompt": True, "text": text, "ids": ids, "own": False}
        found.append(entry | {"first": first_tokens(runtime, ids)})
    return found


def first_tokens(runtime: Runtime, ids: list[int], count: int = 5) -> dict[str, object]:
    """The likeliest first tokens of an answer, as the capture stores them."""
    (logits,) = (block.copy() for block in runtime.score(np.array([*ids, 0], np.int32), np.array([len(ids)])))
    log_probs = logits[0] - np.log(np.exp(logits[0].astype(np.float64)).sum())
    best = np.argsort(-log_probs)[:count]
    return {"ids": best.tolist(), "log_probs": log_probs[best].tolist()}


def greedy(runtime: Runtime) -> list[dict[str, object]]:
    """Greedy answers, token by token."""
    found = []
    for entry in golden(runtime):
        ids: list[int] = entry["ids"]  # type: ignore[assignment]
        generation = runtime.generate(ids, Sampling(), MAX_TOKENS)
        found.append({"prompt": ids, "answer": list(generation), "stopped": generation.finish is Finish.STOP})
    return found


def answers(runtime: Runtime) -> list[dict[str, object]]:
    """The trained model is right in all but the last row."""
    rows = []
    for entry in golden(runtime):
        ids: list[int] = entry["ids"]  # type: ignore[assignment]
        answer = runtime.detokenize(list(runtime.generate(ids, Sampling(), MAX_TOKENS)))
        rows.append({"messages": entry["messages"], "expected": answer, "base": "no idea", "trained": answer})
    rows[-1]["expected"] = "something else"
    return rows
