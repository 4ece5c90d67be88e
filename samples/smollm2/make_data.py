"""Write data/: messages to a shop, and the ticket that each becomes. The same seed gives the same files everywhere.

Run `python make_data.py`. The wordings and most of the items of the test are not in the training rows.
"""

from __future__ import annotations

import json
import random
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import yaml

HERE = Path(__file__).parent
QUEUES = ("delivery", "returns", "billing", "repair", "account", "sales")
SYSTEM = "Turn the message into a ticket."
COUNTS = {"train": 1200, "validation": 100, "test": 200}
SEED = 7

GREETINGS = ("Hi,", "Hello,", "Hello there,", "Good morning,", "Hey,", "Dear team,", "Good evening,", "Hi all,")
CLOSINGS = ("Thanks", "Thank you!", "Many thanks, Ada", "Cheers", "Best, Tom", "Regards, J. Moreau", "Thx", "Bye, Lena")
ORDERS = ("order {n}", "order #{n}", "order no. {n}", "order number {n}", "my order {n}", "#{n}", "{n}")
_ALTERNATIVES = re.compile(r"\[([^\]]+)\]")


def make_rows(split: str, wordings: dict[str, Any], rng: random.Random, seen: set[str]) -> Iterator[dict[str, Any]]:
    """Yield the rows of a split; no message is in `seen`, to which each is added. Wordings take turns."""
    names = wordings["test" if split == "test" else "train"]
    items = wordings["items"]["test" if split == "test" else "train"]
    turns = {queue: _endless(names[queue], rng) for queue in QUEUES}
    for number in range(COUNTS[split]):
        queue = QUEUES[number % len(QUEUES)]
        while True:
            message, ticket = _message(queue, next(turns[queue]), names, items, rng)
            if message.lower() not in seen:
                break
        seen.add(message.lower())
        turn = json.dumps(ticket, separators=(",", ":"))
        contents = {"system": SYSTEM, "user": message, "assistant": turn}
        yield {"messages": [{"role": role, "content": content} for role, content in contents.items()]}


def _endless(wordings: list[str], rng: random.Random) -> Iterator[str]:
    while True:
        yield from rng.sample(wordings, len(wordings))


def _message(
    queue: str, wording: str, names: dict[str, Any], items: list[str], rng: random.Random
) -> tuple[str, dict[str, Any]]:
    """A message and its ticket: the queue, and item, order number and urgency where the message states them."""
    ticket: dict[str, Any] = {"queue": queue}
    text = _chosen(wording, rng)
    if "{item}" in text:
        ticket["item"] = rng.choice(items)
        text = text.replace("{item}", ticket["item"])
    if "{order}" in text:
        ticket["order"] = _order_number(rng)
        text = _with_order(text, ticket["order"], rng)
    sentences = [text[0].upper() + text[1:]]
    if rng.random() < 0.25:
        sentences.insert(rng.randrange(2), _chosen(rng.choice(names["context"]), rng))
    mood = rng.random()
    if mood < 0.25:
        ticket["urgent"] = True
        sentences.insert(rng.choice((0, len(sentences))), _chosen(rng.choice(names["urgent"]), rng))
    elif mood < 0.35:
        sentences.append(_chosen(rng.choice(names["calm"]), rng))
    if rng.random() < 0.4:
        sentences[0] = _greeted(rng.choice(GREETINGS), sentences[0])
    if rng.random() < 0.3:
        sentences.append(rng.choice(CLOSINGS))
    return _typed(" ".join(sentences), ticket, rng), ticket


def _greeted(greeting: str, sentence: str) -> str:
    """A greeting before a sentence, which goes on in small letters unless it begins with I, ASAP or a number."""
    first = sentence.split(" ")[0]
    goes_on_small = first.istitle() and first != "I"
    return f"{greeting} {sentence[0].lower() if goes_on_small else sentence[0]}{sentence[1:]}"


def _chosen(wording: str, rng: random.Random) -> str:
    return _ALTERNATIVES.sub(lambda match: rng.choice(match[1].split("|")), wording)


def _order_number(rng: random.Random) -> str:
    digits = str(rng.randrange(10_000, 100_000))
    return digits if rng.random() < 0.7 else f"{rng.choice('ABDHKMPT')}{rng.choice('ELNRSX')}-{digits[:4]}"


def _with_order(text: str, number: str, rng: random.Random) -> str:
    """Put the order in; at the beginning of a sentence it is in capitals."""
    phrase = rng.choice(ORDERS).format(n=number)
    first = phrase[0].upper() + phrase[1:]
    return re.sub(r"(^|[.!?] )?\{order\}", lambda match: (match[1] or "") + (first if match[1] else phrase), text)


def _typed(text: str, ticket: dict[str, Any], rng: random.Random) -> str:
    """The message as people type it: sometimes in small letters, without the last mark, or with two letters swapped."""
    kind = rng.random()
    if kind < 0.12:
        order = ticket.get("order")
        text = text.lower() if order is None else text.lower().replace(order.lower(), order)
    elif kind < 0.2:
        text = text.rstrip(".!?")
    elif kind < 0.28:
        kept = {word for value in ticket.values() for word in str(value).split()}
        words = text.split(" ")
        long = [i for i, word in enumerate(words) if len(word) > 4 and word.isalpha() and word not in kept]
        if long:
            at, word = (i := rng.choice(long)), words[i]
            cut = rng.randrange(1, len(word) - 2)
            words[at] = word[:cut] + word[cut + 1] + word[cut] + word[cut + 2 :]
            text = " ".join(words)
    return text


def main() -> None:
    """Write the three files."""
    wordings = yaml.safe_load((HERE / "wordings.yaml").read_text(encoding="utf-8"))
    rng, seen = random.Random(SEED), set[str]()
    for split in COUNTS:
        lines = [json.dumps(row, ensure_ascii=False) + "\n" for row in make_rows(split, wordings, rng, seen)]
        (HERE / "data" / f"{split}.jsonl").write_text("".join(lines), encoding="utf-8")


if __name__ == "__main__":
    main()
