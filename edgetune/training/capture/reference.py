"""The stage after training: store what base and trained model say, for exported files to be compared with."""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from edgetune import console
from edgetune.config import ReferenceConfig
from edgetune.planning.prepare import PreparedRun
from edgetune.reference.codecs import largest
from edgetune.reference.scored_rows import ScoredRows
from edgetune.reference.writer import ReferenceWriter
from edgetune.runs.directory import RunDirectory
from edgetune.training.capture import forward, generate
from edgetune.training.capture.golden import build_contract
from edgetune.training.capture.long_rows import build_reference_rows
from edgetune.training.capture.task_answers import capture_greedy_answers, capture_task_answers
from edgetune.training.loading import check_same_tokenizer, load_tokenizer
from edgetune.validation.choices import log_likelihoods
from edgetune_converters.files.contents import sha256_of

FIRST_TOKENS = 5
"""Likeliest first tokens of a golden answer that are stored, and that an exported file carries."""


def capture_reference(run: RunDirectory, plan: PreparedRun, model: Any) -> None:
    """Write reference/, and nothing else of the run: what is exported does not depend on it.

    Killed, it goes on where it was when called again.
    """
    generate.prepare_for_capture(model)
    theirs, tokenizer = load_tokenizer(plan.base, plan.config)
    golden = build_contract(plan.template, tokenizer, theirs, plan.splits.validation)
    check_same_tokenizer(plan.tokenizer, tokenizer, [entry["text"] for entry in golden])
    rows, long_rows = build_reference_rows(plan, model)
    dtype, context = generate.capture_precision(model, plan.config)
    with torch.inference_mode(), context(), _writer(run, plan, model, rows, long_rows, dtype) as writer:
        capture_log_probs(model, writer, rows)
        task = capture_task_answers(plan, model, writer)
        writer.set_greedy(capture_greedy_answers(plan, model))
        writer.set_contract(_with_first_tokens(model, golden))
        writer.set_summary(
            {
                "rows": len(rows) - long_rows,
                "positions": len(rows.first(len(rows) - long_rows).positions),
                "long_rows": long_rows,
                "cross_entropy": writer.mean_nll(len(rows) - long_rows),
                "task": task,
                "contract": len(golden),
                "dtype": dtype,
            }
        )


def _writer(
    run: RunDirectory, plan: PreparedRun, model: Any, rows: ScoredRows, long_rows: int, dtype: str
) -> ReferenceWriter:
    config, manifest = plan.config.reference, run.manifest
    return ReferenceWriter(
        run.reference,
        rows,
        vocab_size=model.get_base_model().config.get_text_config().vocab_size,
        full_vocabulary_limit=config.full_vocabulary_limit,
        top_k=config.top_k,
        info={
            "device": manifest.device, "dtype": dtype, "versions": manifest.versions, "long_rows": long_rows
        },
        key=_key(run, config, rows, dtype, str(model.device)),
    )  # fmt: skip


def _key(run: RunDirectory, config: ReferenceConfig, rows: ScoredRows, dtype: str, device: str) -> str:
    """Everything that has a say in the captured numbers."""
    adapter = sorted(path for path in run.adapter.rglob("*") if path.is_file())
    parts = [
        str(run.manifest.base.files), *(sha256_of(path) for path in adapter), dtype, device,
        f"{config.full_vocabulary_limit} {config.top_k} {config.max_new_tokens}",
        *(hashlib.sha256(array.tobytes()).hexdigest() for array in (rows.tokens, rows.row_offsets, rows.positions)),
    ]  # fmt: skip
    return hashlib.sha256("\n".join(parts).encode()).hexdigest()


def capture_log_probs(model: Any, writer: ReferenceWriter, rows: ScoredRows) -> None:
    """Log-probabilities of both models, batch by batch, from where an earlier writer stopped."""
    if writer.done:
        console.note(f"reference: going on after {writer.done} of {len(rows.positions)} tokens")
    with console.count_progress("reference") as progress:
        for batch in forward.batches_for_device(model, rows, writer.done):
            for logits in forward.compute_logits(model, batch):
                writer.add_trained(logits)
            with model.disable_adapter():
                for logits in forward.compute_logits(model, batch):
                    writer.add_base(logits)
            writer.checkpoint()
            progress(writer.done, len(rows.positions))


def _with_first_tokens(model: Any, golden: Sequence[dict[str, Any]]) -> list[dict[str, Any]]:
    """The golden conversations, those that wait for an answer with the trained model's likeliest first tokens."""
    found = []
    for entry in golden:
        if entry["add_generation_prompt"] and entry["ids"]:
            entry = {**entry, "first": _first_tokens(model, entry["ids"])}
        found.append(entry)
    return found


def _first_tokens(model: Any, ids: Sequence[int]) -> dict[str, list[Any]]:
    row: NDArray[np.int32] = np.asarray([*ids, 0], np.int32)  # what follows the prompt is predicted, not read
    batch = forward.Batch([row], [np.array([len(ids)])])
    said = next(iter(forward.compute_logits(model, batch)))
    targets = largest(said, FIRST_TOKENS)[0][0]
    log_probs = log_likelihoods(np.repeat(said, len(targets), axis=0), targets)
    return {"ids": targets.tolist(), "log_probs": [round(float(value), 5) for value in log_probs]}
