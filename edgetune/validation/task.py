"""The task score: rows with a checkable answer, answered greedily by the file and by the trained model."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from edgetune.console import Progress
from edgetune.data.answer_frame import AnswerFrame, read_answer
from edgetune.runtime import Finish, Runtime, Sampling
from edgetune.runtime.text import to_pieces
from edgetune.validation.answers import CHOICE, answer_matches
from edgetune.validation.choices import best, continuations, log_likelihoods
from edgetune.validation.results import TaskScore

Row = Mapping[str, Any]
"""{"messages", "expected", "base", "trained"}, "choices" where these are chosen from; "tools" and "options" if
there are some; "rendered_at" where the template prints the time."""


def stored_score(task: Mapping[str, Any], which: str) -> TaskScore:
    """Return the score of the stored answers of `which`: "base" or "trained"."""
    rows: Sequence[Row] = task["rows"]
    right = sum(answer_matches(task["kind"], row["expected"], row[which]) for row in rows)
    same = sum(row[which].strip() == row["trained"].strip() for row in rows)
    return TaskScore(rows=len(rows), right=right, same_as_trained=same)


def run_task(runtime: Runtime, task: Mapping[str, Any], max_tokens: int, progress: Progress) -> TaskScore | None:
    """Answer every row with the file; None if the file has no chat template."""
    if runtime.chat_template is None:
        return None
    rows: Sequence[Row] = task["rows"]
    right = same = 0
    miss: dict[str, str] | None = None
    given = (choose(runtime, row) for row in rows) if task["kind"] == CHOICE else answers(runtime, rows, max_tokens)
    for done, (row, got) in enumerate(zip(rows, given, strict=True), 1):
        matches = answer_matches(task["kind"], row["expected"], got)
        right += matches
        same += got.strip() == row["trained"].strip()
        if miss is None and not matches and answer_matches(task["kind"], row["expected"], row["trained"]):
            miss = {"prompt": str(row["messages"][-1].get("content")), "expected": row["expected"], "got": got}
        progress(done, len(rows))
    return TaskScore(rows=len(rows), right=right, same_as_trained=same, first_miss=miss)


def choose(runtime: Runtime, row: Row) -> str:
    """Return the choice with the largest log-likelihood."""
    prompt, prefix = _render_prompt(runtime, row), _frame(runtime, row).prefix
    scores = []
    markers = sorted(runtime.stop_texts)
    for ids, positions in continuations(
        runtime.tokenize, runtime.detokenize, prompt, row["choices"], markers, prefix=prefix
    ):
        targets, done, total = ids[positions], 0, 0.0
        for logits in runtime.score(ids, positions):
            total += float(log_likelihoods(logits, targets[done : done + len(logits)]).sum())
            done += len(logits)
        scores.append(total)
    return best(row["choices"], scores)


def answers(runtime: Runtime, rows: Sequence[Row], max_tokens: int) -> Iterator[str]:
    """Generate the greedy answer to each conversation, without what the template writes around it."""
    prompts = [runtime.tokenize(_render_prompt(runtime, row)) for row in rows]
    completions = runtime.generate_batch(prompts, Sampling(), [max_tokens] * len(prompts))
    for row, completion in zip(rows, completions, strict=True):
        pieces = to_pieces(completion.tokens, runtime.token_bytes)
        yield read_answer(_frame(runtime, row), pieces, is_cut=completion.finish is not Finish.STOP)


def _frame(runtime: Runtime, row: Row) -> AnswerFrame:
    return runtime.answer_frame(row["messages"], tools=row.get("tools"), template_options=row.get("options"))


def _render_prompt(runtime: Runtime, row: Row) -> str:
    assert runtime.chat_template is not None
    template = runtime.chat_template.as_rendered(row)
    return template.render(row["messages"], add_generation_prompt=True, tools=row.get("tools"))
