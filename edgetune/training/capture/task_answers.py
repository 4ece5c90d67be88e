"""What base and trained model answer to the test rows, and greedily to prompts in general."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from edgetune import console
from edgetune.data.formats import Conversation
from edgetune.planning.prepare import PreparedRun
from edgetune.reference.scored_rows import ScoredRows
from edgetune.reference.writer import ReferenceWriter
from edgetune.runs.json_format import write_json
from edgetune.training.capture import forward, generate
from edgetune.validation.answers import CHOICE, answer_matches
from edgetune.validation.choices import best, continuations, log_likelihoods

GREEDY_ROWS = 8
"""Prompts whose greedy answer is stored token by token."""
MODELS = ("trained", "base")


def capture_task_answers(plan: PreparedRun, model: Any, writer: ReferenceWriter) -> dict[str, Any] | None:
    """Answers of both models to the test rows; returns their scores as shares of the rows."""
    if not plan.task_rows:
        return None
    data = plan.config.data
    answer = _choose if data.answer == CHOICE else _generate
    answers = answer(plan, model, writer.answers_file)
    expected = [row[-1]["content"] for row in plan.task_rows]
    rows = [
        {"messages": row[:-1], "expected": wanted, "base": base, "trained": trained}
        | ({"choices": data.choices} if data.answer == CHOICE else {})
        for row, wanted, base, trained in zip(
            plan.task_rows, expected, answers["base"], answers["trained"], strict=True
        )
    ]
    writer.set_task(data.answer, rows)
    right = {
        which: sum(answer_matches(data.answer, wanted, got) for wanted, got in zip(expected, given, strict=True))
        for which, given in answers.items()
    }
    return {"kind": data.answer, "rows": len(rows), **{which: count / len(rows) for which, count in right.items()}}


def _prompts(plan: PreparedRun, rows: Sequence[Conversation]) -> list[str]:
    """Up to the last assistant turn, which is what is asked for."""
    return [plan.template.render(row[:-1], add_generation_prompt=True) for row in rows]


def _settings(plan: PreparedRun) -> generate.GreedySettings:
    return generate.GreedySettings(sorted(plan.stop_ids), plan.pad_id, plan.config.reference.max_new_tokens)


def _generate(plan: PreparedRun, model: Any, kept: Path | None) -> dict[str, list[str]]:
    """Texts that both models write; those that an earlier process has kept are not written again."""
    prompts = [ids for ids, _ in plan.tokenizer.encode_batch(_prompts(plan, plan.task_rows))]
    known = _kept(kept, prompts)
    with console.count_progress("answers") as progress:
        for number, which in enumerate(MODELS):
            answers = known.setdefault(which, {})

            def advance(done: dict[int, list[int]], number: int = number, which: str = which) -> None:
                known[which].update(done)
                _keep(kept, prompts, known)
                progress(len(prompts) * number + len(known[which]), 2 * len(prompts))

            with generate.select_model(model, which):
                generate.generate_greedy(model, prompts, _settings(plan), advance, set(answers))
    return {
        which: [plan.tokenizer.decode(answers[i], skip_special=True) for i in range(len(prompts))]
        for which, answers in known.items()
    }


def _keep(file: Path | None, prompts: Sequence[Sequence[int]], known: dict[str, dict[int, list[int]]]) -> None:
    if file is not None:
        write_json(file, {"prompts": [list(ids) for ids in prompts], "answers": known})


def _kept(file: Path | None, prompts: Sequence[Sequence[int]]) -> dict[str, dict[int, list[int]]]:
    """Answers to these very prompts; {} where there are none."""
    if file is None or not file.is_file():
        return {}
    try:
        found = json.loads(file.read_text(encoding="utf-8"))
        if found["prompts"] != [list(ids) for ids in prompts]:
            return {}
        return {which: {int(i): ids for i, ids in given.items()} for which, given in found["answers"].items()}
    except (ValueError, KeyError, AttributeError):
        return {}


def _choose(plan: PreparedRun, model: Any, kept: Path | None) -> dict[str, list[str]]:
    """The choice that each model finds likeliest."""
    choices = plan.config.data.choices
    texts = _prompts(plan, plan.task_rows)
    each = [pair for text in texts for pair in continuations(lambda t: plan.tokenizer.encode(t)[0], text, choices)]
    offsets = np.concatenate([[0], np.cumsum([len(ids) for ids, _ in each])])
    positions = [scored + start for (_, scored), start in zip(each, offsets[:-1], strict=True)]
    rows = ScoredRows(np.concatenate([ids for ids, _ in each]), offsets, np.concatenate(positions))
    found = {}
    for which in MODELS:
        with generate.select_model(model, which):
            found[which] = [
                best(choices, scores) for scores in _sums(model, rows).reshape(len(texts), len(choices)).tolist()
            ]
    return found


def _sums(model: Any, rows: ScoredRows) -> Any:
    """[rows] log-likelihood of the scored tokens of each row."""
    parts = []
    for batch in forward.batches_for_device(model, rows):
        done = 0
        for logits in forward.compute_logits(model, batch):
            parts.append(log_likelihoods(logits, batch.targets[done : done + len(logits)]))
            done += len(logits)
    values = np.concatenate(parts)
    return np.array([values[where].sum() for _, _, where in rows])


def capture_greedy_answers(plan: PreparedRun, model: Any) -> list[dict[str, Any]]:
    """What the trained model answers to the first held-out conversations, with whether it stopped by itself."""
    rows = [row for row in plan.splits.validation if row[-1]["role"] == "assistant"][:GREEDY_ROWS]
    prompts = [ids for ids, _ in plan.tokenizer.encode_batch(_prompts(plan, rows))]
    settings, answers = _settings(plan), dict[int, list[int]]()
    with generate.select_model(model, "trained"):
        generate.generate_greedy(model, prompts, settings, answers.update)
    return [
        {"prompt": prompt, "answer": answers[index], "stopped": len(answers[index]) < settings.length}
        for index, prompt in enumerate(prompts)
    ]
