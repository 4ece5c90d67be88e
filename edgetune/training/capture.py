"""The stage after training: store what base and trained model say, for exported files to be compared with."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from edgetune import console
from edgetune.reference import ReferenceWriter, Rows
from edgetune.run_directory import RunDirectory
from edgetune.training import outputs
from edgetune.training.contract import contract
from edgetune.training.loading import check_same_tokenizer, load_tokenizer
from edgetune.training.plan import Plan
from edgetune.validation.answers import answer_matches


def capture(run: RunDirectory, plan: Plan, model: Any) -> None:
    """Write reference/ and the manifest's `reference` stage."""
    started = time.perf_counter()
    outputs.prepare(model)
    theirs, tokenizer = load_tokenizer(plan.base, plan.config)
    golden = contract(plan.template, tokenizer, theirs, plan.splits.validation)
    check_same_tokenizer(plan.tokenizer, tokenizer, [entry["text"] for entry in golden])
    rows = outputs.to_rows(plan.reference_rows)
    dtype, context = outputs.products_in(model, plan.config)
    with torch.inference_mode(), context(), _writer(run, plan, model, rows, dtype) as writer:
        entropy = _capture_rows(plan, model, writer, rows)
        task = _capture_task(plan, model, writer)
        writer.set_contract(golden)
    results = {
        "rows": len(rows),
        "positions": len(rows.positions),
        "cross_entropy": entropy,
        "task": task,
        "contract": len(golden),
        "dtype": dtype,
        "seconds": round(time.perf_counter() - started, 1),
    }
    run.record_stage("reference", results)


def _writer(run: RunDirectory, plan: Plan, model: Any, rows: Rows, dtype: str) -> ReferenceWriter:
    config, manifest = plan.config.reference, run.manifest
    return ReferenceWriter(
        run.reference,
        rows,
        vocab_size=model.get_base_model().config.get_text_config().vocab_size,
        full_vocabulary_limit=config.full_vocabulary_limit,
        top_k=config.top_k,
        info={"device": manifest["device"], "dtype": dtype, "versions": manifest["versions"]},
    )


def _capture_rows(plan: Plan, model: Any, writer: ReferenceWriter, rows: Rows) -> dict[str, float]:
    """Log-probabilities of both models; returns the mean cross-entropy of each, in nats per scored token."""
    sums = {"base": 0.0, "trained": 0.0}
    with console.count_progress("reference") as progress:
        for number, (row, (ids, scored, _)) in enumerate(zip(plan.reference_rows, rows, strict=True), 1):
            sums["trained"] += _pass_on(outputs.row_logits(model, row), ids[scored], writer.add_trained)
            with model.disable_adapter():
                sums["base"] += _pass_on(outputs.row_logits(model, row), ids[scored], writer.add_base)
            progress(number, len(rows))
    return {name: total / len(rows.positions) for name, total in sums.items()}


def _pass_on(blocks: Iterable[outputs.F32], targets: NDArray[np.int32], add: Callable[[outputs.F32], None]) -> float:
    """Hand the logits of a row to the writer; returns the sum of the targets' negative log-likelihoods."""
    done, total = 0, 0.0
    for logits in blocks:
        add(logits)
        wanted = targets[done : done + len(logits)]
        high = logits.max(axis=1)
        spread = np.log(np.exp((logits - high[:, None]).astype(np.float64)).sum(axis=1))
        total += float((spread + high - logits[np.arange(len(wanted)), wanted]).sum())
        done += len(logits)
    return total


def _capture_task(plan: Plan, model: Any, writer: ReferenceWriter) -> dict[str, Any] | None:
    """Greedy answers of both models to the test rows; returns their scores as shares of the rows."""
    if not plan.task_rows:
        return None
    answers = _answers(plan, model)
    kind = plan.config.data.answer
    expected = [row[-1]["content"] for row in plan.task_rows]
    rows = [
        {"messages": row[:-1], "expected": wanted, "base": base, "trained": trained}
        for row, wanted, base, trained in zip(
            plan.task_rows, expected, answers["base"], answers["trained"], strict=True
        )
    ]
    writer.set_task(kind, rows)
    right = {
        which: sum(answer_matches(kind, wanted, got) for wanted, got in zip(expected, given, strict=True))
        for which, given in answers.items()
    }
    return {"kind": kind, "rows": len(rows), **{which: count / len(rows) for which, count in right.items()}}


def _answers(plan: Plan, model: Any) -> dict[str, list[str]]:
    """Texts that both models answer to the prompts of the test rows."""
    texts = [plan.template.render(row[:-1], add_generation_prompt=True) for row in plan.task_rows]
    prompts = [ids for ids, _ in plan.tokenizer.encode_batch(texts)]
    settings = outputs.Greedy(sorted(plan.stop_ids), plan.pad_id, plan.config.reference.max_new_tokens)
    written: dict[str, list[list[int]]] = {}
    with console.count_progress("answers") as progress:

        def advance(done: int) -> None:
            progress(len(prompts) * len(written) + done, 2 * len(prompts))

        written["trained"] = outputs.greedy(model, prompts, settings, advance)
        with model.disable_adapter():
            written["base"] = outputs.greedy(model, prompts, settings, advance)
    return {
        which: [plan.tokenizer.decode(ids, skip_special=True) for ids in answers] for which, answers in written.items()
    }
