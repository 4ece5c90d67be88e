"""Answers of base and trained model to the test rows, and greedy answers to held-out prompts."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from edgetune import console
from edgetune.data.answer_frame import AnswerFrame, read_answer
from edgetune.planning.prepare import PreparedRun
from edgetune.reference.scored_rows import ScoredRows
from edgetune.reference.writer import ReferenceWriter
from edgetune.runs.json_format import write_json
from edgetune.training.capture import forward, generate
from edgetune.validation.answers import CHOICE, answer_matches
from edgetune.validation.choices import best, log_likelihoods, tokenize_choices

MODELS = ("trained", "base")


def capture_task_answers(prepared: PreparedRun, model: Any, writer: ReferenceWriter) -> dict[str, Any] | None:
    """Capture the answers of both models to the test rows; return their scores as shares of the rows."""
    if not prepared.task:
        return None
    data = prepared.config.data
    answer_rows = _choose if data.answer == CHOICE else _generate
    answers = answer_rows(prepared, model, writer.answers_file)
    rows: list[dict[str, Any]] = [
        {"messages": task.row.messages[:-1], "expected": task.expected, "base": base, "trained": trained}
        | ({"tools": task.row.tools} if task.row.tools else {})
        | ({"options": task.row.options} if task.row.options else {})
        | ({"choices": data.choices} if data.answer == CHOICE else {})
        | prepared.template.describe_rendering(task.row.tools)
        for task, base, trained in zip(prepared.task, answers["base"], answers["trained"], strict=True)
    ]
    writer.set_task(data.answer, rows)
    right = {which: sum(answer_matches(data.answer, row["expected"], row[which]) for row in rows) for which in answers}
    return {"kind": data.answer, "rows": len(rows), **{which: count / len(rows) for which, count in right.items()}}


def _settings(prepared: PreparedRun) -> generate.GreedySettings:
    return generate.GreedySettings(sorted(prepared.stop_ids), prepared.pad_id, prepared.config.reference.max_new_tokens)


def _generate(prepared: PreparedRun, model: Any, progress_file: Path | None) -> dict[str, list[str]]:
    """Generate the texts of both models, except those that an interrupted capture has stored in `progress_file`."""
    prompts = [task.prompt.ids for task in prepared.task]
    known = _read_answers(progress_file, prompts)
    with console.count_progress("answers to the test rows", announce=True) as progress:
        for number, which in enumerate(MODELS):
            answers = known.setdefault(which, {})
            before, total = len(prompts) * number + len(answers), 2 * len(prompts)

            def on_answers(done: dict[int, list[int]], number: int = number, which: str = which) -> None:
                known[which].update(done)
                _store_answers(progress_file, prompts, known)
                progress(len(prompts) * number + len(known[which]), 2 * len(prompts))

            def on_tokens(count: int, before: int = before, total: int = total) -> None:
                progress(before + count, total)

            with generate.select_model(model, which):
                generate.generate_greedy(model, prompts, _settings(prepared), on_answers, set(answers), on_tokens)
    frames = [task.prompt.frame for task in prepared.task]
    length = prepared.config.reference.max_new_tokens
    return {
        which: [
            read_answer(frame, prepared.tokenizer.pieces(answers[i]), is_cut=len(answers[i]) >= length)
            for i, frame in enumerate(frames)
        ]
        for which, answers in known.items()
    }


def _store_answers(file: Path | None, prompts: Sequence[Sequence[int]], known: dict[str, dict[int, list[int]]]) -> None:
    if file is not None:
        write_json(file, {"prompts": [list(ids) for ids in prompts], "answers": known})


def _read_answers(file: Path | None, prompts: Sequence[Sequence[int]]) -> dict[str, dict[int, list[int]]]:
    """Return the stored answers if they are those to the same prompts, otherwise {}."""
    if file is None or not file.is_file():
        return {}
    try:
        found = json.loads(file.read_text(encoding="utf-8"))
        if found["prompts"] != [list(ids) for ids in prompts]:
            return {}
        return {which: {int(i): ids for i, ids in given.items()} for which, given in found["answers"].items()}
    except (ValueError, KeyError, AttributeError):
        return {}


def _choose(prepared: PreparedRun, model: Any, progress_file: Path | None) -> dict[str, list[str]]:
    """Choose the answer with the largest log-likelihood for each model."""
    choices = prepared.config.data.choices
    prompts = [task.prompt for task in prepared.task]
    each = [
        pair for one in prompts for pair in tokenize_choices(prepared.tokenizer, one.text, choices, one.frame.prefix)
    ]
    offsets = np.concatenate([[0], np.cumsum([len(ids) for ids, _ in each])])
    positions = [scored + start for (_, scored), start in zip(each, offsets[:-1], strict=True)]
    rows = ScoredRows(np.concatenate([ids for ids, _ in each]), offsets, np.concatenate(positions))
    found, total = {}, len(MODELS) * len(rows.positions)
    with console.count_progress("choices of the test rows", announce=True) as progress:
        for number, which in enumerate(MODELS):
            before = number * len(rows.positions)

            def on_tokens(count: int, before: int = before) -> None:
                progress(before + count, total)

            with generate.select_model(model, which):
                sums = _sum_log_likelihoods(model, rows, on_tokens)
            found[which] = [best(choices, each) for each in sums.reshape(len(prompts), len(choices)).tolist()]
    return found


def _sum_log_likelihoods(model: Any, rows: ScoredRows, on_tokens: generate.OnTokens) -> Any:
    """Return f64 [rows]: the log-likelihood of the scored tokens of each row, in nats."""
    parts: list[Any] = []
    for batch in forward.batches_for_device(model, rows):
        done = 0
        for logits in forward.compute_logits(model, batch):
            parts.append(log_likelihoods(logits, batch.targets[done : done + len(logits)]))
            done += len(logits)
        on_tokens(sum(map(len, parts)))
    values = np.concatenate(parts)
    return np.array([values[where].sum() for _, _, where in rows])


def capture_greedy_answers(prepared: PreparedRun, model: Any) -> list[dict[str, Any]]:
    """Capture greedy answers of the trained model to the first held-out conversations, and whether each one stopped."""
    prompts = [prompt.ids for prompt in prepared.greedy_prompts]
    settings, answers = _settings(prepared), dict[int, list[int]]()
    with (
        console.count_progress("greedy answers to held-out rows", announce=True) as progress,
        generate.select_model(model, "trained"),
    ):

        def on_answers(done: dict[int, list[int]]) -> None:
            answers.update(done)
            progress(len(answers), len(prompts))

        generate.generate_greedy(
            model, prompts, settings, on_answers, on_tokens=lambda count: progress(count, len(prompts))
        )
    return [
        {"prompt": prompt, "answer": answers[index], "stopped": len(answers[index]) < settings.length}
        | _count_framing(prepared, prepared.greedy_prompts[index].frame, answers[index])
        for index, prompt in enumerate(prompts)
    ]


def _count_framing(prepared: PreparedRun, frame: AnswerFrame, answer: list[int]) -> dict[str, int]:
    """Count the tokens at the beginning and at the end of an answer that the template writes."""
    texts = ["".join(piece.text for piece in prepared.tokenizer.pieces(answer[:n])) for n in range(len(answer) + 1)]
    whole, last = texts[-1], len(answer)
    before = next((n for n in range(last + 1) if texts[n].startswith(frame.given)), 0)
    kept = whole.removesuffix(frame.suffix)
    after = next((last - n for n in range(before, last + 1) if texts[n].startswith(kept)), 0)
    return {name: count for name, count in (("before", before), ("after", after)) if count}
