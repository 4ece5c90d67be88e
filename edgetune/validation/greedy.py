"""Greedy answers, token by token: where a file departs from the trained model, and whether its stop tokens work."""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from typing import Any

from edgetune.console import Progress
from edgetune.runtime import Completion, Finish, Runtime, Sampling
from edgetune.validation.results import Agreement

Answer = Mapping[str, Any]
"""{"prompt": ids, "answer": ids, "stopped": bool} of the trained model; the answer is without its stop token.

"before" and "after" count the tokens at its beginning and end that the chat template writes; they agree in any file, so
they are no part of the agreement.
"""


def compare_answers(
    runtime: Runtime, answers: Sequence[Answer], stops: Collection[int], progress: Progress
) -> tuple[Agreement | None, str | None]:
    """Return the agreement (None without answers), and the fault of the file's stop tokens, if there is one.

    `stops` are the stop tokens of training. A file that does not stop where the trained model stops has lost precision.
    A file that writes the stop token and continues, or that stops at a token within an answer, is broken.
    """
    usable = [entry for entry in answers if len(entry["prompt"]) + len(entry["answer"]) < runtime.context]
    early = [_stop_within(runtime, entry) for entry in usable]
    asked = [entry for entry, token in zip(usable, early, strict=True) if token is None]
    completions = runtime.generate_batch(
        [entry["prompt"] for entry in asked], Sampling(), [len(entry["answer"]) + 1 for entry in asked]
    )
    shares, fault = [], None
    for done, (entry, token) in enumerate(zip(usable, early, strict=True), 1):
        share, wrong = (
            _compared(runtime, entry, next(completions), stops) if token is None else _too_early(runtime, token)
        )
        shares.append(share)
        fault = fault or wrong
        progress(done, len(usable))
    if not shares:
        return None, None
    mean, whole = sum(shares) / len(shares), sum(share == 1 for share in shares)
    return Agreement(rows=len(shares), mean=mean, whole=whole), fault


def _stop_within(runtime: Runtime, entry: Answer) -> int | None:
    return next((token for token in entry["answer"] if token in runtime.stop_tokens), None)


def _too_early(runtime: Runtime, token: int) -> tuple[float, str]:
    return 0.0, f"the file stops at {_token_name(runtime, token)}, which the trained model writes within an answer"


def _compared(runtime: Runtime, entry: Answer, said: Completion, stops: Collection[int]) -> tuple[float, str | None]:
    wanted: list[int] = entry["answer"]
    found = said.tokens
    pairs = enumerate(zip(wanted, found, strict=False))
    equal = next((place for place, (a, b) in pairs if a != b), min(len(wanted), len(found)))
    before, behind = entry.get("before", 0), entry.get("after", 0)
    own = max(0, len(wanted) - before - behind)
    counted = own + entry["stopped"]
    if equal < len(wanted):
        return min(max(0, equal - before), own) / counted if counted else 0.0, None
    if not entry["stopped"] or said.finish is Finish.STOP:
        return 1.0, None
    after = next(iter(found[len(wanted) :]), None)
    wrong = (
        None if after is None or after not in stops else f"the file writes {_token_name(runtime, after)} and continues"
    )
    return own / counted, wrong


def _token_name(runtime: Runtime, token: int) -> str:
    return f"{token} {runtime.token_bytes(token, special=True).decode('utf-8', 'replace')!r}"
