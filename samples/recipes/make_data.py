"""Write the rows of the recipes: a shop's mail as tickets, pairs, labels, sums and text. `python make_data.py`."""

from __future__ import annotations

import itertools
import json
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

HERE = Path(__file__).parent
ITEMS = ("kettle", "desk lamp", "backpack", "rain jacket", "keyboard", "water filter", "bike pump", "headphones")
PROBLEMS = {
    "the {item} arrived broken": ("damage", "I am sorry that the {item} arrived broken. We send a new one today."),
    "my {item} has not arrived yet": ("delivery", "I am sorry for the wait. I have asked where your {item} is."),
    "I want to send the {item} back": ("return", "You can send the {item} back within 30 days. I enclose the label."),
    "I was charged twice for the {item}": (
        "billing",
        "I am sorry. One of the two payments for the {item} is returned.",
    ),
    "does the {item} come with a warranty?": ("question", "Yes, the {item} has a warranty of two years."),
    "the {item} stopped working after a week": ("damage", "I am sorry. Your {item} is replaced under its warranty."),
}
CURT = {
    "damage": "Not our fault.", "delivery": "Wait longer.", "return": "No.", "billing": "Ask your bank.",
    "question": "Read the box.",
}  # fmt: skip


def cases() -> Iterator[tuple[str, str, str, str]]:
    """Yield (message, item, queue, good answer)."""
    for item, (problem, (queue, answer)) in itertools.product(ITEMS, PROBLEMS.items()):
        yield problem.format(item=item), item, queue, answer.format(item=item)


def tickets() -> Iterator[dict[str, Any]]:
    """Yield conversations: a message, and the ticket that it becomes."""
    for message, item, queue, _ in cases():
        ticket = json.dumps({"queue": queue, "item": item}, separators=(",", ":"))
        yield {"messages": [{"role": "user", "content": message}, {"role": "assistant", "content": ticket}]}


def pairs() -> Iterator[dict[str, str]]:
    """Yield preference pairs: a helpful and a curt answer."""
    for message, _, queue, answer in cases():
        yield {"prompt": message, "chosen": answer, "rejected": CURT[queue]}


def labels() -> Iterator[dict[str, Any]]:
    """Yield rated answers, helpful and curt ones in turn."""
    for number, (message, _, queue, answer) in enumerate(cases()):
        reply = answer if number % 2 == 0 else CURT[queue]
        talk = [{"role": "user", "content": message}, {"role": "assistant", "content": reply}]
        yield {"messages": talk, "label": number % 2 == 0}


def sums() -> Iterator[dict[str, str]]:
    """Yield prompts whose answer is a number."""
    for number, item in itertools.product(range(2, 8), ITEMS):
        price = 5 + len(item)
        yield {"prompt": f"A {item} costs {price} euros. What do {number} cost?", "answer": str(number * price)}


def texts() -> Iterator[dict[str, str]]:
    """Yield documents for continued pretraining."""
    for item in ITEMS:
        sentences = [f"{message[0].upper()}{message[1:]}. {answer}" for message, of, _, answer in cases() if of == item]
        yield {"text": f"Mail about the {item}. " + " ".join(sentences)}
        yield {"text": f"The {item} is in stock. It is sent within two days, and can be sent back within 30 days."}


def write(name: str, rows: Iterable[dict[str, Any]]) -> None:
    """Write rows as a JSONL file."""
    lines = "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows)
    (HERE / "data" / name).write_text(lines, encoding="utf-8")


def main() -> None:
    """Write all files."""
    write("tickets.jsonl", tickets())
    write("pairs.jsonl", pairs())
    write("labels.jsonl", labels())
    write("sums.jsonl", sums())
    write("texts.jsonl", texts())


if __name__ == "__main__":
    main()
