"""Write the fine-tuning data: one sentence in English or Chinese, and the JSON action that it asks for.

    python make_data.py            rewrites data/train.jsonl, data/validation.jsonl and data/test.jsonl

Train and validation share their wordings (wordings/train.yaml); the test rows use other ones (wordings/test.yaml),
and no sentence occurs twice. The languages alternate.
"""

from __future__ import annotations

import argparse
import json
import random
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

from lexicon import LANGUAGES, random_action, read_wordings, sentence, to_json


class Split(NamedTuple):
    """A file of rows: which wordings, how many rows, and a seed of its own."""

    wordings: str
    rows: int
    seed: int


SPLITS = {
    "test": Split("test", 300, 5),
    "validation": Split("train", 200, 2),
    "train": Split("train", 2400, 1),
}


def rows(split: Split, taken: set[str]) -> Iterator[dict[str, list[dict[str, str]]]]:
    """The rows of a split; sentences that were used before are skipped, and the new ones are added to them."""
    rng = random.Random(split.seed)
    wordings = read_wordings(split.wordings)
    for number in range(split.rows):
        language = LANGUAGES[number % len(LANGUAGES)]
        said = ""
        while not said or said.lower() in taken:
            intent, action = random_action(rng)
            said = sentence(rng, language, wordings, intent, action)
        taken.add(said.lower())
        yield {
            "messages": [
                {"role": "user", "content": said},
                {"role": "assistant", "content": to_json(action)},
            ]
        }


def write_splits(folder: Path) -> None:
    """Write every split as JSON lines."""
    folder.mkdir(parents=True, exist_ok=True)
    taken: set[str] = set()
    for split_name, split in SPLITS.items():
        lines = [json.dumps(row, ensure_ascii=False) + "\n" for row in rows(split, taken)]
        (folder / f"{split_name}.jsonl").write_text("".join(lines), encoding="utf-8", newline="\n")


def main() -> None:
    """Write the three files."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, default=Path(__file__).parent / "data")
    write_splits(parser.parse_args().out)


if __name__ == "__main__":
    main()
