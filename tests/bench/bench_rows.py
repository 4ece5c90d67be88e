"""How fast rows are checked, without their tokens, and in how much memory: `make bench-rows`.

Each file is read in a process of its own, beside one that only parses its lines as JSON. MB/s are those of the text, by
CPU time and by wall time; the memory is what reading adds to the peak of a process that has imported the same modules.
"""

from __future__ import annotations

import argparse
import csv
import gzip
import json
import random
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

WORDS = ("lamp", "kitchen", "dim", "the", "to", "percent", "please", "bedroom", "heat", "turn", "off", "on", "für")
DISTINCT = 10_000
CHILD = """
import json, resource, sys, time
from edgetune.data.sources import read_source
path, what = sys.argv[1:]
before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
cpu, wall = time.process_time(), time.perf_counter()
if what == "rows":
    count = len(read_source(path).rows)
else:
    with open(path, encoding="utf-8") as lines:
        count = sum(json.loads(line) is not None for line in lines)
cpu, wall = time.process_time() - cpu, time.perf_counter() - wall
after = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
print(json.dumps([count, cpu, wall, (after - before) / 1024]))
"""


def _texts() -> Iterator[tuple[str, str]]:
    draw = random.Random(1)
    while True:
        yield " ".join(draw.choices(WORDS, k=draw.randint(4, 40))), " ".join(draw.choices(WORDS, k=draw.randint(4, 60)))


def _messages(question: str, answer: str) -> dict[str, Any]:
    system = {"role": "system", "content": "You are a helpful assistant."}
    talk = [system, {"role": "user", "content": question}, {"role": "assistant", "content": answer}]
    return {"id": 1, "messages": talk}


def _sharegpt(question: str, answer: str) -> dict[str, Any]:
    return {"conversations": [{"from": "human", "value": question}, {"from": "gpt", "value": answer}]}


def _alpaca(question: str, answer: str) -> dict[str, Any]:
    return {"instruction": question, "input": "", "output": answer}


def _tools(question: str, answer: str) -> dict[str, Any]:
    tool = {"type": "function", "function": {"name": "dim", "parameters": {"type": "object", "properties": {}}}}
    return {**_messages(question, answer), "tools": [tool]}


FORMATS: dict[str, Callable[[str, str], dict[str, Any]]] = {
    "messages": _messages, "messages with tools": _tools, "sharegpt": _sharegpt, "alpaca": _alpaca,
}  # fmt: skip


def _write(path: Path, lines: list[str], rows: int) -> int:
    """Write the lines again and again, and return the number of bytes of the text."""
    data = "".join(lines).encode()
    opener = gzip.open if path.suffix == ".gz" else open
    with opener(path, "wb") as file:
        for _ in range(rows // DISTINCT):
            file.write(data)
    return len(data) * (rows // DISTINCT)


def _measure(path: Path, what: str) -> tuple[int, float, float, float]:
    done = subprocess.run([sys.executable, "-c", CHILD, str(path), what], check=True, capture_output=True, text=True)
    count, cpu, wall, memory = json.loads(done.stdout)
    return count, cpu, wall, memory


def main() -> None:
    """Print the table."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--rows", type=int, default=1_000_000, help="rows of each file")
    rows = parser.parse_args().rows // DISTINCT * DISTINCT
    texts = _texts()
    pairs = [next(texts) for _ in range(DISTINCT)]
    print("| rows | MB | MB/s of CPU time | MB/s | rows/s | JSON alone, MB/s of CPU time | added memory, MB |")
    print("| --- | --- | --- | --- | --- | --- | --- |")
    with tempfile.TemporaryDirectory() as folder:
        for name, make in FORMATS.items():
            lines = [json.dumps(make(*pair), ensure_ascii=False) + "\n" for pair in pairs]
            _report(name, Path(folder) / "rows.jsonl", lines, rows, beside=True)
        _report("alpaca, .jsonl.gz", Path(folder) / "rows.jsonl.gz", lines, rows, beside=False)
        path = Path(folder) / "rows.csv"
        with path.open("w", newline="") as file:
            csv.writer(file).writerows(pairs)
        _report("question and answer, .csv", path, path.read_text().splitlines(keepends=True), rows, beside=False)


def _report(name: str, path: Path, lines: list[str], rows: int, *, beside: bool) -> None:
    if path.suffix == ".csv":
        header = "question,answer\n"
        size = _write(path, lines, rows)
        path.write_text(header + path.read_text())
    else:
        size = _write(path, lines, rows)
    megabytes = size / 1e6
    count, cpu, wall, memory = _measure(path, "rows")
    assert count == rows, (count, rows)
    alone = f"{megabytes / _measure(path, 'json')[1]:.0f}" if beside else ""
    speeds = f"{megabytes / cpu:.1f} | {megabytes / wall:.1f} | {count / wall:,.0f}"
    print(f"| {name} | {megabytes:.0f} | {speeds} | {alone} | {memory:.0f} |", flush=True)


if __name__ == "__main__":
    main()
