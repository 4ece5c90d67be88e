"""The stage after training: store the outputs of base and trained model, against which exported files are validated."""

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
from edgetune.training.capture.long_rows import build_reference_rows
from edgetune.training.capture.task_answers import capture_greedy_answers, capture_task_answers
from edgetune.validation.choices import log_likelihoods
from edgetune_converters.files.contents import sha256_of

FIRST_TOKENS = 5
"""Number of most likely first tokens of a golden answer that are stored, and embedded in exported files."""


def capture_reference(run: RunDirectory, prepared: PreparedRun, model: Any) -> None:
    """Write reference/ and nothing else of the run, so that exports do not depend on it.

    After a kill, another call resumes the capture.
    """
    generate.prepare_for_capture(model)
    golden = prepared.contract
    rows, long_rows = build_reference_rows(prepared, model)
    dtype, context = generate.capture_precision(model, prepared.config)
    with torch.inference_mode(), context(), _open_writer(run, prepared, model, rows, long_rows, dtype) as writer:
        capture_log_probs(model, writer, rows)
        task = capture_task_answers(prepared, model, writer)
        writer.set_greedy(capture_greedy_answers(prepared, model))
        writer.set_contract(_add_first_tokens(prepared, model, golden))
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


def _open_writer(
    run: RunDirectory, prepared: PreparedRun, model: Any, rows: ScoredRows, long_rows: int, dtype: str
) -> ReferenceWriter:
    config, manifest = prepared.config.reference, run.manifest
    return ReferenceWriter(
        run.reference,
        rows,
        vocab_size=model.get_base_model().config.get_text_config().vocab_size,
        full_vocabulary_limit=config.full_vocabulary_limit,
        top_k=config.top_k,
        info={
            "device": manifest.device, "dtype": dtype, "versions": manifest.versions, "long_rows": long_rows
        },
        key=_content_key(run, config, rows, dtype, str(model.device)),
    )  # fmt: skip


def _content_key(run: RunDirectory, config: ReferenceConfig, rows: ScoredRows, dtype: str, device: str) -> str:
    """Return a hash of everything that the captured numbers depend on."""
    adapter = sorted(path for path in run.adapter.rglob("*") if path.is_file())
    parts = [
        str(run.manifest.base.files), *(sha256_of(path) for path in adapter), dtype, device,
        f"{config.full_vocabulary_limit} {config.top_k} {config.max_new_tokens}",
        *(hashlib.sha256(array.tobytes()).hexdigest() for array in (rows.tokens, rows.row_offsets, rows.positions)),
    ]  # fmt: skip
    return hashlib.sha256("\n".join(parts).encode()).hexdigest()


def capture_log_probs(model: Any, writer: ReferenceWriter, rows: ScoredRows) -> None:
    """Capture the log-probabilities of both models batch by batch, after those of an interrupted capture."""
    if writer.done:
        console.note(f"reference: resuming after {writer.done} of {len(rows.positions)} tokens")
    with console.count_progress("reference", announce=True) as progress:
        for batch in forward.batches_for_device(model, rows, writer.done):
            for logits in forward.compute_logits(model, batch):
                writer.add_trained(logits)
            with model.disable_adapter():
                for logits in forward.compute_logits(model, batch):
                    writer.add_base(logits)
            writer.checkpoint()
            progress(writer.done, len(rows.positions))


def _add_first_tokens(prepared: PreparedRun, model: Any, golden: Sequence[dict[str, Any]]) -> list[dict[str, Any]]:
    """Return the golden conversations; those that end with a prompt get the most likely first tokens of the answer.

    Tokens that the template writes before every answer say nothing about the model: they are given to it.
    """
    found = []
    context = prepared.base.context
    taken = prepared.config.adapter.virtual_tokens
    fixed = context.tokens - taken if context and context.is_fixed else None  # a longer prompt cannot be computed
    with console.count_progress("first tokens of the golden answers", announce=True) as progress:
        for done, entry in enumerate(golden, 1):
            asks = entry["add_generation_prompt"] and entry["ids"]
            given = prepared.tokens_before_answer(entry) if asks else []
            if asks and (fixed is None or len(entry["ids"]) + len(given) < fixed):
                first = _first_tokens(model, [*entry["ids"], *given])
                found.append({**entry, "first": first | ({"after": given} if given else {})})
            else:
                found.append(entry)
            progress(done, len(golden))
    return found


def _first_tokens(model: Any, ids: Sequence[int]) -> dict[str, list[Any]]:
    row: NDArray[np.int32] = np.asarray([*ids, 0], np.int32)  # the token after the prompt is predicted, not read
    batch = forward.Batch([row], [np.array([len(ids)])])
    logits = next(iter(forward.compute_logits(model, batch)))
    targets = largest(logits, FIRST_TOKENS)[0][0]
    log_probs = log_likelihoods(np.repeat(logits, len(targets), axis=0), targets)
    return {"ids": targets.tolist(), "log_probs": [round(float(value), 5) for value in log_probs]}
