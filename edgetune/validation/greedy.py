"""Greedy answers, token by token: how far a file goes with the trained model, and whether it stops where that stops."""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from edgetune.console import Progress
from edgetune.runtime import Finish, Runtime, Sampling

Answer = Mapping[str, Any]
"""{"prompt": ids, "answer": ids, "stopped"}: what the trained model says, without the token at which it stopped."""


@dataclass(frozen=True)
class Agreement:
    """With the trained model's answers. A stop counts as a token."""

    rows: int
    mean: float
    """Mean over the answers of the share, from the start, that is equal."""
    whole: int
    """Answers that are equal to the end."""


def follow(
    runtime: Runtime, answers: Sequence[Answer], stops: Collection[int], progress: Progress
) -> tuple[Agreement | None, str | None]:
    """The agreement (None without answers), and what is wrong with the file's stop tokens, if anything is.

    `stops` are those of training. A file that would rather go on where the trained model stops has lost precision; one
    that says the stop token and goes on all the same, or stops at a token in the middle of an answer, is broken.
    """
    shares, fault = [], None
    usable = [entry for entry in answers if len(entry["prompt"]) + len(entry["answer"]) < runtime.context]
    for done, entry in enumerate(usable, 1):
        share, wrong = _follow_one(runtime, entry, stops)
        shares.append(share)
        fault = fault or wrong
        progress(done, len(usable))
    if not shares:
        return None, None
    return Agreement(len(shares), sum(shares) / len(shares), sum(share == 1 for share in shares)), fault


def _follow_one(runtime: Runtime, entry: Answer, stops: Collection[int]) -> tuple[float, str | None]:
    wanted: list[int] = entry["answer"]
    early = next((token for token in wanted if token in runtime.stop_tokens), None)
    if early is not None:
        return 0.0, f"the file stops at {_named(runtime, early)}, which the trained model writes within an answer"
    generation = runtime.generate(entry["prompt"], Sampling(), len(wanted) + 1)
    found = list(generation)
    pairs = enumerate(zip(wanted, found, strict=False))
    equal = next((place for place, (a, b) in pairs if a != b), min(len(wanted), len(found)))
    if equal < len(wanted):
        return equal / (len(wanted) + entry["stopped"]), None
    if not entry["stopped"] or generation.finish is Finish.STOP:
        return 1.0, None
    after = next(iter(found[len(wanted) :]), None)
    wrong = None if after is None or after not in stops else f"the file says {_named(runtime, after)} and goes on"
    return len(wanted) / (len(wanted) + 1), wrong


def _named(runtime: Runtime, token: int) -> str:
    return f"{token} {runtime.token_bytes(token, special=True).decode('utf-8', 'replace')!r}"
