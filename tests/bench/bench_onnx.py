"""int4 for ONNX: the export beside onnxruntime-genai's builder, the decoder beside its runtime and beside llama.cpp.

    python -m tests.bench.bench_onnx [--layers N] [--export-rounds N] [--rounds N] [--threads N]

A random model of Llama-3.2-1B's shape (1.24 billion weights; fewer with --layers). Export: a process each, in turn;
ours merges an r=16 adapter on all linear layers, theirs takes the base as it is. Decoding: one process for each
contestant, all on the same number of threads, which take turns within each round; greedy, random prompts. The peers'
environment is made in build/bench the first time.
"""

from __future__ import annotations

import argparse
import shutil
import statistics
import subprocess
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path

from tests.bench.genai_environment import GENAI, genai_python
from tests.bench.models import LLAMA_1B, write_adapter, write_llama
from tests.bench.processes import Cost, run, size

HERE = Path("build/bench")
SCRIPT = Path(__file__).with_name("contestants.py")
CONTEXT = 2048
WARMING = 160  # tokens before the first round: what the runtimes do for long answers has been done by then


@dataclass
class Entry:
    """A contestant, and tokens a second of each round."""

    name: str
    library: str
    path: Path
    python: Path
    threads: int
    prefill: list[float] = field(default_factory=list)
    decode: list[float] = field(default_factory=list)

    def __post_init__(self) -> None:
        command = [str(self.python), str(SCRIPT), self.library, str(self.path), str(self.threads), str(CONTEXT)]
        self._process = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
        self._answer()

    def _answer(self) -> str:
        assert self._process.stdout is not None
        answer = self._process.stdout.readline()
        if not answer:
            sys.exit(f"{self.name} has ended with status {self._process.wait()}")
        return answer

    def turn(self, prompt: int, tokens: int) -> None:
        """One prompt and its answer."""
        assert self._process.stdin is not None
        self._process.stdin.write(f"{prompt} {tokens}\n")
        self._process.stdin.flush()
        first, *others = map(float, self._answer().split())
        self.prefill.append(prompt / first)
        self.decode.append(1 / statistics.median(others))

    def close(self) -> None:
        """End the process."""
        assert self._process.stdin is not None
        self._process.stdin.close()
        self._process.wait()


def _export(base: Path, adapter: Path, kind: str, types: str, out: Path) -> Cost:
    command = [sys.executable, "-m", "edgetune", "merge-export", "--base", str(base), "--adapter", str(adapter)]
    return replace(run([*command, "--format", kind, "-q", types, "-o", str(out), "--overwrite"]), written=size(out))


def _theirs(base: Path, out: Path, python: Path) -> Cost:
    shutil.rmtree(out, ignore_errors=True)
    builder = [str(python), "-m", "onnxruntime_genai.models.builder", "-m", str(base), "-o", str(out)]
    return replace(run([*builder, "-p", "int4", "-e", "cpu", "-c", str(HERE / "genai-cache")]), written=size(out))


def _compare_exports(base: Path, adapter: Path, python: Path, rounds: int) -> None:
    ours, theirs = [], []
    for _ in range(rounds):
        ours.append(_export(base, adapter, "onnx", "int4", HERE / "onnx-int4"))
        theirs.append(_theirs(base, HERE / "genai-int4", python))
    rows: tuple[tuple[str, float, Callable[[Cost], float]], ...] = (
        ("wall time, s", 1, lambda cost: cost.seconds),
        ("processor time, s", 1, lambda cost: cost.processor),
        ("peak memory, MB", 1e6, lambda cost: cost.peak),
        ("written, MB", 1e6, lambda cost: cost.written),
    )
    print(f"{'export, median of ' + str(rounds):34}{'ours':>10}{'theirs':>10}")
    for name, scale, value in rows:
        one, other = (statistics.median(map(value, costs)) / scale for costs in (ours, theirs))
        print(f"{name:34}{one:10.1f}{other:10.1f}   x{other / one:.1f}")
    imports = run([sys.executable, "-c", "import edgetune.cli, edgetune_converters.exporting, onnx"]).peak
    print(f"of our peak memory {imports / 1e6:.0f} MB are there after the imports\n", flush=True)


def _entries(python: Path, gguf: Path, threads: int) -> list[Entry]:
    here, ours, theirs = Path(sys.executable), HERE / "onnx-int4", HERE / "genai-int4"
    return [
        Entry("edgetune, int4", "edgetune", ours, here, threads),
        Entry("llama.cpp, Q4_K_M", "llama.cpp", gguf, here, threads),
        Entry("edgetune, Q4_K_M", "edgetune", gguf, here, threads),
        Entry(f"genai {GENAI}, int4", "onnxruntime-genai", theirs, python, 0),
        Entry(f"genai, told {threads} threads", "onnxruntime-genai", theirs, python, threads),
        Entry("edgetune, int4 of genai's builder", "edgetune", theirs, here, threads),
        Entry("genai, int4 of edgetune", "onnxruntime-genai", ours, python, threads),
    ]


def _race(entries: Sequence[Entry], rounds: int, prompt: int, tokens: int) -> None:
    for entry in entries:
        entry.turn(prompt, max(tokens, WARMING))
        entry.prefill.clear()
        entry.decode.clear()
    for start in range(rounds):  # each has each of the others before it
        for turn in range(len(entries)):
            entries[(start + turn * (1 + start % 2)) % len(entries)].turn(prompt, tokens)
    first = entries[0]
    print(f"{f'tokens/s, median of {rounds}':34}{'prompt':>10}{'ours over':>11}{'answer':>10}{'ours over':>11}")
    for entry in entries:
        parts = []
        for own, other in ((first.prefill, entry.prefill), (first.decode, entry.decode)):
            ratio = statistics.median(a / b for a, b in zip(own, other, strict=True))
            parts.append(f"{statistics.median(other):10.1f}{f'x{ratio:.2f}':>11}")
        print(f"{entry.name:34}{''.join(parts)}")


def main() -> None:
    """Print the tables."""
    parser = argparse.ArgumentParser()
    parser.add_argument("--layers", type=int, default=16)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--export-rounds", type=int, default=3, help="0: decode what the last run has exported")
    parser.add_argument("--rounds", type=int, default=9)
    parser.add_argument("--prompt", type=int, default=128, help="tokens of each prompt")
    parser.add_argument("--tokens", type=int, default=24, help="tokens of each answer")
    options = parser.parse_args()
    HERE.mkdir(parents=True, exist_ok=True)
    shape = LLAMA_1B._replace(layers=options.layers)
    name = "1b" if shape == LLAMA_1B else f"1b-{options.layers}"
    base, adapter = HERE / f"base-{name}", HERE / f"adapter-{name}"
    if not (base / "config.json").exists():
        write_llama(base, shape)
        write_adapter(adapter, base, shape)
    python = genai_python((HERE / "genai").absolute())
    gguf = HERE / "q4_k_m.gguf"
    if options.export_rounds:
        _compare_exports(base, adapter, python, options.export_rounds)
        _export(base, adapter, "gguf", "q4_k_m", gguf)
    entries = _entries(python, gguf, options.threads)
    _race(entries, options.rounds, options.prompt, options.tokens)
    for entry in entries:
        entry.close()


if __name__ == "__main__":
    main()
